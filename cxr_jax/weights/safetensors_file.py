"""Safetensors files without torch: checked headers, tensors mapped one at a time, sharded writing.

A header comes from a file that anyone may have made, so nothing in it is believed before it is checked: whatever the
bytes are, reading them gives tensors that lie inside the file, or a UserError. The safetensors library is the oracle of
the tests and does not read here: see "Our own reader of safetensors" in docs/decisions.md.
Format: https://huggingface.co/docs/safetensors (8 bytes of length, JSON header, data without holes).
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

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
"""Names of types in a header -> the types."""
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
# What torch.save writes: code may hide in it, so such files are named and never read.
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What trainers leave beside weights: of transformers, accelerate, DeepSpeed and FSDP.
_TRAINER_STATES = (
    "training_args",
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "random_states",
)
_ADAPTER = "adapter_model.safetensors"
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_RANK, _MAX_DIM = (
    8,
    2**48,
)  # more than any model has, and small enough for their product to be computed


# ---- Reading ----


def parse_json(data: bytes, name: object) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        name: what the bytes are, for messages.

    Raises:
        UserError: for anything else, also for an object in it that has a key twice.
    """

    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed: dict[str, Any] = {}
        for key, value in pairs:
            if key in parsed:  # json, and the safetensors library, would take the last
                raise UserError(f"{name}: {shown(key)} occurs twice")
            parsed[key] = value
        return parsed

    try:
        parsed = json.loads(data.decode(), object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{name}: not a JSON object")
    return parsed


def read_header(file_path: Path) -> tuple[dict[str, dict], int]:
    """Read (header, offset of the data) of a safetensors file.

    The header maps a name to its dtype, shape and data_offsets; the tensors cover the data exactly.

    Raises:
        UserError: if the file is damaged or cut short.
    """
    file_size = file_path.stat().st_size
    with open(file_path, "rb") as file:
        # Against the size of the file first: nothing is read or allocated because a header asks for it.
        length = int.from_bytes(file.read(8), "little")
        # A length beyond the file or the library's limit is noise read as a number.
        if file_size < 8 or length > min(file_size - 8, _MAX_HEADER):
            raise UserError(f"{file_path}: not a safetensors file, or cut short")
        header = parse_json(file.read(length), f"{file_path}: damaged safetensors header")
    # Free text of the writer; nothing here depends on it.
    header.pop("__metadata__", None)
    # Each entry by itself first, then all of them together: the second check relies on the first.
    for tensor_name, entry in header.items():
        _check_entry(file_path, tensor_name, entry)
    _check_coverage(file_path, header, file_size - 8 - length)
    return header, 8 + length


def _check_entry(file_path: Path, tensor_name: str, entry: object) -> None:
    """Refuse a tensor whose dtype, shape and offsets are not of their types or do not agree."""

    def bad(reason: str) -> UserError:
        return UserError(f"{file_path}: tensor {shown(tensor_name)} {reason}")

    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise bad("has no dtype")
    # Types that no model here has, such as float8 and packed ones, are refused by name.
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise bad(f"has unsupported type {shown(entry['dtype'])}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_whole_numbers(shape, _MAX_DIM) or len(shape) > _MAX_RANK:
        raise bad("has no valid shape")
    if not _are_whole_numbers(offsets, 2**63) or len(offsets) != 2:
        raise bad("has no valid data_offsets")
    # Exact in Python's whole numbers: in 64 bits a product of dimensions could wrap around and fit.
    if offsets[1] - offsets[0] != math.prod(shape) * np.dtype(dtype).itemsize:
        raise bad("has a shape that does not fit its data_offsets")


def _are_whole_numbers(values: object, limit: int) -> TypeGuard[list[int]]:
    # `type is int`: isinstance would let True and False pass.
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= limit for value in values
    )


def _check_coverage(file_path: Path, header: dict[str, dict], data_size: int) -> None:
    """Refuse tensors that overlap, leave holes or do not end where the file ends."""
    # In the order of their bytes each tensor begins where the one before ended, or something is
    # wrong.
    position = 0
    for start_byte, end_byte, tensor_name in sorted(
        (*entry["data_offsets"], tensor_name) for tensor_name, entry in header.items()
    ):
        if start_byte != position:
            problem = "overlaps another" if start_byte < position else "leaves a hole before it"
            raise UserError(f"{file_path}: damaged: tensor {shown(tensor_name)} {problem}")
        position = end_byte
    if position != data_size:
        problem = "cut short" if position > data_size else "longer than its header says"
        raise UserError(f"{file_path}: the file is {problem}")


class StoredTensor(NamedTuple):
    """Where a tensor lies; `start` is counted from the beginning of the file, in bytes."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard(NamedTuple):
    """A file of a model folder. `indexed`: the names that the index gives to it; None without an index."""

    path: Path
    indexed: set[str] | None


def find_shards(folder: Path) -> list[Shard]:
    """Find the files of a model folder's weights; none is opened but the index.

    Raises:
        UserError: when one is missing.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise UserError(f"{folder}: {_why_missing(folder, single)}")
        return [Shard(single, None)]
    # Which one is newer nobody can know, so neither is taken.
    if single.is_file():
        raise UserError(f"{folder}: holds both model.safetensors and {INDEX}; remove the stale one")
    # Turned around: the index is by tensor, and files are opened one by one.
    names_of_shard: dict[str, set[str]] = {}
    for tensor_name, name in _read_weight_map(index).items():
        names_of_shard.setdefault(name, set()).add(tensor_name)
    # All shards are looked for at once, before the first of them is read.
    for name in sorted(names_of_shard):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {shown(name)} is missing")
    return [Shard(folder / name, names_of_shard[name]) for name in sorted(names_of_shard)]


def stored_names(folder: Path) -> set[str]:
    """Read the names of a folder's tensors, by its index or by the header of its one file.

    Raises:
        UserError: if it has neither, or one that is damaged or has types that are not read.
    """
    # By the index alone: shards may be many, and some of them away.
    if (folder / INDEX).is_file():
        return set(_read_weight_map(folder / INDEX))
    [shard] = find_shards(folder)
    return set(read_header(shard.path)[0])


def pickled_weights(folder: Path) -> list[str]:
    """List the names of files that may be weights in torch's own format; states of a trainer are none."""
    return [
        file.name
        for pattern in PICKLES
        for file in folder.glob(pattern)
        if not file.name.startswith(_TRAINER_STATES)
    ]


def _why_missing(folder: Path, single: Path) -> str:
    # The reasons that people meet, from the most likely: another format, a dead link, a lost
    # file.
    if pickles := pickled_weights(folder):
        return (
            f"{shown(min(pickles))} is a pickle file, which can run code when it is read; "
            "only safetensors are read"
        )
    if single.is_symlink():
        return f"{single.name} is a broken link"
    if (folder / _ADAPTER).is_file():
        return f"{single.name} is missing; {_ADAPTER} beside it is an adapter, to be given with its base model"
    return f"{INDEX if any(folder.glob('*.safetensors')) else single.name} is missing"


class Tensors:
    """All tensors of a model folder by canonical key; memory-mapped, read one at a time.

    Args:
        canonical: function from a stored key to the key to use.
        file_name: the one file to read; None: model.safetensors, or the shards of an index.

    Attributes:
        stored: canonical key -> where the tensor lies.

    Raises:
        UserError: when a file is missing, damaged or disagrees with the index.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        canonical: Callable[[str], str] = str,
        file_name: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.stored: dict[str, StoredTensor] = {}
        files = [Shard(self.folder / file_name, None)] if file_name else find_shards(self.folder)
        for file_path, indexed in files:
            header, data_start = read_header(file_path)
            # An index is a second account of the same names, so any difference means mixed-up
            # files.
            if indexed is not None and indexed != set(header):
                tensor_name = min(indexed ^ set(header))
                lacking = "is not in it" if tensor_name in indexed else "is not in the index"
                raise UserError(
                    f"{file_path}: does not agree with {INDEX}: tensor {shown(tensor_name)} {lacking}"
                )
            # Two stored names may become one canonical name: then one tensor would replace the
            # other.
            for stored_name, entry in header.items():
                tensor_name = canonical(stored_name)
                if tensor_name in self.stored:
                    raise UserError(f"{self.folder}: tensor {shown(tensor_name)} occurs twice")
                self.stored[tensor_name] = StoredTensor(
                    file_path,
                    np.dtype(DTYPES[entry["dtype"]]),
                    tuple(entry["shape"]),
                    data_start + entry["data_offsets"][0],
                )

    def shape(self, tensor_name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; it is not read."""
        return self.stored[tensor_name].shape

    def dtype(self, tensor_name: str) -> np.dtype:
        """Return the type of a tensor; it is not read."""
        return self.stored[tensor_name].dtype

    def place(self, tensor_name: str) -> tuple[str, int]:
        """Return (file, offset): tensors sorted by it are read front to back, shard by shard."""
        return self.stored[tensor_name].path.name, self.stored[tensor_name].start

    def __getitem__(self, tensor_name: str) -> np.ndarray:
        """Map a tensor, read-only."""
        file_path, dtype, shape, start_byte = stored = self.stored[tensor_name]
        if stored.nbytes == 0:  # an empty file region cannot be mapped
            return np.zeros(shape, dtype)
        # A map of its own: its pages count as this process's memory until the array is gone.
        raw = np.memmap(file_path, np.uint8, "r", start_byte, (stored.nbytes,))
        return raw.view(dtype).reshape(shape)


def _read_weight_map(index: Path) -> dict[str, str]:
    """Read name of a tensor -> name of its shard. Raises UserError for names that lead out of the folder."""
    parsed = parse_json(index.read_bytes(), f"{index}: damaged safetensors index")
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: not a safetensors index: no weight_map")
    for name in weight_map.values():
        # A path in the index could point anywhere on this machine.
        is_plain = isinstance(name, str) and Path(name).name == name
        if not is_plain or not name.endswith(".safetensors"):
            raise UserError(f"{index}: shard names must be plain file names, got {shown(name)}")
    return weight_map


# ---- Writing ----
# By hand, too: the library wants all tensors of a file in memory at once.


class TensorToWrite(NamedTuple):
    """One tensor of a file to be. `make` returns the array when its turn has come."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_safetensors(file_path: Path, tensors: list[TensorToWrite]) -> None:
    """Write one file, making one tensor at a time: memory stays flat."""
    # The mark by which transformers knows the file; versions of it refuse one without "pt".
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    # The header needs all offsets, and shapes give them: no array is made before its turn.
    position = 0
    for tensor in tensors:
        end_byte = position + tensor.nbytes
        header[tensor.key] = {
            "dtype": NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [position, end_byte],
        }
        position = end_byte
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # so that the data begin at a multiple of 8
    with open(file_path, "wb") as file:
        file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make(), dtype=tensor.dtype)
            # The header is already on disk, so a wrong shape would shift everything behind it.
            assert array.shape == tuple(tensor.shape)
            file.write(array.reshape(-1).view(np.uint8).data)
        # On disk before the folder gets its name: a rename may outlive a crash that the data do not.
        file.flush()
        os.fsync(file.fileno())


def write_folder(folder: Path, tensors: list[TensorToWrite], max_shard_gb: float = 5.0) -> None:
    """Write model.safetensors, or shards of at most `max_shard_gb` * 10^9 bytes of data and their index.

    A tensor that is larger than that gets a shard of its own. Names and index are those of transformers.
    """
    # Fill a shard until the next tensor would not fit; order is kept, so that reading goes front to
    # back.
    shards: list[list[TensorToWrite]] = [[]]
    shard_size = 0
    for tensor in tensors:
        if shards[-1] and shard_size + tensor.nbytes > max_shard_gb * 1e9:
            shards.append([])
            shard_size = 0
        shards[-1].append(tensor)
        shard_size += tensor.nbytes
    # A model that fits in one file gets no index, as transformers writes it.
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    # The number of shards stands in every name, so all must be planned before the first is written.
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= {tensor.key: name for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
