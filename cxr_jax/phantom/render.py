"""Render phantom scenes: attenuation along each ray, Beer-Lambert, scatter, detector, display.

Below `render`, every function draws one scene; maps are float32 [side, side].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.phantom import findings
from cxr_jax.phantom.constants import SIZE, Acquisition, Anatomy, Device, Finding
from cxr_jax.phantom.geometry import (
    PIXEL,
    Grid,
    anterior_ribs,
    bump,
    chest,
    chord,
    heart,
    mediastinum,
    pixel_centres,
    posterior_ribs,
    ramp,
    strength,
    tube_profile,
)
from cxr_jax.phantom.texture import (
    TREE,
    TREE_DOWN,
    TREE_LATERAL,
    TREES,
    hat,
    pixel_noise,
    smooth_noise,
    tree_bank,
)
from cxr_jax.runtime.trees import Tree

# Findings that are drawn by their strength at each pixel.
_BY_PIXEL = (
    Finding.EDEMA,
    Finding.CONSOLIDATION,
    Finding.PNEUMONIA,
    Finding.ATELECTASIS,
    Finding.PNEUMOTHORAX,
    Finding.PLEURAL_EFFUSION,
    Finding.PLEURAL_OTHER,
)
# Streams of a scene's noise seed.
FLUFF, _CLOUD, _DETECTOR = 1, 2, 3
BLUR_CELLS = 16  # a side of the grid on which scatter is blurred


def render(scene: Tree, side: int = SIZE) -> jax.Array:
    """Render images float32 [B,side,side] in 0..1 of scenes; opacity and bone bright, air dark. Jittable.

    Args:
        scene: of `sample_scenes`.
        side: in pixels, a multiple of 16. Larger films show the same bodies: lines keep their width in the body, and
            the noise its size in pixels, as on a detector with more of them.
    """
    return jax.vmap(functools.partial(_render_one, side=side))(scene)


@functools.partial(jax.jit, static_argnames="side")
def _render_one(scene: Tree, side: int) -> jax.Array:
    return develop(scene, *_attenuation(scene, side))


def develop(scene: Tree, attenuation: jax.Array, metal: jax.Array) -> jax.Array:
    """Make the film of what stands in the beam, of any view: a map in 0..1.

    Args:
        scene: its "acq", "noise_key" and, at a site, "sharpness".
        attenuation: along each ray.
        metal: how much of it is metal, in 0..1.
    """
    acquisition, side = scene["acq"], attenuation.shape[-1]

    # ---- What reaches the detector ----
    primary = jnp.exp(-attenuation)
    down, up = (jnp.asarray(matrix) for matrix in _blur_matrices(side))
    scatter = up @ (down @ primary @ down.T) @ up.T

    # ---- Log detector: what it reports is the attenuation it believes in ----
    reported = -jnp.log(primary + acquisition[Acquisition.SCATTER] * scatter + 0.012)
    displayed = (reported - 0.27 + acquisition[Acquisition.WINDOW]) * (1.0 / 2.5)

    # ---- Console: what it does for the eye ----
    centres = pixel_centres(side)
    displayed -= 0.45 * jnp.maximum(displayed - 0.70, 0.0)  # shoulder: leaves room above bone
    displayed += 0.20 * metal  # edge enhancement; scatter would drown metal over the spine
    displayed = (
        0.5
        + (displayed - 0.5) * acquisition[Acquisition.CONTRAST]
        + 0.04 * acquisition[Acquisition.VIGNETTE] * centres[None, :]
    )
    displayed += 0.55 * jnp.maximum(
        0.20 - displayed, 0.0
    )  # toe: an exposed lung keeps its markings
    if "sharpness" in scene:  # of sites only: the hospitals' own programs stay as they are
        displayed += scene["sharpness"] * (displayed - _soften(displayed))

    # ---- Noise, tone and veil ----
    noise = pixel_noise(noise_seed(scene, _DETECTOR), side)
    amount = acquisition[Acquisition.NOISE] * 1.25 * noise * (0.6 + 0.6 * displayed)
    displayed = jnp.clip(displayed + amount, 0.0, 1.0)
    # Tone curve x -> x (1 + gamma) / (1 + gamma x), a cheap stand-in for a power with fixed ends.
    gamma = acquisition[Acquisition.GAMMA]
    displayed = displayed * (1.0 + gamma) / (1.0 + gamma * displayed)
    veiled = displayed * (1.0 - acquisition[Acquisition.VEIL]) + acquisition[Acquisition.VEIL]
    return jnp.clip(veiled, 0.0, 1.0)


# ---- Attenuation -----------------------------------------------------------------------------------


class _Disease(NamedTuple):
    """What findings put into the lung and around it, maps in 0..1."""

    amount: dict[Finding, jax.Array]  # strength at each pixel
    wet: jax.Array  # edema
    patches: jax.Array  # pneumonia
    lobe: jax.Array  # consolidation
    bronchi: jax.Array  # air that shows in it
    pneumothorax: findings.Pneumothorax
    fluid: jax.Array
    thickening: findings.Thickening
    collapse: jax.Array


def _attenuation(scene: Tree, side: int) -> tuple[jax.Array, jax.Array]:
    """Attenuation along each ray (about 0 in free air, 0.6 in lung, 3 in the abdomen), and metal in 0..1."""
    anatomy = scene["anatomy"]
    grid = chest(scene, side)
    fluff = smooth_noise(noise_seed(scene, FLUFF), 30, side)
    cloud = smooth_noise(noise_seed(scene, _CLOUD), 11, side)
    tree = _vessel_trees(scene, side)
    cardiac, pedicle = heart(scene, grid), mediastinum(scene, grid)
    disease = _draw_disease(scene, grid, fluff, tree)
    amount, gas = disease.amount, disease.pneumothorax.air

    # ---- Air in the lung ----
    fill = _remaining_air(cardiac, pedicle, disease, fluff)
    lung = grid.lung * (1.0 + 0.02 * cloud)
    # A collapsed lung is denser; the air around it is darker than any lung.
    squeezed = (
        1.0
        - 0.30 * amount[Finding.PNEUMOTHORAX] * (1.0 - gas)
        + 0.22 * gas * ramp(amount[Finding.PNEUMOTHORAX] - 0.02, 0.02)
    )
    air = lung * fill * squeezed

    # ---- The body around it ----
    body = _body_depth(grid)
    thickness = 2.05 + 0.22 * anatomy[Anatomy.HABITUS]
    attenuation = thickness * body - 1.55 * air
    attenuation += 0.34 * cardiac + 0.30 * pedicle * ramp(0.3 - grid.downward, 0.3)
    belly = jnp.maximum(ramp(-grid.above_diaphragm, 0.05), disease.fluid) * ramp(
        grid.depth + 0.02, 0.02
    )
    flank = ramp(grid.downward - 0.55, 0.22) * ramp(grid.depth + 0.25, 0.25)
    attenuation += 0.45 * jnp.maximum(belly, flank)

    # ---- Vessels, which need air around them to be seen, and hila ----
    # Edema widens them, those of the upper zones most.
    vessels = (0.50 + 0.10 * anatomy[Anatomy.VESSELS]) * (
        1.0 + amount[Finding.EDEMA] * (0.6 + 0.7 * ramp(-0.05 - grid.downward, 0.2))
    )
    attenuation += vessels * tree * grid.lung * fill * (1.0 - gas)
    # The heart lies in front of the hila.
    hilum = bump(
        ((grid.lateral - 0.17) * (1 / 0.11)) ** 2 + ((grid.downward - 0.0) * (1 / 0.17)) ** 2
    )
    attenuation += 0.22 * hilum * (1.0 - cardiac)

    # ---- What is added rather than filled ----
    attenuation = _add_findings(attenuation, scene, grid, disease)
    attenuation += _bones(scene, grid, anatomy, 1.0 - 0.65 * jnp.maximum(cardiac, pedicle))
    attenuation -= 0.50 * _airways(grid)
    attenuation = _add_stomach_and_breasts(attenuation, grid, anatomy)

    metal = findings.devices(scene, grid)
    attenuation += (
        0.85 * metal[Device.ENDOTRACHEAL_TUBE]
        + 0.85 * metal[Device.CENTRAL_LINE]
        + 1.0 * metal[Device.PACEMAKER]
        + 0.85 * metal[Device.NASOGASTRIC_TUBE]
        + 1.1 * metal[Device.STERNAL_WIRES]
    )
    return attenuation, jnp.minimum(functools.reduce(jnp.maximum, metal), 1.0)


def _draw_disease(scene: Tree, grid: Grid, fluff: jax.Array, tree: jax.Array) -> _Disease:
    amount = {finding: findings.on_side(scene, grid, finding) for finding in _BY_PIXEL}
    wet = findings.edema(scene, grid) * amount[Finding.EDEMA]
    # Noise breaks the envelope of a pneumonia into patches.
    envelope = findings.pneumonia(scene, grid)
    patches = (
        ramp(envelope * 1.5 - 0.75 + 0.42 * fluff, 0.60)
        * ramp(envelope - 0.05, 0.05)
        * amount[Finding.PNEUMONIA]
    )
    lobe = findings.consolidation(scene, grid)
    # Air bronchograms: where a vessel runs, the airway beside it stays open.
    bronchi = lobe * ramp(tree - 0.30, 0.18)
    return _Disease(
        amount=amount,
        wet=wet,
        patches=patches,
        lobe=lobe,
        bronchi=bronchi,
        pneumothorax=findings.pneumothorax(scene, grid),
        fluid=findings.effusion(scene, grid),
        thickening=findings.pleural_other(scene, grid),
        collapse=findings.atelectasis(scene, grid),
    )


def _remaining_air(
    cardiac: jax.Array, pedicle: jax.Array, disease: _Disease, fluff: jax.Array
) -> jax.Array:
    """The share of air that is left in the lung once heart, mediastinum and disease have taken theirs."""
    amount = disease.amount
    return (
        (1.0 - 0.92 * cardiac)
        * (1.0 - 0.93 * pedicle)
        * (1.0 - 0.85 * disease.wet * (0.85 + 0.18 * fluff))
        * (1.0 - 0.80 * disease.patches)
        * (
            1.0
            - 0.90 * disease.lobe * amount[Finding.CONSOLIDATION]
            + 0.55 * disease.bronchi * amount[Finding.CONSOLIDATION]
        )
        * (
            1.0
            - 0.95
            * disease.thickening.band
            * jnp.minimum(1.35 * amount[Finding.PLEURAL_OTHER], 1.0)
        )
        * (1.0 - 0.96 * disease.fluid)
    )


def _body_depth(grid: Grid) -> jax.Array:
    """Depth of the trunk along the ray in 0..1, with shoulders and neck."""
    trunk = chord((grid.across * (1.0 / 1.16)) ** 2)
    shoulder = grid.downward + 0.93 - 0.30 * jnp.maximum(grid.lateral - 0.22, 0.0)
    return trunk * jnp.maximum(ramp(shoulder, 0.05), ramp(0.26 - grid.lateral, 0.03) * 0.9)


def _add_findings(attenuation: jax.Array, scene: Tree, grid: Grid, disease: _Disease) -> jax.Array:
    amount, thickening = disease.amount, disease.thickening
    severity = scene["severity"][Finding.LUNG_LESION]
    attenuation += 1.05 * strength(severity) * findings.lesion(scene, grid)
    attenuation += 0.45 * amount[Finding.EDEMA] * findings.septal_lines(scene, grid)
    attenuation += 0.95 * amount[Finding.ATELECTASIS] * disease.collapse * ramp(grid.depth, 0.02)
    attenuation += 0.75 * (0.4 + 0.6 * amount[Finding.PNEUMOTHORAX]) * disease.pneumothorax.line
    attenuation += (0.85 * thickening.plaque + 0.15 * thickening.band) * amount[
        Finding.PLEURAL_OTHER
    ]
    return attenuation


def _airways(grid: Grid) -> jax.Array:
    """Trachea and main bronchi, maps in 0..1."""
    trachea = ramp(0.032 - jnp.abs(grid.from_midline - 0.008), 0.016) * ramp(
        -0.28 - grid.downward, 0.02
    )
    fork = jnp.abs(jnp.abs(grid.from_midline) - 0.55 * (grid.downward + 0.31)) - 0.016
    bronchi = (
        ramp(-fork, 0.012) * ramp(grid.downward + 0.31, 0.01) * ramp(-0.14 - grid.downward, 0.04)
    )
    return jnp.maximum(trachea, bronchi)


def _add_stomach_and_breasts(attenuation: jax.Array, grid: Grid, anatomy: jax.Array) -> jax.Array:
    # The air of the stomach, under the left dome.
    bubble = chord(
        ((grid.across - 0.30 - 0.06 * anatomy[Anatomy.STOMACH]) / 0.13) ** 2
        + ((grid.downward - grid.thorax.dome_left - 0.15) / 0.085) ** 2
    )
    attenuation -= 0.75 * (0.6 + 0.4 * anatomy[Anatomy.STOMACH]) * bubble
    # Only positive numbers of the scene are breasts that show.
    breast = bump(
        ((grid.lateral - 0.42) * (1 / 0.34)) ** 2 + ((grid.downward - 0.30) * (1 / 0.30)) ** 2
    )
    attenuation += 0.26 * jnp.maximum(anatomy[Anatomy.BREAST], 0.0) * breast
    return attenuation


def _bones(scene: Tree, grid: Grid, anatomy: jax.Array, clear: jax.Array) -> jax.Array:
    """Spine, ribs (with a fracture where there is one), clavicles and shoulder blades.

    `clear`: how well the ribs show through what lies in front of them.
    """
    # ---- Ribs ----
    # A fracture is small, so it is drawn strongly.
    broken = jnp.minimum(1.3 * findings.on_side(scene, grid, Finding.FRACTURE), 1.0)
    fracture = findings.fracture(scene, grid)
    posterior = posterior_ribs(grid, grid.downward - fracture.shift, grid.lateral)
    ribs = (
        0.44
        * posterior
        * (1.0 - 0.95 * fracture.gap * ramp(broken - 0.1, 0.1))
        * (1.0 + 1.4 * broken * fracture.ends + 0.5 * broken * fracture.site)
    )
    ribs = (
        ribs
        - 0.30 * broken * fracture.gap * ramp(posterior, 0.2)
        + 0.42 * broken * fracture.ends * ramp(posterior - 0.05, 0.1)
    )
    ribs = ribs * (1.0 + 0.5 * ramp(0.05 - grid.depth, 0.05)) + 0.24 * anterior_ribs(grid)

    # ---- Spine: vertebral bodies between discs ----
    disc = (grid.downward + 0.02) * (1 / 0.118)
    disc = jnp.abs(disc - jnp.round(disc))
    spine = ramp(0.078 - grid.lateral, 0.012) * (0.20 + 0.10 * ramp(0.36 - disc, 0.06))
    spine += 0.10 * ramp(2.0 * PIXEL - jnp.abs(grid.lateral - 0.075), 1.5 * PIXEL)

    # ---- Clavicles and shoulder blades ----
    outward = grid.lateral - 0.09
    axis = -0.56 + 0.03 * anatomy[Anatomy.CLAVICLE] - 0.72 * outward + 0.55 * outward * outward
    clavicle = (
        tube_profile(grid.downward - axis, 0.036)
        * ramp(outward, 0.012)
        * ramp(0.80 - grid.lateral, 0.02)
    )
    edge = (
        ramp(2.2 * PIXEL - jnp.abs(grid.lateral - 0.74 + 0.20 * (grid.downward + 0.2)), 1.5 * PIXEL)
        * ramp(0.15 - grid.downward, 0.1)
        * ramp(grid.downward + 0.6, 0.1)
    )
    plate = (
        ramp(grid.lateral - 0.74 + 0.20 * (grid.downward + 0.2), 0.05)
        * ramp(0.1 - grid.downward, 0.2)
        * ramp(grid.downward + 0.7, 0.1)
    )
    return clear * ribs + spine + 0.58 * clavicle + 0.14 * edge + 0.10 * plate


# ---- Textures and filters --------------------------------------------------------------------------


def noise_seed(scene: Tree, stream: int) -> jax.Array:
    """Give the uint32 seed of one noise field; the renderer needs no PRNG calls, which keeps it quick to compile."""
    key = scene["noise_key"]
    return (
        key[0] * jnp.uint32(0x9E3779B1)
        + key[1] * jnp.uint32(0x85EBCA6B)
        + jnp.uint32(stream * 0xC2B2AE35 % 2**32)
    )


def _vessel_trees(scene: Tree, side: int) -> jax.Array:
    """Vessel map: a tree of the bank for each lung, resampled into place by small matmuls."""
    acquisition = scene["acq"]
    bank = jnp.asarray(tree_bank())
    centres = pixel_centres(side)
    across, down = (
        (centres - acquisition[Acquisition.SHIFT_X]) / acquisition[Acquisition.MAGNIFICATION],
        (centres - acquisition[Acquisition.SHIFT_Y]) / acquisition[Acquisition.MAGNIFICATION],
    )
    columns = hat(
        (jnp.abs(across) - TREE_LATERAL[0]) * ((TREE - 1) / (TREE_LATERAL[1] - TREE_LATERAL[0])),
        TREE,
    )
    rows = hat((down - TREE_DOWN[0]) * ((TREE - 1) / (TREE_DOWN[1] - TREE_DOWN[0])), TREE)
    # Both trees through the rows at once, then each through the columns of its own lung.
    both = rows @ jnp.concatenate(
        [
            bank[(acquisition[Acquisition.TREE_RIGHT] * TREES).astype(jnp.int32)],
            bank[(acquisition[Acquisition.TREE_LEFT] * TREES).astype(jnp.int32)],
        ],
        axis=1,
    )
    right = both[:, :TREE] @ (columns * (across <= 0)[:, None]).T
    return right + both[:, TREE:] @ (columns * (across > 0)[:, None]).T


def _blur_matrices(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed matrices of the scatter blur: average to 16 x 16, then back up through a wide smooth kernel."""
    factor = side // BLUR_CELLS
    down = np.kron(np.eye(BLUR_CELLS), np.full((1, factor), BLUR_CELLS / side)).astype(np.float32)
    places = (np.arange(side) + 0.5) / side * BLUR_CELLS - 0.5
    offset = places[:, None] - np.arange(BLUR_CELLS)[None, :]
    weights = np.exp(-(offset**2) / (2 * 1.2**2))
    return down, (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _soften(image: jax.Array) -> jax.Array:
    """The image after a 5 x 5 binomial kernel, about 1 px of standard deviation; edges repeat."""
    for axis in (0, 1):
        widths = [(2, 2) if each == axis else (0, 0) for each in (0, 1)]
        shift = functools.partial(_shift, jnp.pad(image, widths, mode="edge"), axis)
        image = 0.375 * shift(2) + 0.25 * (shift(1) + shift(3)) + 0.0625 * (shift(0) + shift(4))
    return image


def _shift(padded: jax.Array, axis: int, start: int) -> jax.Array:
    return jax.lax.slice_in_dim(padded, start, padded.shape[axis] - 4 + start, axis=axis)
