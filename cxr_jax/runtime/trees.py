"""Nested dicts of arrays: names of leaves, and copies of them."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

# Nested dicts of arrays: parameters, optimizer states, batches.
Tree = dict[str, Any]


def flatten(tree: dict, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """(path, leaf) of a nested dict, in key order."""
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from flatten(tree[name], (*prefix, name))
        else:
            yield (*prefix, name), tree[name]


def path_string(path) -> str:
    """('text', 'layers', 'q') -> 'text/layers/q'."""
    return "/".join(str(getattr(p, "key", p)) for p in path)


def float32(tree):
    """The same leaves in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
