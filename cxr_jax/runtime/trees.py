"""Nested dicts of arrays: names of leaves, and copies of them."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Nested dicts of arrays: parameters, optimizer states, batches.
Tree = dict[str, Any]
# One array, on the device or still on the host: programs take both.
Array = jax.Array | np.ndarray


def flatten(tree: Tree, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, leaf) of a nested dict, in key order."""
    # In a fixed order, since the order of entries in files follows from it.
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from flatten(tree[name], (*prefix, name))
        else:
            yield (*prefix, name), tree[name]


def path_string(path: Iterable[Any]) -> str:
    """Join a path of names, or of JAX's keys: ('text', 'layers', 'q') -> 'text/layers/q'."""
    # Keys of a pytree carry the name in `key`; plain names are taken as they are.
    return "/".join(str(getattr(part, "key", part)) for part in path)


def float32(tree: Any) -> Any:
    """Convert the leaves to float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
