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

Endings, texts that end a row, are None or such a pytree without `allowed`, and with is_complete(state) -> bool [rows].
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cxr_jax.inference import compaction, token_choice
from cxr_jax.inference.compaction import Rows
from cxr_jax.inference.token_choice import (
    Distribution,
    RowChoice,
    SamplingSettings,
    StepSettings,
    choose,
)
from cxr_jax.models import network
from cxr_jax.models.attention import NEG
from cxr_jax.models.network import decoder, decoder_layers
from cxr_jax.models.network.config import Config
from cxr_jax.runtime.trees import Array, Tree

# ---- What goes in and out ----------------------------------------------------------------------------------


class PromptBatch(NamedTuple):
    """B prompts in the width of the longest, right-padded."""

    input_ids: Array  # int [B, T]
    lengths: Array  # int [B]
    positions: Array  # int [axes, B, T], see `network.positions`
    image_features: network.Seen | None = None  # tokens [B, I, D]


class ComputedPrompt(NamedTuple):
    """What the device keeps of prompts: all that their completions are drawn from."""

    keys: Any  # [(k, v)] a layer, [B, K, S, d] each
    last: Any  # [B, D]: hidden state of the last token


class State(NamedTuple):
    """Where R rows of at most N tokens stand."""

    step: Any  # int32: tokens drawn so far
    hidden: Any  # [R, D] that the next token is drawn from
    own_keys: Any  # the keys of drawn tokens, see `decoder.empty_own`
    tokens: Any  # int32 [R, N]
    logprobs: Any  # float32 [R, N]
    lengths: Any  # int32 [R]
    done: Any  # bool [R]
    bound: Any  # the constraint's state
    seen: Any = None  # bool [R, V]: tokens that a penalty makes less likely; None without one
    ending: Any = None  # the state of the endings; None without any


def row_keys(seed: int, rows: int) -> jax.Array:
    """Make typed keys [rows]: fold_in(key(seed), row). For callers that have no chain of their own."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


# ---- The loop ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The decode loop of one traced program: a model, and how it draws."""

    params: Tree
    layers: list[Tree]  # of `decoder_layers.decode_layers`
    model_config: Config
    distribution: Distribution | RowChoice
    constraint: Any
    settings: StepSettings
    repetition_penalty: float | None = None
    endings: Any = None

    def draw_until(
        self, rows: Rows, state: State, until: Array | int, place: tuple | None = None
    ) -> State:
        """Draw tokens until step `until` or until all rows are done. place: see `compaction.run`."""
        # Part of the program, as the ids are static.
        banned = np.zeros(self.model_config.text.vocab_size, np.float32)
        banned[list(self.settings.suppress_ids)] = NEG
        stop_ids = jnp.asarray(self.settings.stop_ids, jnp.int32)

        def step(state: State) -> State:
            # The order of a turn: draw, write down, and only then the model's next state.
            token, logprob = self._draw(rows, state, banned)
            state = self._written(state, token, logprob, stop_ids)
            return self._advanced(rows, state, token, place)

        def goes_on(state: State) -> jax.Array:
            return (state.step < until) & ~state.done.all()

        return jax.lax.while_loop(goes_on, step, state)

    def _draw(self, rows: Rows, state: State, banned: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """The next token of each row and its log-probability; padding and 0 for those that are done."""
        logits = network.unembed(self.params, self.model_config, state.hidden)
        if self.repetition_penalty is not None:
            logits = token_choice.penalize_repeats(logits, state.seen, self.repetition_penalty)
        logits = logits + banned
        if self.constraint is not None:
            logits = jnp.where(self.constraint.allowed(state.bound), logits, NEG)
        steps = rows.steps(state.step)
        token, logprob = choose(logits, rows.random_keys, steps, self.distribution, self.settings)
        token = jnp.where(state.done, self.model_config.pad_token_id, token)
        return token, jnp.where(state.done, 0.0, logprob)

    def _written(
        self, state: State, token: jax.Array, logprob: jax.Array, stop_ids: jax.Array
    ) -> State:
        """The state with the token written down; a row that draws a stop id, or completes an ending, is done."""
        done, ending = state.done | (token[:, None] == stop_ids).any(-1), state.ending
        if self.endings is not None:
            ending = self.endings.advance(ending, token)
            done = done | self.endings.is_complete(ending)
        # Into column `step` of both.
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return state._replace(
            tokens=write(state.tokens, token[:, None], state.step),
            logprobs=write(state.logprobs, logprob[:, None], state.step),
            lengths=state.lengths + ~state.done,
            done=done,
            seen=token_choice.mark_seen(state.seen, token),
            ending=ending,
        )

    def _advanced(self, rows: Rows, state: State, token: jax.Array, place: tuple | None) -> State:
        """The state after the token just written has gone through the model."""
        step, row_steps = state.step, rows.steps(state.step)
        embedded = network.embed_text(
            self.params, self.model_config, token[:, None], dtype=self.settings.dtype
        )
        axes = self.model_config.text.position_axes
        positions = (rows.start + row_steps)[None, :, None]
        positions = jnp.broadcast_to(positions, (axes, len(rows.start), 1))
        hidden, own_keys = decoder.decode_step(
            self.layers,
            self.params["text"]["final"],
            self.model_config.text,
            embedded,
            positions,
            rows.prompt_keys,
            rows.prompt_lengths,
            state.own_keys,
            row_steps,
            place,
        )
        # The constraint follows the text, padding of finished rows included.
        bound = state.bound
        if self.constraint is not None:
            bound = self.constraint.advance(bound, token)
        return state._replace(step=step + 1, hidden=hidden, own_keys=own_keys, bound=bound)


def _fresh(
    model_config: Config,
    last: jax.Array,
    *,
    max_new_tokens: int,
    room: int,
    constraint: Any,
    dtype: DTypeLike,
) -> State:
    """The state before the first token, with room for the keys of `room` tokens; last [R, D]."""
    rows = len(last)
    return State(
        step=jnp.int32(0),
        hidden=last,
        own_keys=decoder.empty_own(model_config.text, rows, room, dtype),
        tokens=jnp.full((rows, max_new_tokens), model_config.pad_token_id, jnp.int32),
        logprobs=jnp.zeros((rows, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        bound=None if constraint is None else constraint.init(rows),
    )


# ---- All in one program ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model_config", "settings", "step"))
def _generate(
    params: Tree,
    model_config: Config,
    prompts: PromptBatch,
    keys: jax.Array,
    temperature: jax.Array,
    constraint: Any,
    endings: Any,
    *,
    settings: SamplingSettings,
    step: StepSettings,
) -> dict:
    # ---- Each prompt once ----
    computed = _compute(params, model_config, prompts, step.dtype)
    rows = Rows(
        prompt_keys=computed.keys,
        prompt_lengths=prompts.lengths,
        start=jnp.repeat(network.next_positions(prompts.positions, prompts.lengths), settings.n),
        random_keys=keys,
    )

    # ---- Its completions together ----
    loop = Loop(
        params=params,
        layers=decoder_layers.decode_layers(params["text"], model_config.text, step.dtype),
        model_config=model_config,
        distribution=Distribution(temperature, settings.top_k, settings.top_p, settings.min_p),
        constraint=constraint,
        settings=step,
        repetition_penalty=settings.repetition_penalty,
        endings=endings,
    )
    state = _fresh(
        model_config,
        jnp.repeat(computed.last, settings.n, 0),
        max_new_tokens=settings.max_new_tokens,
        room=compaction.stage_ends(settings.max_new_tokens)[0],
        constraint=constraint,
        dtype=step.dtype,
    )
    if settings.repetition_penalty is not None:
        seen = token_choice.tokens_in(
            prompts.input_ids, prompts.lengths, model_config.text.vocab_size
        )
        state = state._replace(seen=jnp.repeat(seen, settings.n, 0))
    if endings is not None:
        state = state._replace(ending=endings.init(len(state.done)))
    state = compaction.run(loop.draw_until, rows, state)
    return {
        "tokens": state.tokens,
        "logprobs": state.logprobs,
        "lengths": state.lengths,
        "finished": state.done,
        "prompts": computed if settings.prompts_kept else None,
    }


def generate(
    params: Tree,
    model_config: Config,
    prompts: PromptBatch,
    settings: SamplingSettings,
    *,
    keys: jax.Array | None = None,
    constraint: Any = None,
    endings: Any = None,
    dtype: DTypeLike = jnp.float32,
) -> dict:
    """Draw n completions of each prompt.

    Args:
        keys: typed keys [B * n], row b * n + j for sample j of prompt b; not needed when greedy.
        constraint: see the module's text, as for `endings`.

    Returns:
        tokens int32 [B*n, N] (after the last one: padding), logprobs float32 [B*n, N] of the sampled tokens under the
        temperature-scaled, suppressed, constrained distribution (before top_k, top_p and min_p, or after them:
        `logs_kept`), lengths int32 [B*n] with the last token, finished bool [B*n] (False: cut at max_new_tokens),
        prompts, the `ComputedPrompt` or None (`prompts_kept`).

    Raises:
        ValueError: at a temperature without keys.
    """
    temperature = settings.temperature
    # A traced temperature cannot be asked whether it is 0.
    greedy = not isinstance(temperature, jax.Array) and temperature == 0
    if keys is None:
        if not greedy:
            raise ValueError("sampling at a temperature needs keys")
        keys = row_keys(0, prompts.input_ids.shape[0] * settings.n)
    step = settings.of_a_step(model_config, greedy=greedy, dtype=dtype)
    prompts = prompts._replace(
        input_ids=jnp.asarray(prompts.input_ids),
        lengths=jnp.asarray(prompts.lengths, jnp.int32),
        positions=jnp.asarray(prompts.positions),
    )
    scale = jnp.float32(1.0 if greedy else temperature)
    # The rest of the settings is part of the program, too, but for what has been taken out of it.
    rest = dataclasses.replace(
        settings, temperature=1.0, stop_ids=None, suppress_ids=None, logs_kept=False
    )
    return _generate(
        params, model_config, prompts, keys, scale, constraint, endings, settings=rest, step=step
    )


def sample_completions(
    params: Tree,
    model_config: Config,
    features: network.Seen,
    prompts: Mapping[str, Any],
    special: Mapping[str, Any],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float | jax.Array,
    keys: jax.Array | None = None,
    endings: Any = None,
    **choice: Any,
) -> dict:
    """`generate` for prompts as from `Prompts.encode`, one image each.

    Args:
        features: tokens [B, I, D]; the computation takes their type, here and in `completion_log_probs`.
        special: of `tokenizer.special_ids`.
        choice: more fields of `SamplingSettings`, such as top_p.
    """
    # Positions reach over the completion, too; the prefill takes those of the prompt alone.
    width = prompts["ids"].shape[1]
    batch = PromptBatch(
        prompts["ids"], prompts["lengths"], prompts["positions"][:, :, :width], features
    )
    settings = SamplingSettings(
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=special["stop"],
        suppress_ids=special["suppress"],
        **choice,
    )
    inputs = {"keys": keys, "endings": endings, "dtype": features.tokens.dtype}
    return generate(params, model_config, batch, settings, **inputs)


# ---- The same in pieces; none changes its inputs, but for `decode`, which takes over `own_keys` -------------


@functools.partial(jax.jit, static_argnames=("model_config", "dtype"))
def prefill(
    params: Tree, model_config: Config, prompts: PromptBatch, *, dtype: DTypeLike
) -> ComputedPrompt:
    """Compute prompts from their first token on."""
    return _compute(params, model_config, prompts, dtype)


def _compute(
    params: Tree, model_config: Config, prompts: PromptBatch, dtype: DTypeLike
) -> ComputedPrompt:
    embedded = network.embed(
        params, model_config, prompts.input_ids, prompts.image_features, dtype=dtype
    )
    last, cache = decoder.prefill(
        params["text"], model_config.text, embedded, prompts.positions, prompts.lengths
    )
    return ComputedPrompt(decoder.prompt_keys(cache), last)


@functools.partial(jax.jit, static_argnames=("model_config", "room", "dtype"))
def extend(
    params: Tree,
    model_config: Config,
    keys: list,
    used: Array,
    tokens: PromptBatch,
    *,
    room: int,
    dtype: DTypeLike,
) -> ComputedPrompt:
    """Compute the prompt that has `tokens` after the first `used` of `keys`, in `room` slots; new tokens only.

    Args:
        keys: of one `ComputedPrompt`.
        used: int [1]; used + tokens.lengths <= room.
        tokens: those that follow, [1, E], without images.
    """
    embedded = network.embed_text(params, model_config, tokens.input_ids, dtype=dtype)
    last, new = decoder.extend(
        params["text"], model_config.text, embedded, tokens.positions, tokens.lengths, keys, used
    )
    return ComputedPrompt(_join(keys, used, new, room), last)


def _join(old: list, used: Array, new: list, room: int) -> list:
    """Keys [1, K, room, d]: the first `used` of old, then those of new."""
    # Slots of old keys up to `used`, of new ones behind: one choice for each slot.
    slot_numbers = jnp.arange(room)
    is_old = (slot_numbers < used[0])[:, None]

    def join(first: jax.Array, second: jax.Array) -> jax.Array:
        first = jnp.take(first, slot_numbers, axis=2, mode="clip")
        second = jnp.take(second, slot_numbers - used[0], axis=2, mode="clip")
        return jnp.where(is_old, first, second)

    return jax.tree.map(join, old, new)


@functools.partial(jax.jit, static_argnames="room")
def append(keys: list, used: Array, own_keys: list, *, room: int) -> list:
    """Join the keys of a prompt, the first `used`, and those that row 0 has drawn (`own_keys` of `decode`)."""
    return _join(keys, used, jax.tree.map(lambda drawn: drawn[:1], own_keys), room)


def decode_layers(params: Tree, model_config: Config) -> list[Tree]:
    """Make `decoder_layers.decode_layers` once for many calls of `decode`."""
    layers = params["text"]["layers"]
    # Layers that lie apart already (CPU) are used as they are.
    return layers if isinstance(layers, list) else _decode_layers(params["text"], model_config)


@functools.partial(jax.jit, static_argnames="model_config")
def _decode_layers(text: Tree, model_config: Config) -> list[Tree]:
    return decoder_layers.decode_layers(text, model_config.text)


@functools.partial(jax.jit, static_argnames=("model_config", "room", "dtype"))
def begin(
    prompts: list[ComputedPrompt],
    live: Array,
    constraint: Any,
    *,
    model_config: Config,
    room: int,
    dtype: DTypeLike,
) -> tuple[list, list, State]:
    """Put prompts side by side for `decode`: one row each (all of equal S), the first `live` of them drawn.

    Args:
        room: the most tokens of a row.

    Returns:
        (prompt keys, own keys, the state without own keys).
    """
    # Rows of a decode program lie side by side.
    prompt_keys = jax.tree.map(
        lambda *keys: jnp.concatenate(keys), *[prompt.keys for prompt in prompts]
    )
    state = _fresh(
        model_config,
        jnp.concatenate([prompt.last for prompt in prompts]),
        max_new_tokens=room,
        room=room,
        constraint=constraint,
        dtype=dtype,
    )
    # Rows beyond the live ones only fill the batch, and never draw.
    done = jnp.arange(len(prompts)) >= live
    return prompt_keys, state.own_keys, state._replace(own_keys=None, done=done)


@functools.partial(
    jax.jit, static_argnames=("model_config", "settings"), donate_argnames="own_keys"
)
def decode(
    params: Tree,
    layers: list[Tree],
    model_config: Config,
    rows: Rows,
    distribution: Distribution,
    own_keys: list,
    rest: State,
    until: Array | int,
    constraint: Any,
    *,
    settings: StepSettings,
) -> tuple[list, State]:
    """Go on to step `until` or to where all rows are done.

    Args:
        distribution: arrays, so that one program serves all values.
        own_keys: of `begin` or of the call before; taken over.
        rest: the `State` without its own keys, which go apart because they alone are taken over.

    Returns:
        (own_keys, rest) for the next call.
    """
    loop = Loop(
        params=params,
        layers=layers,
        model_config=model_config,
        distribution=distribution,
        constraint=constraint,
        settings=settings,
    )
    state = loop.draw_until(rows, rest._replace(own_keys=own_keys), until)
    return state.own_keys, state._replace(own_keys=None)
