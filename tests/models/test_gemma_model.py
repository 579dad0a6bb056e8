"""Gemma 3 equals transformers on recorded cases: features, logits, greedy tokens, and passes that share a prompt."""

import dataclasses
import functools
import json

import cases_gemma3 as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import entries
from places import ROOT

from cxr_jax.inference import model as inference_model
from cxr_jax.inference import sampling
from cxr_jax.models import network
from cxr_jax.models.gemma3 import hf_table
from cxr_jax.models.registry import read_config
from cxr_jax.weights import hf_folder
from cxr_jax.weights.safetensors_file import write_folder

BAR = 1e-4  # of the standard deviation
SEEDS = (2, 27, 107)  # tied and with several images; ten layers, scanned; untied


@functools.cache
def recorded(seed):
    with np.load(ROOT / "tests" / "golden" / "gemma3" / f"{seed}.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = {}

    def get(seed):
        if seed not in made:
            case = cases.draw(seed)
            folder = tmp_path_factory.mktemp(str(seed))
            write_folder(folder, entries(cases.weights(case)))
            (folder / "config.json").write_text(json.dumps(case.config))
            made[seed] = inference_model.Model(*hf_folder.load(folder))
        return made[seed]

    return get


@pytest.mark.parametrize("seed", SEEDS)
def test_features_and_logits(model, seed):
    case, want = cases.draw(seed), recorded(seed)
    ids, mask = want["input_ids"], want["attention_mask"]
    got = model(seed).logits(ids, case.pixel_values, case.grids, attention_mask=mask)
    shown = mask.astype(bool)
    assert np.abs(got - want["logits"])[shown].max() <= BAR * want["logits"][shown].std()
    features = model(seed).image_features(case.pixel_values, case.grids)
    features = np.concatenate([image.tokens for image in features])
    assert np.abs(features - want["features"]).max() <= BAR * want["features"].std()


def test_what_an_image_sees_counts(model):
    """Without the placeholders' id the same features are text: images that do not see ahead are another model."""
    case, want = cases.draw(2), recorded(2)
    ids, mask = want["input_ids"], want["attention_mask"]
    causal = read_config(case.config)
    text = dataclasses.replace(causal.text, image_sees_itself=False)
    causal = dataclasses.replace(causal, text=text)
    got = inference_model.Model(causal, model(2).params).logits(
        ids, case.pixel_values, case.grids, attention_mask=mask
    )
    shown = mask.astype(bool)
    assert np.abs(got - want["logits"])[shown].max() > 0.1 * want["logits"][shown].std()


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_tokens(model, seed):
    case, want, ours = cases.draw(seed), recorded(seed), model(seed)
    mask = np.ones_like(case.input_ids) if case.attention_mask is None else case.attention_mask
    ids = np.where(mask, case.input_ids, ours.config.pad_token_id)
    placed = ours._place(ids, ours.image_features(case.pixel_values, case.grids))
    out = sampling.generate(
        ours.params,
        ours.config,
        sampling.PromptBatch(
            ids, mask.sum(1), network.positions(ours.config, ids, case.grids, mask), placed
        ),
        sampling.SamplingSettings(n=2, max_new_tokens=want["tokens"].shape[1], temperature=0),
    )
    got = np.where(np.arange(out["tokens"].shape[1]) < out["lengths"][:, None], out["tokens"], -1)
    np.testing.assert_array_equal(got, np.repeat(want["tokens"], 2, 0))


@pytest.mark.parametrize("seed", [107, pytest.param(2, marks=pytest.mark.slow)])
def test_completions_that_share_a_prompt_are_whole_rows(model, seed):
    """The learner's pass: windows of a completion's tokens reach back into the prompt, past an image."""
    case, ours = cases.draw(seed), model(seed)
    config, params = ours.config, ours.params
    mask = np.ones_like(case.input_ids) if case.attention_mask is None else case.attention_mask
    lengths, B = mask.sum(1), len(case.input_ids)
    ids = np.where(mask, case.input_ids, config.pad_token_id)
    placed = ours._place(ids, ours.image_features(case.pixel_values, case.grids))
    words = np.setdiff1d(np.arange(config.text.vocab_size), case.media_ids)
    own = np.random.default_rng(0).choice(words, (B * 2, 9))

    embedded = network.embed(params, config, jnp.asarray(ids), placed)
    positions = network.positions(config, ids, case.grids, mask)
    own_positions = np.repeat(lengths, 2)[None, :, None] + np.arange(9)
    _, got = jax.jit(network.decode_group, static_argnums=1)(
        params,
        config,
        embedded,
        positions,
        jnp.asarray(lengths),
        network.embed_text(params, config, jnp.asarray(own)),
        own_positions,
    )
    # Each row by itself, its completion directly behind its prompt.
    rows, pixels, at = [], [], 0
    for row, n in zip(ids, lengths, strict=True):
        count = int((row[:n] == case.image_id).sum()) // case.config["mm_tokens_per_image"]
        pixels += 2 * [case.pixel_values[at * case.side**2 : (at + count) * case.side**2]]
        at += count
        rows += 2 * [row[:n]]
    whole = np.full((2 * B, ids.shape[1] + 9), config.pad_token_id)
    keep = np.zeros(whole.shape, int)
    for row, prompt, completion in zip(range(2 * B), rows, own, strict=True):
        whole[row, : len(prompt) + 9] = [*prompt, *completion]
        keep[row, : len(prompt) + 9] = 1
    grids = case.grids[:1].repeat(2 * len(case.grids), 0)
    want = ours.logits(whole, np.concatenate(pixels), grids, keep)
    behind = np.repeat(lengths, 2)[:, None] + np.arange(9)
    want = np.take_along_axis(want, behind[..., None], 1)
    got = np.asarray(network.unembed(params, config, got))
    assert np.abs(got - want).max() <= BAR * want.std()


def test_the_table_names_what_the_oracle_names():
    for seed in SEEDS:
        case = cases.draw(seed)
        config = read_config(case.config)
        assert {rule.key: rule.shape for rule in hf_table.rules(config)} == cases.shapes(case)
