"""run_folder.py: one run a folder, one config a run, and nothing left behind by a run that could not start."""

import json
import signal
import subprocess
import sys

import pytest

from cxr_jax.config import sections
from cxr_jax.errors import UserError
from cxr_jax.runtime.run_folder import RunFolder, history_of
from cxr_jax.runtime.whole_files import write_json

CONFIG = {
    "task": "rl",
    "steps": 3,
    "optim": {"lr": 1e-4, "frozen": ()},
    "data": {"source": "phantom"},
}


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_run_of_before_a_new_key_goes_on(tmp_path):
    """A key that config.json lacks had its default; another value of it is another run."""
    RunFolder(str(tmp_path), CONFIG).close()
    defaults = {"data": {"max_pixels": 0, "source": "files"}, "patience": 3}
    now = CONFIG | {"data": {"source": "phantom", "max_pixels": 0}, "patience": 3}
    RunFolder(str(tmp_path), now, defaults=defaults).close()
    RunFolder(str(tmp_path), CONFIG, defaults=defaults).close()
    changed = now | {"data": {"source": "phantom", "max_pixels": 9000}}
    with pytest.raises(UserError, match="data.max_pixels was 0, now 9000"):
        RunFolder(str(tmp_path), changed, defaults=defaults)


def test_a_run_whose_limit_made_smaller_squares_does_not_go_on_with_other_films(tmp_path):
    def config(**data):
        return CONFIG | {"data": {"source": "files", "size": 476, **data}}

    RunFolder(str(tmp_path), config(max_pixels=100_000)).close()
    defaults = {"data": {"min_pixels": 16384}}

    def opened(**data):
        now = config(min_pixels=16384, **data)
        words = sections.in_todays_words
        RunFolder(str(tmp_path), now, defaults=defaults, in_todays_words=words).close()

    with pytest.raises(UserError, match="data.max_pixels was 0, now 100000"):
        opened(max_pixels=100_000)
    # Squares of 308 pixels are what it has read.
    opened(size=308, max_pixels=0)
    opened(size=308, max_pixels=0, image_tokens=7)


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    first = RunFolder(str(tmp_path / "run"), CONFIG)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="run: another run is using it"):
        RunFolder(str(tmp_path / "run"), CONFIG)
    assert tree(tmp_path) == before
    first.close()
    RunFolder(str(tmp_path / "run"), CONFIG).close()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import os, cxr_jax.runtime.run_folder as r; "
        f"d = r.RunFolder({str(tmp_path)!r}, {CONFIG!r}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "config.json").exists()
    RunFolder(str(tmp_path), CONFIG).close()


@pytest.mark.parametrize(
    "changed, said",
    [
        (CONFIG | {"steps": 4}, "steps was 3, now 4"),
        (CONFIG | {"optim": {"lr": 1e-3, "frozen": ()}}, "optim.lr was 0.0001, now 0.001"),
        (CONFIG | {"seed": 1}, "seed was None, now 1"),
        ({k: v for k, v in CONFIG.items() if k != "task"}, "task was 'rl', now None"),
    ],
)
def test_a_changed_config_is_refused_and_named(tmp_path, changed, said):
    RunFolder(str(tmp_path), CONFIG).close()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as e:
        RunFolder(str(tmp_path), changed)
    assert said in str(e.value) and "\n" not in str(e.value)
    assert (tmp_path / "config.json").read_bytes() == before
    RunFolder(str(tmp_path), CONFIG).close()  # and the lock was let go


def test_changed_data_are_refused(tmp_path):
    RunFolder(str(tmp_path), CONFIG, data={"manifest_sha256": "a"}).close()
    RunFolder(str(tmp_path), CONFIG, data={"manifest_sha256": "a"}).close()
    with pytest.raises(UserError, match="the manifest has changed"):
        RunFolder(str(tmp_path), CONFIG, data={"manifest_sha256": "b"})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": 3}'])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        RunFolder(str(tmp_path), CONFIG)
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("below", ["file", "file/run", "file/a/b"])
def test_an_unwritable_workdir_leaves_nothing_behind(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(str(tmp_path / below), CONFIG)
    assert tree(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_folders_made_on_the_way_to_a_failure_go_again(tmp_path):
    name = "x" * 300  # longer than a file name may be
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(str(tmp_path / "a" / "b" / name), CONFIG)
    assert tree(tmp_path) == []


def test_config_json_says_what_a_result_depends_on(tmp_path):
    RunFolder(str(tmp_path), CONFIG, data={"source": "phantom"}).close()
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["config"] == json.loads(json.dumps(CONFIG)) and facts["data"] == {
        "source": "phantom"
    }
    assert {"jax", "flax", "optax", "numpy", "python"} <= set(facts["versions"])
    assert {"git_sha", "git_dirty", "devices", "cpu_count"} <= set(facts)


def test_what_does_not_change_the_result_may_change(tmp_path):
    config = CONFIG | {"mesh": {"data": -1, "fsdp": 1}, "step_timeout": 1.0}
    RunFolder(str(tmp_path), config).close()
    RunFolder(str(tmp_path), config | {"mesh": {"data": 1, "fsdp": 8}, "step_timeout": 2.0}).close()
    with pytest.raises(UserError, match="another config"):
        RunFolder(str(tmp_path), config | {"meshes": 1})


ADJUSTABLE = CONFIG | {
    "micro_batches": 1,
    "remat": "none",
    "log_every": 20,
    "save_every": 5,
    "rl": {"micro_batches": 1, "sample_micro_batches": 0, "patience": 0, "minibatches": 1},
    "eval": {"every": 10, "n": 64, "batch_size": 8, "n_final": 100, "select_by": "jaccard"},
}


def adjusted(key, value):
    section, _, name = key.rpartition(".")
    if not section:
        return ADJUSTABLE | {key: value}
    return ADJUSTABLE | {section: ADJUSTABLE[section] | {name: value}}


@pytest.mark.parametrize(
    "key",
    "micro_batches remat log_every save_every rl.micro_batches rl.sample_micro_batches rl.patience "
    "eval.every eval.n eval.batch_size".split(),
)
def test_a_run_is_adjusted_without_a_flag_and_says_so(tmp_path, key, capsys):
    RunFolder(str(tmp_path), ADJUSTABLE).close()
    (tmp_path / "checkpoints" / "last" / "2").mkdir(parents=True)
    before = (tmp_path / "config.json").read_bytes()
    for value in ("7", "8"):
        folder = RunFolder(str(tmp_path), adjusted(key, value))
        assert (tmp_path / "config.json").read_bytes() == before and capsys.readouterr().out == ""
        folder.commit_changes()
        folder.close()
        before = (tmp_path / "config.json").read_bytes()
        assert capsys.readouterr().out.startswith(f"goes on from step 2 with changes: {key} was ")
    about = json.loads(before)
    # What a reader takes for a change of what the run is stays empty.
    assert "changes" not in about and [entry["step"] for entry in about["adjusted"]] == [2, 2]
    steps_and_lines = history_of(about)
    assert steps_and_lines[1] == (2, f"{key} was '7', now '8'") and len(steps_and_lines) == 2


@pytest.mark.parametrize(
    "key", ["rl.minibatches", "eval.n_final", "eval.select_by", "seed", "rl.micro_batches_more"]
)
def test_what_would_be_another_run_is_refused_beside_an_adjustment(tmp_path, key):
    RunFolder(str(tmp_path), ADJUSTABLE).close()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=f"another config .{key} was") as refused:
        RunFolder(str(tmp_path), adjusted(key, 3) | {"remat": "full"})
    assert "\n" not in str(refused.value) and (tmp_path / "config.json").read_bytes() == before


def test_the_others_only_look_on(tmp_path):
    """Of several processes, all but the first: they lock nothing and leave nothing."""
    first = RunFolder(str(tmp_path / "run"), CONFIG)
    other = RunFolder(str(tmp_path / "run"), CONFIG, writes=False)
    other.finish(step=1)
    other.abandon()
    other.close()
    assert tree(tmp_path / "run") == ["config.json", "lock"] and other.status == {}
    first.finish(step=2)
    assert other.status["step"] == 2
    first.close()


def test_done(tmp_path):
    run = RunFolder(str(tmp_path), CONFIG)
    assert run.status == {}
    run.finish(step=3, table="a table")
    assert run.status["step"] == 3 and run.status["table"] == "a table" and run.status["time"]
    run.close()
    (tmp_path / "done.json").write_text("{")
    again = RunFolder(str(tmp_path), CONFIG)
    with pytest.raises(UserError, match="done.json"):
        _ = again.status
    again.close()


def test_abandon_takes_back_what_a_new_run_made(tmp_path):
    run = RunFolder(str(tmp_path / "a" / "run"), CONFIG)
    (tmp_path / "a" / "run" / "metrics.jsonl").touch()
    (tmp_path / "a" / "run" / "checkpoints" / "last").mkdir(parents=True)
    run.abandon()
    run.close()
    assert tree(tmp_path) == []


def test_abandon_keeps_what_was_there_and_what_can_be_resumed(tmp_path):
    (tmp_path / "checkpoints").mkdir()  # not ours
    (tmp_path / "notes.txt").touch()
    run = RunFolder(str(tmp_path), CONFIG)
    run.abandon()
    run.close()
    assert tree(tmp_path) == ["checkpoints", "notes.txt"]

    begun = tmp_path / "begun"
    run = RunFolder(str(begun), CONFIG)
    (begun / "checkpoints" / "last" / "5").mkdir(parents=True)
    run.abandon()
    run.close()
    assert (begun / "config.json").exists() and (begun / "checkpoints" / "last" / "5").exists()

    old = RunFolder(str(begun), CONFIG)  # a second start is not a new run
    (begun / "checkpoints" / "last" / "5").rmdir()
    old.abandon()
    old.close()
    assert (begun / "config.json").exists()


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    file = tmp_path / "x.json"
    write_json(str(file), {"a": 1})
    with pytest.raises(TypeError):
        write_json(str(file), {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1} and tree(tmp_path) == ["x.json"]


FILES = CONFIG | {"data": {"source": "files", "manifest": "a.jsonl", "image_root": "films"}}
FACTS = {"manifest_sha256": "a", "weights_sha256": "w"}


@pytest.fixture
def finished(tmp_path):
    """The folder of a run of 3 steps that is done."""
    folder = RunFolder(str(tmp_path), FILES, data=FACTS)
    (tmp_path / "checkpoints" / "last" / "3").mkdir(parents=True)
    folder.remember(held_out_up_to="hash")
    folder.finish(step=3)
    folder.close()
    return tmp_path


def changed(**data):
    return FILES | {"data": FILES["data"] | data}


@pytest.mark.parametrize(
    "name, config, facts",
    [
        ("steps", FILES | {"steps": 5}, FACTS),
        ("image_root", changed(image_root="moved"), FACTS),
        ("manifest", changed(manifest="b.jsonl"), FACTS),
        ("manifest", FILES, FACTS | {"manifest_sha256": "b"}),
    ],
)
def test_a_run_goes_on_with_others_only_where_the_flag_names_them(
    finished, name, config, facts, capsys
):
    before = (finished / "config.json").read_bytes()
    for others in ((), tuple({"steps", "image_root", "manifest"} - {name})):
        with pytest.raises(UserError, match=f"--may_change={name}") as refused:
            RunFolder(str(finished), config, facts, may_change=others)
        assert "\n" not in str(refused.value) and (finished / "config.json").read_bytes() == before
    assert capsys.readouterr().out == ""
    folder = RunFolder(str(finished), config, facts, may_change=(name,))
    # More steps make a finished run one that is not; other rows do not.
    assert bool(folder.status) == (name != "steps")
    assert folder.about["config"] == json.loads(json.dumps(config))
    assert folder.data == facts | {"held_out_up_to": "hash"}
    assert (finished / "config.json").read_bytes() == before and capsys.readouterr().out == ""
    folder.commit_changes()
    assert (finished / "done.json").exists() == bool(folder.status)
    [change] = folder.about["changes"]
    assert change["step"] == 3 and len(change["changes"]) == 1
    assert capsys.readouterr().out.count("\n") == 1
    folder.close()
    # From then on it is that run: the same command needs no flag, and the one before is refused.
    RunFolder(str(finished), config, facts).close()
    with pytest.raises(UserError, match="--may_change"):
        RunFolder(str(finished), FILES, FACTS)


def test_other_keys_and_weights_are_refused_whatever_the_flag_names(finished):
    names = ("steps", "manifest", "image_root")
    before = tree(finished), (finished / "config.json").read_bytes()
    for config, facts in (
        (FILES | {"optim": {"lr": 1e-3, "frozen": ()}}, FACTS),
        (changed(size=56), FACTS),
        (FILES | {"steps": 5}, FACTS | {"weights_sha256": "v"}),
        (FILES | {"steps": 2}, FACTS),  # fewer than are done
    ):
        with pytest.raises(UserError):
            RunFolder(str(finished), config, facts, may_change=names)
    assert (tree(finished), (finished / "config.json").read_bytes()) == before


def test_facts_that_are_known_stay(finished):
    folder = RunFolder(str(finished), FILES, FACTS)
    folder.remember(held_out_up_to="another")
    assert folder.data["held_out_up_to"] == "hash"
    RunFolder(str(finished), FILES, FACTS, writes=False).remember(more=1)
    assert "more" not in folder.data
    folder.close()
