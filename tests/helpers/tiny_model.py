"""Models that compile in seconds: `config`; `CFG`, one layer of 16 with 24 tokens; `small_phantom` and its folder."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

import cxr_jax
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.network import tower_layers
from cxr_jax.models.network.config import Config, TextConfig, VisionConfig
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.weights import hf_folder

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "fullatt_block_indexes": (),
    "patch_size": 2,
    "window_size": 8,
}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mrope_section": (1, 1, 2),
    "rope_theta": 1e4,
}
IDS = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": (2,),
}


def config(vision: Any = None, text: Any = None, **ids: Any) -> Config:
    """Qwen2.5-VL of VISION, TEXT and IDS, where vision, text and ids do not say otherwise."""
    decoder = TextConfig(**{**TEXT, **(text or {})})
    tower = {**VISION, "out_hidden_size": decoder.hidden_size, **(vision or {})}
    return Config(
        vision=VisionConfig(**tower), text=decoder, **{**IDS, **ids}, tie_word_embeddings=True
    )


V, T, N, STOP = 24, 6, 24, tuple(range(1, 7))
CFG = config(
    text={
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mrope_section": (2, 1, 1),
    },
    image_token_id=20,
    video_token_id=21,
    vision_start_token_id=22,
    vision_end_token_id=23,
    eos_token_id=(1,),
)


def small_phantom(tokenizer: tokenizers.Tokenizer, layers: int = 1) -> Config:
    """The phantom's config with its tokenizer and so many narrow layers each; the tower's last one is full."""
    text = dataclasses.replace(
        PHANTOM.text,
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        mrope_section=(2, 3, 3),
    )
    vision = dataclasses.replace(
        PHANTOM.vision,
        depth=layers,
        hidden_size=16,
        num_heads=2,
        intermediate_size=16,
        out_hidden_size=32,
        fullatt_block_indexes=(layers - 1,),
    )
    ids = tokenizers.config_ids(tokenizer)
    return dataclasses.replace(PHANTOM, text=text, vision=vision, **ids)


def draw_params(model_config: Config | VisionConfig, seed: int = 0) -> Any:
    """Parameters like fresh ones, whose own draws are a program that compiles for a second; of a tower, its own."""
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        sizes = {"kernel": leaf.shape[-2:][0] ** -0.5, "embedding": 0.02}
        size = sizes.get(path[-1].key)
        return leaf if size is None else size * rng.standard_normal(leaf.shape, np.float32)

    whole = isinstance(model_config, Config)
    init = network.init_params if whole else jax.jit(tower_layers.init_params, static_argnums=0)
    constants = jax.tree.map(np.asarray, init(model_config, None))
    return jax.tree_util.tree_map_with_path(drawn, constants)


@functools.cache
def phantom_folder() -> str:
    """A folder of such a model with two layers each, for whole runs: half of what one of the phantom's size costs.

    Made once a process, which takes it away at its end.
    """
    folder = tempfile.mkdtemp(prefix="small_phantom")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = small_phantom(tokenizers.load(cxr_jax.asset("phantom")), layers=2)
    params = draw_params(config)
    size = 224**2, 224**2
    hf_folder.save(folder, config, params, tokenizer=cxr_jax.asset("phantom"), pixel_limits=size)
    return folder
