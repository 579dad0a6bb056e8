"""Patients that trained a model in an earlier run do not test it unsaid: other seeds, other rows, chains of runs."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.sources import splits
from cxr_jax.errors import UserError
from cxr_jax.training import earlier_runs

PATIENTS = 40


def write_manifest(folder, name, numbers):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "a.png")
    talk = [{"from": "human", "value": "Find."}]
    rows = [
        {
            "id": f"{n}",
            "image": "a.png",
            "subject_id": n,
            "conversations": talk,
            "solution": "Edema",
        }
        for n in numbers
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def data_of(folder, manifest, seed):
    return DataConfig.with_defaults(
        source="files", manifest=manifest, image_root=str(folder), size=28, seed=seed
    )


def train(folder, manifest, seed, model="phantom", boundary=True):
    """A run's folder, as far as it is read here; and the patients that trained."""
    opened = splits.open_splits(data_of(folder, manifest, seed))
    run = folder / f"run{seed}"
    run.mkdir()
    digest = hashlib.sha256(open(manifest, "rb").read()).hexdigest()
    facts = {"source": "files", "manifest_sha256": digest}
    if boundary:
        facts |= opened.sides.facts()
    data = {"source": "files", "manifest": manifest, "image_root": str(folder), "seed": seed}
    config = {"task": "rl", "model": model, "data": data}
    (run / "config.json").write_text(json.dumps({"config": config, "data": facts}))
    return str(run), {row.group for row in opened.train.rows}


def check(folder, model, manifest, seed, only_scores=True):
    data = data_of(folder, manifest, seed)
    opened = splits.open_splits(data)
    held = {row.group for part in (opened.select, opened.test) for row in part["files"].rows}
    warnings = earlier_runs.check_held_out(model, data, opened, only_scores=only_scores)
    return warnings, held


@pytest.mark.parametrize("boundary", [True, False])
def test_another_seed_on_the_same_rows_is_refused(tmp_path, boundary):
    rows = write_manifest(tmp_path, "m.jsonl", range(PATIENTS))
    run, trained = train(tmp_path, rows, 1, boundary=boundary)
    assert check(tmp_path, run, rows, 1)[0] == []
    for model in (run, f"{run}/hf"):
        with pytest.raises(UserError, match=r"give --config.data.seed=1") as caught:
            check(tmp_path, model, rows, 0)
        held = {
            row.group for row in splits.open_splits(data_of(tmp_path, rows, 0)).test["files"].rows
        }
        assert held & trained and "\n" not in str(caught.value)


def test_a_training_run_goes_on_with_another_seed_and_says_so(tmp_path):
    """The defaults of SFT and RL differ; and a run that has begun cannot change its seed."""
    rows = write_manifest(tmp_path, "m.jsonl", range(PATIENTS))
    run, trained = train(tmp_path, rows, 0)
    [warning], held = check(tmp_path, run, rows, 1, only_scores=False)
    assert f"{len(held & trained)} of {len(held)} held-out patients trained it" in warning
    assert "config.data.seed=0" in warning


def test_a_chain_of_seeds_that_no_seed_satisfies_is_evaluated_with_warnings(tmp_path):
    rows = write_manifest(tmp_path, "m.jsonl", range(PATIENTS))
    first, _ = train(tmp_path, rows, 0)
    second, _ = train(tmp_path, rows, 1, model=first)
    for seed in (0, 1, 2):
        warnings, _ = check(tmp_path, second, rows, seed)
        assert len(warnings) == (2 if seed == 2 else 1)


def as_run(folder, model, seed=1):
    """A folder with the config.json of a run on films."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"source": "files", "manifest": "m.jsonl", "seed": seed}
    about = {"config": {"task": "rl", "model": model, "data": data}, "data": {}}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("name", ["phantom", "random:phantom", "random:tiny", "", "gone"])
def test_names_of_models_are_no_run_folders(tmp_path, monkeypatch, name):
    """Neither the folder in which one stands, nor one that is called as a model of ours is."""
    as_run(tmp_path, "phantom")
    monkeypatch.chdir(tmp_path)
    if name and name != "gone":
        as_run(tmp_path / name, "phantom")
    assert not [*earlier_runs.trained_on_films(name)]
    # Nor where a run says that it began with it.
    as_run(tmp_path / "last", name, seed=2)
    assert [run.seed for run in earlier_runs.trained_on_films("last")] == [2]


@pytest.mark.parametrize("name", ["hf", "adapter", "checkpoints", "best", "model"])
def test_only_what_a_run_exports_leads_to_its_folder(tmp_path, name):
    run = as_run(tmp_path / "run", "phantom")
    (run / name).mkdir()
    (run / name / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    found = [each.folder for each in earlier_runs.trained_on_films(str(run / name))]
    assert found == ([run] if name in ("hf", "adapter") else [])
    assert [each.folder for each in earlier_runs.trained_on_films(f"{run / name}/..")] != []


def test_a_chain_of_runs_that_comes_back_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_run(tmp_path / "own", f"{tmp_path}/own/hf", seed=1)
    as_run(tmp_path / "one", "two/hf", seed=2)
    as_run(tmp_path / "two", "link", seed=3)
    (tmp_path / "link").symlink_to("one")
    for model, seeds in (("own", [1]), ("own/hf", [1]), ("one", [2, 3]), ("link", [2, 3])):
        assert [run.seed for run in earlier_runs.trained_on_films(model)] == seeds
    # A long one that does not is followed to its end.
    for number in range(40):
        as_run(tmp_path / f"{number}", f"{number - 1}/hf" if number else "phantom", seed=number)
    assert [run.seed for run in earlier_runs.trained_on_films("39")] == [*range(39, -1, -1)]


def test_runs_that_do_not_keep_who_trained_are_read_by_the_rules_of_their_time(tmp_path):
    """Then a patient was a patient_id, a subject_id or a row's id: another column made each row a patient."""
    rows = write_manifest(tmp_path, "m.jsonl", range(PATIENTS))
    records = [json.loads(line) for line in open(rows)]
    for number, record in enumerate(records):
        record["Patient ID"] = record.pop("subject_id") // 2
        record["conversations"] = [{"from": "human", "value": f"{number}?"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    run, _ = train(tmp_path, rows, 1, boundary=False)
    places = sorted(hashlib.sha256(f"1:{n}".encode()).hexdigest() for n in range(PATIENTS))
    last = places[PATIENTS // 3 - 1]
    trained = {
        str(n // 2) for n in range(PATIENTS) if hashlib.sha256(f"1:{n}".encode()).hexdigest() > last
    }
    # The same rows, and the same patients in other rows; with the seed of the run, which is another split by now.
    other = write_manifest(tmp_path, "other.jsonl", range(PATIENTS // 2))
    for manifest in (rows, other):
        [warning], held = check(tmp_path, run, manifest, 1)
        assert f"{len(held & trained)} of {len(held)} held-out patients trained it" in warning


def test_patients_that_two_manifests_share_are_counted(tmp_path):
    first = write_manifest(tmp_path, "train.jsonl", range(PATIENTS))
    run, trained = train(tmp_path, first, 0)
    # The same patients as another program writes them.
    second = write_manifest(tmp_path, "valid.jsonl", [f"{n:06d}" for n in range(20, 60)])
    [warning], held = check(tmp_path, run, second, 0)
    shared = {group for group in held if str(int(group)) in trained}
    assert shared and f"{len(shared)} of {len(held)} held-out patients trained it" in warning
    other = write_manifest(tmp_path, "other.jsonl", range(100, 140))
    assert check(tmp_path, run, other, 0)[0] == []


def test_chains_of_runs_are_followed_to_their_start(tmp_path):
    rows = write_manifest(tmp_path, "m.jsonl", range(PATIENTS))
    first, _ = train(tmp_path, rows, 1)
    second, _ = train(tmp_path, write_manifest(tmp_path, "o.jsonl", range(90, 130)), 2, model=first)
    with pytest.raises(UserError, match="seed=1"):
        check(tmp_path, second, rows, 0)
    assert [run.seed for run in earlier_runs.trained_on_films(second)] == [2, 1]
    assert not [*earlier_runs.trained_on_films("phantom")]


def test_rows_that_are_gone_are_said(tmp_path):
    rows = write_manifest(tmp_path, "m.jsonl", range(PATIENTS))
    run, _ = train(tmp_path, rows, 1)
    (tmp_path / "m.jsonl").unlink()
    other = write_manifest(tmp_path, "other.jsonl", range(PATIENTS + 1))
    [warning], _ = check(tmp_path, run, other, 0)
    assert "is not known" in warning and "\n" not in warning
