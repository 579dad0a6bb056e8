"""Render the lateral film of a phantom scene: the same patient, devices and findings, seen from the side.

What a frontal film hides is here, and only here: fluid in the posterior sulcus lies behind the domes, and an opacity
behind the heart (`hidden.py`). Where in the depth of the chest a finding that the frontal shows lies, is drawn from
its own numbers of the scene. Below `render`, every function draws one scene; maps are float32 [n, n].
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cxr_jax.phantom.constants import (
    BOTH,
    CELLS,
    LOWER,
    MID,
    SIZE,
    UPPER,
    Acquisition,
    Anatomy,
    Device,
    Finding,
)
from cxr_jax.phantom.findings import cover
from cxr_jax.phantom.geometry import PIXEL, bump, chord, pixel_centres, ramp, strength
from cxr_jax.phantom.render import FLUFF, develop, noise_seed
from cxr_jax.phantom.scene import region_weights
from cxr_jax.phantom.studies.profile import (
    HILUM,
    Profile,
    airways,
    bones,
    heart,
    mediastinum,
    profile,
    rib_heights,
    trunk,
)
from cxr_jax.phantom.texture import (
    TREE,
    TREE_DOWN,
    TREE_LATERAL,
    TREES,
    hat,
    smooth_noise,
    tree_bank,
)
from cxr_jax.runtime.trees import Tree

# Uniform numbers of a film's own acquisition.
_DRAWS = 6


def film_of(scene: Tree, key: jax.Array) -> Tree:
    """Give one scene as the lateral film takes it: the same room and breath, another exposure.

    Args:
        key: typed, of the example.
    """
    uniform = jax.random.uniform(key, (_DRAWS,), minval=-1.0, maxval=1.0)
    acquisition = scene["acq"]
    # What a technician sets anew; contrast, scatter and noise are the room's.
    acquisition = acquisition.at[Acquisition.ROTATION].set(1.5 * uniform[0])
    acquisition = acquisition.at[Acquisition.SHIFT_X].set(0.05 * uniform[1])
    acquisition = acquisition.at[Acquisition.SHIFT_Y].set(0.05 * uniform[2])
    acquisition = acquisition.at[Acquisition.WINDOW].set(0.05 * uniform[3] + 0.02)
    noise_key = ((uniform[4:] + 1.0) * 2.0**23).astype(jnp.uint32)
    return scene | {"acq": acquisition, "noise_key": noise_key}


def render(scene: Tree, hidden: jax.Array, keys: jax.Array) -> jax.Array:
    """Render lateral films, float32 [B,224,224] in 0..1. Jittable.

    Args:
        scene: B scenes (`phantom.sample_scenes`), with what the frontal films hide.
        hidden: bool [B,12], which findings they hide.
        keys: typed keys [B], of the films.
    """
    return jax.vmap(_render_one)(scene, hidden, keys)


@jax.jit
def _render_one(scene: Tree, hidden: jax.Array, key: jax.Array) -> jax.Array:
    film = film_of(scene, key)
    # What is hidden moves nothing that the frontal shows: the domes stay where they are there.
    view = profile(_as_frontal(film, hidden))
    return develop(film, *_attenuation(film, hidden, view))


def _as_frontal(scene: Tree, hidden: jax.Array) -> Tree:
    return scene | {"severity": jnp.where(hidden, 0.0, scene["severity"])}


# ---- Where findings are ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Place:
    """How strongly a finding is drawn, and where it is: scalars; in body units."""

    amount: jax.Array
    is_hidden: jax.Array
    zone: jax.Array
    variant: jax.Array
    across: jax.Array
    downward: jax.Array


def place_of(scene: Tree, hidden: jax.Array, view: Profile, finding: Finding) -> Place:
    """Place a finding: behind the heart if the frontal hides it, else in the middle of the chest at its zone."""
    variant, zone = scene["variant"][finding], scene["zone"][finding]
    is_hidden = hidden[finding]
    share = jnp.array([0.30, 0.55, 0.80])[zone]
    thorax = view.thorax
    dome = jnp.maximum(thorax.dome_right, thorax.dome_left)
    # In front of the spine and, in the lower zone, of what hides behind the heart.
    seen_at = jnp.where(zone == LOWER, -0.12, jnp.where(zone == MID, -0.02, 0.0))
    return Place(
        amount=strength(scene["severity"][finding]),
        is_hidden=is_hidden,
        zone=zone,
        variant=variant,
        across=jnp.where(is_hidden, 0.25, seen_at) + 0.12 * (variant[3] - 0.5),
        downward=jnp.where(
            is_hidden, dome - 0.10, thorax.lung_top + (dome - thorax.lung_top) * share
        )
        + 0.06 * (variant[2] - 0.5),
    )


def lesion(place: Place, view: Profile, severity: jax.Array) -> jax.Array:
    """Draw the chord of a nodule of the size that the frontal shows."""
    # The measure that readers take is the same on both films.
    radius = (5.0 + 2.0 * place.variant[0] + 8.0 * severity) * PIXEL
    squared_offset = (view.across - place.across) ** 2 + (view.downward - place.downward) ** 2
    return chord(squared_offset / (radius * radius)) * (severity > 0)


def pneumonia(place: Place, view: Profile, severity: jax.Array) -> jax.Array:
    """Draw the soft envelope of a cluster of patches; noise breaks it up."""
    # Behind the heart there is less room.
    radius = jnp.where(place.is_hidden, 0.17, 0.20) + 0.08 * severity
    squared_offset = (view.across - place.across) ** 2 + (view.downward - place.downward) ** 2
    envelope = jnp.sqrt(bump(0.8 * squared_offset / (radius * radius)))
    return envelope * view.in_lung * (severity > 0)


def consolidation(place: Place, view: Profile) -> jax.Array:
    """Draw a homogeneous opacity: an upper lobe, a wedge over the heart, or the lower lobe behind its fissure."""
    thick = 0.20 + 0.14 * place.amount
    # The oblique fissure runs from the upper back to the front of the dome.
    fissure = view.across - 0.52 * (0.55 - view.downward) + 0.22
    middle_height = view.thorax.lung_top + 0.62 * (view.thorax.dome_left - view.thorax.lung_top)
    # In front of the trachea, down to the horizontal fissure.
    upper = ramp(middle_height - view.downward, 2 * PIXEL) * ramp(
        view.downward - middle_height + thick + 0.12, 0.08
    )
    upper *= ramp(0.16 - view.across, 0.05)
    # Between the horizontal fissure and the oblique one, over the heart.
    wedge = ramp(view.downward - middle_height, 2 * PIXEL) * ramp(-fissure, 2 * PIXEL)
    wedge *= ramp(middle_height + thick - view.downward, 0.05)
    # Behind the oblique fissure, but in front of what hides behind the heart.
    lower = ramp(fissure, 2 * PIXEL) * ramp(view.downward - (0.42 - thick), 2 * PIXEL)
    lower *= ramp(0.14 - view.across, 0.06)
    # Behind the heart: the posterior basal part alone.
    hidden = ramp(view.downward - (place.downward - 0.5 * thick), 2 * PIXEL)
    hidden *= ramp(view.across - 0.10, 0.03) * ramp(0.44 - view.across, 0.05)
    seen = jnp.where(place.zone == UPPER, upper, jnp.where(place.zone == MID, wedge, lower))
    lobe = jnp.where(place.is_hidden, hidden, seen)
    return lobe * view.in_lung * (place.amount > 0)


def atelectasis(place: Place, view: Profile, margin: float = 0.0) -> jax.Array:
    """Draw plate-like bands above the domes; `margin` widens them."""
    # As many and as thick as on the frontal film.
    bands: jax.Array | float = 0.0
    middle = jnp.where(place.is_hidden, 0.26, -0.10 + 0.08 * place.variant[3])
    dome = jnp.maximum(view.thorax.dome_right, view.thorax.dome_left)
    # In front they stay above the highest point of the dome, behind it there is more room below.
    floor = jnp.where(place.is_hidden, dome + 0.05, view.thorax.resting_dome - 0.01)
    for number in range(3):
        tilt = (0.5 * place.variant[0] - 0.1) * (view.across - middle)
        centre = floor - 0.075 - 0.085 * number + tilt
        half_width = (1.5 + 0.9 * place.amount - 0.2 * number) * PIXEL + margin
        band = ramp(half_width - jnp.abs(view.downward - centre), 1.0 * PIXEL)
        length = ramp(0.15 + margin - jnp.abs(view.across - middle), 0.04)
        bands = jnp.maximum(bands, band * length)
    return bands * ramp(view.depth, PIXEL) * (place.amount > 0)


def effusion(place: Place, view: Profile, is_on_both: jax.Array) -> jax.Array:
    """Draw fluid from its level down: it gathers in the posterior sulcus, and climbs along the back."""
    amount = place.amount
    dome = 0.5 * (view.thorax.dome_right + view.thorax.dome_left)
    # Faint: the tip of the sulcus. Hidden: up to the height of the domes, which hide it. Else: as on the frontal.
    level = jnp.where(amount < 0.5, dome + 0.21, dome + 0.10 - 0.42 * amount * amount)
    level = jnp.where(place.is_hidden, dome + 0.10 - 0.10 * place.variant[2], level)
    climb = jnp.maximum(1.0 - (view.back - view.across) * (1 / 0.26), 0.0)
    level = level - (0.06 + 0.14 * amount) * climb * climb
    below = ramp(view.downward - level, 2.0 * PIXEL) * ramp(view.depth, PIXEL)
    # Faint or hidden, it is in the sulcus alone: the front of the domes stays as it is.
    behind = ramp(view.across - jnp.where(place.is_hidden | (amount < 0.5), 0.16, -9.0), 0.05)
    # Of one side, the other lung stands before it.
    share = jnp.where(is_on_both, 1.0, 0.75)
    return below * behind * share * (amount > 0)


def edema(view: Profile) -> jax.Array:
    """Draw haze around the hila, which overlap."""
    across, downward = (view.across - HILUM) * 2.7, (view.downward - 0.02) * 2.1
    return bump(0.42 * (across * across + downward * downward)) * view.in_lung


def pneumothorax(place: Place, view: Profile) -> tuple[jax.Array, jax.Array]:
    """Draw the space without markings behind the sternum and under the apex, and the pleural line."""
    # Less is seen than on the frontal film: the other lung lies before it.
    gap = place.amount * (0.12 + 0.04 * place.variant[0])
    edge = jnp.minimum(
        view.across - view.front - gap, (view.downward - view.thorax.lung_top - 1.3 * gap) * 0.9
    )
    on = view.in_lung * (place.amount > 0)
    return ramp(-edge, PIXEL) * on, ramp(1.4 * PIXEL - jnp.abs(edge), 1.0 * PIXEL) * on


def thickening(place: Place, view: Profile) -> jax.Array:
    """Draw thickened pleura along the back at its zone."""
    thick = 0.035 + 0.055 * place.amount
    along = ramp(0.20 - jnp.abs(view.downward - place.downward), 0.05)
    band = ramp(thick - (view.back - view.across), 1.5 * PIXEL) * along
    return band * ramp(view.depth, PIXEL) * (place.amount > 0)


def fracture(place: Place, view: Profile) -> tuple[jax.Array, jax.Array]:
    """Draw a break of a posterior rib: the dark cleft, and the bright ends beside it."""
    near = ramp(0.09 - jnp.abs(view.downward - place.downward + 0.30 * (0.30 - view.across)), 0.03)
    from_break = view.across - 0.27 - 0.06 * place.variant[0]
    on_rib = ramp(0.035 - jnp.abs(rib_heights(view, 0.0)), 0.01) * near * (place.amount > 0)
    gap = ramp(1.8 * PIXEL - jnp.abs(from_break), PIXEL) * on_rib
    return gap, ramp(6.0 * PIXEL - jnp.abs(from_break), 3.0 * PIXEL) * on_rib


# ---- Devices ---------------------------------------------------------------------------------------


def devices(scene: Tree, view: Profile, margin: float = 0.0) -> list[jax.Array]:
    """Draw five maps in the order of DEVICES; `margin` widens them."""
    variant = scene["variant"][Finding.SUPPORT_DEVICES]
    across, downward = view.across, view.downward

    def line(offset: jax.Array, half_width: float) -> jax.Array:
        return ramp(half_width + margin - jnp.abs(offset), PIXEL)

    # Down the trachea, as far as the frontal shows.
    tip = -0.40 + 0.08 * variant[0]
    in_trachea = line(across - 0.03 - 0.10 * (downward + 0.6), 1.8 * PIXEL)
    in_trachea *= ramp(tip - downward + margin, PIXEL)

    # From in front of the apex down the vena cava.
    fall = jnp.clip((-0.18 - downward) * (1 / 0.62), 0.0, 1.3)
    vein = line(across + 0.03 + 0.16 * fall * fall, 1.3 * PIXEL)
    vein *= ramp(0.02 + 0.10 * variant[2] - downward + margin, PIXEL) * ramp(downward + 0.80, PIXEL)

    # The generator under the skin of the chest, on edge; the lead runs forwards to the tip of the right ventricle.
    box = ((across + 0.45) / 0.045) ** 4 + ((downward + 0.44) / 0.105) ** 4
    lead = line(
        across + 0.05 + 0.30 * jnp.clip((downward + 0.30) * (1 / 0.62), 0, 1) ** 2, 1.3 * PIXEL
    )
    lead *= ramp(downward + 0.42, PIXEL) * ramp(0.34 - downward + margin, PIXEL)
    pacemaker = jnp.maximum(1.6 * ramp(1.0 - box, 0.12), lead)

    # Behind the heart, and forwards into the stomach.
    bend = jnp.maximum(downward - 0.30, 0.0)
    course = across - 0.17 - 0.10 * (downward + 0.6) * (downward < 0.3) - 0.09 * (downward >= 0.3)
    gastric = line(course + 1.5 * bend * bend, 1.2 * PIXEL)
    gastric *= ramp(0.68 + 0.06 * variant[3] - downward + margin, PIXEL)

    # Loops seen from their side, along the sternum.
    period = (downward + 0.05 * variant[2]) * (1 / 0.125)
    offset = (period - jnp.round(period)) * 0.125
    wire = ((across - view.front + 0.045) / 0.040) ** 2 + (offset / 0.013) ** 2
    wires = ramp(1.0 + 25 * margin - wire, 0.4) * ramp(0.24 - downward, 0.01)
    wires *= ramp(downward + 0.55, 0.01)
    drawings = {
        Device.ENDOTRACHEAL_TUBE: in_trachea,
        Device.CENTRAL_LINE: vein,
        Device.PACEMAKER: pacemaker,
        Device.NASOGASTRIC_TUBE: gastric,
        Device.STERNAL_WIRES: wires,
    }
    return [drawing * scene["device"][device] for device, drawing in drawings.items()]


# ---- The film --------------------------------------------------------------------------------------


def _attenuation(scene: Tree, hidden: jax.Array, view: Profile) -> tuple[jax.Array, jax.Array]:
    """Attenuation along each ray, and metal in 0..1."""
    anatomy = scene["anatomy"]
    places = {finding: place_of(scene, hidden, view, finding) for finding in Finding}
    cardiac, pedicle = heart(_as_frontal(scene, hidden), view), mediastinum(scene, view)
    is_on_both = scene["side"][Finding.PLEURAL_EFFUSION] == BOTH
    fluid = effusion(places[Finding.PLEURAL_EFFUSION], view, is_on_both)
    free_air, pleural_line = pneumothorax(places[Finding.PNEUMOTHORAX], view)
    fill = _remaining_air(scene, places, view)
    fill *= (1.0 - 0.55 * cardiac) * (1.0 - 0.45 * pedicle) * (1.0 - 0.92 * fluid)

    # ---- The body ----
    lung_air = view.lung * fill * (1.0 + 0.10 * free_air)
    attenuation = (2.30 + 0.22 * anatomy[Anatomy.HABITUS]) * trunk(scene, view) - 1.45 * lung_air
    attenuation += 0.30 * cardiac + 0.16 * pedicle
    lowest = jnp.maximum(view.diaphragm_right, view.diaphragm_left)
    belly = ramp(view.downward - lowest, 0.03) * ramp(view.depth + 0.06, 0.03)
    attenuation += 0.42 * jnp.maximum(belly, fluid * ramp(view.depth, 0.02))
    hila = bump(((view.across - HILUM) / 0.12) ** 2 + ((view.downward + 0.01) / 0.15) ** 2)
    attenuation += 0.22 * hila
    vessels = 0.42 + 0.10 * anatomy[Anatomy.VESSELS]
    vessels *= 1.0 + 0.8 * places[Finding.EDEMA].amount
    attenuation += vessels * _vessels(scene) * view.lung * fill * (1.0 - 0.5 * free_air)

    # ---- What is added ----
    attenuation += _added_findings(scene, places, view)
    attenuation += 0.40 * places[Finding.PNEUMOTHORAX].amount * pleural_line
    attenuation += bones(scene, view) * (1.0 - 0.35 * cardiac) - 0.42 * airways(view)
    # The air of the stomach marks the left dome.
    bubble = chord(
        ((view.across + 0.02 - 0.05 * anatomy[Anatomy.STOMACH]) / 0.15) ** 2
        + ((view.downward - view.thorax.dome_left - 0.14) / 0.075) ** 2
    )
    attenuation -= 0.60 * (0.6 + 0.4 * anatomy[Anatomy.STOMACH]) * bubble
    metal = devices(scene, view)
    for device, drawing in zip(Device, metal, strict=True):
        attenuation += (1.1 if device == Device.STERNAL_WIRES else 0.9) * drawing
    solid = jnp.max(jnp.stack(metal), 0)
    return jnp.maximum(attenuation, 0.0), jnp.minimum(solid, 1.0)


def _remaining_air(scene: Tree, places: dict[Finding, Place], view: Profile) -> jax.Array:
    """The share of air that disease leaves in the lungs; a finding of one leaves the other before it."""
    fluff = smooth_noise(noise_seed(scene, FLUFF), 30)
    amount = {finding: place.amount for finding, place in places.items()}
    severity = scene["severity"][Finding.PNEUMONIA]
    envelope = pneumonia(places[Finding.PNEUMONIA], view, severity)
    patches = ramp(envelope * 1.5 - 0.70 + 0.35 * fluff, 0.60) * ramp(envelope - 0.05, 0.05)
    wet = edema(view) * amount[Finding.EDEMA] * (0.85 + 0.18 * fluff)
    lobe = consolidation(places[Finding.CONSOLIDATION], view)
    pleura = thickening(places[Finding.PLEURAL_OTHER], view)
    return (
        (1.0 - 0.80 * wet)
        * (1.0 - 0.62 * patches * amount[Finding.PNEUMONIA])
        * (1.0 - 0.66 * lobe * amount[Finding.CONSOLIDATION])
        * (1.0 - 0.60 * pleura * amount[Finding.PLEURAL_OTHER])
    )


def _added_findings(scene: Tree, places: dict[Finding, Place], view: Profile) -> jax.Array:
    """What adds to the attenuation instead of taking air."""
    place = places[Finding.LUNG_LESION]
    added = 0.95 * place.amount * lesion(place, view, scene["severity"][Finding.LUNG_LESION])
    place = places[Finding.ATELECTASIS]
    added += 0.85 * place.amount * atelectasis(place, view)
    place = places[Finding.PLEURAL_OTHER]
    added += 0.35 * place.amount * thickening(place, view)
    place = places[Finding.FRACTURE]
    gap, ends = fracture(place, view)
    return added + place.amount * (0.30 * ends - 0.35 * gap)


def _vessels(scene: Tree) -> jax.Array:
    """The trees of both lungs, one running forwards from the hila and one backwards."""
    acquisition, bank = scene["acq"], jnp.asarray(tree_bank())
    centres = pixel_centres(SIZE)
    across = (centres - acquisition[Acquisition.SHIFT_X]) / acquisition[
        Acquisition.MAGNIFICATION
    ] - HILUM
    down = (centres - acquisition[Acquisition.SHIFT_Y]) / acquisition[Acquisition.MAGNIFICATION]
    # A tree begins at 0.15 from the midline of the frontal; here it begins at the hila.
    lateral = jnp.abs(across) * 1.15 + 0.10
    columns = hat(
        (lateral - TREE_LATERAL[0]) * ((TREE - 1) / (TREE_LATERAL[1] - TREE_LATERAL[0])), TREE
    )
    rows = hat((down - TREE_DOWN[0]) * ((TREE - 1) / (TREE_DOWN[1] - TREE_DOWN[0])), TREE)
    trees = [
        rows @ bank[(acquisition[place] * TREES).astype(jnp.int32)]
        for place in (Acquisition.TREE_RIGHT, Acquisition.TREE_LEFT)
    ]
    forward = trees[0] @ (columns * (across <= 0)[:, None]).T
    return forward + trees[1] @ (columns * (across > 0)[:, None]).T


# ---- Region maps -----------------------------------------------------------------------------------


def regions(scene: Tree, hidden: jax.Array, keys: jax.Array) -> jax.Array:
    """Tell how much of each 28 px cell of lateral films is in a finding's region, float32 [B,12,8,8].

    As `phantom.regions` of frontal ones; arguments as for `render`.
    """
    return jax.vmap(_region_maps)(scene, hidden, keys) * region_weights(scene)


@jax.jit
def _region_maps(scene: Tree, hidden: jax.Array, key: jax.Array) -> jax.Array:
    film, margin = film_of(scene, key), 4 * PIXEL
    view = profile(_as_frontal(film, hidden), CELLS * 7)
    severity = scene["severity"]
    places = {finding: place_of(film, hidden, view, finding) for finding in Finding}
    is_on_both = scene["side"][Finding.PLEURAL_EFFUSION] == BOTH
    # The same drawings as on the film, on fewer pixels.
    air, line = pneumothorax(places[Finding.PNEUMOTHORAX], view)
    gap, ends = fracture(places[Finding.FRACTURE], view)
    spots = {
        name: draw(places[name], view, severity[name])
        for name, draw in ((Finding.LUNG_LESION, lesion), (Finding.PNEUMONIA, pneumonia))
    }
    masks = {
        Finding.ENLARGED_CARDIOMEDIASTINUM: ramp(mediastinum(film, view) - 0.3, 0.1)
        * ramp(0.10 - view.downward, 0.05),
        Finding.CARDIOMEGALY: (heart(film, view) > 0) * 1.0,
        Finding.LUNG_LESION: (spots[Finding.LUNG_LESION] > 0) * 1.0,
        Finding.EDEMA: ramp(edema(view) - 0.2, 0.1),
        Finding.CONSOLIDATION: consolidation(places[Finding.CONSOLIDATION], view),
        Finding.PNEUMONIA: ramp(spots[Finding.PNEUMONIA] - 0.3, 0.1),
        Finding.ATELECTASIS: atelectasis(places[Finding.ATELECTASIS], view, margin),
        Finding.PNEUMOTHORAX: jnp.maximum(air, line),
        Finding.PLEURAL_EFFUSION: effusion(places[Finding.PLEURAL_EFFUSION], view, is_on_both),
        Finding.PLEURAL_OTHER: thickening(places[Finding.PLEURAL_OTHER], view),
        Finding.FRACTURE: jnp.maximum(gap, ends),
        Finding.SUPPORT_DEVICES: jnp.minimum(
            jnp.max(jnp.stack(devices(film, view, margin)), 0), 1.0
        ),
    }
    size = jnp.ones((CELLS * 7, CELLS * 7), jnp.float32)
    return cover(jnp.stack([masks[finding] * size for finding in Finding]))
