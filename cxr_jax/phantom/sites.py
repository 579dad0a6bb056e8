"""Random sites around a hospital: another detector, view geometry and prevalence; the reports' language stays.

What a site changes is drawn around the hospital's own values; hospital B lends nothing to the spread. Sites of A
overlap B in some numbers, as any wide spread does, and in others not at all: the shares of bedside (AP) films and of
poor inspirations, scatter and fog, by which B differs as well, stay those of A.
"""

import jax
import jax.numpy as jnp

from cxr_jax.phantom.constants import (
    ACQ_CONTRAST,
    ACQ_GAMMA,
    ACQ_MAGNIFICATION,
    ACQ_NOISE,
    ACQ_ROTATION,
    DEV,
    DEVICES,
    ROTATED_FROM,
)

# Half the width of the uniform spread between sites. Of a logarithm, 0.25 means 0.78 to 1.28 times.
CONTRAST = 0.25  # log
TONE = 0.35  # log, of 1 + gamma
NOISE = 0.70  # log
SHARPNESS = 0.90  # added to 0: a detector that blurs (below 0) or a console that sharpens
MAGNIFICATION = 0.08  # log
FINDING = 0.60  # log-odds, each finding on its own
SICKNESS = 0.40  # log-odds, all findings together
DEVICE = 0.80  # log-odds, each device
ROTATED = 0.80  # log-odds, of films that are rotated
# How far films turn, as a factor. Not symmetric about 1: what reports call straight and what they call rotated must
# stay apart, which a factor below 0.9 for rotated films (from 2.8 degrees) or a large one for straight ones would end.
TURN = (0.9, 2.2)
TURN_STRAIGHT = 1.25

_CUTS = (DEV, DEV + len(DEVICES))  # of a site's uniform numbers: findings, devices, the rest
_DRAWS = _CUTS[1] + 8


def draw(key: jax.Array) -> dict:
    """What the site of a typed key changes, a dict of float32: odds `present` [11] (pathologies in the order of
    FINDINGS), `device` [5] and `rotated`, factors `contrast`, `tone`, `noise`, `magnification`, `turn` and
    `turn_straight`, 1 in the hospital itself; and `sharpness`, 0 there."""
    own, device, u = jnp.split(jax.random.uniform(key, (_DRAWS,), minval=-1.0, maxval=1.0), _CUTS)
    turn = TURN[0] + (TURN[1] - TURN[0]) * 0.5 * (1.0 + u[5])
    return {
        "present": jnp.exp(FINDING * own + SICKNESS * u[7]),
        "device": jnp.exp(DEVICE * device),
        "rotated": jnp.exp(ROTATED * u[6]),
        "contrast": jnp.exp(CONTRAST * u[0]),
        "tone": jnp.exp(TONE * u[1]),
        "noise": jnp.exp(NOISE * u[2]),
        "sharpness": SHARPNESS * u[3],
        "magnification": jnp.exp(MAGNIFICATION * u[4]),
        "turn": turn,
        "turn_straight": jnp.minimum(turn, TURN_STRAIGHT),
    }


def with_odds(probability, factor):
    """The probability with `factor` times the odds; 0 and 1 stay."""
    return probability * factor / (1.0 - probability + probability * factor)


def film(acq: jax.Array, site: dict) -> jax.Array:
    """The acquisition float32 [16] (ACQ_* order) that the hospital's own becomes at a site."""
    angle = acq[ACQ_ROTATION]
    turn = jnp.where(jnp.abs(angle) > ROTATED_FROM, site["turn"], site["turn_straight"])
    changed = {
        ACQ_CONTRAST: acq[ACQ_CONTRAST] * site["contrast"],
        ACQ_GAMMA: (1.0 + acq[ACQ_GAMMA]) * site["tone"] - 1.0,
        ACQ_NOISE: acq[ACQ_NOISE] * site["noise"],
        ACQ_MAGNIFICATION: acq[ACQ_MAGNIFICATION] * site["magnification"],
        ACQ_ROTATION: angle * turn,
    }
    return jnp.stack([changed.get(i, acq[i]) for i in range(acq.shape[0])])
