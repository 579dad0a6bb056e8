"""Python strings through a jitted parser of bytes: few shapes, so few programs are compiled."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError

_ROWS = 1024  # texts in one call
_CELLS = 1 << 20  # bytes in one call: bounds the memory of what a parser keeps per byte


def map_texts(program: Callable, texts: Sequence[str | bytes], *columns: np.ndarray):
    """program(stream uint8 [B, L], lengths [B], *columns) -> a tree of arrays [B, ..], for texts: numpy arrays, a row
    a text. columns: what else the program needs of each text, [N, ..].

    Texts are grouped by length, and shapes rounded up. Raises UserError for what is no list of texts.
    """
    if isinstance(texts, (str, bytes, Mapping)):
        raise UserError(f"texts: expected a list of texts, not one {type(texts).__name__}")
    for i, text in enumerate(texts):
        if not isinstance(text, (str, bytes)):
            raise UserError(f"texts: row {i} is a {type(text).__name__}, not a text")
    # A lone surrogate is no Unicode text, but JSON can produce one: it passes as three bytes that match
    # nothing.
    coded = [t if isinstance(t, bytes) else t.encode("utf-8", "surrogatepass") for t in texts]
    order = sorted(range(len(coded)), key=lambda i: len(coded[i]))
    one = [jnp.zeros((1, *c.shape[1:]), c.dtype) for c in columns]
    shapes = jax.eval_shape(program, jnp.zeros((1, 64), jnp.uint8), jnp.zeros(1, jnp.int32), *one)
    out = jax.tree.map(lambda s: np.zeros((len(coded), *s.shape[1:]), s.dtype), shapes)
    parts, at = [], 0
    while at < len(order):
        parts.append(_rows(coded, order, at))
        at += len(parts[-1])

    def shape(rows):
        return _pow2(len(rows)), _width(coded[rows[-1]])

    def run(rows):
        stream = np.zeros(shape(rows), np.uint8)
        lengths = np.zeros(len(stream), np.int32)
        for r, i in enumerate(rows):
            stream[r, : len(coded[i])] = np.frombuffer(coded[i], np.uint8)
            lengths[r] = len(coded[i])
        filled = np.resize(rows, len(stream))  # what stands in rows past the last text is dropped
        got = jax.device_get(program(stream, lengths, *(c[filled] for c in columns)))
        jax.tree.map(lambda into, value: into.__setitem__(rows, value[: len(rows)]), out, got)

    # A loop over bytes keeps one core busy, so parts run side by side; the first of each shape alone: it compiles.
    firsts = {shape(rows): rows for rows in reversed(parts)}
    for rows in firsts.values():
        run(rows)
    rest = [rows for rows in parts if rows is not firsts[shape(rows)]]
    if rest:
        with futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(run, rest))
    return out


def _rows(coded, order, at) -> list[int]:
    """The next texts, shortest first, that fit one call together."""
    stop = at + 1
    while stop < len(order) and (stop - at) < _ROWS:
        if _pow2(stop + 1 - at) * _width(coded[order[stop]]) > _CELLS:
            break
        stop += 1
    return order[at:stop]


def _width(text: bytes) -> int:
    """A power of two, or three quarters of one."""
    whole = _pow2(max(64, len(text)))
    return whole * 3 // 4 if 64 < whole and len(text) <= whole * 3 // 4 else whole


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
