"""log_probs.py: the learner's log-probabilities are the sampler's; rows do not see each other or their padding."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from cxr_jax.errors import UserError
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.inference import sampling
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl import config as sizes
from cxr_jax.training import log_probs
from cxr_jax.training import losses as training_losses
from cxr_jax.training import targets as training_targets
from cxr_jax.weights import pretrained

GRID, C = (1, 4, 4), 12
TEXTS = ["Find abnormalities and support devices.", "Edema?", "Find abnormalities."]


@pytest.fixture(scope="module")
def world():
    """A small untrained model on prompts of three lengths, with sharp logits so that tokens differ in probability."""
    tokenizer = tokenizers.load(pretrained.PHANTOM)
    text = dataclasses.replace(sizes.PHANTOM.text, num_hidden_layers=2)
    model_config = dataclasses.replace(sizes.PHANTOM, text=text, **tokenizers.config_ids(tokenizer))
    params = tiny_model.draw_params(model_config)
    params["text"]["embed"]["embedding"] *= 5.0
    shape = len(TEXTS), 4, model_config.text.hidden_size
    features = network.Seen(jax.random.normal(jax.random.key(1), shape))
    prompts = inference_prompts.Prompts(tokenizer, model_config, GRID, C, texts=TEXTS)
    special = tokenizers.special_ids(tokenizer, model_config.text.vocab_size)
    return types.SimpleNamespace(
        tokenizer=tokenizer,
        config=model_config,
        params=params,
        features=features,
        prompts=prompts,
        special=special,
    )


def suppress(w):
    return np.isin(np.arange(w.config.text.vocab_size), w.special["suppress"])


@functools.partial(jax.jit, static_argnames=("model_config", "temperature"))
def learner(params, model_config, features, prompts, tokens, mask, banned=None, temperature=1.0):
    return log_probs.completion_log_probs(
        params,
        model_config,
        features,
        prompts,
        tokens,
        mask,
        temperature=temperature,
        suppress=banned,
        chunk=16,
    )


def sample(w, n, temperature, stop=None):
    encoded = w.prompts.encode(TEXTS)
    out = sampling.generate(
        w.params,
        w.config,
        sampling.PromptBatch(
            encoded["ids"],
            encoded["lengths"],
            encoded["positions"][:, :, : w.prompts.width],
            w.features,
        ),
        sampling.SamplingSettings(
            n=n,
            max_new_tokens=C,
            temperature=temperature,
            stop_ids=stop or w.special["stop"],
            suppress_ids=w.special["suppress"],
        ),
        keys=sampling.row_keys(3, len(TEXTS) * n),
    )
    # What nobody asked for is None.
    out = {
        k: np.asarray(v).reshape(len(TEXTS), n, *v.shape[1:])
        for k, v in out.items()
        if v is not None
    }
    return encoded, out, np.arange(C) < out["lengths"][:, :, None]


@pytest.mark.parametrize(
    "n", [1, 3]
)  # 1: prompt and completion in one pass; 3: the prompt computed once
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_learner_agrees_with_the_sampler(world, n, temperature):
    stop = (*world.special["stop"], *range(200, 300))  # many, so that rows end early
    encoded, out, mask = sample(world, n, temperature, stop)
    assert len(set(out["lengths"].ravel())) > 1 and set(encoded["lengths"]) != {world.prompts.width}
    logp, entropy = learner(
        world.params,
        world.config,
        world.features,
        encoded,
        out["tokens"],
        mask,
        suppress(world),
        temperature,
    )
    assert logp.shape == entropy.shape == mask.shape
    np.testing.assert_allclose(
        np.where(mask, logp, 0), np.where(mask, out["logprobs"], 0), atol=1e-4
    )
    assert np.ptp(out["logprobs"][mask]) > 0.5 and (np.asarray(entropy)[mask] > 0).all()


@pytest.mark.parametrize("n", [1, 2])
def test_a_prompt_reads_the_same_alone(world, n):
    encoded, out, mask = sample(world, n, 1.0)
    together, _ = learner(world.params, world.config, world.features, encoded, out["tokens"], mask)
    for i, text in enumerate(TEXTS):
        alone = inference_prompts.Prompts(world.tokenizer, world.config, GRID, C, texts=[text])
        got, _ = learner(
            world.params,
            world.config,
            network.Seen(world.features.tokens[i : i + 1]),
            alone.encode([text]),
            out["tokens"][i : i + 1],
            mask[i : i + 1],
        )
        np.testing.assert_allclose(
            np.where(mask[i], got[0], 0), np.where(mask[i], together[i], 0), atol=1e-5
        )


@pytest.mark.parametrize("n", [1, 2])
def test_tokens_after_the_end_and_prompt_padding_do_not_matter(world, n):
    encoded, out, _ = sample(world, n, 1.0)
    mask = np.broadcast_to(np.arange(C) < 5, out["tokens"].shape)
    other = np.where(mask, out["tokens"], 77)
    inside = np.arange(world.prompts.width) < encoded["lengths"][:, None]
    padded = {**encoded, "ids": np.where(inside, encoded["ids"], 9)}
    a, _ = learner(world.params, world.config, world.features, encoded, out["tokens"], mask)
    b, _ = learner(world.params, world.config, world.features, padded, other, mask)
    assert np.array_equal(np.asarray(a)[mask], np.asarray(b)[mask])


def test_sharing_a_prompt_changes_neither_values_nor_gradients(world):
    encoded, out, mask = sample(world, 2, 1.0)

    def loss(params, features, encoded, tokens, mask):
        logp, entropy = log_probs.completion_log_probs(
            params, world.config, features, encoded, tokens, mask
        )
        return jnp.sum(jnp.where(mask, logp + 0.1 * entropy, 0.0))

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    shared, shared_grad = grad(world.params, world.features, encoded, out["tokens"], mask)
    rows = {k: np.repeat(v, 2, axis=1 if k == "positions" else 0) for k, v in encoded.items()}
    flat = lambda x: x.reshape(-1, 1, C)
    plain, plain_grad = grad(
        world.params,
        network.Seen(jnp.repeat(world.features.tokens, 2, 0)),
        rows,
        flat(out["tokens"]),
        flat(mask),
    )
    assert shared == pytest.approx(float(plain), rel=1e-5)
    scale = lambda x: 1e-4 * float(np.abs(x).max()) + 1e-7
    for a, b in zip(jax.tree.leaves(shared_grad[0]), jax.tree.leaves(plain_grad[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=scale(b))
    own = plain_grad[1].tokens
    summed = own.reshape(len(TEXTS), 2, *own.shape[1:]).sum(1)
    np.testing.assert_allclose(shared_grad[1].tokens, summed, atol=scale(summed))


def sft_batch(world):
    answers = ["<answer>Edema</answer>", "No.", "<answer>No Finding</answer>"]
    made = training_targets.Completions(world.tokenizer, C).encode(answers)
    return {**made, "prompts": world.prompts.encode(TEXTS)}


def test_sft_trains_on_completion_tokens_only(world, monkeypatch):
    """The targets that reach the loss are the completions: no prompt token is ever a target."""
    batch, seen = sft_batch(world), []
    real = training_losses.token_log_probs

    def spy(hidden, head, targets, **options):
        seen.append(np.asarray(targets))
        return real(hidden, head, targets, **options)

    monkeypatch.setattr(log_probs, "token_log_probs", spy)
    run = jax.jit(
        lambda params: log_probs.completion_loss(
            params, world.config, world.features, batch, batch["mask"].sum()
        )
    )
    loss, probability = run(world.params)
    assert len(seen) == 1 and np.array_equal(seen[0], batch["completions"].ravel())

    # The same by the plain way: logits of whole rows, only those that precede a completion token.
    lengths, own = batch["prompts"]["lengths"], batch["mask"].sum(1)
    ids = np.full((3, world.prompts.width + C), world.prompts.pad)
    for i, (n, m) in enumerate(zip(lengths, own, strict=True)):
        ids[i, : n + m] = [*batch["prompts"]["ids"][i, :n], *batch["completions"][i, :m]]
    mask = np.arange(ids.shape[1]) < (lengths + own)[:, None]
    where = network.positions(world.config, ids, [GRID] * 3, mask)
    hidden = jax.jit(network.hidden_states, static_argnums=1)(
        world.params, world.config, ids, mask, where, features=world.features
    )
    logp = jax.nn.log_softmax(network.unembed(world.params, world.config, hidden))
    chosen = np.take_along_axis(np.asarray(logp)[:, :-1], ids[:, 1:, None], axis=2)[:, :, 0]
    trained = mask[:, 1:] & (np.arange(1, ids.shape[1]) >= lengths[:, None])
    assert (
        float(loss) == pytest.approx(-chosen[trained].mean(), abs=1e-4)
        and 0 < float(probability) < 1
    )


def test_sft_ends_with_the_end_of_the_turn(world):
    batch = sft_batch(world)
    last = batch["completions"][np.arange(3), batch["mask"].sum(1) - 1]
    assert (last == world.tokenizer.get_vocab()["<|im_end|>"]).all()


def test_prompts(world):
    encoded = world.prompts.encode(TEXTS)
    assert encoded["ids"].dtype == encoded["positions"].dtype == np.int32
    assert encoded["positions"].shape == (3, len(TEXTS), world.prompts.width + C)
    for i, n in enumerate(encoded["lengths"]):
        ids = encoded["ids"][i]
        assert (ids == world.config.image_token_id).sum() == 4 and (
            ids[n:] == world.prompts.pad
        ).all()
        # Completion tokens go on one by one from the largest prompt position, the same on all three axes.
        where = encoded["positions"][:, i]
        assert np.array_equal(
            where[:, n : n + C], where[:, :n].max() + 1 + np.broadcast_to(np.arange(C), (3, C))
        )
    with pytest.raises(UserError, match="does not fit"):
        world.prompts.encode(["A much longer prompt than the others. " * 5])


def test_a_prompt_that_holds_an_image_mark_of_its_own_is_refused(world):
    with pytest.raises(UserError, match="image placeholder"):
        inference_prompts.Prompts(
            world.tokenizer, world.config, GRID, C, texts=["What is <|image_pad|>?"]
        )
