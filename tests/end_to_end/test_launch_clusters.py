"""The cluster scripts against stand-ins for gcloud, Slurm and kubectl (tests/shims): all of them, TPU VMs, Slurm.

What they start is a stand-in, too: a run that waits for SIGTERM, saves, and is complete when started again.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from clusters import one_line, records, tpu_ready, wait, wait_for_log
from places import ROOT

OURS = sorted(p.name for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", OURS)
def test_syntax(script):
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)
    beside_python = os.path.dirname(sys.executable)
    if not (
        tool := shutil.which(
            "shellcheck", path=os.pathsep.join((beside_python, os.environ["PATH"]))
        )
    ):
        pytest.skip("no shellcheck (requirements.txt brings it where it has a wheel)")
    done = subprocess.run(
        [tool, "-x", "-P", ROOT, ROOT / "launch" / script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


# ---- TPU VM


def commands(text):
    """A dry run's lines, as a shell splits them."""
    lines = 'while IFS= read -r line; do eval "words=($line)"; printf "%s\\0" "${words[@]}"; printf "\\n"; done'
    out = subprocess.run(
        ["bash", "-c", lines], input=text, capture_output=True, text=True, check=True
    ).stdout
    return [
        line.split("\0")[:-1]
        for line in out.split("\0\n")
        for line in [line + "\0"]
        if line != "\0"
    ]


@pytest.mark.parametrize(
    "args, env, says",
    [
        ([], {}, "say what to do"),
        (["start"], {}, "start is not create, sync, run, logs, stop or delete"),
        (["create", "now"], {"TPU_TYPE": "v5p-8"}, "create takes no arguments"),
        (["create"], {}, "TPU_TYPE is not set"),
        (["create"], {"TPU_TYPE": "v9-8"}, "set TPU_VERSION"),
        (["create"], {"ZONE": ""}, "ZONE is not set"),
        (["run"], {}, "--config is missing"),
        (["run", "--config=x"], {}, "--workdir is missing"),
        (["run", "--config=x", "--workdir=y"], {"RUN": "a b"}, "RUN=a b names a log file"),
        (
            ["run", "--config=x", "--workdir=y"],
            {"JAX_COORDINATOR_PORT": "no"},
            "JAX_COORDINATOR_PORT=no",
        ),
        (["logs", "-x"], {}, "logs takes -f"),
    ],
)
def test_tpu_bad_usage(cluster, args, env, says):
    out, error, code = cluster.launch("tpu_vm.sh", *args, **{"ZONE": "z"} | env)
    assert code == 2 and out == "" and says in one_line(error)
    assert not (cluster.state / "gcloud.log").exists()


def test_tpu_dry_run(cluster):
    def dry(*args, **env):
        out, error, code = cluster.launch(
            "tpu_vm.sh", "--dry-run", *args, ZONE="z", TPU_TYPE="v5litepod-16", **env
        )
        assert code == 0 and error == ""
        return commands(out)

    tpu = ["gcloud", "compute", "tpus"]
    create = dry("create", PROJECT="p", SPOT="1", CREATE_FLAGS="--network=n --tags=t")
    flags = (
        "--accelerator-type=v5litepod-16 --spot --network=n --tags=t --version=v2-alpha-tpuv5-lite"
    )
    assert create[1] == [*tpu, "tpu-vm", "create", "cxr", *flags.split(), "--zone=z", "--project=p"]
    queued = dry("create", QUEUED="1")[1]
    assert queued[3:6] == ["queued-resources", "create", "cxr"]
    assert {"--runtime-version=v2-alpha-tpuv5-lite", "--node-id=cxr"} < set(
        queued
    ) and "--spot" not in queued
    assert [c[3:5] for c in dry("sync")[1:]] == [["tpu-vm", "scp"], ["tpu-vm", "ssh"]]
    for name, text in (("stop", "kill -TERM"), ("logs", "tail -n 50 logs/run.log")):
        (command,) = dry(name)
        assert (
            command[:6] == [*tpu, "tpu-vm", "ssh", "cxr"]
            and "--worker=all" in command
            and text in command[7]
        )
    assert dry("delete") == [[*tpu, "tpu-vm", "delete", "cxr", "--quiet", "--zone=z"]]
    assert dry("delete", QUEUED="1") == [
        [*tpu, "queued-resources", "delete", "cxr", "--force", "--quiet", "--zone=z"]
    ]
    assert not (cluster.state / "gcloud.log").exists()


@pytest.mark.parametrize(
    "state, verbs",
    [
        ("READY", ["describe", "describe"]),
        ("CREATING READY", ["describe", "describe"]),
        ("STOPPED", ["describe", "start", "describe", "describe"]),
        ("PREEMPTED", ["describe", "delete", "create", "describe", "describe"]),
        ("DELETING", None),
        ("DENIED", None),
    ],
)
def test_tpu_create_or_reuse(cluster, state, verbs):
    (cluster.state / "tpu-vm").write_text(state)
    _, error, code = cluster.launch("tpu_vm.sh", "create", ZONE="z", TPU_TYPE="v4-16", POLL="0")
    if verbs:
        assert code == 0, error
        assert [call[3] for call in cluster.calls("gcloud")] == verbs
    else:
        assert code == 1 and state.removesuffix("ING") in one_line(error)
        assert {call[3] for call in cluster.calls("gcloud")} == {"describe"}


def test_tpu_queued(cluster):
    env = {"ZONE": "z", "TPU_TYPE": "v6e-8", "QUEUED": "1", "POLL": "0", "SPOT": "1"}
    (cluster.state / "queued-resources").write_text("SUSPENDED")
    assert cluster.launch("tpu_vm.sh", "create", **env)[2] == 0
    calls = cluster.calls("gcloud")
    assert [c[2:4] for c in calls[:3]] == [
        ["queued-resources", v] for v in ("describe", "delete", "create")
    ]
    assert (
        "--force" in calls[1]
        and "--spot" in calls[2]
        and "--runtime-version=v2-alpha-tpuv6e" in calls[2]
    )


def test_tpu_stop_behind_the_end_of_main(cluster):
    """Told to stop while it waits for done.json: main is gone by then, and the run is saved all the same."""
    env = tpu_ready(cluster)
    assert cluster.launch("tpu_vm.sh", "run", *cluster.flags, **env)[2] == 0
    cluster.started()
    (cluster.workdir / "saved").touch()  # as another process would: both end by themselves
    wait_for_log(cluster, ": saved", 2, env)
    assert cluster.launch("tpu_vm.sh", "stop", **env)[0].count(": ended") == 2
    wait_for_log(cluster, "exit code 0", 2, env, seconds=30)


def test_tpu_run_stop_and_continue(cluster):
    env = tpu_ready(cluster)
    out, error, code = cluster.launch(
        "tpu_vm.sh", "run", *cluster.flags, XLA_FLAGS="--a=1 --b", TOKEN="secret", **env
    )
    assert code == 0
    assert sorted(out.splitlines()) == [
        f"host-w-{k}: started, log cxr_jax/logs/run.log" for k in (0, 1)
    ]
    cluster.started()

    _, error, code = cluster.launch("tpu_vm.sh", "run", *cluster.flags, **env)
    assert code == 2 and error.count("run is running; stop it first") == 2
    assert cluster.launch("tpu_vm.sh", "sync", **env)[2] == 2

    out, error, code = cluster.launch("tpu_vm.sh", "stop", **env)
    assert code == 0 and out.count(": ended") == 2, error
    # The run has ended; the line of its exit code is written next.
    wait_for_log(cluster, "exit code 0", 2, env)
    out, _, _ = cluster.launch("tpu_vm.sh", "logs", **env)
    first, second = records(out)
    for k, record in enumerate((first, second)):
        assert record["rank"] == str(k) and record["args"] == cluster.flags
        assert record["place"]["CXR_DISTRIBUTED"] == "1" and "TOKEN" not in record["place"]
        assert record["place"]["JAX_COORDINATOR_PORT"] == cluster.env["JAX_COORDINATOR_PORT"]
    assert (
        out.count("host-w-0: saved") == out.count("host-w-1: saved") == 1
        and out.count("exit code 0") == 2
    )
    assert (cluster.workdir / "saved").exists() and not (cluster.workdir / "done.json").exists()
    assert "secret" not in out + json.dumps(cluster.calls("gcloud"))

    assert cluster.launch("tpu_vm.sh", "stop", **env)[0].count("run is not running") == 2
    assert cluster.launch("tpu_vm.sh", "run", *cluster.flags, **env)[2] == 0
    wait((cluster.workdir / "done.json").exists, "the run is complete")
    wait_for_log(cluster, "exit code 0", 4, env)
    assert cluster.launch("tpu_vm.sh", "delete", **env)[2] == 0


# ---- Slurm


def test_slurm_without_slurm(cluster):
    run = ["--config=x", "--workdir=a b"]
    out, error, code = cluster.launch("slurm.sbatch", "--dry-run", *run)
    words = commands(out)[0]
    assert code == 0
    assert words[:2] == [
        "CXR_DISTRIBUTED=1",
        f"JAX_COORDINATOR_PORT={cluster.env['JAX_COORDINATOR_PORT']}",
    ]
    assert words[3:] == [
        "srun",
        "--label",
        "--kill-on-bad-exit=0",
        "bash",
        f"{cluster.root}/launch/_worker.sh",
        *run,
    ]
    out, _, _ = cluster.launch("slurm.sbatch", "--dry-run", *run, JAX_COORDINATOR_PORT="")
    assert "JAX_COORDINATOR_PORT=8476" in out
    for args, says in (
        (run, "sbatch launch/slurm.sbatch"),
        (["--config=x"], "--workdir"),
        ([], "--config is missing"),
    ):
        out, error, code = cluster.launch("slurm.sbatch", *args)
        assert code == 2 and says in one_line(error)


def test_slurm_signal_saves_and_requeues(cluster):
    """The signal reaches the script alone; the processes save, are not killed, and the next start completes the run."""
    batch = cluster.sbatch(*cluster.flags)
    cluster.started()
    os.kill(int((cluster.state / "batch.pid").read_text()), signal.SIGTERM)
    assert batch.wait(120) == 0
    log = (cluster.root / "cxr_jax-101.log").read_text()  # both starts: appended
    assert "job 101, start 1: 2 process(es)" in log and "job 101, start 2" in log
    assert "forcing job termination" not in log
    assert (
        log.count(": saved") == 2
        and log.count(": complete") == 2
        and (cluster.workdir / "done.json").exists()
    )
    for record in records(log):
        assert record["args"] == cluster.flags and record["place"]["CXR_DISTRIBUTED"] == "1"
    assert {
        line.split(":")[0] for line in log.splitlines() if "complete" in line and "not" not in line
    } == {"0", "1"}
    options = json.loads((cluster.state / "options.json").read_text())
    assert (
        options["signal"] == "B:TERM@120"
        and "requeue" in options
        and options["open-mode"] == "append"
    )


@pytest.mark.parametrize("how", ["cancelled", "requeue off", "fails", "bad input"])
def test_slurm_not_requeued(cluster, how):
    flags, code = cluster.flags, 0
    if how in ("fails", "bad input"):
        code = 1 if how == "fails" else 2
        flags = [*flags, f"--config.exit={code}"]
    batch = cluster.sbatch(*flags)
    if code == 0:
        cluster.started()
        first = (
            ["scontrol", "update", "JobId=101", "Requeue=0"]
            if how == "requeue off"
            else ["scancel", "101"]
        )
        subprocess.run(first, env=cluster.env, check=True)
        if how == "requeue off":
            subprocess.run(
                ["scancel", "--batch", "--signal=TERM", "101"], env=cluster.env, check=True
            )
    assert batch.wait(120) == code
    log = (cluster.root / "cxr_jax-101.log").read_text()
    assert "start 1" in log and "start 2" not in log
    says = {
        "cancelled": "job state CANCELLED",
        "requeue off": "requeueing is off",
        "fails": "exit code 1: not",
    }
    assert says.get(how, "") in log


def test_slurm_from_elsewhere(cluster, tmp_path):
    batch = subprocess.Popen(
        ["sbatch", cluster.root / "launch/slurm.sbatch"], env=cluster.env, cwd=tmp_path
    )
    assert batch.wait(120) == 2 and "set CXR_ROOT" in one_line(
        (tmp_path / "cxr_jax-101.log").read_text()
    )


@pytest.mark.parametrize(
    "visible, tasks, local, on_node, ids",
    [
        ("0,1,2,3,4,5,6,7", "1", "0", "8", "0,1,2,3,4,5,6,7"),  # a process per node
        ("0,1,2,3,4,5,6,7", "8(x4)", "3", "8", "3"),  # a process per GPU
        ("0,1,2,3", "2", "1", "4", "2,3"),
        ("0", "8", "3", "8", "0"),  # bound: each sees its own
        ("0,1", "2", "1", "4", "0,1"),
        ("0,1,2", "2", "0", "3", None),
    ],
)
def test_slurm_gpus(cluster, visible, tasks, local, on_node, ids):
    slurm = {
        "SLURM_LOCALID": local,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_GPUS_ON_NODE": on_node,
    }
    slurm["SLURM_PROCID"] = "0"
    cluster.workdir.mkdir(parents=True)
    (cluster.workdir / "saved").touch()
    out, error, code = cluster.launch(
        "_worker.sh", *cluster.flags, CUDA_VISIBLE_DEVICES=visible, **slurm
    )
    if ids:
        assert code == 0 and records(out)[0]["place"]["JAX_LOCAL_DEVICE_IDS"] == ids
    else:
        assert code == 2 and "3 GPUs for 2 processes" in one_line(error)
