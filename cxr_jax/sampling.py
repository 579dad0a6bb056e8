"""Sampling: prompts prefilled once, one compiled loop for all their completions.

The randomness of token t of row r is `fold_in(keys[r], t)`: a completion depends neither on the rows beside
it nor on how rows are batched.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.models import decoder, qwen2_5_vl
from cxr_jax.models.config import Config
from cxr_jax.models.layers import NEG


def row_keys(seed: int, rows: int):
    """Typed keys [rows]: fold_in(key(seed), row). For callers that have no chain of their own."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def next_positions(positions, lengths):
    """int [B]: the position of the first generated token, one past the largest of the prompt."""
    valid = jnp.arange(positions.shape[2]) < lengths[:, None]
    return jnp.where(valid, positions, -1).max((0, 2)) + 1


def keep_top_k(logits, k: int):
    """Logits with all but the k largest of each row ruled out."""
    return jnp.where(logits < jax.lax.top_k(logits, k)[0][..., -1:], NEG, logits)


def keep_top_p(logits, p: float):
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
        noise = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, step), logits.shape[1:]))(keys)
        token = jnp.argmax(kept + noise, -1)
    chosen = jnp.take_along_axis(scaled, token[:, None], -1, mode="clip")[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, -1)


_STATIC = ("cfg", "n", "max_new_tokens", "greedy", "stop_ids", "suppress_ids", "top_k", "top_p", "dtype")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _generate(params, cfg: Config, input_ids, lengths, positions, features, keys, temperature, *, n,
              max_new_tokens, greedy, stop_ids, suppress_ids, top_k, top_p, dtype):
    R, N = input_ids.shape[0] * n, max_new_tokens
    text, tcfg = params["text"], cfg.text
    h = qwen2_5_vl.embed(params, cfg, input_ids, features, dtype=dtype)
    last, cache = decoder.prefill(text, tcfg, h, positions, lengths)
    prompt, layers = decoder.prompt_keys(cache), decoder.decode_layers(text, tcfg)
    start = jnp.repeat(next_positions(positions, lengths), n)
    banned = np.zeros(tcfg.vocab_size, np.float32)
    banned[list(suppress_ids)] = NEG
    stops = jnp.asarray(stop_ids, jnp.int32)
    choose = functools.partial(pick, temperature=temperature, greedy=greedy, top_k=top_k, top_p=top_p)

    def body(state):
        t, h, own, tokens, logprobs, count, done = state
        logits = qwen2_5_vl.unembed(params, cfg, h) + banned
        token, logprob = choose(logits, keys, t)
        token = jnp.where(done, cfg.pad_token_id, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], t, 1)
        logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, jnp.where(done, 0.0, logprob)[:, None], t, 1)
        count = count + ~done
        done = done | (token[:, None] == stops).any(-1)
        x = qwen2_5_vl.embed(params, cfg, token[:, None], dtype=dtype)
        where = jnp.broadcast_to((start + t)[None, :, None], (3, R, 1))
        h, own = decoder.decode_step(layers, text["final"], tcfg, x, where, prompt, lengths, own, t)
        return t + 1, h, own, tokens, logprobs, count, done

    state = (jnp.int32(0), jnp.repeat(last, n, 0), decoder.empty_own(tcfg, R, N, dtype),
             jnp.full((R, N), cfg.pad_token_id, jnp.int32), jnp.zeros((R, N), jnp.float32),
             jnp.zeros(R, jnp.int32), jnp.zeros(R, bool))
    state = jax.lax.while_loop(lambda s: (s[0] < N) & ~s[6].all(), body, state)
    return {"tokens": state[3], "logprobs": state[4], "lengths": state[5], "finished": state[6]}


def generate(params: dict, cfg: Config, input_ids, lengths, positions, image_features=None, *, n: int = 1,
             max_new_tokens: int, temperature: float = 1.0, keys=None, stop_ids=None, suppress_ids=None,
             top_k: int | None = None, top_p: float | None = None, dtype=jnp.float32) -> dict:
    """n completions of each prompt.

    input_ids int [B, T] right-padded, lengths int [B], positions int [3, B, T] (`qwen2_5_vl.positions`),
    image_features [B, I, D] or None; keys: typed keys [B * n], row b * n + j for sample j of prompt b (not
    needed when greedy). temperature 0 is greedy. stop_ids default to the config's, suppress_ids to its media
    tokens.

    Returns tokens int32 [B*n, N] (after the stop token: padding), logprobs float32 [B*n, N] of the sampled
    tokens under the temperature-scaled, suppressed distribution, lengths int32 [B*n] with the stop token,
    finished bool [B*n] (False: cut at max_new_tokens).
    """
    greedy = not isinstance(temperature, jax.Array) and temperature == 0
    if keys is None:
        if not greedy:
            raise ValueError("sampling at a temperature needs keys")
        keys = row_keys(0, input_ids.shape[0] * n)
    ids = lambda x, default: tuple(int(i) for i in (default if x is None else x))
    return _generate(
        params, cfg, jnp.asarray(input_ids), jnp.asarray(lengths, jnp.int32), jnp.asarray(positions),
        image_features, keys, jnp.float32(1.0 if greedy else temperature), n=n, max_new_tokens=max_new_tokens,
        greedy=greedy, stop_ids=ids(stop_ids, cfg.eos_token_id),
        suppress_ids=ids(suppress_ids, cfg.media_token_ids), top_k=top_k, top_p=top_p, dtype=dtype)
