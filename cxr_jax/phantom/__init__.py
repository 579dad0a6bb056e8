"""The phantom world: infinite seeded synthetic chest radiographs (never a claim about patients)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cxr_jax.phantom.constants import DEVICES, FINDINGS, POSITIVE_AT, SIZE
from cxr_jax.phantom.render import render
from cxr_jax.phantom.scene import labels, regions, sample_scenes, sides
from cxr_jax.runtime.trees import Tree

# What phantom reports say beyond labels/lexicon.toml.
LEXICON = str(Path(__file__).with_name("lexicon.toml"))
SPLITS = ("train", "select", "test")
HOSPITALS = ("A", "B")
_SITES = 64  # the stream of site keys; those of examples are below it


def example_keys(seed: int, split: str, hospital: str, index: ArrayLike) -> jax.Array:
    """Make the typed PRNG keys [B] of examples; streams of other splits, hospitals or seeds share no key.

    Raises:
        ValueError: for an unknown split or hospital.
    """
    if split not in SPLITS or hospital not in HOSPITALS:
        raise ValueError(f"unknown split or hospital: {split!r}, {hospital!r}")
    # 0 is no stream, and a hospital has room for 16 splits.
    stream = 1 + SPLITS.index(split) + 16 * HOSPITALS.index(hospital)
    return _keys(seed, stream, jnp.asarray(index, jnp.uint32))


def site_keys(seed: int, site: ArrayLike) -> jax.Array:
    """Make the typed PRNG keys [B] of sites (int [B]), each a function of (seed, site) alone: every split sees the
    same ones."""
    return _keys(seed, _SITES, jnp.asarray(site, jnp.uint32))


@jax.jit
def _keys(seed: int, stream: int, index: jax.Array) -> jax.Array:
    base = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.vmap(lambda place: jax.random.fold_in(base, place))(index)


# Apart from what is drawn, which is most of the work and one program for both hospitals.
scenes_of = functools.partial(jax.jit, static_argnames="hospital")(sample_scenes)


@jax.jit
def _batch(scene: Tree) -> Tree:
    batch = {"image": render(scene), "labels": labels(scene), "sides": sides(scene), "scene": scene}
    return batch | {"regions": regions(scene)}


def make_batch(
    seed: int, split: str, hospital: str, indices: ArrayLike, sites: ArrayLike | None = None
) -> Tree:
    """Draw examples `indices` of one stream, on the host.

    Compiled once per batch size, for both hospitals together, and once more for all sites.

    Args:
        sites: int [B], the site of each, or None for the hospital itself.

    Returns:
        numpy arrays: image float32 [B,224,224] in 0..1, labels int8 [B,14] and sides bool [B,14,2] (CheXpert order),
        scene (see `sample_scenes`) and regions float32 [B,12,8,8].
    """
    keys = example_keys(seed, split, hospital, indices)
    sites = None if sites is None else site_keys(seed, sites)
    return jax.tree.map(np.asarray, _batch(scenes_of(keys, hospital, sites)))


def scene_row(scene: Tree, row: int) -> Tree:
    """Take one row of a scene dict."""
    return {name: values[row] for name, values in scene.items()}


__all__ = [
    "DEVICES",
    "FINDINGS",
    "HOSPITALS",
    "LEXICON",
    "POSITIVE_AT",
    "SIZE",
    "SPLITS",
    "example_keys",
    "labels",
    "make_batch",
    "regions",
    "render",
    "sample_scenes",
    "scene_row",
    "scenes_of",
    "sides",
    "site_keys",
]
