"""The reference outputs under tests/golden, written by tests/oracle/make_golden.py."""

import functools
import json
import pathlib

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
from places import ROOT

from cxr_jax.weights.safetensors_file import TensorToWrite, write_safetensors

FOLDER = ROOT / "tests" / "golden"
NAMES = sorted(p.stem for p in FOLDER.glob("*.npz"))


@functools.cache
def case(name: str) -> dict:
    """Arrays of a case, with `config` (parsed config.json) and `weights` (HF key -> float32)."""
    info = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz") as f:
        arrays = {k: f[k] for k in f.files}
    weights = {
        k: arrays.pop("w:" + k).astype(np.float32) * np.float32(2.0**-e)
        for k, e in info["exponents"].items()
    }
    arrays["pixels"] = arrays["pixels"].astype(np.float32) / 16
    return {**arrays, "config": info["config"], "weights": weights}


def write_folder(folder: pathlib.Path, name: str, rename=lambda key: key) -> pathlib.Path:
    """The case as a Hugging Face folder, under `rename`d keys."""
    c = case(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c["config"]))
    write_safetensors(folder / "model.safetensors", entries(c["weights"], rename))
    return folder


def entries(arrays: dict, rename=str) -> list[TensorToWrite]:
    """Arrays as what the writers of safetensors take, under `rename`d keys."""
    return [TensorToWrite(rename(k), x.shape, x.dtype, lambda x=x: x) for k, x in arrays.items()]
