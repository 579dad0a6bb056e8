"""Random Qwen3-VL models for `cases.draw`: configs in both spellings, shapes, and what a weight is scaled by.

Every choice that a wrong port gets wrong is drawn often enough to be among a hundred configs: residual streams as quiet
as the norms' eps, large eps, heads that are not the width together, odd tables and tables smaller than a grid, stacks
that are scanned, and taps of the first block, of the last, of all, of none, out of order and beyond the depth.
"""

import cases
import numpy as np

ARCHITECTURE = "Qwen3VL"


def draw_vision(rng, big: bool) -> dict:
    deep = not big and rng.random() < 0.06
    depth = int(rng.integers(9, 13) if deep else rng.integers(1, 3 if big else 5))
    heads = int(rng.integers(1, 3 if big else 5))
    side = int(rng.integers(1, 10))
    # A table need not be a square: the rows beyond the largest square are not read.
    spare = int(rng.integers(1, 2 * side + 1)) if rng.random() < 0.15 else 0
    return {
        "depth": depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": heads * int(rng.choice([4, 8, 12, 16, 20])),
        "num_heads": heads,
        "intermediate_size": int(rng.integers(5, 120)),
        "patch_size": int(rng.choice([2, 3, 4, 8, 16])),
        "spatial_merge_size": 2 if big else int(rng.choice([2, 2, 2, 2, 1, 3])),
        "temporal_patch_size": int(rng.choice([2, 2, 2, 1])),
        "in_channels": int(rng.choice([3, 3, 3, 1])),
        "num_position_embeddings": side * side + spare,
        "deepstack_visual_indexes": draw_taps(rng, depth),
    }


def draw_taps(rng, depth: int) -> list[int]:
    kind = rng.integers(0, 6)
    if kind == 0:
        return []
    if kind == 1:
        return list(range(depth))
    if kind == 2:
        return [depth - 1]
    if kind == 3:
        return [0]
    some = [block for block in range(depth + 2) if rng.random() < 0.5] or [0]  # some beyond
    return rng.permutation(some).tolist() if kind == 4 else some


def draw_text(rng, big: bool) -> dict:
    """The decoder's sizes; also "mrope_section" and "rope_theta", which the spellings keep in different places."""
    if not big and rng.random() < 0.12:  # as published: 128 a head, 24 : 20 : 20
        kv, group, head_dim, sections = 1, int(rng.choice([2, 4])), 128, [24, 20, 20]
    else:
        kv, group = int(rng.integers(1, 5)), int(rng.integers(1, 5))
        sizes = (2, 4, 6, 8, 10, 12, 16, 24, 32, 64)
        limit = 64 if big else 160
        head_dim = int(rng.choice([size for size in sizes if size * kv * group <= limit]))
        sections = cases.composition(rng, head_dim // 2, 3)
        if rng.random() < 0.2:  # the slices of height and width count, whatever the sum
            sections = [int(part) for part in rng.integers(0, head_dim // 4 + 2, 3)]
    deep = not big and rng.random() < 0.06
    return {
        "attention_bias": bool(rng.random() < 0.15),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": 2 * int(rng.integers(3, 33 if big else 61)),
        "intermediate_size": int(rng.integers(4, 200)),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "num_hidden_layers": int(rng.integers(9, 12) if deep else rng.choice([1, 2, 2, 3])),
        "vocab_size": int(rng.integers(48, 300)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-3, 3e-2, 0.3])),
        "max_position_embeddings": int(rng.choice([2048, 262144])),
        "mrope_section": sections,
        "rope_theta": float(rng.choice([1e4, 5e6, round(10 ** rng.uniform(1.5, 7), 3)])),
    }


def draw_config(rng, big: bool) -> dict:
    text = draw_text(rng, big)
    vision = draw_vision(rng, big) | {"out_hidden_size": text["hidden_size"]}
    special = rng.choice(text["vocab_size"], 8, replace=False).tolist()
    top = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **dict(zip(cases.MEDIA, special[:4], strict=True)),
        "tie_word_embeddings": bool(rng.random() < 0.5),
    }
    text |= {
        "model_type": "qwen3_vl_text",
        "bos_token_id": special[4],
        "eos_token_id": special[5] if rng.random() < 0.7 else special[5:7],
    }
    text |= {"pad_token_id": special[7]} if rng.random() < 0.5 else {}

    rope = {"mrope_section": text.pop("mrope_section"), "rope_type": "default"}
    if rng.random() < 0.8:  # never read
        rope["mrope_interleaved"] = bool(rng.random() < 0.8)
    theta = {"rope_theta": text.pop("rope_theta")}
    if rng.random() < 0.1:
        theta = {}  # that of the class
    if rng.random() < 0.5:  # transformers 4.57, the published files
        text |= {"rope_scaling": rope, **theta}
        vision["model_type"] = "qwen3_vl"
    else:
        text["rope_parameters"] = {**rope, **theta}
        vision["model_type"] = "qwen3_vl_vision"
        if rng.random() < 0.5:
            vision["rope_parameters"] = {
                "rope_type": "axial",
                "rope_theta": round(10 ** rng.uniform(1.5, 5), 3),
            }
    return {**top, "text_config": text, "vision_config": vision}


def shapes(case: "cases.Case") -> dict[str, tuple[int, ...]]:
    """HF key -> shape; written down apart from the table under test."""
    vision, text = case.config["vision_config"], case.text
    tree: dict[str, tuple[int, ...]] = {}

    def linear(name, out, into, bias=True):
        tree[f"{name}.weight"] = (out, into)
        if bias:
            tree[f"{name}.bias"] = (out,)

    def norm(name, size, bias=True):
        tree[f"{name}.weight"] = (size,)
        if bias:
            tree[f"{name}.bias"] = (size,)

    # ---- The tower ----
    width, inner, tower = vision["hidden_size"], vision["intermediate_size"], "model.visual."
    joined, out = width * vision["spatial_merge_size"] ** 2, text["hidden_size"]
    tree[f"{tower}patch_embed.proj.weight"] = (width, *cases.patch_shape(vision))
    tree[f"{tower}patch_embed.proj.bias"] = (width,)
    tree[f"{tower}pos_embed.weight"] = (vision["num_position_embeddings"], width)
    for number in range(vision["depth"]):
        block = f"{tower}blocks.{number}."
        norm(f"{block}norm1", width)
        norm(f"{block}norm2", width)
        linear(f"{block}attn.qkv", 3 * width, width)
        linear(f"{block}attn.proj", width, width)
        linear(f"{block}mlp.linear_fc1", inner, width)
        linear(f"{block}mlp.linear_fc2", width, inner)
    taps = range(len(vision["deepstack_visual_indexes"]))
    mergers = {f"{tower}merger": width}
    mergers |= {f"{tower}deepstack_merger_list.{number}": joined for number in taps}
    for merger, normed in mergers.items():
        norm(f"{merger}.norm", normed)
        linear(f"{merger}.linear_fc1", joined, joined)
        linear(f"{merger}.linear_fc2", out, joined)

    # ---- The decoder ----
    width, inner, size = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    decoder, has_bias = "model.language_model.", text["attention_bias"]
    tree[f"{decoder}embed_tokens.weight"] = (text["vocab_size"], width)
    norm(f"{decoder}norm", width, bias=False)
    for number in range(text["num_hidden_layers"]):
        layer = f"{decoder}layers.{number}."
        norm(f"{layer}input_layernorm", width, bias=False)
        norm(f"{layer}post_attention_layernorm", width, bias=False)
        for name, features in (("q", queries), ("k", keys), ("v", keys)):
            linear(f"{layer}self_attn.{name}_proj", features, width, has_bias)
        linear(f"{layer}self_attn.o_proj", width, queries, has_bias)
        norm(f"{layer}self_attn.q_norm", size, bias=False)
        norm(f"{layer}self_attn.k_norm", size, bias=False)
        linear(f"{layer}mlp.gate_proj", inner, width, bias=False)
        linear(f"{layer}mlp.up_proj", inner, width, bias=False)
        linear(f"{layer}mlp.down_proj", width, inner, bias=False)
    if not case.config["tie_word_embeddings"]:
        linear("lm_head", text["vocab_size"], width, bias=False)
    return tree


# What writes into the tower's residual stream.
_STREAM = ("patch_embed.", "pos_embed.", "attn.proj.", "mlp.linear_fc2.")


def is_quiet(seed: int) -> bool:
    """Whether the tower's residual stream is as small as the root of its norms' eps."""
    return np.random.default_rng([seed, 4]).random() < 0.15


def scale(case: "cases.Case", key: str) -> float:
    if key == "model.visual.pos_embed.weight":
        # Like the patches', so that it shows; rows are features, no sum is taken over them.
        factor = np.sqrt(case.config["vision_config"]["hidden_size"]) / 2
    else:
        factor = 1.0
    is_small = (
        is_quiet(case.seed)
        and key.startswith("model.visual.")
        and any(name in key for name in _STREAM)
    )
    return factor * (1e-3 if is_small else 1.0)
