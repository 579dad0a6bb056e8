"""The probability that an answer names each finding, given a trace: the tree of all valid answers, expanded on the
device under the rules of `constrained`."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cxr_jax.errors import UserError
from cxr_jax.inference import sampling, token_choice
from cxr_jax.inference.constrained import Constraint
from cxr_jax.inference.constrained import State as RuleState
from cxr_jax.models import network
from cxr_jax.models.network import decoder
from cxr_jax.models.network.config import Config
from cxr_jax.runtime.trees import Array, Tree

# Mass below which the tree tells nothing apart: float32 holds 24 bits of 1.
_LEAST_MASS = 2.0**-24

# ---- What goes in ------------------------------------------------------------------------------------------


class PromptEnds(NamedTuple):
    """B prompts that are computed, and where they end."""

    computed: sampling.ComputedPrompt
    lengths: Array  # int [B]
    start: Array  # int [B]: the position of the first token after each


class Traces(NamedTuple):
    """n completions of each prompt, of which only the trace is used (`Constraint.trace`)."""

    tokens: Array  # int [B*n, N]
    lengths: Array  # int [B*n]
    # Their keys, if they were just drawn (`sampling.decode` with N slots; more rows do not matter), or None.
    own_keys: Any = None


@dataclass(frozen=True, kw_only=True)
class ExpansionSettings:
    """How far the tree of answers is expanded.

    Attributes:
        width: branches of a trace that are kept open. The logits of one step take B * n * width * V floats.
        answer_tokens: from the end of the trace to the end of an answer, at most.
        tolerance: the expansion of a trace ends when it has no more of its mass in open branches; what is left is
            spread like the rest, a bias of at most that.
        temperature: of the model's distribution.
        dtype: of the computation.
    """

    width: int = 8
    answer_tokens: int = 64
    tolerance: float = 1e-4
    temperature: float = 1.0
    dtype: DTypeLike = jnp.float32


def finding_probabilities(
    params: Tree,
    model_config: Config,
    prompts: sampling.PromptBatch,
    traces: Traces,
    constraint: Constraint,
    settings: ExpansionSettings = ExpansionSettings(),
    *,
    keys: jax.Array | None = None,
) -> dict:
    """Compute the probability that the answer names each finding, given each trace, and its mean over the traces.

    `probabilities_after`, to which this adds the prefill; arguments, results and errors are the same.
    """
    lengths = jnp.asarray(prompts.lengths, jnp.int32)
    batch = sampling.PromptBatch(
        jnp.asarray(prompts.input_ids),
        lengths,
        jnp.asarray(prompts.positions),
        prompts.image_features,
    )
    computed = sampling.prefill(params, model_config, batch, dtype=settings.dtype)
    ends = PromptEnds(computed, lengths, network.next_positions(batch.positions, lengths))
    return probabilities_after(params, model_config, ends, traces, constraint, settings, keys=keys)


def probabilities_after(
    params: Tree,
    model_config: Config,
    prompts: PromptEnds,
    traces: Traces,
    constraint: Constraint,
    settings: ExpansionSettings = ExpansionSettings(),
    *,
    keys: jax.Array | None = None,
    layers: list[Tree] | None = None,
) -> dict:
    """Compute `finding_probabilities` of prompts that are computed.

    Answers follow the constraint, within answer_tokens from the end of the trace on, and the model at the given
    temperature: the distribution that constrained sampling draws from.

    The tree of answers is expanded a token at a time, with one cache for prompt and trace. When more than
    `width` branches are open, those above a threshold c are kept with their exact probability, and each of the
    others survives with probability w / c and then has weight c, where c makes `width` survive (Fearnhead and
    Clifford 2003, "On-line inference for hidden Markov models via particle filters", J. R. Stat. Soc. B 65).
    So the estimate is unbiased, it is exact as long as `width` branches suffice, and its error is at most
    1 - exact_mass. One trace mostly decides its answer: the mean over traces is what tells how sure the model is.

    Args:
        keys: typed keys [B*n] for the survivors; None: `sampling.row_keys(0, B*n)`.
        layers: of `sampling.decode_layers`, if at hand.

    Returns:
        float32 trace [B, n, names] and mean [B, names], both in [0, 1], log_odds [B, n, names] of the trace's, which
        tell probabilities near 0 and 1 apart, and exact_mass [B, n].

    Raises:
        UserError: if no answer fits answer_tokens.
        ValueError: if the completions are not equally many a prompt.
    """
    # On the host, since it looks into the tables; the rest may be part of a program.
    check_room(constraint, settings)
    inputs = (params, model_config, prompts, traces, constraint, settings)
    return weigh_answers(*inputs, keys=keys, layers=layers)


def check_room(constraint: Constraint, settings: ExpansionSettings) -> None:
    """Refuse settings under which no answer can be given. Raises UserError."""
    # From the end of a trace on, whatever the trace.
    fitting = constraint.fits_after_trace()
    if not fitting[min(settings.answer_tokens, len(fitting) - 1)]:
        raise UserError(f"no answer fits answer_tokens={settings.answer_tokens}")


def weigh_answers(
    params: Tree,
    model_config: Config,
    prompts: PromptEnds,
    traces: Traces,
    constraint: Constraint,
    settings: ExpansionSettings = ExpansionSettings(),
    *,
    keys: jax.Array | None = None,
    layers: list[Tree] | None = None,
) -> dict:
    """Compute `probabilities_after` without its check (`check_room`); may be called inside jit.

    Raises:
        ValueError: if the completions are not equally many a prompt.
    """
    row_count, prompt_count = len(traces.tokens), len(prompts.lengths)
    if row_count % prompt_count:
        raise ValueError(f"{row_count} completions of {prompt_count} prompts")
    answer_tokens = settings.answer_tokens
    probabilities, log_odds, exact_mass = _expand(
        params,
        sampling.decode_layers(params, model_config) if layers is None else layers,
        model_config,
        PromptEnds(prompts.computed, _int32(prompts.lengths), _int32(prompts.start)),
        Traces(_int32(traces.tokens), _int32(traces.lengths), traces.own_keys),
        constraint,
        sampling.row_keys(0, row_count) if keys is None else keys,
        # Values that may change without another program are arrays; sizes are static.
        _Limits(jnp.float32(settings.temperature), jnp.float32(settings.tolerance)),
        size=_Size(width=settings.width, depth=answer_tokens, dtype=settings.dtype),
    )
    shape = (prompt_count, -1, probabilities.shape[1])
    probabilities = probabilities.reshape(shape)
    return {
        "trace": probabilities,
        "mean": probabilities.mean(1),
        "log_odds": log_odds.reshape(shape),
        "exact_mass": exact_mass.reshape(prompt_count, -1),
    }


def _int32(values: Array) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


# ---- The expansion -----------------------------------------------------------------------------------------


class _Limits(NamedTuple):
    """Settings that one program serves with any value."""

    temperature: Any
    tolerance: Any


@dataclass(frozen=True, kw_only=True)
class _Size:
    """Settings that make another program."""

    width: int
    depth: int
    dtype: DTypeLike


class _Trunk(NamedTuple):
    """What all branches of a trace share: prompt and trace, computed."""

    hidden: Any  # [R, D] of the last token
    keys: Any  # of prompt and trace, [(k, v)] a layer
    lengths: Any  # int [R]: tokens in them
    start: Any  # int [R]: the position of the next token


class _Branches(NamedTuple):
    """The open branches of R traces, W each (in `R * W` rows), and what has been found so far."""

    step: Any  # int32: tokens since the end of the trace
    hidden: Any  # [R * W, D] that the next token is weighed by
    own_keys: Any  # of the tokens since the end of the trace
    rules: RuleState  # the constraint's state of each
    weight: Any  # float32 [R, W]: the probability of each, 0 for none
    exact: Any  # bool [R, W]: whether no draw has touched its weight
    named: Any  # float32 [2, R, names]: mass of finished answers that do not name each finding, and that do
    finished: Any  # float32 [2, R]: mass of all finished answers, and of the exact ones among them


class _Children(NamedTuple):
    """All continuations of open branches by one token: F of each branch, `W * F` of each trace."""

    options: Any  # int [R * W, F]: their tokens, -1 for none
    places: Any  # int [R * W, F]: where the rules are after each
    named: Any  # int [R * W, F]: findings named, as bits
    weight: Any  # float32 [R, W * F]
    finished: Any  # bool [R, W * F]: no further finding can follow


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """The expansion of one traced program."""

    params: Tree
    layers: list[Tree]
    model_config: Config
    constraint: Constraint
    trunk: _Trunk
    random_keys: jax.Array  # typed keys [R]
    limits: _Limits
    size: _Size

    def root(self, rules: RuleState) -> _Branches:
        """One branch a trace, with all its mass; rules: at the end of each trace [R]."""
        row_count, width, depth = len(self.random_keys), self.size.width, self.size.depth
        rules = rules._replace(left=jnp.full(row_count, depth, jnp.int32))
        return _Branches(
            step=jnp.int32(0),
            hidden=jnp.repeat(self.trunk.hidden, width, 0),
            own_keys=decoder.empty_own(
                self.model_config.text, row_count * width, depth, self.size.dtype
            ),
            rules=jax.tree.map(lambda values: jnp.repeat(values, width), rules),
            # All mass in the first branch; the others wait, empty.
            weight=jnp.zeros((row_count, width), jnp.float32).at[:, 0].set(1.0),
            exact=jnp.ones((row_count, width), bool),
            named=jnp.zeros((2, row_count, len(self.constraint.conflicts)), jnp.float32),
            finished=jnp.zeros((2, row_count), jnp.float32),
        )

    def grow(self, branches: _Branches) -> _Branches:
        """All open branches, longer by a token."""
        children = self._children(branches)
        return self._survivors(self._counted(branches, children), children)

    def _children(self, branches: _Branches) -> _Children:
        """Weigh every allowed token after every open branch."""
        row_count = len(self.random_keys)
        logits = network.unembed(self.params, self.model_config, branches.hidden)
        # Only tokens that the rules know after this place: far fewer than V.
        options = jnp.asarray(self.constraint.options)[branches.rules.at]
        classes = jnp.asarray(self.constraint.classes)[options]
        places, named, allowed = self.constraint.moves(branches.rules, classes)
        scores = jnp.take_along_axis(logits, options, -1, mode="clip") / self.limits.temperature
        chance = token_choice.softmax_of(scores, allowed & (options >= 0))
        return _Children(
            options=options,
            places=places,
            named=named,
            weight=(branches.weight.reshape(-1, 1) * chance).reshape(row_count, -1),
            finished=jnp.asarray(self.constraint.settled)[places].reshape(row_count, -1),
        )

    def _counted(self, branches: _Branches, children: _Children) -> _Branches:
        """Add the answers that finish now to what has been found."""
        row_count, option_count = len(self.random_keys), children.options.shape[1]
        # An answer to which no name can be added is finished, whatever punctuation follows.
        finished_weight = jnp.where(children.finished, children.weight, 0)
        names = jnp.arange(branches.named.shape[2])
        named_bits = (children.named.reshape(row_count, -1)[..., None] >> names & 1).astype(
            jnp.float32
        )
        exact_weight = jnp.where(
            jnp.repeat(branches.exact, option_count, axis=1), finished_weight, 0
        )
        # Both sums: 1 minus one of them would lose what is small.
        bits = jnp.stack([1 - named_bits, named_bits])
        return branches._replace(
            named=branches.named + (finished_weight[..., None] * bits).sum(2),
            finished=branches.finished + jnp.stack([finished_weight.sum(1), exact_weight.sum(1)]),
        )

    def _survivors(self, branches: _Branches, children: _Children) -> _Branches:
        """Keep at most W of the children that go on, and compute their tokens."""
        step, width = branches.step, self.size.width
        row_count, option_count = len(self.random_keys), children.options.shape[1]

        # ---- Which: the heavy ones, and a fair draw of the others ----
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(
            self.random_keys
        )
        # Finished answers leave the tree, and so does a trace that has hardly any mass left: what becomes of it must
        # not depend on how long the traces beside it go on.
        going_on = jnp.where(children.finished, 0, children.weight)
        open_mass = going_on.sum(-1, keepdims=True)
        going_on = jnp.where(open_mass > self.limits.tolerance, going_on, 0)
        chosen, weight, is_untouched = token_choice.resample(going_on, width, uniform)
        parent = chosen // option_count
        exact = is_untouched & jnp.take_along_axis(branches.exact, parent, 1)

        def of_chosen(values: jax.Array) -> jax.Array:
            return jnp.take_along_axis(values.reshape(row_count, -1), chosen, 1).reshape(-1)

        # ---- Their tokens, on top of their parents' keys ----
        parent_rows = (parent + jnp.arange(row_count)[:, None] * width).reshape(-1)
        rules = RuleState(
            of_chosen(children.places), of_chosen(children.named), branches.rules.left - 1
        )
        embedded = network.embed_text(
            self.params,
            self.model_config,
            of_chosen(children.options)[:, None],
            dtype=self.size.dtype,
        )
        # A child continues its parent's cache; two of one parent get copies.
        own_keys = jax.tree.map(lambda cached: cached[parent_rows], branches.own_keys)
        positions = jnp.repeat(self.trunk.start + step, width)
        axes = self.model_config.text.position_axes
        hidden, own_keys = decoder.decode_step(
            self.layers,
            self.params["text"]["final"],
            self.model_config.text,
            embedded,
            jnp.broadcast_to(positions[None, :, None], (axes, row_count * width, 1)),
            self.trunk.keys,
            self.trunk.lengths,
            own_keys,
            step,
        )
        return branches._replace(
            step=step + 1, hidden=hidden, own_keys=own_keys, rules=rules, weight=weight, exact=exact
        )


@functools.partial(jax.jit, static_argnames=("model_config", "size"))
def _expand(
    params: Tree,
    layers: list[Tree],
    model_config: Config,
    prompts: PromptEnds,
    traces: Traces,
    constraint: Constraint,
    keys: jax.Array,
    limits: _Limits,
    *,
    size: _Size,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(probabilities [R, names], their log-odds, exact mass [R]) of R traces."""
    count, rules = constraint.trace(traces.tokens, traces.lengths)
    tree = _Tree(
        params=params,
        layers=layers,
        model_config=model_config,
        constraint=constraint,
        trunk=_read(params, model_config, prompts, traces, count, size.dtype),
        random_keys=keys,
        limits=limits,
        size=size,
    )

    def goes_on(branches: _Branches) -> jax.Array:
        # What is neither finished nor lost.
        return (branches.step < size.depth) & (branches.weight > 0).any()

    branches = jax.lax.while_loop(goes_on, tree.grow, tree.root(rules))
    total, exact = branches.finished
    # The total is 1, but for the tolerance.
    probabilities = jnp.clip(branches.named[1] / total[:, None], 0, 1)
    without, with_name = jnp.log(jnp.maximum(branches.named, _LEAST_MASS))
    return probabilities, with_name - without, jnp.clip(exact, 0, 1)


def _read(
    params: Tree,
    model_config: Config,
    prompts: PromptEnds,
    traces: Traces,
    count: jax.Array,
    dtype: DTypeLike,
) -> _Trunk:
    """The first count[r] tokens of each completion on top of its prompt, which is computed once for all of them.

    Of traces that bring their keys only the last token is computed.
    """
    tokens = traces.tokens
    row_count, token_count = tokens.shape
    prompt_count = len(prompts.lengths)

    def of_each(values: Array) -> jax.Array:
        return jnp.repeat(values, row_count // prompt_count, axis=0)

    def compute(
        tokens: Array, first: jax.Array, count: jax.Array, keys: list, used_slots: Array
    ) -> tuple:
        positions = first[:, None] + jnp.arange(tokens.shape[1])
        embedded = network.embed_text(params, model_config, tokens, dtype=dtype)
        return decoder.extend(
            params["text"],
            model_config.text,
            embedded,
            jnp.broadcast_to(positions, (model_config.text.position_axes, *tokens.shape)),
            count,
            keys,
            used_slots,
        )

    # ---- The keys of the traces ----
    prompt_keys = prompts.computed.keys
    used_slots, start = of_each(prompts.lengths), of_each(prompts.start)
    if traces.own_keys is None:
        hidden, own_keys = compute(tokens, start, count, prompt_keys, prompts.lengths)
    else:
        own_keys = jax.tree.map(lambda drawn: drawn[:row_count], traces.own_keys)

    # ---- behind those of their prompts ----
    # One cache for prompt and trace, which all branches of the trace read.
    keys = jax.tree.map(
        lambda old, new: _behind(of_each(old), new, used_slots, token_count), prompt_keys, own_keys
    )

    # ---- The hidden state that the answer begins from ----
    if traces.own_keys is not None:
        last = jnp.take_along_axis(tokens, count[:, None] - 1, 1, mode="clip")
        hidden, _ = compute(
            last, start + count - 1, jnp.ones_like(count), keys, used_slots + count - 1
        )
    hidden = jnp.where(count[:, None] > 0, hidden, of_each(prompts.computed.last))
    return _Trunk(hidden, keys, used_slots + count, start + count)


def _behind(old: jax.Array, new: jax.Array, used: jax.Array, room: int) -> jax.Array:
    """Keys [R, K, S + room, d]: the first used[r] of old [R, K, S, d], then those of new [R, K, room, d]."""
    padded = jnp.pad(old, ((0, 0), (0, 0), (0, room), (0, 0)))
    # Each row at its own place: prompts differ in length.
    return jax.vmap(
        lambda row, row_new, slot: jax.lax.dynamic_update_slice_in_dim(row, row_new, slot, 1)
    )(padded, new, used)
