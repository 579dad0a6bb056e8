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

import numpy as np

from cxr_jax.errors import UserError, shown
from cxr_jax.models import registry
from cxr_jax.models.qwen2_5_vl.config import Config
from cxr_jax.runtime import trees, whole_files
from cxr_jax.weights import hf_folder
from cxr_jax.weights.safetensors_file import DTYPES, NAMES

MANIFEST, ARRAYS = "cxr_jax.json", "arrays"
_FORMAT = "cxr_jax checkpoint 1"


def is_native(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def save(folder: Path, params: dict, extra: dict) -> None:
    """Write arrays/ and cxr_jax.json into an existing folder.

    params: nested dict of contiguous numpy arrays, written without a copy; extra: JSON-able, returned by `Arrays`.
    """
    import orbax.checkpoint as ocp

    types = ocp.type_handlers
    # Orbax would deep-copy all host arrays and then compress a second copy: twice the model in memory.
    registry = types.create_type_handler_registry(
        (np.ndarray, types.NumpyHandler(deepcopy_host_arrays=False)), *_jax_handlers(types)
    )
    with (
        _quiet(),
        ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
        ) as writer,
    ):
        writer.save(folder.absolute() / ARRAYS, args=ocp.args.PyTreeSave(params))
    arrays = {
        "/".join(path): {"dtype": NAMES[x.dtype], "shape": list(x.shape), "sha256": _sha256(x)}
        for path, x in trees.flatten(params)
    }
    whole_files.write_json(folder / MANIFEST, {"format": _FORMAT, **extra, "arrays": arrays})


def _jax_handlers(types):
    import jax

    return [(jax.Array, types.ArrayHandler())]  # without one, Orbax warns


def _sha256(x: np.ndarray) -> str:
    return hashlib.sha256(x.reshape(-1).view(np.uint8).data).hexdigest()


class Arrays:
    """The arrays of a checkpoint, read one at a time, each against its checksum.

    Raises UserError when the manifest is damaged or does not fit config.json.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config = hf_folder.read_config(folder)
        path = self.folder / MANIFEST
        self.manifest = hf_folder.read_json(path)
        if self.manifest.get("format") != _FORMAT:
            raise UserError(
                f"{path}: format is {shown(self.manifest.get('format'))}, not {_FORMAT!r}"
            )
        arrays = self.manifest.get("arrays")
        if not isinstance(arrays, dict) or not all(_is_entry(x) for x in arrays.values()):
            raise UserError(f"{path}: damaged")
        self.shapes = registry.family_of(self.config).parameter_shapes(self.config)
        want = {"/".join(p): list(shape) for p, shape in self.shapes.items()}
        have = {name: x["shape"] for name, x in arrays.items()}
        if bad := sorted(
            name for name in want.keys() | have.keys() if want.get(name) != have.get(name)
        ):
            raise UserError(
                f"{self.folder}: {MANIFEST} does not fit config.json: {shown(bad[0])} is "
                f"{have.get(bad[0], 'missing')}, should be {want.get(bad[0], 'absent')}"
            )
        self.arrays = arrays
        self.tied_head_is_stored = self.manifest.get("tied_head_is_stored") is True
        self.tensor_types = self.manifest.get("tensor_types")
        if not isinstance(self.tensor_types, dict) or any(
            DTYPES.get(str(t)) not in hf_folder.WEIGHT_TYPES for t in self.tensor_types.values()
        ):
            raise UserError(f"{path}: damaged")

    def dtype(self, path: tuple[str, ...]) -> np.dtype:
        return np.dtype(DTYPES[self.arrays["/".join(path)]["dtype"]])

    def __getitem__(self, path: tuple[str, ...]) -> np.ndarray:
        """One array. Raises UserError if it is damaged."""
        name = "/".join(path)
        try:
            x = self._restore(path)
        except Exception as e:  # noqa: BLE001 - Orbax and TensorStore raise many kinds for a damaged file
            raise UserError(
                f"{self.folder / ARRAYS}: {name} does not load ({type(e).__name__}): missing or "
                "damaged"
            ) from e
        info = self.arrays[name]
        if (
            NAMES.get(x.dtype) != info["dtype"]
            or list(x.shape) != info["shape"]
            or _sha256(x) != info["sha256"]
        ):
            raise UserError(
                f"{self.folder / ARRAYS}: {name} is damaged: its checksum is not that of {MANIFEST}"
            )
        return x

    def _restore(self, path: tuple[str, ...]) -> np.ndarray:
        import orbax.checkpoint as ocp

        nest = lambda leaf: leaf if not rest else {rest.pop(): nest(leaf)}
        rest = list(reversed(path))
        item = nest(0)
        rest = list(reversed(path))
        how = nest(ocp.RestoreArgs(restore_type=np.ndarray))
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(
                self.folder.absolute() / ARRAYS,
                args=ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True),
            )
        return np.ascontiguousarray(dict(trees.flatten(tree))[path])


def _is_entry(x) -> bool:
    return (
        isinstance(x, dict)
        and DTYPES.get(str(x.get("dtype"))) in hf_folder.WEIGHT_TYPES
        and "shape" in x
        and "sha256" in x
    )


def load(folder: str | os.PathLike, dtype=None) -> tuple[Config, dict]:
    """(config, parameters as nested dict of numpy arrays), like `hf.load_hf`. Every array is checked."""
    arrays = Arrays(folder)
    params: dict = {}
    for path in arrays.shapes:
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        x = arrays[path]
        node[path[-1]] = x if dtype is None else x.astype(dtype, copy=False)
    return arrays.config, params


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports through absl's logger what is no news here."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
