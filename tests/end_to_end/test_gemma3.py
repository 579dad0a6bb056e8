"""A tiny Gemma 3 with a tokenizer of its kind through the whole house: SFT, GRPO with adapters, export, reading."""

import dataclasses
import json

import family_runs
import gemma_tokenizer
import numpy as np
import pytest
import tiny_model

import cxr_jax
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.gemma3.config import GEMMA_PHANTOM
from cxr_jax.weights import hf_folder


def tiny():
    ids = tokenizers.config_ids(tokenizers.load(str(gemma_tokenizer.folder())))
    vision = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=48)
    text = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_size=24,
        sliding_layers=(0,),
    )
    return dataclasses.replace(
        GEMMA_PHANTOM,
        vision=dataclasses.replace(GEMMA_PHANTOM.vision, **vision),
        text=dataclasses.replace(GEMMA_PHANTOM.text, **text),
        **ids,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root, config = tmp_path_factory.mktemp("gemma3"), tiny()
    params = tiny_model.draw_params(config)
    hf_folder.save(root / "base", config, params, tokenizer=gemma_tokenizer.folder())
    family_runs.train(root, ["--config=sft"], ["--config.lora.targets=('decoder','vision')"])
    return root


@pytest.mark.slow
def test_sft_and_rl_end_with_their_tables(runs):
    family_runs.check_tables(runs)


@pytest.mark.slow
def test_exports_are_gemma_3_folders(runs):
    for task in ("sft", "rl"):
        folder = runs / task / "hf"
        assert hf_folder.read_config(folder) == tiny()
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        assert settings["size"] == {"height": 224, "width": 224} and settings["resample"] == 2
        processor = json.loads((folder / "processor_config.json").read_text())
        assert processor == {"processor_class": "Gemma3Processor", "image_seq_length": 64}


@pytest.mark.slow
def test_transformers_makes_the_same_prompt_of_an_export(runs):
    from PIL import Image
    from transformers import AutoProcessor

    film = np.random.default_rng(0).integers(0, 256, (120, 90), dtype=np.uint8)
    processor = AutoProcessor.from_pretrained(runs / "rl" / "hf")
    content = [{"type": "image"}, {"type": "text", "text": "Find abnormalities."}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    theirs = processor(text=text, images=[Image.fromarray(film)], add_special_tokens=False)
    model = cxr_jax.load(runs / "rl" / "hf")
    rendered = model.render("Find abnormalities.", [(1, 16, 16)])
    assert rendered == list(theirs["input_ids"][0])


@pytest.mark.slow
def test_adapters_add_up_to_the_export(runs):
    adapters, lora = family_runs.adapters_add_up(runs, tiny())
    assert lora.targets == ("decoder", "vision")
    assert adapters["vision"]["blocks"]["attn"]["q"]["a"].shape == (2, 32, 2)


@pytest.mark.slow
def test_a_film_is_read_whatever_its_shape(runs):
    model = cxr_jax.load(runs / "rl")
    film = np.random.default_rng(0).random((150, 224), np.float32)
    [[completion]] = model.generate([film], ["Find abnormalities."], max_new_tokens=4)
    assert len(completion.token_ids) <= 4
