"""Draw the contact sheet: for each label four phantoms, clear, moderate, subtle and from hospital B.

Use: python scripts/phantom_sheet.py [--out docs/phantom_contact_sheet.png]
With --sites=8, three patients in hospital A and at that many random sites around it.
"""

import argparse

import jax
import numpy as np
from PIL import Image, ImageDraw

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.phantom import (
    FINDINGS,
    POSITIVE_AT,
    SIZE,
    example_keys,
    labels,
    make_batch,
    render,
    sample_scenes,
)
from cxr_jax.phantom.report_writer import LARGE_AT, MODERATE_AT
from cxr_jax.runtime.trees import Tree

POOL = 4000  # scenes of a hospital that the pictures are chosen from
TILE, CAPTION = 448, 26  # pixels: side of a picture, height of the line over it
GREYS = 64  # keep the file small
PATIENTS = 3
LEVELS = (("clear", "A"), ("moderate", "A"), ("subtle", "A"), ("B", "B"))  # with their hospitals
UNGRADED = ("No Finding", "Support Devices")
# Which of the fitting scenes without findings, and which device, each tile shows.
CLEAN_CHOICE = {"moderate": 1, "subtle": 2}
DEVICE_CHOICE = {"clear": 0, "moderate": 2, "subtle": 4, "B": 3}


def _pool(hospital: str) -> tuple[Tree, np.ndarray]:
    """Scenes of a hospital and their labels int8 [POOL, 14]."""
    keys = example_keys(11, "test", hospital, np.arange(POOL))
    scenes = jax.tree.map(np.asarray, sample_scenes(keys, hospital))
    return scenes, np.asarray(labels(scenes))


def _choose(scenes: Tree, states: np.ndarray, label: str, level: str) -> int:
    """Index of a scene that shows the label at a level with as little else as possible."""
    severity = scenes["severity"]
    findings_count = (severity > 0).sum(1)
    state = states[:, CHEXPERT_14.index(label)]
    if label in UNGRADED:
        is_device = label == "Support Devices"
        fits = (state == 1) & (findings_count == is_device)
        if is_device:  # a different device in each tile
            fits &= scenes["device"][:, DEVICE_CHOICE[level]]
        return int(np.flatnonzero(fits)[CLEAN_CHOICE.get(level, 0)])

    name = label.lower().replace(" ", "_")
    if name in FINDINGS:
        own = severity[:, FINDINGS.index(name)]
    else:  # Lung Opacity is as severe as its worst part
        own = severity[:, 2:7].max(1)
    fits = {
        "clear": (own > LARGE_AT) & (state == 1),
        "moderate": (own >= POSITIVE_AT) & (own < MODERATE_AT) & (state == 1),
        "subtle": state == -1,
        "B": state == 1,
    }[level]
    return int(np.argmin(np.where(fits, findings_count, 99)))


def contact_sheet() -> Image.Image:
    """Draw the sheet: 14 rows of 4 captioned phantoms, each enlarged twice."""
    pools = {hospital: _pool(hospital) for hospital in "AB"}
    sheet = Image.new("L", (len(LEVELS) * TILE, len(CHEXPERT_14) * (TILE + CAPTION)), 255)
    pen = ImageDraw.Draw(sheet)
    draw = jax.jit(render)
    for row, label in enumerate(CHEXPERT_14):
        for column, (level, hospital) in enumerate(LEVELS):
            scenes, states = pools[hospital]
            index = _choose(scenes, states, label, level)
            scene = {name: values[index : index + 1] for name, values in scenes.items()}
            image = (np.asarray(draw(scene))[0] * 255).astype(np.uint8)
            tile = Image.fromarray(image).resize((TILE, TILE), Image.NEAREST)
            left, top = column * TILE, row * (TILE + CAPTION)
            sheet.paste(tile, (left, top + CAPTION))
            shown_level = "" if level == "B" or label in UNGRADED else level
            caption = f"{label} {shown_level} (hospital {hospital})"
            pen.text((left + 8, top + 6), caption, fill=0)
    return sheet.quantize(GREYS)


def sites_sheet(sites: int, seed: int = 1) -> Image.Image:
    """Draw a captioned cell for hospital A and for each site, three to a row: the same patients in all of them."""
    patients = np.arange(PATIENTS)
    pictures = [make_batch(seed, "train", "A", patients)["image"]]
    pictures += [
        make_batch(seed, "train", "A", patients, np.full(PATIENTS, site))["image"]
        for site in range(sites)
    ]
    rows = -(-len(pictures) // 3)
    sheet = Image.new("L", (3 * PATIENTS * SIZE, rows * (SIZE + CAPTION)), 255)
    pen = ImageDraw.Draw(sheet)
    for cell, images in enumerate(pictures):
        left, top = cell % 3 * PATIENTS * SIZE, cell // 3 * (SIZE + CAPTION)
        pen.text((left + 8, top + 6), f"site {cell - 1}" if cell else "hospital A", fill=0)
        strip = (np.concatenate(list(images), axis=1) * 255).astype(np.uint8)
        sheet.paste(Image.fromarray(strip), (left, top + CAPTION))
    return sheet


def main() -> None:
    """Write the sheet that the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="docs/phantom_contact_sheet.png")
    parser.add_argument("--sites", type=int, default=0)
    args = parser.parse_args()
    sheet = sites_sheet(args.sites) if args.sites else contact_sheet()
    sheet.save(args.out, optimize=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
