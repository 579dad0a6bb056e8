"""Several sources in one run: who trains, who chooses, who tests, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from cxr_jax import run
from cxr_jax.config import command_line
from cxr_jax.config.sections import DataConfig, RunConfig
from cxr_jax.data.sources.several import run_sources
from cxr_jax.data.sources.several.mixture import Mixture, tried
from cxr_jax.errors import UserError
from cxr_jax.training import checks, earlier_runs


def _write(folder, name, patients, side=40):
    """A manifest of two films a patient."""
    folder.mkdir(exist_ok=True)
    rows = []
    for patient in patients:
        for film in range(2):
            file = f"{name}_{patient}_{film}.png"
            grey = np.full((side, side), patient % 200, np.uint8)
            Image.fromarray(grey).save(folder / file)
            talk = [
                {"role": "user", "content": "<image>What is seen?"},
                {"role": "assistant", "content": "<think>Edema.</think><answer>Edema</answer>"},
            ]
            row = {"id": file, "image": file, "patient_id": patient, "solution": "Edema"}
            rows.append({**row, "messages": talk})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "files", "manifest": str(folder / f"{name}.jsonl"), "image_root": str(folder)}


@pytest.fixture
def specs(tmp_path):
    """Three manifests of other patients."""
    return {
        "one": _write(tmp_path, "one", range(20)),
        "two": _write(tmp_path, "two", range(100, 109)),
        "test": _write(tmp_path, "test", range(200, 230)),
    }


def _data(train=None, **eval_sets):
    return DataConfig.with_defaults(source="files", size=224, train=train or {}, eval=eval_sets)


def test_sources_train_together_and_a_named_set_is_divided_by_patient(specs):
    train = {"one": {**specs["one"], "weight": 3}, "two": specs["two"], "ph": {"source": "phantom"}}
    opened = run_sources.open_sources(
        _data(train, far=specs["test"], b={"source": "phantom", "hospital": "B"})
    )
    assert isinstance(opened.train, Mixture) and opened.train.shares == {
        "one": 3,
        "two": 1,
        "ph": 1,
    }
    assert set(opened.select) == set(opened.test) == {"far", "b"}
    assert opened.out_of_distribution == "b"  # the first by name
    chosen, tested = (
        {row.patient for row in part["far"].rows} for part in (opened.select, opened.test)
    )
    assert chosen and tested and not chosen & tested
    assert chosen | tested == {str(patient) for patient in range(200, 230)}
    # The same patients for every seed, and beside other sets.
    other = DataConfig.with_defaults(
        source="files",
        size=224,
        seed=7,
        train=train,
        eval={"far": specs["test"], "b": {"source": "phantom"}},
    )
    again = run_sources.open_sources(other)
    assert [row.id for row in again.test["far"].rows] == [row.id for row in opened.test["far"].rows]
    batch = opened.train.batch(np.arange(40))
    kinds = [name.partition(":")[0] for name in batch["ids"]]
    assert {kind: kinds.count(kind) for kind in train} == {"one": 24, "two": 8, "ph": 8}
    assert batch["image"].shape == (40, 224, 224)
    said = opened.train.conversations(batch, np.arange(40))
    assert [words[-1].content.endswith(">Edema</answer>") for words in said].count(True) >= 32
    assert len(tried(opened.train, 5)[0]) == 40 + 18 + 5


def test_a_named_set_stands_beside_the_held_out_patients_of_one_source(specs):
    own = {key: specs["one"][key] for key in ("manifest", "image_root")}
    data = DataConfig.with_defaults(source="files", **own, eval={"far": specs["test"]})
    opened = run_sources.open_sources(data)
    assert list(opened.test) == ["files", "far"] and opened.out_of_distribution == "far"
    opened = run_sources.open_sources(
        DataConfig.with_defaults(source="files", **own, eval={"far": specs["test"]}, ood="files")
    )
    assert opened.out_of_distribution == "files"
    # An evaluation scores all of it.
    scored = run_sources.open_sources(data, only_scores=True)
    assert len(scored.test["far"]) == 60


def test_traces_are_read_with_the_words_of_whatever_is_looked_at(specs):
    phantom = {"source": "phantom"}
    for train, looked_at, words in (
        ({"one": specs["one"]}, {"b": phantom}, True),
        ({"one": specs["one"], "ph": phantom}, {"far": specs["test"]}, True),
        ({"one": specs["one"]}, {"far": specs["test"]}, False),
    ):
        opened = run_sources.open_sources(_data(train, **looked_at))
        assert (opened.lexicon is not None) == words


def test_what_cannot_be_is_refused(specs, tmp_path):
    train = {"one": specs["one"]}
    for data, message in (
        (_data(train), "needs config.data.eval"),
        (
            _data({"one": {**specs["one"], "manifest": str(tmp_path / "no")}}, far=specs["test"]),
            "source one: ",
        ),
        (_data(train, far=_write(tmp_path, "alone", [7])), "far: is of one patient"),
        (
            DataConfig.with_defaults(source="phantom", eval={"A": specs["test"]}),
            "A: the run has a set of that name",
        ),
        (
            DataConfig.with_defaults(source="phantom", eval={"far": specs["test"]}, ood="C"),
            "ood='C' is none of",
        ),
        (
            DataConfig.with_defaults(source="phantom", size=56, eval={"far": specs["test"]}),
            "images of one size",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run_sources.open_sources(data)


def test_patients_of_a_named_set_do_not_train(specs, tmp_path):
    shared = _write(tmp_path, "shared", [5, 300])
    data = {"source": "files", "train": {"one": specs["one"], "ph": {"source": "phantom"}}}
    overrides = {"data": {**data, "eval": {"far": shared}}, "locate_steps": 0, "locate_weight": 0}
    settings = RunConfig.from_config(run.resolve({"task": "sft", **overrides}, {}))
    opened = run_sources.open_sources(settings.data)
    with pytest.raises(UserError, match=r"2 of 40 training films are of patients of far"):
        earlier_runs.check_contamination(settings, opened)


def test_a_run_knows_its_rows_again(specs):
    data = _data({"one": specs["one"]}, far=specs["test"])
    before = run_sources.digest(data)
    assert before == run_sources.digest(_data({"one": specs["one"]}, far=specs["test"]))
    assert before != run_sources.digest(_data({"two": specs["two"]}, far=specs["test"]))
    with open(specs["test"]["manifest"], "a") as file:
        file.write("\n")
    assert before != run_sources.digest(data)


def test_the_command_line_and_python_say_sources_alike(specs):
    spec = specs["test"]
    text = f"far: files {spec['manifest']} image_root={spec['image_root']}"
    by_text = run.resolve("sft:files", {"data.eval": text})
    by_dict = run.resolve("sft:files", {"data": {"eval": {"far": spec}}})
    assert by_text.data.eval.to_dict() == by_dict.data.eval.to_dict() == {"far": spec}
    arguments = [
        "main",
        "--config=sft:files",
        f"--config.data.eval={text}",
        "--config.data.train",
        "phantom",
    ]
    kept, sources = command_line._without_sources(arguments)
    assert kept == arguments[:2] and sources == {"eval": text, "train": "phantom"}
    with pytest.raises(UserError, match="needs a value"):
        command_line._without_sources(["main", "--config.data.train"])


def test_checks_see_what_trains_together(specs):
    config = run.resolve(
        "sft:files", {"data.train": {"one": specs["one"], "ph": {"source": "phantom"}}}
    )
    with pytest.raises(UserError, match=r"needs config\.data\.eval"):
        checks.check_common(config)
    # Of phantoms alone, too, before anything is written.
    with pytest.raises(UserError, match=r"config\.data\.ood='Z' is none of the sets"):
        checks.check_common(run.resolve("rl", {"data.ood": "Z"}))


def test_results_are_called_what_is_looked_at(specs):
    phantoms, films = {"ph": {"source": "phantom"}}, {"far": specs["test"]}
    for source, train, looked_at, kind in (
        ("phantom", {}, {}, "phantom"),
        ("phantom", {}, films, "files"),
        ("files", {"one": specs["one"]}, phantoms, "phantom"),
        ("files", {"one": specs["one"]}, {**phantoms, **films}, "files"),
        ("files", {}, phantoms, "files"),
    ):
        data = DataConfig.with_defaults(source=source, train=train, eval=looked_at)
        assert data.shown_kind == kind
