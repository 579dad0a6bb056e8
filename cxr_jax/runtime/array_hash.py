"""A 64-bit hash of an array's content that is the same on any mesh, any number of processes, and in NumPy.

Each 32-bit word of the array is mixed with its position in the whole array, twice over, and the two results are summed
modulo 2^32. Integer sums do not depend on their order, so neither does the hash depend on how the array is divided. Of
one word, each mix is a bijection: whatever changes in a single word changes the hash with certainty; any other
damage is missed once in 2^64. Position and type matter; the shape, beyond the order of the words, does not.
"""

import jax
import jax.numpy as jnp
import numpy as np

# (odd multiplier of the position, offset, two odd multipliers of the mix) of each half of the hash: digits of pi.
_HALVES = (
    (0x243F6A89, 0x85A308D3, 0x13198A2F, 0x03707345),
    (0xA4093823, 0x299F31D0, 0x082EFA99, 0xEC4E6C89),
)
_CHUNK = 1 << 20  # words that NumPy works on at a time: they and their index stay in the cache


def of(arrays: dict) -> dict[str, str]:
    """{name: hash as 16 hex digits} of JAX arrays, computed where they lie; every process calls this, and gets all.

    Types of 1, 2, 4 or 8 bytes; at most 2^32 words tell their positions apart.
    """
    return (
        dict(zip(arrays, map(_hex, np.asarray(_on_device(list(arrays.values())))), strict=True))
        if arrays
        else {}
    )


def of_host(x: np.ndarray) -> str:
    """The same hash of an array on the host, with no copy of it as a whole."""
    words = np.ascontiguousarray(x).reshape(-1)
    words = words.view(np.uint32 if x.dtype.itemsize >= 4 else f"u{x.dtype.itemsize}")
    sums = np.zeros(2, np.uint32)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + len(part), dtype=np.uint64).astype(np.uint32)
        sums += np.array([_mixed(part, index, half, np).sum(dtype=np.uint32) for half in _HALVES])
    return _hex(sums)


@jax.jit
def _on_device(arrays):
    """uint32 [N, 2]"""
    return jnp.stack([_sums(x) for x in arrays])


def _sums(x):
    words = _words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(int(np.prod(words.shape[axis + 1 :], dtype=object)) % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    # One reduction of both halves: XLA fuses it with the mix, where two `sum`s would make two copies of the array.
    halves, zero = [_mixed(words, index, half, jnp) for half in _HALVES], np.uint32(0)
    add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
    return jnp.stack(jax.lax.reduce(halves, [zero, zero], add, tuple(range(words.ndim))))


def _words(x):
    """The bits of x as uint32; types of 8 bytes get an axis of two more, the low word first, as in memory."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)


def _mixed(words, index, half, np_or_jnp):
    by, offset, *multipliers = (np_or_jnp.uint32(c) for c in half)
    mixed = words ^ (index * by + offset)
    for multiplier, shift in zip(multipliers, (15, 13), strict=True):
        mixed = mixed * multiplier
        mixed = mixed ^ (mixed >> np_or_jnp.uint32(shift))
    return mixed


def _hex(halves) -> str:
    return "".join(f"{int(h):08x}" for h in halves)
