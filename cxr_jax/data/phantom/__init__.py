"""The old name of `cxr_jax.phantom`, kept for one release."""

from typing import Any

from cxr_jax import phantom


def __getattr__(name: str) -> Any:
    return getattr(phantom, name)
