"""A tiny model with adapters at every module, and how trees of arrays compare."""

import functools

import jax
import numpy as np
import tiny_model

from cxr_jax.models import lora, network
from cxr_jax.models.lora import Lora
from cxr_jax.runtime import trees

CFG = tiny_model.config(vision={"depth": 2, "intermediate_size": 20, "fullatt_block_indexes": (1,)})
ALL = Lora(3, 6.0, ("decoder", "vision", "merger"))
OWN = lora.PATHS[:14]  # Qwen2.5-VL's


def noise(shapes, seed: int, size=lambda path, shape: 0.2):
    """Arrays of these shapes, none zero. Drawn with numpy: nothing is compiled."""
    rng = np.random.default_rng(seed)
    draw = lambda path, x: (
        size([k.key for k in path], x.shape) * rng.standard_normal(x.shape, np.float32)
    )
    return jax.tree_util.tree_map_with_path(draw, shapes)


def shapes_of(model_config, own):
    params = jax.eval_shape(lambda: network.init_params(model_config, None))
    return params, jax.eval_shape(lambda: lora.init(params, own, jax.random.key(0)))


@functools.cache
def params():
    """Parameters without a zero."""
    size = lambda path, shape: {"kernel": shape[-2:][0] ** -0.5, "embedding": 0.3}.get(
        path[-1], 0.3
    )
    return noise(shapes_of(CFG, ALL)[0], 0, size)


@functools.cache
def adapters():
    """Adapters of all modules, without a zero."""
    return noise(shapes_of(CFG, ALL)[1], 1)


def flat(tree) -> dict:
    return {"/".join(path): np.asarray(x) for path, x in trees.flatten(tree)}


def same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name
