"""A 64-bit hash of an array's content that is the same on any mesh, any number of processes, and in NumPy.

Each 32-bit word of the array is mixed with its position in the whole array, twice over, and the two results are summed
modulo 2^32. Integer sums do not depend on their order, so neither does the hash depend on how the array is divided. Of
one word, each mix is a bijection: whatever changes in a single word changes the hash with certainty; any other
damage is missed once in 2^64. Position and type matter; the shape, beyond the order of the words, does not.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# (odd multiplier of the position, offset, two odd multipliers of the mix) of each half of the hash: digits of pi.
_HALVES = (
    (0x243F6A89, 0x85A308D3, 0x13198A2F, 0x03707345),
    (0xA4093823, 0x299F31D0, 0x082EFA99, 0xEC4E6C89),
)
_SHIFTS = (15, 13)  # after each multiplication of the mix, so that high bits reach the low ones
_CHUNK = 1 << 20  # words that NumPy works on at a time: they and their index stay in the cache


def hash_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Hash JAX arrays where they lie: {name: hash as 16 hex digits}; every process calls this, and gets all.

    Args:
        arrays: of types of 1, 2, 4 or 8 bytes; at most 2^32 words tell their positions apart.
    """
    # Nothing to compile, and `jnp.stack` refuses an empty list.
    if not arrays:
        return {}
    # One program for all arrays, and one transfer for all hashes.
    hashes = np.asarray(_hash_on_device(list(arrays.values())))
    return dict(zip(arrays, map(_hex, hashes), strict=True))


def hash_host_array(array: np.ndarray) -> str:
    """Compute the same hash of an array on the host, with no copy of it as a whole."""
    array_words = np.ascontiguousarray(array).reshape(-1)
    # Narrow types give a word for each number; wide ones two, the low word first.
    array_words = array_words.view(
        np.uint32 if array.dtype.itemsize >= 4 else f"u{array.dtype.itemsize}"
    )
    # Both halves start at zero, as does the reduction on the device, so that the two ways agree.
    sums = np.zeros(2, np.uint32)
    for chunk_start in range(0, len(array_words), _CHUNK):
        word_chunk = array_words[chunk_start : chunk_start + _CHUNK].astype(np.uint32)
        # Positions wrap at 2^32 as they do on the device.
        positions = np.arange(chunk_start, chunk_start + len(word_chunk), dtype=np.uint64).astype(
            np.uint32
        )
        sums += np.array(
            [
                _mix(word_chunk, positions, half_constants, np).sum(dtype=np.uint32)
                for half_constants in _HALVES
            ]
        )
    return _hex(sums)


@jax.jit
def _hash_on_device(arrays: list[jax.Array]) -> jax.Array:
    """uint32 [N, 2]: both halves of the hash of each array."""
    return jnp.stack([_sum_halves(array) for array in arrays])


@jax.jit
def _sum_halves(array: jax.Array) -> jax.Array:
    # Arrays of one shape, as most of a model are, are traced once.
    array_words = _words(array)
    # Each word's position in the whole array, axis by axis: the compiler forms it where the word lies.
    positions = jnp.zeros(array_words.shape, jnp.uint32)
    for axis in range(array_words.ndim):
        # In Python's numbers, which do not overflow; the hash needs strides modulo 2^32 only.
        stride = np.uint32(int(np.prod(array_words.shape[axis + 1 :], dtype=object)) % 2**32)
        positions = (
            positions + jax.lax.broadcasted_iota(jnp.uint32, array_words.shape, axis) * stride
        )
    halves = [_mix(array_words, positions, half_constants, jnp) for half_constants in _HALVES]
    zero = np.uint32(0)
    # One reduction of both halves: XLA fuses it with the mix, where two `sum`s would make two copies of the array.
    return jnp.stack(jax.lax.reduce(halves, [zero, zero], _add, tuple(range(array_words.ndim))))


def _add(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _words(array: jax.Array) -> jax.Array:
    """The bits as uint32; types of 8 bytes get an axis of two more, the low word first, as in memory."""
    # A bool has no bits to reinterpret in JAX: as a number it is 0 or 1, like its byte in memory.
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    word_type = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, word_type).astype(jnp.uint32)


def _mix(
    array_words: Any, positions: Any, half_constants: tuple[int, ...], numpy: ModuleType
) -> Any:
    """Words of one half of the hash, in NumPy or jax.numpy: uint32, so that all wraps modulo 2^32."""
    position_multiplier, offset, *multipliers = (
        numpy.uint32(constant) for constant in half_constants
    )
    # The position goes in before the mix, or equal words at other places would be alike.
    mixed = array_words ^ (positions * position_multiplier + offset)
    for multiplier, shift in zip(multipliers, _SHIFTS, strict=True):
        mixed = mixed * multiplier
        mixed = mixed ^ (mixed >> numpy.uint32(shift))
    return mixed


def _hex(halves: np.ndarray) -> str:
    return "".join(f"{int(half):08x}" for half in halves)
