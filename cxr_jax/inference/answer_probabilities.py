"""The probability that an answer names each finding, given a trace: the tree of all valid answers, expanded on the
device under the rules of `constrained`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.inference import sampling
from cxr_jax.inference.constrained import Constraint, State
from cxr_jax.models import qwen2_5_vl
from cxr_jax.models.attention import NEG
from cxr_jax.models.qwen2_5_vl import decoder
from cxr_jax.models.qwen2_5_vl.config import Config


def finding_probabilities(
    params: dict,
    model_config: Config,
    input_ids,
    lengths,
    positions,
    image_features,
    tokens,
    token_lengths,
    constraint: Constraint,
    *,
    dtype=jnp.float32,
    **settings,
) -> dict:
    """The probability that the answer names each finding, given each trace, and its mean over the traces.

    input_ids [B, T], lengths [B], positions [3, B, T], image_features as for `sampling.generate`; tokens int
    [B*n, N] and token_lengths [B*n]: n completions of each prompt, of which only the trace is used
    (`Constraint.trace`). Settings, results and errors: `probabilities_after`, to which this adds the prefill.
    """
    lengths = jnp.asarray(lengths, jnp.int32)
    prefix = sampling.prefill(
        params,
        model_config,
        jnp.asarray(input_ids),
        lengths,
        jnp.asarray(positions),
        image_features,
        dtype=dtype,
    )
    return probabilities_after(
        params,
        model_config,
        prefix,
        lengths,
        sampling.next_positions(positions, lengths),
        tokens,
        token_lengths,
        constraint,
        dtype=dtype,
        **settings,
    )


def probabilities_after(
    params: dict,
    model_config: Config,
    prefix: dict,
    lengths,
    start,
    tokens,
    token_lengths,
    constraint: Constraint,
    *,
    width: int = 8,
    answer_tokens: int = 64,
    tolerance: float = 1e-4,
    temperature: float = 1.0,
    keys=None,
    own=None,
    layers=None,
    dtype=jnp.float32,
) -> dict:
    """`finding_probabilities` of B prompts that are computed: prefix (`sampling.prefill`), lengths int [B], start
    int [B] the position of the first token after each. tokens int [B*n, N], token_lengths [B*n]: their completions;
    own: their keys, if they were just drawn (`sampling.decode` with N slots; more rows do not matter). layers: of
    `sampling.decode_layers`, if at hand.

    Answers follow the constraint, within answer_tokens from the end of the trace on, and the model at the given
    temperature: the distribution that constrained sampling draws from.

    The tree of answers is expanded a token at a time, with one cache for prompt and trace. When more than
    `width` branches are open, those above a threshold c are kept with their exact probability, and each of the
    others survives with probability w / c and then has weight c, where c makes `width` survive (Fearnhead and
    Clifford 2003, "On-line inference for hidden Markov models via particle filters", J. R. Stat. Soc. B 65).
    So the estimate is unbiased, it is exact as long as `width` branches suffice, and its error is at most
    1 - exact_mass. Expansion ends when no trace has more than `tolerance` of its mass in open branches; what is
    left is spread like the rest, a bias of at most that. One trace mostly decides its answer: the mean over
    traces is what tells how sure the model is. keys: typed keys [B*n] for the survivors; default:
    `sampling.row_keys(0, B*n)`.

    Returns float32 trace [B, n, names] and mean [B, names], both in [0, 1], and exact_mass [B, n]. The logits of
    one step take B * n * width * V floats. Raises UserError if no answer fits answer_tokens.
    """
    rows, prompts = len(tokens), len(lengths)
    if rows % prompts:
        raise ValueError(f"{rows} completions of {prompts} prompts")
    lead = np.asarray(constraint.fits)[np.asarray(constraint.locked)[0]]
    if not lead[min(answer_tokens, len(lead) - 1)]:
        raise UserError(f"no answer fits answer_tokens={answer_tokens}")
    int32 = lambda x: jnp.asarray(x, jnp.int32)
    keys = sampling.row_keys(0, rows) if keys is None else keys
    layers = sampling.decode_layers(params, model_config) if layers is None else layers
    got = _expand(
        params,
        layers,
        model_config,
        prefix,
        int32(lengths),
        int32(start),
        int32(tokens),
        int32(token_lengths),
        constraint,
        keys,
        jnp.float32(temperature),
        jnp.float32(tolerance),
        own,
        width=width,
        depth=answer_tokens,
        dtype=dtype,
    )
    probability, exact = (x.reshape(prompts, -1, *x.shape[1:]) for x in got)
    return {"trace": probability, "mean": probability.mean(1), "exact_mass": exact}


@functools.partial(jax.jit, static_argnames=("model_config", "width", "depth", "dtype"))
def _expand(
    params,
    layers,
    model_config,
    prefix,
    lengths,
    start,
    tokens,
    token_lengths,
    constraint,
    keys,
    temperature,
    tolerance,
    drawn,
    *,
    width,
    depth,
    dtype,
):
    R, W, text, tcfg = tokens.shape[0], width, params["text"], model_config.text
    count, state = constraint.trace(tokens, token_lengths)
    state = jax.tree.map(
        lambda x: jnp.repeat(x, W), state._replace(left=jnp.full(R, depth, jnp.int32))
    )
    hidden, prompt, lengths, start = _read(
        params, model_config, prefix, lengths, start, tokens, count, drawn, dtype
    )
    names = jnp.arange(len(constraint.conflicts))

    def body(carry):
        t, h, own, state, weight, exact, mass, settled_mass = carry
        logits = qwen2_5_vl.unembed(params, model_config, h)
        options = jnp.asarray(constraint.options)[state.at]
        after, named, ok = constraint._moves(state, jnp.asarray(constraint.classes)[options])
        chance = _softmax(
            jnp.take_along_axis(logits, options, -1, mode="clip") / temperature, ok & (options >= 0)
        )
        child = (weight.reshape(R * W, 1) * chance).reshape(R, -1)
        settled = jnp.asarray(constraint.settled)[after].reshape(R, -1)
        done = jnp.where(settled, child, 0)
        bits = (named.reshape(R, -1)[..., None] >> names & 1).astype(jnp.float32)
        mass = mass + (done[..., None] * bits).sum(1)
        sure = jnp.where(jnp.repeat(exact, options.shape[1], axis=1), done, 0)
        settled_mass = settled_mass + jnp.stack([done.sum(1), sure.sum(1)])
        u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t)))(keys)
        pick, weight, kept = resample(jnp.where(settled, 0, child), W, u)
        parent = pick // options.shape[1]
        exact = kept & jnp.take_along_axis(exact, parent, 1)
        flat = lambda x: jnp.take_along_axis(x.reshape(R, -1), pick, 1).reshape(-1)
        rows = (parent + jnp.arange(R)[:, None] * W).reshape(-1)
        state = State(flat(after), flat(named), state.left - 1)
        x = qwen2_5_vl.embed(params, model_config, flat(options)[:, None], dtype=dtype)
        own = jax.tree.map(lambda cached: cached[rows], own)
        where = jnp.broadcast_to(jnp.repeat(start + t, W)[None, :, None], (3, R * W, 1))
        h, own = decoder.decode_step(layers, text["final"], tcfg, x, where, prompt, lengths, own, t)
        return t + 1, h, own, state, weight, exact, mass, settled_mass

    first = jnp.zeros((R, W), jnp.float32).at[:, 0].set(1.0)
    carry = (
        jnp.int32(0),
        jnp.repeat(hidden, W, 0),
        decoder.empty_own(tcfg, R * W, depth, dtype),
        state,
        first,
        jnp.ones((R, W), bool),
        jnp.zeros((R, len(names)), jnp.float32),
        jnp.zeros((2, R), jnp.float32),
    )
    carry = jax.lax.while_loop(
        lambda c: (c[0] < depth) & (c[4].sum(1) > tolerance).any(), body, carry
    )
    total, sure = carry[7]
    return jnp.clip(carry[6] / total[:, None], 0, 1), jnp.clip(
        sure, 0, 1
    )  # the total is 1, but for the tolerance


def _read(params, model_config, prefix, lengths, start, tokens, count, drawn, dtype):
    """The first count[r] tokens of each completion on top of its prompt, which is computed once for all of them;
    drawn: the keys of the completions, of which only the last token is computed then, or None.

    Returns (hidden [R, D] of the last token, keys of prompt and trace, tokens in them [R], position of the next
    token [R]).
    """
    R, N = tokens.shape
    each = lambda x: jnp.repeat(x, R // len(lengths), axis=0)

    def extend(tokens, first, count, keys, used):
        where = jnp.broadcast_to(first[:, None] + jnp.arange(tokens.shape[1]), (3, *tokens.shape))
        h = qwen2_5_vl.embed(params, model_config, tokens, dtype=dtype)
        return decoder.extend(params["text"], model_config.text, h, where, count, keys, used)

    used, start = each(lengths), each(start)
    if drawn is None:
        hidden, own = extend(tokens, start, count, prefix["keys"], lengths)
    else:
        own = jax.tree.map(lambda x: x[:R], drawn)
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 1))
    room = lambda x: jnp.pad(each(x), ((0, 0), (0, 0), (0, N), (0, 0)))
    keys = jax.tree.map(lambda old, new: put(room(old), new, used), prefix["keys"], own)
    if drawn is not None:
        last = jnp.take_along_axis(tokens, count[:, None] - 1, 1, mode="clip")
        hidden, _ = extend(last, start + count - 1, jnp.ones_like(count), keys, used + count - 1)
    hidden = jnp.where(count[:, None] > 0, hidden, each(prefix["last"]))
    return hidden, keys, used + count, start + count


def _softmax(scores, ok):
    """Over the last axis, of the entries that are ok; all zero if there are none."""
    scores = jnp.where(ok, scores, NEG)
    e = jnp.where(ok, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    return e / jnp.maximum(e.sum(-1, keepdims=True), 1e-30)


def resample(weights, width: int, u):
    """At most `width` of the weights float32 [R, K] (K >= width), unbiased: (index [R, W], weight [R, W], kept).

    A weight of at least c is kept as it is (kept: True), a smaller one becomes c with probability w / c, else
    0; c is such that the sum stays the same. u float32 [R], uniform in [0, 1): one draw a row (systematic).
    """
    ordered = jnp.sort(weights, -1, descending=True)[:, :width]
    tail = weights.sum(-1, keepdims=True) - jnp.cumsum(ordered, -1) + ordered
    tail = jnp.maximum(tail, ordered)
    c = tail / (width - jnp.arange(width))
    c = jnp.take_along_axis(c, jnp.argmax(ordered <= c, -1)[:, None], -1)
    c = jnp.where(
        (weights > 0).sum(-1, keepdims=True) <= width, 0, c
    )  # exactly, whatever the rounding
    keep = weights >= c
    parts = jnp.cumsum(jnp.where(keep, 0, weights / jnp.maximum(c, 1e-37)), -1)
    places = parts[
        :, -1:
    ]  # a whole number, but for rounding: make it one, or a survivor may go missing
    parts = jnp.floor(parts * (jnp.round(places) / jnp.maximum(places, 0.5)) + u[:, None])
    hit = jnp.diff(parts, axis=-1, prepend=0) >= 1
    weight, index = jax.lax.top_k(jnp.where(keep, weights, jnp.where(hit, c, 0)), width)
    return index, weight, jnp.take_along_axis(keep, index, 1)
