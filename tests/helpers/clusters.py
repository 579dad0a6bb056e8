"""A copy of the cluster scripts beside stand-ins for gcloud, Slurm and kubectl, which really start the processes."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

from places import ROOT

SHIMS = ROOT / "tests" / "shims"


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


def wait(ready, what, seconds=120, pause=0.02):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(pause)


def wait_for_log(cluster, said, times, env, **options):
    """Each look at the log starts a dozen processes, which would take the time of those that it waits for."""
    log = lambda: cluster.launch("tpu_vm.sh", "logs", **env)[0]
    wait(lambda: log().count(said) == times, f"{said!r} is in the log", pause=1, **options)


def records(text):
    """What every process of the stand-in printed first, in order of rank."""
    found = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"rank"' in line]
    return sorted(found, key=lambda r: r["rank"])


def one_line(error):
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def tpu_ready(cluster):
    env = {"ZONE": "z", "TPU_TYPE": "v5p-16", "POLL": "0"}
    assert cluster.launch("tpu_vm.sh", "create", **env)[2] == 0
    for k in range(2):
        cluster.ready(cluster.state / f"worker{k}" / "cxr_jax")
    out, error, code = cluster.launch("tpu_vm.sh", "sync", **env)
    assert code == 0, error
    return env


# ---- GKE

GPU = {"GPU_TYPE": "nvidia-h100-80gb", "GPUS": "1", "NODES": "2", "IMAGE": "img:1", "PVC": "claim"}


def gke(cluster, *args, **env):
    here = {"IMAGE_DIR": str(cluster.root), "MOUNT": str(cluster.workdir.parent)}
    return cluster.launch("gke.sh", *args, **GPU | here | env)


def gke_state(cluster):
    return json.loads((cluster.state / "jobset.json").read_text())


def gke_end(cluster):
    wait(lambda: gke_state(cluster)["state"] != "Running", "the JobSet has ended")
    return gke_state(cluster)
