"""Writing a folder of shards that tensorflow-datasets opens, and a manifest of the same films.

OUT has
    NAME-SPLIT.array_record-00000-of-00004   records of a split: the bytes of each film's file, and what is known of it
    features.json, dataset_info.json         what tensorflow-datasets reads; the latter comes last
    rows.jsonl                               rows for `config.data.manifest`, with OUT as `config.data.image_root`
    shards.json                              SHA-256 and records of each shard; the fingerprint of all

A shard is named when it is whole, so a run that was stopped goes on with the next one.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_jax.data import radiograph
from cxr_jax.data.shards import records
from cxr_jax.data.shards.examples import encode
from cxr_jax.data.shards.shipment import Film, Shipment
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.runtime import whole_files

ROWS, SHARDS = "rows.jsonl", "shards.json"
# What grain asks for, so that each record is read by itself; one thread, so that the same films give the same bytes.
_WRITER_OPTIONS = "group_size:1,max_parallelism:1"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_FEATURES = "tensorflow_datasets.core.features."
_TEXTS = ("id", "patient", "study", "view", "prompt", "target")


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A shard to write.

    Attributes:
        films: positions in the shipment, in its order.
    """

    name: str
    split: str
    films: tuple[int, ...]


def write(shipment: Shipment, out_folder: Path, shard_mib: int) -> str:
    """Write a folder, or go on with one that was stopped.

    Args:
        shard_mib: of films that a shard holds at most, unless one alone is larger.

    Returns:
        A line that counts what was written.

    Raises:
        UserError: for a film that cannot be read, and a folder of others.
    """
    # ---- Which film goes where, and what of it is done ----
    name, version = _name_of(out_folder)
    shards = _plan(shipment.films, name, shard_mib)
    plan = _hash_plan(shards, shipment.films)
    finished = _begin(out_folder, plan)
    # ---- The shards that are left ----
    try:
        for shard in shards:
            shard_path = out_folder / shard.name
            # By its content: a disk that was full, or failed, leaves what looks like a shard.
            before = finished.get(shard.name)
            if before and shard_path.is_file() and _sha256(shard_path) == before["sha256"]:
                continue
            finished[shard.name] = _write_shard(
                shard_path, [shipment.films[film_index] for film_index in shard.films]
            )
            whole_files.write_json(out_folder / SHARDS, {"plan": plan, "shards": finished})
    except UserError:
        # Bad input leaves nothing half-written, but for shards that are whole.
        if not finished:
            (out_folder / SHARDS).unlink()
            out_folder.rmdir()
        raise
    # ---- What makes a data set of them ----
    names = {
        film_index: f"{shard.name}/{place}"
        for shard in shards
        for place, film_index in enumerate(shard.films)
    }
    # Rows name records now, where they named files.
    rows = shipment.rows([names[film_index] for film_index in range(len(shipment.films))])
    whole_files.write_text(out_folder / ROWS, "".join(map(_line, rows)))
    whole_files.write_json(out_folder / "features.json", _features(shipment.films))
    fingerprint = _fingerprint(shipment, [finished[shard.name]["sha256"] for shard in shards])
    about = {"plan": plan, "fingerprint": fingerprint, "shards": finished}
    whole_files.write_json(out_folder / SHARDS, about)
    info = _dataset_info(name, version, shards, finished)
    # No path: folders are handed on.
    info["description"] = (
        f"{len(shipment.films)} films of {shipment.source}, by cxr_jax.data.shards."
    )
    # Last: with it a folder is whole.
    whole_files.write_json(out_folder / "dataset_info.json", info)
    count = f"{len(shipment.films):,} films in {len(shards)} shards, {len(rows):,} rows"
    return f"{out_folder}: {count}; fingerprint {fingerprint}"


def _hash_plan(shards: Sequence[_Shard], films: Sequence[Film]) -> str:
    """A hash of what is written into which shard: a folder that was begun goes on with the same alone."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(repr(shard).encode())
        for film_index in shard.films:
            digest.update(repr(_facts(films[film_index])).encode())
    return digest.hexdigest()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _fingerprint(shipment: Shipment, digests: Sequence[str]) -> str:
    """A hash of all films and rows, whatever the folder is called."""
    rows = shipment.rows([str(film_index) for film_index in range(len(shipment.films))])
    text = "".join([*digests, *map(_line, rows)])
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def _name_of(out_folder: Path) -> tuple[str, str]:
    """Name and version of the data set: those of the folder, if it is DIR/NAME/1.0.0, where `tfds.load` looks."""
    out_folder = out_folder.absolute()
    # The one place where tensorflow-datasets finds a set by its name.
    name, version = (
        (out_folder.parent.name, out_folder.name)
        if _VERSION.fullmatch(out_folder.name)
        else (out_folder.name, "1.0.0")
    )
    name = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower()
    return name if re.match("[a-z]", name) else f"films_{name}".rstrip("_"), version


def _plan(films: Sequence[Film], name: str, shard_mib: int) -> list[_Shard]:
    """Which film goes into which shard: each split in the order of its films."""
    # Of each split the groups so far, and the bytes of the last one.
    splits: dict[str, list[list[int]]] = {}
    full: dict[str, int] = {}
    for place, film in enumerate(films):
        # Names of splits are identifiers there.
        split = re.sub(r"\W+", "_", film.split, flags=re.ASCII) or "_"
        size = _size(film.file)
        groups = splits.setdefault(split, [])
        if not groups or full[split] + size > shard_mib * 2**20:
            groups.append([])
            full[split] = 0
        groups[-1].append(place)
        full[split] += size
    return [
        _Shard(
            name=f"{name}-{split}.array_record-{number:05d}-of-{len(groups):05d}",
            split=split,
            films=tuple(places),
        )
        for split, groups in splits.items()
        for number, places in enumerate(groups)
    ]


def _size(film_file: Path) -> int:
    # Sets that are prepared already are sources, too.
    if records.is_member(film_file):
        return len(records.read_film(film_file))
    try:
        return film_file.stat().st_size
    except OSError as error:
        raise UserError(f"{film_file}: cannot be read ({error.strerror})") from None


def _facts(film: Film) -> tuple:
    """What a record is made from: what is known of the film, and of its file size and time."""
    # Of a film in a shard the shard's.
    film_file = film.file.parent if records.is_member(film.file) else film.file
    about = film_file.stat()
    return (film, about.st_size, about.st_mtime_ns)


def _begin(out_folder: Path, plan: str) -> dict[str, Any]:
    """Make the folder, or find what was written of it. Raises UserError."""
    try:
        out_folder.mkdir(parents=True, exist_ok=True)
        # What a process that was killed has left.
        for partial in out_folder.glob(".*.partial"):
            partial.unlink()
        found = sorted(shard_path.name for shard_path in out_folder.iterdir())
        if not found:
            # Now, so that one that is killed in its first shard is known again.
            whole_files.write_json(out_folder / SHARDS, {"plan": plan, "shards": {}})
    except OSError as error:
        raise UserError(f"{out_folder}: cannot be written ({error.strerror})") from None
    if not found:
        return {}
    try:
        about = json.loads((out_folder / SHARDS).read_text(encoding="utf-8"))
        before, finished = about["plan"], dict(about["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out_folder}: is not empty, and holds no shards of this command"
        ) from None
    # Shards of two sets in one folder would be taken for one.
    if before != plan:
        raise UserError(
            f"{out_folder}: holds shards of other films, or of another --shard_mib: give another folder"
        )
    return finished


def _write_shard(shard_path: Path, films: Sequence[Film]) -> dict[str, Any]:
    """Write a shard whole or not at all; gives its facts."""
    # Under its name only once it is whole.
    partial = whole_files.partial_path(shard_path)
    count = 0
    try:
        writer = records.load_array_record(shard_path).ArrayRecordWriter(
            str(partial), _WRITER_OPTIONS
        )
        try:
            for record in map(_record_of, films):
                writer.write(record)
                count += len(record)
        finally:
            writer.close()
        partial.replace(shard_path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return {"sha256": _sha256(shard_path), "records": len(films), "bytes": count}


def _record_of(film: Film) -> bytes:
    content = radiograph.read_bytes(film.file)
    # Told by the content, as every reader here does; whether all of it can be read is for --check_images.
    if not radiograph.may_be_picture(content):
        raise UserError(f"{film.file}: {radiograph.NO_PICTURE}")
    # What UTF-8 cannot hold is escaped, as in every file of ours.
    texts = {name: str(getattr(film, name)).encode(errors="backslashreplace") for name in _TEXTS}
    return encode({**texts, "image": content, "state": list(film.states)})


def _sha256(shard_path: Path) -> str:
    with open(shard_path, "rb") as shard_file:
        return hashlib.file_digest(shard_file, "sha256").hexdigest()


# ---- What tensorflow-datasets reads ----------------------------------------------------------------


def _features(films: Sequence[Film]) -> dict[str, Any]:
    """features.json."""
    features: dict[str, Any] = {
        name: {"pythonClassName": f"{_FEATURES}text_feature.Text", "text": {}} for name in _TEXTS
    }
    features["state"] = _tensor("int8", [str(len(CHEXPERT_14))])
    # Its own decoder knows PNG and JPEG; of a set with a DICOM in it images are bytes, for the reader to decode.
    if any(_is_dicom(film.file) for film in films):
        features["image"] = {"pythonClassName": f"{_FEATURES}text_feature.Text", "text": {}}
    else:
        features["image"] = {
            "pythonClassName": f"{_FEATURES}image_feature.Image",
            # One channel: with three every grey film would come back three times as large.
            "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "1"]}},
        }
    return {
        "pythonClassName": f"{_FEATURES}features_dict.FeaturesDict",
        "featuresDict": {"features": dict(sorted(features.items()))},
    }


def _tensor(dtype: str, dimensions: list[str]) -> dict[str, Any]:
    about = {"dtype": dtype, "encoding": "none", "shape": {"dimensions": dimensions}}
    return {"pythonClassName": f"{_FEATURES}tensor_feature.Tensor", "tensor": about}


def _is_dicom(film_file: Path) -> bool:
    if records.is_member(film_file):
        head = records.read_film(film_file)
    else:
        with open(film_file, "rb") as opened:
            head = opened.read(len(radiograph.PNG_MAGIC))
    return not head.startswith((radiograph.PNG_MAGIC, radiograph.JPEG_MAGIC))


def _dataset_info(
    name: str, version: str, shards: Sequence[_Shard], finished: dict[str, Any]
) -> dict[str, Any]:
    """dataset_info.json."""
    # Splits and shards in the order in which they were planned.
    splits = []
    for split in dict.fromkeys(shard.split for shard in shards):
        facts = [finished[shard.name] for shard in shards if shard.split == split]
        splits.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                # Whole numbers are texts in the JSON of protocol buffers.
                "numBytes": str(sum(fact["bytes"] for fact in facts)),
                "shardLengths": [str(fact["records"]) for fact in facts],
            }
        )
    return {"name": name, "version": version, "fileFormat": "array_record", "splits": splits}
