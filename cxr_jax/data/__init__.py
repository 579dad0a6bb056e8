"""Radiographs and their labels: `cxr_jax.data.dicom.read(path)`, images, sources; loaded on first use."""

import importlib

_SUBMODULES = ("dicom", "images", "loading", "sources")
_MOVED = {"phantom": "cxr_jax.phantom"}  # kept for one release


def __getattr__(name: str):
    if name in _SUBMODULES or name in _MOVED:
        return importlib.import_module(_MOVED.get(name, f"cxr_jax.data.{name}"))
    raise AttributeError(f"module 'cxr_jax.data' has no attribute {name!r}")
