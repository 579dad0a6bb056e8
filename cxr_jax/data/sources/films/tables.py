"""What readers of published tables share: finding them below a root, columns with the lines they came from, cells.

Every problem is a `UserError` that names file and line, and no cell is shown: it may be a name.
"""

import fnmatch
import json
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.data import json_rows
from cxr_jax.data.dicom import words
from cxr_jax.data.sources.films import VIEWS
from cxr_jax.data.sources.image_files import PLAIN_NAME, BadNameError, split_name
from cxr_jax.data.sources.patients import LostDigitsError, clean_id
from cxr_jax.data.sources.table import DELIMITERS, Table, column_key, is_blank, read_state
from cxr_jax.errors import UserError, shown
from cxr_jax.labels.taxonomy import CHEXPERT_14, NOT_MENTIONED, PATHOLOGY

# ---- Files -----------------------------------------------------------------------------------------


class NoTableError(UserError):
    """There is no table of this set below the root."""


def find_tables(root: Path, names: Sequence[str], folders: Sequence[str] = ("",)) -> list[Path]:
    """Find the tables of a set, also compressed (.gz); of one that is there twice the uncompressed.

    Args:
        names: patterns of file names, the better ones first; case does not count.
        folders: patterns of folders below the root, "" for itself, the better ones first.

    Returns:
        Those that fit, in the order of folders, then names. A root that is a file is the table itself.
    """
    # Its name says nothing then: somebody knows what it is.
    if root.is_file():
        return [root]
    # By the uncompressed name, so that a table counts once.
    found: dict[str, Path] = {}
    for pattern in folders:
        for folder in sorted(root.glob(pattern)) if pattern else [root]:
            if not folder.is_dir():
                continue
            # Plain before compressed.
            if not pattern:
                # A root that may not be listed is refused; another folder is passed by.
                os.listdir(folder)
            files = sorted(list_folder(folder))
            for name in names:
                for file in sorted(
                    (file for file in files if _fits(file, name)), key=lambda f: f.endswith(".gz")
                ):
                    plain = str(folder / file.removesuffix(".gz"))
                    found.setdefault(plain, folder / file)
    return list(found.values())


def _fits(file: str, pattern: str) -> bool:
    # What an editor or a system leaves beside a table begins with a dot.
    plain = file.lower().removesuffix(".gz")
    return not file.startswith(".") and fnmatch.fnmatchcase(plain, pattern.lower())


def folder_of(data_root: Path) -> Path:
    """Give the folder of a set: a root that is a table stands for the folder that it is in."""
    # A folder that is not there has no parent to look in, either.
    return data_root.parent if data_root.is_file() else data_root


def find_table(root: Path, names: Sequence[str], folders: Sequence[str] = ("",)) -> Path:
    """Find the best table.

    Raises:
        NoTableError: if there is none.
    """
    # Most often the root is one folder off, or not there at all.
    found = find_tables(root, names, folders)
    if not found:
        if not root.is_dir():
            raise NoTableError(f"{root}: no such folder or file")
        raise NoTableError(f"{root}: holds no {' and no '.join(names)} (.gz or not)")
    return found[0]


def list_folder(folder: Path) -> list[str]:
    """List what is in a folder; nothing of one that is not there, or may not be listed."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def read_json(path: Path) -> Any:
    """Read a file that holds one JSON value.

    Raises:
        UserError: naming the line where it is none.
    """
    try:
        # Compressed or with a byte order mark, as rows of JSON may be.
        text = json_rows.read_content(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    # NaN is read: pandas writes it where a value is missing.
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _TwiceError as error:
        raise UserError(f"{path}: the key {shown(error)} stands twice in one object") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None


class _TwiceError(ValueError):
    """The key that an object has twice: two readers would take different values."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found_keys = dict(pairs)
    if len(found_keys) < len(pairs):
        key_names = [key_name for key_name, _ in pairs]
        raise _TwiceError(next(key_name for key_name in key_names if key_names.count(key_name) > 1))
    return found_keys


# ---- Columns ---------------------------------------------------------------------------------------


class Columns:
    """Some columns of a table, by name, whatever the spelling.

    Attributes:
        path: of the table.
        lines: of the file, of each row.
    """

    def __init__(self, path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
        """Read a table.

        Args:
            needed: columns without which the table is refused.
            optional: columns that are read where they are there.

        Raises:
            UserError: for a column that is missing or stands there twice, cells that no comma or tab divides, a row
                with other cells than the header, no rows.
        """
        self.path = path
        # ---- The header ----
        table = Table(path, [*needed, *optional])
        names = {name: table.columns([name]) for name in (*needed, *optional)}
        missing = next((name for name in needed if not names[name]), None)
        between = DELIMITERS[table.delimiter]
        if missing is not None:
            raise UserError(f"{path}: no column {missing!r} (cells are separated by {between})")
        # Published with commas: what is not has gone through a spreadsheet, which rounds ids and swaps decimal points.
        if table.delimiter not in (",", "\t"):
            raise UserError(
                f"{path}: no column {needed[0]!r} that commas divide: cells are separated by {between}"
            )
        # ---- The rows: of a large table only the cells that somebody reads are kept ----
        places = {name: table.names.index(found[0]) for name, found in names.items() if found}
        # One column alone would be its cell.
        pick = operator.itemgetter(*places.values(), -1)
        picked: list[tuple[str, ...]] = []
        self.lines: list[int] = []
        for line, cells in table.rows():
            self.lines.append(line)
            picked.append(pick(cells))
        if not picked:
            raise UserError(f"{path}: has a header and no rows")
        cells_of = map(list, zip(*picked, strict=True))
        self._columns = dict(zip(map(column_key, places), cells_of, strict=False))

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.lines)

    def __contains__(self, name: str) -> bool:
        """Tell whether the table has an optional column."""
        return column_key(name) in self._columns

    def __getitem__(self, name: str) -> list[str]:
        """Give the cells of a column, without space around; blank ones of an optional column that is not there."""
        cells = self._columns.get(column_key(name))
        if cells is None:
            return [""] * len(self)
        return [cell.strip() for cell in cells]

    def error(self, row: int, reason: object) -> UserError:
        """Make the error of a row."""
        return UserError(f"{self.path}:{self.lines[row]}: {reason}")

    def ids(self, name: str) -> list[str]:
        """Read a column of ids as text: 12345.0 is 12345.

        Raises:
            UserError: for a blank one, and one that a program has rounded.
        """
        # Most ids stand in several rows.
        found: dict[str, str | None] = {}
        cells = self[name]
        for row, cell in enumerate(cells):
            if cell not in found:
                try:
                    found[cell] = clean_id(cell)
                except LostDigitsError:
                    raise self.error(
                        row, f"{name} is a rounded number: read its column as text"
                    ) from None
            # A film of nobody would be a patient of its own in a split.
            if found[cell] is None:
                raise self.error(row, f"{name} is blank")
        return [found[cell] or "" for cell in cells]

    def paths(self, name: str) -> list[str]:
        """Read a column of image paths below a root, with / between, each once.

        Raises:
            UserError: for one that leaves the root, or stands there twice.
        """
        paths = []
        for row, cell in enumerate(self[name]):
            # Nearly all are plain: nothing to split.
            if not PLAIN_NAME.fullmatch(cell):
                try:
                    cell = "/".join(split_name(cell))
                except BadNameError as reason:
                    raise self.error(row, reason) from None
            paths.append(cell)
        self.check_once(paths)
        return paths

    def check_once(self, keys: Sequence[object], what: str = "the row") -> None:
        """Refuse rows that say again what one before them said.

        Raises:
            UserError: naming both lines.
        """
        # By hash: a large table would take minutes row against row.
        first: dict[object, int] = {}
        for row, key in enumerate(keys):
            before = first.setdefault(key, row)
            if before != row:
                raise self.error(row, f"{what} is that of line {self.lines[before]}")

    def states(self, labels: Sequence[str] = CHEXPERT_14) -> np.ndarray:
        """Read the columns of labels: int8 [rows, len(labels)], -2 where a cell is blank.

        Raises:
            UserError: naming line and column of a cell that is no state; it is not shown: it may be a name.
        """
        # By column: most tables hold few distinct cells.
        states = np.empty((len(self), len(labels)), np.int8)
        for place, label in enumerate(labels):
            states[:, place] = self.decode(
                label, _state_code, f"{label} is not one of 1, 0, -1, U, blank"
            )
        return states

    def decode(self, name: str, read: Callable[[str], Any], reason: str) -> list[Any]:
        """Read a column by a function, which sees every distinct cell once.

        Raises:
            UserError: naming the line of a cell of which `read` raises ValueError.
        """
        # Unstripped, so that a cell is found again by its own text.
        cells = self._columns.get(column_key(name)) or self[name]
        found: dict[str, Any] = {}
        for cell in dict.fromkeys(cells):
            try:
                found[cell] = read(cell.strip())
            except ValueError:
                raise self.error(cells.index(cell), reason) from None
        return [found[cell] for cell in cells]


def _state_code(cell: str) -> int:
    state = read_state(cell)
    # Zero is a state.
    if state is None:
        return NOT_MENTIONED
    return state


# ---- Cells -----------------------------------------------------------------------------------------


def read_view(text: str) -> str:
    """Read a view: one of `films.VIEWS`; UNKNOWN for what is neither frontal nor lateral, too."""
    # "none" is a blank cell; a view of that name there is not.
    view = "" if is_blank(text) else words.view_of_position(text)
    return view if view in VIEWS else "UNKNOWN"


def read_sex(text: str) -> str:
    """Read a sex: F, M, or "" for anything else."""
    # O, Other and Unknown are none of the two.
    letter = text.strip()[:1].upper()
    return letter if letter in ("F", "M") else ""


def read_number(text: str) -> int:
    """Read a whole number, -1 for anything else."""
    if text.isdecimal():
        return int(text)
    return -1


_AGE = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*([a-z]*)\b.*", re.IGNORECASE)
_YEARS = {"y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25}
# Units in words, cut to their beginning; any other word (85 or more) leaves years.
_UNIT = re.compile(
    r"(?:(y)(?:rs?|ears?|/?o)?|(m)(?:os?|ths?|onths?)?|(w)(?:ks?|eeks?)?|(d)(?:ays?)?)$"
)


def read_age(text: str) -> float:
    """Read an age in years: 58, 058Y, 007M, 002D, "6 months", "85 or more"; NaN for anything else."""
    # Years without a unit; what follows a number (85 or more) leaves it as it is.
    found = _AGE.fullmatch(text.strip())
    if found is None:
        return float("nan")
    unit = _UNIT.match(found[2].lower())
    return float(found[1]) * (_YEARS[unit[0][0]] if unit else 1.0)


def read_ages(cells: Sequence[str]) -> np.ndarray:
    """Read ages: float32 [N]."""
    # Of some hundred thousand rows some hundred distinct ages.
    known = {cell: read_age(cell) for cell in dict.fromkeys(cells)}
    return np.array([known[cell] for cell in cells], np.float32)


def count_contradictions(states: np.ndarray) -> Iterator[str]:
    """Say how many films have No Finding beside a finding: kept as given."""
    # Devices may stand beside No Finding: train.csv of CheXpert has 8,808 such rows.
    both = (states[:, 0] == 1) & ((states == 1) & np.array(PATHOLOGY)).any(axis=1)
    if count := int(both.sum()):
        yield f"{count:,} films have No Finding together with a finding: kept as given"


def count_divided_studies(studies: Sequence[str], states: np.ndarray) -> Iterator[str]:
    """Say how many studies have films with other labels than their first: labels are of studies, so one is wrong."""
    first_states: dict[str, bytes] = {}
    divided = set()
    for study, state_row in zip(studies, states, strict=True):
        if first_states.setdefault(study, state_row.tobytes()) != state_row.tobytes():
            divided.add(study)
    if divided:
        yield f"{len(divided):,} studies have films with different labels: kept as given"
