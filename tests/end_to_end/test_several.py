"""Runs of several processes: the same samples on any layout, a signal to one stops all, a peer that dies ends the rest.

At full length: tests/oracle/mesh_runs.py and tests/oracle/faults.py.
"""

import signal
import time

import fast_compile
import pytest
import several
import tiny_model
from oracle import mesh_runs

from cxr_jax.metrics import run_log

pytestmark = pytest.mark.slow

RL = [
    "--config=experiments/rl.py",
    "--config.steps=3",
    "--config.save_every=1",
    "--config.max_completion=12",
    "--config.rl.prompts_per_step=2",
    "--config.rl.group_size=2",
    "--config.eval.every=1",
    "--config.eval.n=2",
    "--config.eval.n_final=2",
    "--config.eval.batch_size=2",
    "--config.eval.bootstrap=10",
    "--config.eval.cases=2",
    "--config.step_timeout=120",
    # Rewards of the user's, in Python on one process for all, and compiled.
    "--config.rl.rewards=('tests/helpers/reward_of_text.py:of_text', 'examples/own_rewards.py:short*0.5')",
]


def start(folder, processes, devices):
    every = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {fast_compile.FLAGS}"}
    argv = [*RL, f"--config.model={tiny_model.phantom_folder()}", f"--workdir={folder}"]
    return several.start(argv, processes, devices, **every)


def wait_for_step(folder, step, started):
    while not any(r["kind"] == "train" and r["step"] >= step for r in run_log.read(folder)):
        assert all(p.poll() is None for p in started), several.end(started)
        time.sleep(0.02)


def test_stopped_on_two_processes_it_ends_on_one_as_if_it_had_been_there(tmp_path):
    """FSDP would do as well: the default mesh is data parallel. A checkpoint of 2 x 1 is restored on 1 x 2."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    [(code, out, err)] = several.end(start(whole, 1, 2))
    assert code == 0, out + err
    assert "rl on 2 cpu device(s)" in out and "(data 2 x fsdp 1 x tensor 1)" in out

    two = start(moved, 2, 1)
    wait_for_step(moved, 1, two)
    two[1].send_signal(signal.SIGTERM)
    (code0, out0, err0), (code1, out1, err1) = several.end(two)
    assert (code0, code1) == (0, 0), out0 + err0 + out1 + err1
    assert (
        "process 0 of 2, coordinator 127.0.0.1:" in out0 and "process 1 of 2, coordinator" in out1
    )
    assert (
        "the same command continues from there" in out0 and "rl on" not in out1
    )  # process 0 alone says more
    assert not (moved / "done.json").exists()

    [(code, out, err)] = several.end(start(moved, 1, 2))
    assert code == 0 and "resuming at step" in out, out + err
    samples = lambda folder: mesh_runs.said(
        map(mesh_runs.json.loads, (folder / "samples.jsonl").open())
    )
    assert samples(whole) == samples(moved) and len(samples(whole)) == 12
    rows = [row for row in run_log.read(moved) if row["kind"] == "train"]
    assert all(0 < row["rewards/of_text/mean"] < 1 for row in rows) and len(rows) == 3
    difference, where = mesh_runs.furthest(run_log.read(whole), run_log.read(moved))
    assert difference < 1e-3, where  # relative, of means of a few tokens


def test_a_peer_that_dies_ends_the_others(tmp_path):
    two = start(tmp_path, 2, 1)
    wait_for_step(tmp_path, 1, two)
    two[1].kill()
    began = time.monotonic()
    (code, _, _), _ = several.end(two, timeout=100)
    assert code not in (0, None) and time.monotonic() - began < 90
