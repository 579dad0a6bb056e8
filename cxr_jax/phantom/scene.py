"""Sample phantom scenes: what a patient has, how the picture was taken, and the labels that follow.

A scene is a plain dict of arrays with a leading batch axis (see `sample_scenes`). Everything is a pure
function of a PRNG key and jittable; hospital "A" is the training world, "B" the shifted one. Random sites around a
hospital are the business of `sites.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from cxr_jax.phantom import sites as around
from cxr_jax.phantom.constants import (
    BOTH,
    DEVICES,
    FINDINGS,
    LEFT,
    LOWER,
    MID,
    OPACITIES,
    PATHOLOGIES,
    POSITIVE_AT,
    RIGHT,
    ROTATED_FROM,
    Acquisition,
    Finding,
)
from cxr_jax.runtime.trees import Tree

# ---- How often ------------------------------------------------------------------------------------

# Chance that a finding is present (subtle included) in a patient who is not healthy; order of FINDINGS.
PRESENT = {
    "A": (0.135, 0.190, 0.185, 0.170, 0.165, 0.170, 0.215, 0.170, 0.230, 0.145, 0.150),
    "B": (0.120, 0.240, 0.115, 0.240, 0.185, 0.190, 0.260, 0.155, 0.290, 0.100, 0.120),
}
HEALTHY = {"A": 0.11, "B": 0.0}  # drawn with nothing at all; many others come out clean as well
SUBTLE = 0.135  # of the findings present, how many are drawn faintly
DEVICE_RATE = {"A": (0.04, 0.08, 0.058, 0.053, 0.053), "B": (0.165, 0.225, 0.085, 0.165, 0.075)}
ROTATED = {"A": 0.25, "B": 0.50}  # of the films

# Loadings on (congestion, infection, trauma): why findings come together; the rest is independent.
_LOADINGS: dict[int, tuple[float, float, float]] = {
    Finding.CARDIOMEGALY: (0.55, 0.0, 0.0),
    Finding.EDEMA: (0.65, 0.0, 0.0),
    Finding.PLEURAL_EFFUSION: (0.50, 0.25, 0.10),
    Finding.CONSOLIDATION: (0.0, 0.45, 0.0),
    Finding.PNEUMONIA: (0.0, 0.45, 0.0),
    Finding.ATELECTASIS: (0.15, 0.25, 0.15),
    Finding.PNEUMOTHORAX: (0.0, 0.0, 0.45),
    Finding.FRACTURE: (0.0, 0.0, 0.45),
    Finding.ENLARGED_CARDIOMEDIASTINUM: (0.15, 0.0, 0.20),
}
_INDEPENDENT = (0.0, 0.0, 0.0)

# ---- How it is filmed ------------------------------------------------------------------------------


class _Technique(NamedTuple):
    """How a hospital takes pictures: shares of the films, and ranges (lowest, highest) of what is uniform."""

    ap: float
    low_inspiration: float
    contrast: tuple[float, float]
    gamma: tuple[float, float]
    noise: tuple[float, float]
    scatter: tuple[float, float]
    magnification: tuple[float, float]
    veil: tuple[float, float]
    straight: tuple[float, float]  # degrees of tilt
    rotated: tuple[float, float]


_TECHNIQUES = {
    "A": _Technique(
        ap=0.20,
        low_inspiration=0.12,
        contrast=(0.82, 1.12),
        gamma=(-0.30, 0.35),
        noise=(0.008, 0.026),
        scatter=(0.06, 0.20),
        magnification=(0.95, 1.05),
        veil=(0.0, 0.05),
        straight=(0.0, 1.6),
        rotated=(2.8, 3.6),
    ),
    "B": _Technique(
        ap=0.85,
        low_inspiration=0.35,
        contrast=(0.62, 0.88),
        gamma=(0.10, 0.75),
        noise=(0.022, 0.048),
        scatter=(0.14, 0.34),
        magnification=(0.98, 1.12),
        veil=(0.02, 0.10),
        straight=(0.0, 2.0),
        rotated=(3.0, 7.0),
    ),
}

# How many uniform numbers each part of a scene takes, in the order they are split in `_sample_one`. What is drawn
# with them changes with any of these.
_SIZES = (PATHOLOGIES, 3, PATHOLOGIES, PATHOLOGIES, 64, 20, 32, 48, len(DEVICES), 3)
_DRAWS = sum(_SIZES)
_CUTS = [sum(_SIZES[: count + 1]) for count in range(len(_SIZES) - 1)]


def sample_scenes(keys: jax.Array, hospital: str, sites: jax.Array | None = None) -> Tree:
    """Draw one scene a key.

    Args:
        keys: [B] typed keys or uint32 [B, 2].
        hospital: "A" or "B" (static).
        sites: None, or the site of each scene, typed keys [B] (`sites.draw`): the same patients, but for the
            prevalence, filmed there.

    Returns:
        A dict, the scene:

        severity: float32 [B,12], 0 absent, else 0.15..1.
        side, zone: int32 [B,12].
        device: bool [B,5].
        variant: float32 [B,12,4] in 0..1, what makes two drawings of one finding differ.
        anatomy: float32 [B,16] in -1..1 (`constants.Anatomy`).
        acq: float32 [B,16] (`constants.Acquisition`).
        quality: int32 [B,3] = (AP, rotated, low inspiration).
        noise_key: uint32 [B,2].
        sharpness: float32 [B], with sites only.

    Raises:
        ValueError: for another hospital.
    """
    if hospital not in PRESENT:
        raise ValueError(f"hospital must be 'A' or 'B', not {hospital!r}")
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        keys = jax.random.wrap_key_data(keys)
    if sites is None:
        return jax.vmap(lambda key: _sample_one(key, hospital))(keys)
    return jax.vmap(lambda key, site: _sample_one(key, hospital, around.draw(site)))(keys, sites)


# Each function of one scene is jitted under its `vmap`: it is traced once, whatever the batch and the hospital.
@functools.partial(jax.jit, static_argnames="hospital")
def _sample_one(key: jax.Array, hospital: str, site: Tree | None = None) -> Tree:
    # One draw for everything: many small draws would each be compiled, which takes longer than all the rest.
    uniform = jax.random.uniform(key, (_DRAWS,), minval=1e-6, maxval=1.0)
    own, cause, subtle, size, place, acquisition, anatomy, variant, device, tail = jnp.split(
        uniform, _CUTS
    )

    # ---- How often things are, here ----
    rates: dict[str, Any] = {"present": PRESENT[hospital], "device": DEVICE_RATE[hospital]}
    if site is not None:
        rates = {
            name: around.with_odds(jnp.array(rate), site[name]) for name, rate in rates.items()
        }

    # ---- What the patient has, and where ----
    has_device = device < jnp.array(rates["device"])
    is_present = _is_present(own, cause, tail[0], rates["present"], HEALTHY[hospital])
    severity = _severity(is_present, subtle, size)
    severity = jnp.append(severity, jnp.any(has_device).astype(jnp.float32))
    side, zone = _place(place, severity)

    # ---- How it was filmed ----
    acquisition, quality = take_film(acquisition, hospital, site)
    scene = {
        "severity": severity,
        "side": side,
        "zone": zone,
        "device": has_device,
        "variant": variant.reshape(len(FINDINGS), 4),
        # The sum of two uniforms: most people are near the mean.
        "anatomy": jnp.clip((anatomy[:16] + anatomy[16:] - 1.0) * 1.25, -1.0, 1.0),
        "acq": acquisition,
        "quality": quality,
        "noise_key": (tail[1:3] * 2.0**24).astype(jnp.uint32),
    }
    return scene if site is None else scene | {"sharpness": site["sharpness"]}


def _is_present(
    own: jax.Array, cause: jax.Array, healthy: jax.Array, rates: jax.Array, healthy_rate: float
) -> jax.Array:
    """Which of the 11 pathologies are there, bool [11]: a Gaussian copula with three shared causes decides."""
    # Unit variance for every finding, whatever it shares: so its rate is what the table says.
    loadings = jnp.array([_LOADINGS.get(finding, _INDEPENDENT) for finding in range(PATHOLOGIES)])
    score = loadings @ ndtri(cause) + ndtri(own) * jnp.sqrt(1.0 - (loadings**2).sum(1))
    is_present = score > ndtri(1.0 - jnp.array(rates))
    is_present &= healthy >= healthy_rate
    return is_present


def _severity(is_present: jax.Array, subtle: jax.Array, size: jax.Array) -> jax.Array:
    """Severity of the 11 pathologies. The empty band 0.30-0.40 keeps "subtle" and "positive" apart for the eye too."""
    return jnp.where(
        is_present, jnp.where(subtle < SUBTLE, 0.15 + 0.15 * size, 0.40 + 0.60 * size), 0.0
    )


# ---- Where -----------------------------------------------------------------------------------------


def _choose(uniform: jax.Array, logits: jax.Array) -> jax.Array:
    """Index drawn with softmax(logits), from len(logits) uniform numbers (Gumbel trick)."""
    logits = logits.reshape(-1)
    noise = jnp.log(-jnp.log(jnp.minimum(uniform[: logits.size], 0.999999)))
    return jnp.argmax(logits - noise)


def _zone_logits(upper: float, middle: float, lower: float) -> jax.Array:
    """Logits [side, zone] of a finding that likes both sides alike."""
    return jnp.log(jnp.array([[upper, middle, lower]] * 2))


def _place(uniform: jax.Array, severity: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Side and zone of every finding, int32 [12] each, so that no finding is drawn where another would hide it."""
    uniform = uniform.reshape(8, 8)
    here = severity > 0
    side = [jnp.int32(BOTH)] * len(FINDINGS)
    zone = [jnp.int32(MID)] * len(FINDINGS)
    sides, zones = jnp.arange(2), jnp.arange(3)

    # ---- What may be on both sides, and air ----
    effusion, atelectasis, pneumothorax = (
        Finding.PLEURAL_EFFUSION,
        Finding.ATELECTASIS,
        Finding.PNEUMOTHORAX,
    )
    side[effusion] = _choose(uniform[0], jnp.log(jnp.array([0.36, 0.34, 0.30])))
    side[atelectasis] = _choose(uniform[1], jnp.log(jnp.array([0.35, 0.35, 0.30])))
    zone[effusion] = zone[atelectasis] = jnp.int32(LOWER)
    side[pneumothorax] = (uniform[2, 0] < 0.5).astype(jnp.int32)
    zone[pneumothorax] = _choose(uniform[2, 1:], jnp.log(jnp.array([0.7, 0.2, 0.1])))

    # ---- What fluid and air would hide, as logits [side, zone] ----
    is_wet = here[effusion] & ((side[effusion] == sides) | (side[effusion] == BOTH))  # [2]
    fluid = jnp.where(is_wet[:, None] & (zones == LOWER), -6.0, 0.0)
    air = jnp.where(here[pneumothorax] & (side[pneumothorax] == sides), -2.0, 0.0)[:, None]

    # ---- Opacities, each where none of those before is ----
    taken = fluid + air
    priors = (
        (Finding.CONSOLIDATION, _zone_logits(0.3, 0.3, 0.4)),
        (Finding.PNEUMONIA, _zone_logits(0.25, 0.35, 0.4)),
        (Finding.LUNG_LESION, _zone_logits(0.4, 0.35, 0.25)),
    )
    for row, (finding, prior) in enumerate(priors):
        cell = _choose(uniform[3 + row], prior + taken)
        side[finding], zone[finding] = cell // 3, cell % 3
        taken = taken + jnp.where(
            here[finding] & (side[finding] == sides)[:, None] & (zone[finding] == zones), -6.0, 0.0
        )

    # ---- Pleura and ribs ----
    cell = _choose(uniform[6], _zone_logits(0.35, 0.40, 0.25) + 2 * fluid + 2 * air)
    side[Finding.PLEURAL_OTHER], zone[Finding.PLEURAL_OTHER] = cell // 3, cell % 3
    cell = _choose(uniform[7], _zone_logits(0.25, 0.45, 0.30) + fluid)
    side[Finding.FRACTURE], zone[Finding.FRACTURE] = cell // 3, cell % 3
    return jnp.stack(side).astype(jnp.int32), jnp.stack(zone).astype(jnp.int32)


# ---- Acquisition -----------------------------------------------------------------------------------


def take_film(
    uniform: jax.Array, hospital: str, site: Tree | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draw how one film is taken in a hospital, or at a site around it (`sites.draw`).

    Args:
        uniform: [20], in 0..1.

    Returns:
        float32 [16] (`Acquisition`), and the film's quality as scenes have it, int32 [3].
    """
    rotated: float | jax.Array = ROTATED[hospital]
    if site is not None:
        rotated = around.with_odds(jnp.array(rotated), site["rotated"])
    acquisition = _acquisition(uniform, _TECHNIQUES[hospital], rotated)
    if site is not None:
        acquisition = around.film(acquisition, site)
    is_rotated = jnp.abs(acquisition[Acquisition.ROTATION]) > ROTATED_FROM
    quality = jnp.stack(
        [
            acquisition[Acquisition.AP] > 0.5,
            is_rotated,
            acquisition[Acquisition.LOW_INSPIRATION] > 0.5,
        ]
    )
    return acquisition, quality.astype(jnp.int32)


def _acquisition(
    uniform: jax.Array, technique: _Technique, rotated_rate: float | jax.Array
) -> jax.Array:
    """How the picture was taken, float32 [16] (`Acquisition`), from 20 uniform numbers."""

    def between(draw: int, lowest: float, highest: float) -> jax.Array:
        return lowest + (highest - lowest) * uniform[draw]

    is_straight = uniform[8] < 1.0 - rotated_rate
    is_ap = uniform[0] < technique.ap
    is_low = uniform[1] < technique.low_inspiration
    contrast, gamma = between(2, *technique.contrast), between(3, *technique.gamma)
    noise, scatter = between(4, *technique.noise), between(5, *technique.scatter)
    magnification, veil = between(6, *technique.magnification), between(7, *technique.veil)
    angle = jnp.where(is_straight, between(9, *technique.straight), between(9, *technique.rotated))
    rotation = jnp.where(uniform[10] < 0.5, angle, -angle)
    raised = jnp.where(is_low, between(11, 0.75, 1.0), between(11, 0.0, 0.25))
    values = {
        Acquisition.CONTRAST: contrast,
        Acquisition.GAMMA: gamma,
        Acquisition.NOISE: noise,
        Acquisition.SCATTER: scatter,
        Acquisition.MAGNIFICATION: magnification,
        Acquisition.ROTATION: rotation,
        Acquisition.SHIFT_X: between(12, -0.05, 0.05),
        Acquisition.SHIFT_Y: between(13, -0.05, 0.05),
        Acquisition.AP: is_ap.astype(jnp.float32),
        Acquisition.LOW_INSPIRATION: raised,
        Acquisition.WINDOW: between(14, -0.06, 0.06),
        Acquisition.TREE_RIGHT: uniform[15],
        Acquisition.TREE_LEFT: uniform[16],
        Acquisition.VIGNETTE: between(17, -1.0, 1.0),
        Acquisition.VEIL: veil,
        Acquisition.SPARE: uniform[18],
    }
    return jnp.stack([values[place] for place in Acquisition]).astype(jnp.float32)


# ---- The truth of a scene --------------------------------------------------------------------------

# CheXpert's labels from Lung Lesion on, but for Support Devices: each is a finding of its own.
_LABELLED = (
    Finding.LUNG_LESION,
    Finding.EDEMA,
    Finding.CONSOLIDATION,
    Finding.PNEUMONIA,
    Finding.ATELECTASIS,
    Finding.PNEUMOTHORAX,
    Finding.PLEURAL_EFFUSION,
    Finding.PLEURAL_OTHER,
    Finding.FRACTURE,
)


def labels(scene: Tree) -> jax.Array:
    """Label scenes, int8 [B,14] in CheXpert order: 1 positive, 0 negative, -1 uncertain (subtle); from severity alone.

    Lung Opacity is the parent of lesion, edema, consolidation, pneumonia and atelectasis. No Finding is 1 iff
    no pathology is positive; devices are not pathology. Cardiomegaly implies no Enlarged Cardiomediastinum.
    """
    severity = scene["severity"]
    state = jnp.where(severity >= POSITIVE_AT, 1, jnp.where(severity > 0, -1, 0))
    # A parent is as sure as the surest of its parts.
    parts = state[:, jnp.array(OPACITIES)]
    opacity = jnp.where((parts == 1).any(1), 1, jnp.where((parts == -1).any(1), -1, 0))
    no_finding = 1 - (state[:, :PATHOLOGIES] == 1).any(1).astype(state.dtype)
    columns = [
        no_finding,
        state[:, Finding.ENLARGED_CARDIOMEDIASTINUM],
        state[:, Finding.CARDIOMEGALY],
        opacity,
    ]
    columns += [state[:, finding] for finding in (*_LABELLED, Finding.SUPPORT_DEVICES)]
    return jnp.stack(columns, 1).astype(jnp.int8)


def sides(scene: Tree) -> jax.Array:
    """Tell the sides of findings, bool [B,14,2] in CheXpert order: is it, sure or subtle, on the patient's right, left?

    Neither for what has no side (No Finding, the mediastinum, the heart, devices). Lung Opacity is where its parts are.
    """
    side = scene["side"]
    own = jnp.stack([side != LEFT, side != RIGHT], -1)  # BOTH is neither
    is_present = (scene["severity"] > 0)[:, jnp.array(OPACITIES), None]
    opacity = (own[:, jnp.array(OPACITIES)] & is_present).any(1)
    neither = jnp.zeros_like(opacity)
    columns = [neither, neither, neither, opacity]
    columns += [own[:, finding] for finding in _LABELLED] + [neither]
    return jnp.stack(columns, 1)


def regions(scene: Tree) -> jax.Array:
    """Tell how much of each 28 px cell is inside a finding's drawn region, float32 [B,12,8,8] (row 0 = top).

    0 when absent; a subtle finding counts half. Thin things get a margin, see `findings.region_masks`.
    """
    from cxr_jax.phantom.findings import region_maps

    return jax.vmap(region_maps)(scene) * region_weights(scene)


def region_weights(scene: Tree) -> jax.Array:
    """Give what a finding's region counts, float32 [B,12,1,1]: 0 absent, 0.5 subtle, 1 positive."""
    severity = scene["severity"]
    weight = jnp.where(severity >= POSITIVE_AT, 1.0, jnp.where(severity > 0, 0.5, 0.0))
    return weight[:, :, None, None]
