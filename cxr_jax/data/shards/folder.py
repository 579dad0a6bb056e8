"""A folder that tensorflow-datasets has prepared: its splits, shards and features, from its two files of JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cxr_jax.data.shards import records
from cxr_jax.data.shards.examples import Value
from cxr_jax.errors import UserError

INFO, FEATURES = "dataset_info.json", "features.json"
FORMATS = ("array_record", "parquet")
_DEPTH = 3  # folders from a data directory down to a version: NAME/CONFIG/1.0.0


class Feature(NamedTuple):
    """A feature of the records.

    Attributes:
        kind: the last part of its class in tensorflow_datasets: "Text", "Image", "ClassLabel", "Tensor", "Sequence" ..
        inner: of a Sequence the kind of what it is of, else "".
        classes: names of the classes, of a ClassLabel or a Sequence of one.
    """

    kind: str
    inner: str = ""
    classes: tuple[str, ...] = ()


class Split(NamedTuple):
    """A split, and its shards with the records that each must have."""

    name: str
    shards: tuple[tuple[Path, int], ...]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A prepared data set.

    Attributes:
        path: the folder that holds dataset_info.json.
    """

    path: Path
    name: str
    version: str
    features: dict[str, Feature]
    splits: tuple[Split, ...]


class Record(NamedTuple):
    """A record.

    Attributes:
        name: of its film, below the folder: see `records`.
    """

    split: str
    name: str
    features: dict[str, list[Value]]


def open_folder(root: Path) -> Folder:
    """Open a prepared data set.

    Args:
        root: its folder, or one above it that holds no other: of several versions of one the newest is taken.

    Raises:
        UserError: for a folder that is none, is of another format, or lacks a shard.
    """
    folder_path = _find(root)
    info, features = _read_json(folder_path / INFO), _read_json(folder_path / FEATURES)
    try:
        name, version = str(info["name"]), str(info["version"])
        file_format = str(info.get("fileFormat") or "tfrecord")
        if file_format not in FORMATS:
            raise UserError(
                f"{folder_path}: is prepared as {file_format}, which TensorFlow alone reads: prepare it again with "
                f"file_format='array_record' (or 'parquet')"
            )
        return Folder(
            path=folder_path,
            name=name,
            version=version,
            features={
                key: _feature(key, about, folder_path)
                for key, about in features["featuresDict"]["features"].items()
            },
            splits=tuple(
                _split(folder_path, name, file_format, about) for about in info.get("splits", ())
            ),
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"{folder_path}: {INFO} or {FEATURES} is not as tensorflow-datasets writes it"
        ) from None


def _find(root: Path) -> Path:
    """The folder of the data set at or below `root`."""
    # The folder itself, whatever is below.
    if (root / INFO).is_file():
        return root
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    # Level by level: a whole disk below is not searched.
    found: list[Path] = []
    for depth in range(1, _DEPTH + 1):
        found += [folder_path.parent for folder_path in sorted(root.glob("*/" * depth + INFO))]
    # What a preparation that was stopped has left.
    found = [folder_path for folder_path in found if not folder_path.name.startswith("incomplete.")]
    if not found:
        raise UserError(f"{root}: holds no {INFO}: no folder that tensorflow-datasets has prepared")
    if len({folder_path.parent for folder_path in found}) > 1:
        names = ", ".join(str(folder_path.relative_to(root)) for folder_path in found[:3])
        raise UserError(f"{root}: holds several prepared data sets ({names} ..): give one of them")
    # By numbers: 3.10 is newer than 3.9.
    return max(found, key=_version_of)


def _version_of(folder_path: Path) -> list[int]:
    return [int(part) if part.isdecimal() else -1 for part in folder_path.name.split(".")]


def _read_json(json_path: Path) -> Any:
    try:
        return json.loads(json_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{json_path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{json_path}: is not valid JSON") from None


def _feature(name: str, about: dict[str, Any], folder_path: Path) -> Feature:
    # The package that a class is in has moved between releases; its name has not.
    kind = str(about["pythonClassName"]).rpartition(".")[2]
    inner = ""
    if kind == "Sequence":
        inner = str(about["sequence"]["feature"]["pythonClassName"]).rpartition(".")[2]
    classes: Sequence[str] = ()
    # Names stand in a file of their own, which is there where the set has any.
    listed = folder_path / f"{name}.labels.txt"
    if "ClassLabel" in (kind, inner) and listed.is_file():
        classes = listed.read_text(encoding="utf-8").splitlines()
    return Feature(kind, inner, tuple(classes))


def _split(folder_path: Path, name: str, file_format: str, about: dict[str, Any]) -> Split:
    # As they are called in the folder: templates differ between releases.
    template = str(about["filepathTemplate"])
    lengths = [int(length) for length in about["shardLengths"]]
    shards = []
    for number, length in enumerate(lengths):
        place = f"{number:05d}-of-{len(lengths):05d}"
        words = {
            "{DATASET}": name,
            "{SPLIT}": str(about["name"]),
            "{FILEFORMAT}": file_format,
            "{SHARD_X_OF_Y}": place,
        }
        file_name = template
        for word, value in words.items():
            file_name = file_name.replace(word, value)
        # A name from elsewhere must not lead out of the folder.
        shards.append((folder_path / Path(file_name).name, length))
    return Split(str(about["name"]), tuple(shards))


def read_records(folder: Folder) -> Iterator[Record]:
    """Yield every record, split by split, in the order of its shards.

    Raises:
        UserError: for a shard that is missing or damaged, or has other records than the folder says.
    """
    for split in folder.splits:
        for shard_path, length in split.shards:
            count = len(records.open_shard(shard_path))
            # A shard of another preparation, which opens as well as any.
            if count != length:
                raise UserError(f"{shard_path}: has {count:,} records, and {INFO} says {length:,}")
            for index, features in enumerate(records.read_all(shard_path)):
                yield Record(split.name, f"{shard_path.name}/{index}", features)
