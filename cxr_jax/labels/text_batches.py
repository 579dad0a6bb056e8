"""Python strings through a jitted parser of bytes: few shapes, so few programs are compiled."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError

_MAX_ROWS = 1024  # texts in one call
_MAX_CELLS = 1 << 20  # bytes in one call: bounds the memory of what a parser keeps per byte


def map_texts(
    program: Callable[..., Any], texts: Sequence[str | bytes], *columns: np.ndarray
) -> Any:
    """Run a program of bytes over texts, in groups of like length, with shapes rounded up.

    Args:
        program: (stream uint8 [B, L], lengths int32 [B], *columns) -> a tree of arrays [B, ..].
        texts: N texts, of any length.
        columns: what else the program needs of each text, [N, ..].

    Returns:
        The tree of the program, as numpy arrays with a row a text, in order.

    Raises:
        UserError: for what is no list of texts.
    """
    encoded = _encode(texts)
    # Abstract shapes say what the result looks like, so that no text at all gives empty arrays of the right kind.
    example = [jnp.zeros((1, *column.shape[1:]), column.dtype) for column in columns]
    shapes = jax.eval_shape(
        program, jnp.zeros((1, 64), jnp.uint8), jnp.zeros(1, jnp.int32), *example
    )
    results = jax.tree.map(
        lambda shape: np.zeros((len(encoded), *shape.shape[1:]), shape.dtype), shapes
    )

    def run_group(rows: list[int]) -> None:
        batch_size, width = _group_shape(rows, encoded)
        stream = np.zeros((batch_size, width), np.uint8)
        lengths = np.zeros(batch_size, np.int32)
        for place, row in enumerate(rows):
            stream[place, : len(encoded[row])] = np.frombuffer(encoded[row], np.uint8)
            lengths[place] = len(encoded[row])
        # Rows past the last text hold the columns of some text; what they give is dropped.
        filled = np.resize(rows, batch_size)
        outputs = program(stream, lengths, *(column[filled] for column in columns))
        for result, output in zip(
            jax.tree.leaves(results), jax.tree.leaves(jax.device_get(outputs)), strict=True
        ):
            result[rows] = output[: len(rows)]

    # A loop over bytes keeps one core busy, so groups run side by side; the first of each shape alone: it compiles.
    groups = _group_by_length(encoded)
    first_of_shape = {_group_shape(rows, encoded): rows for rows in reversed(groups)}
    for rows in first_of_shape.values():
        run_group(rows)
    rest = [rows for rows in groups if rows is not first_of_shape[_group_shape(rows, encoded)]]
    if rest:
        with futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(run_group, rest))
    return results


def _encode(texts: Sequence[str | bytes]) -> list[bytes]:
    """The texts as UTF-8; UserError for what is no list of texts."""
    if isinstance(texts, (str, bytes, Mapping)):
        raise UserError(f"texts: expected a list of texts, not one {type(texts).__name__}")
    for row, text in enumerate(texts):
        if not isinstance(text, (str, bytes)):
            raise UserError(f"texts: row {row} is a {type(text).__name__}, not a text")
    # A lone surrogate is no Unicode text, but JSON can produce one: it passes as three bytes that match nothing.
    return [
        text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass") for text in texts
    ]


def _group_by_length(encoded: list[bytes]) -> list[list[int]]:
    """Cut the rows, shortest text first, into groups that fit one call."""
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    groups: list[list[int]] = []
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop - start) < _MAX_ROWS:
            # The next text is the longest so far: it sets the width of the group.
            if _power_of_two(stop + 1 - start) * _width(encoded[order[stop]]) > _MAX_CELLS:
                break
            stop += 1
        groups.append(order[start:stop])
        start = stop
    return groups


def _group_shape(rows: list[int], encoded: list[bytes]) -> tuple[int, int]:
    return _power_of_two(len(rows)), _width(encoded[rows[-1]])


def _width(text: bytes) -> int:
    """A power of two, or three quarters of one."""
    whole = _power_of_two(max(64, len(text)))
    three_quarters = whole * 3 // 4
    return three_quarters if 64 < whole and len(text) <= three_quarters else whole


def _power_of_two(count: int) -> int:
    """The smallest that is not below the count."""
    return 1 << max(0, count - 1).bit_length()
