"""A tiny Qwen3-VL through the whole house: SFT with located findings, GRPO with adapters, export, reading."""

import dataclasses
import json

import family_runs
import numpy as np
import pytest
import tiny_model

import cxr_jax
from cxr_jax.models.qwen3_vl.config import PHANTOM
from cxr_jax.weights import hf_folder

TINY = dataclasses.replace(
    PHANTOM,
    vision=dataclasses.replace(
        PHANTOM.vision,
        depth=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=48,
        tap_blocks=(1, 0),
    ),
    text=dataclasses.replace(
        PHANTOM.text,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_size=32,
        mrope_section=(6, 5, 5),
    ),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen3_vl")
    params = tiny_model.draw_params(TINY)
    folder = cxr_jax.asset("phantom")
    hf_folder.save(root / "base", TINY, params, tokenizer=folder, pixel_limits=(224**2, 224**2))
    family_runs.train(
        root,
        ["--config=sft:qwen3_vl_phantom"],
        ["--config.lora.targets=('decoder','vision','merger')"],
    )
    return root


@pytest.mark.slow
def test_sft_and_rl_end_with_their_tables(runs):
    family_runs.check_tables(runs)


@pytest.mark.slow
def test_exports_are_qwen3_vl_folders(runs):
    for task in ("sft", "rl"):
        folder = runs / task / "hf"
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "qwen3_vl"
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        assert settings["size"] == {"shortest_edge": 224**2, "longest_edge": 224**2}
        assert settings["patch_size"] == 16 and settings["image_mean"] == [0.5] * 3
        assert "min_pixels" not in settings
        assert hf_folder.read_config(folder) == TINY


@pytest.mark.slow
def test_adapters_of_all_groups_add_up_to_the_export(runs):
    adapters, lora = family_runs.adapters_add_up(runs, TINY)
    assert lora.targets == ("decoder", "vision", "merger")
    assert adapters["vision"]["taps"]["fc1"]["a"].shape == (2, 128, 2)


@pytest.mark.slow
def test_a_film_is_read(runs):
    model = cxr_jax.load(runs / "rl")
    film = np.random.default_rng(0).random((224, 224), np.float32)
    [[completion]] = model.generate([film], ["Find abnormalities."], max_new_tokens=4)
    assert len(completion.token_ids) <= 4
