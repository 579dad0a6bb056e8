"""Where each finding is drawn: masks over the grid, shared by the renderer and by the region maps.

Every function takes one scene and the grid of its normal chest, and returns float32 [n, n] unless it says otherwise.
`variant` is the finding's four numbers in 0..1 of the scene: what makes two pictures of one finding differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.phantom.constants import CELLS, LEFT, LOWER, MID, UPPER, Device, Finding
from cxr_jax.phantom.geometry import (
    PIXEL,
    RISE,
    Grid,
    bump,
    by_side,
    chest,
    chord,
    heart,
    mediastinum,
    pick,
    ramp,
    rib_curve,
    strength,
    zone_height,
)
from cxr_jax.runtime.trees import Tree


class Pneumothorax(NamedTuple):
    """The space without markings, and the pleural line of the collapsed lung."""

    air: jax.Array
    line: jax.Array


class Thickening(NamedTuple):
    """Thickened pleura, and the denser plaque inside it."""

    band: jax.Array
    plaque: jax.Array


class Fracture(NamedTuple):
    """A broken rib."""

    shift: jax.Array  # how far the rib is displaced, body units downwards
    gap: jax.Array  # the dark cleft
    ends: jax.Array  # the bright ends
    site: jax.Array  # all of it


def on_side(scene: Tree, grid: Grid, finding: Finding) -> jax.Array:
    """Give the draw strength of a finding at each pixel (0 on the healthy side)."""
    right, left = by_side(scene, finding)
    return pick(grid, right, left)


# ---- Lungs -----------------------------------------------------------------------------------------


def lesion(scene: Tree, grid: Grid) -> jax.Array:
    """Draw the chord of a round nodule, 10-30 px across."""
    variant = scene["variant"][Finding.LUNG_LESION]
    # In pixels, as readers measure it.
    radius = (5.0 + 2.0 * variant[0] + 8.0 * scene["severity"][Finding.LUNG_LESION]) * PIXEL
    # At the left base it keeps to the outside: the heart would hide it.
    behind_heart = (scene["zone"][Finding.LUNG_LESION] == LOWER) & (
        scene["side"][Finding.LUNG_LESION] == LEFT
    )
    centre_lateral = (
        0.27 + 0.22 * variant[1] + jnp.where(behind_heart, 0.16 - 0.12 * variant[1], 0.0)
    )
    centre_down = zone_height(grid, scene["zone"][Finding.LUNG_LESION]) + 0.10 * (variant[2] - 0.5)
    lateral, downward = grid.lateral - centre_lateral, grid.downward - centre_down
    squared_offset = (lateral * lateral * (0.9 + 0.3 * variant[3]) + downward * downward) * (
        1 / (radius * radius)
    )
    return chord(squared_offset) * (on_side(scene, grid, Finding.LUNG_LESION) > 0)


def edema(scene: Tree, grid: Grid) -> jax.Array:
    """Draw bat-wing haze around both hila, before fluff."""
    # An ellipse around each hilum, taller than wide.
    lateral, downward = (grid.lateral - 0.27) * 3.2, (grid.downward - 0.02) * 2.1
    return bump(0.42 * (lateral * lateral + downward * downward)) * grid.in_lung


def septal_lines(scene: Tree, grid: Grid) -> jax.Array:
    """Draw Kerley B lines: short horizontal lines at the lateral bases."""
    variant = scene["variant"][Finding.EDEMA]
    # Which line of the row is nearest, and how far it is.
    period = (grid.downward + 0.12 * grid.lateral) * (1 / 0.062) + variant[0]
    offset = (period - jnp.round(period)) * 0.062
    at_bases = (
        ramp(0.17 - grid.depth, 0.02)
        * ramp(grid.depth - 0.015, 0.01)
        * ramp(grid.downward - 0.02, 0.05)
        * grid.in_lung
    )
    return ramp(0.9 * PIXEL - jnp.abs(offset), 0.7 * PIXEL) * at_bases


def consolidation(scene: Tree, grid: Grid) -> jax.Array:
    """Draw a homogeneous lobar opacity, cut off sharply by a fissure."""
    variant, zone = scene["variant"][Finding.CONSOLIDATION], scene["zone"][Finding.CONSOLIDATION]
    amount = strength(scene["severity"][Finding.CONSOLIDATION])
    # The fissure slopes and wanders a little from one picture to the next.
    fissure = (
        zone_height(grid, MID) - 0.10 + 0.10 * (variant[0] - 0.5) + 0.10 * (grid.lateral - 0.35)
    )
    thickness = 0.22 + 0.16 * amount
    one = ramp(0.05, 1.0)  # times 0, it keeps the three branches one dtype
    upper = ramp(fissure - grid.downward, 1.3 * PIXEL) * ramp(
        grid.downward - (fissure - thickness - 0.12), 0.10
    )
    middle = ramp(grid.downward - fissure, 1.3 * PIXEL) * ramp(
        fissure + thickness - 0.22 * (grid.lateral - 0.3) - grid.downward, 0.05
    )
    # The lower lobe ends at an oblique fissure above, not at a height.
    lower_edge = grid.dome - thickness - 0.02 + 0.35 * (grid.lateral - 0.3)
    lower = ramp(grid.downward - lower_edge, 1.3 * PIXEL) + 0.0 * one
    lobe = jnp.where(zone == UPPER, upper, jnp.where(zone == MID, middle, lower))
    return (
        lobe
        * ramp(grid.lateral - 0.12, 0.05)
        * grid.in_lung
        * (on_side(scene, grid, Finding.CONSOLIDATION) > 0)
    )


def pneumonia(scene: Tree, grid: Grid) -> jax.Array:
    """Draw the soft envelope of a cluster of patches; the renderer breaks it up with noise."""
    variant = scene["variant"][Finding.PNEUMONIA]
    centre_lateral = 0.33 + 0.08 * variant[0]
    centre_down = zone_height(grid, scene["zone"][Finding.PNEUMONIA]) + 0.06 * (variant[1] - 0.5)
    radius = 0.22 + 0.12 * scene["severity"][Finding.PNEUMONIA]
    lateral, downward = (grid.lateral - centre_lateral) * 1.15, grid.downward - centre_down
    squared_offset = (lateral * lateral + downward * downward) * (1 / (radius * radius))
    envelope = jnp.sqrt(bump(squared_offset * 0.8)) * grid.in_lung
    return envelope * (on_side(scene, grid, Finding.PNEUMONIA) > 0)


def atelectasis(scene: Tree, grid: Grid, margin: float = 0.0) -> jax.Array:
    """Draw two or three plate-like bands at the base, above any fluid; `margin` widens them."""
    variant, amount = (
        scene["variant"][Finding.ATELECTASIS],
        on_side(scene, grid, Finding.ATELECTASIS),
    )
    # Fluid lifts the bands off the dome.
    floor = jnp.minimum(
        grid.dome,
        jnp.where(
            on_side(scene, grid, Finding.PLEURAL_EFFUSION) > 0,
            grid.dome + 0.08 - 0.42 * on_side(scene, grid, Finding.PLEURAL_EFFUSION) ** 2,
            9.0,
        ),
    )
    tilt = 0.30 * (variant[0] - 0.5) * (grid.lateral - 0.35)
    reach = 0.14 + 0.09 * variant[1]
    bands: jax.Array | float = 0.0
    for number in range(3):
        centre = floor - 0.055 - 0.085 * number - 0.03 * variant[2] + tilt * (1 + 0.5 * number)
        half_width = (1.3 + 0.9 * amount - 0.25 * number) * PIXEL + margin
        half_length = reach + 0.03 * amount + margin
        from_middle = jnp.abs(grid.lateral - 0.38 - 0.06 * ((number * 0.6 + variant[3]) % 1.0))
        length = ramp(half_length - from_middle, 0.04)
        # Only a severe collapse has the third.
        shown = 1.0 if number < 2 else jnp.where(amount > 0.75, 1.0, 0.0)
        band = ramp(half_width - jnp.abs(grid.downward - centre), 1.0 * PIXEL)
        bands = jnp.maximum(bands, band * length * shown)
    return bands * ramp(grid.depth, PIXEL) * (amount > 0)


# ---- Pleura ----------------------------------------------------------------------------------------


def fluid_level(scene: Tree, grid: Grid) -> jax.Array:
    """Give the top of the pleural fluid at each pixel: low medially, climbing along the chest wall (meniscus)."""
    amount = on_side(scene, grid, Finding.PLEURAL_EFFUSION)
    climb = jnp.maximum(1.0 - grid.depth * (1 / 0.30), 0.0)
    level = grid.dome + 0.10 - 0.42 * amount * amount
    # 9 is far below the image: no fluid on this side.
    return jnp.where(amount > 0, level - (0.10 + 0.22 * amount) * climb * climb, 9.0)


def effusion(scene: Tree, grid: Grid) -> jax.Array:
    """Draw pleural fluid, from its level down."""
    below = ramp(grid.downward - fluid_level(scene, grid), 2.0 * PIXEL)
    return below * ramp(grid.depth, PIXEL) * ramp(grid.lateral - 0.09, 0.05)


def pneumothorax(scene: Tree, grid: Grid) -> Pneumothorax:
    """Draw air around a collapsed lung: from the apex, all along the wall, or at the base."""
    variant, zone, amount = (
        scene["variant"][Finding.PNEUMOTHORAX],
        scene["zone"][Finding.PNEUMOTHORAX],
        on_side(scene, grid, Finding.PNEUMOTHORAX),
    )
    thorax = grid.thorax
    height = (grid.downward - thorax.lung_top) / (grid.dome - thorax.lung_top)  # 0 apex, 1 dome
    # How wide the gap is along the wall.
    from_apex = jnp.clip(1.12 - height * (1.35 - 0.45 * amount), 0.0, 1.0)
    shape = jnp.where(
        zone == UPPER,
        from_apex,
        jnp.where(zone == MID, 0.62 - 0.15 * height, jnp.clip(height * 1.5 - 0.5, 0.0, 0.9)),
    )
    # More air, wider gap.
    gap = amount * (0.24 + 0.06 * variant[0]) * shape
    # The apex of the lung drops away from the dome of the chest.
    drop = jnp.where(zone == UPPER, amount * (0.24 + 0.10 * variant[1]), 0.04 * amount)
    from_wall = grid.depth - gap
    under_apex = grid.downward - thorax.lung_top - drop - 1.3 * (grid.lateral - 0.20) ** 2
    # Signed distance from the edge of the lung: negative in the air.
    edge = jnp.minimum(from_wall, under_apex * 0.8)
    air_space = ramp(-edge, PIXEL) * grid.in_lung * (amount > 0)
    line = (
        ramp(1.5 * PIXEL - jnp.abs(edge), 1.0 * PIXEL)
        * grid.in_lung
        * (amount > 0)
        * ramp(gap + drop - 0.02, 0.01)
    )
    return Pneumothorax(air_space, line)


def pleural_other(scene: Tree, grid: Grid) -> Thickening:
    """Draw thickened pleura: a lumpy band along the chest wall, or a cap over the apex."""
    variant, zone, amount = (
        scene["variant"][Finding.PLEURAL_OTHER],
        scene["zone"][Finding.PLEURAL_OTHER],
        on_side(scene, grid, Finding.PLEURAL_OTHER),
    )
    centre = zone_height(grid, zone) - jnp.where(zone == LOWER, 0.14, 0.0)
    # A parabola in place of a cosine, which costs more.
    wave = (grid.downward - centre) * 9.0 + 6.28 * variant[0]
    wave = wave - 6.2832 * jnp.round(wave * (1 / 6.2832))
    lumps = 0.8 + 0.25 * (1.0 - wave * wave * 0.2)
    # Thickness along the wall, and how far it reaches.
    thickness = (0.045 + 0.060 * amount) * lumps
    along = ramp(0.20 + 0.10 * variant[1] - jnp.abs(grid.downward - centre), 0.05)
    wall_band = ramp(thickness - grid.depth, 1.3 * PIXEL) * along
    # The cap follows the dome of the apex.
    cap_edge = grid.thorax.lung_top + 0.10 + 0.09 * amount + 0.6 * (grid.lateral - 0.27) ** 2
    cap = ramp(cap_edge - grid.downward, 1.3 * PIXEL)
    band = jnp.where(
        zone == UPPER, jnp.maximum(cap, wall_band * ramp(-0.25 - grid.downward, 0.05)), wall_band
    )
    band = band * ramp(grid.depth, PIXEL) * ramp(grid.above_diaphragm, PIXEL) * (amount > 0)
    plaque = (
        band
        * ramp(grid.depth - 0.012, 0.006)
        * ramp(0.7 * thickness - grid.depth, 0.008)
        * jnp.where(zone == UPPER, 0.3, 1.0)
    )
    return Thickening(band, plaque)


# ---- Bones -----------------------------------------------------------------------------------------


def fracture_site(scene: Tree, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Give the place (lateral, downward) of the break, scalars: on the posterior rib nearest to the zone."""
    variant, thorax = scene["variant"][Finding.FRACTURE], grid.thorax
    lateral = 0.36 + 0.12 * variant[0]
    # The height of the zone, moved to the nearest rib.
    share = jnp.array([0.24, 0.48, 0.72])[scene["zone"][Finding.FRACTURE]]
    dome = jnp.where(scene["side"][Finding.FRACTURE] == LEFT, thorax.dome_left, thorax.dome_right)
    downward = thorax.lung_top + (dome - thorax.lung_top) * share
    rib = jnp.round((downward - rib_curve(grid, lateral)) / thorax.rib_pitch - thorax.rib_phase)
    return lateral, rib_curve(grid, lateral) + (rib + thorax.rib_phase) * thorax.rib_pitch


def fracture(scene: Tree, grid: Grid) -> Fracture:
    """Draw a broken rib: displaced at the break, with a dark cleft between bright ends."""
    amount = on_side(scene, grid, Finding.FRACTURE)
    break_lateral, break_down = fracture_site(scene, grid)
    lateral = grid.lateral - break_lateral
    # Height above the rib's own course.
    downward = (
        grid.downward
        - break_down
        - (rib_curve(grid, grid.lateral) - rib_curve(grid, break_lateral))
    )
    near = (
        ramp(0.080 - jnp.abs(downward), 0.02) * ramp(0.17 - jnp.abs(lateral), 0.03) * (amount > 0)
    )
    direction = jnp.where(scene["variant"][Finding.FRACTURE][1] < 0.5, 1.0, -1.0)
    # The outer end moves more, and comes back to the rib's course away from the break.
    shift = direction * amount * near * jnp.where(lateral > 0, 0.050 - 0.10 * lateral, -0.024)
    from_break = lateral + 0.35 * downward  # it runs obliquely
    gap = ramp(1.9 * PIXEL - jnp.abs(from_break), 1.0 * PIXEL) * near
    ends = ramp(7.0 * PIXEL - jnp.abs(from_break), 3.0 * PIXEL) * near
    return Fracture(shift, gap, ends, near)


# ---- Devices ---------------------------------------------------------------------------------------


def _line(offset: jax.Array, half_width: float, margin: float) -> jax.Array:
    return ramp(half_width + margin - jnp.abs(offset), PIXEL)


def _endotracheal_tube(variant: jax.Array, grid: Grid, margin: float) -> jax.Array:
    """A tube with a paler bore, from above the image to a tip over the carina."""
    tip = -0.40 + 0.08 * variant[0]
    axis = grid.from_midline - 0.010 - 0.06 * (grid.downward + 0.6)
    # Bright walls around a dark bore; region maps, which have a margin, see a solid.
    wall = _line(axis, 1.9 * PIXEL, margin) - 0.45 * _line(axis, 0.3 * PIXEL, -0.2 * PIXEL) * (
        margin == 0
    )
    return wall * ramp(tip - grid.downward + margin, PIXEL)


def _central_line(variant: jax.Array, grid: Grid, margin: float) -> jax.Array:
    """A thin catheter from under a clavicle to the right heart, more often from the patient's right."""
    downward = grid.downward
    side = jnp.where(variant[1] < 0.7, -1.0, 1.0)
    fall = jnp.clip((-0.18 - downward) * (1 / 0.62), 0.0, 1.3)
    start = jnp.where(side < 0, 0.20, 0.36) * side
    path = -0.085 + start * fall * fall
    # Of the curve: an offset across it, not along the row, keeps the width even.
    slope = 1.0 / jnp.sqrt(1.0 + (2 * start * fall / 0.62) ** 2)
    return (
        _line((grid.from_midline - path) * slope, 1.3 * PIXEL, margin)
        * ramp(0.02 + 0.10 * variant[2] - downward + margin, PIXEL)
        * ramp(downward + 0.93 + margin, PIXEL)
    )


def _pacemaker(variant: jax.Array, grid: Grid, margin: float) -> jax.Array:
    """A generator under a clavicle and its lead, through the vein to the tip of the right ventricle."""
    midline, downward = grid.from_midline, grid.downward
    box_lateral, box_down = 0.50 + 0.05 * variant[2], -0.50 + 0.06 * (variant[3] - 0.5)
    outward = jnp.where(variant[0] < 0.8, grid.across, -grid.across)  # on the left in four of five
    box_x, box_y = (outward - box_lateral) * (1 / 0.115), (downward - box_down) * (1 / 0.095)
    generator = ramp(1.0 - (box_x**4 + box_y**4), 0.12)

    # The lead, in three parts: through the vein to the midline ..
    fraction = jnp.clip((outward + 0.05) * (1 / (box_lateral - 0.03)), 0.0, 1.0)
    course = box_down + 0.03 - 0.28 * fraction * (1.0 - fraction) + 0.10 * (1.0 - fraction)
    in_vein = _line(downward - course, 1.3 * PIXEL, margin)
    in_vein *= ramp(box_lateral - outward + margin, 0.02) * ramp(outward + 0.06 + margin, PIXEL)

    # .. down through the vena cava and the right atrium ..
    along_lead = jnp.clip((downward + 0.36) * (1 / 0.62), 0.0, 1.0)
    in_heart = (
        _line(midline + 0.06 + 0.055 * (4 * along_lead * (1 - along_lead)), 1.3 * PIXEL, margin)
        * ramp(downward + 0.41 + margin, PIXEL)
        * ramp(0.24 - downward + margin, PIXEL)
    )
    # .. and to the left, to a bright tip at the apex of the right ventricle.
    at_apex = _line(
        downward - 0.235 - 0.55 * (midline + 0.06) + 0.5 * (midline + 0.06) * (midline - 0.2),
        1.3 * PIXEL,
        margin,
    )
    at_apex *= ramp(midline + 0.07 + margin, PIXEL) * ramp(0.22 - midline + margin, PIXEL)
    tip = bump(((midline - 0.22) ** 2 + (downward - 0.39) ** 2) * (1 / 0.0012))
    return jnp.maximum(
        jnp.maximum(1.6 * generator, tip), jnp.maximum(in_vein, jnp.maximum(in_heart, at_apex))
    )


def _nasogastric_tube(variant: jax.Array, grid: Grid, margin: float) -> jax.Array:
    """A thin tube down the midline, turning into the stomach."""
    bend = jnp.maximum(grid.downward - 0.30, 0.0)
    course = 0.028 + 1.5 * bend * bend
    offset = (grid.from_midline - course) / jnp.sqrt(1.0 + 9.0 * bend * bend)
    return _line(offset, 1.2 * PIXEL, margin) * ramp(
        0.68 + 0.06 * variant[3] - grid.downward + margin, PIXEL
    )


def _sternal_wires(variant: jax.Array, grid: Grid, margin: float) -> jax.Array:
    """A row of wire loops along the sternum."""
    period = (grid.downward + 0.05 * variant[2]) * (1 / 0.125)
    offset = (period - jnp.round(period)) * 0.125
    loop = (grid.from_midline * (1 / 0.046)) ** 2 + (offset * (1 / 0.026)) ** 2
    return (
        ramp(0.55 + 25 * margin - jnp.abs(loop - 1.0), 0.30)
        * ramp(0.38 - grid.downward, 0.01)
        * ramp(grid.downward + 0.42, 0.01)
    )


def devices(scene: Tree, grid: Grid, margin: float = 0.0) -> list[jax.Array]:
    """Draw five maps in the order of DEVICES; `margin` widens them (for the region maps)."""
    variant, present = scene["variant"][Finding.SUPPORT_DEVICES], scene["device"]
    drawings = {
        Device.ENDOTRACHEAL_TUBE: _endotracheal_tube(variant, grid, margin),
        Device.CENTRAL_LINE: _central_line(variant, grid, margin),
        Device.PACEMAKER: _pacemaker(variant, grid, margin),
        Device.NASOGASTRIC_TUBE: _nasogastric_tube(variant, grid, margin),
        Device.STERNAL_WIRES: _sternal_wires(variant, grid, margin),
    }
    return [drawing * present[device] for device, drawing in drawings.items()]


# ---- Region maps -----------------------------------------------------------------------------------


def region_masks(scene: Tree, count: int = CELLS * 7) -> jax.Array:
    """Draw soft masks of the regions, float32 [12, count, count]; line-like findings get a margin of about 4 px."""
    grid = chest(scene, count)
    margin = 4 * PIXEL
    air_space, line = pneumothorax(scene, grid)
    has_edema = on_side(scene, grid, Finding.EDEMA) > 0
    break_site = fracture(scene, grid).site
    upper = ramp(0.10 - grid.downward, 0.05)
    # What a risen hemidiaphragm has taken from the lung.
    risen = (
        (grid.above_diaphragm < 0)
        & (grid.above_diaphragm > -RISE * on_side(scene, grid, Finding.ATELECTASIS))
        & (grid.depth > 0)
    )
    masks = {
        Finding.ENLARGED_CARDIOMEDIASTINUM: (mediastinum(scene, grid) > 0.05) * upper,
        Finding.CARDIOMEGALY: (heart(scene, grid) > 0.0) * ramp(grid.above_diaphragm + 0.08, 0.05),
        Finding.LUNG_LESION: (lesion(scene, grid) > 0.0) * 1.0,
        Finding.EDEMA: jnp.maximum(ramp(edema(scene, grid) - 0.2, 0.1), septal_lines(scene, grid))
        * has_edema,
        Finding.CONSOLIDATION: consolidation(scene, grid),
        Finding.PNEUMONIA: ramp(pneumonia(scene, grid) - 0.3, 0.1),
        Finding.ATELECTASIS: jnp.maximum(atelectasis(scene, grid, margin), risen),
        Finding.PNEUMOTHORAX: jnp.maximum(air_space, line),
        Finding.PLEURAL_EFFUSION: effusion(scene, grid) * (grid.above_diaphragm > -0.25),
        Finding.PLEURAL_OTHER: pleural_other(scene, grid).band,
        Finding.FRACTURE: break_site,
        Finding.SUPPORT_DEVICES: jnp.minimum(
            jnp.max(jnp.stack(devices(scene, grid, margin)), 0), 1.0
        ),
    }
    return jnp.stack(
        [masks[finding] * jnp.ones((count, count), jnp.float32) for finding in Finding]
    )


@jax.jit
def region_maps(scene: Tree) -> jax.Array:
    """Give the coverage of each cell by each finding of one scene, float32 [12, 8, 8].

    Half covered counts as 1, and so does the fullest cell.
    """
    return cover(region_masks(scene))


def cover(masks: jax.Array) -> jax.Array:
    """Give the coverage of each cell by masks [F, n, n], float32 [F, 8, 8], see `region_maps`."""
    side = masks.shape[-1] // CELLS
    # The mean of each cell's pixels.
    coverage = masks.reshape(masks.shape[0], CELLS, side, CELLS, side).mean((2, 4))
    # A small thing that straddles cells, or a thin tube, still has one cell that is wholly "here".
    fullest = coverage.max((1, 2), keepdims=True)
    return jnp.minimum(coverage / jnp.clip(fullest, 1e-3, 0.5), 1.0)
