"""Sample phantom scenes: what a patient has, how the picture was taken, and the labels that follow.

A scene is a plain dict of arrays with a leading batch axis (see `sample_scenes`). Everything is a pure
function of a PRNG key and jittable; hospital "A" is the training world, "B" the shifted one. Random sites around a
hospital are the business of `sites.py`.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from cxr_jax.phantom import sites as around
from cxr_jax.phantom.constants import (
    ACQ_AP,
    ACQ_LOW_INSPIRATION,
    ACQ_ROTATION,
    ATEL,
    BOTH,
    CARD,
    CONS,
    DEV,
    DEVICES,
    EDEMA,
    EFF,
    FINDINGS,
    FRAC,
    LEFT,
    LESION,
    LOWER,
    MED,
    MID,
    OPACITIES,
    PLEU,
    PNEU,
    POSITIVE_AT,
    PTX,
    RIGHT,
    ROTATED_FROM,
)

# chance that a finding is present (subtle included) in a patient who is not healthy; order of FINDINGS
PRESENT = {
    "A": (0.135, 0.190, 0.185, 0.170, 0.165, 0.170, 0.215, 0.170, 0.230, 0.145, 0.150),
    "B": (0.120, 0.240, 0.115, 0.240, 0.185, 0.190, 0.260, 0.155, 0.290, 0.100, 0.120),
}
HEALTHY = {"A": 0.11, "B": 0.0}  # drawn with nothing at all; many others come out clean as well
SUBTLE = 0.135  # of the findings present, how many are drawn faintly
DEVICE_RATE = {"A": (0.04, 0.08, 0.058, 0.053, 0.053), "B": (0.165, 0.225, 0.085, 0.165, 0.075)}
ROTATED = {"A": 0.25, "B": 0.50}  # of the films

# loadings on (congestion, infection, trauma): why findings come together; the rest is independent
_LOADING = {
    CARD: (0.55, 0.0, 0.0),
    EDEMA: (0.65, 0.0, 0.0),
    EFF: (0.50, 0.25, 0.10),
    CONS: (0.0, 0.45, 0.0),
    PNEU: (0.0, 0.45, 0.0),
    ATEL: (0.15, 0.25, 0.15),
    PTX: (0.0, 0.0, 0.45),
    FRAC: (0.0, 0.0, 0.45),
    MED: (0.15, 0.0, 0.20),
}


def sample_scenes(keys: jax.Array, hospital: str, sites: jax.Array | None = None) -> dict:
    """Draw one scene a key.

    keys: [B] typed keys or uint32 [B, 2]. hospital: "A" or "B" (static). sites: None, or the site of each scene, typed
    keys [B] (`sites.draw`): the same patients, but for the prevalence, filmed there. Returns severity float32 [B,12] (0
    absent, else 0.15..1), side and zone int32 [B,12], device bool [B,5], variant float32 [B,12,4] in 0..1,
    anatomy float32 [B,16] in -1..1, acq float32 [B,16] (ACQ_* of constants.py), quality int32 [B,3] = (AP,
    rotated, low inspiration), noise_key uint32 [B,2], and with sites sharpness float32 [B]. Raises ValueError for
    another hospital.
    """
    if hospital not in PRESENT:
        raise ValueError(f"hospital must be 'A' or 'B', not {hospital!r}")
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        keys = jax.random.wrap_key_data(keys)
    if sites is None:
        return jax.vmap(lambda key: _sample_one(key, hospital))(keys)
    return jax.vmap(lambda key, site: _sample_one(key, hospital, around.draw(site)))(keys, sites)


def _sample_one(key, hospital, site=None):
    # one draw for everything: many small draws would each be compiled, which takes longer than all the rest
    u = jax.random.uniform(key, (_DRAWS,), minval=1e-6, maxval=1.0)
    own, cause, subtle, size, place, acq, anatomy, variant, device, tail = jnp.split(u, _CUTS)
    rates = {
        "present": PRESENT[hospital],
        "device": DEVICE_RATE[hospital],
        "rotated": ROTATED[hospital],
    }
    if site is not None:
        rates = {
            name: around.with_odds(jnp.array(rate), site[name]) for name, rate in rates.items()
        }
    device = device < jnp.array(rates["device"])
    severity = _severity(own, cause, tail[0], subtle, size, rates["present"], HEALTHY[hospital])
    severity = jnp.append(severity, jnp.any(device).astype(jnp.float32))
    side, zone = _place(place, severity)
    acq = _acquisition(acq, hospital, rates["rotated"])
    if site is not None:
        acq = around.film(acq, site)
    rotated = jnp.abs(acq[ACQ_ROTATION]) > ROTATED_FROM
    quality = jnp.stack([acq[ACQ_AP] > 0.5, rotated, acq[ACQ_LOW_INSPIRATION] > 0.5])
    scene = {
        "severity": severity,
        "side": side,
        "zone": zone,
        "device": device,
        "variant": variant.reshape(len(FINDINGS), 4),
        # the sum of two uniforms: most people are near the mean
        "anatomy": jnp.clip((anatomy[:16] + anatomy[16:] - 1.0) * 1.25, -1.0, 1.0),
        "acq": acq,
        "quality": quality.astype(jnp.int32),
        "noise_key": (tail[1:3] * 2.0**24).astype(jnp.uint32),
    }
    return scene if site is None else scene | {"sharpness": site["sharpness"]}


# how many uniform numbers each part of a scene takes, in the order they are split in _sample_one
_SIZES = (DEV, 3, DEV, DEV, 64, 20, 32, 48, len(DEVICES), 3)
_DRAWS, _CUTS = sum(_SIZES), [sum(_SIZES[: i + 1]) for i in range(len(_SIZES) - 1)]


def _severity(own, cause, healthy, subtle, size, rates, healthy_rate):
    """Severity of the 11 pathologies: a Gaussian copula with three shared causes decides who is present."""
    load = jnp.array([_LOADING.get(i, (0.0, 0.0, 0.0)) for i in range(DEV)])
    score = load @ ndtri(cause) + ndtri(own) * jnp.sqrt(1.0 - (load**2).sum(1))
    present = score > ndtri(1.0 - jnp.array(rates))
    present &= healthy >= healthy_rate
    # the empty band 0.30-0.40 keeps "subtle" and "positive" apart for the eye too
    return jnp.where(
        present, jnp.where(subtle < SUBTLE, 0.15 + 0.15 * size, 0.40 + 0.60 * size), 0.0
    )


def _choice(u, logits):
    """Index drawn with softmax(logits), from len(logits) uniform numbers (Gumbel trick)."""
    logits = logits.reshape(-1)
    return jnp.argmax(logits - jnp.log(-jnp.log(jnp.minimum(u[: logits.size], 0.999999))))


def _place(u, severity):
    """Side and zone of every finding, so that no finding is drawn where another would hide it."""
    u = u.reshape(8, 8)
    here = severity > 0
    side = [jnp.int32(BOTH)] * len(FINDINGS)
    zone = [jnp.int32(MID)] * len(FINDINGS)
    table = lambda up, mid, low: jnp.log(jnp.array([[up, mid, low]] * 2))  # [side, zone]
    sides, zones = jnp.arange(2), jnp.arange(3)

    side[EFF] = _choice(u[0], jnp.log(jnp.array([0.36, 0.34, 0.30])))
    side[ATEL] = _choice(u[1], jnp.log(jnp.array([0.35, 0.35, 0.30])))
    zone[EFF] = zone[ATEL] = jnp.int32(LOWER)
    side[PTX] = (u[2, 0] < 0.5).astype(jnp.int32)
    zone[PTX] = _choice(u[2, 1:], jnp.log(jnp.array([0.7, 0.2, 0.1])))

    wet = here[EFF] & ((side[EFF] == sides) | (side[EFF] == BOTH))  # [2]: fluid on that side
    fluid = jnp.where(wet[:, None] & (zones == LOWER), -6.0, 0.0)
    air = jnp.where(here[PTX] & (side[PTX] == sides), -2.0, 0.0)[:, None]
    taken = fluid + air
    for row, (i, prior) in enumerate(
        (
            (CONS, table(0.3, 0.3, 0.4)),
            (PNEU, table(0.25, 0.35, 0.4)),
            (LESION, table(0.4, 0.35, 0.25)),
        )
    ):
        cell = _choice(u[3 + row], prior + taken)
        side[i], zone[i] = cell // 3, cell % 3
        taken = taken + jnp.where(
            here[i] & (side[i] == sides)[:, None] & (zone[i] == zones), -6.0, 0.0
        )
    cell = _choice(u[6], table(0.35, 0.40, 0.25) + 2 * fluid + 2 * air)
    side[PLEU], zone[PLEU] = cell // 3, cell % 3
    cell = _choice(u[7], table(0.25, 0.45, 0.30) + fluid)
    side[FRAC], zone[FRAC] = cell // 3, cell % 3
    return jnp.stack(side).astype(jnp.int32), jnp.stack(zone).astype(jnp.int32)


def _acquisition(u, hospital, rotated_rate):
    """How the picture was taken (ACQ_* order) from 20 uniform numbers."""
    lin = lambda i, lo, hi: lo + (hi - lo) * u[i]
    straight = u[8] < 1.0 - rotated_rate
    if hospital == "A":
        ap = u[0] < 0.20
        low = u[1] < 0.12
        contrast, gamma = lin(2, 0.82, 1.12), lin(3, -0.30, 0.35)
        noise, scatter = lin(4, 0.008, 0.026), lin(5, 0.06, 0.20)
        magnification, veil = lin(6, 0.95, 1.05), lin(7, 0.0, 0.05)
        angle = jnp.where(straight, lin(9, 0.0, 1.6), lin(9, 2.8, 3.6))
    else:
        ap = u[0] < 0.85
        low = u[1] < 0.35
        contrast, gamma = lin(2, 0.62, 0.88), lin(3, 0.10, 0.75)
        noise, scatter = lin(4, 0.022, 0.048), lin(5, 0.14, 0.34)
        magnification, veil = lin(6, 0.98, 1.12), lin(7, 0.02, 0.10)
        angle = jnp.where(straight, lin(9, 0.0, 2.0), lin(9, 3.0, 7.0))
    rotation = jnp.where(u[10] < 0.5, angle, -angle)
    depth = jnp.where(low, lin(11, 0.75, 1.0), lin(11, 0.0, 0.25))
    values = [
        contrast,
        gamma,
        noise,
        scatter,
        magnification,
        rotation,
        lin(12, -0.05, 0.05),
        lin(13, -0.05, 0.05),
        ap.astype(jnp.float32),
        depth,
        lin(14, -0.06, 0.06),
        u[15],
        u[16],
        lin(17, -1.0, 1.0),
        veil,
        u[18],
    ]
    return jnp.stack(values).astype(jnp.float32)


def labels(scene: dict) -> jax.Array:
    """int8 [B,14] in CheXpert order: 1 positive, 0 negative, -1 uncertain (subtle); from severity alone.

    Lung Opacity is the parent of lesion, edema, consolidation, pneumonia and atelectasis. No Finding is 1 iff
    no pathology is positive; devices are not pathology. Cardiomegaly implies no Enlarged Cardiomediastinum.
    """
    s = scene["severity"]
    state = jnp.where(s >= POSITIVE_AT, 1, jnp.where(s > 0, -1, 0))
    parts = state[:, jnp.array(OPACITIES)]
    opacity = jnp.where((parts == 1).any(1), 1, jnp.where((parts == -1).any(1), -1, 0))
    clean = 1 - (state[:, :DEV] == 1).any(1).astype(state.dtype)
    out = [clean, state[:, MED], state[:, CARD], opacity]
    out += [state[:, i] for i in (LESION, EDEMA, CONS, PNEU, ATEL, PTX, EFF, PLEU, FRAC, DEV)]
    return jnp.stack(out, 1).astype(jnp.int8)


def sides(scene: dict) -> jax.Array:
    """bool [B,14,2] in CheXpert order: is the finding, sure or subtle, on the patient's right, and on the left?

    Neither for what has no side (No Finding, the mediastinum, the heart, devices). Lung Opacity is where its parts are.
    """
    side = scene["side"]
    own = jnp.stack([side != LEFT, side != RIGHT], -1)  # BOTH is neither
    has = (scene["severity"] > 0)[:, jnp.array(OPACITIES), None]
    opacity = (own[:, jnp.array(OPACITIES)] & has).any(1)
    neither = jnp.zeros_like(opacity)
    out = [neither, neither, neither, opacity]
    out += [own[:, i] for i in (LESION, EDEMA, CONS, PNEU, ATEL, PTX, EFF, PLEU, FRAC)] + [neither]
    return jnp.stack(out, 1)


def regions(scene: dict) -> jax.Array:
    """float32 [B,12,8,8]: how much of each 28 px cell is inside a finding's drawn region (row 0 = top).

    0 when absent; a subtle finding counts half. Thin things get a margin, see `findings.region_masks`.
    """
    from cxr_jax.phantom.findings import region_maps

    weight = jnp.where(
        scene["severity"] >= POSITIVE_AT, 1.0, jnp.where(scene["severity"] > 0, 0.5, 0.0)
    )
    return jax.vmap(region_maps)(scene) * weight[:, :, None, None]


__all__ = ["FINDINGS", "DEVICES", "POSITIVE_AT", "sample_scenes", "labels", "regions", "sides"]
