"""Our checkpoint of a model: an Orbax tree of the parameters, with the Hugging Face settings files beside it.

    config.json, tokenizer.json, ...   as in the Hugging Face folder that it came from, byte for byte
    arrays/                            Orbax: the nested dict of parameters, layers stacked
    cxr_jax.json                       type, shape and SHA-256 of each array, and what else the way back needs

`orbax.checkpoint.StandardCheckpointer().restore(FOLDER / "arrays")` reads the same tree, on any mesh.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cxr_jax.errors import UserError, shown
from cxr_jax.models import registry
from cxr_jax.models.network.config import Config
from cxr_jax.runtime import trees, whole_files
from cxr_jax.runtime.trees import Tree
from cxr_jax.weights import hf_folder
from cxr_jax.weights.safetensors_file import DTYPES, NAMES

# The manifest also marks the folder as ours: see `is_native`.
MANIFEST, ARRAYS = "cxr_jax.json", "arrays"
# Raise the number when older code could misread what is written.
_FORMAT = "cxr_jax checkpoint 1"


def is_native(folder: Path) -> bool:
    """Whether the folder is one of our checkpoints."""
    return (folder / MANIFEST).is_file()


def save(folder: Path, params: Tree, facts: dict) -> None:
    """Write arrays/ and cxr_jax.json into an existing folder.

    Args:
        params: nested dict of contiguous numpy arrays, written without a copy.
        facts: JSON-able; `Arrays` knows them again.
    """
    # Imported where it is used: Orbax is slow to import, and most commands need no checkpoint.
    import orbax.checkpoint as ocp

    types = ocp.type_handlers
    # Orbax would deep-copy all host arrays and then compress a second copy: twice the model in memory.
    registry_of_types = types.create_type_handler_registry(
        (np.ndarray, types.NumpyHandler(deepcopy_host_arrays=False)), *_jax_handlers(types)
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry_of_types, use_compression=False
    )
    with _quiet(), ocp.Checkpointer(handler) as writer:
        writer.save(folder.absolute() / ARRAYS, args=ocp.args.PyTreeSave(params))
    # The manifest comes last: a folder without it is not taken for a checkpoint.
    arrays = {
        "/".join(leaf_path): {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "sha256": _sha256(array),
        }
        for leaf_path, array in trees.flatten(params)
    }
    whole_files.write_json(folder / MANIFEST, {"format": _FORMAT, **facts, "arrays": arrays})


def _jax_handlers(types: Any) -> list[tuple]:
    # Imported late, as Orbax is above.
    import jax

    return [(jax.Array, types.ArrayHandler())]  # without one, Orbax warns


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


class Arrays:
    """The arrays of a checkpoint, read one at a time, each against its checksum.

    Attributes:
        config: of the model.
        shapes: path -> shape of every array.
        tied_head_is_stored: whether the Hugging Face folder had a head of its own that equals the embedding.
        tensor_types: key of a Hugging Face tensor -> name of its type, where it is not that of its array.

    Raises:
        UserError: when the manifest is damaged or does not fit config.json.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.config = hf_folder.read_config(folder)
        manifest_path = self.folder / MANIFEST
        # Nothing in the manifest is believed before it is checked: a file may be cut or edited.
        manifest = hf_folder.read_json(manifest_path)
        if manifest.get("format") != _FORMAT:
            raise UserError(
                f"{manifest_path}: format is {shown(manifest.get('format'))}, not {_FORMAT!r}"
            )
        self._entries: Any = manifest.get("arrays")
        if not isinstance(self._entries, dict) or not all(
            _is_entry(array_entry) for array_entry in self._entries.values()
        ):
            raise UserError(f"{manifest_path}: damaged")
        # The shapes that the config asks for must be those written, before any array is read.
        self.shapes = registry.family_of(self.config).parameter_shapes(self.config)
        self._check_shapes()
        self.tied_head_is_stored = manifest.get("tied_head_is_stored") is True
        self.tensor_types: Any = manifest.get("tensor_types")
        if not isinstance(self.tensor_types, dict) or not all(
            _is_weight_type(type_name) for type_name in self.tensor_types.values()
        ):
            raise UserError(f"{manifest_path}: damaged")

    def _check_shapes(self) -> None:
        wanted = {"/".join(leaf_path): list(shape) for leaf_path, shape in self.shapes.items()}
        stored = {
            leaf_name: array_entry["shape"] for leaf_name, array_entry in self._entries.items()
        }
        # In the order of the names, over both sides: a missing array and one too many are told
        # alike.
        for leaf_name in sorted(wanted.keys() | stored.keys()):
            if wanted.get(leaf_name) != stored.get(leaf_name):
                raise UserError(
                    f"{self.folder}: {MANIFEST} does not fit config.json: {shown(leaf_name)} is "
                    f"{stored.get(leaf_name, 'missing')}, should be {wanted.get(leaf_name, 'absent')}"
                )

    def dtype(self, leaf_path: tuple[str, ...]) -> np.dtype:
        """Return the type of an array; it is not read."""
        return np.dtype(DTYPES[self._entries["/".join(leaf_path)]["dtype"]])

    def __getitem__(self, leaf_path: tuple[str, ...]) -> np.ndarray:
        """Read one array. Raises UserError if it is damaged."""
        leaf_name = "/".join(leaf_path)
        try:
            array = self._restore(leaf_path)
        except Exception as error:  # noqa: BLE001 - Orbax and TensorStore raise many kinds for a damaged file
            raise UserError(
                f"{self.folder / ARRAYS}: {leaf_name} does not load ({type(error).__name__}): missing or "
                "damaged"
            ) from error
        # Orbax has checksums of its own files, not of what came out of them.
        array_entry = self._entries[leaf_name]
        if (
            NAMES.get(array.dtype) != array_entry["dtype"]
            or list(array.shape) != array_entry["shape"]
            or _sha256(array) != array_entry["sha256"]
        ):
            raise UserError(
                f"{self.folder / ARRAYS}: {leaf_name} is damaged: its checksum is not that of {MANIFEST}"
            )
        return array

    def _restore(self, leaf_path: tuple[str, ...]) -> np.ndarray:
        import orbax.checkpoint as ocp

        # Trees of this one leaf: what to read, and as what.
        wanted_item: Any = 0
        restore_args: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for leaf_name in reversed(leaf_path):
            wanted_item, restore_args = {leaf_name: wanted_item}, {leaf_name: restore_args}
        # Partial: of the tree on disk only this leaf is read, so one array at a time is in memory.
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(
                self.folder.absolute() / ARRAYS,
                args=ocp.args.PyTreeRestore(
                    item=wanted_item, restore_args=restore_args, partial_restore=True
                ),
            )
        return np.ascontiguousarray(dict(trees.flatten(tree))[leaf_path])


def _is_entry(array_entry: object) -> bool:
    return (
        isinstance(array_entry, dict)
        and _is_weight_type(array_entry.get("dtype"))
        and "shape" in array_entry
        and "sha256" in array_entry
    )


def _is_weight_type(type_name: object) -> bool:
    return DTYPES.get(str(type_name)) in hf_folder.WEIGHT_TYPES


def load(folder: str | os.PathLike, dtype: DTypeLike | None = None) -> tuple[Config, Tree]:
    """Load (config, parameters as nested dict of numpy arrays), like `hf_folder.load`. Every array is checked.

    Args:
        dtype: what the arrays are converted to; None keeps theirs.
    """
    arrays = Arrays(folder)
    params: Tree = {}
    # Every array is read whole and compared with its checksum before it is converted.
    for leaf_path in arrays.shapes:
        *parents, leaf_name = leaf_path
        subtree = params
        for parent in parents:
            subtree = subtree.setdefault(parent, {})
        subtree[leaf_name] = (
            arrays[leaf_path] if dtype is None else arrays[leaf_path].astype(dtype, copy=False)
        )
    return arrays.config, params


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from reporting through absl's logger what is no news here."""
    # The level and not a filter, which would stay in a user's program.
    logger = logging.getLogger("absl")
    # The level belongs to the program that called us, so it goes back whatever happens.
    log_level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(log_level)
