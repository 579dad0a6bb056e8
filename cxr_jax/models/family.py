"""What makes a model family: data that the shared code looks up, and no arithmetic of its own.

A family is a folder of `cxr_jax/models/` whose `family.py` holds one `Family`; `registry.FAMILIES` names it. What a
checkpoint, a processor or a mesh needs to know about a family stands here, so that nobody else asks for its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_jax.models.image_processor import ImageProcessor
from cxr_jax.models.markers import Markers

ShardingRules = tuple[tuple[str, tuple[str | None, ...]], ...]
"""(pattern of a parameter's path, logical axes of its last dimensions), first match first; see `runtime.sharding`."""


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a Hugging Face file: its key, our path, its layer (None if not stacked), transform and HF shape.

    Transforms: "as is"; "t": torch keeps [out, in], we keep [in, out]; "conv": a 3-D patch convolution
    (out, c, t, h, w) that we keep as the product [c*t*h*w, out]; "conv 2d": (out, c, h, w) likewise.
    """

    key: str
    path: tuple[str, ...]
    layer: int | None
    transform: str
    shape: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Turn a tensor of the file into our form: a view, no copy."""
        # C * t * h * w in one axis, and transposed like any other kernel.
        if self.transform.startswith("conv"):
            return tensor.reshape(tensor.shape[0], -1).T
        return tensor.T if self.transform == "t" else tensor

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Turn one layer of ours into the file's form, contiguous."""
        turned = array if self.transform == "as is" else array.T
        # A transposed view is not contiguous, and files hold tensors row by row.
        return np.ascontiguousarray(turned).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that differs between families but their arithmetic.

    Attributes:
        model_type: the name in `config.json`, and `model_type` of the family's config class.
        read_config: a parsed `config.json` -> config; raises UserError for what the family does not compute.
        write_config: config -> the content of `config.json`.
        sizes: name as in `config.model` ("random:SIZE") -> config.
        tensor_rules: config -> the rule of every tensor of a model folder, in file order.
        parameter_shapes: config -> {path: shape} of every parameter.
        processor: how pictures become patches.
        markers: what the special tokens of its published tokenizer are called.
        canonical_key: a key of any layout in circulation -> the key of the published layout.
        module_key: a key of the published layout -> its name in the model that transformers 4.52 and later build.
    """

    model_type: str
    read_config: Callable[[dict], Any]
    write_config: Callable[[Any], dict]
    sizes: Mapping[str, Any]
    tensor_rules: Callable[[Any], list[TensorRule]]
    parameter_shapes: Callable[[Any], dict[tuple[str, ...], tuple[int, ...]]]
    canonical_key: Callable[[str], str]
    module_key: Callable[[str], str]
    processor: ImageProcessor
    markers: Markers
    sharding_rules: ShardingRules
