"""An earlier film of the same patient, and what has changed since: the current film stays as it is.

The change of each finding is drawn backwards, given the current film: of what that shows, nothing tells whether it is
new. So an answer about change can only come from a comparison of the two. The patient is the same (build, vessels, the
place and the shape of every finding); the film is another one, with its own tilt, exposure, noise and breath.
"""

import functools
from enum import IntEnum

import jax
import jax.numpy as jnp

from cxr_jax.phantom import sites as around
from cxr_jax.phantom.constants import (
    DEVICES,
    FINDINGS,
    LOWER,
    PATHOLOGIES,
    POSITIVE_AT,
    Acquisition,
    Finding,
)
from cxr_jax.phantom.scene import take_film
from cxr_jax.runtime.trees import Tree


class Change(IntEnum):
    """What has become of a finding since the prior film."""

    ABSENT = 0  # in neither film
    UNCHANGED = 1
    NEW = 2
    LARGER = 3
    SMALLER = 4
    RESOLVED = 5


# Shares of the findings that are called now; those that had no room to be larger or smaller are unchanged.
NEW_RATE = 0.40
LARGER_RATE = 0.17
SMALLER_RATE = 0.17
RESOLVED_RATE = 0.10  # of the findings that are not there
REMOVED_RATE = 0.25  # of the patients without a device
LEAST_CHANGE = 0.30  # of severity, in what is larger or smaller: less would not be seen
_LEAST = POSITIVE_AT + 0.05  # what scenes draw at least of what is called
# Broken ribs and devices are there or not.
_NO_SIZE = (Finding.FRACTURE, Finding.SUPPORT_DEVICES)
_OPACITIES_OF_A_ZONE = (Finding.LUNG_LESION, Finding.CONSOLIDATION, Finding.PNEUMONIA)
# The patient's own, whatever the film: which vessel trees the lungs have.
_OF_THE_PATIENT = (Acquisition.TREE_RIGHT, Acquisition.TREE_LEFT)

_SIZES = (len(FINDINGS), len(FINDINGS), len(DEVICES), 20, 2)
_CUTS = [sum(_SIZES[: count + 1]) for count in range(len(_SIZES) - 1)]


def look_back(
    scene: Tree, hidden: jax.Array, keys: jax.Array, hospital: str, sites: jax.Array | None = None
) -> tuple[Tree, jax.Array]:
    """Draw the earlier scenes of patients. Pure and jittable.

    Args:
        scene: B current scenes.
        hidden: bool [B,12], what their frontal films hide: new, as no earlier frontal film has shown it.
        keys: typed keys [B].
        hospital: "A" or "B" (static), where both films were taken.
        sites: as for `sample_scenes`.

    Returns:
        The earlier scenes, as `sample_scenes` has them, and int32 [B,12], the change of every finding (`Change`).
        Subtle findings are unchanged.
    """
    drawn_at = None if sites is None else jax.vmap(around.draw)(sites)
    draw = functools.partial(_look_back, hospital=hospital)
    return jax.vmap(draw)(scene, hidden, keys, site=drawn_at)


def _look_back(
    scene: Tree, hidden: jax.Array, key: jax.Array, *, hospital: str, site: Tree | None
) -> tuple[Tree, jax.Array]:
    uniform = jax.random.uniform(key, (sum(_SIZES),), minval=1e-6, maxval=1.0)
    which, size, device, film, noise = jnp.split(uniform, _CUTS)
    change = _change(scene, hidden, which)

    # ---- How much there was ----
    now = scene["severity"]
    # Uniform over what leaves the change large enough to be seen.
    less = _LEAST + (now - LEAST_CHANGE - _LEAST) * size
    more = now + LEAST_CHANGE + (1.0 - now - LEAST_CHANGE) * size
    before = jnp.select(
        [change == each for each in (Change.NEW, Change.LARGER, Change.SMALLER, Change.RESOLVED)],
        [jnp.zeros_like(now), less, more, _LEAST + (1.0 - _LEAST) * size],
        now,
    )
    before = before.at[Finding.SUPPORT_DEVICES].set(
        jnp.where(change[Finding.SUPPORT_DEVICES] == Change.RESOLVED, 1.0, before[-1])
    )

    # ---- Devices come and go together: those that were removed are one or two ----
    # At least the one whose number is least.
    removed = (device == device.min()) | (device < 0.2)
    had_device = jnp.where(before[Finding.SUPPORT_DEVICES] > 0, scene["device"], False)
    had_device |= (change[Finding.SUPPORT_DEVICES] == Change.RESOLVED) & removed

    # ---- Another film of the same patient ----
    acquisition, quality = take_film(film, hospital, site)
    own = jnp.array(_OF_THE_PATIENT)
    acquisition = acquisition.at[own].set(scene["acq"][own])
    earlier = scene | {
        "severity": before,
        "device": had_device,
        "acq": acquisition,
        "quality": quality,
        "noise_key": (noise * 2.0**24).astype(jnp.uint32),
    }
    return earlier, change


def _change(scene: Tree, hidden: jax.Array, uniform: jax.Array) -> jax.Array:
    """The change of every finding of one scene, int32 [12]."""
    now, finding = scene["severity"], jnp.arange(len(FINDINGS))
    has_size = jnp.all(finding[:, None] != jnp.array(_NO_SIZE), axis=1)
    # One uniform number a finding: its range is cut into the shares.
    is_larger = uniform < NEW_RATE + LARGER_RATE
    is_smaller = ~is_larger & (uniform < NEW_RATE + LARGER_RATE + SMALLER_RATE)
    # A little room beyond the least change, so that what there was is within what scenes draw.
    is_larger &= has_size & (now >= _LEAST + LEAST_CHANGE + 0.02)
    is_smaller &= has_size & (now <= 1.0 - LEAST_CHANGE - 0.02)
    # What this film hides, no earlier frontal has shown.
    called = jnp.select(
        [hidden | (uniform < NEW_RATE), is_larger, is_smaller],
        [int(Change.NEW), int(Change.LARGER), int(Change.SMALLER)],
        int(Change.UNCHANGED),
    )

    # ---- What is gone; fluid would have lain before what is still at the bases ----
    opacities = jnp.array(_OPACITIES_OF_A_ZONE)
    at_base = jnp.any((now[opacities] > 0) & (scene["zone"][opacities] == LOWER))
    rate = jnp.where(finding < PATHOLOGIES, RESOLVED_RATE, REMOVED_RATE)
    rate = jnp.where((finding == Finding.PLEURAL_EFFUSION) & at_base, 0.0, rate)
    absent = jnp.where(uniform < rate, int(Change.RESOLVED), int(Change.ABSENT))
    # Whether something faint has changed could not be told.
    subtle = jnp.full_like(finding, int(Change.UNCHANGED))
    return jnp.where(now >= POSITIVE_AT, called, jnp.where(now > 0, subtle, absent)).astype(
        jnp.int32
    )


def what_is_new(scene: Tree, change: jax.Array) -> Tree:
    """Give scenes with what is new alone, beside what is subtle: their labels answer what is new since the prior film.

    Args:
        scene: B current scenes.
        change: int32 [B,12].
    """
    severity = scene["severity"]
    is_kept = (change == Change.NEW) | (severity < POSITIVE_AT)
    return scene | {"severity": jnp.where(is_kept, severity, 0.0)}
