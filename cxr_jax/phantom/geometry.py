"""The normal chest as analytic functions over a pixel grid: frame, lungs, diaphragm, heart, ribs.

Body units: half the image is 1; u grows to the image's right (the patient's left), v grows downwards. Both
lungs are evaluated at once: x is the distance from the spine, `left` says which side a pixel is on.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from cxr_jax.phantom.constants import (
    ACQ_AP,
    ACQ_LOW_INSPIRATION,
    ACQ_MAGNIFICATION,
    ACQ_ROTATION,
    ACQ_SHIFT_X,
    ACQ_SHIFT_Y,
    ANAT_AORTA,
    ANAT_APEX,
    ANAT_DIAPHRAGM_L,
    ANAT_DIAPHRAGM_R,
    ANAT_HEART,
    ANAT_HEART_TILT,
    ANAT_MEDIASTINUM,
    ANAT_RIB_PHASE,
    ANAT_RIB_SLOPE,
    ANAT_RIB_SPACING,
    ANAT_WIDTH,
    ATEL,
    BOTH,
    CARD,
    LEFT,
    MED,
    POSITIVE_AT,
    SIZE,
)

PX = 2.0 / SIZE  # one pixel in body units
RISE = 0.13  # how far full atelectasis lifts its hemidiaphragm


def ramp(d, w):
    """Smooth step of a signed distance: 0 at d <= -w, 1 at d >= w."""
    t = jnp.clip(d * (0.5 / w) + 0.5, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def chord(d2):
    """Chord length of a unit ball or cylinder at squared offset d2 (1 in the middle, 0 outside)."""
    return jnp.sqrt(jnp.maximum(0.0, 1.0 - d2))


def bump(d2):
    """Soft compact blob: 1 in the middle, 0 from d2 = 1 on."""
    t = jnp.maximum(0.0, 1.0 - d2)
    return t * t


def strength(severity):
    """How strongly a finding is drawn: faint up to 0.3 for subtle ones, 0.6..1 for positive ones."""
    clear = 0.6 + 0.4 * (severity - POSITIVE_AT) / (1.0 - POSITIVE_AT)
    return jnp.where(severity >= POSITIVE_AT, clear, severity)


def by_side(scene, i):
    """(right, left) draw strength of finding i, 0 on a side it is not on."""
    s, side = strength(scene["severity"][i]), scene["side"][i]
    return jnp.where(side == LEFT, 0.0, s), jnp.where((side == LEFT) | (side == BOTH), s, 0.0)


def cardiothoracic_ratio(scene) -> jax.Array:
    """Heart width / inner chest width of one scene: under 0.5 if normal, 0.5 + 0.2 severity in cardiomegaly.

    An AP film shows the heart 4 % larger, a nuisance that stays below 0.5 for a normal heart.
    """
    s = scene["severity"][CARD]
    normal = 0.425 + 0.04 * scene["anatomy"][ANAT_HEART]
    return jnp.where(s > 0, 0.5 + 0.2 * s, normal) * (1.0 + 0.04 * scene["acq"][ACQ_AP])


def thorax_shape(scene):
    """Scalars of the normal anatomy of one scene that several drawings share."""
    a, q = scene["anatomy"], scene["acq"]
    low = 0.15 * q[ACQ_LOW_INSPIRATION]
    up_r, up_l = by_side(scene, ATEL)
    p = SimpleNamespace()
    p.width = 0.725 + 0.03 * a[ANAT_WIDTH]
    p.top = -0.80 + 0.03 * a[ANAT_APEX]
    rest_r = 0.42 + 0.04 * a[ANAT_DIAPHRAGM_R] - low
    rest_l = 0.48 + 0.04 * a[ANAT_DIAPHRAGM_L] - low
    p.rest = jnp.minimum(
        rest_r, rest_l
    )  # where the heart lies; lost lung volume lifts the dome beside it
    p.dome_r, p.dome_l = rest_r - RISE * up_r, rest_l - RISE * up_l
    p.turn = 0.011 * q[ACQ_ROTATION]  # a turned chest moves heart and trachea off the spine
    p.pitch = 0.150 + 0.012 * a[ANAT_RIB_SPACING]
    p.phase = 0.5 * a[ANAT_RIB_PHASE]
    p.slope = 0.16 + 0.07 * a[ANAT_RIB_SLOPE]
    return p


def pick(g, right, left):
    """The value that belongs to the side each pixel is on."""
    return jnp.where(g.left, left, right)


def zone_height(g, zone):
    """Height v of the middle of a lung zone (0 upper, 1 mid, 2 lower), for each pixel's own side."""
    share = jnp.array([0.26, 0.53, 0.80])[zone]
    return g.p.top + (g.dome - g.p.top) * share


def chest(scene, n=SIZE):
    """Fields of the normal chest on an n x n grid covering the image (units: module docstring)."""
    q, p = scene["acq"], thorax_shape(scene)
    grid = (jnp.arange(n, dtype=jnp.float32) + 0.5) * (2.0 / n) - 1.0
    col, row = (grid - q[ACQ_SHIFT_X])[None, :], (grid - q[ACQ_SHIFT_Y])[:, None]
    angle = q[ACQ_ROTATION] * (jnp.pi / 180.0)
    cos, sin = jnp.cos(angle) / q[ACQ_MAGNIFICATION], jnp.sin(angle) / q[ACQ_MAGNIFICATION]
    g = SimpleNamespace(p=p)
    g.u, g.v = cos * col + sin * row, cos * row - sin * col
    g.left, g.x = g.u > 0.0, jnp.abs(g.u)
    g.um = g.u - p.turn  # from the midline of heart and mediastinum
    g.dome = pick(g, p.dome_r, p.dome_l)

    # lateral wall: a quarter ellipse from the apex down to full width, then straight
    t = jnp.clip((g.v - p.top) * (1 / 0.98), 0.0, 1.0)
    g.wall = 0.25 + (p.width - 0.25) * jnp.sqrt(t * (2.0 - t))
    m = jnp.clip((g.v - p.top) * 4.0, 0.0, 1.0)
    inner = 0.25 - 0.22 * jnp.sqrt(m * (2.0 - m))
    g.e = g.wall - g.x  # depth inside the chest wall, negative outside
    inside = jnp.minimum(g.e, (g.x - inner))
    # diaphragm: a dome that falls steeply into the lateral costophrenic angle
    off = g.x - 0.32
    fall = jnp.where(off > 0, 0.75, 0.35)
    g.dia = g.dome + fall * off * off + 3.0 * jnp.maximum(off - 0.22, 0.0) ** 2
    g.above = g.dia - g.v  # height above the diaphragm
    # lung depth along the ray: a solid rounded at its sides
    edge = jnp.clip(inside * (1 / 0.22), 0.0, 1.0)
    g.lung = (
        jnp.sqrt(edge * (2.0 - edge))
        * ramp(g.above, 0.9 * PX)
        * (0.88 + 0.12 * ramp(g.above - 0.1, 0.12))
    )
    g.in_lung = ramp(inside, PX) * ramp(g.above, PX)
    return g


def heart(scene, g):
    """Heart depth along the ray in 0..1; its horizontal extent is exactly CTR times the inner chest width."""
    a = scene["anatomy"]
    half = cardiothoracic_ratio(scene) * g.p.width
    tilt = 0.30 + 0.08 * a[ANAT_HEART_TILT]
    tall = 0.30 + 0.22 * (half - 0.30)
    across = jnp.sqrt(half * half - (tilt * tall) ** 2)
    centre_v = g.p.rest - 0.20
    du, dv = g.um - 0.34 * half, g.v - centre_v
    # sheared ellipse: its widest points are at du = +-half
    d2 = ((du - tilt * dv) / across) ** 2 + (dv / tall) ** 2
    return chord(d2 * d2)


def mediastinum(scene, g):
    """Depth in 0..1 of the vascular pedicle with the aortic knob, widened by Enlarged Cardiomediastinum."""
    a = scene["anatomy"]
    s = scene["severity"][MED]
    more = jnp.where(s > 0, 0.19 * strength(s), 0.0)
    flare = jnp.clip(g.v + 0.62, 0.0, 0.62)
    more = more * (1.0 + 0.5 * flare) * ramp(0.05 - g.v, 0.25)
    half = (
        0.115 + 0.012 * a[ANAT_MEDIASTINUM] + 0.22 * flare * flare * ramp(0.22 - g.v, 0.10) + more
    )
    waist = ramp(0.60 - g.v, 0.10) * ramp(g.v + 0.98, 0.06)
    band = jnp.clip((half - jnp.abs(g.um)) * (1 / 0.05), 0.0, 1.0)
    column = jnp.sqrt(band * (2.0 - band)) * waist
    r = 0.085 + 0.012 * a[ANAT_AORTA]
    knob = chord(((g.um - 0.085 - more) ** 2 + (g.v + 0.27) ** 2) * (1 / (r * r)))
    return jnp.maximum(column, 0.9 * knob)


def rib_curve(g, x):
    """How far a posterior rib has dropped at distance x from the spine (body units)."""
    t = x - 0.20
    return g.p.slope * t + 0.85 * t * t - 0.3 * jnp.maximum(0.24 - x, 0.0)


def tube_profile(d, half):
    """A hollow bone seen from the side: bright cortex, paler marrow. d is the offset from its axis."""
    r2 = (d * (1.0 / half)) ** 2
    return 1.25 * chord(r2) - 0.75 * chord(r2 * 1.55)


def posterior_ribs(g, v, x):
    """Attenuation 0..~1 of the posterior ribs; v may already be displaced by a fracture."""
    q = (v - rib_curve(g, x)) * (1.0 / g.p.pitch) - g.p.phase
    d = (q - jnp.round(q)) * g.p.pitch
    reach = (
        ramp(x - 0.07, 0.03)
        * ramp(g.wall + 0.025 - x, 0.012)
        * ramp(g.v + 0.84, 0.05)
        * ramp(0.66 - g.v, 0.1)
    )
    return tube_profile(d, 0.034) * reach


def anterior_ribs(g):
    """Attenuation of the anterior ribs: wider, fainter, falling to the midline and ending in cartilage."""
    t = g.p.width - g.x
    q = (g.v - 0.62 * t - 0.15 * t * t) * (1.0 / (g.p.pitch * 1.12)) - g.p.phase * 0.7
    d = (q - jnp.round(q)) * (g.p.pitch * 1.12)
    reach = (
        ramp(g.x - 0.32, 0.07)
        * ramp(g.wall + 0.02 - g.x, 0.012)
        * ramp(g.v + 0.62, 0.06)
        * ramp(0.42 - g.v, 0.1)
    )
    return tube_profile(d, 0.040) * reach


def heart_mask(scene, n=SIZE):
    """bool [n,n] silhouette of the heart of one scene and the mask of the inner chest, to measure the CTR."""
    g = chest(scene, n)
    return heart(scene, g) > 0.0, (g.e > 0) & (g.above > 0)
