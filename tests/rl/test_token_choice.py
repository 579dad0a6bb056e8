"""Whole RL steps whose rollouts narrow or bend what they draw from: what the learner knows of it, by plain numpy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model

from cxr_jax.config.sections import RunConfig
from cxr_jax.data import prompts as data_prompts
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.labels import answers
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.image_batches import SquareImages
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
from cxr_jax.rewards import TERMS
from cxr_jax.rl import learner, rollout
from cxr_jax.training import optimizer
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import pretrained
from experiments import rl as experiment

SIDE, GRID, P, G, C = 56, (1, 4, 4), 2, 4, 10
TEMPERATURE, RATE = 1.5, 1e-3


@pytest.fixture(scope="module")
def world():
    """A small untrained model that likes some tokens, a batch of prompts, and the learner of all tests."""
    tokenizer = tokenizers.load(pretrained.PHANTOM)
    w = types.SimpleNamespace(tokenizer=tokenizer)
    w.config = tiny_model.small_phantom(tokenizer)
    w.params = tiny_model.draw_params(w.config)
    w.params["text"]["embed"]["embedding"] *= 16.0
    w.special = tokenizers.special_ids(tokenizer, w.config.text.vocab_size)
    w.images = SquareImages(model_config=w.config, grid=GRID)
    prompts = inference_prompts.Prompts(tokenizer, w.config, GRID, C)
    rng = np.random.default_rng(0)
    solution = rng.random((P, 14)) < 0.3
    w.batch = {
        "image": rng.random((P, SIDE, SIDE)).astype(np.float32),
        "prompts": prompts.encode([data_prompts.FIND_PROMPT] * P),
        "solution": solution,
        "known": np.ones_like(solution),
        "hedged": np.zeros_like(solution),
        "sides": np.zeros((P, 14, 2), bool),
    }
    settings = settings_of()
    w.trainable = Trainable.create(settings.lora, (), settings.dtype, settings.param_dtype)
    w.logits = jax.jit(lambda params, tokens: logits_of(w, params, tokens))
    descent = optax.sgd(RATE)
    learn = learner.make_learn(
        settings.learner,
        settings.loss,
        w.config,
        w.images,
        w.special,
        descent,
        w.trainable,
        max_completion=C,
        remat=settings.remat,
    )

    def step(samples):
        state = optimizer.init_state(descent, {"model": jax.tree.map(jnp.array, w.params)})
        return learn(state, {}, w.batch, samples)

    w.learn = step
    return w


def settings_of(**choice):
    config = experiment.get_config()
    config.max_completion = C
    config.rl.update(prompts_per_step=P, oversample=1, group_size=G, temperature=TEMPERATURE)
    # Of rows that are cut off at so few tokens only those that a text has ended are finished.
    config.rl.update(sampler_correction="tis", sampler_cap=1.5, mask_truncated="stop" in choice)
    config.rl.update(choice)
    return RunConfig.from_config(config)


def logits_of(w, params, tokens):
    """Raw logits [P * G, C, V] that each token of the completions was drawn from, by whole rows without a cache."""
    prompts = w.batch["prompts"]
    width = prompts["ids"].shape[1]
    lengths = jnp.repeat(jnp.asarray(prompts["lengths"]), G)
    where = lengths[:, None] + jnp.arange(C)
    ids = jnp.pad(jnp.repeat(jnp.asarray(prompts["ids"]), G, 0), ((0, 0), (0, C)))
    ids = ids.at[jnp.arange(P * G)[:, None], where].set(tokens.reshape(P * G, C))
    features = network.vision(params, w.config, PROCESSOR.patchify(w.batch["image"]), GRID)
    features = jax.tree.map(lambda leaf: jnp.repeat(leaf, G, 0), features)
    positions = jnp.repeat(jnp.asarray(prompts["positions"]), G, 1)
    mask = jnp.arange(width + C) < lengths[:, None] + C
    hidden = network.hidden_states(params, w.config, ids, mask, positions, features=features)
    logits = network.unembed(params, w.config, hidden)
    return jnp.take_along_axis(logits, where[..., None] - 1, 1)


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def drawn_from(logits, seen, rl):
    """Log-probs [V] of what one token is drawn from, in transformers' order; -inf for what is ruled out."""
    penalized = np.where(logits > 0, logits / rl.repetition_penalty, logits * rl.repetition_penalty)
    scaled = np.where(seen, penalized, logits) / rl.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: rl.top_k or len(order)]
    probabilities = np.exp(log_softmax(scaled[kept]))
    kept = kept[np.cumsum(probabilities) - probabilities < rl.top_p]
    probabilities = np.exp(log_softmax(scaled[kept]))
    kept = kept[probabilities >= rl.min_p * probabilities.max()]
    log_probs = np.full(len(logits), -np.inf)
    log_probs[kept] = log_softmax(scaled[kept])
    return log_probs


def length_of(w, tokens, stop):
    """(length, whether it is finished) of a row, by decoding its beginnings one by one."""
    for count in range(1, C + 1):
        text = w.tokenizer.decode(tokens[:count], skip_special_tokens=True)
        if tokens[count - 1] in w.special["stop"] or any(end in text for end in stop):
            return count, True
    return C, False


def rewarded(self, batch, completions):
    """Rewards that vary, in place of those of texts, which take seconds to compile."""
    tokens = completions["tokens"]
    terms = dict.fromkeys(TERMS, (tokens % 7).mean(1))
    return {"answer": jnp.zeros((len(tokens), 14), bool)}, terms


def sampled(w, settings):
    program = rollout.make_rollout(
        settings.rollout,
        w.config,
        w.images,
        w.special,
        answers.TokenBytes.from_tokenizer(w.tokenizer),
        w.trainable,
        None,
        seed=1,
        max_completion=C,
    )
    samples = program({"model": w.params}, {}, w.batch, 0)
    return jax.tree.map(np.asarray, samples)


@pytest.mark.parametrize(
    "choice",
    [
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.3},
        {
            "top_k": 40,
            "top_p": 0.9,
            "min_p": 0.02,
            "repetition_penalty": 1.2,
            "stop": ("in", "e c", "\u00e9"),
        },
    ],
    ids=lambda choice: "+".join(choice),
)
def test_a_step_learns_from_what_it_drew(world, choice, monkeypatch):
    w, settings = world, settings_of(**choice)
    rl, loss = settings.rollout, settings.loss
    monkeypatch.setattr(rollout._Rollout, "score", rewarded)
    samples = sampled(w, settings)
    tokens, lengths = (samples[name].reshape(P * G, -1) for name in ("tokens", "lengths"))

    # ---- Every token: what it was drawn from, that it was the draw, and what ends its row ----
    logits = np.asarray(w.logits(w.params, samples["tokens"]), np.float64)
    logits[..., list(w.special["suppress"])] = -1e30
    keys = rollout.sampling_keys(1, 0, P, G)
    ids, prompt_lengths = (w.batch["prompts"][name] for name in ("ids", "lengths"))
    of_sampler, of_learner = np.zeros((2, P * G, C))
    for row in range(P * G):
        seen = np.zeros(logits.shape[-1], bool)
        seen[ids[row // G, : prompt_lengths[row // G]]] = True
        for place in range(lengths[row, 0]):
            token, raw = tokens[row, place], logits[row, place]
            log_probs = drawn_from(raw, seen, rl)
            noise = jax.random.gumbel(jax.random.fold_in(keys[row], place), raw.shape)
            assert token == np.argmax(log_probs + noise)
            of_sampler[row, place] = log_probs[token]
            of_learner[row, place] = log_softmax(raw / rl.temperature)[token]
            seen[token] = True
        want = length_of(w, tokens[row], rl.stop)
        assert (lengths[row, 0], samples["finished"].reshape(-1)[row]) == want
    np.testing.assert_allclose(
        samples["sampler_log_probs"].reshape(P * G, C), of_sampler, atol=2e-5
    )

    # ---- The learner: weights of what was cut off, in the loss and in its gradient ----
    mask = np.arange(C) < lengths
    weights = np.minimum(np.exp(of_learner - of_sampler), loss.sampler_cap)
    advantages = samples["advantages"].reshape(-1, 1)
    trained = samples["train_mask"].reshape(P * G, C)
    finished = samples["finished"].reshape(-1, 1)
    assert finished.any() == ("stop" in choice)
    assert (trained == mask & (finished | ("stop" not in choice))).all() and trained.any()

    def surrogate(log_probs):
        """Whose gradient the step follows: weights are numbers in it."""
        return -(weights * advantages * log_probs)[trained].sum() / trained.sum()

    state, metrics = w.learn(samples)
    gap = np.abs(of_sampler - of_learner)[mask]
    assert gap.mean() > 0.01  # what was drawn from is not what is learned from
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(gap.mean(), rel=1e-3)
    assert metrics["loss"] == pytest.approx(
        -(weights * advantages)[trained].sum() / trained.sum(), abs=1e-5
    )
    moved = np.asarray(w.logits(state["params"]["model"], samples["tokens"]), np.float64)
    moved[..., list(w.special["suppress"])] = -1e30
    after = np.zeros((P * G, C))
    for row, place in np.argwhere(mask):
        after[row, place] = log_softmax(moved[row, place] / rl.temperature)[tokens[row, place]]
    gained = surrogate(of_learner) - surrogate(after)
    assert gained == pytest.approx(RATE * float(metrics["grad_norm"]) ** 2, rel=0.02)
