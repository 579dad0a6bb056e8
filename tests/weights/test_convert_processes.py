"""A conversion is whole or not there: failures, full disks, signals; its memory."""

import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from convert_calls import listing, refuses, stored
from convert_cases import BF16, make
from places import ROOT

from cxr_jax.models import tensor_table
from cxr_jax.models.family import TensorRule
from cxr_jax.models.qwen2_5_vl import config
from cxr_jax.weights import conversion, hf_folder, native_folder
from cxr_jax.weights.safetensors_file import write_folder, write_safetensors


def test_a_failure_leaves_nothing(tmp_path, monkeypatch, capsys, ours):
    """Whatever raises, at whatever point: no DST, no temporary folder, no parent that was made."""
    src = make(tmp_path / "src")
    real = TensorRule.to_ours, write_safetensors

    def late(function, error, after):
        calls = []

        def wrapped(*args):
            calls.append(1)
            if len(calls) > after:
                raise error
            return function(*args)

        return wrapped

    full, stopped = OSError(28, "No space left on device"), KeyboardInterrupt()
    for error, message in (
        (full, r"failed \(OSError\): .*No space left"),
        (stopped, "stopped before the end"),
    ):
        monkeypatch.setattr(TensorRule, "to_ours", late(real[0], error, 30))
        refuses(tmp_path, capsys, ["from-hf", src, tmp_path / "a" / "dst"], message, code=1)
        monkeypatch.setattr(conversion, "write_folder", late(write_folder, error, 0))
        refuses(tmp_path, capsys, ["to-hf", ours, tmp_path / "a" / "dst"], message, code=1)
    monkeypatch.undo()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    for argv in (["from-hf", src, tmp_path / "a" / "dst"], ["to-hf", ours, tmp_path / "a" / "dst"]):
        refuses(tmp_path, capsys, argv, "GB are needed")


def start(*argv, limit=None):
    """The command in a process of its own. limit: blocks in the largest file that it may write, as on a full disk."""
    limited = [] if limit is None else ["sh", "-c", f'ulimit -f {limit}; exec "$@"', "sh"]
    return subprocess.Popen(
        [*limited, sys.executable, "-m", "cxr_jax.convert", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def ends(process, code, message):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code and err.count("\n") == 1 and message in err and out == "", (
        out,
        err,
    )


@pytest.mark.slow
def test_the_command(tmp_path, ours):
    src = make(tmp_path / "src")
    running = [
        start("from-hf", src, tmp_path / "dst"),
        start("from-hf", src, tmp_path / "small", limit=50),
        start("to-hf", ours, tmp_path / "small2", limit=50),
        start("from-hf", src, src / "inside"),
    ]
    out, err = running[0].communicate(timeout=600)
    assert running[0].returncode == 0 and err == "" and "written" in out
    ends(running[1], 1, "the conversion failed")
    ends(running[2], 1, "the conversion failed")
    ends(running[3], 2, "lies inside")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Hugging Face folder of 0.36 GB in bfloat16, in shards of 0.1 GB; (folder, bytes)."""
    folder = tmp_path_factory.mktemp("large") / "src"
    text = config.TextConfig(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=2,
        mrope_section=(8, 12, 12),
    )
    model_config = config.Config(
        config.VisionConfig(
            depth=2,
            hidden_size=128,
            num_heads=4,
            intermediate_size=256,
            out_hidden_size=1024,
            fullatt_block_indexes=(1,),
        ),
        text,
    )
    rng, size = np.random.default_rng(0), 0
    noise = rng.integers(0, 0x7F00, 2**20, dtype=np.uint16)
    params: dict = {}
    for path, shape in tensor_table.parameter_shapes(model_config).items():
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = np.resize(noise, shape).view(BF16)
        size += node[path[-1]].nbytes
    hf_folder.save(folder, model_config, params, max_shard_gb=0.1)
    return folder, size


# Peak memory before and after a conversion, in KiB. Not ru_maxrss: a child inherits it from a larger parent.
MEASURE = """
import sys
from cxr_jax import convert
import jax, orbax.checkpoint, ml_dtypes
import numpy as np
jax.random.key(0)
peak = lambda: next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM"))
before = peak()
assert convert.main(sys.argv[1:]) == 0
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_stays_low(tmp_path, large):
    folder, size = large
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= 4
    biggest_array = 49152 * 1024 * 2
    for argv, arrays in (
        (["from-hf", folder, tmp_path / "ours"], size),
        (["to-hf", tmp_path / "ours", tmp_path / "back", "--max_shard_gb=0.1"], biggest_array),
    ):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *map(str, argv)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        before, peak = map(int, done.stdout.split("\n")[-2].split())
        extra = (peak - before) * 1024 - arrays
        print(f"{argv[0]}: {arrays / 2**20:.0f} MiB of arrays, {extra / 2**20:.0f} MiB beyond them")
        # A shard is 100 MB. All else than arrays: one tensor, its pages in the file, and what libraries keep.
        assert -0.2 * arrays < extra < 300 * 2**20  # and the measure did see the arrays
    assert stored(tmp_path / "back") == stored(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(tmp_path, large, number):
    """At the start, while reading, while Orbax writes, ...: DST is whole, or there is no trace."""
    folder, _ = large

    def whole(i):
        """Whether the i-th conversion was done before its signal came."""
        root = tmp_path / str(i)
        root.mkdir()
        process = start("from-hf", folder, root / "a" / "dst")
        while process.poll() is None and not (root / "a").exists():
            time.sleep(0.01)
        time.sleep(0.4 * i)
        process.send_signal(number)
        out, err = process.communicate(timeout=600)
        time.sleep(0.5)  # whatever were still writing
        if process.returncode == 0:
            native_folder.load(root / "a" / "dst")
            shutil.rmtree(root / "a")
        assert process.returncode == 0 or (
            process.returncode == 1 and err.startswith("error: stopped")
        ), err
        assert listing(root) == []
        return process.returncode == 0

    with concurrent.futures.ThreadPoolExecutor(
        4
    ) as pool:  # the start of a process takes longer than the rest
        assert not all(pool.map(whole, range(4)))
