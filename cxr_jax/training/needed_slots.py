"""Texts of a batch in as many slots as they need: one program, in it a branch for each length, picked on the device.

Arrays have one static shape, that of the longest text a run may have; most texts are a third of it. So rows of about
equal length come into the same micro-batch, and a micro-batch is computed by the smallest branch that holds its longest
row. Images do not depend on the length: they are encoded before the choice, and their gradient is formed behind it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.runtime.batch_rows import row_shards, take_rows
from cxr_jax.runtime.trees import Tree
from cxr_jax.training.trainable import join_trees, split_tower

# Branches end at these shares of a row, prompt included, rounded up to GRAIN slots; rows below LEAST_SLOTS are quick
# anyway and have one program, which compiles sooner.
SHARES = (1 / 4, 3 / 8, 7 / 16, 9 / 16, 3 / 4)
GRAIN, LEAST_SLOTS = 64, 768


# ---- Rows of about equal length come together --------------------------------------------------------------


def order_by_length(lengths: jax.Array, parts: int, shards: int = 1) -> jax.Array:
    """Order rows such that about equal ones come into the same part of `micro_batches.cut`.

    Args:
        lengths: int [R].
        parts: micro-batches.
        shards: devices that the rows are divided over; no row leaves its own.

    Returns:
        int [shards, R / shards], counted from the first row of each device.
    """
    order = jnp.argsort(lengths.reshape(shards, -1), axis=1, stable=True)
    # Part i of `cut` is rows i, i + parts, ...
    return order.reshape(shards, parts, -1).swapaxes(1, 2).reshape(shards, -1)


def sort_texts(batch: Tree, parts: int) -> Tree:
    """Sort the rows of a batch of texts for `pick_text_slots`; as they are where it has no choice.

    Args:
        batch: rows on axis 0, but for the prompts' positions [axes, B, ..].
        parts: as for `order_by_length`.
    """
    if parts == 1 or len(_rooms(batch)) == 1:
        return batch
    lengths = text_lengths(batch)
    shards = row_shards() if len(lengths) % (row_shards() * parts) == 0 else 1
    # On each device alone, or pixels would cross.
    take = functools.partial(take_rows, row_index=order_by_length(lengths, parts, shards))
    prompts = {
        name: jnp.moveaxis(take(jnp.moveaxis(leaf, 1, 0)), 0, 1)
        if name == "positions"
        else take(leaf)
        for name, leaf in batch["prompts"].items()
    }
    others = {name: leaf for name, leaf in batch.items() if name != "prompts"}
    return {"prompts": prompts, **jax.tree.map(take, others)}


# ---- A branch for each length ------------------------------------------------------------------------------


class RowSlots(NamedTuple):
    """Room of a row: `row` slots in all, of which the completion has up to `completion`, wherever it begins."""

    row: int
    completion: int


def text_lengths(batch: Tree) -> jax.Array:
    """Count the tokens of each row, prompt and completion: int [B]."""
    return batch["prompts"]["lengths"] + batch["lengths"]


def text_slots(width: int, max_completion: int) -> list[RowSlots]:
    """List the rooms that rows of a prompt up to `width` and a completion up to `max_completion` are computed in."""
    most = width + max_completion
    whole = RowSlots(most, max_completion)
    if most < LEAST_SLOTS:
        return [whole]
    rows = {-(-round(share * most) // GRAIN) * GRAIN for share in SHARES}
    # Some of a row is its prompt: the output matrix is spared for it.
    rooms = [
        RowSlots(row, min(max_completion, row - min(width // 2, row // 4))) for row in sorted(rows)
    ]
    return [*(room for room in rooms if room.row < most), whole]


def pick_slots(
    compute: Callable[[Tree, Any], Any],
    fits: Callable[[Tree, Any], jax.Array],
    rooms: Sequence[Any],
) -> Callable[[Tree], Any]:
    """Compute a part in the smallest room that holds it.

    Args:
        compute: (part, room) -> a tree of the same shapes for each room: a branch of the program each.
        fits: (part, room) -> whether it does; what fits a room fits the larger ones, and all fit the last.
        rooms: ascending.
    """

    def pick(part: Tree) -> Any:
        if len(rooms) == 1:
            return compute(part, rooms[0])
        too_small = sum((~fits(part, room)).astype(jnp.int32) for room in rooms[:-1])
        branches = [functools.partial(_in_room, compute, room) for room in rooms]
        return jax.lax.switch(too_small, branches, part)

    return pick


def _in_room(compute: Callable[[Tree, Any], Any], room: Any, part: Tree) -> Any:
    return compute(part, room)


def pick_text_slots(compute: Callable[[Tree, RowSlots], Any]) -> Callable[[Tree], Any]:
    """`pick_slots` for a part {"prompts", "completions", "lengths", ..} of texts."""

    def fits(part: Tree, room: RowSlots) -> jax.Array:
        # Both: a long answer to a short question may fit the row and not what is read of it.
        row_fits = text_lengths(part).max() <= room.row
        return row_fits & (part["lengths"].max() <= room.completion)

    def pick(part: Tree) -> Any:
        return pick_slots(compute, fits, _rooms(part))(part)

    return pick


def _rooms(batch: Tree) -> list[RowSlots]:
    return text_slots(batch["prompts"]["ids"].shape[1], batch["completions"].shape[1])


# ---- Gradients, the tower outside of the branches -----------------------------------------------------------


def gradients_in_slots(
    loss: Callable[..., tuple[jax.Array, Any]],
    encode: Callable[[Tree, Tree], Any],
    in_slots: Callable[[Callable[..., Any]], Callable[[Tree], Any]],
) -> Callable[[Tree, Tree], tuple[Tree, Any]]:
    """Build (train, part) -> (gradients of `loss`, what it gives beside).

    The tower is in the program once, forward before the choice of a branch, backward behind it. In each branch it would
    be most of the program.

    Args:
        loss: (train, part with the "features" of its images, room ..) -> (loss, anything).
        encode: (train, part) -> the features, a function of the tower alone (`split_tower`).
        in_slots: as `pick_text_slots`.
    """

    def differentiate(train: Tree, part: Tree) -> tuple[Tree, Any]:
        tower, rest = split_tower(train)
        # Forward now; `pull_back` is called once the gradient of the features is known.
        features, pull_back = jax.vjp(lambda tower: encode(join_trees(tower, rest), part), tower)
        # Where the tower is frozen, nothing asks for the gradient of its features.
        is_tower_trained = bool(jax.tree.leaves(tower))

        def compute(part: Tree, *room: Any) -> tuple[Any, Any]:
            def part_loss(rest: Tree, features: Any) -> tuple[jax.Array, Any]:
                return loss(join_trees(tower, rest), {**part, "features": features}, *room)

            # Inside of the branch: differentiating the choice would keep the residuals of every branch.
            gradient = jax.grad(part_loss, (0, 1) if is_tower_trained else (0,), has_aux=True)
            return gradient(rest, part["features"])

        (d_rest, *d_features), extra = in_slots(compute)({**part, "features": features})
        if not is_tower_trained:
            return d_rest, extra
        (d_tower,) = pull_back(*d_features)
        return join_trees(d_tower, d_rest), extra

    return differentiate
