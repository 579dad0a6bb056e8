"""The phantom world: infinite seeded synthetic chest radiographs (never a claim about patients)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.phantom.constants import DEVICES, FINDINGS, POSITIVE_AT, SIZE
from cxr_jax.phantom.render import render
from cxr_jax.phantom.scene import labels, regions, sample_scenes, sides

LEXICON = str(
    Path(__file__).with_name("lexicon.toml")
)  # what phantom reports say beyond labels/lexicon.toml
SPLITS = ("train", "select", "test")
_SITES = 64  # the stream of site keys; those of examples are below it
HOSPITALS = ("A", "B")


def example_keys(seed: int, split: str, hospital: str, index) -> jax.Array:
    """Typed PRNG keys [B] of examples; streams of other splits, hospitals or seeds share no key.

    Raises ValueError for an unknown split or hospital.
    """
    if split not in SPLITS or hospital not in HOSPITALS:
        raise ValueError(f"unknown split or hospital: {split!r}, {hospital!r}")
    return _keys(
        seed,
        1 + SPLITS.index(split) + 16 * HOSPITALS.index(hospital),
        jnp.asarray(index, jnp.uint32),
    )


def site_keys(seed: int, site) -> jax.Array:
    """Typed PRNG keys [B] of sites (int [B]), each a function of (seed, site) alone: every split sees the same ones."""
    return _keys(seed, _SITES, jnp.asarray(site, jnp.uint32))


@jax.jit
def _keys(seed, stream, index):
    base = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(index)


@functools.partial(jax.jit, static_argnames="hospital")
def _batch(keys, hospital, sites=None):
    scene = sample_scenes(keys, hospital, sites)
    out = {"image": render(scene), "labels": labels(scene), "sides": sides(scene), "scene": scene}
    return out | {"regions": regions(scene)}


def make_batch(seed: int, split: str, hospital: str, indices, sites=None) -> dict:
    """Examples `indices` of one stream, on the host; sites: int [B], the site of each, or None for the hospital itself.

    Returns image float32 [B,224,224] in 0..1, labels int8 [B,14] and sides bool [B,14,2] (CheXpert order), scene
    (numpy arrays, see `sample_scenes`) and regions float32 [B,12,8,8]. Compiled once per batch size and hospital,
    for all sites together.
    """
    keys = example_keys(seed, split, hospital, indices)
    return jax.tree.map(
        np.asarray, _batch(keys, hospital, None if sites is None else site_keys(seed, sites))
    )


def scene_row(scene: dict, i: int) -> dict:
    """Row i of a scene dict."""
    return {name: value[i] for name, value in scene.items()}


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
    "site_keys",
    "sides",
]
