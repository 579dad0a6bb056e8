"""Whole runs in processes of their own: they finish, resume bit for bit after kill -9, and save on SIGTERM."""

import concurrent.futures
import json
import shutil
import signal
import time
from pathlib import Path

import fast_compile
import forked
import jax
import numpy as np
import pytest
import tiny_model
from forked import calls

import cxr_jax
from cxr_jax.metrics import run_log
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.weights import hf_folder, peft_folder

pytestmark = pytest.mark.slow

SMALL = ["--config.eval.bootstrap=10", "--config.eval.cases=2"]
# As many images a look as a training step draws: the same programs draw and read both.
LOOK = lambda n: [f"--config.eval.{key}={n}" for key in ("n", "n_final", "batch_size")]
# log_every 3 with save_every 1: a resumed run begins inside a logging window.
ARGUMENTS = {
    # Adapters with float32 masters for the rest, in turns: what could be lost on the way to a checkpoint.
    "sft": [
        "--config=experiments/sft.py",
        "--config.steps=4",
        "--config.locate_steps=2",
        "--config.batch_size=2",
        "--config.log_every=3",
        "--config.save_every=1",
        "--config.eval.every=3",
        "--config.micro_batches=2",
        "--config.lora.rank=2",
        "--config.lora.targets=('decoder','vision')",
        "--config.param_dtype=bfloat16",
        *LOOK(2),
    ],
    "rl": [
        "--config=experiments/rl.py",
        "--config.steps=3",
        "--config.rl.prompts_per_step=2",
        "--config.rl.group_size=2",
        "--config.max_completion=12",
        "--config.save_every=1",
        "--config.eval.every=2",
        *LOOK(4),
    ],
}
TIMES, TIMED = {"time", "samples_per_second", "step_time"}, ("perf/", "goodput/")
TASKS = pytest.mark.parametrize("task", ["sft", "rl"])


def command(task, folder, *more):
    model = f"--config.model={tiny_model.phantom_folder()}"
    return [*ARGUMENTS[task], *SMALL, model, f"--workdir={folder}", *more]


def start(task, folder):
    return forked.start(command(task, folder), env=fast_compile.environment())


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return out


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "".join(process.communicate())
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{task: (folder, stdout)} of runs that nothing interrupted. The two share the machine: half the wait."""
    folders = {task: tmp_path_factory.mktemp("whole") / task for task in ARGUMENTS}
    processes = {task: start(task, folder) for task, folder in folders.items()}
    return {task: (folders[task], finish(process)) for task, process in processes.items()}


def rows(folder):
    return [
        {k: v for k, v in row.items() if k not in TIMES and not k.startswith(TIMED)}
        for row in run_log.read(folder)
    ]


def arrays(folder):
    """Every array of the last checkpoint and of the export, by name."""
    manager = Checkpoints(str(folder)).last
    state = manager.restore(manager.latest_step())["state"]
    named = {
        jax.tree_util.keystr(p): np.asarray(x)
        for p, x in jax.tree_util.tree_leaves_with_path(state)
    }
    _, params = hf_folder.load(folder / "hf", np.float32)
    return named | {
        jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)
    }


def assert_same_run(a, b):
    assert rows(a) == rows(b)
    ours, theirs = arrays(a), arrays(b)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert not [k for k in ours if not np.array_equal(ours[k], theirs[k])]
    assert _best(a) == _best(b)
    drop_times = lambda d: {k: v for k, v in d.items() if k not in ("time", "train_seconds")}
    assert drop_times(_json(a, "done.json")) == drop_times(_json(b, "done.json"))
    assert _json(a, "evaluation.json") == _json(b, "evaluation.json")


def _best(folder):
    """Step and score of the checkpoint that was best out of distribution."""
    manager = Checkpoints(str(folder)).best
    return sorted(manager.all_steps()), dict(manager.restore(manager.latest_step())["meta"])


def _json(folder, name):
    return json.loads((Path(folder) / name).read_text())


@TASKS
def test_a_run_finishes_and_leaves_its_files(whole, task):
    folder, out = whole[task]
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "samples.jsonl",
        "report.html",
        "hf",
        "done.json",
    }
    assert "Research use only. Not for diagnosis." in out and "Phantom results" in out
    config = _json(folder, "config.json")
    facts = {"source", "code_sha256", "weights_sha256"}
    assert config["config"]["task"] == task and config["data"].keys() == facts
    train = [r["step"] for r in rows(folder) if r["kind"] == "train"]
    looks = [r["step"] for r in rows(folder) if r["kind"] == "eval"]
    assert (train, looks) == {"sft": ([3, 4], [3, 4]), "rl": ([1, 2, 3], [0, 2, 3])}[task]
    assert not any("damaged" in p.name for p in (folder / "checkpoints").iterdir())


def test_adapters_are_exported_alone_and_merged(whole):
    folder, _ = whole["sft"]
    model_config, merged = hf_folder.load(folder / "hf")
    _, base = hf_folder.load(tiny_model.phantom_folder(), np.float32)
    adapters, spec = peft_folder.load(folder / "adapter", model_config)
    assert spec.rank == 2 and all(np.abs(x).max() > 0 for x in jax.tree.leaves(adapters))
    peft_folder.merge(base, adapters, spec)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, merged, base)


def test_rl_logs_what_trl_logs(whole):
    row = next(r for r in rows(whole["rl"][0]) if r["kind"] == "train")
    assert row.keys() >= {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "rewards/accuracy_hard/mean",
        "rewards/overshort/std",
        "entropy",
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "clip_ratio/region_mean",
        "sampling/sampling_logp_difference/mean",
        "constant/no_finding",
    }
    assert row["sampling/sampling_logp_difference/max"] < 1e-3
    last = [r for r in rows(whole["rl"][0]) if r["kind"] == "train"][-1]
    lengths = [r["completions/mean_length"] for r in rows(whole["rl"][0]) if r["kind"] == "train"]
    assert last["num_tokens"] == 8 * sum(
        lengths
    )  # 2 prompts, sampled twice over, 2 completions of each


def test_the_second_call_says_that_the_run_is_complete(whole):
    before = {task: (folder / "metrics.jsonl").read_bytes() for task, (folder, _) in whole.items()}
    again = calls(
        [command(task, folder) for task, (folder, _) in whole.items()],
        env=fast_compile.environment(),
    )
    for (task, (folder, _)), (code, out, err) in zip(whole.items(), again, strict=True):
        assert code == 0 and "Traceback" not in err
        assert "this run is complete" in out and _json(folder, "done.json")["table"] in out
        assert (folder / "metrics.jsonl").read_bytes() == before[task]


def test_killed_behind_its_last_step_it_ends_as_if_nothing_had_been(whole, tmp_path):
    """All steps are saved, and no final evaluation: none is left to compute."""
    folders = {
        task: shutil.copytree(folder, tmp_path / task) for task, (folder, _) in whole.items()
    }
    for folder in folders.values():
        (folder / "done.json").unlink()
        (folder / "evaluation.json").unlink()
        shutil.rmtree(folder / "hf")
    commands = [command(task, folder) for task, folder in folders.items()]
    for task, (code, out, err) in zip(folders, calls(commands), strict=True):
        assert code == 0 and "resuming at step" in out, out + err
        assert_same_run(whole[task][0], folders[task])


def tear(folder) -> int:
    """Cuts off the files of the newest checkpoint; returns its step."""
    newest = max((folder / "checkpoints" / "last").glob("[0-9]"), key=lambda p: int(p.name))
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:1000])
    return int(newest.name)


def interrupt(task, folder):
    """kill -9 after the first checkpoint; SIGTERM to the resumed run after its own; then to the end, of RL after the
    newest checkpoint was torn. -> outputs, and the step of the torn checkpoint or None"""
    process = start(task, folder)
    wait_for((folder / "checkpoints" / "last" / "1").exists, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "done.json").exists()

    process = start(task, folder)
    wait_for((folder / "checkpoints" / "last" / "2").exists, process)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert not (folder / "done.json").exists()
    torn = tear(folder) if task == "rl" else None
    return stopped, finish(start(task, folder)), torn


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folders = {task: tmp_path_factory.mktemp("interrupted") / task for task in ARGUMENTS}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outputs = dict(zip(folders, pool.map(interrupt, folders, folders.values()), strict=True))
    return {task: (folders[task], *outputs[task]) for task in folders}


@TASKS
def test_killed_and_stopped_it_resumes_bit_for_bit(whole, interrupted, task):
    folder, stopped, finished, torn = interrupted[task]
    assert "resuming at step" in stopped and "SIGTERM: saving after this step" in stopped
    assert "the same command continues from there" in stopped
    assert "resuming at step" in finished and "done; report" in finished
    if torn:  # a damaged checkpoint costs its steps and nothing else
        assert (
            f"last/{torn} does not load" in finished and f"resuming at step {torn - 1}" in finished
        )
    assert_same_run(whole[task][0], folder)


def test_the_export_is_a_model(whole):
    model = cxr_jax.load(whole["sft"][0])  # the run's folder itself
    assert model.tokenizer.get_vocab().keys() >= {"<think>", "</answer>"}
    assert "Not for diagnosis" in (whole["sft"][0] / "hf" / "README.md").read_text()


def test_a_finished_run_goes_on_with_more_steps_where_the_flag_says_so(whole, tmp_path):
    folder = shutil.copytree(whole["rl"][0], tmp_path / "more")
    before = rows(folder)
    more = command("rl", folder, "--config.steps=4")
    refused, done, again = calls(
        [more, [*more, "--may-change=steps"], more], env=fast_compile.environment()
    )
    assert refused[0] == 2 and "steps was 3, now 4" in refused[2] and "--may_change" in refused[2]
    assert done[0] == 0 and "goes on from step 3 with changes: steps was 3, now 4" in done[1], done
    assert again[0] == 0 and "this run is complete" in again[1]
    after = rows(folder)
    train = [[r for r in run if r["kind"] == "train"] for run in (before, after)]
    assert train[1][:3] == train[0] and [r["step"] for r in train[1]] == [1, 2, 3, 4]
    assert _json(folder, "done.json")["step"] == 4
    assert _json(folder, "config.json")["changes"] == [
        {"step": 3, "changes": ["steps was 3, now 4"]}
    ]


ADJUSTED = {
    "sft": ["--config.micro_batches=1", "--config.remat=full", "--config.save_every=2"],
    "rl": [
        "--config.rl.micro_batches=2",
        "--config.rl.sample_micro_batches=4",
        "--config.eval.batch_size=2",
        "--config.rl.patience=9",
    ],
}


def test_killed_and_resumed_with_other_knobs_it_is_the_same_run_but_for_rounding(whole, tmp_path):
    folders, commands = {}, []
    for task, (folder, _) in whole.items():
        folders[task] = shutil.copytree(folder, tmp_path / task)
        # As a kill in the last step leaves it.
        (folders[task] / "done.json").unlink()
        newest = max((folders[task] / "checkpoints" / "last").glob("[0-9]"))
        shutil.rmtree(newest)
        commands.append(command(task, folders[task], *ADJUSTED[task]))
    for task, (code, out, err) in zip(
        whole, calls(commands, env=fast_compile.environment()), strict=True
    ):
        assert code == 0, out + err
        folder, steps = folders[task], {"sft": 4, "rl": 3}[task]
        names = [flag.removeprefix("--config.").split("=")[0] for flag in ADJUSTED[task]]
        assert f"goes on from step {steps - 1} with changes: " in out
        changes = [row for row in rows(folder) if row["kind"] == "change"]
        assert [row["step"] for row in changes] == [steps - 1] * len(names)
        assert sorted(row["change"].split(" was ")[0] for row in changes) == sorted(names)
        page = (folder / "report.html").read_text()
        assert all(f"From step {steps - 1} on: {name} was " in page for name in names)

        # ---- The rest is the run that nothing interrupted ----
        unchanged = [row for row in rows(folder) if row["kind"] != "change"]
        for ours, theirs in zip(unchanged, rows(whole[task][0]), strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if ours[name] != value:
                    assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
        before, after = arrays(whole[task][0]), arrays(folder)
        assert max(np.abs(after[k] - before[k]).max() for k in before if before[k].size) < 1e-4
