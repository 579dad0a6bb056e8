"""The launch scripts: their syntax, and what they do without an environment. No installation happens here."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from places import ROOT

SCRIPTS = ["launch/_setup.sh", "launch/local.sh", "launch/test.sh", "launch/flags.sh", ".ci/run"]


@pytest.fixture
def copy(tmp_path):
    """The scripts in a path with a space, with a package that prints its arguments."""
    root = tmp_path / "a copy"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "cxr_jax").mkdir()
    (root / "cxr_jax" / "__init__.py").touch()
    (root / "cxr_jax" / "main.py").write_text("import sys\nprint(*sys.argv[1:], sep='\\n')\n")
    (root / "experiments").mkdir()
    (root / "experiments" / "sft.py").touch()
    (root / "requirements.txt").touch()
    return root


def run(script, *args, **kwargs):
    return subprocess.run(
        ["bash", str(script), *args], capture_output=True, text=True, timeout=120, **kwargs
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_sets_of_the_compilers_flags():
    for name, prefix in (
        ("gpu", "--xla_gpu_"),
        ("tpu_gather", "--xla_"),
        ("tpu_slices", "--xla_tpu_"),
    ):
        flags = run(ROOT / "launch" / "flags.sh", name).stdout.split()
        assert flags and all(re.fullmatch(rf"{prefix}\w+=true", flag) for flag in flags), flags
    # XLA ends a program whose flags it does not know; the flags of GPUs are in every build.
    gpu = run(ROOT / "launch" / "flags.sh", "gpu").stdout.strip()
    code = "import jax; jax.devices('cpu')"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"XLA_FLAGS": gpu})
    for arguments in ([], ["tpu"]):
        done = run(ROOT / "launch" / "flags.sh", *arguments)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith("flags.sh: ") and done.stderr.count("\n") == 1


def test_pre_commit_formats_with_the_version_of_the_suite():
    pin = re.search(r"^ruff==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert f"rev: v{pin}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_no_python_is_one_line(copy, python):
    for script in ("local.sh", "test.sh"):
        done = run(copy / "launch" / script, env=os.environ | {"PYTHON": python})
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert "install Python 3.11 or newer" in done.stderr
    assert not (copy / ".venv").exists()


def test_flags(copy, tmp_path):
    """An environment whose stamp is right is used as it is, from any directory."""
    bin_dir = copy / ".venv" / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_dir / "python").chmod(0o755)
    stamp = run("-c", f'. "{copy}/launch/_setup.sh"; stamp_text')
    (copy / ".venv" / ".requirements-stamp").write_text(stamp.stdout)

    def flags(*args):
        done = run(copy / "launch" / "local.sh", *args, cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.split("\n")[:-1]

    assert flags() == [f"--config={copy}/experiments/rl.py", f"--workdir={copy}/runs/rl_phantom"]
    assert flags("--config=experiments/sft.py:phantom", "--workdir=a b", "--config.x=1") == [
        f"--config={copy}/experiments/sft.py:phantom",
        "--workdir=a b",
        "--config.x=1",
    ]
    (tmp_path / "mine.py").touch()
    assert flags("--config=mine.py") == ["--config=mine.py"]
