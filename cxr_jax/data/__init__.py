"""Radiographs and their labels: `cxr_jax.data.dicom.read(path)`, images, sources; loaded on first use."""

import importlib

_SUBMODULES = ("dicom", "images", "loading", "phantom", "sources")


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"cxr_jax.data.{name}")
    raise AttributeError(f"module 'cxr_jax.data' has no attribute {name!r}")
