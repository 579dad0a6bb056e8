"""A data set in its own layout as the rows of a run: splits, views, policy, films that are not there, the guard."""

import json

import numpy as np
import pytest
from made_tables import write_table
from PIL import Image

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.sources import manifest, splits
from cxr_jax.data.sources.films import rows as film_rows
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_14]


@pytest.fixture
def root(tmp_path):
    """CheXpert of 40 patients: the first has one lateral more, the second is blank, the third all absent."""
    rows = []
    for patient in range(40):
        split = "valid" if patient >= 36 else "train"
        states = ["0.0"] * 14
        if patient > 2:
            states = ["", "1.0", "", "-1.0", "0.0", "-1.0", "", "", "", "", "", "", "", ""]
        elif patient == 1:
            states = [""] * 14
        for view, side in ((1, "frontal"), (2, "lateral"))[: 2 if patient == 0 else 1]:
            path = f"CheXpert-v1.0/{split}/patient{patient:05d}/study1/view{view}_{side}.jpg"
            rows.append([path, "Male", "50", side.title(), "PA" * (view == 1), *states])
            file = tmp_path / path
            file.parent.mkdir(parents=True) if not file.parent.exists() else None
            Image.new("L", (32, 32), 5 * patient).save(file)
    for split in ("train", "valid"):
        chosen = [row for row in rows if f"/{split}/" in row[0]]
        write_table(tmp_path / f"CheXpert-v1.0/{split}.csv", HEADER, chosen)
    return tmp_path


def config(root, **values):
    # Each test has a folder of its own, and a run reads a set once.
    return DataConfig.with_defaults(source="chexpert", root=str(root), size=28, **values)


def test_rows_of_a_run(root):
    opened = splits.open_splits(config(root, split="train"))
    sources = [opened.train, *opened.select.values(), *opened.test.values()]
    rows = {row.id: row for source in sources for row in source.rows}
    # 36 patients of the split, one of which nothing is known; the lateral film is not asked about.
    assert len(rows) == 35 == sum(len(source) for source in sources)
    assert list(opened.test) == ["chexpert"] == [opened.out_of_distribution]
    assert len({row.patient for row in rows.values()}) == 35
    known = next(row for row in rows.values() if row.patient == "patient00003")
    assert known.solution == "Enlarged Cardiomediastinum" and known.view == "frontal"
    assert (known.subject.sex, known.subject.age, known.subject.projection) == ("M", 50, "PA")
    labels = dict(zip(CHEXPERT_14, zip(known.known, known.hedged, strict=True), strict=True))
    assert labels["Lung Lesion"] == (True, False) and labels["Edema"] == (False, True)
    assert labels["Fracture"] == (False, False)
    batch = opened.train.batch([0])
    assert batch["image"].shape == (1, 28, 28) and batch["prompts"] == [
        "Find abnormalities and support devices."
    ]
    assert "2 films left out: other splits" not in opened.about
    assert any("5 films left out: other splits or views" in line for line in opened.about)
    assert any("1 films left out: no label known" in line for line in opened.about)


def test_a_film_on_which_nothing_is_found(root):
    """All labels are known to be absent: a truth without a positive, which has always been left out."""
    opened = splits.open_splits(config(root, split="train"), only_scores=True)
    source = opened.test["chexpert"]
    place = next(i for i, row in enumerate(source.rows) if row.patient == "patient00002")
    batch = source.batch([place])
    assert (
        not batch["solution"].any() and batch["known"].all() and source.rows[place].solution == ""
    )


def test_an_evaluation_scores_all(root):
    opened = splits.open_splits(config(root, split="valid"), only_scores=True)
    # Nothing trains, and nothing that is scored chooses.
    assert len(opened.test["chexpert"]) == 4 and opened.select == {}
    assert opened.label_policy == (
        "chexpert valid (v1.0), radiologists' labels; uncertain unknown; blank unknown; parents as given; "
        "No Finding as given; map chexpert 1"
    )
    opened = splits.open_splits(config(root, split="valid", select_split="train"), only_scores=True)
    assert len(opened.test["chexpert"]) == 4 and len(opened.select["chexpert"]) == 35
    with pytest.raises(UserError, match="4 of its patients are scored, too"):
        data = config(root, split="valid", select_split="validate")
        splits.open_splits(data, only_scores=True)
    # A manifest is scored as its runs hold out, unless all are asked for.
    assert (
        len(splits.open_splits(config(root, scored="held_out"), only_scores=True).test["chexpert"])
        < 20
    )


def test_the_policy_is_asked_once(root):
    states = {}
    for uncertain in ("ignore", "zeros", "ones", "chexpert"):
        data = config(root, uncertain=uncertain, blank="negative", no_finding="derived")
        [row] = [row for row in splits.load_films(data) if row.patient == "patient00003"]
        states[uncertain] = row.positive, row.known[INDEX["Edema"]], row.known[INDEX["No Finding"]]
    assert states["ignore"] == (("Enlarged Cardiomediastinum",), False, True)
    assert states["zeros"] == (("Enlarged Cardiomediastinum",), True, True)
    assert states["ones"][0] == ("Enlarged Cardiomediastinum", "Lung Opacity", "Edema")
    assert states["chexpert"][0] == ("Enlarged Cardiomediastinum", "Edema")


def test_films_that_are_asked_about_together(root):
    rows = splits.load_films(config(root, images="frontal,lateral"))
    assert [len(row.image_paths) for row in rows if row.patient == "patient00000"] == [2]
    assert {len(row.image_paths) for row in rows if row.patient != "patient00000"} == {1}


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"split": "test"}, "config.data.split='test': chexpert has train, valid"),
        ({"uncertain": "maybe"}, "policy uncertain"),
        ({"labels": "negbio"}, "labels=negbio"),
    ],
)
def test_refused(root, values, reason):
    with pytest.raises(UserError, match=reason):
        splits.open_splits(config(root, **values))


def test_films_that_are_not_there(root):
    film = next(root.rglob("view1_frontal.jpg"))
    film.unlink()
    with pytest.raises(UserError, match="1 of 41 films that were looked for are not there"):
        splits.load_films(config(root))
    assert len(splits.load_films(config(root, max_bad=1))) == 39
    for film in root.rglob("*.jpg"):
        film.unlink()
    film_rows._read_films.cache_clear()
    with pytest.raises(UserError, match="none was found"):
        splits.load_films(config(root))


def test_a_set_without_patients_says_so(tmp_path):
    table = [[str(n), "0"] for n in range(4)]
    write_table(tmp_path / "stage_2_train_labels.csv", ["patientId", "Target"], table)
    (tmp_path / "stage_2_train_images").mkdir()
    for n in range(4):
        Image.new("L", (32, 32)).save(tmp_path / f"stage_2_train_images/{n}.png")
    data = DataConfig.with_defaults(source="rsna", root=str(tmp_path), size=28)
    with pytest.raises(UserError, match="none of the films of rsna is known to be frontal"):
        splits.open_splits(data)
    data = DataConfig.with_defaults(source="rsna", root=str(tmp_path), size=28, views=("any",))
    assert "no patient is known of any row" in "".join(splits.open_splits(data).warnings)


def test_digest_is_of_films_and_labels(root):
    first = splits.digest(config(root))
    assert splits.digest(config(root, split="train")) != first
    path = root / "CheXpert-v1.0/valid.csv"
    text = path.read_text()
    path.write_text(text.replace("\n", "\r\n"))
    assert splits.digest(config(root)) == first
    path.write_text(text.replace("-1.0", "1.0", 1))
    assert splits.digest(config(root)) != first


def test_manifest_rows_without_a_positive(tmp_path):
    """Rows of `cxr-jax sources` say what is absent; a row that says nothing is refused as before."""
    Image.new("L", (32, 32)).save(tmp_path / "a.png")

    def read(**row):
        record = {"image": "a.png", "prompt": "Find.", "completion": "x", **row}
        (tmp_path / "rows.jsonl").write_text(json.dumps(record))
        return manifest.load_rows(tmp_path / "rows.jsonl", tmp_path)

    absent = dict.fromkeys(CHEXPERT_14, 0) | {"Edema": -1, "Fracture": None}
    for solution in ({}, {"solution": ""}, {"solution": None}, {"solution": []}):
        [row] = read(labels=absent, **solution)
        assert row.solution == "" and row.positive == () and sum(row.known) == 12
    [row] = read(labels=absent | {"Fracture": 1})
    assert row.positive == ("Fracture",)
    source = manifest.FilesSource([row], 28)
    assert source.solutions([0]).sum() == 1
    for labels in ({}, {"labels": None}, {"labels": {}}, {"labels": {"Edema": None}}):
        with pytest.raises(UserError, match="no solution"):
            read(**labels)
    with pytest.raises(UserError, match="contradict"):
        read(labels=absent, solution="Edema")


def test_states_of_a_large_set_are_arrays(root):
    films = film_rows.open_films(config(root))
    assert films.states.dtype == np.int8 and films.states.shape == (len(films), 14)
