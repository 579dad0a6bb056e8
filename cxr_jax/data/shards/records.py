"""The records of a shard by position, and films in shards under the names of files.

A film in a shard is named as if the shard were a folder: `films-train.array_record-00000-of-00004/17` is record 17. No
file can have such a name, since a shard is no folder, so every reader of images takes it in the place of a file's.
"""

import collections
import contextlib
import importlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cxr_jax.data.shards.examples import BadExampleError, Value, decode
from cxr_jax.errors import UserError

_SHARD = re.compile(r".*\.(?P<format>array_record|parquet)-\d{5,}-of-\d{5,}")
IMAGE = "image"  # the feature that holds the film
# To the letter what its documentation gives for random access: the default reads ahead by megabytes.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_OPEN_FILES = 64  # shards that are kept open


def is_member(shard_path: str | Path) -> bool:
    """Tell whether a path names a record of a shard that is there."""
    # By its name first, which costs nothing: every film that is read is asked this.
    shard_path = Path(shard_path)
    is_named = bool(_SHARD.fullmatch(shard_path.parent.name)) and shard_path.name.isdecimal()
    return is_named and shard_path.name.isascii() and shard_path.parent.is_file()


def read_film(shard_path: Path) -> bytes:
    """Read the film that a path names, see `is_member`: the bytes of its file.

    Raises:
        UserError: for a record that is not there, is damaged, or has no film.
    """
    # Whatever else the record has is decoded with it: it is small beside a film.
    features = read_features(shard_path.parent, int(shard_path.name))
    film = features.get(IMAGE, [])
    if len(film) != 1 or not isinstance(film[0], bytes):
        raise UserError(f"{shard_path}: the record has no feature {IMAGE!r} with one film")
    return film[0]


def read_features(shard: Path, record_index: int) -> dict[str, list[Value]]:
    """Read the features of a record. Raises UserError."""
    # Bytes that pass the format's checksum can still be another kind of record.
    try:
        return decode(open_shard(shard).read(record_index))
    except BadExampleError as reason:
        raise UserError(f"{shard}: record {record_index} {reason}") from None


def read_all(shard: Path) -> Iterator[dict[str, list[Value]]]:
    """Yield the features of every record, in order. Raises UserError."""
    for record_index in range(len(open_shard(shard))):
        yield read_features(shard, record_index)


# ---- Files -----------------------------------------------------------------------------------------


class _ArrayRecords:
    """A shard of ArrayRecord."""

    def __init__(self, shard_path: Path) -> None:
        self._path = shard_path
        module = load_array_record(shard_path)
        # One reader keeps one place, so threads take turns: what costs is decoding, not this.
        self._lock = threading.Lock()
        with _damage(shard_path):
            self._reader = module.ArrayRecordReader(str(shard_path), _READER_OPTIONS)
            self._count = self._reader.num_records()
            # One that is cut short opens all the same, as one without records.
            if not self._reader.ok():
                raise ValueError("not a whole file")

    def __len__(self) -> int:
        return self._count

    def read(self, record_index: int) -> bytes:
        _check_index(self._path, record_index, self._count)
        with self._lock, _damage(self._path):
            [record] = self._reader.read([record_index])
            return record


class _ParquetRecords:
    """A shard of Parquet: a column `data` of the same records. A group of rows is read as a whole, and kept."""

    def __init__(self, shard_path: Path) -> None:
        self._path, self._lock = shard_path, threading.Lock()
        module = _import("pyarrow.parquet", "pyarrow", shard_path)
        with _damage(shard_path):
            self._file = module.ParquetFile(shard_path)
            groups = self._file.metadata
            self._counts = [
                groups.row_group(group).num_rows for group in range(groups.num_row_groups)
            ]
        self._group, self._rows = -1, list[bytes]()

    def __len__(self) -> int:
        return sum(self._counts)

    def read(self, record_index: int) -> bytes:
        _check_index(self._path, record_index, len(self))
        # Groups may have any length.
        group = 0
        while record_index >= self._counts[group]:
            record_index -= self._counts[group]
            group += 1
        with self._lock, _damage(self._path):
            if group != self._group:
                table = self._file.read_row_group(group, columns=["data"])
                self._group, self._rows = group, table.column("data").to_pylist()
            return self._rows[record_index]


_open: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
_open_lock = threading.Lock()


def open_shard(shard_path: Path) -> Any:
    """Open a shard, or give it if it is open: `len` and `read(index)`, from any thread.

    Raises:
        UserError: for a file that is damaged, or of another format.
    """
    match = _SHARD.fullmatch(shard_path.name)
    if match is None:
        raise UserError(f"{shard_path}: is no shard of ArrayRecord or Parquet by its name")
    try:
        about = shard_path.stat()
    except OSError as error:
        raise UserError(f"{shard_path}: cannot be read ({error.strerror})") from None
    # A file that was written anew is another one.
    key = (str(shard_path), about.st_size, about.st_mtime_ns)
    with _open_lock:
        if key in _open:
            _open.move_to_end(key)
            return _open[key]
        kind = _ArrayRecords if match["format"] == "array_record" else _ParquetRecords
        _open[key] = kind(shard_path)
        # Each holds a descriptor; sets have thousands of shards.
        if len(_open) > _OPEN_FILES:
            _open.popitem(last=False)
        return _open[key]


def _check_index(shard_path: Path, record_index: int, count: int) -> None:
    if not 0 <= record_index < count:
        raise UserError(f"{shard_path}: has {count:,} records, and no record {record_index}")


@contextlib.contextmanager
def _damage(shard_path: Path) -> Iterator[None]:
    """Turns what a format's library raises into one line."""
    # RuntimeError and IndexError of ArrayRecord, ArrowInvalid (a ValueError) and OSError of Parquet.
    try:
        yield
    except (RuntimeError, IndexError, ValueError, OSError):
        raise UserError(f"{shard_path}: is damaged or cut short") from None


def load_array_record(shard_path: Path) -> Any:
    """Import the reader and writer of ArrayRecord, for a file. Raises UserError where the system has none."""
    return _import("array_record.python.array_record_module", "array_record", shard_path)


def _import(module: str, package: str, shard_path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{shard_path}: needs the package {package}: pip install {package}"
        ) from None
