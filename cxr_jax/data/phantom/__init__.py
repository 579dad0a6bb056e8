"""The old name of `cxr_jax.phantom`, kept for one release."""

from cxr_jax import phantom


def __getattr__(name: str):
    return getattr(phantom, name)
