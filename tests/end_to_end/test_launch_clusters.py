"""The cluster scripts against stand-ins for gcloud, Slurm and kubectl (tests/shims) that really start the processes.

What they start is a stand-in, too: a run that waits for SIGTERM, saves, and is complete when started again.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from places import ROOT

SHIMS = ROOT / "tests" / "shims"
OURS = sorted(p.name for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch"))


class Cluster:
    """A copy of the scripts in a folder with a space, its environment ready, and the stand-ins first in PATH."""

    def __init__(self, tmp_path):
        self.root, self.state, self.workdir = (
            tmp_path / "a copy",
            tmp_path / "state",
            tmp_path / "data" / "my run",
        )
        shutil.copytree(ROOT / "launch", self.root / "launch")
        (self.root / "cxr_jax" / "runtime").mkdir(parents=True)
        for name in ("__init__.py", "runtime/__init__.py"):
            (self.root / "cxr_jax" / name).touch()
        shutil.copy(SHIMS / "standin.py", self.root / "cxr_jax" / "main.py")
        for name in ("runtime/processes.py", "errors.py"):
            shutil.copy(ROOT / "cxr_jax" / name, self.root / "cxr_jax" / name)
        (self.root / "experiments").mkdir()
        (self.root / "experiments" / "it.py").touch()
        for name in ("requirements.txt", "pyproject.toml"):
            (self.root / name).touch()
        self.state.mkdir()
        self.ready(self.root)
        keep = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM", "CXR", "JAX", "OMPI", "TPU", "GPU"))
        }
        self.env = keep | {
            "PATH": f"{SHIMS}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "SHIM_STATE": str(self.state),
            "CXR_ACCELERATOR": "cpu",
            "CXR_START_TIMEOUT": "120",
            "JAX_COORDINATOR_PORT": str(free_port()),
            "JAX_PLATFORMS": "cpu",
        }
        note = "--config.note=a 'b' \"$HOME\" $(c) \\d"
        self.flags = ["--config=experiments/it.py", f"--workdir={self.workdir}", note]

    @staticmethod
    def ready(root):
        """An environment that set_up takes as it is."""
        bin_dir = root / ".venv" / "bin"
        bin_dir.mkdir(parents=True)
        (bin_dir / "python").write_text(
            f'#!/bin/sh\nJAX_PLATFORMS=cpu exec "{sys.executable}" "$@"\n'
        )
        (bin_dir / "python").chmod(0o755)
        stamp = 'import hashlib, sys; print(sys.version, hashlib.sha256(b"").hexdigest())'
        text = subprocess.run([sys.executable, "-c", stamp], capture_output=True, text=True).stdout
        (root / ".venv" / ".requirements-stamp").write_text(text)

    def launch(self, script, *args, **env):
        """Output, error output and exit code of a launch script."""
        command = ["bash", str(self.root / "launch" / script), *args]
        here = {"cwd": self.root, "env": self.env | env, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, **here)
        return done.stdout, done.stderr, done.returncode

    def sbatch(self, *args, options=(), **env):
        command = ["sbatch", "--nodes=2", *options, "launch/slurm.sbatch", *args]
        return subprocess.Popen(command, env=self.env | env, cwd=self.root, text=True)

    def calls(self, tool):
        return [json.loads(line) for line in (self.state / f"{tool}.log").read_text().splitlines()]

    def started(self, n=2):
        wait(
            lambda: all((self.workdir / f"started{k}").exists() for k in range(n)),
            "all processes started",
        )


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def wait(ready, what, seconds=120):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(tmp_path)
    yield made
    for file in made.state.rglob("*.pid"):  # what a failed test has left
        try:
            os.killpg(int(file.read_text()), signal.SIGKILL)
        except (ProcessLookupError, PermissionError, ValueError):
            pass


def records(text):
    """What every process of the stand-in printed first, in order of rank."""
    found = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"rank"' in line]
    return sorted(found, key=lambda r: r["rank"])


def one_line(error):
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


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


def tpu_ready(cluster):
    env = {"ZONE": "z", "TPU_TYPE": "v5p-16", "POLL": "0"}
    assert cluster.launch("tpu_vm.sh", "create", **env)[2] == 0
    for k in range(2):
        cluster.ready(cluster.state / f"worker{k}" / "cxr_jax")
    out, error, code = cluster.launch("tpu_vm.sh", "sync", **env)
    assert code == 0, error
    return env


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
    wait(
        lambda: cluster.launch("tpu_vm.sh", "logs", **env)[0].count("exit code 0") == 4,
        "both workers ended",
    )
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


# ---- GKE

GPU = {"GPU_TYPE": "nvidia-h100-80gb", "GPUS": "1", "NODES": "2", "IMAGE": "img:1", "PVC": "claim"}


def gke(cluster, *args, **env):
    here = {"IMAGE_DIR": str(cluster.root), "MOUNT": str(cluster.workdir.parent)}
    return cluster.launch("gke.sh", *args, **GPU | here | env)


@pytest.mark.parametrize(
    "args, env, says",
    [
        ([], {}, "say what to do"),
        (["apply"], {}, "apply is not run"),
        (["run"], {}, "--config is missing"),
        (["run", "--config=x", "--workdir=/elsewhere/x"], {}, "is not under MOUNT"),
        (["run", "--config=x", "--dry_run"], {"IMAGE": ""}, "IMAGE is not set"),
        (
            ["run", "--config=x", "--dry_run"],
            {"GPU_TYPE": ""},
            "set TPU_TYPE and TPU_TOPOLOGY, or GPU_TYPE",
        ),
        (["run", "--config=x", "--dry_run"], {"TPU_TYPE": "t"}, "both set"),
        (
            ["run", "--config=x", "--dry_run"],
            {"GPU_TYPE": "", "TPU_TYPE": "t", "TPU_TOPOLOGY": "4"},
            "is not like 4x4",
        ),
        (
            ["run", "--config=x", "--dry_run"],
            {"GPU_TYPE": "", "TPU_TYPE": "t", "TPU_TOPOLOGY": "3x3"},
            "9 chips",
        ),
        (
            ["run", "--config=x", "--dry_run"],
            {"GPU_TYPE": "", "TPU_TYPE": "t", "TPU_TOPOLOGY": "4x4"},
            "4 nodes",
        ),
        (["run", "--config=x", "--dry_run"], {"NAME": "A"}, "NAME=A"),
        (["delete", "x"], {}, "delete takes no arguments"),
    ],
)
def test_gke_bad_usage(cluster, args, env, says):
    out, error, code = gke(cluster, *args, **env)
    assert code == 2 and out == "" and says in one_line(error)
    assert not (cluster.state / "kubectl.log").exists()


def test_gke_manifest(cluster):
    odd = '--config.note=a "q" \\ $(HOSTNAME) $$ é'
    env = {
        "GPU_TYPE": "",
        "NODES": "",
        "TPU_TYPE": "tpu-v6e-slice",
        "TPU_TOPOLOGY": "4x4",
        "SPOT": "1",
        "GRACE": "15",
    }
    env = GPU | env | {"SECRET": "keys", "NAME": "r1"}
    out, error, code = cluster.launch(
        "gke.sh", "--dry-run", "run", "--config=x", "--workdir=/data/a b", odd, **env
    )
    assert code == 0, error
    jobset = yaml.safe_load(out)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    network = {"enableDNSHostnames": True, "subdomain": "r1", "publishNotReadyAddresses": True}
    assert jobset["spec"]["network"] == network
    (worker,) = jobset["spec"]["replicatedJobs"]
    job, pod = worker["template"]["spec"], worker["template"]["spec"]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"], job["backoffLimit"]) == (
        4,
        4,
        "Indexed",
        0,
    )
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 15
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (box,) = pod["containers"]
    assert box["resources"] == {"limits": {"google.com/tpu": 4}}
    assert box["command"] == ["bash", "launch/_worker.sh"]
    assert box["args"] == ["--config=x", "--workdir=/data/a b", odd.replace("$", "$$")]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in box["env"]}
    port = cluster.env["JAX_COORDINATOR_PORT"]
    assert env["CXR_COORDINATOR"] == f"r1-worker-0-0.r1:{port}" and env["CXR_NUM_PROCESSES"] == "4"
    assert box["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert not (cluster.state / "kubectl.log").exists()


def gke_state(cluster):
    return json.loads((cluster.state / "jobset.json").read_text())


def gke_end(cluster):
    wait(lambda: gke_state(cluster)["state"] != "Running", "the JobSet has ended")
    return gke_state(cluster)


def test_gke_eviction_is_not_completion(cluster):
    """One pod is told to stop: all save and exit, which must not count as done; their successors complete the run."""
    out, error, code = gke(cluster, "run", *cluster.flags, CXR_DONE_WAIT="0")
    assert code == 0 and "created" in out, error
    assert gke(cluster, "run", *cluster.flags)[2] != 0  # one of this name is there
    cluster.started()
    os.kill(int((cluster.state / "pod1.pid").read_text()), signal.SIGTERM)
    end = gke_end(cluster)
    assert (end["state"], end["restarts"], end["replaced"]) == ("Completed", 0, 2)
    assert (cluster.workdir / "done.json").exists()
    out, _, _ = gke(cluster, "logs")
    for k in range(2):
        text = (cluster.state / f"pod{k}.log").read_text()
        for once in ("saved", "complete\n", "exit code 75", "exit code 0"):
            assert text.count(once) == 1, text
        assert f"[pod/pod{k}/main] complete" in out
        for record in records(text):
            assert record["rank"] == str(k) and record["args"] == cluster.flags
            assert (
                record["place"]["CXR_COORDINATOR"]
                == f"localhost:{cluster.env['JAX_COORDINATOR_PORT']}"
            )


@pytest.mark.parametrize(
    "code, times, end", [(2, 9, ("Failed", 0)), (1, 1, ("Completed", 1)), (1, 9, ("Failed", 2))]
)
def test_gke_failures(cluster, code, times, end):
    flags = [*cluster.flags, f"--config.exit={code}", f"--config.times={times}"]
    assert gke(cluster, "run", *flags, MAX_RESTARTS="2")[2] == 0
    state = gke_end(cluster)
    assert (state["state"], state["restarts"]) == end


def test_gke_delete_saves(cluster):
    assert gke(cluster, "run", *cluster.flags)[2] == 0
    cluster.started()
    assert gke(cluster, "delete")[2] == 0
    assert (cluster.workdir / "saved").exists() and gke_state(cluster)["state"] == "Deleted"
    assert gke(cluster, "run", *cluster.flags)[2] == 0
    assert gke_end(cluster)["state"] == "Completed" and (cluster.workdir / "done.json").exists()


# ---- two real processes of JAX, met on loopback as each cluster makes them meet


def sum_tpu(cluster, flags):
    env = tpu_ready(cluster)
    assert cluster.launch("tpu_vm.sh", "run", *flags, **env)[2] == 0
    wait(
        lambda: cluster.launch("tpu_vm.sh", "logs", **env)[0].count("exit code") == 2,
        "both workers ended",
    )
    return cluster.launch("tpu_vm.sh", "logs", **env)[0]


def sum_slurm(cluster, flags):
    assert cluster.sbatch(*flags).wait(120) == 0
    return (cluster.root / "cxr_jax-101.log").read_text()


def sum_gke(cluster, flags):
    assert gke(cluster, "run", *flags)[2] == 0
    assert gke_end(cluster)["state"] == "Completed"
    return gke(cluster, "logs")[0]


@pytest.mark.slow
@pytest.mark.parametrize("start", [sum_tpu, sum_slurm, sum_gke])
def test_two_processes_meet(cluster, start):
    text = start(cluster, [*cluster.flags, "--config.sum=1"])
    print(text)  # pytest -rP shows it
    assert text.count("psum 3") == 2, text
    for k in range(2):
        assert f"process {k} of 2, coordinator " in text
    assert text.count(f":{cluster.env['JAX_COORDINATOR_PORT']}\n") == 2, text
