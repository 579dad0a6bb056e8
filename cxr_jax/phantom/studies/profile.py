"""The normal chest seen from the side, as analytic functions over a pixel grid: what a lateral film draws.

Body units as in `geometry`; `across` grows from the sternum (the image's left) to the spine. Heights, widths and the
domes are those of the frontal film's thorax, so both films show one patient. All fields are float32 [n, n].
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cxr_jax.phantom.constants import SIZE, Acquisition, Anatomy, Finding
from cxr_jax.phantom.geometry import (
    PIXEL,
    Thorax,
    bump,
    cardiothoracic_ratio,
    chord,
    pixel_centres,
    ramp,
    strength,
    thorax_shape,
    tube_profile,
)
from cxr_jax.runtime.trees import Tree

HILUM = 0.05  # where the hila are, `across`; they overlap
BACK = 0.62  # the posterior wall at its deepest


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Fields of the normal chest in profile, float32 [n, n] or what broadcasts to it."""

    thorax: Thorax
    across: jax.Array
    downward: jax.Array
    front: jax.Array  # where the anterior wall of the lungs is, `across`
    back: jax.Array
    depth: jax.Array  # inside both walls, negative outside
    height: jax.Array  # 0 at the apex, 1 at the lower dome
    diaphragm_right: jax.Array  # `downward`
    diaphragm_left: jax.Array
    lung: jax.Array  # depth along the ray of both lungs, 0..1
    in_lung: jax.Array  # 1 where there is any


def profile(scene: Tree, count: int = SIZE) -> Profile:
    """Draw the normal chest of one scene in profile, on a grid of count x count pixels."""
    acquisition, thorax = scene["acq"], thorax_shape(scene)
    # Where a pixel is in the body, as on the frontal film: shifted, tilted, magnified.
    centres = pixel_centres(count)
    column = (centres - acquisition[Acquisition.SHIFT_X])[None, :]
    row = (centres - acquisition[Acquisition.SHIFT_Y])[:, None]
    angle = acquisition[Acquisition.ROTATION] * (jnp.pi / 180.0)
    cosine = jnp.cos(angle) / acquisition[Acquisition.MAGNIFICATION]
    sine = jnp.sin(angle) / acquisition[Acquisition.MAGNIFICATION]
    across, downward = cosine * column + sine * row, cosine * row - sine * column

    # ---- Walls: the sternum slopes away from the apex, the back falls nearly straight ----
    fraction = jnp.clip((downward - thorax.lung_top) * (1 / 0.85), 0.0, 1.0)
    slope = 0.5 * fraction + 0.5 * jnp.sqrt(fraction * (2.0 - fraction))
    front = 0.02 - (0.64 + 0.03 * scene["anatomy"][Anatomy.WIDTH]) * slope
    fraction = jnp.clip((downward - thorax.lung_top) * (1 / 0.60), 0.0, 1.0)
    back = 0.12 + (BACK - 0.12) * jnp.sqrt(fraction * (2.0 - fraction))
    depth = jnp.minimum(across - front, back - across)

    # ---- Two domes, highest in front of the middle, falling into the posterior sulcus ----
    offset = across + 0.10
    fall = jnp.where(offset > 0, 0.58, 0.42) * offset * offset
    fall += 1.4 * jnp.maximum(across - 0.30, 0.0) ** 2
    diaphragm_right, diaphragm_left = thorax.dome_right + fall, thorax.dome_left + fall + 0.02

    # Both lungs lie one behind the other: between the domes there is air of one alone.
    edge = jnp.clip(depth * (1 / 0.20), 0.0, 1.0)
    above = 0.5 * (
        ramp(diaphragm_right - downward, 1.2 * PIXEL) + ramp(diaphragm_left - downward, 1.2 * PIXEL)
    )
    lower_dome = jnp.maximum(thorax.dome_right, thorax.dome_left)
    return Profile(
        thorax=thorax,
        across=across,
        downward=downward,
        front=front,
        back=back,
        depth=depth,
        height=(downward - thorax.lung_top) / (lower_dome - thorax.lung_top),
        diaphragm_right=diaphragm_right,
        diaphragm_left=diaphragm_left,
        lung=jnp.sqrt(edge * (2.0 - edge)) * above,
        in_lung=ramp(depth, PIXEL) * above,
    )


def heart(scene: Tree, view: Profile) -> jax.Array:
    """Draw the heart's depth along the ray in 0..1: it lies on the sternum, and grows backwards."""
    # As large as the frontal's ratio says; its front border stays where it touches the sternum.
    half = 0.255 * cardiothoracic_ratio(scene) / 0.45
    half_height = 0.27 + 0.5 * (half - 0.255)
    across = view.across + 0.50 - half
    downward = view.downward - (view.thorax.resting_dome - 0.15)
    tilt = 0.25 + 0.05 * scene["anatomy"][Anatomy.HEART_TILT]
    squared_offset = ((across + tilt * downward) / half) ** 2 + (downward / half_height) ** 2
    return chord(squared_offset * squared_offset)


def mediastinum(scene: Tree, view: Profile) -> jax.Array:
    """Draw the aorta and what stands before it, 0..1; Enlarged Cardiomediastinum fills the space behind the sternum."""
    severity = scene["severity"][Finding.ENLARGED_CARDIOMEDIASTINUM]
    widening = jnp.where(severity > 0, strength(severity), 0.0)
    # The arch: the upper half of a ring around its centre, and what comes down from it on both sides.
    radius = 0.135 + 0.015 * scene["anatomy"][Anatomy.AORTA]
    across, downward = view.across - 0.09, view.downward + 0.24
    from_axis = jnp.where(
        downward < 0, jnp.sqrt(across**2 + downward**2) - radius, jnp.abs(across) - radius
    )
    thick = 0.055 + 0.05 * widening
    ends = ramp(jnp.where(across > 0, 0.62, 0.30) - downward, 0.15)
    arch = chord((from_axis / thick) ** 2) * ends * jnp.where(across > 0, 0.75, 1.0)
    # What widens it lies in front of the ascending aorta.
    space = bump(((view.across + 0.13) / 0.20) ** 2 + ((view.downward + 0.38) / 0.30) ** 2)
    return jnp.maximum(0.8 * arch, jnp.minimum(1.6 * widening * space, 1.0))


def airways(view: Profile) -> jax.Array:
    """Draw the trachea, down to the carina, and the ring of the left upper bronchus below it, 0..1."""
    axis = view.across - 0.03 - 0.10 * (view.downward + 0.6)
    trachea = ramp(0.034 - jnp.abs(axis), 0.016) * ramp(-0.22 - view.downward, 0.03)
    # Seen end on, a dark circle in front of the descending aorta.
    ring = bump(((view.across - 0.085) / 0.042) ** 2 + ((view.downward + 0.10) / 0.042) ** 2)
    return jnp.maximum(trachea, ring)


def rib_heights(view: Profile, shift: float) -> jax.Array:
    """Give the distance from the axis of the nearest rib, body units: ribs fall from the back to the front."""
    # Steeper towards the front.
    forward = BACK - view.across
    drop = 0.52 * forward + 0.30 * forward * forward
    pitch = view.thorax.rib_pitch
    period = (view.downward - drop) * (1.0 / pitch) - view.thorax.rib_phase - shift
    return (period - jnp.round(period)) * pitch


def spine_axis(downward: jax.Array) -> jax.Array:
    """Give where the middle of the vertebral bodies is, `across`: the thoracic spine is bent backwards."""
    return 0.48 - 0.14 * (downward + 0.05) ** 2


def bones(scene: Tree, view: Profile) -> jax.Array:
    """Draw spine, ribs of both sides, sternum, shoulder blades and the arms, which are raised."""
    across, downward = view.across, view.downward
    # ---- Spine: bodies between discs, with a bright rim, and the arches behind them ----
    disc = (downward + 0.02) * (1 / 0.118)
    disc = jnp.abs(disc - jnp.round(disc))
    from_axis = across - spine_axis(downward)
    body = ramp(0.082 - jnp.abs(from_axis), 0.012) * (0.13 + 0.17 * ramp(0.40 - disc, 0.05))
    rim = ramp(1.8 * PIXEL - jnp.abs(jnp.abs(from_axis) - 0.080), 1.2 * PIXEL)
    arch = ramp(0.05 - jnp.abs(from_axis - 0.155), 0.03) * ramp(0.30 - disc, 0.12)

    # ---- Ribs: those of the side nearer to the detector are sharper, the two sets do not coincide ----
    inside = (
        ramp(view.depth + 0.035, 0.015) * ramp(0.62 - downward, 0.1) * ramp(downward + 0.8, 0.05)
    )
    ribs = 0.27 * (
        tube_profile(rib_heights(view, 0.0), 0.032) + tube_profile(rib_heights(view, 0.30), 0.030)
    )
    # ---- Sternum, in front of the lungs, in pieces ----
    from_sternum = across - view.front + 0.045
    joint = jnp.abs((downward * (1 / 0.19)) - jnp.round(downward * (1 / 0.19)))
    sternum = (
        ramp(0.030 - jnp.abs(from_sternum), 0.012)
        * ramp(downward + 0.60, 0.03)
        * ramp(0.22 - downward, 0.04)
        * (0.6 + 0.4 * ramp(joint - 0.06, 0.04))
    )
    # ---- Shoulder blade, and the arms, which cross the apices ----
    blade = ramp(2.0 * PIXEL - jnp.abs(across - 0.40 - 0.22 * (downward + 0.35)), 1.5 * PIXEL)
    blade *= ramp(-0.05 - downward, 0.08) * ramp(downward + 0.75, 0.08)
    arms = bump(((across - 0.14) / 0.60) ** 2 + ((downward + 1.02) / 0.42) ** 2)
    lift = 0.03 * scene["anatomy"][Anatomy.CLAVICLE]
    humerus = tube_profile(across - 0.20 - lift + 0.5 * (downward + 0.9), 0.05) * ramp(
        -0.72 - downward, 0.05
    )
    bony = body + 0.10 * rim + 0.10 * arch + ribs * inside
    return bony + 0.34 * sternum + 0.10 * blade + 0.55 * arms + 0.22 * humerus


def trunk(scene: Tree, view: Profile) -> jax.Array:
    """Draw the depth of the body along the ray, about 1 in its middle; breasts and belly stand out in front."""
    across, downward = view.across, view.downward
    # What stands out in front of the ribs.
    belly = 0.10 * ramp(downward - 0.45, 0.25)
    breast = 0.17 * jnp.maximum(scene["anatomy"][Anatomy.BREAST], 0.0)
    breast *= bump(((downward - 0.16) / 0.34) ** 2)
    skin_front = view.front - 0.13 - belly - breast
    # Shoulders, which are wider than the apices between them, and the neck above.
    shoulder = ramp(-0.50 - downward, 0.25) * ramp(downward + 1.02, 0.12)
    skin_front = skin_front + shoulder * (-0.36 - skin_front) * (skin_front > -0.36)
    skin_back = view.back + 0.17
    skin_back = skin_back + shoulder * (0.66 - skin_back)
    half = 0.5 * (skin_back - skin_front)
    middle = 0.5 * (skin_back + skin_front)
    shape = chord(((across - middle) / half) ** 2)
    return jnp.sqrt(jnp.maximum(shape, 1e-4)) * (shape > 0)
