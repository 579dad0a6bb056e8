"""Qwen2.5-VL-3B's shape on one machine: random weights in Hugging Face format, ours against transformers.

    PYTHONPATH=. .venv/bin/python tests/oracle/shape_3b.py --folder /tmp/shape_3b

By hand: 8 GB of disk, 20 GiB of memory, some minutes. Writes 3.75 billion random weights in bfloat16, in shards; then,
one process after the other, both sides load them for float32, read one 476 x 476 image and a prompt, go on greedily
with their caches, and pass once over all of it without. Prints times, peak memory, and the largest difference of the
logits after the image; exits 1 if it is past 1e-4 of their standard deviation, or if a greedy choice differs, in the
loop or after any prefix (the loop of random weights repeats itself, so the prefixes are the better test).

Measured 2026-11-26, 2 cores and 24 GB, jax 0.10.2, torch 2.13.0, transformers 5.23.0, float32, 355 tokens of prompt:

                    ours      transformers
    peak memory     19.6      20.9 GiB
    load            58        13 s          (ours checks and transposes every tensor)
    vision          6.6       8.0 s
    prefill         5.3       10.9 s        (transformers: with the first token)
    decode          0.29      0.46 s a token
    worst |d logit| / std 1.45e-05 over 75 positions; greedy tokens and choices identical
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
BAR = 1e-4
AFTER = 59  # tokens of the prompt after its image whose next token is compared, too
GRID = np.array([[1, 34, 34]])


def inputs():
    """(input_ids int [1, T], pixel_values [1156, 1176]) with Qwen's token ids."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 150_000, 64)
    ids = np.concatenate(
        [text[:4], [151652], np.full(GRID.prod() // 4, 151655), [151653], text[4:]]
    )
    return ids[None].astype(np.int64), rng.normal(size=(int(GRID.prod()), 1176)).astype(np.float32)


def write(folder: pathlib.Path) -> None:
    """A Hugging Face folder of random weights, one tensor in memory at a time."""
    import ml_dtypes

    from cxr_jax.models.qwen2_5_vl import hf_table
    from cxr_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B, write_config
    from cxr_jax.weights.safetensors_file import TensorToWrite, write_folder

    def entry(i, rule):
        def make():
            x = np.random.default_rng(i).standard_normal(rule.shape, np.float32)
            # Norms around 1, matrices such that activations keep their size, the rest small.
            x = (
                1 + 0.1 * x
                if "norm" in rule.key or "ln_q" in rule.key
                else x
                * (
                    0.02
                    if len(rule.shape) == 1 or "embed_tokens" in rule.key
                    else np.prod(rule.shape[1:]) ** -0.5
                )
            )
            return x.astype(ml_dtypes.bfloat16)

        return TensorToWrite(rule.key, rule.shape, np.dtype(ml_dtypes.bfloat16), make)

    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, [entry(i, r) for i, r in enumerate(hf_table.rules(QWEN2_5_VL_3B))], 4.0)
    (folder / "config.json").write_text(
        json.dumps({**write_config(QWEN2_5_VL_3B), "torch_dtype": "bfloat16"})
    )


def timed(name, fn, times):
    start = time.monotonic()
    out = fn()
    times[name] = round(time.monotonic() - start, 2)
    return out


def ours(folder: pathlib.Path, new: int):
    """(tokens [new], logits [new, V], seconds by what took them)."""
    import jax

    import cxr_jax
    from cxr_jax.inference import generation, requests, sampling, token_choice

    times: dict = {}
    m = timed("load", lambda: cxr_jax.load(folder), times)
    ids, pixels = inputs()
    picture = requests.Picture(pixels, tuple(GRID[0].tolist()))
    request = requests.Request(ids[0].tolist(), (picture,))
    for run in ("first ", ""):  # with and without compilation
        [seen] = timed(run + "vision", lambda: m.image_features(pixels, GRID), times)

        def prefill(seen=seen):
            prefix = generation.prefill(m, request, seen)
            jax.block_until_ready(prefix.device)
            return prefix

        prefix = timed(run + "prefill", prefill, times)
        layers = sampling.decode_layers(m.params, m.config)
        prompt, own, rest = sampling.begin(
            [prefix.device], 1, None, model_config=m.config, room=new, dtype=m.dtype
        )

        def decode(prompt=prompt, own=own, rest=rest, prefix=prefix, layers=layers):
            rows = sampling.Rows(
                prompt_keys=prompt,
                prompt_lengths=np.array([prefix.length], np.int32),
                start=np.array([prefix.start], np.int32),
                random_keys=sampling.row_keys(0, 1),
            )
            settings = token_choice.StepSettings(
                greedy=True, stop_ids=(-1,), suppress_ids=m.config.media_token_ids, dtype=m.dtype
            )
            return jax.block_until_ready(
                sampling.decode(
                    m.params,
                    layers,
                    m.config,
                    rows,
                    token_choice.Distribution(np.float32(1)),
                    own,
                    rest,
                    np.int32(new),
                    None,
                    settings=settings,
                )
            )

        _, state = timed(run + "decode", decode, times)
        tokens = np.asarray(state.tokens)[0]
    whole = np.concatenate([ids, tokens[None, :-1]], 1)
    logits = timed("first whole pass", lambda: m.logits(whole, pixels, GRID), times)
    return tokens, logits[0, -new - AFTER :], times


def reference(folder: pathlib.Path, new: int):
    """The same by transformers on torch."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration as Qwen
    from transformers import utils

    utils.logging.disable_progress_bar()
    times: dict = {}
    m = timed("load", lambda: Qwen.from_pretrained(folder, dtype=torch.float32).eval(), times)
    ids, pixels = (torch.from_numpy(x) for x in inputs())
    given = {
        "pixel_values": pixels,
        "image_grid_thw": torch.from_numpy(GRID),
        "mm_token_type_ids": (ids == m.config.image_token_id).int(),
    }
    media = [m.config.image_token_id, m.config.video_token_id, 151652, 151653]
    run = lambda n: m.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        suppress_tokens=media,
        eos_token_id=None,
        return_dict_in_generate=True,
        **given,
    )
    with torch.no_grad():
        timed("vision", lambda: m.model.get_image_features(pixels, given["image_grid_thw"]), times)
        timed("vision, prefill, 1 token", lambda: run(1), times)
        out = timed(f"vision, prefill, {new} tokens", lambda: run(new), times)
        whole = out.sequences[:, :-1]
        given["mm_token_type_ids"] = (whole == m.config.image_token_id).int()
        m.model.rope_deltas = None
        logits = timed(
            "whole pass", lambda: m(input_ids=whole, use_cache=False, **given).logits, times
        )
    return (
        out.sequences[0, ids.shape[1] :].numpy(),
        logits[0, -new - AFTER :].float().numpy(),
        times,
    )


def side(name: str, folder: pathlib.Path, new: int) -> None:
    tokens, logits, times = {"ours": ours, "reference": reference}[name](folder, new)
    np.savez(folder / f"{name}.npz", tokens=tokens, logits=logits)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: peak {peak:.1f} GiB; seconds: {json.dumps(times)}", flush=True)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--folder",
        type=pathlib.Path,
        required=True,
        help="made, and kept; an existing one is used again",
    )
    p.add_argument("--new_tokens", type=int, default=16)
    p.add_argument("--side", choices=("ours", "reference"), help="only one side, in this process")
    args = p.parse_args()
    if args.side:
        side(args.side, args.folder, args.new_tokens)
        return 0
    if not (args.folder / "config.json").exists():
        start = time.monotonic()
        write(args.folder)
        print(f"written in {time.monotonic() - start:.0f} s", flush=True)
    for name, venv in (("ours", ".venv"), ("reference", ".venv-oracle")):
        command = [ROOT / venv / "bin/python", __file__, "--folder", args.folder, "--side", name]
        subprocess.run([str(c) for c in [*command, "--new_tokens", args.new_tokens]], check=True)
    a, b = (np.load(args.folder / f"{name}.npz") for name in ("ours", "reference"))
    worst = np.abs(a["logits"] - b["logits"]).max() / b["logits"].std()
    same = np.array_equal(a["tokens"], b["tokens"])
    choices = [x["logits"].argmax(-1) for x in (a, b)]
    same &= np.array_equal(*choices)
    print(
        f"worst |d logit| / std {worst:.2e} over {len(a['logits'])} positions; {len(a['tokens'])} tokens of the loop "
        f"and {len(set(choices[0].tolist()))} different choices after prefixes {'identical' if same else 'DIFFER'}"
    )
    return 0 if worst <= BAR and same else 1


if __name__ == "__main__":
    sys.exit(main())
