"""What a frontal film hides of its patient, and the lateral film shows: fluid behind the domes, an opacity behind the
heart.

The frontal film is drawn from a scene without them, bit for bit the film of that scene: of such a finding nothing can
be told from it. Two in five patients have one.
"""

import jax
import jax.numpy as jnp

from cxr_jax.phantom.constants import BOTH, FINDINGS, LEFT, LOWER, POSITIVE_AT, Finding
from cxr_jax.runtime.trees import Tree

# What may lie behind the heart: at most one of them does.
RETROCARDIAC = (Finding.LUNG_LESION, Finding.CONSOLIDATION, Finding.PNEUMONIA, Finding.ATELECTASIS)
OPACITY_RATE = 0.40  # of the patients in whom the opacity that is drawn is not there already
FLUID_RATE = 0.25
# What the frontal shows at the bases would lie before these on the lateral, too.
_AT_THE_BASE = (Finding.LUNG_LESION, Finding.CONSOLIDATION, Finding.PNEUMONIA)


def hide(scene: Tree, keys: jax.Array) -> tuple[Tree, jax.Array]:
    """Add what frontal films hide to scenes. Pure and jittable.

    Args:
        scene: B scenes (`phantom.sample_scenes`), which the frontal films show.
        keys: typed keys [B].

    Returns:
        The scenes of the patients, and bool [B,12]: what of them the frontal films hide. It is always severe enough
        to be called; opacities lie at the left base, fluid on both sides.
    """
    return jax.vmap(_hide)(scene, keys)


def _hide(scene: Tree, key: jax.Array) -> tuple[Tree, jax.Array]:
    uniform = jax.random.uniform(key, (8,))
    severity, side, zone = scene["severity"], scene["side"], scene["zone"]
    finding = jnp.arange(len(FINDINGS))

    # ---- Room for it: no fluid, and nothing at the bases ----
    has_fluid = severity[Finding.PLEURAL_EFFUSION] > 0
    base = jnp.array(_AT_THE_BASE)
    is_free = ~has_fluid & ~jnp.any((severity[base] > 0) & (zone[base] == LOWER))

    # ---- Which ----
    choice = jnp.array(RETROCARDIAC)[(uniform[0] * len(RETROCARDIAC)).astype(jnp.int32)]
    hides_opacity = is_free & (uniform[1] < OPACITY_RATE) & (severity[choice] == 0)
    hides_fluid = ~has_fluid & (uniform[2] < FLUID_RATE)
    is_opacity = (finding == choice) & hides_opacity
    is_fluid = (finding == Finding.PLEURAL_EFFUSION) & hides_fluid

    # ---- How much: fluid that the domes hide is small ----
    lowest = POSITIVE_AT + 0.05
    amount = jnp.where(is_fluid, lowest + 0.19 * uniform[4], lowest + 0.60 * uniform[3])
    is_hidden = is_opacity | is_fluid
    patient = scene | {
        "severity": jnp.where(is_hidden, amount, severity),
        "side": jnp.where(is_opacity, LEFT, jnp.where(is_fluid, BOTH, side)),
        "zone": jnp.where(is_hidden, LOWER, zone),
    }
    return patient, is_hidden
