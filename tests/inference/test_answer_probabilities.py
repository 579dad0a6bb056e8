"""The probability of each finding, against enumeration of all answers and counts of sampled ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from answer_oracle import FORMAT, NAMES, PHANTOM_CFG, STOP, Oracle

from cxr_jax.errors import UserError
from cxr_jax.inference import (
    answer_probabilities,
    answer_rules,
    constrained,
    sampling,
    token_choice,
)
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.models import network
from cxr_jax.models.network.config import Config

# A small vocabulary, so that all answers can be enumerated.
PIECES = [
    b"",
    b"",
    b"<think>",
    b"</think>",
    b"<answer>",
    b"</answer>",
    b"No Finding",
    b"Edema",
    b"Eddy",
    b"Support Devices",
    b", ",
    b"Ed",
    b"ema",
    b"dy",
    b", Ed",
    b"ma</answer>",
    b"e",
    b"x",
    b"</think><answer>",
    b"</think><answer>Ed",
    b"<answer>Support",
    b" Devices",
]
SMALL = PHANTOM_CFG.text.__class__(
    **{**PHANTOM_CFG.text.__dict__, "vocab_size": 24, "num_hidden_layers": 2}
)
CFG = Config(
    **{
        **PHANTOM_CFG.__dict__,
        "text": SMALL,
        "image_token_id": 22,
        "video_token_id": 23,
        "vision_start_token_id": 22,
        "vision_end_token_id": 23,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": (0,),
    }
)
PROMPTS, LENGTHS = np.array([[17, 16, 13, 17, 9], [12, 17, 8, 0, 0]], np.int32), np.array([5, 3])
TRACES = [
    [2, 17, 16, 17, 3, 4, 7, 5, 0],
    [2, 3, 18, 8],
    [2, 16, 16, 17, 19, 12, 15, 0],
    [2, 13, 17],
]
DEPTH = 18


@pytest.fixture(scope="module")
def small():
    params = tiny_model.draw_params(CFG, 1)
    params["text"]["embed"]["embedding"] *= 12
    c = answer_rules.compile_answers(
        TokenBytes.from_pieces(PIECES),
        24,
        [STOP],
        max_new_tokens=64,
        names=NAMES,
        separators=(b"",),
        suppress_ids=(1, 22, 23),
    )
    return params, c


def padded(rows):
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens_of in zip(tokens, rows, strict=True):
        row[: len(tokens_of)] = tokens_of
    return tokens, np.array([len(r) for r in rows])


def probabilities(small, keys=None, **kw):
    params, c = small
    tokens, lengths = padded(TRACES)
    out = answer_probabilities.finding_probabilities(
        params,
        CFG,
        sampling.PromptBatch(
            PROMPTS, LENGTHS, network.positions(CFG, PROMPTS, None, np.arange(5) < LENGTHS[:, None])
        ),
        answer_probabilities.Traces(tokens, lengths),
        c,
        answer_probabilities.ExpansionSettings(**{"answer_tokens": DEPTH, "tolerance": 1e-7, **kw}),
        keys=keys,
    )
    return {k: np.asarray(v) for k, v in out.items()}


def test_the_trace_ends_before_the_list_begins(small):
    _, c = small
    extra = [
        *TRACES,
        [7, 5],
        [2, 17, 3, 17, 4, 7],
        [2, 17, 4, 7],
        [2, 17, 3, 20, 21],
        [2, 17, 18, 6],
    ]
    count, state = c.trace(*map(jnp.asarray, padded(extra)))
    # <answer> itself is left out: a token might hold it with the first letters of the list.
    assert np.asarray(count).tolist() == [5, 2, 4, 3, 0, 3, 2, 3, 2]
    for at, tokens in zip(np.asarray(state.at), extra, strict=True):
        one = constrained.State(jnp.array([at]), jnp.zeros(1, jnp.int32), jnp.array([DEPTH]))
        next_ = {PIECES[i] for i in np.flatnonzero(np.asarray(c.allowed(one))[0])}
        after_think = {b"<answer>", b"<answer>Support"}
        assert next_ in (after_think, {b"</think>", b"</think><answer>", b"</think><answer>Ed"}), (
            tokens
        )
        assert (next_ == after_think) == (3 in tokens)


ROOM, WIDTH = 128, 28  # one shape for all forward passes


def scored(params, rows):
    """Logits [rows, V] after each token sequence."""
    out = []
    for start in range(0, len(rows), ROOM):
        ids, length = padded(rows[start : start + ROOM])
        full = np.zeros((ROOM, WIDTH), np.int32)
        full[: len(ids), : ids.shape[1]] = ids
        got = _last_logits(params, full, np.pad(length, (0, ROOM - len(length)), constant_values=1))
        out.append(np.asarray(got, np.float64)[: len(ids)])
    return np.concatenate(out)


@jax.jit
def _last_logits(params, ids, length):
    mask = jnp.arange(WIDTH)[None] < length[:, None]
    positions = jnp.broadcast_to(jnp.arange(WIDTH), (3, *ids.shape))
    hidden = network.hidden_states(params, CFG, ids, mask, positions)
    return network.unembed(
        params, CFG, jnp.take_along_axis(hidden, (length - 1)[:, None, None], 1)[:, 0]
    )


def enumerate_answers(params, prefix, lead, rules, depth):
    """{list: probability} by walking every token sequence, each scored by a full forward pass."""
    open_, out = [((), b"", 1.0)], {}
    for left in range(depth, 0, -1):
        logits = scored(params, [[*prefix, *tokens] for tokens, _, _ in open_])
        grown = []
        for (tokens, text, p), row in zip(open_, logits, strict=True):
            ok = [i for i, piece in enumerate(PIECES) if piece and rules(text + piece, left - 1)]
            weight = np.exp(row[ok] - row[ok].max())
            for i, w in zip(ok, weight / weight.sum(), strict=True):
                new = text + PIECES[i]
                if new.endswith(b"</answer>"):
                    out[new[len(lead) :]] = out.get(new[len(lead) :], 0) + p * w
                else:
                    grown.append(((*tokens, i), new, p * w))
        open_ = [x for x in grown if x[2] > 1e-9]
        if not open_:
            break
    return out


def exact(small):
    """float [4, names] by enumeration of all answers to all traces."""
    params, _ = small
    oracle = Oracle(PIECES, "devices", True, (b"",), 0)
    rows = []
    for i, (tokens, count) in enumerate(zip(TRACES, (5, 2, 4, 3), strict=True)):
        prefix = [*PROMPTS[i // 2, : LENGTHS[i // 2]], *tokens[:count]]
        lead = b"<answer>" if 3 in tokens[:count] else b"</think><answer>"
        before = b"<think></think>" if 3 in tokens[:count] else b"<think>"

        def rules(text, left, lead=lead, before=before):
            whole = lead.startswith(text[: len(lead)])
            return whole and oracle.need(before + text) <= left

        answers = enumerate_answers(params, prefix, lead, rules, DEPTH)
        assert abs(sum(answers.values()) - 1) < 1e-6
        named = lambda t: np.array([n in t.decode() for n in NAMES])
        rows.append(sum(p * named(t) for t, p in answers.items()))
    return np.array(rows)


@pytest.fixture(scope="module")
def truth(small):
    return exact(small)


def test_probabilities_equal_the_enumeration_of_all_answers(small, truth):
    got = probabilities(small, width=256)
    np.testing.assert_allclose(got["trace"].reshape(4, -1), truth, atol=2e-5)
    np.testing.assert_allclose(got["exact_mass"], 1, atol=1e-5)
    np.testing.assert_allclose(got["mean"], truth.reshape(2, 2, -1).mean(1), atol=2e-5)
    early = probabilities(small, width=256, tolerance=0.02)
    assert (early["exact_mass"] < got["exact_mass"]).all() and (
        early["exact_mass"] >= 0.98 - 1e-6
    ).all()
    error = np.abs(early["trace"].reshape(4, -1) - truth).max(1)
    assert (error <= 1 - early["exact_mass"].reshape(-1) + 1e-5).all()
    assert (
        truth.std(0).max() > 0.05 and 0.05 < truth.mean() < 0.95
    )  # traces differ, nothing is decided


@pytest.mark.slow
def test_a_narrow_expansion_is_unbiased_and_bounded(small, truth):
    draws = []
    for seed in range(60):
        got = probabilities(small, width=4, keys=sampling.row_keys(seed, 4))
        p = got["trace"].reshape(4, -1)
        assert (p >= 0).all() and (p <= 1).all()
        assert (np.abs(p - truth).max(1) <= 1 - got["exact_mass"].reshape(-1) + 1e-5).all()
        draws.append(p)
    error = np.mean(draws, 0) - truth
    spread = np.std(draws, 0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(error) <= 4.5 * spread + 1e-4).all()
    assert np.max(spread) > 0  # width 4 is really too narrow here


class Started(NamedTuple):
    """The constraint from a given place on: brute force samples answers to one trace through `generate`."""

    rules: constrained.Constraint
    at: jax.Array

    def init(self, rows):
        start = self.rules.init(rows)
        return start._replace(at=jnp.full(rows, self.at), left=jnp.full(rows, DEPTH))

    def allowed(self, state):
        return self.rules.allowed(state)

    def advance(self, state, token):
        return self.rules.advance(state, token)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_probabilities_match_counts_of_sampled_answers(small, temperature):
    params, c = small
    got = probabilities(small, width=256, temperature=temperature)["trace"].reshape(4, -1)
    count, state = c.trace(*map(jnp.asarray, padded(TRACES)))
    K = 1500
    for i in (0, 2):
        prefix, length = padded(
            [[*PROMPTS[i // 2, : LENGTHS[i // 2]], *TRACES[i][: int(count[i])]]]
        )
        prefix = np.pad(prefix, ((0, 0), (0, 10 - length[0])))
        lead = "<think>" + "</think>" * (3 in TRACES[i][: int(count[i])])
        out = sampling.generate(
            params,
            CFG,
            sampling.PromptBatch(prefix, length, network.positions(CFG, prefix, None)),
            sampling.SamplingSettings(
                n=K,
                max_new_tokens=DEPTH,
                temperature=temperature,
                stop_ids=(STOP,),
                suppress_ids=(1, 22, 23),
            ),
            keys=sampling.row_keys(9, K),
            constraint=Started(c, state.at[i]),
        )
        texts = [
            lead.encode() + b"".join(PIECES[t] for t in row) for row in np.asarray(out["tokens"])
        ]
        named = np.array([[n in FORMAT.match(t.decode()).group(1) for n in NAMES] for t in texts])
        error = np.sqrt(got[i] * (1 - got[i]) / K)
        assert (np.abs(named.mean(0) - got[i]) <= 4.5 * error + 2e-3).all()


def test_resampling_keeps_mass_and_expectation():
    rng = np.random.default_rng(0)
    w = rng.exponential(size=(3, 40)).astype(np.float32) ** 4
    w[1, 6:] = 0
    w /= w.sum(1, keepdims=True)
    draw = jax.jit(token_choice.resample, static_argnums=1)
    u = np.linspace(0, 1, 1001, dtype=np.float32)[:-1]
    for row in w:
        index, weight, kept = map(np.asarray, draw(np.tile(row, (len(u), 1)), 8, u))
        np.testing.assert_allclose(weight.sum(1), 1, atol=1e-5)
        dense = np.zeros((len(u), 40))
        np.put_along_axis(dense, index, weight, 1)
        np.testing.assert_allclose(dense.mean(0), row, atol=3e-3)
        held = np.where(kept, np.take(row, index), weight)
        np.testing.assert_array_equal(held, weight)
    assert kept.any() and not kept.all()
    index, weight, kept = map(np.asarray, draw(w[1:2], 8, u[:1]))
    np.testing.assert_array_equal(
        np.sort(weight[0])[2:], np.sort(w[1, :6])
    )  # six branches: all kept as they are
    assert kept[0][weight[0] > 0].all()


def test_answer_tokens_must_leave_room_for_an_answer(small):
    with pytest.raises(UserError, match="answer_tokens=2"):
        probabilities(small, answer_tokens=2)
