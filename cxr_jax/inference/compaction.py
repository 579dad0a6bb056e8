"""Decoding in stages: finished rows leave, and the cache grows, inside one program.

Completions end at different lengths. A loop over all rows to the longest one spends about half its work on rows that
are done and on cache slots that are empty. So the loop is cut into a few stages of fixed length. At the end of a stage
the rows that are left move together into the next smaller power-of-two share of the batch that holds them, and their
own keys get the room that the next stage needs. Each stage is compiled for every such share and the device picks one:
no host round trip, one compilation, and over a mesh every device takes the same branch and moves only its own rows.

A completion does not change: the noise of a token follows from its row's key, and prompts' keys stay where they are.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.models.layers import is_shallow
from cxr_jax.runtime.batch_rows import by_shard, put_rows, row_shards, take_rows

# Ends of all stages but the last, as shares of the most tokens.
ENDS = (5 / 16, 15 / 32, 5 / 8)
# Ends are multiples of GRAIN tokens; a loop of fewer tokens than SHORTEST is one stage.
GRAIN, SHORTEST = 32, 96
# A batch shrinks to 1/8, but to no fewer than LEAST_ROWS rows.
HALVINGS, LEAST_ROWS = 3, 8


class Rows(NamedTuple):
    """What R rows draw from: constant while they draw. B prompts, R = B * n rows in prompt order."""

    prompt_keys: Any  # [(k, v)] a layer, [B, K, S, d]
    prompt_lengths: Any  # int32 [B]
    start: Any  # int32 [R]: the position of each row's first token
    random_keys: Any  # typed keys [R]
    drawn: Any = (
        None  # int32 [R]: tokens that each row has before step 0; None: none, they begin together
    )

    def steps(self, step: jax.Array) -> jax.Array:
        """Count the tokens of each row at a step of the loop: int32, or int32 [R] where they did not begin together."""
        return step if self.drawn is None else self.drawn + step


DrawUntil = Callable[[Rows, Any, int, tuple | None], Any]
"""(rows, state, until, place) -> state: draws until step `until` or until all rows are done."""


def stage_ends(max_tokens: int) -> list[int]:
    """Compute the token counts at which rows may leave; `most`, the last one, ends the loop."""
    if max_tokens < SHORTEST:
        return [max_tokens]
    early_ends = {GRAIN * max(1, round(share * max_tokens / GRAIN)) for share in ENDS}
    # A short loop may round two ends to one, or to its own end.
    return [*sorted(early_end for early_end in early_ends if early_end < max_tokens), max_tokens]


def sizes(rows: int, shards: int = 1) -> list[int]:
    """List the row counts that a stage is compiled for: all, and halves of it that `shards` devices divide evenly."""
    counts = [rows]
    while (
        len(counts) <= HALVINGS and counts[-1] % (2 * shards) == 0 and counts[-1] // 2 >= LEAST_ROWS
    ):
        counts.append(counts[-1] // 2)
    return counts


def stage_rows(rows: int, shards: int, stage: int, layers: int) -> list[int]:
    """List the row counts that a stage of a model of so many layers is compiled for: those of `sizes`, or some of them.

    A deep model's loop is large, and there is one for each count. So its stage 1 (the second) has all rows or half of
    them, stage 2 a quarter, too, and stage 3 an eighth instead: 9 loops for 13. What that costs is counted in
    `benchmarks/rollout_reads.py`.
    """
    if stage == 0:
        return [rows]  # nobody has finished yet
    counts = sizes(rows, shards)
    if is_shallow(layers):
        return counts
    return [count for halvings, count in enumerate(counts) if halvings in (0, 1, stage)]


def run(draw_until: DrawUntil, rows: Rows, state: Any) -> Any:
    """Run a decode loop to the end of `state.tokens` [R, N], in stages.

    Args:
        draw_until: the loop; its place as in `attention.following_attention`.
        rows: all rows.
        state: a `sampling.State` whose own keys have room for the first stage.

    Returns:
        The state without own keys.
    """
    row_count, last_end = len(rows.start), state.tokens.shape[1]
    # Rows that do not divide evenly are not divided at all.
    shards = row_shards() if len(rows.prompt_lengths) % row_shards() == 0 else 1
    stages = _Stages(draw_until, rows, last_end, shards)
    for stage_number, until in enumerate(stage_ends(last_end)):
        row_options = stage_rows(row_count, shards, stage_number, len(state.own_keys))
        # Without a smaller size there is nothing to choose.
        if len(row_options) == 1:
            state = stages.with_all_rows(until, state)
            continue
        # All devices take the same branch, so the one with the most rows left decides.
        alive = shards * jnp.sum(~by_shard(state.done, shards), axis=1).max()
        smallest = sum((alive <= stage_rows).astype(jnp.int32) for stage_rows in row_options[1:])
        branches = [
            functools.partial(stages.with_rows, stage_rows, until) for stage_rows in row_options
        ]
        state = jax.lax.switch(smallest, branches, state)
    return state


@dataclass(frozen=True)
class _Stages:
    """The loop, its rows, and what every stage needs to know of them."""

    draw_until: DrawUntil
    rows: Rows
    last_end: int  # tokens at which the last stage ends
    shards: int  # devices that divide the rows

    def with_rows(self, size: int, until: int, state: Any) -> Any:
        """Run the stage that ends at `until` with `size` rows: those not done, filled up with some that are."""
        row_count, prompts = len(self.rows.start), len(self.rows.prompt_lengths)
        if size == row_count:
            return self.with_all_rows(until, state)

        # ---- The rows that are left come together, each on its own device ----
        done = by_shard(state.done, self.shards)
        # Stable: rows that go on come first, in their own order, on each device.
        index = jnp.argsort(done, axis=1, stable=True)[:, : size // self.shards]
        rows, remaining_place = self._rows_at(index, alone=size <= prompts)
        remaining = _take(state._replace(step=()), index)._replace(step=state.step)
        remaining = self.draw_until(rows, _grown(remaining, until), until, remaining_place)

        # ---- and go back to where they were ----
        drawn = self._without_unread_keys(remaining, until)
        # The others grow alike, since both branches must give the same shapes.
        grown_state = self._without_unread_keys(_grown(state, until), until)
        # The step is one number for all rows, and no row of its own.
        merged = jax.tree.map(
            lambda old, new: put_rows(old, index, new),
            grown_state._replace(step=()),
            drawn._replace(step=()),
        )
        return merged._replace(step=drawn.step)

    def with_all_rows(self, until: int, state: Any) -> Any:
        """Run the stage that ends at `until` with every row where it is."""
        drawn = self.draw_until(self.rows, _grown(state, until), until, None)
        return self._without_unread_keys(drawn, until)

    def _rows_at(self, index: jax.Array, *, alone: bool) -> tuple[Rows, tuple | None]:
        """The rows at `index` and their place among all. alone: each gets a copy of its prompt, which takes as much
        memory again as all prompts take, at most; else prompts stay where they are."""
        rows, row_count = self.rows, len(self.rows.start)
        prompts = rows.prompt_keys, rows.prompt_lengths
        place: tuple | None = (index, row_count)
        if alone:
            prompts = _take(prompts, index // (row_count // len(rows.prompt_lengths)))
            place = None
        return Rows(*prompts, *_take((rows.start, rows.random_keys), index)), place

    def _without_unread_keys(self, state: Any, until: int) -> Any:
        """The state; after the last stage without own keys, which nobody reads any more."""
        return state._replace(own_keys=()) if until == self.last_end else state


def _take(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: take_rows(leaf, index), tree)


def _grown(state: Any, room: int) -> Any:
    """The state with room for the own keys of `room` tokens."""

    def pad(keys: jax.Array) -> jax.Array:
        # On the axis of the tokens; the new slots are masked until they are filled.
        return jnp.pad(keys, ((0, 0), (0, 0), (0, room - keys.shape[2]), (0, 0)))

    return state._replace(own_keys=jax.tree.map(pad, state.own_keys))
