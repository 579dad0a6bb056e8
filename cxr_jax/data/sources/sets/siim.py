"""SIIM-ACR Pneumothorax Segmentation 2019: train-rle.csv, a row a mask, -1 for none; only Pneumothorax is annotated.

Films are DICOM in folders of study and series that the table does not name: they are looked for by their own name.
"""

import re
from pathlib import Path

import numpy as np

from cxr_jax.data.sources import maps
from cxr_jax.data.sources.films import Films, as_texts, no_states
from cxr_jax.data.sources.films.header_views import read_views
from cxr_jax.data.sources.films.tables import Columns, find_table, folder_of
from cxr_jax.labels.taxonomy import INDEX, NEGATIVE, POSITIVE

TABLES = ("train-rle.csv", "stage_2_train.csv", "stage_1_train*.csv", "train-rle*.csv")
_FOLDERS = ("", "siim*", "SIIM*")
IMAGES = "dicom-images-train"
# -1.0 as pandas writes it; a mask is pairs of a start and a length, and one that a spreadsheet has
# cut off in a pair still is one.
_NONE = re.compile(r"-1(?:\.0*)?")
_MASK = re.compile(r"\d+(?: +\d+)+")


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the masks; several of one film are one."""
    table = find_table(data_root, TABLES, _FOLDERS)
    columns = Columns(table, ("ImageId", "EncodedPixels"))
    # A film has as many rows as masks.
    has_mask: dict[str, bool] = {}
    first_lines: dict[str, int] = {}
    masks = columns.decode("EncodedPixels", _read_mask, "EncodedPixels is no mask and no -1")
    for mask_row, (film, mask) in enumerate(zip(columns.ids("ImageId"), masks, strict=True)):
        first_lines.setdefault(film, columns.lines[mask_row])
        if has_mask.setdefault(film, mask) != mask:
            raise columns.error(mask_row, "the film has a mask and -1 for none")
    films = list(has_mask)
    # Nothing but pneumothorax was looked for.
    states = no_states(len(films))
    states[:, INDEX["Pneumothorax"]] = np.where(list(has_mask.values()), POSITIVE, NEGATIVE)
    root = folder_of(data_root)
    paths = _find_files(root)
    views, note = read_views([root / paths[film] if film in paths else None for film in films])
    return Films(
        name="siim",
        root=data_root,
        ids=as_texts(films),
        images=as_texts([paths.get(film, f"{IMAGES}/{film}.dcm") for film in films]),
        patients=as_texts(films),
        studies=as_texts(films),
        views=as_texts(views),
        splits=as_texts([""] * len(films)),
        states=states,
        tables=(table,),
        lines=np.array(list(first_lines.values())),
        basis="radiologists' masks",
        label_map=str(maps.load_map("siim")),
        has_patients=False,
        image_folders=("siim*", "SIIM*"),
        suffixes=(".png", ".jpg"),
        notes=(note,),
    )


def _read_mask(cell: str) -> bool:
    """Whether there is one."""
    if _NONE.fullmatch(cell):
        return False
    # Anything else would count as a pneumothorax.
    if not _MASK.fullmatch(cell):
        raise ValueError
    return True


def _find_files(data_root: Path) -> dict[str, str]:
    """The path of each film below the root by its name, one listing a folder."""
    # Names are unique in the set: each holds a UID.
    found_place: dict[str, str] = {}
    for base in (
        data_root,
        *(path for name in _FOLDERS[1:] for path in sorted(data_root.glob(name))),
    ):
        for path in sorted((base / IMAGES).rglob("*.dcm")):
            found_place.setdefault(path.stem, path.relative_to(data_root).as_posix())
    return found_place
