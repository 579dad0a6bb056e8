"""What generate.py and sft_step.py share: named shapes, their inputs, worker processes, and how results are printed.

Both sides of a comparison are worker processes that live for the whole run and answer one request at a time, a JSON
object a line; the other one sleeps at its stdin meanwhile. This file needs the standard library only where the peer,
which has no jax, uses it (`serve`, `peak`).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIDE, PROMPT = 224, 136  # pixels of an image's side; tokens of a prompt, 64 of them the image's
WORDS = 900  # smaller ids are no special tokens


# Both sides


def peak(reset: bool = False) -> float:
    """GiB of memory that this process has held at most since the last reset."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1]
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return int(status.split()[0]) / 2**20


def serve(handlers: dict) -> None:
    """Answers requests {"do": name, ...} from stdin until it ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(handlers[request.pop("do")](**request)), file=answers, flush=True)


def product_gflops(multiply: Callable[[], object], size: int) -> float:
    """GFLOP/s of multiply(), a size^3 matrix product: the best of 5 after one that is not counted."""
    multiply()
    return 2e-9 * size**3 / min(clock(multiply) for _ in range(5))


def torch_gflops(size: int = 2048) -> float:
    """`gemm_gflops` of torch."""
    import torch

    matrix = torch.randn(size, size)
    return product_gflops(lambda: matrix @ matrix, size)


class Worker:
    """A child process that `serve`s."""

    def __init__(self, *command, root=ROOT):
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    def __call__(self, do: str, **request) -> dict:
        print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.process.args[1]} ended: exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def arguments(parser) -> None:
    """The flags that both benches have."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no_peer", action="store_true")
    parser.add_argument("--peer_python", default=ROOT / ".venv-oracle/bin/python")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


@contextlib.contextmanager
def workers(parser, args, peer_script: str = "_peer.py"):
    """(our worker, the peer's or None, facts of both): two processes with the same weights and inputs."""
    if args.dtype != "float32" and not args.no_peer:
        parser.error("the peer is compared in float32; give --no_peer")
    ours, peer = Worker(sys.executable, sys.argv[0], "--worker", *sys.argv[1:]), None
    try:
        known = [ours("facts")]
        if not args.no_peer:
            with tempfile.TemporaryDirectory() as temp:
                folder = pathlib.Path(temp) / "model"
                ours("save", folder=str(folder))
                peer = Worker(
                    args.peer_python, pathlib.Path(__file__).with_name(peer_script), folder
                )
                known.append(peer("facts"))
        yield ours, peer, known
    finally:
        ours.close()
        if peer:
            peer.close()


# Our side


def config(shape: str):
    """The named shape's `cxr_jax.models.qwen2_5_vl.config.Config`, with the special ids of the embedded tokenizer.

    tiny: 4,683,904 parameters, where a library's overhead shows. small: 123,511,792, a slice of 3B's ratios that a CPU
    computes. 3b: Qwen2.5-VL-3B.
    """
    from cxr_jax.models import tokenizer
    from cxr_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B, Config, TextConfig, VisionConfig
    from cxr_jax.weights import pretrained

    if shape == "tiny":
        model_config = Config(
            VisionConfig(
                depth=4,
                hidden_size=128,
                num_heads=4,
                intermediate_size=384,
                out_hidden_size=256,
                fullatt_block_indexes=(3,),
            ),
            TextConfig(
                vocab_size=1024,
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=2,
                mrope_section=(4, 6, 6),
            ),
            tie_word_embeddings=True,
        )
    elif shape == "small":
        model_config = Config(
            VisionConfig(
                depth=4,
                hidden_size=640,
                num_heads=8,
                intermediate_size=1710,
                out_hidden_size=1024,
                fullatt_block_indexes=(3,),
            ),
            TextConfig(
                vocab_size=16384,
                hidden_size=1024,
                intermediate_size=5504,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=1,
                mrope_section=(16, 24, 24),
            ),
            tie_word_embeddings=True,
        )
    else:
        model_config = {"3b": QWEN2_5_VL_3B}[shape]
    return dataclasses.replace(
        model_config, **tokenizer.config_ids(tokenizer.load(pretrained.PHANTOM))
    )


def random_params(model_config, dtype):
    """Fresh parameters on the device. Media tokens have no embedding, so that neither side ever picks one."""
    import functools

    import jax
    import numpy as np

    from cxr_jax.models import network

    @functools.partial(jax.jit, static_argnames="dtype")
    def make(key, dtype):
        fresh = network.init_params(model_config, key)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), fresh)
        table = params["text"]["embed"]
        table["embedding"] = table["embedding"].at[np.array(model_config.media_token_ids)].set(0)
        return params

    return make(jax.random.key(0), dtype)


def prompts(model, batch: int) -> dict:
    """`batch` prompts of one image and PROMPT tokens each, each with its own image and words.

    image float32 [B, S, S] in 0..1, pixels float32 [B, P, patch_dim], grid, ids int32 [B, T], text (of row 0).
    """
    import numpy as np

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (batch, SIDE, SIDE)).astype(np.float32) / 255
    prepared = [model.prepare(image) for image in images]
    grid = prepared[0][1]
    # Longer by a word or shorter by a letter, until the prompt has just as many tokens as it should.
    text = "Find abnormalities and support devices."
    while len(row := model.render(text, [grid])) != PROMPT:
        if len(row) < PROMPT:
            text += " and"
        else:
            text = text[:-1]
    ids = np.repeat(np.asarray(row, np.int32)[None], batch, 0)
    words = ids[0] < WORDS
    ids[1:, words] = generator.integers(0, WORDS, (batch - 1, words.sum()))
    return {
        "image": images,
        "pixels": np.stack([pixels for pixels, _ in prepared]),
        "grid": grid,
        "ids": ids,
        "text": text,
    }


def gemm_gflops(dtype, size: int = 2048) -> float:
    """GFLOP/s of a product of two size x size matrices, the best of 5."""
    import jax
    import jax.numpy as jnp

    matrix = jax.random.normal(jax.random.key(1), (size, size), dtype)
    dot = jax.jit(jnp.dot)
    return product_gflops(lambda: dot(matrix, matrix).block_until_ready(), size)


def read_gbps(megabytes: int = 512) -> float:
    """GB/s at which a large float32 array is summed, the best of 5."""
    import jax
    import jax.numpy as jnp

    values = jnp.ones((megabytes, 2**18), jnp.float32)
    total = jax.jit(jnp.sum)
    total(values).block_until_ready()
    seconds = min(clock(lambda: total(values).block_until_ready()) for _ in range(5))
    return 1e-9 * values.nbytes / seconds


def clock(work: Callable[[], object]) -> float:
    """Seconds of work()."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory(reset: bool = False) -> float:
    """GiB held at most: of the accelerator's memory, or of this process on a CPU."""
    import jax

    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return stats["peak_bytes_in_use"] / 2**30 if stats else peak(reset)


def facts() -> dict[str, str]:
    """The device and the versions of our side."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


# Printing


def spread(values, scale: float = 1.0, digits: int = 1) -> str:
    """'median (least-most)'."""
    least, median, most = (scale * pick(values) for pick in (min, statistics.median, max))
    return f"{median:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"


def table(rows: list[list[str]]) -> str:
    """Rows of equal length, columns aligned; the first row and column are names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def header(*all_facts: dict) -> str:
    """What a result has to say of itself: when, on which machine, with which versions, by which command."""
    known = {name: value for facts in all_facts for name, value in facts.items()}
    when = time.strftime("%Y-%m-%d %H:%M")
    machine = f"{_processor()}, {len(os.sched_getaffinity(0))} cores"
    versions = ", ".join(f"{name} {value}" for name, value in known.items())
    variables = ("GLIBC_TUNABLES", "OMP_WAIT_POLICY", "XLA_FLAGS")
    settings = [f"{name}={os.environ[name]}" for name in variables if name in os.environ]
    command = " ".join([*settings, "python", shlex.join(sys.argv)])
    return f"{when}; {machine}; {versions}\ncommand: {command}"


def _processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def load() -> str:
    """How busy the machine is: the mean number of processes that wanted a core in the last minute."""
    return f"{os.getloadavg()[0]:.1f}"
