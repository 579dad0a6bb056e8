"""Radiographs and their labels: `cxr_jax.data.dicom.read(path)`, images, sources; loaded on first use."""

import importlib
from types import ModuleType

_SUBMODULES = ("dicom", "images", "loading", "phantom", "sources")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"cxr_jax.data.{name}")
    raise AttributeError(f"module 'cxr_jax.data' has no attribute {name!r}")
