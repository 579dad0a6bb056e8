"""The programs of the engine: R completions side by side, each at a step of its own.

`sampling.Loop` draws a few tokens of all rows in one call; between two calls rows come (`join`) and go. What belongs to
a row alone, its settings included, is data, so that one program serves all mixtures.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cxr_jax.inference import constrained, sampling
from cxr_jax.inference.compaction import Rows
from cxr_jax.inference.constrained import Constraint
from cxr_jax.inference.sampling import ComputedPrompt
from cxr_jax.inference.token_choice import RowChoice, StepSettings
from cxr_jax.models.network import decoder
from cxr_jax.models.network.config import Config
from cxr_jax.runtime.trees import Array, Tree
from cxr_jax.serve.slots.layout import TOKENS_A_TURN, Size

# ---- What the device keeps ---------------------------------------------------------------------------------


class Bound(NamedTuple):
    """Where R rows are in the rules, and which rows follow them at all."""

    is_bound: Any  # bool [R]
    rules: constrained.State


class RowRules(NamedTuple):
    """A constraint, for the loop, that only some of the rows follow."""

    rules: Constraint

    def allowed(self, bound: Bound) -> jax.Array:
        """Find the tokens that may come next, bool [R, V]."""

        def by_rules() -> jax.Array:
            return self.rules.allowed(bound.rules) | ~bound.is_bound[:, None]

        def all_tokens() -> jax.Array:
            return jnp.ones((len(bound.is_bound), len(self.rules.classes)), bool)

        # The tables are looked into where a row follows them, only.
        return jax.lax.cond(bound.is_bound.any(), by_rules, all_tokens)

    def advance(self, bound: Bound, token: jax.Array) -> Bound:
        """Move on by one token of each row, int32 [R]."""
        # Also rows that follow no rules: what their state is does not matter.
        return bound._replace(rules=self.rules.advance(bound.rules, token))


class Room(NamedTuple):
    """R rows that decode side by side; a free one is done."""

    prompt_keys: Any  # [(k, v)] a layer, [R, K, S, d]
    own_keys: Any  # [(k, v)] a layer, [R, K, N, d]
    hidden: Any  # [R, D] that the next token is drawn from
    prompt_lengths: Any  # int32 [R]
    start: Any  # int32 [R]: the position of the first token drawn
    random_keys: Any  # typed keys [R]
    choice: RowChoice
    bound: Any  # `Bound`, or None where the model has no rules
    drawn: Any  # int32 [R]: tokens drawn so far
    done: Any  # bool [R]


class Entry(NamedTuple):
    """What a row brings beside its prompt: numbers, which are data."""

    slot_number: Any  # int32: the row that it takes
    length: Any  # int32: tokens of its prompt
    start: Any  # int32: the position of its first token
    seed: Any  # uint32
    mark: Any  # uint32: of its prompt's content
    number: Any  # int32: of the sample
    temperature: Any  # float32
    top_k: Any  # int32
    top_p: Any  # float32
    is_bound: Any  # bool: whether it follows the rules
    rule_start: Any  # int32: the rules' state before its first token
    budget: Any  # int32: tokens that the rules may use


class Drawn(NamedTuple):
    """What a turn has added to R rows."""

    tokens: Any  # int32 [R, TOKENS_A_TURN]
    logprobs: Any  # float32 [R, TOKENS_A_TURN]
    lengths: Any  # int32 [R]: how many of them
    done: Any  # bool [R]: a stop token was the last


# ---- Rows come and go --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model_config", "room_size", "has_rules", "dtype"))
def empty_room(model_config: Config, *, room_size: Size, has_rules: bool, dtype: DTypeLike) -> Room:
    """Make a room whose rows are all free."""
    # Every array has its first axis for the rows, so that one rule moves them all.
    rows, text = room_size.rows, model_config.text
    zeros = jnp.zeros(rows, jnp.int32)
    # Every type is said: one that JAX chose by itself would make another program of what it enters.
    choice = RowChoice(
        jnp.zeros(rows, jnp.float32),
        jnp.full(rows, text.vocab_size, jnp.int32),
        jnp.full(rows, 2, jnp.float32),
    )
    # Of models whose tokenizer knows no answers there is nothing to follow.
    bound = Bound(jnp.zeros(rows, bool), constrained.State(zeros, zeros, zeros))
    return Room(
        prompt_keys=decoder.empty_own(text, rows, room_size.prompt_slots, dtype),
        own_keys=decoder.empty_own(text, rows, room_size.own_slots, dtype),
        hidden=jnp.zeros((rows, text.hidden_size), dtype),
        # A free row must see a key, or its softmax is over nothing.
        prompt_lengths=zeros + 1,
        start=zeros,
        random_keys=sampling.row_keys(0, rows),
        choice=choice,
        bound=bound if has_rules else None,
        drawn=zeros,
        done=jnp.ones(rows, bool),
    )


@functools.partial(jax.jit, donate_argnames="room")
def join(room: Room, prompt: ComputedPrompt, entry: Entry) -> Room:
    """Put a computed prompt [1, ..] of at most S slots into a free row; the room is taken over."""
    # All of a row is written anew, but for its own keys: slots at and beyond its step are never seen.
    slot_number, fold = entry.slot_number, jax.random.fold_in

    def put(rows: jax.Array, row: jax.Array) -> jax.Array:
        return rows.at[slot_number].set(row)

    def put_keys(rows: jax.Array, keys: jax.Array) -> jax.Array:
        # Slots beyond are those of an earlier row, and masked by this one's length.
        return jax.lax.dynamic_update_slice(rows, keys, (slot_number, 0, 0, 0))

    bound = room.bound
    if bound is not None:
        zero = jnp.int32(0)
        state = constrained.State(entry.rule_start, zero, entry.budget)
        bound = jax.tree.map(put, bound, Bound(entry.is_bound, state))
    # The same noise as that of `generation.sample_keys`.
    random_key = fold(fold(jax.random.key(entry.seed), entry.mark), entry.number)
    # As data: neither neighbours nor programs depend on it.
    choice = RowChoice(entry.temperature, entry.top_k, entry.top_p)
    return Room(
        prompt_keys=jax.tree.map(put_keys, room.prompt_keys, prompt.keys),
        own_keys=room.own_keys,
        hidden=put(room.hidden, prompt.last[0]),
        prompt_lengths=put(room.prompt_lengths, entry.length),
        start=put(room.start, entry.start),
        random_keys=put(room.random_keys, random_key),
        choice=jax.tree.map(put, room.choice, choice),
        bound=bound,
        drawn=put(room.drawn, jnp.int32(0)),
        done=put(room.done, jnp.bool_(False)),
    )


@functools.partial(jax.jit, static_argnames="room_size")
def take_row(room: Room, slot_number: Array, *, room_size: Size) -> Room:
    """Copy one row: a room of its own, with as many slots as a larger one has."""
    # In the slots of the larger room, so that whoever takes it knows one shape only.
    row = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, slot_number, 1), room)
    return row._replace(
        prompt_keys=with_slots(row.prompt_keys, slots=room_size.prompt_slots),
        own_keys=with_slots(row.own_keys, slots=room_size.own_slots),
    )


@functools.partial(jax.jit, donate_argnames="room")
def put_row(room: Room, row: Room, slot_number: Array) -> Room:
    """Put a row with as many slots into a free row of this room, which is taken over."""
    return jax.tree.map(lambda leaf, taken: leaf.at[slot_number].set(taken[0]), room, row)


# ---- Tokens ------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model_config", "settings"), donate_argnames="room")
def advance(
    params: Tree,
    layers: list[Tree],
    model_config: Config,
    rules: Constraint | None,
    room: Room,
    left: Array,
    *,
    settings: StepSettings,
) -> tuple[Room, Drawn]:
    """Draw the next tokens of all rows, TOKENS_A_TURN at most; the room is taken over.

    Args:
        rules: those that rows may follow.
        left: bool [R]: rows that are free from now on.
        settings: their `greedy` does not matter: each row has a temperature.
    """
    row_count = len(room.done)
    shape = row_count, TOKENS_A_TURN
    # The loop of everybody else, told how many tokens each row had before its step 0.
    loop = sampling.Loop(
        params=params,
        layers=layers,
        model_config=model_config,
        distribution=room.choice,
        constraint=None if rules is None else RowRules(rules),
        settings=settings,
    )
    rows = Rows(room.prompt_keys, room.prompt_lengths, room.start, room.random_keys, room.drawn)
    # The tokens of this turn alone: the host keeps those before.
    state = sampling.State(
        step=jnp.int32(0),
        hidden=room.hidden,
        own_keys=room.own_keys,
        tokens=jnp.full(shape, model_config.pad_token_id, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        lengths=jnp.zeros(row_count, jnp.int32),
        # With what the host has freed since the last turn.
        done=room.done | left,
        bound=room.bound,
    )
    state = loop.draw_until(rows, state, TOKENS_A_TURN)
    # Prompts, keys of chance and settings stay as they are.
    after = room._replace(
        own_keys=state.own_keys,
        hidden=state.hidden,
        bound=state.bound,
        # Free rows stay at 0, however long they have been free: their slot must exist.
        drawn=jnp.where(state.done, 0, room.drawn + state.lengths),
        done=state.done,
    )
    return after, Drawn(state.tokens, state.logprobs, state.lengths, state.done)


# ---- Prompts -----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="slots")
def with_slots(keys: list, *, slots: int) -> list:
    """Fill up, or cut, the keys [1, K, s, d] of a prompt to so many slots."""
    return jax.tree.map(lambda leaf: _of_slots(leaf, slots), keys)


def _of_slots(keys: jax.Array, count: int) -> jax.Array:
    # Cut where nothing is filled beyond, or filled up with what nobody sees yet.
    keys = keys[:, :, :count]
    return jnp.pad(keys, ((0, 0), (0, 0), (0, count - keys.shape[2]), (0, 0)))
