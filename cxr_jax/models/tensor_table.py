"""From a family's table of Hugging Face keys to the rule of every tensor, and to the shapes of our parameters."""

import functools
from collections.abc import Mapping, Sequence

from cxr_jax.models.family import TensorRule
from cxr_jax.models.network.config import Config
from cxr_jax.runtime.trees import flatten

Row = tuple[str, str, str]
"""(our path below its part of the tree, HF key, transform of `TensorRule`).

"{}" in a key is a layer number: such parameters are stacked on axis 0.
"""

# What a compiler, activation checkpoints, FSDP or a LoRA module around its merged layer put amid a weight's name.
AMID = frozenset(("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "base_layer"))


def parameter_shapes(model_config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Compute path -> shape of every parameter of a config, from an abstract init: no array is made."""
    return dict(_traced_shapes(model_config))


@functools.lru_cache(maxsize=32)  # loading asks twice, and a trace takes a good part of a second
def _traced_shapes(model_config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    import jax

    from cxr_jax.models import network

    # Abstract: shapes of a 7B model cost no memory.
    tree = jax.eval_shape(functools.partial(network.init_params, model_config, None))
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree)}


def rules(
    model_config: Config, tables: Mapping[str, Sequence[Row]], optional: frozenset[str]
) -> list[TensorRule]:
    """List every tensor of a model folder, in file order.

    Args:
        tables: part of our tree ("vision", "text") -> its rows.
        optional: paths with their part that some configs have no parameter for; their rows are then passed over.

    Raises:
        KeyError: if the table and the model disagree.
    """
    shapes = parameter_shapes(model_config)
    tensors, known = [], set()
    for tree_part, table in tables.items():
        for name, hf_key, transform in table:
            our_path = (tree_part, *name.split("/"))
            if our_path not in shapes and f"{tree_part}/{name}" in optional:
                continue
            known.add(our_path)
            tensors += _tensors_of(model_config, our_path, shapes[our_path], hf_key, transform)
    # A parameter without a row would be left out of every file.
    if known != set(shapes):
        raise KeyError(f"no rule for {sorted(set(shapes) - known)}")
    return tensors


def _tensors_of(
    model_config: Config,
    our_path: tuple[str, ...],
    shape: tuple[int, ...],
    hf_key: str,
    transform: str,
) -> list[TensorRule]:
    """The tensors of one row of the table: one, or one a layer."""
    if "{}" not in hf_key:
        return [
            TensorRule(hf_key, our_path, None, transform, _hf_shape(model_config, shape, transform))
        ]
    # The first axis of ours are the layers, of which each is a tensor of theirs.
    layer_shape = _hf_shape(model_config, shape[1:], transform)
    return [
        TensorRule(hf_key.format(layer), our_path, layer, transform, layer_shape)
        for layer in range(shape[0])
    ]


def _hf_shape(model_config: Config, shape: tuple[int, ...], transform: str) -> tuple[int, ...]:
    vision = model_config.vision
    # A convolution over channels, frames, rows and columns, kept as one matrix here; one of images has no frames.
    if transform in ("conv", "conv 2d"):
        frames = (vision.temporal_patch_size,) if transform == "conv" else ()
        side = vision.patch_size
        return (vision.hidden_size, vision.in_channels, *frames, side, side)
    return shape[::-1] if transform == "t" else shape
