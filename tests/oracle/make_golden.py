"""Write tests/golden/*.npz and *.json: what transformers computes for tiny random models.

    .venv-oracle/bin/python tests/oracle/make_golden.py

Each case has a config (`config.json` as its writer would store it), weights as int8 times a power of two
(exact in every float type), inputs, and the reference's positions, image features, logits and greedy tokens
in float32. Greedy tokens come from full forward passes without a cache, checked once against `generate`.
"""

# ruff: noqa: C408, E501  (tables of keyword arguments read best as calls)

import copy
import json
import pathlib
import sys

import numpy as np
import reference
import torch
import transformers

OUT = pathlib.Path(__file__).parent.parent / "golden"
IMAGE, VIDEO, START, END, PAD, EOS = 5, 6, 3, 4, 0, 2
NEW_TOKENS = 12

VISION = dict(
    depth=3,
    hidden_size=32,
    num_heads=2,
    intermediate_size=40,
    patch_size=4,
    window_size=16,
    fullatt_block_indexes=[1],
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
)
TEXT = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
    mrope_section=[2, 3, 3],
    rope_theta=1e4,
)

# Of Qwen3-VL: what differs from the above, and what is left out.
VISION_QWEN3 = dict(
    hidden_act="gelu_pytorch_tanh",
    num_position_embeddings=25,
    deepstack_visual_indexes=[2, 0],
    window_size=None,
    fullatt_block_indexes=None,
)
TEXT_QWEN3 = dict(head_dim=32, mrope_section=[6, 5, 5], rms_norm_eps=1e-3)

# Rows are lists of text lengths (int) and image grids (tuple), in reading order.
CASES = {
    # Published patch size, windows that tile the grid, tied head, nested config.
    "even": dict(
        vision=dict(patch_size=14, window_size=56),
        text={},
        tied=True,
        layout="nested",
        rows=[[3, (1, 4, 8), 9]],
    ),
    # Windows that do not divide the grid on either side, one key head, untied, old flat config.
    "ragged": dict(
        vision=dict(fullatt_block_indexes=[0, 2], num_heads=4),
        layout="flat",
        tied=False,
        text=dict(num_key_value_heads=1, mrope_section=[4, 2, 2], rope_theta=1e6),
        rows=[[2, (1, 6, 10), 5], [7, (1, 6, 10), 11]],
    ),
    # Several images of different grids, rows of different length.
    "images": dict(
        vision=dict(window_size=24, fullatt_block_indexes=[2]),
        tied=True,
        layout="nested",
        text=dict(num_key_value_heads=4, rms_norm_eps=1e-5),
        rows=[[2, (1, 4, 6), 1, (1, 14, 8), 6], [4, (1, 4, 6), 3], [12]],
    ),
    # Text only.
    "text": dict(
        vision={},
        text=dict(hidden_size=48, mrope_section=[2, 2, 2]),
        tied=False,
        layout="flat",
        rows=[[17], [5], [11]],
    ),
    # Deep enough for the scanned path; two frames; runs of window blocks; three query heads a key head.
    "deep": dict(
        vision=dict(depth=12, fullatt_block_indexes=[0, 10], intermediate_size=24),
        tied=True,
        text=dict(
            num_hidden_layers=9,
            num_attention_heads=6,
            num_key_value_heads=2,
            hidden_size=48,
            intermediate_size=48,
            mrope_section=[1, 1, 2],
        ),
        layout="flat",
        rows=[[3, (2, 6, 4), 7], [2, (2, 6, 4), 9]],
    ),
    # Head width unlike in both towers; window of one unit.
    "narrow": dict(
        vision=dict(window_size=8, num_heads=8, fullatt_block_indexes=[]),
        layout="nested",
        tied=False,
        text=dict(num_attention_heads=2, num_key_value_heads=1, mrope_section=[8, 4, 4]),
        rows=[[1, (1, 4, 4), 4, (1, 4, 4), 2]],
    ),
    # Qwen3-VL: taps out of order, heads wider than the model, rows with and without images, an odd table.
    "qwen3_taps": dict(
        family="Qwen3VL",
        vision={},
        text={},
        tied=True,
        layout="nested",
        rows=[[3, (1, 4, 6), 1, (1, 14, 8), 6], [4, (1, 4, 6), 3], [9]],
    ),
    # Deep enough for the scanned paths; as many taps as layers, of the first and the last block; a table of one row.
    "qwen3_deep": dict(
        family="Qwen3VL",
        vision=dict(
            depth=10,
            hidden_size=16,
            num_position_embeddings=1,
            intermediate_size=24,
            deepstack_visual_indexes=[0, 1, 2, 4, 5, 6, 7, 8, 9],
        ),
        text=dict(
            num_hidden_layers=9,
            num_attention_heads=6,
            hidden_size=48,
            intermediate_size=48,
            head_dim=6,
            mrope_section=[1, 1, 1],
        ),
        tied=False,
        layout="flat",
        rows=[[3, (2, 6, 4), 7], [2, (2, 6, 4), 9]],
    ),
}


def make_qwen3_config(case) -> tuple[transformers.PreTrainedConfig, dict]:
    """layout: the spelling of transformers 4.57 ("flat", though nothing is), or of 5."""
    vision = {**VISION, **VISION_QWEN3, **case["vision"]}
    text = {**TEXT, **TEXT_QWEN3, **case["text"]}
    vision = {key: value for key, value in vision.items() if value is not None}
    vision["out_hidden_size"] = text["hidden_size"]
    rope = {"rope_type": "default", "mrope_interleaved": True}
    rope["mrope_section"], theta = text.pop("mrope_section"), text.pop("rope_theta")
    text |= dict(pad_token_id=PAD, bos_token_id=PAD, eos_token_id=EOS)
    if case["layout"] == "flat":
        text |= dict(rope_theta=theta, rope_scaling=rope)
    else:
        text |= dict(rope_parameters={**rope, "rope_theta": theta})
    stored = dict(
        model_type="qwen3_vl",
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=case["tied"],
        text_config=text,
        vision_config=vision,
    )
    model_config = transformers.Qwen3VLConfig.from_dict(copy.deepcopy(stored))
    if case["layout"] == "flat":
        return model_config, stored
    return model_config, json.loads(model_config.to_json_string(use_diff=False))


def make_config(case) -> tuple[transformers.PreTrainedConfig, dict]:
    if family_of(case) == "Qwen3VL":
        return make_qwen3_config(case)
    v = {**VISION, **case["vision"]}
    t = {**TEXT, **case["text"]}
    v["out_hidden_size"] = t["hidden_size"]
    mrope, theta = t.pop("mrope_section"), t.pop("rope_theta")
    ids = dict(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=case["tied"],
    )
    special = dict(pad_token_id=PAD, bos_token_id=PAD, eos_token_id=EOS)
    if case["layout"] == "flat":
        stored = dict(
            model_type="qwen2_5_vl",
            **t,
            **ids,
            **special,
            vision_config=v,
            rope_theta=theta,
            rope_scaling={"type": "mrope", "mrope_section": mrope},
        )
        return transformers.Qwen2_5_VLConfig(
            **copy.deepcopy({k: x for k, x in stored.items() if k != "model_type"})
        ), stored
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": mrope}
    model_config = transformers.Qwen2_5_VLConfig(
        text_config={**t, **special, "rope_parameters": rope}, vision_config=v, **ids
    )
    return model_config, json.loads(model_config.to_json_string(use_diff=False))


def family_of(case: dict) -> str:
    """As the names of transformers' classes begin."""
    return case.get("family", "Qwen2_5_VL")


def quantised(name: str, x: torch.Tensor, rng) -> tuple[np.ndarray, int]:
    """int8 values and exponent e: the weight is values * 2 ** -e."""
    z = rng.standard_normal(tuple(x.shape))
    if x.ndim == 1:
        norm = ("norm" in name or "ln_q" in name) and name.endswith("weight")
        return np.clip(np.rint((64 if norm else 0) + 16 * z), -127, 127).astype(np.int8), 6
    fan_in = x[0].numel()
    e = 5 + round(np.log2(fan_in) / 2 - 0.5) if "embed_tokens" not in name else 7
    e = 6 if "pos_embed" in name else e
    return np.clip(np.rint(32 * z), -127, 127).astype(np.int8), int(e)


def make_row(parts, rng) -> tuple[list[int], list[tuple]]:
    ids, grids = [], []
    for p in parts:
        if isinstance(p, tuple):
            ids += [START] + [IMAGE] * (p[0] * p[1] * p[2] // 4) + [END]
            grids.append(p)
        else:
            ids += rng.integers(7, TEXT["vocab_size"], p).tolist()
    return ids, grids


@torch.no_grad()
def forward(model, ids, mask, pixels, grids):
    ids = torch.tensor(ids)
    kw = {}
    if len(grids):
        kw = dict(
            pixel_values=torch.tensor(pixels),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(ids == IMAGE).int(),
        )
    model.model.rope_deltas = None  # a stale one would change positions
    return model(
        input_ids=ids, attention_mask=torch.tensor(mask), use_cache=False, **kw
    ).logits.numpy()


def greedy(model, ids, pixels, grids) -> list[int]:
    ids = list(ids)
    n = len(ids)
    for _ in range(NEW_TOKENS):
        logits = forward(model, [ids], [[1] * len(ids)], pixels, grids)[0, -1].copy()
        logits[[IMAGE, VIDEO, START, END]] = -np.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == EOS:
            break
    return ids[n:]


def check_generate(model, ids, pixels, grids, want) -> None:
    kw = {}
    if len(grids):
        kw = dict(
            pixel_values=torch.tensor(pixels),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(torch.tensor([ids]) == IMAGE).int(),
        )
    model.model.rope_deltas = None
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
        suppress_tokens=[IMAGE, VIDEO, START, END],
        **kw,
    )
    assert out[0, len(ids) :].tolist() == want, (out, want)


def build(name: str, case: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model_config, stored = make_config(case)
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{family_of(case)}ForConditionalGeneration")
    model = model_class._from_config(model_config, attn_implementation="eager").float().eval()
    arrays, exponents = {}, {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and case["tied"]:
            continue
        q, e = quantised(key, value, rng)
        value.copy_(torch.tensor(q.astype(np.float32) * 2.0**-e))
        arrays["w:" + key], exponents[key] = q, e

    rows, grids = zip(*(make_row(r, rng) for r in case["rows"]), strict=True)
    T = max(map(len, rows))
    ids = np.array([r + [PAD] * (T - len(r)) for r in rows])
    mask = np.array([[1] * len(r) + [0] * (T - len(r)) for r in rows])
    flat = [g for gs in grids for g in gs]
    patch_dim = 6 * model_config.vision_config.patch_size**2
    pixels = [
        np.clip(np.rint(24 * rng.standard_normal((int(np.prod(g)), patch_dim))), -127, 127)
        for g in flat
    ]
    pixels = [p.astype(np.int8) for p in pixels]
    real = [p.astype(np.float32) / 16 for p in pixels]
    joined = np.concatenate(real) if real else np.zeros((0, patch_dim), np.float32)

    at, tokens = 0, np.full((len(rows), NEW_TOKENS), -1, np.int32)
    for b, (r, g) in enumerate(zip(rows, grids, strict=True)):
        px = np.concatenate(real[at : at + len(g)]) if g else None
        at += len(g)
        got = greedy(model, r, px, g)
        check_generate(model, r, px, g, got)
        tokens[b, : len(got)] = got
    arrays |= dict(
        input_ids=ids.astype(np.int32),
        attention_mask=mask.astype(np.int8),
        tokens=tokens,
        grids=np.array(flat, np.int32).reshape(-1, 3),
        pixels=np.concatenate(pixels or [joined]),
        logits=forward(model, ids, mask, joined, flat),
    )
    if flat:
        with torch.no_grad():
            seen = model.model.visual(torch.tensor(joined), torch.tensor(flat))
            arrays["features"] = seen.pooler_output.numpy()
            for number, tap in enumerate(getattr(seen, "deepstack_features", ())):
                arrays[f"tap{number}"] = tap.numpy()
            arrays["positions"] = (
                model.model.get_rope_index(
                    torch.tensor(ids),
                    (torch.tensor(ids) == IMAGE).int(),
                    image_grid_thw=torch.tensor(flat),
                    attention_mask=torch.tensor(mask),
                )[0]
                .numpy()
                .astype(np.int16)
            )
    np.savez_compressed(OUT / f"{name}.npz", **arrays)
    (OUT / f"{name}.json").write_text(
        json.dumps({"config": stored, "exponents": exponents}, indent=0) + "\n"
    )
    print(
        name, tokens.tolist(), float(arrays["logits"].std()), (OUT / f"{name}.npz").stat().st_size
    )


# Of Gemma 3 the seeds of cases, which draw config, weights and inputs anew: only what transformers says is kept.
GEMMA_SEEDS = (2, 27, 107)


def record_gemma(seed: int) -> None:
    said = reference.compute(seed, "gemma3")
    kept = ("positions", "tokens", "input_ids", "attention_mask", "logits", "features")
    folder = OUT / "gemma3"
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / f"{seed}.npz", **{name: said[name] for name in kept})


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for seed in GEMMA_SEEDS:
        if len(sys.argv) < 2 or "gemma3" in sys.argv[1:]:
            with torch.no_grad():
                record_gemma(seed)
    for seed, (name, case) in enumerate(CASES.items()):
        if len(sys.argv) < 2 or name in sys.argv[1:]:
            build(name, case, seed)


if __name__ == "__main__":
    main()
