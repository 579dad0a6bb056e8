"""Compare our model with transformers on random configs (cases.py). Needs .venv-oracle (requirements.txt).

    .venv/bin/python tests/oracle/parity.py --seeds 0:3000 [--family qwen3_vl]

Prints every seed that is past a bar, then the worst of each measure; exits 1 if there is such a seed. Several families
in one process have a comma between them: `--family qwen3_vl,gemma3 --seeds 0:200,0:100 --loop_every 8,4`.

Seeds 200 to 2201 (2026-11-26, --loop_every 3, 2 cores): no position and no greedy token differs; all logits within
4.6e-5 of their standard deviation but for seed 1173, 1.3e-4 (8.9e-5 with --optimise). Its vision tower is 4 features
wide and ill-conditioned: torch's own float32 features are 3.6e-4 from its float64 ones, ours 1.9e-4.

Qwen3-VL, seeds 200 to 2199 (2026-11-30, --loop_every 8, commit eeb188f): no position and no greedy token differs; all
logits within 3.5e-5 but for seed 816, 3.5e-4 (1.7e-4 with --optimise): a tower 4 features wide and 11 blocks deep,
where torch's float32 features are 1.2e-4 from its float64 ones and ours 3.0e-4. Gemma 3, seeds 0 to 499, likewise: all
logits within 7.7e-5.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import fast_compile

# Programs are compiled to run once. `--optimise` compiles as in production.
if __name__ == "__main__":
    if "--optimise" not in sys.argv:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast_compile.FLAGS}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop(
        "JAX_COMPILATION_CACHE_DIR", None
    )  # thousands of programs, none of which is needed again

import cases
import jax
import numpy as np

from cxr_jax.inference import model, sampling
from cxr_jax.models import attention, layers, network, registry
from cxr_jax.weights import hf_folder
from cxr_jax.weights.safetensors_file import TensorToWrite, write_safetensors

BAR = 1e-4  # of the standard deviation of what is compared
ORACLE = ROOT / ".venv-oracle" / "bin" / "python"
CHUNK = 20  # seeds between two clearings of JAX's caches


@dataclasses.dataclass
class Result:
    """features (of taps, too), logits: max abs difference over the reference's standard deviation. positions: entries
    that differ. tokens: rows whose greedy tokens differ. gap: how much the reference prefers its token to ours where
    they part, over the standard deviation of its logits, at most (within BAR: a tie but for rounding). config:
    transformers' own spelling of the config reads the same. generate: the reference's `generate` agrees with its
    forward passes (where tried)."""

    family: str
    seed: int
    features: float
    logits: float
    positions: int
    tokens: int
    gap: float
    config: bool
    generate: bool

    @property
    def good(self) -> bool:
        exact = not self.positions and not self.tokens and self.config and self.generate
        return exact and max(self.features, self.logits) <= BAR


def load(case: cases.Case, folder: pathlib.Path) -> model.Model:
    """Our model from a Hugging Face folder that holds the case."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config))
    tensors = [
        TensorToWrite(case.stored_key(k), w.shape, w.dtype, lambda w=w: w)
        for k, w in cases.weights(case).items()
    ]
    write_safetensors(folder / "model.safetensors", tensors)
    return model.Model(*hf_folder.load(folder), folder=folder)


def ratio(got, want) -> float:
    return float(np.abs(got - want).max() / want.std())


def read_features(features: list, ref: dict) -> tuple[list, list]:
    """Tokens and taps of all images: ours, and the reference's."""
    if not features:
        return [], []
    taps = sum(name.startswith("tap") for name in ref)
    names = ["features", *(f"tap{number}" for number in range(taps))]
    ours = [np.concatenate(part) for part in zip(*map(jax.tree.leaves, features), strict=True)]
    assert len(ours) == len(names), f"{len(ours) - 1} taps instead of {len(names) - 1}"
    return ours, [ref[name] for name in names]


def decoded(case: cases.Case, m: model.Model, positions, features) -> np.ndarray:
    """Greedy tokens [B, N] of the sampling loop with its cache, -1 after a stop."""
    ids = case.input_ids
    if case.attention_mask is not None:
        ids = np.where(case.attention_mask, ids, m.config.pad_token_id)
    out = sampling.generate(
        m.params,
        m.config,
        sampling.PromptBatch(ids, case.lengths, positions, m._place(ids, features)),
        sampling.SamplingSettings(max_new_tokens=cases.NEW_TOKENS, temperature=0),
    )
    return np.where(np.arange(cases.NEW_TOKENS) < out["lengths"][:, None], out["tokens"], -1)


def argmaxes(case: cases.Case, logits, tokens) -> np.ndarray:
    """Our choice after each prefix of the reference's tokens, from one full pass over all of them. If every
    choice is the reference's, then by induction so are the greedy tokens of full passes without a cache."""
    at = case.lengths[:, None] - 1 + np.arange(cases.NEW_TOKENS)
    picked = np.take_along_axis(logits, at[..., None], 1)
    picked[..., case.media_ids] = -np.inf
    return np.where(tokens < 0, -1, picked.argmax(-1))


def compare(case: cases.Case, m: model.Model, ref: dict, loop: bool) -> Result:
    """loop: decode with the cache as well, which costs as much compilation as all the rest."""
    images = (case.pixel_values, case.grids) if len(case.grids) else (None, None)
    place = functools.partial(network.positions, m.config, grids=images[1])
    positions = place(case.input_ids, mask=case.attention_mask)
    ids, mask, tokens = (
        ref["input_ids"],
        ref["attention_mask"],
        ref["tokens"],
    )  # prompts and the reference's tokens
    grown = place(ids, mask=mask)
    moved = (positions != ref["positions"]).sum() + (grown != ref["grown_positions"]).sum()

    features = m.image_features(*images) if len(case.grids) else []
    seen = max(map(ratio, *read_features(features, ref)), default=0.0)
    logits, keep = m.logits(ids, *images, attention_mask=mask), mask.astype(bool)
    spread = ref["logits"][keep].std()

    # More frames than rows and columns: the largest position of a prompt may lie in its image, and then the tokens
    # that `generate` adds stand elsewhere than the same tokens in a prompt. The choices below are not theirs.
    first = (
        np.where(case.lengths[:, None] > np.arange(positions.shape[2]), positions, -1).max((0, 2))
        + 1
    )
    same = (np.take_along_axis(grown, case.lengths[None, :, None], 2)[0, :, 0] == first).all()
    differ, gap = np.zeros(len(ids), bool), 0.0
    choices = [(argmaxes(case, logits, tokens), True)] if same else []
    if loop or not same:
        choices.append((decoded(case, m, positions, features), False))
    for got, forced in choices:
        wrong = got != tokens
        differ |= wrong.any(1)
        if not forced:
            wrong &= wrong.cumsum(1) == 1  # after the first, the texts are not the same
        for b, j in np.argwhere(wrong):
            ends = min(tokens[b, j], got[b, j]) < 0
            pair = ref["scores"][b, j, [tokens[b, j], got[b, j]]]
            gap = max(gap, np.inf if ends else float(abs(pair[0] - pair[1]) / spread))
    same_config = registry.read_config(json.loads(str(ref["config"]))) == m.config
    return Result(
        case.family,
        case.seed,
        seen,
        ratio(logits[keep], ref["logits"][keep]),
        int(moved),
        int(differ.sum()),
        gap,
        same_config,
        bool(ref.get("generate_agrees", True)),
    )


def references(families: str, seeds: str, folder: pathlib.Path):
    """(family, seed, arrays) in order, from one process of its own that works ahead."""
    command = [
        ORACLE,
        ROOT / "tests/oracle/reference.py",
        folder,
        "--seeds",
        seeds,
        "--ahead",
        4 * CHUNK,
        "--family",
        families,
    ]
    process = subprocess.Popen([str(c) for c in command])
    try:
        for family, seed in cases.named(families, seeds):
            path = folder / f"{family}-{seed}.npz"
            while not path.exists():
                if process.poll() is not None and not path.exists():
                    raise SystemExit(
                        f"error: the reference ended with code {process.returncode} before seed {seed}"
                    )
                time.sleep(0.01)
            with np.load(path) as f:
                yield family, seed, {k: f[k] for k in f.files}
            path.unlink()
    finally:
        process.terminate()
        process.wait()


def run(families: str, seeds: str, loops: dict[str, int], jobs: int):
    """The Result of every case, in order. loops: of each family, one in how many is decoded with the cache."""
    with tempfile.TemporaryDirectory() as temp, ThreadPoolExecutor(jobs) as pool:
        folder = pathlib.Path(temp)

        def one(item):
            family, seed, ref = item
            case = cases.draw(seed, family)
            model = load(case, folder / f"{family}-{seed}")
            return compare(case, model, ref, seed % loops[family] == 0)

        # The libraries, which each collection would walk, and every few seconds all that was traced.
        gc.freeze()
        gc.set_threshold(50_000, 10, 10)
        source = references(families, seeds, folder / "reference")
        for i in itertools.count():
            part = list(itertools.islice(source, CHUNK))
            if not part:
                return
            # Models of real depth take the scanned path, tiny ones the unrolled path: every other chunk each.
            layers.UNROLL_UP_TO = 0 if i % 2 else 8
            yield from pool.map(one, part)
            jax.clear_caches()


def summary(results: list[Result], seconds: float) -> str:
    top = lambda name: max(getattr(r, name) for r in results)
    bad = lambda name, good: sum(getattr(r, name) != good for r in results)
    return (
        f"{len(results)} configs in {seconds:.0f} s\n"
        f"worst |d logit| / std {top('logits'):.2e}, worst |d image feature| / std {top('features'):.2e}\n"
        f"configs with other positions: {bad('positions', 0)}\n"
        f"configs with other greedy tokens: {bad('tokens', 0)}, preferred by at most {top('gap'):.1e} std\n"
        f"configs read otherwise from transformers' own config.json: {bad('config', True)}\n"
        f"configs where the reference's generate() differs from its forward pass: {bad('generate', True)}"
    )


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", default="0:200", help="FIRST:LAST, the last excluded")
    p.add_argument("--family", default="qwen2_5_vl", help="qwen2_5_vl, qwen3_vl or gemma3")
    p.add_argument(
        "--loop_every", default="1", help="decode with the cache for seeds divisible by this"
    )
    p.add_argument(
        "--blocks",
        action="store_true",
        help="attend in blocks of 8 to 16 queries and keys, as large films are read",
    )
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases compiled at a time")
    p.add_argument("--jsonl", type=pathlib.Path, help="write one line a seed here")
    p.add_argument(
        "--optimise", action="store_true", help="compile as in production, which takes longer"
    )
    args = p.parse_args()
    if args.blocks:
        attention.SCORES_AT_ONCE = 1
        attention.blocked.LEAST_BLOCK, attention.blocked.LARGEST_BLOCK = 8, 16
    if not ORACLE.exists():
        print(
            "error: .venv-oracle is missing: `bash launch/test.sh` without arguments makes it",
            file=sys.stderr,
        )
        return 2
    results, start = [], time.time()
    loops = dict(zip(args.family.split(","), map(int, args.loop_every.split(",")), strict=True))
    with open(args.jsonl or os.devnull, "w") as out:
        for r in run(args.family, args.seeds, loops, args.jobs):
            results.append(r)
            print(json.dumps(dataclasses.asdict(r)), file=out, flush=True)
            if not r.good:
                print(r, flush=True)
    print(summary(results, time.time() - start))
    return 0 if all(r.good for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
