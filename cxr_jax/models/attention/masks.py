"""Which keys a query sees: said by what it follows from, so that any block of it can be made by itself."""

import functools
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from cxr_jax.runtime.trees import Array

NEG = -1e30  # finite, so that a fully masked row gives no NaN


def key_bias(mask: Array) -> jax.Array:
    """Make a float32 bias: 0 where a key may be seen, else very negative; shape as mask."""
    return jnp.where(mask, 0.0, NEG).astype(jnp.float32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "parts", "images", "window", "start"],
    meta_fields=["is_causal"],
)
@dataclass(frozen=True, kw_only=True)
class Mask:
    """A query sees the keys that all of these allow; None allows all. B sequences, T queries, S keys of each.

    Query t stands at place t among the keys, or at start + t.
    """

    keys: Array | None = None  # bool [B, S]: False at padding
    parts: tuple[Array, Array] | None = None  # int [B, T], [B, S]: only keys of the query's part
    is_causal: bool = False  # only keys at the query's place and before it
    images: tuple[Array, Array] | None = None  # int [B, T], [B, S]: also later ones of its image
    window: Array | int | None = None  # of the keys before its place, the last window - 1
    start: Array | None = None  # int [B] or [1]

    @property
    def skips_later_keys(self) -> bool:
        """Whether it is known, before there are data, that no query sees a key behind its number."""
        return self.is_causal and self.images is None and self.start is None

    def seen(
        self, queries: int, keys: int, first_query: Array | int = 0, first_key: Array | int = 0
    ) -> jax.Array | None:
        """Compute bool [B or 1, queries or 1, keys]: a block of so many queries and keys; None if all see all."""

        def part_of(array: Array, first: Array | int, size: int) -> jax.Array:
            if array.shape[-1] == size:
                return jnp.asarray(array)
            return jax.lax.dynamic_slice_in_dim(array, first, size, -1)

        # Each condition by itself, with axes of one element where it is the same for all.
        allowed: list[Any] = []
        if self.keys is not None:
            allowed.append(part_of(self.keys, first_key, keys)[:, None, :])
        if self.parts is not None:
            query_parts = part_of(self.parts[0], first_query, queries)
            key_parts = part_of(self.parts[1], first_key, keys)
            allowed.append(query_parts[:, :, None] == key_parts[:, None, :])
        if self.is_causal or self.window is not None:
            # One place for all sequences, unless each begins elsewhere.
            start = jnp.zeros(1, jnp.int32) if self.start is None else self.start
            # Places are counted by tokens, whatever the positions that turn them.
            places = (start[:, None] + first_query + jnp.arange(queries))[:, :, None]
            key_places = (first_key + jnp.arange(keys))[None, None, :]
        if self.is_causal:
            is_before = key_places <= places
            if self.images is not None:
                query_images = part_of(self.images[0], first_query, queries)[:, :, None]
                key_images = part_of(self.images[1], first_key, keys)[:, None, :]
                is_before |= (query_images == key_images) & (key_images > 0)
            allowed.append(is_before)
        # Behind itself a token sees its own image alone, and no window is in the way there.
        if self.window is not None:
            allowed.append(key_places > places - self.window)
        return functools.reduce(jnp.logical_and, allowed) if allowed else None

    def bias(self, queries: int, keys: int) -> jax.Array | None:
        """Compute all of it at once as a float32 bias [B or 1, 1, 1, queries or 1, keys]; None if all see all."""
        seen = self.seen(queries, keys)
        return None if seen is None else key_bias(seen)[:, None, None]

    def filled_up(self, keys: int, query_fill: int, key_fill: int) -> Self:
        """Say the same of so many queries and keys more, which nobody sees."""

        def fill(array: Array, count: int) -> jax.Array:
            return jnp.pad(jnp.asarray(array), ((0, 0), (0, count)))

        # Keys alone: a query too many is one whose output is cut off.
        is_key = self.keys
        if key_fill:
            is_key = fill(jnp.ones((1, keys), bool) if is_key is None else is_key, key_fill)
        # Filled up by 0 on both sides; keys that are filled up are not seen by the above.
        pairs = (
            pair and (fill(pair[0], query_fill), fill(pair[1], key_fill))
            for pair in (self.parts, self.images)
        )
        parts, images = pairs
        return replace(self, keys=is_key, parts=parts, images=images)
