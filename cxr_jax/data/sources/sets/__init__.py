"""The data sets that are read in their own layouts, by name: a file each, imported when it is asked for."""

import importlib
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_jax.data.sources.films import Films, checks
from cxr_jax.data.sources.films.tables import NoTableError
from cxr_jax.errors import UserError

_HERE = "cxr_jax.data.sources.sets."


# One function of two arguments each, so that a new set is a new file and a line here.
class DataSet(NamedTuple):
    """Where the reader of a set is: a function of the root and the kind of labels."""

    module: str
    function: str = "read"


SETS = {
    "chexpert": DataSet(_HERE + "chexpert"),
    "chexpert_test": DataSet(_HERE + "chexpert", "read_test"),
    "chexpert_plus": DataSet(_HERE + "chexpert_plus"),
    "mimic": DataSet(_HERE + "mimic"),
    "nih": DataSet(_HERE + "nih"),
    "vindr": DataSet(_HERE + "vindr"),
    "padchest": DataSet(_HERE + "padchest"),
    "padchest_gr": DataSet(_HERE + "padchest_gr"),
    "openi": DataSet(_HERE + "openi"),
    "brax": DataSet(_HERE + "brax"),
    "rsna": DataSet(_HERE + "rsna"),
    "siim": DataSet(_HERE + "siim"),
    "rexgradient": DataSet(_HERE + "rexgradient"),
    "nv_reason": DataSet(_HERE + "nv_reason"),
    "tfds": DataSet("cxr_jax.data.sources.tfds"),
}
# Folders of films that a set's tables stand beside.
_SPLIT_FOLDERS = {
    "train": "train",
    "valid": "valid",
    "validate": "valid",
    "val": "valid",
    "test": "test",
}


def open_films(name: str, data_root: str | Path, label_kind: str = "") -> Films:
    """Read the tables of a data set.

    Args:
        name: of SETS.
        data_root: its folder; the folder of one split, for that split alone; or the table itself.
        label_kind: which of the set's kinds of labels, "" for its usual ones; the head of its file lists them.

    Raises:
        UserError: naming the file, the line and the reason.
    """
    if name not in SETS:
        raise UserError(f"{name!r} is no data set; there are {', '.join(SETS)}")
    # ---- The reader, imported now: no set pays for another ----
    data_set = SETS[name]
    try:
        module = importlib.import_module(data_set.module)
    except ModuleNotFoundError as error:
        if error.name != data_set.module:
            raise
        raise UserError(
            f"the data set {name} cannot be read yet: {data_set.module} is missing"
        ) from None
    # ---- Which labels ----
    kinds = getattr(module, "LABELS", ())
    if label_kind and label_kind not in kinds:
        raise UserError(
            f"labels={label_kind} is none of {name}'s ({', '.join(kinds) or 'it has one kind'})"
        )
    # ---- Its tables, held to what every set is ----
    data_root = Path(data_root)
    _check_root(data_root)
    try:
        return checks.check(_read(getattr(module, data_set.function), data_root, label_kind))
    except OSError as error:
        # A folder that may not be listed, a disk that has gone.
        raise UserError(f"{error.filename or data_root}: {error.strerror}") from None


def _check_root(data_root: Path) -> None:
    """Refuse what cannot be looked at; what is not there the reader of the set knows to say."""
    try:
        mode = os.stat(data_root).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        # A NUL in a name is a ValueError.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{data_root}: {reason}") from None
    # A device or a pipe has no end, or can be read once.
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{data_root}: is neither a folder nor a file")


def _read(read: object, data_root: Path, label_kind: str) -> Films:
    """Read the tables, or those beside the folder of one split."""
    try:
        return read(data_root, label_kind)  # type: ignore[operator]
    except NoTableError:
        # "." has no name of its own.
        split = _SPLIT_FOLDERS.get(Path(os.path.abspath(data_root)).name.lower())
        if split is None or not data_root.is_dir():
            raise
        return _read_split(read, data_root, split, label_kind)


def _read_split(read: object, data_root: Path, split: str, label_kind: str) -> Films:
    """Read the tables beside a folder of films, for the films of its split."""
    # Splits are spelt in several ways, also between a folder and its table.
    parent = data_root.parent if data_root.name else data_root / ".."
    films: Films = read(parent, label_kind)  # type: ignore[operator]
    chosen = np.array([_SPLIT_FOLDERS.get(name, name) == split for name in films.splits], bool)
    if not chosen.any():
        raise UserError(f"{data_root}: the tables beside it list no film of this split")
    return replace(films.select(chosen), root=data_root)
