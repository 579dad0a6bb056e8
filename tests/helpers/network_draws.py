"""Networks drawn over all fields of the config at once, with prompts of none, one and several images."""

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np

from cxr_jax.models import network
from cxr_jax.models.network.config import Config, TextConfig, VisionConfig

IMAGE, COMPLETIONS, NEW = 5, 2, 3

VISION = VisionConfig(
    depth=2,
    hidden_size=24,
    num_heads=3,
    intermediate_size=20,
    out_hidden_size=20,
    fullatt_block_indexes=(1,),
    patch_size=2,
    window_size=8,
)
TEXT = TextConfig(
    vocab_size=40,
    hidden_size=20,
    intermediate_size=30,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(1, 2, 1),
    rope_theta=30.0,
    head_size=8,
)
BASE = Config(
    VISION,
    TEXT,
    image_token_id=IMAGE,
    video_token_id=6,
    vision_start_token_id=7,
    vision_end_token_id=8,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=(1,),
)
"""Qwen2.5-VL's arithmetic."""

LIKE_QWEN3 = dataclasses.replace(
    BASE,
    vision=dataclasses.replace(
        VISION,
        norm="layer",
        mlp="gelu",
        patch_bias=True,
        position_table=28,
        interpolates_table=True,
        fullatt_block_indexes=None,
        tap_blocks=(1, 0),
    ),
    text=dataclasses.replace(TEXT, qkv_bias=False, qk_norm=True, mrope_interleaved=True),
    tie_word_embeddings=True,
)
LIKE_GEMMA = dataclasses.replace(
    BASE,
    vision=dataclasses.replace(
        VISION,
        norm="layer",
        mlp="gelu",
        patch_bias=True,
        position_table=64,
        rotary=False,
        fullatt_block_indexes=None,
        split_qkv=True,
        final_norm=True,
        merger="mean",
        temporal_patch_size=1,
    ),
    text=dataclasses.replace(
        TEXT,
        qkv_bias=False,
        qk_norm=True,
        mrope_section=(),
        norm="one_plus",
        post_norms=True,
        activation="gelu_tanh",
        query_scale=0.2,
        scales_embedding=True,
        rope_factor=8.0,
        num_hidden_layers=3,
        sliding_layers=(0, 2),
        sliding_window=5,
        image_sees_itself=True,
    ),
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Case:
    """A network, prompts, and completions of each.

    images: (pixels, grid) of each prompt's; completions int [prompts, COMPLETIONS, NEW].
    """

    config: Config
    params: dict
    prompts: list[np.ndarray]
    images: list[list[tuple]]
    completions: np.ndarray


def _sections(rng, count):
    """Three numbers that sum to `count`, or none."""
    if rng.random() < 0.25:
        return ()
    cuts = np.sort(rng.integers(0, count + 1, 2))
    return tuple(int(n) for n in np.diff([0, *cuts, count]))


def draw_config(rng) -> Config:
    """All fields drawn, each by itself as far as the arithmetic allows."""

    def some(*values):
        return values[rng.integers(len(values))]

    def subset(count, chance):
        return tuple(int(n) for n in np.flatnonzero(rng.random(count) < chance))

    depth, vision_heads = some(1, 2, 3, 5), some(1, 2, 3)
    full = some(None, subset(depth, 0.5))
    merge = some(1, 2, 3)
    taps = some((), tuple(int(n) for n in rng.permutation(depth + 1)[: rng.integers(1, depth + 2)]))
    table, interpolates = some((0, False), (10, True), (7, True), (400, False), (26, True))
    width = some(16, 20)
    vision = VisionConfig(
        depth=depth,
        hidden_size=8 * vision_heads,
        num_heads=vision_heads,
        intermediate_size=20,
        out_hidden_size=width,
        fullatt_block_indexes=full,
        in_channels=some(1, 3),
        patch_size=2,
        temporal_patch_size=some(1, 2),
        spatial_merge_size=merge,
        window_size=4 * merge,
        rope_theta=some(100.0, 1e4),
        norm=some("rms", "layer"),
        norm_eps=some(1e-6, 1e-5, 1e-2),
        mlp=some("swiglu", "gelu"),
        patch_bias=some(False, True),
        rotary=some(False, True),
        position_table=table,
        interpolates_table=interpolates,
        split_qkv=some(False, True),
        final_norm=some(False, True),
        merger=some("mlp", "mean"),
        tap_blocks=taps,
    )
    layers, heads, head_size = some(1, 2, 4), some(2, 4), some(4, 8, 16)
    sections = _sections(rng, head_size // 2)
    text = TextConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=30,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=some(1, 2),
        mrope_section=sections,
        rope_theta=some(50.0, 1e4),
        rms_norm_eps=some(1e-6, 1e-5, 1e-1),
        head_size=head_size,
        qkv_bias=some(False, True),
        output_bias=some(False, True),
        qk_norm=some(False, True),
        norm=some("scale", "one_plus"),
        post_norms=some(False, True),
        activation=some("silu", "gelu_tanh"),
        query_scale=some(None, 0.3),
        scales_embedding=some(False, True),
        mrope_interleaved=bool(sections) and some(False, True),
        rope_factor=some(1.0, 8.0),
        sliding_layers=some((), subset(layers, 0.5), tuple(range(layers))),
        sliding_window=some(1, 3, 6),
        sliding_rope_theta=some(20.0, 1e4),
        image_sees_itself=some(False, True),
    )
    return dataclasses.replace(
        BASE, vision=vision, text=text, tie_word_embeddings=some(False, True)
    )


def draw_case(seed: int, config: Config | None = None) -> Case:
    """A case by its seed; of the config, or of one that is drawn."""
    rng = np.random.default_rng(seed)
    config = config or draw_config(rng)
    params = jax.eval_shape(lambda: network.init_params(config, None))
    # Scales and biases must not be 1 and 0, and every second model has a quiet stream, where the epsilons count.
    quiet = (1.0, 1e-3)[seed % 2]

    def filled(path, leaf):
        name = "/".join(key.key for key in path)
        values = rng.standard_normal(leaf.shape)
        if name.endswith("scale"):
            values = values * 0.3 + (config.text.norm == "scale" or "vision" in name)
        elif name.endswith("kernel"):
            values = values * leaf.shape[-2] ** -0.5
        elif "embed" in name:
            values = values * 0.5
        if "embed" in name:
            values = values * quiet
        return np.asarray(values, np.float32)

    params = jax.tree_util.tree_map_with_path(filled, params)
    merge = config.vision.spatial_merge_size
    prompts, images = [], []
    for number in range(3):
        ids, of_prompt = [9, 7], []
        for _ in range((2, 0, 1)[number]):
            h, w = (int(side) * merge for side in rng.integers(1, 5, 2))
            pixels = rng.standard_normal((h * w, config.vision.patch_dim)).astype(np.float32)
            of_prompt.append((pixels, (1, h, w)))
            ids += [IMAGE] * (h * w // merge**2) + list(rng.integers(9, 40, rng.integers(1, 3)))
        ids += list(rng.integers(9, 40, 3 + number))
        prompts.append(np.array(ids, np.int32))
        images.append(of_prompt)
    completions = rng.integers(9, 40, (len(prompts), COMPLETIONS, NEW)).astype(np.int32)
    return Case(config, params, prompts, images, completions)
