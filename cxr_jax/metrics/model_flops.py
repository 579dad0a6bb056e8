"""What the tokens of a step ask of a model, in floating-point operations, and the share of the devices' peak (MFU).

As PaLM counts them (arXiv 2204.02311, appendix B): what the step needs, and not what a program does. Padding, what the
backward pass computes again and groups that are skipped count nothing, so a better program has a higher share.
Products with parameters count, forward and in the gradient. Scores of attention do not: at 1,000 tokens of the 3B they
would add a twentieth.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

PEAKS: dict[str, float] = {
    # cloud.google.com/tpu/docs: v4, v5e, v5p, v6e. JAX has two names for some.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # NVIDIA's data sheets, without sparsity: A100 SXM and PCIe, H100 SXM, H100 PCIe, H200 SXM.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}
"""Operations a second of one device with bfloat16, by JAX's name of its kind. Of others no share is given."""


class Tokens(NamedTuple):
    """How many tokens go through each part of a model: numbers, or arrays of one shape."""

    decoder: Any  # of prompts and completions, image tokens included
    head: Any  # those whose successor is asked for
    image: Any


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Operations a token, by part: (decoder, head, image).

    Attributes:
        forward: of a forward pass.
        backward: of its gradient; parts that do not train have that of their inputs alone, and a tower of which
            nothing trains has none.
    """

    forward: Tokens
    backward: Tokens

    @classmethod
    def of(cls, model: Mapping[str, Any], train: Mapping[str, Any], merge_unit: int) -> Self:
        """Count those of a model.

        Args:
            model: its parameters, arrays or shapes, {"text", "vision"}.
            train: what trains: {"model": some of them} or {"lora": adapters}, whose own operations are left out.
            merge_unit: patches that become one image token.
        """
        trained = {path for path, _ in _leaves(train.get("model", {}))}
        adapted = " ".join(path for path, _ in _leaves(train.get("lora", {})))
        tower_learns = "vision/" in adapted or any(path.startswith("vision/") for path in trained)
        head = "text/head/kernel" if "head" in model["text"] else "text/embed/embedding"
        forward = {"text": 0.0, "head": 0.0, "vision": 0.0}
        backward = dict(forward)
        for path, leaf in _leaves(model):
            # What is looked up or added is no product; a tied table is one as the head.
            if path != head and not path.endswith("/kernel"):
                continue
            part = "head" if path == head else path.partition("/")[0]
            # A multiplication and an addition a parameter; patches are several a token.
            of_patches = path.startswith(("vision/blocks/", "vision/patch_embed/"))
            operations = 2.0 * float(np.prod(leaf.shape)) * (merge_unit if of_patches else 1)
            forward[part] += operations
            if part != "vision" or tower_learns:
                backward[part] += operations  # of what goes in
            if path in trained:
                backward[part] += operations  # of the parameters
        return cls(forward=Tokens(*forward.values()), backward=Tokens(*backward.values()))

    def of_forward(self, tokens: Tokens) -> float:
        """Count a forward pass of so many tokens."""
        return _dot(self.forward, tokens)

    def of_update(self, tokens: Tokens) -> float:
        """Count a forward pass of so many tokens and its gradient."""
        return _dot(self.forward, tokens) + _dot(self.backward, tokens)


def peak_of(kind: str, devices: int) -> float | None:
    """Give the operations a second of so many devices of a kind, as JAX names it; None where it is not known."""
    peak = PEAKS.get(kind)
    return None if peak is None else peak * devices


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _dot(operations: Tokens, tokens: Tokens) -> float:
    return float(sum(each * count for each, count in zip(operations, tokens, strict=True)))
