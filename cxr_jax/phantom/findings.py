"""Where each finding is drawn: masks over the grid, shared by the renderer and by the region maps."""

import jax.numpy as jnp

from cxr_jax.phantom.constants import (
    ATEL,
    BOTH,
    CARD,
    CELLS,
    CONS,
    CVC,
    DEV,
    EDEMA,
    EFF,
    ETT,
    FRAC,
    LEFT,
    LESION,
    MED,
    NGT,
    PACER,
    PLEU,
    PNEU,
    PTX,
    WIRES,
)
from cxr_jax.phantom.geometry import (
    PX,
    RISE,
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


def on_side(scene, g, i):
    """Draw strength of finding i at each pixel (0 on the healthy side)."""
    right, left = by_side(scene, i)
    return pick(g, right, left)


def lesion(scene, g):
    """Chord of a round nodule, 10-30 px across."""
    w = scene["variant"][LESION]
    r = (5.0 + 2.0 * w[0] + 8.0 * scene["severity"][LESION]) * PX
    behind = (scene["zone"][LESION] == 2) & (scene["side"][LESION] == LEFT)
    cx = 0.27 + 0.22 * w[1] + jnp.where(behind, 0.16 - 0.12 * w[1], 0.0)  # not behind the heart
    cv = zone_height(g, scene["zone"][LESION]) + 0.10 * (w[2] - 0.5)
    dx, dv = g.x - cx, g.v - cv
    d2 = (dx * dx * (0.9 + 0.3 * w[3]) + dv * dv) * (1 / (r * r))
    return chord(d2) * (on_side(scene, g, LESION) > 0)


def edema(scene, g):
    """Bat-wing haze around both hila, before fluff."""
    dx, dv = (g.x - 0.27) * 3.2, (g.v - 0.02) * 2.1
    return bump(0.42 * (dx * dx + dv * dv)) * g.in_lung


def septal_lines(scene, g):
    """Kerley B lines: short horizontal lines at the lateral bases."""
    w = scene["variant"][EDEMA]
    q = (g.v + 0.12 * g.x) * (1 / 0.062) + w[0]
    d = (q - jnp.round(q)) * 0.062
    where = ramp(0.17 - g.e, 0.02) * ramp(g.e - 0.015, 0.01) * ramp(g.v - 0.02, 0.05) * g.in_lung
    return ramp(0.9 * PX - jnp.abs(d), 0.7 * PX) * where


def consolidation(scene, g):
    """Homogeneous lobar opacity, cut off sharply by a fissure."""
    w, zone = scene["variant"][CONS], scene["zone"][CONS]
    s = strength(scene["severity"][CONS])
    fissure = zone_height(g, 1) - 0.10 + 0.10 * (w[0] - 0.5) + 0.10 * (g.x - 0.35)
    deep = 0.22 + 0.16 * s
    far = ramp(0.05, 1.0)  # keeps the three branches one dtype
    up = ramp(fissure - g.v, 1.3 * PX) * ramp(g.v - (fissure - deep - 0.12), 0.10)
    mid = ramp(g.v - fissure, 1.3 * PX) * ramp(fissure + deep - 0.22 * (g.x - 0.3) - g.v, 0.05)
    low = ramp(g.v - (g.dome - deep - 0.02 + 0.35 * (g.x - 0.3)), 1.3 * PX) + 0.0 * far
    mask = jnp.where(zone == 0, up, jnp.where(zone == 1, mid, low))
    return mask * ramp(g.x - 0.12, 0.05) * g.in_lung * (on_side(scene, g, CONS) > 0)


def pneumonia(scene, g):
    """Soft envelope of a cluster of patches; the renderer breaks it up with noise."""
    w = scene["variant"][PNEU]
    cx, cv = 0.33 + 0.08 * w[0], zone_height(g, scene["zone"][PNEU]) + 0.06 * (w[1] - 0.5)
    size = 0.22 + 0.12 * scene["severity"][PNEU]
    dx, dv = (g.x - cx) * 1.15, g.v - cv
    d2 = (dx * dx + dv * dv) * (1 / (size * size))
    return jnp.sqrt(bump(d2 * 0.8)) * g.in_lung * (on_side(scene, g, PNEU) > 0)


def fluid_level(scene, g):
    """Top of the pleural fluid at each pixel: low medially, climbing along the chest wall (meniscus)."""
    s = on_side(scene, g, EFF)
    climb = jnp.maximum(1.0 - g.e * (1 / 0.30), 0.0)
    level = g.dome + 0.10 - 0.42 * s * s
    return jnp.where(s > 0, level - (0.10 + 0.22 * s) * climb * climb, 9.0)


def effusion(scene, g):
    return ramp(g.v - fluid_level(scene, g), 2.0 * PX) * ramp(g.e, PX) * ramp(g.x - 0.09, 0.05)


def atelectasis(scene, g, margin=0.0):
    """Two or three plate-like bands at the base, above any fluid."""
    w, s = scene["variant"][ATEL], on_side(scene, g, ATEL)
    floor = jnp.minimum(
        g.dome,
        jnp.where(
            on_side(scene, g, EFF) > 0, g.dome + 0.08 - 0.42 * on_side(scene, g, EFF) ** 2, 9.0
        ),
    )
    tilt = 0.30 * (w[0] - 0.5) * (g.x - 0.35)
    reach = 0.14 + 0.09 * w[1]
    out = 0.0
    for k in range(3):
        centre = floor - 0.055 - 0.085 * k - 0.03 * w[2] + tilt * (1 + 0.5 * k)
        half = (1.3 + 0.9 * s - 0.25 * k) * PX + margin
        length = ramp(
            reach + 0.03 * s + margin - jnp.abs(g.x - 0.38 - 0.06 * ((k * 0.6 + w[3]) % 1.0)), 0.04
        )
        on = 1.0 if k < 2 else jnp.where(s > 0.75, 1.0, 0.0)
        out = jnp.maximum(out, ramp(half - jnp.abs(g.v - centre), 1.0 * PX) * length * on)
    return out * ramp(g.e, PX) * (s > 0)


def pneumothorax(scene, g):
    """(air, line): the space without markings, and the pleural line of the collapsed lung."""
    w, zone, s = scene["variant"][PTX], scene["zone"][PTX], on_side(scene, g, PTX)
    height = (g.v - g.p.top) / (g.dome - g.p.top)  # 0 apex, 1 dome
    # how wide the gap is along the wall: from the apex, all along, or at the base
    down = jnp.clip(1.12 - height * (1.35 - 0.45 * s), 0.0, 1.0)
    shape = jnp.where(
        zone == 0,
        down,
        jnp.where(zone == 1, 0.62 - 0.15 * height, jnp.clip(height * 1.5 - 0.5, 0.0, 0.9)),
    )
    gap = s * (0.24 + 0.06 * w[0]) * shape
    # the apex of the lung drops away from the dome of the chest
    drop = jnp.where(zone == 0, s * (0.24 + 0.10 * w[1]), 0.04 * s)
    d = jnp.minimum(g.e - gap, (g.v - g.p.top - drop - 1.3 * (g.x - 0.20) ** 2) * 0.8)
    air = ramp(-d, PX) * g.in_lung * (s > 0)
    line = (
        ramp(1.5 * PX - jnp.abs(d), 1.0 * PX) * g.in_lung * (s > 0) * ramp(gap + drop - 0.02, 0.01)
    )
    return air, line


def pleural_other(scene, g):
    """Thickened pleura: a lumpy band along the chest wall, or a cap over the apex. Returns (band, plaque)."""
    w, zone, s = scene["variant"][PLEU], scene["zone"][PLEU], on_side(scene, g, PLEU)
    centre = zone_height(g, zone) - jnp.where(zone == 2, 0.14, 0.0)
    wave = (g.v - centre) * 9.0 + 6.28 * w[0]
    wave = wave - 6.2832 * jnp.round(wave * (1 / 6.2832))
    lumps = 0.8 + 0.25 * (1.0 - wave * wave * 0.2)
    thick = (0.045 + 0.060 * s) * lumps
    along = ramp(0.20 + 0.10 * w[1] - jnp.abs(g.v - centre), 0.05)
    wall_band = ramp(thick - g.e, 1.3 * PX) * along
    cap = ramp(g.p.top + 0.10 + 0.09 * s + 0.6 * (g.x - 0.27) ** 2 - g.v, 1.3 * PX)
    band = jnp.where(zone == 0, jnp.maximum(cap, wall_band * ramp(-0.25 - g.v, 0.05)), wall_band)
    band = band * ramp(g.e, PX) * ramp(g.above, PX) * (s > 0)
    plaque = (
        band
        * ramp(g.e - 0.012, 0.006)
        * ramp(0.7 * thick - g.e, 0.008)
        * jnp.where(zone == 0, 0.3, 1.0)
    )
    return band, plaque


def fracture_site(scene, g):
    """(x, v) scalars of the break: on the posterior rib nearest to the zone, on the right or left."""
    w, p = scene["variant"][FRAC], g.p
    x = 0.36 + 0.12 * w[0]
    share = jnp.array([0.24, 0.48, 0.72])[scene["zone"][FRAC]]
    dome = jnp.where(scene["side"][FRAC] == LEFT, p.dome_l, p.dome_r)
    v = p.top + (dome - p.top) * share
    n = jnp.round((v - rib_curve(g, x)) / p.pitch - p.phase)
    return x, rib_curve(g, x) + (n + p.phase) * p.pitch


def fracture(scene, g):
    """(shift, gap, ends, near): rib displacement at the break, dark cleft, bright ends, the whole site."""
    s = on_side(scene, g, FRAC)
    x0, v0 = fracture_site(scene, g)
    dx = g.x - x0
    dv = g.v - v0 - (rib_curve(g, g.x) - rib_curve(g, x0))
    near = ramp(0.080 - jnp.abs(dv), 0.02) * ramp(0.17 - jnp.abs(dx), 0.03) * (s > 0)
    up = jnp.where(scene["variant"][FRAC][1] < 0.5, 1.0, -1.0)
    shift = up * s * near * jnp.where(dx > 0, 0.050 - 0.10 * dx, -0.024)
    cut = dx + 0.35 * dv
    gap = ramp(1.9 * PX - jnp.abs(cut), 1.0 * PX) * near
    ends = ramp(7.0 * PX - jnp.abs(cut), 3.0 * PX) * near
    return shift, gap, ends, near


def _line(d, half, margin):
    return ramp(half + margin - jnp.abs(d), PX)


def devices(scene, g, margin=0.0):
    """Five maps in the order of DEVICES; margin widens them (for the region maps)."""
    w, on, um, v = scene["variant"][DEV], scene["device"], g.um, g.v
    soft = lambda d, width: ramp(d + margin, width)

    tip = -0.40 + 0.08 * w[0]
    bore = um - 0.010 - 0.06 * (v + 0.6)
    wall = _line(bore, 1.9 * PX, margin) - 0.45 * _line(bore, 0.3 * PX, -0.2 * PX) * (margin == 0)
    ett = wall * soft(tip - v, PX)

    side = jnp.where(w[1] < 0.7, -1.0, 1.0)  # line enters from the patient's right more often
    fall = jnp.clip((-0.18 - v) * (1 / 0.62), 0.0, 1.3)
    start = jnp.where(side < 0, 0.20, 0.36) * side
    path = -0.085 + start * fall * fall
    slope = 1.0 / jnp.sqrt(1.0 + (2 * start * fall / 0.62) ** 2)
    cvc = (
        _line((um - path) * slope, 1.3 * PX, margin)
        * soft(0.02 + 0.10 * w[2] - v, PX)
        * soft(v + 0.93, PX)
    )

    box_u, box_v = 0.50 + 0.05 * w[2], -0.50 + 0.06 * (w[3] - 0.5)
    out = jnp.where(w[0] < 0.8, g.u, -g.u)  # generator on the left in four of five
    bu, bv = (out - box_u) * (1 / 0.115), (v - box_v) * (1 / 0.095)
    box = ramp(1.0 - (bu**4 + bv**4), 0.12)
    t = jnp.clip((out + 0.05) * (1 / (box_u - 0.03)), 0.0, 1.0)
    vein = _line(v - (box_v + 0.03 - 0.28 * t * (1.0 - t) + 0.10 * (1.0 - t)), 1.3 * PX, margin)
    vein *= soft(box_u - out, 0.02) * soft(out + 0.06, PX)
    turn = jnp.clip((v + 0.36) * (1 / 0.62), 0.0, 1.0)
    lead = (
        _line(um + 0.06 + 0.055 * (4 * turn * (1 - turn)), 1.3 * PX, margin)
        * soft(v + 0.41, PX)
        * soft(0.24 - v, PX)
    )
    last = _line(v - 0.235 - 0.55 * (um + 0.06) + 0.5 * (um + 0.06) * (um - 0.2), 1.3 * PX, margin)
    last *= soft(um + 0.07, PX) * soft(0.22 - um, PX)
    tip2 = bump(((um - 0.22) ** 2 + (v - 0.39) ** 2) * (1 / 0.0012))
    pacer = jnp.maximum(jnp.maximum(1.6 * box, tip2), jnp.maximum(vein, jnp.maximum(lead, last)))

    bend = jnp.maximum(v - 0.30, 0.0)
    course = 0.028 + 1.5 * bend * bend
    ngt = _line((um - course) / jnp.sqrt(1.0 + 9.0 * bend * bend), 1.2 * PX, margin) * soft(
        0.68 + 0.06 * w[3] - v, PX
    )

    q = (v + 0.05 * w[2]) * (1 / 0.125)
    d = (q - jnp.round(q)) * 0.125
    loop = (um * (1 / 0.046)) ** 2 + (d * (1 / 0.026)) ** 2
    wires = (
        ramp(0.55 + 25 * margin - jnp.abs(loop - 1.0), 0.30)
        * ramp(0.38 - v, 0.01)
        * ramp(v + 0.42, 0.01)
    )
    return [
        m * on[i]
        for i, m in zip((ETT, CVC, PACER, NGT, WIRES), (ett, cvc, pacer, ngt, wires), strict=True)
    ]


def region_masks(scene, n=CELLS * 7):
    """float32 [12, n, n] soft masks of the drawn regions; line-like findings get a margin of about 4 px."""
    g = chest(scene, n)
    margin = 4 * PX
    air, line = pneumothorax(scene, g)
    s = on_side(scene, g, EDEMA) > 0
    near = fracture(scene, g)[3]
    upper = ramp(0.10 - g.v, 0.05)
    risen = (g.above < 0) & (g.above > -RISE * on_side(scene, g, ATEL)) & (g.e > 0)
    masks = {
        MED: (mediastinum(scene, g) > 0.05) * upper,
        CARD: (heart(scene, g) > 0.0) * ramp(g.above + 0.08, 0.05),
        LESION: (lesion(scene, g) > 0.0) * 1.0,
        EDEMA: jnp.maximum(ramp(edema(scene, g) - 0.2, 0.1), septal_lines(scene, g)) * s,
        CONS: consolidation(scene, g),
        PNEU: ramp(pneumonia(scene, g) - 0.3, 0.1),
        ATEL: jnp.maximum(atelectasis(scene, g, margin), risen),
        PTX: jnp.maximum(air, line),
        EFF: effusion(scene, g) * (g.above > -0.25),
        PLEU: pleural_other(scene, g)[0],
        FRAC: near,
        DEV: jnp.minimum(jnp.max(jnp.stack(devices(scene, g, margin)), 0), 1.0),
    }
    return jnp.stack([masks[i] * jnp.ones((n, n), jnp.float32) for i in range(len(masks))])


def region_maps(scene):
    """float32 [12,8,8] of one scene: coverage of each cell; half covered counts as 1, and so does the fullest cell."""
    m = region_masks(scene)
    n = m.shape[-1] // CELLS
    cover = m.reshape(m.shape[0], CELLS, n, CELLS, n).mean((2, 4))
    # a small thing that straddles cells, or a thin tube, still has one cell that is wholly "here"
    fullest = cover.max((1, 2), keepdims=True)
    return jnp.minimum(cover / jnp.clip(fullest, 1e-3, 0.5), 1.0)


__all__ = ["BOTH", "region_maps", "region_masks"]
