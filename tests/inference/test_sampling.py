"""Sampling: equal to recomputing from scratch, independent of the batch, reproducible, with true log-probs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from compile_counts import compiled

from cxr_jax.config.sections import PolicyLossConfig
from cxr_jax.inference import sampling, token_choice
from cxr_jax.models import network
from cxr_jax.rl import losses

CFG = tiny_model.config()
V = CFG.text.vocab_size
GRID, N_IMAGE, T, N = (1, 4, 4), 4, 16, 12


@pytest.fixture(scope="module")
def params():
    p = tiny_model.draw_params(CFG, seed=1)
    # Larger embeddings: a peaked distribution, so that a wrong key or position changes tokens.
    p["text"]["embed"]["embedding"] = p["text"]["embed"]["embedding"] * 25
    return p


def batch(rows: int):
    """Rows of different lengths, each with an image."""
    rng = np.random.default_rng(3)
    ids, lengths = np.zeros((rows, T), np.int32), np.zeros(rows, np.int32)
    for b in range(rows):
        text = rng.integers(7, V, 3 + b % 5)
        row = [3, *[5] * N_IMAGE, 4, *text]
        ids[b, : len(row)], lengths[b] = row, len(row)
    mask = np.arange(T) < lengths[:, None]
    features = rng.standard_normal((rows, N_IMAGE, 32)).astype(np.float32)
    return {
        "input_ids": ids,
        "lengths": lengths,
        "image_features": network.Seen(features),
        "positions": network.positions(CFG, ids, GRID, mask),
    }


def pick(b, rows):
    return {
        k: v[:, rows] if k == "positions" else jax.tree.map(lambda x: x[rows], v)
        for k, v in b.items()
    }


def repeated(tree, n):
    return jax.tree.map(lambda x: np.repeat(x, n, 0), tree)


def run(params, b, **kw):
    kw = {"n": 1, "max_new_tokens": N, "temperature": 1.0, **kw}
    rest = {name: kw.pop(name) for name in ("keys", "constraint", "dtype") if name in kw}
    out = sampling.generate(
        params, CFG, sampling.PromptBatch(**b), sampling.SamplingSettings(**kw), **rest
    )
    return {k: np.asarray(v) for k, v in out.items()}


@jax.jit
def all_logits(params, ids, positions, mask, features):
    return network.unembed(
        params, CFG, network.hidden_states(params, CFG, ids, mask, positions, features=features)
    )


def rescored(params, b, out, n: int):
    """Raw logits [R, N, V] of the sampled tokens by a full forward without a cache."""
    tokens, R = out["tokens"], len(out["tokens"])
    lengths = np.repeat(b["lengths"], n)
    ids = np.concatenate([np.repeat(b["input_ids"], n, 0), np.zeros((R, N), np.int32)], 1)
    where = lengths[:, None] + np.arange(N)
    np.put_along_axis(ids, where, tokens, 1)
    mask = np.arange(T + N) < (lengths + out["lengths"])[:, None]
    # Padding after the end reads as text; grids are as in the prompt.
    positions = network.positions(CFG, ids, GRID, mask)
    logits = np.asarray(all_logits(params, ids, positions, mask, repeated(b["image_features"], n)))
    return np.take_along_axis(logits, where[..., None] - 1, 1)


def log_softmax(x):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(x), -1))


def suppressed(logits, ids):
    logits = logits.copy()
    logits[..., list(ids)] = -np.inf
    return logits


def test_sampled_logprobs_equal_a_full_forward(params):
    b, n, temperature = batch(3), 4, 0.7
    out = run(params, b, n=n, temperature=temperature, keys=sampling.row_keys(1, 12))
    want = log_softmax(suppressed(rescored(params, b, out, n), CFG.media_token_ids) / temperature)
    want = np.take_along_axis(want, out["tokens"][..., None], -1)[..., 0]
    live = np.arange(N) < out["lengths"][:, None]
    np.testing.assert_allclose(out["logprobs"][live], want[live], atol=2e-5)
    assert (out["logprobs"][~live] == 0).all() and (out["tokens"][~live] == CFG.pad_token_id).all()


def test_tokens_are_gumbel_argmax_of_their_own_key(params):
    """The documented recipe, recomputed: token t of row r draws with fold_in(keys[r], t)."""
    b, n = batch(2), 2
    keys = sampling.row_keys(5, 4)
    out = run(params, b, n=n, keys=keys)
    logits = suppressed(rescored(params, b, out, n), CFG.media_token_ids)
    for r in range(4):
        for t in range(out["lengths"][r]):
            noise = np.asarray(jax.random.gumbel(jax.random.fold_in(keys[r], t), (V,)))
            assert out["tokens"][r, t] == (logits[r, t] + noise).argmax()


def test_a_row_does_not_depend_on_its_company(params):
    b = batch(5)
    keys = sampling.row_keys(2, 5)
    together = run(params, b, keys=keys)
    for r in (0, 3):
        alone = run(params, pick(b, [r]), keys=keys[r : r + 1])
        np.testing.assert_array_equal(alone["tokens"][0], together["tokens"][r])
        np.testing.assert_allclose(alone["logprobs"][0], together["logprobs"][r], atol=1e-5)
    order = [4, 2, 0, 1, 3]
    shuffled = run(params, pick(b, order), keys=keys[np.array(order)])
    np.testing.assert_array_equal(shuffled["tokens"], together["tokens"][order])


def test_padding_of_the_prompt_changes_nothing(params):
    b = batch(2)
    keys = sampling.row_keys(2, 2)
    wide = {
        **b,
        "input_ids": np.pad(b["input_ids"], ((0, 0), (0, 9))),
        "positions": np.pad(b["positions"], ((0, 0), (0, 0), (0, 9))),
    }
    np.testing.assert_array_equal(
        run(params, b, keys=keys)["tokens"], run(params, wide, keys=keys)["tokens"]
    )


def test_more_room_continues_the_same_text(params):
    b, keys = batch(3), sampling.row_keys(4, 3)
    short, long = (run(params, b, keys=keys, max_new_tokens=k) for k in (5, N))
    np.testing.assert_array_equal(short["tokens"], long["tokens"][:, :5])


def test_same_keys_same_tokens_and_samples_differ(params):
    b = batch(2)
    first, again, other = (
        run(params, b, n=3, keys=sampling.row_keys(s, 6))["tokens"] for s in (7, 7, 8)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len({tuple(row) for row in first[:3].tolist()}) == 3


def test_stop_ends_a_row_and_the_loop(params):
    b = batch(2)
    free = run(params, b, temperature=0, stop_ids=())
    assert (free["lengths"] == N).all() and not free["finished"].any()
    stop = int(free["tokens"][0, 3])
    first = [
        int(np.flatnonzero(row == stop)[0]) + 1 if stop in row else N for row in free["tokens"]
    ]
    out = run(params, b, temperature=0, stop_ids=(stop, 2))
    assert out["lengths"][0] == first[0] and out["finished"][0]
    for row, length in enumerate(first):
        np.testing.assert_array_equal(out["tokens"][row, :length], free["tokens"][row, :length])
        assert (out["tokens"][row, length:] == CFG.pad_token_id).all()
    assert out["finished"].tolist() == [stop in row for row in free["tokens"]]


def test_media_tokens_are_never_sampled(params):
    # An embedding that all hidden states like: without suppression the image token would win every time.
    hot = jax.tree.map(lambda x: x, params)
    table = hot["text"]["embed"]["embedding"]
    hot["text"] = {
        **hot["text"],
        "embed": {
            "embedding": np.concatenate(
                [table[:5], 40 * table[7:].mean(0, keepdims=True), table[6:]]
            )
        },
    }
    b = batch(3)
    free = run(hot, b, temperature=0, suppress_ids=(), stop_ids=())
    kept = run(hot, b, temperature=0, stop_ids=())
    assert not np.isin(kept["tokens"], CFG.media_token_ids).any()
    assert free["tokens"].shape == kept["tokens"].shape
    banned = tuple(range(V - 2))
    out = run(params, b, keys=sampling.row_keys(0, 3), suppress_ids=banned, stop_ids=())
    assert set(np.unique(out["tokens"])) <= {V - 2, V - 1}


def test_greedy_logprob_is_of_the_raw_logits(params):
    b = batch(2)
    out = run(params, b, temperature=0.0, suppress_ids=())
    logits = rescored(params, b, out, 1)
    live = np.arange(N) < out["lengths"][:, None]
    np.testing.assert_array_equal(logits.argmax(-1)[live], out["tokens"][live])
    np.testing.assert_allclose(log_softmax(logits).max(-1)[live], out["logprobs"][live], atol=2e-5)


def test_sampled_frequencies_follow_the_distribution(params):
    """First tokens of 4000 samples against the exact probabilities: chi-square with a wide margin."""
    b, n = pick(batch(1), [0]), 4000
    out = run(
        params,
        b,
        n=n,
        max_new_tokens=1,
        keys=sampling.row_keys(11, n),
        temperature=2.0,
        stop_ids=(),
    )
    one = {
        **out,
        "tokens": np.pad(out["tokens"][:1], ((0, 0), (0, N - 1))),
        "lengths": np.array([1]),
    }
    p = np.exp(
        log_softmax(suppressed(rescored(params, b, one, 1)[0, 0], CFG.media_token_ids) / 2.0)
    )
    seen = np.bincount(out["tokens"][:, 0], minlength=V)
    likely = p * n >= 5
    chi2 = (((seen - n * p) ** 2)[likely] / (n * p[likely])).sum()
    assert seen[p == 0].sum() == 0
    assert chi2 < likely.sum() + 5 * np.sqrt(2 * likely.sum())


@pytest.mark.parametrize(("k", "p"), [(3, None), (None, 0.6)])
def test_top_k_and_top_p_cut_the_tail(k, p):
    logits = jax.random.normal(jax.random.key(0), (1, V)) * 2
    order = np.argsort(-np.asarray(logits[0]))
    probs = np.exp(log_softmax(logits))[0, order]
    inside = order[:k] if k else order[: int((np.cumsum(probs) - probs < p).sum())]
    draw = jax.jit(
        lambda key: token_choice.pick(
            jnp.repeat(logits, 500, 0),
            jax.random.split(key, 500),
            0,
            temperature=1.0,
            greedy=False,
            top_k=k,
            top_p=p,
        )
    )
    tokens, logprobs = draw(jax.random.key(1))
    assert set(np.unique(tokens)) == set(inside.tolist())
    np.testing.assert_allclose(logprobs, log_softmax(logits)[0][np.asarray(tokens)], atol=1e-5)
    cut = token_choice.keep_top_k(logits, k) if k else token_choice.keep_top_p(logits, p)
    traced = jax.jit(token_choice.keep_top_k if k else token_choice.keep_top_p)(
        logits, k or np.float32(p)
    )
    np.testing.assert_array_equal(cut, traced)
    assert set(np.flatnonzero(np.asarray(cut[0]) > -1e29)) == set(inside.tolist())


def test_group_forward_equals_separate_rows(params):
    """decode_group: values and gradients of prompts computed once equal those of repeated rows."""
    b, n, C = batch(2), 3, 5
    rng = np.random.default_rng(0)
    own = rng.standard_normal((2 * n, C, 32)).astype(np.float32)
    lengths = np.repeat(b["lengths"], n)
    where = lengths[:, None] + np.arange(C)
    start = np.repeat(
        np.asarray(network.next_positions(jnp.asarray(b["positions"]), b["lengths"])), n
    )
    own_positions = np.broadcast_to((start[:, None] + np.arange(C))[None], (3, 2 * n, C))
    positions = np.zeros((3, 2 * n, T + C), np.int32)
    positions[:, :, :T] = np.repeat(b["positions"], n, 1)
    for axis in range(3):
        np.put_along_axis(positions[axis], where, own_positions[axis], 1)
    weight = rng.standard_normal((2 * n, C, 32)).astype(np.float32)

    def group(p, x):
        h = network.embed(p, CFG, b["input_ids"], b["image_features"])
        return network.decode_group(p, CFG, h, b["positions"], b["lengths"], x, own_positions)[1]

    def flat(p, x):
        h = network.embed(p, CFG, b["input_ids"], b["image_features"]).hidden
        h = jnp.repeat(h, n, 0)
        h = jnp.pad(h, ((0, 0), (0, C), (0, 0)))
        h = jax.vmap(lambda a, i, v: a.at[i].set(v))(h, where, x)
        mask = np.arange(T + C) < (lengths + C)[:, None]
        return jnp.take_along_axis(
            network.decode_full(p, CFG, network.Embedded(h), positions, mask), where[..., None], 1
        )

    values, grads = [], []
    for f in (group, flat):
        v, g = jax.jit(
            lambda p, x, f=f: jax.value_and_grad(
                lambda p, x: ((y := f(p, x)) * weight).sum() + 0 * y.sum(), argnums=(0, 1)
            )(p, x)
        )(params, own)
        values.append(v)
        grads.append(g)
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(grads[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * max(1.0, float(np.abs(y).max())))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoRepeat:
    """A constraint with a state: no token of `table` may follow itself."""

    table: jax.Array  # bool [V]

    def init(self, rows):
        return jnp.full(rows, V, jnp.int32)

    def allowed(self, state):
        return ~(self.table & (jnp.arange(V) == state[:, None]))

    def advance(self, state, token):
        return token


def test_a_constraint_rules_out_and_logprobs_are_of_what_is_left(params):
    b, n, keys = batch(3), 4, sampling.row_keys(1, 12)
    hot = jnp.zeros(V, bool).at[jnp.arange(7, 12)].set(True)
    only = jnp.where(hot, 0.0, -jnp.inf)
    suppress = tuple(
        np.flatnonzero(~np.asarray(hot)).tolist()
    )  # five tokens left: repeats are certain
    free = run(params, b, n=n, keys=keys, suppress_ids=suppress, stop_ids=())
    out = run(
        params, b, n=n, keys=keys, suppress_ids=suppress, stop_ids=(), constraint=NoRepeat(hot)
    )
    repeats = lambda x: x[:, 1:] == x[:, :-1]
    assert repeats(free["tokens"]).any() and not repeats(out["tokens"]).any()
    logits = rescored(params, b, out, n) + np.asarray(only)
    np.put_along_axis(logits[:, 1:], out["tokens"][:, :-1, None], -np.inf, 2)
    want = np.take_along_axis(log_softmax(logits), out["tokens"][..., None], -1)[..., 0]
    np.testing.assert_allclose(out["logprobs"], want, atol=2e-5)
    none = run(
        params, b, n=n, keys=keys, suppress_ids=suppress, stop_ids=(), constraint=NoRepeat(~hot)
    )
    np.testing.assert_array_equal(none["tokens"], free["tokens"])


def test_no_constraint_is_the_program_without_one(params):
    b = batch(2)
    run(params, b, temperature=0)
    with compiled() as names:
        run(params, b, temperature=0, constraint=None)
        assert "_generate" not in names
        run(params, b, temperature=0, constraint=NoRepeat(jnp.zeros(V, bool)))
        # Arrays are no part of the program.
        run(params, b, temperature=0, constraint=NoRepeat(jnp.ones(V, bool)))
    assert names.count("_generate") == 1


def test_pieces_equal_the_one_program(params):
    """prefill, begin, and decode in steps of 5 give what `generate` gives; a row that is not live stays empty."""
    b, keys = batch(2), sampling.row_keys(3, 3)
    want = run(params, pick(b, [0, 0, 1]), keys=keys)
    made = []
    for r in (0, 1):
        one = pick(b, [r])
        made.append(sampling.prefill(params, CFG, sampling.PromptBatch(**one), dtype=jnp.float32))
    order = [0, 0, 1, 1]
    prompt, own, rest = sampling.begin(
        [made[r] for r in order], 3, None, model_config=CFG, room=16, dtype=jnp.float32
    )
    start = network.next_positions(jnp.asarray(b["positions"]), b["lengths"])[np.array(order)]
    layers, four = sampling.decode_layers(params, CFG), keys[np.array([0, 1, 2, 2])]
    rows = sampling.Rows(prompt, b["lengths"][order], start, four)
    settings = token_choice.StepSettings(
        greedy=False, stop_ids=CFG.eos_token_id, suppress_ids=CFG.media_token_ids, dtype=jnp.float32
    )
    for until in (5, 10, N):
        own, rest = sampling.decode(
            params,
            layers,
            CFG,
            rows,
            token_choice.Distribution(np.float32(1)),
            own,
            rest,
            np.int32(until),
            None,
            settings=settings,
        )
        assert int(rest.step) <= until
    np.testing.assert_array_equal(rest.tokens[:3, :N], want["tokens"])
    np.testing.assert_allclose(rest.logprobs[:3, :N], want["logprobs"], atol=1e-5)
    np.testing.assert_array_equal(rest.lengths, [*want["lengths"], 0])


def test_extending_a_prefix_equals_computing_the_whole(params):
    """The kept keys and the new ones, in slots of another count, are those of one prefill; so is the last hidden."""
    b = pick(batch(4), [3])  # 12 tokens
    length = int(b["lengths"][0])
    whole = sampling.prefill(params, CFG, sampling.PromptBatch(**b), dtype=jnp.float32)
    for used in (6, 9, length - 1):
        first = sampling.prefill(
            params,
            CFG,
            sampling.PromptBatch(**b)._replace(lengths=np.array([used], np.int32)),
            dtype=jnp.float32,
        )
        ids, where = np.full((1, 8), 9, np.int32), np.zeros((3, 1, 8), np.int32)
        ids[:, : length - used] = b["input_ids"][:, used:length]
        where[:, :, : length - used] = b["positions"][:, :, used:length]
        got = sampling.extend(
            params,
            CFG,
            first.keys,
            np.array([used], np.int32),
            sampling.PromptBatch(ids, np.array([length - used], np.int32), where),
            room=14,
            dtype=jnp.float32,
        )
        np.testing.assert_allclose(got.last, whole.last, atol=1e-5)
        for x, y in zip(jax.tree.leaves(got.keys), jax.tree.leaves(whole.keys), strict=True):
            assert x.shape[2] == 14
            np.testing.assert_allclose(x[:, :, :length], y[:, :, :length], atol=1e-5)


@pytest.mark.parametrize(
    "choice",
    [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.7, "min_p": 0.1}],
)
def test_log_probs_of_what_is_left_weigh_a_token_by_what_was_cut_off(choice):
    """By numpy: the kept set, its log-probs, and the weight of `tis`, which makes means those of all tokens."""
    temperature, draws = 0.7, 200
    logits = 2 * np.random.default_rng(0).standard_normal(V).astype(np.float32)
    whole = np.exp(log_softmax(logits[None] / temperature))[0]
    order = np.argsort(-whole)
    kept = order[: choice.get("top_k", V)]
    if "top_p" in choice:
        inside = whole[kept] / whole[kept].sum()
        kept = kept[np.cumsum(inside) - inside < choice["top_p"]]
    kept = kept[whole[kept] >= choice.get("min_p", 0) * whole.max()]
    left = whole[kept].sum()

    def draw(logs_kept):
        return token_choice.pick(
            jnp.asarray(np.tile(logits, (draws, 1))),
            sampling.row_keys(1, draws),
            0,
            temperature=temperature,
            greedy=False,
            logs_kept=logs_kept,
            **{"top_k": None, "top_p": None} | choice,
        )

    (tokens, of_kept), (same_tokens, of_all) = draw(True), draw(False)
    np.testing.assert_array_equal(tokens, same_tokens)
    assert set(np.unique(tokens)) <= set(kept.tolist()) and len(np.unique(tokens)) > 1
    np.testing.assert_allclose(np.exp(of_all), whole[tokens], rtol=1e-4)
    np.testing.assert_allclose(np.exp(of_kept), whole[tokens] / left, rtol=1e-4)
    # Each token of the loss then counts as much as it does among all tokens.
    weight = losses.policy_loss(
        of_all[:, None],
        of_all[:, None],
        -jnp.ones(draws),
        jnp.ones((draws, 1), bool),
        PolicyLossConfig.with_defaults(sampler_correction="tis"),
        sampler_log_probs=of_kept[:, None],
    )[0]
    assert float(weight) == pytest.approx(left, rel=1e-4) and left < 1


def test_a_penalty_makes_seen_tokens_less_likely_as_transformers_does():
    ids, lengths = np.array([[3, 5, 5, 7], [9, 4, 0, 0]]), np.array([4, 2])
    seen = token_choice.tokens_in(jnp.asarray(ids), jnp.asarray(lengths), V)
    assert [set(np.flatnonzero(row)) for row in np.asarray(seen)] == [{3, 5, 7}, {9, 4}]
    logits = np.random.default_rng(0).standard_normal((2, V)).astype(np.float32)
    want = logits.copy()
    for row, of_row in enumerate(np.asarray(seen)):
        for token in np.flatnonzero(of_row):
            want[row, token] *= 1 / 1.3 if want[row, token] > 0 else 1.3
    got = token_choice.penalize_repeats(jnp.asarray(logits), seen, 1.3)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_repeats_are_ruled_out_by_a_large_penalty(params):
    """Greedy: nothing of the prompt, and nothing twice, by tokens of positive logits that only fall."""
    b = batch(2)
    free, out = (
        run(params, b, n=2, max_new_tokens=N, temperature=0, stop_ids=(), **penalty)
        for penalty in ({}, {"repetition_penalty": 1e6})
    )
    for row, tokens in enumerate(out["tokens"]):
        prompt = b["input_ids"][row // 2, : b["lengths"][row // 2]]
        assert len(set(tokens.tolist())) == N and not set(tokens.tolist()) & set(prompt.tolist())
    assert any(len(set(tokens.tolist())) < N for tokens in free["tokens"])
