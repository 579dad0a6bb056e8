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

POOL, TILE, BAR = 4000, 448, 26
PATIENTS = 3


def _pool(hospital):
    scene = jax.tree.map(
        np.asarray, sample_scenes(example_keys(11, "test", hospital, np.arange(POOL)), hospital)
    )
    return scene, np.asarray(labels(scene))


def _choose(scene, state, label, wanted):
    """Index of a scene that shows the label at the wanted level with as little else as possible."""
    severity = scene["severity"]
    others = (severity > 0).sum(1)
    column = state[:, CHEXPERT_14.index(label)]
    name = label.lower().replace(" ", "_")
    own = severity[:, FINDINGS.index(name)] if name in FINDINGS else severity[:, 2:7].max(1)
    if label in ("No Finding", "Support Devices"):
        fits = (column == 1) & (others == (label == "Support Devices"))
        if label == "Support Devices":  # a different device in each tile
            fits &= scene["device"][:, {"clear": 0, "moderate": 2, "subtle": 4, "B": 3}[wanted]]
        return int(np.flatnonzero(fits)[{"moderate": 1, "subtle": 2}.get(wanted, 0)])
    level = {
        "clear": (own > 0.8) & (column == 1),
        "moderate": (own >= POSITIVE_AT) & (own < 0.6) & (column == 1),
        "subtle": column == -1,
        "B": column == 1,
    }[wanted]
    return int(np.argmin(np.where(level, others, 99)))


def contact_sheet() -> Image.Image:
    """The sheet as an image: 14 rows of 4 captioned phantoms, each enlarged twice."""
    pools = {h: _pool(h) for h in "AB"}
    columns = (("clear", "A"), ("moderate", "A"), ("subtle", "A"), ("B", "B"))
    sheet = Image.new("L", (len(columns) * TILE, len(CHEXPERT_14) * (TILE + BAR)), 255)
    pen = ImageDraw.Draw(sheet)
    draw = jax.jit(render)
    for row, label in enumerate(CHEXPERT_14):
        for col, (wanted, hospital) in enumerate(columns):
            scene, state = pools[hospital]
            i = _choose(scene, state, label, wanted)
            image = np.asarray(draw({k: v[i : i + 1] for k, v in scene.items()}))[0]
            tile = Image.fromarray((image * 255).astype(np.uint8)).resize(
                (TILE, TILE), Image.NEAREST
            )
            sheet.paste(tile, (col * TILE, row * (TILE + BAR) + BAR))
            level = "" if wanted == "B" or label in ("No Finding", "Support Devices") else wanted
            pen.text(
                (col * TILE + 8, row * (TILE + BAR) + 6),
                f"{label} {level} (hospital {hospital})",
                fill=0,
            )
    return sheet.quantize(64)  # 64 greys keep the file small


def sites_sheet(sites: int, seed: int = 1) -> Image.Image:
    """A captioned cell for hospital A and for each site, three to a row: the same patients in all of them."""
    patients = np.arange(PATIENTS)
    pictures = [make_batch(seed, "train", "A", patients)["image"]]
    pictures += [
        make_batch(seed, "train", "A", patients, np.full(PATIENTS, k))["image"]
        for k in range(sites)
    ]
    rows = -(-len(pictures) // 3)
    sheet = Image.new("L", (3 * PATIENTS * SIZE, rows * (SIZE + BAR)), 255)
    pen = ImageDraw.Draw(sheet)
    for cell, images in enumerate(pictures):
        x, y = cell % 3 * PATIENTS * SIZE, cell // 3 * (SIZE + BAR)
        pen.text((x + 8, y + 6), f"site {cell - 1}" if cell else "hospital A", fill=0)
        strip = (np.concatenate(list(images), axis=1) * 255).astype(np.uint8)
        sheet.paste(Image.fromarray(strip), (x, y + BAR))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="docs/phantom_contact_sheet.png")
    parser.add_argument("--sites", type=int, default=0)
    args = parser.parse_args()
    out = args.out
    (sites_sheet(args.sites) if args.sites else contact_sheet()).save(out, optimize=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
