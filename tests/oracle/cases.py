"""Random models and prompts, a function of family and seed: numpy only, so that both environments draw them.

Configs of Qwen2.5-VL are drawn here, of other families in a file of their own each; prompts of all are drawn alike.

A case is a `config.json` in one of the layouts in circulation, weights under the published keys, and the arrays
that a Hugging Face processor would give. Sizes are tiny; everything else ranges over what the architecture allows.
"""

import dataclasses
import importlib
from types import ModuleType

import numpy as np

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "gemma3")
NEW_TOKENS = 6
MEDIA = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
BIG_EVERY, BIG_AT = 50, 13  # seeds congruent to BIG_AT have one image of 1,280 tokens


@dataclasses.dataclass
class Case:
    """config: parsed config.json. nested_keys: store weights as `model.language_model.*`, else as published.
    input_ids int [B, T], attention_mask int [B, T] or None, pixel_values [patches, patch_dim], grids int [n, 3]."""

    seed: int
    config: dict
    nested_keys: bool
    sdpa: bool
    input_ids: np.ndarray
    attention_mask: np.ndarray | None
    pixel_values: np.ndarray
    grids: np.ndarray
    family: str = "qwen2_5_vl"

    @property
    def text(self) -> dict:
        return self.config.get("text_config") or self.config

    @property
    def media_ids(self) -> list[int]:
        return [self.config[name] for name in MEDIA]

    @property
    def lengths(self) -> np.ndarray:
        B, T = self.input_ids.shape
        return np.full(B, T) if self.attention_mask is None else self.attention_mask.sum(1)

    def stored_key(self, key: str) -> str:
        """A published key -> that of the case's layout."""
        return nested_key(key) if self.nested_keys else key

    def module_key(self, key: str) -> str:
        """A published key -> the tensor's name in the model that transformers 5 builds."""
        return nested_key(key)


def _family(name: str) -> ModuleType | None:
    """The module of a family; None for Qwen2.5-VL, which is drawn here."""
    return None if name == "qwen2_5_vl" else importlib.import_module(f"cases_{name}")


def is_big(seed: int) -> bool:
    return seed % BIG_EVERY == BIG_AT


def composition(rng, total: int, parts: int) -> list[int]:
    """Non-negative integers that sum to `total`, zeros included."""
    cuts = np.sort(rng.integers(0, total + 1, parts - 1))
    return np.diff([0, *cuts, total]).tolist()


def subset(rng, n: int) -> list[int]:
    """Indexes of full-attention blocks: none, all, some, or those of a deeper model."""
    kind = rng.integers(0, 5)
    if kind == 0:
        return []
    if kind == 1:
        return list(range(n))
    if kind == 2:
        return [n - 1, n + 4, n + 12]
    return [i for i in range(n) if rng.random() < 0.4]


def draw_vision(rng, scaled: bool, big: bool) -> dict:
    if scaled:  # 16 heads of 80, windows of 8 x 8 patches, the last of every eight blocks full: made smaller
        patch, merge, side, depth = int(rng.choice([4, 14])), 2, 4, 4
        v = {
            "hidden_size": 80,
            "num_heads": 4,
            "intermediate_size": 214,
            "fullatt_block_indexes": [1, 3],
        }
    else:
        merge = 2 if big else int(rng.choice([2, 2, 2, 2, 1, 3]))
        patch, side = int(rng.choice([2, 3, 4, 7, 14])), int(rng.integers(1, 6))
        deep = not big and rng.random() < 0.06
        depth = int(rng.integers(9, 13) if deep else rng.integers(1, 3 if big else 4))
        heads = int(rng.integers(1, 3 if big else 7))
        v = {
            "hidden_size": heads * int(rng.choice([4, 8, 12, 16, 20])),
            "num_heads": heads,
            "intermediate_size": int(rng.integers(5, 120)),
            "fullatt_block_indexes": subset(rng, depth),
        }
    unit = patch * merge
    spare = (
        int(rng.integers(0, unit)) if rng.random() < 0.3 else 0
    )  # a window need not be a whole number of units
    v |= {
        "depth": depth,
        "hidden_act": "silu",
        "patch_size": patch,
        "spatial_merge_size": merge,
        "window_size": unit * side + spare,
        "temporal_patch_size": int(rng.choice([2, 2, 2, 1])),
        "tokens_per_second": int(rng.choice([2, 4])),
    }
    channels = int(rng.choice([3, 3, 3, 1]))
    return v | (
        {"in_channels": channels} if channels == 1 or rng.random() < 0.5 else {"in_chans": channels}
    )


def draw_text(rng, ratio: str, big: bool) -> dict:
    """The decoder's sizes; also "mrope_section" and "rope_theta", which every layout keeps somewhere else."""
    if ratio == "free":
        kv, group = int(rng.integers(1, 5)), int(rng.integers(1, 5))
        widths = [
            w
            for w in (4, 6, 8, 10, 12, 16, 24, 32, 64, 128)
            if w * kv * group <= (64 if big else 160)
        ]
        width = int(rng.choice(widths))
        sections, inner = composition(rng, width // 2, 3), rng.uniform(0.3, 4)
    else:  # 16 query heads on 2 key heads, or 28 on 4; M-RoPE 16 : 24 : 24
        kv, width, sections = int(rng.choice([1, 1, 2])), 16, [2, 3, 3]
        group, inner = (8, 11008 / 2048) if ratio == "3b" else (7, 18944 / 3584)
    hidden = kv * group * width
    deep = not big and ratio == "free" and rng.random() < 0.06
    return {
        "hidden_size": hidden,
        "intermediate_size": max(4, round(inner * hidden)),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "num_hidden_layers": int(rng.integers(9, 12) if deep else rng.choice([1, 2, 2, 3])),
        "vocab_size": int(rng.integers(48, 300)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-3, 3e-2])),
        "mrope_section": sections,
        "max_position_embeddings": int(rng.choice([2048, 32768, 128000])),
        "rope_theta": float(rng.choice([1e4, 1e6, round(10 ** rng.uniform(1.5, 7), 3)])),
    }


def draw_config(rng, big: bool) -> dict:
    ratio = "free" if big else str(rng.choice(["free", "3b", "7b"], p=[0.7, 0.15, 0.15]))
    t = draw_text(rng, ratio, big)
    v = draw_vision(rng, ratio != "free", big) | {"out_hidden_size": t["hidden_size"]}
    tied = {"tie_word_embeddings": bool(rng.random() < 0.5) if ratio == "free" else ratio == "3b"}
    special = rng.choice(t["vocab_size"], 8, replace=False).tolist()
    top = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **dict(zip(MEDIA, special[:4], strict=True)),
    }
    t |= {
        "bos_token_id": special[4],
        "eos_token_id": special[5] if rng.random() < 0.7 else special[5:7],
    }
    t |= {"pad_token_id": special[7]} if rng.random() < 0.7 else {}
    t |= {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": 64,
        "max_window_layers": 1,
    }

    rope = {"mrope_section": t.pop("mrope_section"), "rope_type": "default"}
    theta = {"rope_theta": t.pop("rope_theta")}
    old_rope = {
        "rope_scaling": {**rope, "type": "default"},
        **theta,
    }  # as transformers 4.49 and later write it
    if rng.random() < 0.5:
        old_rope["rope_scaling"] = {"mrope_section": rope["mrope_section"], "type": "mrope"}
    layout = str(rng.choice(["flat", "nested 4", "nested 5"]))
    if layout == "flat":  # the published files
        return {**top, **t, **old_rope, **tied, "torch_dtype": "bfloat16", "vision_config": v}
    t["model_type"] = "qwen2_5_vl_text"
    if layout == "nested 4":
        vision, text = {**v, "model_type": "qwen2_5_vl"}, {**t, **old_rope}
        if rng.random() < 0.5:
            return {**top, "text_config": {**text, **tied}, "vision_config": vision}
    else:
        vision, text = (
            {**v, "model_type": "qwen2_5_vl_vision"},
            {**t, "rope_parameters": {**rope, **theta}},
        )
        if rng.random() < 0.5:
            vision["rope_parameters"] = {
                "rope_type": "axial",
                "rope_theta": round(10 ** rng.uniform(1.5, 5), 3),
            }
    return {**top, **tied, "text_config": text, "vision_config": vision}


def draw_grid(rng, merge: int) -> tuple[int, int, int]:
    frames = int(rng.choice([1, 1, 1, 2, 3]))
    rows, cols = (int(x) for x in rng.integers(1, 9 if frames == 1 else 5, 2))
    return frames, rows * merge, cols * merge


def draw_rows(rng, merge: int, big: bool) -> list[list]:
    """Rows of parts: a text length (int), or a grid (tuple), in reading order."""
    if big:
        rows, cols = [(32, 40), (40, 32), (16, 80), (20, 64), (5, 256)][rng.integers(0, 5)]
        return [[int(rng.integers(1, 5)), (1, rows * merge, cols * merge), int(rng.integers(1, 9))]]
    text = lambda: int(rng.integers(1, 12))
    pool = [draw_grid(rng, merge) for _ in range(rng.integers(1, 3))]
    images = [0] if rng.random() < 0.1 else [0, 1, 1, 2, 3]
    rows = []
    for b in range(rng.integers(1, 4)):
        row = [text()] if rng.random() < 0.7 else []  # a prompt may begin with an image
        for _ in range(max(rng.choice(images), len(images) > 1 and b == 0)):
            row.append(pool[rng.integers(0, len(pool))])
            row += [text()] if rng.random() < 0.6 else []
        rows.append(row + ([] if row and rng.random() < 0.2 else [text()]))  # and end with one
    return rows


def write_row(rng, parts: list, config: dict, words: np.ndarray, merge: int) -> list[int]:
    image, _, start, end = (config[name] for name in MEDIA)
    ids, bare = [], rng.random() < 0.2  # bare: images without start and end tokens
    for before, part in zip([None, *parts], parts, strict=False):
        if not isinstance(part, tuple):
            ids += rng.choice(words, part).tolist()
            continue
        run = [image] * (part[0] * part[1] * part[2] // merge**2)
        if not bare:
            run = [start, *run, end]
        elif isinstance(before, tuple):
            run = [int(rng.choice(words)), *run]  # the placeholders of two images must not touch
        ids += run
    return ids


def named(families: str, seeds: str) -> list[tuple[str, int]]:
    """(family, seed) of each case that a command line asks for: ("qwen3_vl,gemma3", "0:200,0:100").

    Raises:
        SystemExit: for a family that is none, or other numbers of families and of seeds.
    """
    asked, ranges = families.split(","), seeds.split(",")
    if len(asked) != len(ranges) or not {*asked} <= {*FAMILIES}:
        raise SystemExit(f"error: as many FIRST:LAST as families, of {', '.join(FAMILIES)}")
    pairs = zip(asked, ranges, strict=True)
    return [(family, seed) for family, part in pairs for seed in range(*map(int, part.split(":")))]


def draw(seed: int, family: str = "qwen2_5_vl") -> Case:
    """The case of a seed."""
    rng, big = np.random.default_rng([seed, 1]), is_big(seed)
    module = _family(family)
    if hasattr(module, "draw"):  # a family whose prompts differ, too
        return module.draw(seed)
    config = module.draw_config(rng, big) if module else draw_config(rng, big)
    v, t = config["vision_config"], config.get("text_config") or config
    merge = v["spatial_merge_size"]
    rows = draw_rows(rng, merge, big)
    words = np.setdiff1d(np.arange(t["vocab_size"]), [config[name] for name in MEDIA])
    ids = [write_row(rng, r, config, words, merge) for r in rows]
    T = max(map(len, ids))
    mask = np.array([[1] * len(r) + [0] * (T - len(r)) for r in ids])
    ids = np.array(
        [r + rng.choice(words, T - len(r)).tolist() for r in ids]
    )  # any word: the mask alone tells
    grids = np.array([p for r in rows for p in r if isinstance(p, tuple)], np.int64).reshape(-1, 3)
    pixels = rng.standard_normal((int(grids.prod(1).sum()), int(np.prod(patch_shape(v))))).astype(
        np.float32
    )
    whole = mask.all() and rng.random() < 0.5
    return Case(
        seed,
        config,
        bool(rng.random() < 0.5),
        big or bool(rng.random() < 0.5),
        ids,
        None if whole else mask,
        pixels,
        grids,
        family,
    )


def patch_shape(v: dict) -> tuple[int, int, int, int]:
    """(channels, frames, height, width) of one patch."""
    channels = v.get("in_channels", v.get("in_chans", 3))
    return channels, v["temporal_patch_size"], v["patch_size"], v["patch_size"]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """HF key (published layout) -> shape; written down apart from the table under test."""
    if module := _family(case.family):
        return module.shapes(case)
    v, t, tree = case.config["vision_config"], case.text, {}

    def add(prefix, table):
        tree.update({f"{prefix}{name}": shape for name, shape in table.items()})

    def linear(prefix, out, into, bias=True):
        add(prefix, {".weight": (out, into)} | ({".bias": (out,)} if bias else {}))

    d, f = v["hidden_size"], v["intermediate_size"]
    wide = d * v["spatial_merge_size"] ** 2
    add("visual.", {"patch_embed.proj.weight": (d, *patch_shape(v)), "merger.ln_q.weight": (d,)})
    linear("visual.merger.mlp.0", wide, wide)
    linear("visual.merger.mlp.2", t["hidden_size"], wide)
    for i in range(v["depth"]):
        block = f"visual.blocks.{i}."
        add(block, {"norm1.weight": (d,), "norm2.weight": (d,)})
        for name, out, into in (
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("mlp.gate_proj", f, d),
            ("mlp.up_proj", f, d),
            ("mlp.down_proj", d, f),
        ):
            linear(block + name, out, into)

    d, f = t["hidden_size"], t["intermediate_size"]
    kv = d // t["num_attention_heads"] * t["num_key_value_heads"]
    add("model.", {"embed_tokens.weight": (t["vocab_size"], d), "norm.weight": (d,)})
    for i in range(t["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        add(layer, {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)})
        for name, out in (("q", d), ("k", kv), ("v", kv)):
            linear(f"{layer}self_attn.{name}_proj", out, d)
        for name, out, into in (
            ("self_attn.o_proj", d, d),
            ("mlp.gate_proj", f, d),
            ("mlp.up_proj", f, d),
            ("mlp.down_proj", d, f),
        ):
            linear(layer + name, out, into, bias=False)
    if not (case.config.get("tie_word_embeddings") or t.get("tie_word_embeddings")):
        linear("lm_head", t["vocab_size"], d, bias=False)
    return tree


def weights(case: Case) -> dict[str, np.ndarray]:
    """HF key (published layout) -> float32 weight. Scaled so that every part of the model shows in the logits."""
    rng, out, module = np.random.default_rng([case.seed, 2]), {}, _family(case.family)
    if hasattr(module, "weights"):
        return module.weights(case)
    for key, shape in shapes(case).items():
        z = rng.standard_normal(shape)
        if len(shape) == 1:
            z = z / 4 + (("norm" in key or "ln_q" in key) and key.endswith("weight"))
        else:
            z = z / (4 if "embed_tokens" in key else np.sqrt(np.prod(shape[1:])))
        out[key] = (z * module.scale(case, key) if module else z).astype(np.float32)
    return out


def nested_key(key: str) -> str:
    """A published key -> the key that transformers 5 gives the same tensor."""
    if key.startswith(("model.visual.", "model.language_model.")):
        return key  # of a family that has one layout alone
    if key.startswith("visual."):
        return "model." + key
    return "model.language_model." + key.removeprefix("model.") if key.startswith("model.") else key
