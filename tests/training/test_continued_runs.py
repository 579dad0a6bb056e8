"""A run that goes on: nobody changes sides with its rows or our rules, and a refusal leaves its folder as it was."""

import dataclasses
import hashlib
import json
import random
import re

import numpy as np
import pytest
from forked import calls
from PIL import Image

from cxr_jax.config import schema
from cxr_jax.config.sections import DataConfig, RunConfig
from cxr_jax.data import images
from cxr_jax.data.sources import splits
from cxr_jax.data.sources.patients import Sides
from cxr_jax.errors import UserError
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.training import checks, earlier_runs
from cxr_jax.training.setup import Setup

SEED = 3


def row(number, **keys):
    """A row of a film of its own question: rows on one film that say the same would be repeats."""
    talk = [
        {"from": "human", "value": f"Find abnormalities ({number})."},
        {"from": "gpt", "value": "<think>Clear.</think><answer>No Finding</answer>"},
    ]
    keys = {"id": f"row{number}", "image": "a.png"} | keys
    return keys | {"solution": "No Finding", "conversations": talk}


@pytest.fixture
def films(tmp_path):
    Image.fromarray(np.zeros((56, 56), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def write(folder, rows, name="m.jsonl"):
    (folder / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(folder / name)


def config_of(folder, manifest, steps=4, **data):
    config = schema.defaults("sft", "files")
    config.model, config.steps, config.locate_steps, config.locate_weight = "phantom", steps, 0, 0.0
    files = {"manifest": manifest, "image_root": str(folder), "size": 56, "seed": SEED}
    config.data.update(files | data)
    return config


def go_on(folder, config, *may_change):
    """Open the run's folder and what it reads, as `train` does."""
    facts = checks.fingerprint(config.model, DataConfig.from_config(config))
    opened = RunFolder(str(folder / "run"), config.to_dict(), facts, may_change=may_change)
    try:
        return Setup.open(RunConfig.from_config(config), opened).splits
    finally:
        opened.close()


def trained(folder, config, keeps=True, done=False):
    """A folder of a run of three steps as it is after a kill, or when it is `done`; `keeps`: who is held out."""
    go_on(folder, config)
    run = folder / "run"
    (run / "checkpoints" / "last" / "3").mkdir(parents=True)
    (run / "checkpoints" / "last" / "3" / "arrays").write_bytes(b"123")
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n')
    if done:
        (run / "done.json").write_text('{"time": "then", "step": 3}')
    if not keeps:
        about = json.loads((run / "config.json").read_text())
        about["data"] = {
            name: value for name, value in about["data"].items() if name not in Sides().__dict__
        }
        (run / "config.json").write_text(json.dumps(about, indent=2))
    return run


def sides_of(found):
    """The ids of the rows that train, choose and test."""
    sources = (found.train, found.select["files"], found.test["files"])
    return tuple({each.id for each in source.rows} for source in sources)


def contents(folder):
    """A hash of every file below a folder, and every folder."""
    return {
        str(path.relative_to(folder)): path.is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


# ---- Films of evaluation sets --------------------------------------------------------------------------


def test_registered_films_train_only_on_request_and_it_is_kept(films):
    rows = [row(number, id=f"patient{64701 + number:05d}") for number in range(80)]
    config = config_of(films, write(films, rows))
    with pytest.raises(
        UserError, match="of the validation set of CheXpert .chexpert_valid.: patient6"
    ) as caught:
        checks.check_common(config)
    assert "chexpert_test" in str(caught.value) and "\n" not in str(caught.value)
    config.data.allow_contaminated = True
    checks.check_common(config)
    said = go_on(films, config).contaminated
    assert said.startswith("CONTAMINATED: ") and "patient6" not in said
    about = json.loads((films / "run" / "config.json").read_text())
    assert about["data"]["contaminated"] == said
    # Whoever starts from that model, or scores it, says so, too.
    clean = config_of(
        films, write(films, [row(number, patient_id=number) for number in range(80)], "n.jsonl")
    )
    clean.model = str(films / "run")
    before = said.removeprefix("CONTAMINATED: ")
    for task in ("sft", "evaluate"):
        settings = RunConfig.from_config(clean)
        settings = dataclasses.replace(settings, task=task)
        found = earlier_runs.contamination(settings, splits.open_splits(settings.data))
        assert found == f"CONTAMINATED: the model that it started from: {before}"
    # An evaluation reads any film.
    scored = dataclasses.replace(RunConfig.from_config(config), task="evaluate")
    assert earlier_runs.check_contamination(scored, splits.open_splits(scored.data)) == []


# ---- Runs that do not say who was held out -------------------------------------------------------------


def former_sides(rows):
    """As version 0.1 drew them, line for line."""

    def group_of(each):
        for name in ("patient_id", "subject_id"):
            if isinstance(each.get(name), str | int):
                return str(each[name])
        patient = re.search(r"patient\d+", each["id"])
        return patient.group() if patient else each["id"]

    groups = sorted(
        {group_of(each) for each in rows},
        key=lambda group: hashlib.sha256(f"{SEED}:{group}".encode()).digest(),
    )
    held = set(groups[: max(1, min(30, len(groups) // 3), round(len(groups) / 10))])
    held_rows = [each for each in rows if group_of(each) in held]
    patients = list(dict.fromkeys(map(group_of, held_rows)))
    chosen = set(patients[: max(1, len(patients) // 3)])
    select = [each for each in held_rows if group_of(each) in chosen]
    test = [each for each in held_rows if group_of(each) not in chosen] or held_rows
    train = [each for each in rows if group_of(each) not in held]
    return tuple({each["id"] for each in part} for part in (train, select, test))


FORMER = {
    "another column": [row(n, **{"Patient ID": n // 2}) for n in range(60)],
    "a name of NIH's": [row(n, id=f"{n // 2:08d}_{n % 2:03d}") for n in range(60)],
    "two spellings": [row(n, subject_id=f"{n // 2:0{2 + n % 2}d}") for n in range(60)],
    "floats": [row(n, patient_id=[n // 2, f"{n // 2}.0"][n % 2]) for n in range(60)],
    "four patients": [row(n, patient_id=n // 5) for n in range(20)],
}


@pytest.mark.parametrize("kind", FORMER)
def test_a_run_of_earlier_rules_goes_on_with_the_sides_it_began_with(films, capsys, kind):
    rows = FORMER[kind]
    config = config_of(films, write(films, rows))
    run = trained(films, config, keeps=False)
    want = former_sides(rows)
    assert sides_of(splits.open_splits(DataConfig.from_config(config))) != want
    capsys.readouterr()
    for _ in range(2):  # as its rows tell, and then as its folder does
        assert sides_of(go_on(films, config)) == want
        line, *warnings = capsys.readouterr().out.splitlines()
        assert "split as when the run began, by patient_id, subject_id or id" in line
        # Who was two patients then, and was drawn so, trains and tests: a person must know.
        assert len(warnings) == (kind != "four patients")
        assert all(warning.startswith("warning: ") for warning in warnings)
    # Rows that come and go move nobody.
    others = [each for n, each in enumerate(rows) if n % 4] + [row(99, patient_id="new")]
    other = write(films, others[::-1], "other.jsonl")
    changed = config_of(films, other)
    if kind == "four patients":
        assert "selected" not in json.loads((run / "config.json").read_text())["data"]
        return
    found = sides_of(go_on(films, changed, "manifest"))
    stayed = {each["id"] for each in others[:-1]}
    assert [part - {"row99"} for part in found] == [part & stayed for part in want]


def test_a_run_of_earlier_rules_that_drew_the_same_goes_on_without_a_word(films, capsys):
    config = config_of(films, write(films, [row(n, patient_id=n // 2) for n in range(60)]))
    run = trained(films, config)
    kept = json.loads((run / "config.json").read_text())["data"]
    assert kept["held_out_up_to"] and len(kept["selected"].split()) == 3
    about = json.loads((run / "config.json").read_text())
    about["data"] = {name: kept[name] for name in kept if name not in Sides().__dict__}
    (run / "config.json").write_text(json.dumps(about))
    capsys.readouterr()
    want = former_sides([row(n, patient_id=n // 2) for n in range(60)])
    assert sides_of(go_on(films, config)) == want and capsys.readouterr().out == ""
    assert json.loads((run / "config.json").read_text())["data"] == kept


def test_a_run_that_has_not_trained_is_split_by_the_rules_of_now(films):
    rows = FORMER["another column"]
    config = config_of(films, write(films, rows))
    run = trained(films, config, keeps=False)
    (run / "checkpoints" / "last" / "3").rename(run / "checkpoints" / "last" / "3.partial")
    assert sides_of(go_on(films, config)) == sides_of(
        splits.open_splits(DataConfig.from_config(config))
    )


# ---- Rows that change ------------------------------------------------------------------------------------


def test_rows_that_change_move_nobody_between_training_selection_and_test(films):
    draw = random.Random(0)
    rows = [row(n, patient_id=n // 2) for n in range(120)]
    data = DataConfig.from_config(config_of(films, write(films, rows)))
    first = splits.open_splits(data)
    before, sides = sides_of(first), first.sides
    for _ in range(6):
        # Shortened, in another order, with patients that are new.
        draw.shuffle(rows)
        new = [row(n, patient_id=f"new{n}") for n in range(200, 240)]
        others = rows[: draw.randrange(90, 120)] + new
        draw.shuffle(others)
        again = splits.open_splits(
            DataConfig.from_config(config_of(films, write(films, others, "o.jsonl"))), sides
        )
        after = sides_of(again)
        for part, was in zip(after, before, strict=True):
            assert {name for name in part if int(name[3:]) < 200} == was & {
                each["id"] for each in others
            }
        assert not after[1] & {each["id"] for each in new} and after[2] & {
            each["id"] for each in new
        }
        assert again.sides.held_out_up_to == sides.held_out_up_to


# ---- Refusals ----------------------------------------------------------------------------------------------


def some_rows(parts, *wanted, image="a.png"):
    """The rows of the run's parts with these numbers, all on one film."""
    ids = set().union(*(parts[part] for part in wanted))
    return [row(n, patient_id=n, image=image) for n in range(40) if f"row{n}" in ids]


# name: (rows from the parts of the run, changes of the config, what may change, what the line says)
REFUSED = {
    "not named": (lambda p: some_rows(p, 0, 1), {}, (), "--may_change=manifest"),
    "another key": (lambda p: some_rows(p, 0, 1, 2), {"size": 28}, ("manifest",), "data.size"),
    "fewer steps": (lambda p: some_rows(p, 0, 1), {"steps": 2}, ("manifest", "steps"), "fewer"),
    "all train": (lambda p: some_rows(p, 0), {}, ("manifest",), "no patient that is held out"),
    "none trains": (lambda p: some_rows(p, 1, 2), {}, ("manifest",), "no patient that trains"),
    "none tests": (lambda p: some_rows(p, 0, 1), {}, ("manifest",), "no patient that tests"),
    "none chooses": (lambda p: some_rows(p, 0, 2), {}, ("manifest",), "no patient that chooses"),
    "no rows": (lambda p: [], {}, ("manifest",), "the file is empty"),
    "torn films": (
        lambda p: some_rows(p, 0, 1, 2, image="torn.png"),
        {},
        ("manifest",),
        "torn.png",
    ),
    "torn held-out films": (
        lambda p: some_rows(p, 0, 2) + some_rows(p, 1, image="torn.png"),
        {"steps": 9},
        ("manifest", "steps"),
        "torn.png",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_continuation_that_is_refused_leaves_the_folder_byte_for_byte(films, kind):
    config = config_of(films, write(films, [row(n, patient_id=n) for n in range(40)]))
    run = trained(films, config, done=True)
    parts = sides_of(splits.open_splits(DataConfig.from_config(config)))
    choose, changes, may_change, reason = REFUSED[kind]
    before = contents(run)
    changed = config_of(films, write(films, choose(parts), "other.jsonl"), **changes)
    with pytest.raises(UserError, match=reason) as refused:
        go_on(films, changed, *may_change)
    assert "\n" not in str(refused.value) and contents(run) == before
    go_on(films, config).train.batch(range(3))  # and the run is as it was
    # What works is taken over.
    right = config_of(films, write(films, some_rows(parts, 0, 1, 2)[1:], "right.jsonl"), steps=9)
    go_on(films, right, "manifest", "steps")
    about = json.loads((run / "config.json").read_text())
    assert about["config"]["steps"] == 9 and not (run / "done.json").exists()
    assert len(about["changes"]) == 1


def test_other_rows_for_a_run_that_does_not_say_who_is_held_out_are_refused(films):
    rows = [row(n, patient_id=n) for n in range(40)]
    config = config_of(films, write(films, rows))
    run = trained(films, config, keeps=False)
    before = contents(run)
    other = config_of(films, write(films, rows[:30], "other.jsonl"))
    with pytest.raises(UserError, match="continue it once with the rows that it began with"):
        go_on(films, other, "manifest")
    assert contents(run) == before
    go_on(films, config)
    go_on(films, other, "manifest")


def test_the_command_leaves_a_folder_as_it_was_where_rows_do_not_work(films):
    config = config_of(films, write(films, [row(n, patient_id=n) for n in range(40)]), steps=3)
    run = trained(films, config, done=True)
    parts = sides_of(splits.open_splits(DataConfig.from_config(config)))
    write(films, some_rows(parts, 0, 1), "untested.jsonl")
    write(films, some_rows(parts, 0, 1, 2)[1:], "right.jsonl")
    (films / "config.py").write_text(
        "from cxr_jax.config import schema\n\ndef get_config():\n    c = schema.defaults('sft', 'files')\n"
        f"    c.update({json.loads(json.dumps(config.to_dict()))!r})\n    return c\n"
    )
    before = contents(run)
    command = [f"--config={films / 'config.py'}", f"--workdir={run}"]
    untested = f"--config.data.manifest={films / 'untested.jsonl'}"
    right = f"--config.data.manifest={films / 'right.jsonl'}"
    more = "--config.steps=5"
    refused, complete = calls(
        [
            [*command, untested, more, "--may_change=steps,manifest"],
            [*command, right, "--may_change=manifest"],
        ]
    )
    assert refused[0] == 2 and "no patient that tests" in refused[2].splitlines()[-1]
    # Nothing is left to do with other rows: its numbers stay those of the rows it had.
    assert complete[0] == 0 and "this run is complete" in complete[1]
    assert "of --may_change only more steps" in complete[1]
    assert contents(run) == before


# ---- Before a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bad", [0, 2])
def test_the_length_of_targets_is_checked_without_opening_a_film(films, monkeypatch, max_bad):
    """A large set on a slow disk: to look for films that cannot be read is another check's, where it is asked for."""
    rows = [row(n, patient_id=n, image=("a.png", "torn.png")[n % 20 == 5]) for n in range(40)]
    config = config_of(films, write(films, rows), max_bad=max_bad)
    settings = RunConfig.from_config(config)
    train = splits.open_splits(settings.data).train
    opened = []
    monkeypatch.setattr(images, "read_image", lambda path, *_: opened.append(path))
    checks.check_targets_fit(settings, train)
    config.max_completion = 4
    with pytest.raises(UserError, match="max_completion=4 is too small"):
        checks.check_targets_fit(RunConfig.from_config(config), train)
    assert opened == []
