"""Studies of several films: the frontal, a lateral of the same chest, an earlier frontal with a stated change.

The second film is needed, exactly: the frontal is the film of `phantom.make_batch`, the same bit for bit whatever the
lateral shows beside it (`hidden`), and whatever the prior was (`priors`).
"""

import functools
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cxr_jax import phantom
from cxr_jax.errors import UserError
from cxr_jax.phantom.render import render
from cxr_jax.phantom.scene import sample_scenes
from cxr_jax.phantom.studies import hidden, lateral, priors
from cxr_jax.phantom.studies.priors import Change
from cxr_jax.runtime.trees import Tree

FRONTAL, LATERAL, PRIOR = "frontal", "lateral", "prior"
# What a study may be made of, in the order in which its films are shown.
STUDIES = ((FRONTAL,), (FRONTAL, LATERAL), (FRONTAL, PRIOR), (FRONTAL, LATERAL, PRIOR))
# What a study's reader writes about, as keys of studies and of batches; the last two with a prior.
FACTS = ("scene", "hidden", "change", "prior")
# What reports of studies with a prior say beyond labels/lexicon.toml, read as answers to what is new.
CHANGES_LEXICON = str(Path(__file__).with_name("changes.toml"))
# Streams that are folded into an example's key; the example itself is drawn with the key as it is.
_HIDDEN, _LATERAL, _PRIOR = 1, 2, 3


def check_views(views: Iterable[str]) -> tuple[str, ...]:
    """Return the roles of a study's films; "frontal,lateral" is two, as a flag has them.

    Raises:
        UserError: for roles that make none of STUDIES.
    """
    # A flag without brackets is one text.
    views = tuple(role.strip() for view in views for role in view.split(","))
    if views not in STUDIES:
        known = "; ".join(", ".join(study) for study in STUDIES)
        raise UserError(f"config.data.views={','.join(views)!r} must be one of: {known}")
    return views


def sample_studies(
    keys: jax.Array, hospital: str, views: tuple[str, ...], sites: jax.Array | None = None
) -> Tree:
    """Draw one study a key, without its films. Pure and jittable.

    Args:
        keys: typed keys [B] of examples.
        hospital: "A" or "B" (static).
        views: roles, one of STUDIES (static).
        sites: as for `sample_scenes`.

    Returns:
        `frontal`: the scenes that the frontal films show, those of `sample_scenes`. `scene`: the scenes of the
        patients, with what these films hide, `hidden` bool [B,12] (nothing without a lateral). With a prior `prior`,
        the earlier scenes, and `change` int32 [B,12] (`Change`). `keys`: those of the lateral films.
    """
    # The frontal first, from the key as it is: nothing of what follows can change it.
    frontal = sample_scenes(keys, hospital, sites)
    streams = jax.vmap(
        lambda key: [jax.random.fold_in(key, n) for n in (_HIDDEN, _LATERAL, _PRIOR)]
    )
    hidden_keys, lateral_keys, prior_keys = streams(keys)
    patient, is_hidden = frontal, jnp.zeros(frontal["severity"].shape, bool)
    # Without a film that shows it nothing is hidden: a report could not name it.
    if LATERAL in views:
        patient, is_hidden = hidden.hide(frontal, hidden_keys)
    study = {"frontal": frontal, "scene": patient, "hidden": is_hidden, "keys": lateral_keys}
    if PRIOR in views:
        earlier, change = priors.look_back(patient, is_hidden, prior_keys, hospital, sites)
        study |= {"prior": earlier, "change": change}
    return study


def asked(study: Tree) -> Tree:
    """Give the scenes whose labels answer a study's question: what is new where there is a prior, else all."""
    if "change" not in study:
        return study["scene"]
    return priors.what_is_new(study["scene"], study["change"])


def films(study: Tree, views: tuple[str, ...]) -> jax.Array:
    """Render the films of studies, float32 [B,n,224,224] in the order of `views`. Jittable."""
    draw = {
        FRONTAL: lambda: render(study["frontal"]),
        LATERAL: lambda: lateral.render(study["scene"], study["hidden"], study["keys"]),
        PRIOR: lambda: render(study["prior"]),
    }
    return jnp.stack([draw[view]() for view in views], axis=1)


def regions(study: Tree, views: tuple[str, ...]) -> jax.Array:
    """Tell where findings are in all films of studies, float32 [B,12,n*8,8]: the maps of the films one below another,
    as their image tokens follow each other."""
    draw = {
        FRONTAL: lambda: phantom.regions(study["frontal"]),
        LATERAL: lambda: lateral.regions(study["scene"], study["hidden"], study["keys"]),
        PRIOR: lambda: phantom.regions(study["prior"]),
    }
    return jnp.concatenate([draw[view]() for view in views], axis=2)


# Apart, so that the labels of many studies need not wait for the programs that draw.
sample = functools.partial(jax.jit, static_argnames=("hospital", "views"))(sample_studies)
draw_films = functools.partial(jax.jit, static_argnames="views")(films)


@functools.partial(jax.jit, static_argnames="views")
def _truth(study: Tree, views: tuple[str, ...]) -> Tree:
    # Labels and sides of what is asked; regions of all that is drawn.
    question = asked(study)
    # What is seen in any of the films.
    located = study["scene"]["severity"]
    if PRIOR in views:
        located = jnp.maximum(located, study["prior"]["severity"])
    return {
        "labels": phantom.labels(question),
        "sides": phantom.sides(question),
        "regions": regions(study, views),
        "located": located,
    }


def make_batch(
    seed: int,
    split: str,
    hospital: str,
    indices: ArrayLike,
    views: tuple[str, ...],
    sites: ArrayLike | None = None,
) -> Tree:
    """Draw studies `indices` of one stream, on the host; the frontal film is that of `phantom.make_batch`.

    Args:
        views: roles of the films, one of STUDIES.
        sites: int [B], the site of each, or None.

    Returns:
        numpy arrays: image float32 [B,n,224,224]; labels int8 [B,14] and sides bool [B,14,2] of what is asked (with a
        prior what is new, else all); regions float32 [B,12,n*8,8]; located float32 [B,12], the largest severity in any
        film; scene, hidden, and with a prior change and prior (`sample_studies`).
    """
    keys = phantom.example_keys(seed, split, hospital, indices)
    site_keys = None if sites is None else phantom.site_keys(seed, sites)
    study = sample(keys, hospital, views, site_keys)
    batch = {"image": draw_films(study, views), **_truth(study, views)}
    batch |= {name: study[name] for name in FACTS if name in study}
    return jax.tree.map(np.asarray, batch)


__all__ = [
    "CHANGES_LEXICON",
    "FACTS",
    "FRONTAL",
    "LATERAL",
    "PRIOR",
    "STUDIES",
    "Change",
    "asked",
    "check_views",
    "draw_films",
    "films",
    "make_batch",
    "regions",
    "sample",
    "sample_studies",
]
