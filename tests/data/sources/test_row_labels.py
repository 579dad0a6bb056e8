"""Labels of rows: the policy that goes with them, what is blank and what is not; and the one file of each row."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.sources import manifest, splits
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX


def row_of(number, solution="Edema", **fields):
    row = {"id": str(number), "image": f"{number}.png", "patient_id": number}
    talk = [{"from": "human", "value": "Find."}]
    return row | {"conversations": talk, "solution": solution} | fields


def load(folder, *rows):
    for row in rows:
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(folder / os.path.basename(row["image"]))
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest.load_rows(folder / "m.jsonl", folder)


def names(mask):
    return {name for name, is_in in zip(CHEXPERT_14, mask, strict=True) if is_in}


def blank(row):
    return names(~np.array(row.known) & ~np.array(row.hedged))


LABELS = {"Edema": 1, "Fracture": 0, "Pneumonia": -1}


def test_rows_without_a_policy_mean_what_they_meant(tmp_path):
    partly, wholly = load(tmp_path, row_of(0, labels=LABELS), row_of(1))
    assert str(partly.policy) == "blank=unknown, uncertain=unknown"
    assert str(wholly.policy) == "blank=negative, uncertain=unknown"
    assert names(partly.known) == {"Edema", "Fracture"} and all(wholly.known)


def test_a_policy_of_the_rows_settles_their_labels(tmp_path):
    policies = [{"blank": "negative"}, {"uncertain": "negative"}, {"uncertain": "positive"}, {}]
    solutions = ["Edema", "Edema", "Edema, Pneumonia", "Edema"]
    rows = [
        row_of(i, solution, labels=LABELS, policy=policy)
        for i, (solution, policy) in enumerate(zip(solutions, policies, strict=True))
    ]
    negative, ignored, positive, unknown = load(tmp_path, *rows)
    assert names(negative.known) == set(CHEXPERT_14) - {"Pneumonia"}
    assert names(ignored.known) == names(positive.known) == {*LABELS}
    assert positive.solution == "Edema, Pneumonia" and names(unknown.known) == {"Edema", "Fracture"}


@pytest.mark.parametrize("policy", ["negative", {"blank": "no"}, {"blanks": "unknown"}, [1]])
def test_other_policies_are_refused(tmp_path, policy):
    with pytest.raises(UserError, match=r"m.jsonl:1: policy"):
        load(tmp_path, row_of(0, policy=policy))


def test_what_is_blank_is_neither_uncertain_nor_a_parent_nor_a_label_that_the_set_lacks(tmp_path):
    states = dict.fromkeys(
        ("Edema", "Cardiomegaly", "Lung Opacity", "Enlarged Cardiomediastinum"), 0
    )
    full = row_of(0, "Fracture", labels=states | {"Fracture": 1, "Pneumonia": 0})
    edema = row_of(1, "Edema", labels={"Edema": 1, "Pneumonia": -1})
    unsure = row_of(2, "Fracture", labels={"Fracture": 1, "Cardiomegaly": -1})
    first, second, third = load(tmp_path, full, edema, unsure)
    assert blank(first) == set()  # nobody knows the other labels: the set does not have them
    assert blank(second) == {"Cardiomegaly", "Enlarged Cardiomediastinum", "Fracture"}
    assert blank(third) == {"Edema", "Lung Opacity", "Pneumonia"}
    source = manifest.FilesSource([first, second, third], 28)
    known, hedged = source.masks([1])
    batch = source.batch([1])
    assert np.array_equal(batch["known"], known) and np.array_equal(batch["hedged"], hedged)
    assert hedged[0, INDEX["Pneumonia"]] and hedged[0, INDEX["Lung Opacity"]]


def test_a_run_says_its_label_policy_and_warns_where_little_is_known(tmp_path):
    load(tmp_path, *(row_of(i, labels={"Edema": 1}, policy={"blank": "unknown"}) for i in range(6)))
    opened = open_splits(tmp_path)
    said = "blank=unknown, uncertain=unknown; 7% of the label cells known"
    assert opened.label_policy == said and opened.about[1] == f"labels: {said}"
    [warning] = opened.warnings
    assert "only 7% of the label cells are known" in warning
    load(tmp_path, row_of(0), *(row_of(i, labels={"Edema": 1}) for i in range(1, 3)))
    assert open_splits(tmp_path).label_policy.startswith("rows differ: blank=negative, uncertain")


def open_splits(folder):
    facts = {"source": "files", "manifest": str(folder / "m.jsonl"), "image_root": str(folder)}
    return splits.open_splits(DataConfig.with_defaults(**facts, size=28))


@pytest.mark.parametrize(
    "fields", [{"view": "LATERAL"}, {"ViewPosition": "LL"}, {"id": "p/view2_lateral.jpg"}]
)
def test_rows_that_are_no_frontal_films_are_counted_in_one_line(tmp_path, fields):
    load(tmp_path, row_of(0, **fields), *(row_of(i) for i in range(1, 6)))
    [warning] = open_splits(tmp_path).warnings
    assert "1 of 6 rows are no frontal films" in warning


# ---- One file, one name ------------------------------------------------------------------------------


def test_flattened_folders_are_read_while_names_are_unique(tmp_path):
    rows = load(tmp_path, row_of(0, image="p1/a.png"), row_of(1, image="p2/b.png"))
    assert [row.image_path.name for row in rows] == ["a.png", "b.png"]
    # Two rows may ask about one film.
    rows = load(tmp_path, row_of(0, image="p1/a.png"), row_of(1, image="p1\\a.png"))
    assert rows[0].image_path == rows[1].image_path


@pytest.mark.parametrize(
    "first, second", [("p1/a.png", "p2/a.png"), ("a.png", "p2/a.png"), ("p/a.png", "a.png")]
)
def test_a_bare_name_that_two_rows_would_be_read_from_is_refused(tmp_path, first, second):
    with pytest.raises(UserError, match=r"m.jsonl:2: .* would both be read from 'a.png'") as caught:
        load(tmp_path, row_of(0, image=first), row_of(1, image=second))
    assert "\n" not in str(caught.value)


def test_films_in_their_own_folders_are_two(tmp_path):
    for folder in ("p1", "p2"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / folder / "a.png")
    rows = load(tmp_path, row_of(0, image="p1/a.png"), row_of(1, image="p2/a.png"))
    assert len({row.image_path for row in rows}) == 2


# ---- Rows that speak of one film ---------------------------------------------------------------------


def one_film(number, state, patient=0):
    labels = {"Edema": 1} if state is None else {"Edema": 1, "Fracture": state}
    solution = "Edema, Fracture" if state == 1 else "Edema"
    return row_of(number, solution, labels=labels, image="0.png", patient_id=patient)


@pytest.mark.parametrize("states", [(None, 1, 0), (-1, None, 0, 1), (0, None, None, 1)])
def test_truths_contradict_whatever_the_first_row_says(tmp_path, states):
    rows = [one_film(number, state) for number, state in enumerate(states)]
    with pytest.raises(UserError, match="with another solution"):
        load(tmp_path, *rows)
    assert len(load(tmp_path, *rows[:-1])) == len(states) - 1


def test_an_uncertain_label_is_no_repeat_of_a_blank_one(tmp_path):
    load(tmp_path, one_film(0, None), one_film(1, -1), one_film(2, -1))
    rows = manifest.load_rows(tmp_path / "m.jsonl", tmp_path, "once")
    assert [row.times for row in rows] == [1, 2]


def test_a_film_under_two_patients_is_said_in_a_line(tmp_path):
    own = [row_of(number) for number in range(1, 4)]
    for patients, said in (((0, 9), True), ((0, 0), False)):
        load(tmp_path, *own, *(one_film(10 + n, 0, patient) for n, patient in enumerate(patients)))
        data = DataConfig.with_defaults(
            source="files", manifest=str(tmp_path / "m.jsonl"), image_root=str(tmp_path), size=28
        )
        found = [line for line in splits.open_splits(data).warnings if "several patients" in line]
        assert len(found) == said and all("1 of 4 films" in line for line in found)
