"""The normal chest as analytic functions over a pixel grid: frame, lungs, diaphragm, heart, ribs.

Body units: half the image is 1; `across` grows to the image's right (the patient's left), `downward` grows downwards.
Both lungs are evaluated at once: `lateral` is the distance from the spine, `is_left` says which side a pixel is on.
All fields are float32 [n, n] unless said otherwise.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cxr_jax.phantom.constants import BOTH, LEFT, POSITIVE_AT, SIZE, Acquisition, Anatomy, Finding
from cxr_jax.runtime.trees import Tree

PIXEL = 2.0 / SIZE  # one pixel in body units
RISE = 0.13  # how far full atelectasis lifts its hemidiaphragm


# ---- Shapes that everything is drawn with ----------------------------------------------------------


def ramp(distance: jax.Array | float, width: float) -> jax.Array:
    """Step smoothly over a signed distance: 0 at distance <= -width, 1 at distance >= width."""
    fraction = jnp.clip(distance * (0.5 / width) + 0.5, 0.0, 1.0)
    return fraction * fraction * (3.0 - 2.0 * fraction)


def chord(squared_offset: jax.Array) -> jax.Array:
    """Measure the chord of a unit ball or cylinder at a squared offset (1 in the middle, 0 outside)."""
    return jnp.sqrt(jnp.maximum(0.0, 1.0 - squared_offset))


def bump(squared_offset: jax.Array) -> jax.Array:
    """Draw a soft compact blob: 1 in the middle, 0 from a squared offset of 1 on."""
    height = jnp.maximum(0.0, 1.0 - squared_offset)
    return height * height


def tube_profile(offset: jax.Array, radius: float) -> jax.Array:
    """Draw a hollow bone seen from the side: bright cortex, paler marrow. `offset` is that from its axis."""
    squared_offset = (offset * (1.0 / radius)) ** 2
    return 1.25 * chord(squared_offset) - 0.75 * chord(squared_offset * 1.55)


# ---- How strongly a finding is drawn ---------------------------------------------------------------


def strength(severity: jax.Array) -> jax.Array:
    """Turn severity into the strength of a drawing: faint up to 0.3 for subtle ones, 0.6..1 for positive ones."""
    positive = 0.6 + 0.4 * (severity - POSITIVE_AT) / (1.0 - POSITIVE_AT)
    return jnp.where(severity >= POSITIVE_AT, positive, severity)


def by_side(scene: Tree, finding: Finding) -> tuple[jax.Array, jax.Array]:
    """Give the strength of a finding on the right and on the left, scalars; 0 on a side it is not on."""
    drawn, side = strength(scene["severity"][finding]), scene["side"][finding]
    right = jnp.where(side == LEFT, 0.0, drawn)
    return right, jnp.where((side == LEFT) | (side == BOTH), drawn, 0.0)


def cardiothoracic_ratio(scene: Tree) -> jax.Array:
    """Give heart width / inner chest width of one scene: under 0.5 if normal, 0.5 + 0.2 severity in cardiomegaly.

    An AP film shows the heart 4 % larger, a nuisance that stays below 0.5 for a normal heart.
    """
    severity = scene["severity"][Finding.CARDIOMEGALY]
    normal = 0.425 + 0.04 * scene["anatomy"][Anatomy.HEART]
    ratio = jnp.where(severity > 0, 0.5 + 0.2 * severity, normal)
    return ratio * (1.0 + 0.04 * scene["acq"][Acquisition.AP])


# ---- The frame -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Thorax:
    """Scalars of the normal anatomy of one scene that several drawings share, in body units."""

    width: jax.Array  # from the spine to the lateral wall
    lung_top: jax.Array
    resting_dome: (
        jax.Array
    )  # the lower dome; the heart lies on it, lost lung volume lifts the dome beside it
    dome_right: jax.Array
    dome_left: jax.Array
    midline_shift: jax.Array  # a turned chest moves heart and trachea off the spine
    rib_pitch: jax.Array
    rib_phase: jax.Array  # in pitches
    rib_slope: jax.Array


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Fields of the normal chest on an n x n grid covering the image, float32 [n, n] or what broadcasts to it."""

    thorax: Thorax
    across: jax.Array
    downward: jax.Array
    is_left: jax.Array  # bool
    lateral: jax.Array  # distance from the spine
    from_midline: jax.Array  # of heart and mediastinum; left of it in the image is negative
    dome: jax.Array  # height of the diaphragm's dome on the pixel's own side
    wall: jax.Array  # distance of the lateral wall from the spine
    depth: jax.Array  # inside the chest wall, negative outside
    above_diaphragm: jax.Array
    lung: jax.Array  # depth along the ray, 0..1
    in_lung: jax.Array  # 1 where there is lung


def thorax_shape(scene: Tree) -> Thorax:
    """Compute the scalars of the normal anatomy of one scene."""
    anatomy, acquisition = scene["anatomy"], scene["acq"]
    raised = 0.15 * acquisition[Acquisition.LOW_INSPIRATION]
    collapse_right, collapse_left = by_side(scene, Finding.ATELECTASIS)
    width = 0.725 + 0.03 * anatomy[Anatomy.WIDTH]
    lung_top = -0.80 + 0.03 * anatomy[Anatomy.APEX]
    resting_right = 0.42 + 0.04 * anatomy[Anatomy.DIAPHRAGM_RIGHT] - raised
    resting_left = 0.48 + 0.04 * anatomy[Anatomy.DIAPHRAGM_LEFT] - raised
    return Thorax(
        width=width,
        lung_top=lung_top,
        resting_dome=jnp.minimum(resting_right, resting_left),
        dome_right=resting_right - RISE * collapse_right,
        dome_left=resting_left - RISE * collapse_left,
        midline_shift=0.011 * acquisition[Acquisition.ROTATION],
        rib_pitch=0.150 + 0.012 * anatomy[Anatomy.RIB_SPACING],
        rib_phase=0.5 * anatomy[Anatomy.RIB_PHASE],
        rib_slope=0.16 + 0.07 * anatomy[Anatomy.RIB_SLOPE],
    )


def pick(grid: Grid, right: jax.Array, left: jax.Array) -> jax.Array:
    """Choose the value that belongs to the side each pixel is on."""
    return jnp.where(grid.is_left, left, right)


def zone_height(grid: Grid, zone: int | jax.Array) -> jax.Array:
    """Give the middle (`downward`) of a lung zone (0 upper, 1 mid, 2 lower), on each pixel's own side."""
    share = jnp.array([0.26, 0.53, 0.80])[zone]
    return grid.thorax.lung_top + (grid.dome - grid.thorax.lung_top) * share


def pixel_centres(count: int) -> jax.Array:
    """Give the centres of `count` pixels over the image, float32 [count], in body units."""
    return (jnp.arange(count, dtype=jnp.float32) + 0.5) * (2.0 / count) - 1.0


def chest(scene: Tree, count: int = SIZE) -> Grid:
    """Draw the normal chest of one scene on a grid of count x count pixels."""
    acquisition, thorax = scene["acq"], thorax_shape(scene)

    # ---- Where a pixel is in the body: shifted, tilted, magnified ----
    centres = pixel_centres(count)
    column = (centres - acquisition[Acquisition.SHIFT_X])[None, :]
    row = (centres - acquisition[Acquisition.SHIFT_Y])[:, None]
    angle = acquisition[Acquisition.ROTATION] * (jnp.pi / 180.0)
    cosine = jnp.cos(angle) / acquisition[Acquisition.MAGNIFICATION]
    sine = jnp.sin(angle) / acquisition[Acquisition.MAGNIFICATION]
    across, downward = cosine * column + sine * row, cosine * row - sine * column
    is_left, lateral = across > 0.0, jnp.abs(across)
    from_midline = across - thorax.midline_shift
    dome = jnp.where(is_left, thorax.dome_left, thorax.dome_right)

    # ---- Lateral wall: a quarter ellipse from the apex down to full width, then straight ----
    fraction = jnp.clip((downward - thorax.lung_top) * (1 / 0.98), 0.0, 1.0)
    wall = 0.25 + (thorax.width - 0.25) * jnp.sqrt(fraction * (2.0 - fraction))
    fraction = jnp.clip((downward - thorax.lung_top) * 4.0, 0.0, 1.0)
    apex_wall = 0.25 - 0.22 * jnp.sqrt(fraction * (2.0 - fraction))
    depth = wall - lateral
    inside = jnp.minimum(depth, (lateral - apex_wall))

    # ---- Diaphragm: a dome that falls steeply into the lateral costophrenic angle ----
    offset = lateral - 0.32
    fall = jnp.where(offset > 0, 0.75, 0.35)
    diaphragm = dome + fall * offset * offset + 3.0 * jnp.maximum(offset - 0.22, 0.0) ** 2
    above_diaphragm = diaphragm - downward

    # ---- Lung depth along the ray: a solid rounded at its sides ----
    edge = jnp.clip(inside * (1 / 0.22), 0.0, 1.0)
    lung = (
        jnp.sqrt(edge * (2.0 - edge))
        * ramp(above_diaphragm, 0.9 * PIXEL)
        * (0.88 + 0.12 * ramp(above_diaphragm - 0.1, 0.12))
    )
    return Grid(
        thorax=thorax,
        across=across,
        downward=downward,
        is_left=is_left,
        lateral=lateral,
        from_midline=from_midline,
        dome=dome,
        wall=wall,
        depth=depth,
        above_diaphragm=above_diaphragm,
        lung=lung,
        in_lung=ramp(inside, PIXEL) * ramp(above_diaphragm, PIXEL),
    )


# ---- Heart and mediastinum -------------------------------------------------------------------------


def heart(scene: Tree, grid: Grid) -> jax.Array:
    """Draw the heart's depth along the ray in 0..1; its width is exactly CTR times the inner chest width."""
    anatomy = scene["anatomy"]
    half_width = cardiothoracic_ratio(scene) * grid.thorax.width
    tilt = 0.30 + 0.08 * anatomy[Anatomy.HEART_TILT]
    half_height = 0.30 + 0.22 * (half_width - 0.30)
    # Sheared ellipse: its widest points are at a distance of exactly half_width from its centre.
    semi_axis = jnp.sqrt(half_width * half_width - (tilt * half_height) ** 2)
    centre = grid.thorax.resting_dome - 0.20
    across, downward = grid.from_midline - 0.34 * half_width, grid.downward - centre
    squared_offset = ((across - tilt * downward) / semi_axis) ** 2 + (downward / half_height) ** 2
    return chord(squared_offset * squared_offset)


def mediastinum(scene: Tree, grid: Grid) -> jax.Array:
    """Draw the depth in 0..1 of the vascular pedicle with the aortic knob, widened by Enlarged Cardiomediastinum."""
    anatomy = scene["anatomy"]
    severity = scene["severity"][Finding.ENLARGED_CARDIOMEDIASTINUM]
    widening = jnp.where(severity > 0, 0.19 * strength(severity), 0.0)
    flare = jnp.clip(grid.downward + 0.62, 0.0, 0.62)
    widening = widening * (1.0 + 0.5 * flare) * ramp(0.05 - grid.downward, 0.25)
    half_width = (
        0.115
        + 0.012 * anatomy[Anatomy.MEDIASTINUM]
        + 0.22 * flare * flare * ramp(0.22 - grid.downward, 0.10)
        + widening
    )
    waist = ramp(0.60 - grid.downward, 0.10) * ramp(grid.downward + 0.98, 0.06)
    from_edge = jnp.clip((half_width - jnp.abs(grid.from_midline)) * (1 / 0.05), 0.0, 1.0)
    column = jnp.sqrt(from_edge * (2.0 - from_edge)) * waist

    radius = 0.085 + 0.012 * anatomy[Anatomy.AORTA]
    squared_offset = (grid.from_midline - 0.085 - widening) ** 2 + (grid.downward + 0.27) ** 2
    knob = chord(squared_offset * (1 / (radius * radius)))
    return jnp.maximum(column, 0.9 * knob)


# ---- Ribs ------------------------------------------------------------------------------------------


def rib_curve(grid: Grid, lateral: jax.Array) -> jax.Array:
    """Give how far a posterior rib has dropped at a distance from the spine (body units)."""
    offset = lateral - 0.20
    drop = grid.thorax.rib_slope * offset + 0.85 * offset * offset
    return drop - 0.3 * jnp.maximum(0.24 - lateral, 0.0)  # it leaves the spine upwards


def posterior_ribs(grid: Grid, downward: jax.Array, lateral: jax.Array) -> jax.Array:
    """Draw the attenuation 0..~1 of the posterior ribs; `downward` may already be displaced by a fracture."""
    thorax = grid.thorax
    period = (downward - rib_curve(grid, lateral)) * (1.0 / thorax.rib_pitch) - thorax.rib_phase
    offset = (period - jnp.round(period)) * thorax.rib_pitch
    reach = (
        ramp(lateral - 0.07, 0.03)
        * ramp(grid.wall + 0.025 - lateral, 0.012)
        * ramp(grid.downward + 0.84, 0.05)
        * ramp(0.66 - grid.downward, 0.1)
    )
    return tube_profile(offset, 0.034) * reach


def anterior_ribs(grid: Grid) -> jax.Array:
    """Draw the attenuation of the anterior ribs: wider, fainter, falling to the midline and ending in cartilage."""
    thorax = grid.thorax
    inward = thorax.width - grid.lateral
    height = grid.downward - 0.62 * inward - 0.15 * inward * inward
    period = height * (1.0 / (thorax.rib_pitch * 1.12)) - thorax.rib_phase * 0.7
    offset = (period - jnp.round(period)) * (thorax.rib_pitch * 1.12)
    reach = (
        ramp(grid.lateral - 0.32, 0.07)
        * ramp(grid.wall + 0.02 - grid.lateral, 0.012)
        * ramp(grid.downward + 0.62, 0.06)
        * ramp(0.42 - grid.downward, 0.1)
    )
    return tube_profile(offset, 0.040) * reach
