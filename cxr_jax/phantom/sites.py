"""Random sites around a hospital: another detector, view geometry and prevalence; the reports' language stays.

What a site changes is drawn around the hospital's own values; hospital B lends nothing to the spread. Sites of A
overlap B in some numbers, as any wide spread does, and in others not at all: the shares of bedside (AP) films and of
poor inspirations, scatter and fog, by which B differs as well, stay those of A.
"""

import jax
import jax.numpy as jnp

from cxr_jax.phantom.constants import DEVICES, PATHOLOGIES, ROTATED_FROM, Acquisition
from cxr_jax.runtime.trees import Tree

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

# Of a site's uniform numbers: findings, devices, and 8 for the rest.
_CUTS = (PATHOLOGIES, PATHOLOGIES + len(DEVICES))
_DRAWS = _CUTS[1] + 8


def draw(key: jax.Array) -> Tree:
    """Draw what the site of a typed key changes.

    Returns:
        float32: odds `present` [11] (pathologies in the order of FINDINGS), `device` [5] and `rotated`, factors
        `contrast`, `tone`, `noise`, `magnification`, `turn` and `turn_straight`, 1 in the hospital itself; and
        `sharpness`, 0 there.
    """
    uniform = jax.random.uniform(key, (_DRAWS,), minval=-1.0, maxval=1.0)
    finding, device, film_numbers = jnp.split(uniform, _CUTS)
    turn = TURN[0] + (TURN[1] - TURN[0]) * 0.5 * (1.0 + film_numbers[5])
    return {
        "present": jnp.exp(FINDING * finding + SICKNESS * film_numbers[7]),
        "device": jnp.exp(DEVICE * device),
        "rotated": jnp.exp(ROTATED * film_numbers[6]),
        "contrast": jnp.exp(CONTRAST * film_numbers[0]),
        "tone": jnp.exp(TONE * film_numbers[1]),
        "noise": jnp.exp(NOISE * film_numbers[2]),
        "sharpness": SHARPNESS * film_numbers[3],
        "magnification": jnp.exp(MAGNIFICATION * film_numbers[4]),
        "turn": turn,
        "turn_straight": jnp.minimum(turn, TURN_STRAIGHT),
    }


def with_odds(probability: jax.Array, factor: jax.Array) -> jax.Array:
    """Give the probability with `factor` times the odds; 0 and 1 stay."""
    return probability * factor / (1.0 - probability + probability * factor)


def film(acquisition: jax.Array, site: Tree) -> jax.Array:
    """Turn the hospital's own acquisition, float32 [16] (`Acquisition`), into that of a site."""
    angle = acquisition[Acquisition.ROTATION]
    is_rotated = jnp.abs(angle) > ROTATED_FROM
    turn = jnp.where(is_rotated, site["turn"], site["turn_straight"])
    changed = {
        Acquisition.CONTRAST: acquisition[Acquisition.CONTRAST] * site["contrast"],
        Acquisition.GAMMA: (1.0 + acquisition[Acquisition.GAMMA]) * site["tone"] - 1.0,
        Acquisition.NOISE: acquisition[Acquisition.NOISE] * site["noise"],
        Acquisition.MAGNIFICATION: acquisition[Acquisition.MAGNIFICATION] * site["magnification"],
        Acquisition.ROTATION: angle * turn,
    }
    return jnp.stack([changed.get(place, acquisition[place]) for place in Acquisition])
