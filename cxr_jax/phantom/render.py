"""Render phantom scenes: attenuation along each ray, Beer-Lambert, scatter, detector, display."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.phantom import findings as fi
from cxr_jax.phantom.constants import (
    ACQ_CONTRAST,
    ACQ_GAMMA,
    ACQ_MAGNIFICATION,
    ACQ_NOISE,
    ACQ_SCATTER,
    ACQ_SHIFT_X,
    ACQ_SHIFT_Y,
    ACQ_TREE_L,
    ACQ_TREE_R,
    ACQ_VEIL,
    ACQ_VIGNETTE,
    ACQ_WINDOW,
    ANAT_BREAST,
    ANAT_CLAVICLE,
    ANAT_HABITUS,
    ANAT_STOMACH,
    ANAT_VESSELS,
    ATEL,
    CONS,
    EDEMA,
    EFF,
    FRAC,
    LESION,
    PLEU,
    PNEU,
    PTX,
    SIZE,
)
from cxr_jax.phantom.geometry import (
    PX,
    anterior_ribs,
    bump,
    chest,
    chord,
    heart,
    mediastinum,
    posterior_ribs,
    ramp,
    strength,
    tube_profile,
)
from cxr_jax.phantom.texture import (
    TREE,
    TREE_V,
    TREE_X,
    TREES,
    hat,
    pixel_noise,
    smooth_noise,
    tree_bank,
)


def render(scene: dict) -> jax.Array:
    """Images float32 [B,224,224] in 0..1 of scenes; opacity and bone bright, air dark. Jittable."""
    return jax.vmap(_render_one)(scene)


def _seed(scene, stream):
    """uint32 seed of one noise field; the renderer needs no PRNG calls, which keeps it quick to compile."""
    key = scene["noise_key"]
    return (
        key[0] * jnp.uint32(0x9E3779B1)
        + key[1] * jnp.uint32(0x85EBCA6B)
        + jnp.uint32(stream * 0xC2B2AE35 % 2**32)
    )


def _trees(scene):
    """Vessel map [SIZE,SIZE]: a tree of the bank for each lung, resampled into place by small matmuls."""
    q = scene["acq"]
    bank = jnp.asarray(tree_bank())
    grid = (jnp.arange(SIZE, dtype=jnp.float32) + 0.5) * PX - 1.0
    u, v = (
        (grid - q[ACQ_SHIFT_X]) / q[ACQ_MAGNIFICATION],
        (grid - q[ACQ_SHIFT_Y]) / q[ACQ_MAGNIFICATION],
    )
    cols = hat((jnp.abs(u) - TREE_X[0]) * ((TREE - 1) / (TREE_X[1] - TREE_X[0])), TREE)
    rows = hat((v - TREE_V[0]) * ((TREE - 1) / (TREE_V[1] - TREE_V[0])), TREE)
    half = rows @ jnp.concatenate(
        [
            bank[(q[ACQ_TREE_R] * TREES).astype(jnp.int32)],
            bank[(q[ACQ_TREE_L] * TREES).astype(jnp.int32)],
        ],
        axis=1,
    )
    right = half[:, :TREE] @ (cols * (u <= 0)[:, None]).T
    return right + half[:, TREE:] @ (cols * (u > 0)[:, None]).T


def _attenuation(scene):
    """(attenuation along each ray: about 0 in free air, 0.6 in lung, 3 in the abdomen; metal in 0..1)."""
    a = scene["anatomy"]
    g = chest(scene)
    fluff = smooth_noise(_seed(scene, 1), 30)
    cloud = smooth_noise(_seed(scene, 2), 11)
    tree = _trees(scene)

    cor, med = heart(scene, g), mediastinum(scene, g)
    on = {i: fi.on_side(scene, g, i) for i in (EDEMA, CONS, PNEU, ATEL, PTX, EFF, PLEU)}

    # air left in the lung once heart, mediastinum and disease have taken their share
    wet = fi.edema(scene, g) * on[EDEMA]
    patches = fi.pneumonia(scene, g)
    patches = (
        ramp(patches * 1.5 - 0.75 + 0.42 * fluff, 0.60) * ramp(patches - 0.05, 0.05) * on[PNEU]
    )
    lobe = fi.consolidation(scene, g)
    bronchi = lobe * ramp(tree - 0.30, 0.18)
    gas, pleura = fi.pneumothorax(scene, g)
    fluid = fi.effusion(scene, g)
    peel, plaque = fi.pleural_other(scene, g)
    collapse = fi.atelectasis(scene, g)
    fill = (
        (1.0 - 0.92 * cor)
        * (1.0 - 0.93 * med)
        * (1.0 - 0.85 * wet * (0.85 + 0.18 * fluff))
        * (1.0 - 0.80 * patches)
        * (1.0 - 0.90 * lobe * on[CONS] + 0.55 * bronchi * on[CONS])
        * (1.0 - 0.95 * peel * jnp.minimum(1.35 * on[PLEU], 1.0))
        * (1.0 - 0.96 * fluid)
    )
    lung = g.lung * (1.0 + 0.02 * cloud)
    squeezed = 1.0 - 0.30 * on[PTX] * (1.0 - gas) + 0.22 * gas * ramp(on[PTX] - 0.02, 0.02)
    air = lung * fill * squeezed

    body = chord((g.u * (1.0 / 1.16)) ** 2)
    shoulder = g.v + 0.93 - 0.30 * jnp.maximum(g.x - 0.22, 0.0)
    body = body * jnp.maximum(ramp(shoulder, 0.05), ramp(0.26 - g.x, 0.03) * 0.9)
    thick = 2.05 + 0.22 * a[ANAT_HABITUS]
    m = thick * body - 1.55 * air
    m += 0.34 * cor + 0.30 * med * ramp(0.3 - g.v, 0.3)
    belly = jnp.maximum(ramp(-g.above, 0.05), fluid) * ramp(g.e + 0.02, 0.02)
    m += 0.45 * jnp.maximum(belly, ramp(g.v - 0.55, 0.22) * ramp(g.e + 0.25, 0.25))

    # vessels need air around them to be seen
    vessels = (0.50 + 0.10 * a[ANAT_VESSELS]) * (
        1.0 + on[EDEMA] * (0.6 + 0.7 * ramp(-0.05 - g.v, 0.2))
    )
    m += vessels * tree * g.lung * fill * (1.0 - gas)
    hilum = bump(((g.x - 0.17) * (1 / 0.11)) ** 2 + ((g.v - 0.0) * (1 / 0.17)) ** 2)
    m += 0.22 * hilum * (1.0 - cor)

    # what is added rather than filled
    m += 1.05 * strength(scene["severity"][LESION]) * fi.lesion(scene, g)
    m += 0.45 * on[EDEMA] * fi.septal_lines(scene, g)
    m += 0.95 * on[ATEL] * collapse * ramp(g.e, 0.02)
    m += 0.75 * (0.4 + 0.6 * on[PTX]) * pleura
    m += (0.85 * plaque + 0.15 * peel) * on[PLEU]
    m += _bones(scene, g, a, 1.0 - 0.65 * jnp.maximum(cor, med))

    throat = ramp(0.032 - jnp.abs(g.um - 0.008), 0.016) * ramp(-0.28 - g.v, 0.02)
    fork = jnp.abs(jnp.abs(g.um) - 0.55 * (g.v + 0.31)) - 0.016
    throat = jnp.maximum(
        throat, ramp(-fork, 0.012) * ramp(g.v + 0.31, 0.01) * ramp(-0.14 - g.v, 0.04)
    )
    m -= 0.50 * throat
    bubble = chord(
        ((g.u - 0.30 - 0.06 * a[ANAT_STOMACH]) / 0.13) ** 2
        + ((g.v - g.p.dome_l - 0.15) / 0.085) ** 2
    )
    m -= 0.75 * (0.6 + 0.4 * a[ANAT_STOMACH]) * bubble
    breast = bump(((g.x - 0.42) * (1 / 0.34)) ** 2 + ((g.v - 0.30) * (1 / 0.30)) ** 2)
    m += 0.26 * jnp.maximum(a[ANAT_BREAST], 0.0) * breast

    metal = fi.devices(scene, g)
    m += 0.85 * metal[0] + 0.85 * metal[1] + 1.0 * metal[2] + 0.85 * metal[3] + 1.1 * metal[4]
    return m, jnp.minimum(functools.reduce(jnp.maximum, metal), 1.0)


def _bones(scene, g, a, clear):
    """Spine, ribs (with a fracture where there is one), clavicles and shoulder blades."""
    broken = jnp.minimum(1.3 * fi.on_side(scene, g, FRAC), 1.0)  # small, so drawn strongly
    shift, gap, ends, near = fi.fracture(scene, g)
    front = posterior_ribs(g, g.v - shift, g.x)
    ribs = (
        0.44
        * front
        * (1.0 - 0.95 * gap * ramp(broken - 0.1, 0.1))
        * (1.0 + 1.4 * broken * ends + 0.5 * broken * near)
    )
    ribs = (
        ribs
        - 0.30 * broken * gap * ramp(front, 0.2)
        + 0.42 * broken * ends * ramp(front - 0.05, 0.1)
    )
    ribs = ribs * (1.0 + 0.5 * ramp(0.05 - g.e, 0.05)) + 0.24 * anterior_ribs(g)

    disc = (g.v + 0.02) * (1 / 0.118)
    disc = jnp.abs(disc - jnp.round(disc))
    spine = ramp(0.078 - g.x, 0.012) * (0.20 + 0.10 * ramp(0.36 - disc, 0.06))
    spine += 0.10 * ramp(2.0 * PX - jnp.abs(g.x - 0.075), 1.5 * PX)

    t = g.x - 0.09
    axis = -0.56 + 0.03 * a[ANAT_CLAVICLE] - 0.72 * t + 0.55 * t * t
    clavicle = tube_profile(g.v - axis, 0.036) * ramp(t, 0.012) * ramp(0.80 - g.x, 0.02)
    blade = (
        ramp(2.2 * PX - jnp.abs(g.x - 0.74 + 0.20 * (g.v + 0.2)), 1.5 * PX)
        * ramp(0.15 - g.v, 0.1)
        * ramp(g.v + 0.6, 0.1)
    )
    plate = (
        ramp(g.x - 0.74 + 0.20 * (g.v + 0.2), 0.05) * ramp(0.1 - g.v, 0.2) * ramp(g.v + 0.7, 0.1)
    )
    return clear * ribs + spine + 0.58 * clavicle + 0.14 * blade + 0.10 * plate


def _blur_matrices():
    """Fixed matrices of the scatter blur: average to 16 x 16, then back up through a wide smooth kernel."""
    n = 16
    down = np.kron(np.eye(n), np.full((1, SIZE // n), n / SIZE)).astype(np.float32)
    at, centres = (np.arange(SIZE) + 0.5) / SIZE * n - 0.5, np.arange(n)
    up = np.exp(-((at[:, None] - centres[None, :]) ** 2) / (2 * 1.2**2))
    return down, (up / up.sum(1, keepdims=True)).astype(np.float32)


def _soft(t):
    """[SIZE, SIZE] after a 5 x 5 binomial kernel, about 1 px of standard deviation; edges repeat."""
    for axis in (0, 1):
        pad = jnp.pad(t, [(2, 2) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        at = lambda i, pad=pad, axis=axis: jax.lax.slice_in_dim(pad, i, i + SIZE, axis=axis)
        t = 0.375 * at(2) + 0.25 * (at(1) + at(3)) + 0.0625 * (at(0) + at(4))
    return t


def _render_one(scene):
    q = scene["acq"]
    m, metal = _attenuation(scene)
    primary = jnp.exp(-m)
    down, up = (jnp.asarray(x) for x in _blur_matrices())
    scatter = up @ (down @ primary @ down.T) @ up.T
    # log detector: what it reports is the attenuation it believes in
    seen = -jnp.log(primary + q[ACQ_SCATTER] * scatter + 0.012)
    t = (seen - 0.27 + q[ACQ_WINDOW]) * (1.0 / 2.5)
    grid = (jnp.arange(SIZE, dtype=jnp.float32) + 0.5) * PX - 1.0
    t -= 0.45 * jnp.maximum(t - 0.70, 0.0)  # shoulder: leaves room above bone
    t += 0.20 * metal  # edge enhancement of the console; scatter would drown metal over the spine
    t = 0.5 + (t - 0.5) * q[ACQ_CONTRAST] + 0.04 * q[ACQ_VIGNETTE] * grid[None, :]
    t += 0.55 * jnp.maximum(0.20 - t, 0.0)  # toe: an exposed lung keeps its markings
    if "sharpness" in scene:  # of sites only: the hospitals' own programs stay as they are
        t += scene["sharpness"] * (t - _soft(t))
    noise = pixel_noise(_seed(scene, 3))
    t = jnp.clip(t + q[ACQ_NOISE] * 1.25 * noise * (0.6 + 0.6 * t), 0.0, 1.0)
    # tone curve t -> t (1+k) / (1 + k t), a cheap stand-in for gamma with fixed ends
    k = q[ACQ_GAMMA]
    t = t * (1.0 + k) / (1.0 + k * t)
    return jnp.clip(t * (1.0 - q[ACQ_VEIL]) + q[ACQ_VEIL], 0.0, 1.0)
