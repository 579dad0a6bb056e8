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


# ---- From the host to the device ----------------------------------------------------------------------------


def to_device(tree: Tree) -> Tree:
    """Put a tree of host arrays on the device.

    The tree is emptied on the way: at no time are there two copies of more than one leaf.
    """
    return {
        leaf_name: to_device(host_leaf) if isinstance(host_leaf, dict) else jnp.asarray(host_leaf)
        for leaf_name in list(tree)
        for host_leaf in [tree.pop(leaf_name)]
    }


def layers_apart(stacked: Tree, count: int) -> list[Tree]:
    """Put stacked layers on the device as a list of trees, one a layer; the tree is emptied on the way.

    Decoding needs layers apart, and a CPU reads stacked ones at a fraction of its memory's speed. An accelerator keeps
    both; here a second copy of a 3B model would not fit 24 GB, and one serves prompts and decoding alike.
    """
    layers: list[Tree] = [{} for _ in range(count)]
    for leaf_name in list(stacked):
        stacked_leaf = stacked.pop(leaf_name)
        if isinstance(stacked_leaf, dict):
            parts: list[Any] = layers_apart(stacked_leaf, count)
        else:
            parts = [jnp.array(stacked_leaf[index]) for index in range(count)]  # copies
        for layer, part in zip(layers, parts, strict=True):
            layer[leaf_name] = part
    return layers
