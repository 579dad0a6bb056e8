"""Safetensors files without torch: checked headers, tensors mapped one at a time, sharded writing.

A header comes from a file that anyone may have made, so nothing in it is believed before it is checked:
whatever the bytes are, reading them gives tensors that lie inside the file, or a UserError.
Format: https://huggingface.co/docs/safetensors (8 bytes of length, JSON header, data without holes).
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from cxr_jax.errors import UserError, shown

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(v): k for k, v in DTYPES.items()}
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_RANK, _MAX_DIM = 8, 2**48


def parse_json(data: bytes, what) -> dict:
    """The JSON object in `data`. Raises UserError, naming `what`, for anything else, also for a doubled key."""

    def once(pairs):
        found: dict = {}
        for key, value in pairs:
            if key in found:
                raise UserError(f"{what}: {shown(key)} occurs twice")
            found[key] = value
        return found

    try:
        d = json.loads(data.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what}: not valid JSON") from e
    if not isinstance(d, dict):
        raise UserError(f"{what}: not a JSON object")
    return d


# --- reading -------------------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict, int]:
    """(header, offset of the data) of a safetensors file. Raises UserError if it is damaged or cut short.

    The header maps a name to its dtype, shape and data_offsets; the tensors cover the data exactly.
    """
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(f"{path}: not a safetensors file, or cut short")
        header = parse_json(f.read(length), f"{path}: damaged safetensors header")
    header.pop("__metadata__", None)
    for key, info in header.items():
        _check_entry(path, key, info)
    at = 0
    for start, end, key in sorted((*info["data_offsets"], key) for key, info in header.items()):
        if start != at:
            what = "overlaps another" if start < at else "leaves a hole before it"
            raise UserError(f"{path}: damaged: tensor {shown(key)} {what}")
        at = end
    if at != size - 8 - length:
        how = "cut short" if at > size - 8 - length else "longer than its header says"
        raise UserError(f"{path}: the file is {how}")
    return header, 8 + length


def _check_entry(path, key, info) -> None:
    """Refuses a tensor whose dtype, shape and offsets are not of their types or do not agree."""
    bad = lambda reason: UserError(f"{path}: tensor {shown(key)} {reason}")
    if not isinstance(info, dict) or not isinstance(info.get("dtype"), str):
        raise bad("has no dtype")
    dtype = DTYPES.get(info["dtype"])
    if dtype is None:
        raise bad(f"has unsupported type {shown(info['dtype'])}")
    shape, offsets = info.get("shape"), info.get("data_offsets")
    whole = lambda x, limit: type(x) is int and 0 <= x <= limit  # bool is no int here
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_RANK
        or not all(whole(n, _MAX_DIM) for n in shape)
    ):
        raise bad("has no valid shape")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(whole(n, 2**63) for n in offsets)
    ):
        raise bad("has no valid data_offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * np.dtype(dtype).itemsize:
        raise bad("has a shape that does not fit its data_offsets")


class Tensors:
    """All tensors of a model folder by canonical key; memory-mapped, read one at a time.

    canonical: function from a stored key to the key to use. Raises UserError when a file is missing, damaged or
    disagrees with the index.
    """

    def __init__(
        self, folder: str | os.PathLike, canonical: Callable[[str], str] = lambda key: key
    ):
        self.folder = Path(folder)
        self.where: dict[str, tuple[Path, int, dict]] = {}
        for path, indexed in self._files():
            header, base = read_header(path)
            if indexed is not None and indexed != set(header):
                key = min(indexed ^ set(header))
                lacking = "is not in it" if key in indexed else "is not in the index"
                raise UserError(
                    f"{path}: does not agree with {INDEX}: tensor {shown(key)} {lacking}"
                )
            for key, info in header.items():
                name = canonical(key)
                if name in self.where:
                    raise UserError(f"{self.folder}: tensor {shown(name)} occurs twice")
                self.where[name] = (path, base, info)

    def _files(self) -> list[tuple[Path, set[str] | None]]:
        """(file, names that the index gives to it, None without an index)."""
        index, single = self.folder / INDEX, self.folder / "model.safetensors"
        if not index.is_file():
            if not single.is_file():
                raise UserError(f"{self.folder}: {self._why_missing(single)}")
            return [(single, None)]
        if single.is_file():
            raise UserError(
                f"{self.folder}: holds both model.safetensors and {INDEX}; remove the stale one"
            )
        weight_map = parse_json(index.read_bytes(), f"{index}: damaged safetensors index").get(
            "weight_map"
        )
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: not a safetensors index: no weight_map")
        shards: dict[str, set[str]] = {}
        for key, name in weight_map.items():
            if (
                not isinstance(name, str)
                or Path(name).name != name
                or not name.endswith(".safetensors")
            ):
                raise UserError(f"{index}: shard names must be plain file names, got {shown(name)}")
            shards.setdefault(name, set()).add(key)
        for name in sorted(shards):
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder}: {shown(name)} is missing")
        return [(self.folder / name, shards[name]) for name in sorted(shards)]

    def _why_missing(self, single: Path) -> str:
        if pickles := sorted(f.name for p in PICKLES for f in self.folder.glob(p)):
            return (
                f"{shown(pickles[0])} is a pickle file, which can run code when it is read; "
                "only safetensors are read"
            )
        if single.is_symlink():
            return f"{single.name} is a broken link"
        return f"{INDEX if any(self.folder.glob('*.safetensors')) else single.name} is missing"

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.where[key][2]["shape"])

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(DTYPES[self.where[key][2]["dtype"]])

    def place(self, key: str) -> tuple[str, int]:
        """(file, offset): tensors sorted by it are read front to back, shard by shard."""
        path, _, info = self.where[key]
        return path.name, info["data_offsets"][0]

    def __getitem__(self, key: str) -> np.ndarray:
        path, base, info = self.where[key]
        start, end = info["data_offsets"]
        if end == start:  # an empty file region cannot be mapped
            return np.zeros(info["shape"], DTYPES[info["dtype"]])
        # A map of its own: its pages count as this process's memory until the array is gone.
        raw = np.memmap(path, np.uint8, "r", base + start, (end - start,))
        return raw.view(DTYPES[info["dtype"]]).reshape(info["shape"])


# --- writing -------------------------------------------------------------------------------------------

# One tensor to write: (key, shape, dtype, function that returns the array).
Entry = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


def nbytes(entry: Entry) -> int:
    return math.prod(entry[1]) * np.dtype(entry[2]).itemsize


def write_safetensors(path: Path, tensors: list[Entry]) -> None:
    """Write one file, making one tensor at a time: memory stays flat."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for entry in tensors:
        key, shape, dtype, _ = entry
        end = at + nbytes(entry)
        header[key] = {
            "dtype": NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _key, shape, dtype, make in tensors:
            x = np.ascontiguousarray(make(), dtype=dtype)
            assert x.shape == tuple(shape)
            f.write(x.reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())


def write_folder(folder: Path, tensors: list[Entry], max_shard_gb: float = 5.0) -> None:
    """Write model.safetensors, or shards of at most `max_shard_gb` * 10^9 bytes of data and their index.

    A tensor that is larger than that gets a shard of its own. Names and index are those of transformers.
    """
    shards, size = [[]], 0
    for entry in tensors:
        if shards[-1] and size + nbytes(entry) > max_shard_gb * 1e9:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes(entry)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= {entry[0]: name for entry in shard}
    index = {
        "metadata": {"total_size": sum(map(nbytes, tensors))},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
