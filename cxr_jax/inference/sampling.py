"""Sampling: prompts prefilled once, one compiled loop for all their completions.

`generate` is one program, for rollouts and evaluation. The same loop in pieces, whose state stays on the device
between calls, serves streaming and chat: `prefill` or `extend` -> `begin` -> `decode` (any number of times) ->
`append`. `cxr_jax.inference.generation` drives them in fixed shapes.

The randomness of token t of row r is `fold_in(keys[r], t)`: a completion depends neither on the rows beside
it nor on how rows are batched.

A constraint rules tokens out as the text grows. It is None, or a pytree (arrays as leaves, the rest static and
hashable) with pure methods
    init(rows) -> state, a pytree
    allowed(state) -> bool [rows, V], False for a token that may not come next (at least one True a row)
    advance(state, token int32 [rows]) -> state; rows that have stopped are given padding
Log-probs are those of the distribution that it leaves.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.inference import compaction
from cxr_jax.models import qwen2_5_vl
from cxr_jax.models.attention import NEG
from cxr_jax.models.qwen2_5_vl import decoder
from cxr_jax.models.qwen2_5_vl.config import Config


def row_keys(seed: int, rows: int):
    """Typed keys [rows]: fold_in(key(seed), row). For callers that have no chain of their own."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def next_positions(positions, lengths):
    """int [B]: the position of the first generated token, one past the largest of the prompt."""
    valid = jnp.arange(positions.shape[2]) < lengths[:, None]
    return jnp.where(valid, positions, -1).max((0, 2)) + 1


def keep_top_k(logits, k):
    """Logits with all but the k largest of each row ruled out. k: int, or a traced int32 (a program for any k)."""
    if isinstance(k, int):
        smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    else:
        smallest = jax.lax.dynamic_index_in_dim(jnp.sort(logits, -1, descending=True), k - 1, -1)
    return jnp.where(logits < smallest, NEG, logits)


def keep_top_p(logits, p):
    """Logits with everything outside the smallest set of probability >= p ruled out; the largest stays."""
    ordered = jnp.sort(logits, -1, descending=True)
    probs = jax.nn.softmax(ordered, -1)
    inside = jnp.cumsum(probs, -1) - probs < p
    smallest = jnp.min(jnp.where(inside, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < smallest, NEG, logits)


def pick(logits, keys, step, *, temperature, greedy: bool, top_k: int | None, top_p: float | None):
    """One token a row from float32 logits [R, V] -> (token int32 [R], its log-probability float32 [R]).

    The log-probability is under the distribution before top_k and top_p, at the given temperature.
    """
    if greedy:
        token = jnp.argmax(logits, -1)
        scaled = logits
    else:
        scaled = logits / temperature
        kept = scaled if top_k is None else keep_top_k(scaled, top_k)
        kept = kept if top_p is None else keep_top_p(kept, top_p)
        noise = jax.vmap(
            lambda k: jax.random.gumbel(jax.random.fold_in(k, step), logits.shape[1:])
        )(keys)
        token = jnp.argmax(kept + noise, -1)
    chosen = jnp.take_along_axis(scaled, token[:, None], -1, mode="clip")[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, -1)


class State(NamedTuple):
    """Where R rows of at most N tokens stand."""

    step: Any  # int32: tokens drawn so far
    hidden: Any  # [R, D] that the next token is drawn from
    own: Any  # the keys of drawn tokens, see `decoder.empty_own`
    tokens: Any  # int32 [R, N]
    logprobs: Any  # float32 [R, N]
    lengths: Any  # int32 [R]
    done: Any  # bool [R]
    bound: Any  # the constraint's state


def _loop(
    params,
    layers,
    model_config: Config,
    temperature,
    constraint,
    prompt,
    lengths,
    start,
    keys,
    state,
    until,
    place=None,
    *,
    greedy,
    stop_ids,
    suppress_ids,
    top_k,
    top_p,
    dtype,
):
    """Draws tokens until step `until` or until all rows are done: `State` -> `State`. place: see `stages.run`."""
    tcfg, R = model_config.text, start.shape[0]
    banned = np.zeros(tcfg.vocab_size, np.float32)
    banned[list(suppress_ids)] = NEG
    stops = jnp.asarray(stop_ids, jnp.int32)
    choose = functools.partial(
        pick, temperature=temperature, greedy=greedy, top_k=top_k, top_p=top_p
    )

    def body(state):
        t, h, own, tokens, logprobs, count, done, bound = state
        logits = qwen2_5_vl.unembed(params, model_config, h) + banned
        if constraint is not None:
            logits = jnp.where(constraint.allowed(bound), logits, NEG)
        token, logprob = choose(logits, keys, t)
        token = jnp.where(done, model_config.pad_token_id, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], t, 1)
        logprobs = jax.lax.dynamic_update_slice_in_dim(
            logprobs, jnp.where(done, 0.0, logprob)[:, None], t, 1
        )
        count = count + ~done
        done = done | (token[:, None] == stops).any(-1)
        x = qwen2_5_vl.embed(params, model_config, token[:, None], dtype=dtype)
        where = jnp.broadcast_to((start + t)[None, :, None], (3, R, 1))
        h, own = decoder.decode_step(
            layers, params["text"]["final"], tcfg, x, where, prompt, lengths, own, t, place
        )
        if constraint is not None:
            bound = constraint.advance(bound, token)
        return State(t + 1, h, own, tokens, logprobs, count, done, bound)

    return jax.lax.while_loop(lambda s: (s.step < until) & ~s.done.all(), body, state)


def _fresh(model_config: Config, last, N: int, room: int, constraint, dtype) -> State:
    """The state before the first token, with room for the keys of `room` tokens; last [R, D]."""
    R = len(last)
    return State(
        jnp.int32(0),
        last,
        decoder.empty_own(model_config.text, R, room, dtype),
        jnp.full((R, N), model_config.pad_token_id, jnp.int32),
        jnp.zeros((R, N), jnp.float32),
        jnp.zeros(R, jnp.int32),
        jnp.zeros(R, bool),
        None if constraint is None else constraint.init(R),
    )


_STATIC = ("model_config", "greedy", "stop_ids", "suppress_ids", "dtype")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "n", "max_new_tokens", "top_k", "top_p"))
def _generate(
    params,
    model_config: Config,
    input_ids,
    lengths,
    positions,
    features,
    keys,
    temperature,
    *,
    n,
    max_new_tokens,
    constraint,
    dtype,
    **choice,
):
    text, tcfg = params["text"], model_config.text
    h = qwen2_5_vl.embed(params, model_config, input_ids, features, dtype=dtype)
    last, cache = decoder.prefill(text, tcfg, h, positions, lengths)
    prompt, layers = decoder.prompt_keys(cache), decoder.decode_layers(text, tcfg)
    start = jnp.repeat(next_positions(positions, lengths), n)
    room = compaction.stage_ends(max_new_tokens)[0]
    state = _fresh(model_config, jnp.repeat(last, n, 0), max_new_tokens, room, constraint, dtype)
    loop = functools.partial(
        _loop, params, layers, model_config, temperature, constraint, dtype=dtype, **choice
    )
    state = compaction.run(loop, prompt, lengths, start, keys, state)
    return {
        "tokens": state.tokens,
        "logprobs": state.logprobs,
        "lengths": state.lengths,
        "finished": state.done,
    }


def _ids(x, default) -> tuple:
    return tuple(int(i) for i in (default if x is None else x))


def generate(
    params: dict,
    model_config: Config,
    input_ids,
    lengths,
    positions,
    image_features=None,
    *,
    n: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    keys=None,
    stop_ids=None,
    suppress_ids=None,
    top_k: int | None = None,
    top_p: float | None = None,
    constraint=None,
    dtype=jnp.float32,
) -> dict:
    """n completions of each prompt.

    input_ids int [B, T] right-padded, lengths int [B], positions int [3, B, T] (`qwen2_5_vl.positions`),
    image_features [B, I, D] or None; keys: typed keys [B * n], row b * n + j for sample j of prompt b (not
    needed when greedy). temperature 0 is greedy. stop_ids default to the config's, suppress_ids to its media
    tokens. constraint: see the module's text.

    Returns tokens int32 [B*n, N] (after the stop token: padding), logprobs float32 [B*n, N] of the sampled
    tokens under the temperature-scaled, suppressed, constrained distribution (before top_k and top_p), lengths
    int32 [B*n] with the stop token, finished bool [B*n] (False: cut at max_new_tokens).
    """
    greedy = not isinstance(temperature, jax.Array) and temperature == 0
    if keys is None:
        if not greedy:
            raise ValueError("sampling at a temperature needs keys")
        keys = row_keys(0, input_ids.shape[0] * n)
    return _generate(
        params,
        model_config,
        jnp.asarray(input_ids),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(positions),
        image_features,
        keys,
        jnp.float32(1.0 if greedy else temperature),
        n=n,
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        stop_ids=_ids(stop_ids, model_config.eos_token_id),
        suppress_ids=_ids(suppress_ids, model_config.media_token_ids),
        top_k=top_k,
        top_p=top_p,
        constraint=constraint,
        dtype=dtype,
    )


# The same in pieces. A prefix is what the device keeps of one prompt: {"keys": [(k, v)] a layer, [1, K, S, d] each,
# "last": [1, D]}. No piece changes its inputs, but for `decode`, which takes over `own`.


@functools.partial(jax.jit, static_argnames=("model_config", "dtype"))
def prefill(
    params, model_config: Config, input_ids, lengths, positions, image_features, *, dtype
) -> dict:
    """The prefix of one prompt: input_ids int [1, S], lengths int [1], positions int [3, 1, S], image_features
    [1, I, D] or None."""
    h = qwen2_5_vl.embed(params, model_config, input_ids, image_features, dtype=dtype)
    last, cache = decoder.prefill(params["text"], model_config.text, h, positions, lengths)
    return {"keys": decoder.prompt_keys(cache), "last": last}


@functools.partial(jax.jit, static_argnames=("model_config", "room", "dtype"))
def extend(
    params, model_config: Config, keys, used, input_ids, lengths, positions, *, room: int, dtype
) -> dict:
    """The prefix that has `lengths` more tokens after the first `used` of `keys`, in `room` slots.

    input_ids int [1, E] without images, lengths and used int [1], positions int [3, 1, E]. Computes the new
    tokens only; used + lengths <= room.
    """
    h = qwen2_5_vl.embed(params, model_config, input_ids, dtype=dtype)
    last, new = decoder.extend(params["text"], model_config.text, h, positions, lengths, keys, used)
    return {"keys": _join(keys, used, new, room), "last": last}


def _join(old, used, new, room: int):
    """Keys [1, K, room, d]: the first `used` of old, then those of new."""
    slot = jnp.arange(room)

    def one(a, b):
        a, b = (jnp.take(x, at, axis=2, mode="clip") for x, at in ((a, slot), (b, slot - used[0])))
        return jnp.where((slot < used[0])[:, None], a, b)

    return jax.tree.map(one, old, new)


@functools.partial(jax.jit, static_argnames="room")
def append(keys, used, own, *, room: int):
    """The keys of a prompt, the first `used`, and after them those that row 0 has drawn (`own` of `decode`)."""
    return _join(keys, used, jax.tree.map(lambda x: x[:1], own), room)


def decode_layers(params, model_config: Config) -> list:
    """`decoder.decode_layers`, made once for many calls of `decode`."""
    layers = params["text"]["layers"]
    return layers if isinstance(layers, list) else _decode_layers(params["text"], model_config)


@functools.partial(jax.jit, static_argnames="model_config")
def _decode_layers(text, model_config: Config) -> list:
    return decoder.decode_layers(text, model_config.text)


@functools.partial(jax.jit, static_argnames=("model_config", "room", "dtype"))
def begin(prefixes: list[dict], live, constraint, *, model_config: Config, room: int, dtype):
    """(prompt keys, own, rest) for `decode`: one row a prefix (all of equal S), the first `live` of them drawn;
    at most `room` tokens."""
    prompt = jax.tree.map(lambda *x: jnp.concatenate(x), *[p["keys"] for p in prefixes])
    state = _fresh(
        model_config, jnp.concatenate([p["last"] for p in prefixes]), room, room, constraint, dtype
    )
    return prompt, state.own, state._replace(own=None, done=jnp.arange(len(prefixes)) >= live)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="own")
def decode(
    params,
    layers,
    model_config: Config,
    prompt,
    lengths,
    start,
    keys,
    temperature,
    own,
    rest,
    until,
    constraint,
    *,
    dtype,
    **choice,
):
    """Goes on to step `until` or to where all rows are done: (own, rest) -> (own, rest), of `begin`.

    lengths int [R] of the prompts, start int [R] the position of each first token, keys typed keys [R]. choice:
    static greedy, stop_ids, suppress_ids; top_k int32 and top_p float32, or None.
    rest: the `State` without its own keys, which go apart because they alone are taken over.
    """
    state = _loop(
        params,
        layers,
        model_config,
        temperature,
        constraint,
        prompt,
        lengths,
        start,
        keys,
        rest._replace(own=own),
        until,
        dtype=dtype,
        **choice,
    )
    return state.own, state._replace(own=None)


def sample_completions(
    params,
    model_config,
    features,
    prompts,
    special,
    *,
    n: int,
    max_new_tokens: int,
    temperature: float,
    keys=None,
):
    """`sampling.generate` for prompts as from `Prompts.encode`, one image each; `special` from `special_ids`.

    Computed in the type of `features`, here and in `completion_logprobs`.
    """
    width = prompts["ids"].shape[1]
    return generate(
        params,
        model_config,
        prompts["ids"],
        prompts["lengths"],
        prompts["positions"][:, :, :width],
        features,
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        keys=keys,
        stop_ids=special["stop"],
        suppress_ids=special["suppress"],
        dtype=features.dtype,
    )
