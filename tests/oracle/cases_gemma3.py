"""Random Gemma 3 models and prompts, as `cases` draws those of Qwen2.5-VL: numpy only, a function of the seed."""

import dataclasses

import cases
import numpy as np

NEW_TOKENS = cases.NEW_TOKENS
LAYOUTS = ("published", "transformers 4.52", "transformers 5")
DEEP = 0.08  # share of models that are deeper than what is unrolled


@dataclasses.dataclass
class Case(cases.Case):
    """grids: all the same, patches in merge-block order (channel, row, column), as this project's processor gives."""

    layout: str = "published"

    @property
    def text(self) -> dict:
        return self.config["text_config"]

    @property
    def image_id(self) -> int:
        return self.config["image_token_index"]

    @property
    def media_ids(self) -> list[int]:
        ids = [self.config[name] for name in ("image_token_index", *FRAME)]
        return [token for token in ids if token < self.text["vocab_size"]]

    @property
    def side(self) -> int:
        """Patches a side."""
        vision = self.config["vision_config"]
        return vision["image_size"] // vision["patch_size"]

    @property
    def merge(self) -> int:
        """Patches a side that become one token."""
        return self.side // int(self.config["mm_tokens_per_image"] ** 0.5)

    def stored_key(self, key: str) -> str:
        return stored_key(key, self.layout)

    def module_key(self, key: str) -> str:
        return stored_key(key, "transformers 5")

    def images(self) -> np.ndarray:
        """What transformers takes, float32 [n, C, S, S]."""
        v, n, m = self.config["vision_config"], self.side, self.merge
        p, channels = v["patch_size"], v.get("num_channels", 3)
        blocks = self.pixel_values.reshape(-1, n // m, n // m, m, m, channels, p, p)
        return blocks.transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, channels, n * p, n * p)


FRAME = ("boi_token_index", "eoi_token_index")


def stored_key(key: str, layout: str) -> str:
    """A published key -> that of a layout in circulation."""
    if layout == "published":
        return key
    key = key.replace("language_model.model.", "language_model.")
    if layout == "transformers 5":
        key = key.replace("vision_tower.vision_model.", "vision_tower.")
    return key if key == "lm_head.weight" else "model." + key


def draw_vision(rng) -> tuple[dict, int]:
    """(vision_config, tokens a side)."""
    tokens, merge = int(rng.integers(1, 5)), int(rng.choice([1, 2, 2, 3, 4, 4]))
    patch, heads = int(rng.choice([1, 2, 3, 5])), int(rng.integers(1, 5))
    v = {
        "model_type": "siglip_vision_model",
        "hidden_size": heads * int(rng.choice([1, 3, 4, 8, 12])),
        "intermediate_size": int(rng.integers(5, 80)),
        "num_hidden_layers": int(
            rng.integers(9, 12) if rng.random() < DEEP else rng.integers(1, 4)
        ),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": patch * merge * tokens,
        "vision_use_head": False,
    }
    if v["hidden_size"] < 4:  # norms over one or two features are ill-conditioned
        v["hidden_size"] = 4 * heads
    if rng.random() < 0.5:
        v["hidden_act"] = "gelu_pytorch_tanh"
    if rng.random() < 0.7:
        v["layer_norm_eps"] = float(rng.choice([1e-6, 1e-5, 1e-3, 3e-2]))
    if rng.random() < 0.2:
        v["num_channels"] = 1
    return v, tokens


def draw_layers(rng) -> dict:
    """Which layers see a window, in one of the spellings, and how many there are."""
    deep = rng.random() < DEEP
    count = int(rng.integers(9, 13) if deep else rng.choice([1, 2, 2, 3, 4]))
    window = int(rng.integers(1, 24))
    # Of one token, which sees itself alone, and in an image what is ahead, a few times more.
    out = {"num_hidden_layers": count, "sliding_window": 1 if window > 21 else window}
    kind = rng.integers(0, 4)
    if kind == 0:  # the class's pattern: every sixth layer sees all
        return out
    if kind == 1:
        return out | {"sliding_window_pattern": int(rng.integers(1, 4))}
    kinds = np.where(rng.random(count) < 0.5, "sliding_attention", "full_attention")
    return out | {"layer_types": kinds.tolist()}


def draw_ropes(rng) -> dict:
    theta = float(rng.choice([1e4, 1e6, round(10 ** rng.uniform(1.5, 7), 3)]))
    local = float(rng.choice([1e4, round(10 ** rng.uniform(1.5, 5), 3)]))
    factor = float(rng.choice([8.0, 2.5]))
    linear = {"rope_type": "linear", "factor": factor} if rng.random() < 0.7 else None
    spelling = rng.integers(0, 3)
    if spelling == 0:  # the published files: the class's thetas
        return {"rope_scaling": linear} if linear else {}
    if spelling == 1:
        return {"rope_theta": theta, "rope_local_base_freq": local, "rope_scaling": linear}
    full = (linear or {"rope_type": "default"}) | {"rope_theta": theta}
    sliding = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def draw_text(rng) -> dict:
    kv, group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    heads = kv * group
    t = {
        "model_type": "gemma3_text",
        # transformers asks for a multiple of the heads, though nothing depends on it.
        "hidden_size": heads * int(rng.choice([4, 6, 8, 10])),
        "head_dim": int(rng.choice([2, 4, 6, 8, 16])),
        "intermediate_size": int(rng.integers(5, 120)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": int(rng.integers(48, 300)),
        "query_pre_attn_scalar": int(rng.choice([1, 4, 16, 168, 256])),
    }
    if rng.random() < 0.7:
        t["rms_norm_eps"] = float(rng.choice([1e-6, 1e-5, 1e-3, 3e-2]))
    if rng.random() < 0.5:
        t |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "max_position_embeddings": int(rng.choice([2048, 32768])),
        }
    return t | draw_layers(rng) | draw_ropes(rng)


def draw_config(rng) -> dict:
    t = draw_text(rng)
    v, tokens = draw_vision(rng)
    special = [int(x) for x in rng.choice(t["vocab_size"], 7, replace=False)]
    # Other models have the placeholder's id behind the table, which then holds no row for it.
    image = special[0] if rng.random() < 0.7 else t["vocab_size"] + int(rng.integers(0, 9))
    t["pad_token_id"], t["bos_token_id"] = special[3], special[4]
    t["eos_token_id"] = special[5] if rng.random() < 0.5 else special[5:7]
    tied = rng.integers(0, 3)
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "image_token_index": image,
        "boi_token_index": special[1],
        "eoi_token_index": special[2],
        "mm_tokens_per_image": tokens**2,
        **([{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}][tied]),
        "text_config": t | ({"tie_word_embeddings": False} if tied == 2 else {}),
        "vision_config": v,
    }


def draw_rows(rng) -> list[list]:
    """Rows of parts: a text length, or None for an image, in reading order."""
    images = [0] if rng.random() < 0.12 else [0, 1, 1, 2, 3]
    rows = []
    for b in range(rng.integers(1, 4)):
        row = [int(rng.integers(1, 20))] if rng.random() < 0.7 else []
        for _ in range(max(rng.choice(images), len(images) > 1 and b == 0)):
            row.append(None)
            row += [int(rng.integers(1, 12))] if rng.random() < 0.6 else []
        rows.append(row + ([] if row and rng.random() < 0.2 else [int(rng.integers(1, 12))]))
    return rows


def write_row(rng, parts: list, config: dict, words: np.ndarray) -> list[int]:
    start, end = (config[name] for name in FRAME)
    ids, bare = [], rng.random() < 0.15  # bare: images without start and end tokens
    for before, part in zip([0, *parts], parts, strict=False):
        if part is not None:
            ids += rng.choice(words, part).tolist()
            continue
        run = [config["image_token_index"]] * config["mm_tokens_per_image"]
        if not bare:
            run = [start, *run, end]
        elif before is None:
            run = [int(rng.choice(words)), *run]  # one run would be one image
        ids += run
    return ids


def draw(seed: int) -> Case:
    """The case of a seed."""
    rng = np.random.default_rng([seed, 3])
    config = draw_config(rng)
    v, t = config["vision_config"], config["text_config"]
    rows = draw_rows(rng)
    media = [config[name] for name in ("image_token_index", *FRAME)]
    words = np.setdiff1d(np.arange(t["vocab_size"]), media)
    ids = [write_row(rng, row, config, words) for row in rows]
    T = max(map(len, ids))
    mask = np.array([[1] * len(row) + [0] * (T - len(row)) for row in ids])
    ids = np.array([row + rng.choice(words, T - len(row)).tolist() for row in ids])
    side, patch = v["image_size"] // v["patch_size"], v["patch_size"]
    count = sum(part is None for row in rows for part in row)
    pixels = rng.standard_normal((count * side**2, v.get("num_channels", 3) * patch**2))
    whole = mask.all() and rng.random() < 0.5
    return Case(
        seed,
        config,
        False,
        bool(rng.random() < 0.5),
        ids,
        None if whole else mask,
        pixels.astype(np.float32),
        np.array([(1, side, side)] * count, np.int64).reshape(-1, 3),
        "gemma3",
        layout=str(rng.choice(LAYOUTS)),
    )


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """HF key (published layout) -> shape; written down apart from the table under test."""
    v, t, tree = case.config["vision_config"], case.text, {}

    def linear(prefix, out, into, bias):
        tree[prefix + ".weight"] = (out, into)
        if bias:
            tree[prefix + ".bias"] = (out,)

    def norm(prefix, size, bias=False):
        tree[prefix + ".weight"] = (size,)
        if bias:
            tree[prefix + ".bias"] = (size,)

    V, D, tower = v["hidden_size"], t["hidden_size"], "vision_tower.vision_model."
    patch, channels = v["patch_size"], v.get("num_channels", 3)
    tree[tower + "embeddings.patch_embedding.weight"] = (V, channels, patch, patch)
    tree[tower + "embeddings.patch_embedding.bias"] = (V,)
    tree[tower + "embeddings.position_embedding.weight"] = (case.side**2, V)
    for i in range(v["num_hidden_layers"]):
        block = f"{tower}encoder.layers.{i}."
        norm(block + "layer_norm1", V, True)
        norm(block + "layer_norm2", V, True)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{block}self_attn.{name}", V, V, True)
        linear(block + "mlp.fc1", v["intermediate_size"], V, True)
        linear(block + "mlp.fc2", V, v["intermediate_size"], True)
    norm(tower + "post_layernorm", V, True)
    tree["multi_modal_projector.mm_input_projection_weight"] = (V, D)
    norm("multi_modal_projector.mm_soft_emb_norm", V)

    d, model = t["head_dim"], "language_model.model."
    tree[model + "embed_tokens.weight"] = (t["vocab_size"], D)
    norm(model + "norm", D)
    for i in range(t["num_hidden_layers"]):
        layer = f"{model}layers.{i}."
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            norm(f"{layer}{name}_layernorm", D)
        norm(layer + "self_attn.q_norm", d)
        norm(layer + "self_attn.k_norm", d)
        heads, key_heads = t["num_attention_heads"], t["num_key_value_heads"]
        linear(layer + "self_attn.q_proj", heads * d, D, False)
        linear(layer + "self_attn.k_proj", key_heads * d, D, False)
        linear(layer + "self_attn.v_proj", key_heads * d, D, False)
        linear(layer + "self_attn.o_proj", D, heads * d, False)
        linear(layer + "mlp.gate_proj", t["intermediate_size"], D, False)
        linear(layer + "mlp.up_proj", t["intermediate_size"], D, False)
        linear(layer + "mlp.down_proj", D, t["intermediate_size"], False)
    if not case.config.get("tie_word_embeddings", True):
        linear("lm_head", t["vocab_size"], D, False)
    return tree


def weights(case: Case) -> dict[str, np.ndarray]:
    """HF key (published layout) -> float32 weight. Scaled so that every part of the model shows in the logits."""
    rng, out = np.random.default_rng([case.seed, 4]), {}
    quiet = (
        1e-3 if case.seed % 5 == 0 else 1.0
    )  # a small stream, in which the epsilons of norms count
    for key, shape in shapes(case).items():
        z = rng.standard_normal(shape)
        if len(shape) == 1:
            # LayerNorm's weights are around 1, the decoder's norms add 1 themselves.
            is_scale = "layer_norm" in key or "post_layernorm" in key
            z = z / 4 + (is_scale and key.endswith(".weight"))
        elif "embed_tokens" in key:
            z = z * quiet / np.sqrt(shape[1])
        elif "mm_input" in key:
            z = z * quiet / np.sqrt(shape[0])
        else:
            z = z / np.sqrt(np.prod(shape[1:]))
        out[key] = z.astype(np.float32)
    return out
