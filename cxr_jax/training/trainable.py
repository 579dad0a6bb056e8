"""What of a model trains: everything, all but frozen patterns, or LoRA adapters on a frozen base.

A run's train state holds only what trains. The rest, `fixed`, goes to each step beside the state: it has no gradient,
no optimizer moments and no copy in a checkpoint (it comes from `config.model` again), and it lies in the compute type,
in which it is used anyway.
"""

import re
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

from cxr_jax.config.sections import LoraConfig
from cxr_jax.errors import UserError
from cxr_jax.models import lora as lora_adapters
from cxr_jax.runtime.trees import path_string
from cxr_jax.weights.export import Adapters
from cxr_jax.weights.pretrained import DTYPES


@dataclass(frozen=True)
class Trainable:
    """frozen: regexes of parameter paths that do not train. adapters: LoRA in place of all of "model", or None.

    dtype: of the computation and of what is fixed; param_dtype: of what trains (with bfloat16 the optimizer keeps
    float32 masters, see `optim.init_state`). Adapters are always float32: they are small.
    """

    frozen_patterns: tuple[str, ...] = ()
    adapters: lora_adapters.Lora | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @classmethod
    def create(
        cls, lora: LoraConfig, frozen: tuple[str, ...], dtype: str, param_dtype: str
    ) -> Self:
        """Make one from a run's settings: `config.lora`, `config.optim.frozen` and the two types by name.

        Raises:
            UserError: for LoRA settings that mean nothing, or patterns beside adapters.
        """
        adapters = None
        if lora.rank:
            adapters = lora_adapters.Lora(lora.rank, lora.alpha, lora.targets)
            if frozen:
                raise UserError(
                    "config.optim.frozen must be empty with LoRA: the whole model is frozen then"
                )
        return cls(frozen, adapters, DTYPES[dtype], DTYPES[param_dtype])

    def split(self, params: dict, key, trains: bool = True) -> tuple[dict | None, dict]:
        """(train, fixed) of params {"model": ..., ...}, all on the device; key: for fresh adapters.

        trains: False gives None for what trains.

        Raises UserError for a pattern that matches no parameter: what was meant to be frozen would train.
        """
        paths = [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern in self.frozen_patterns:
            if not any(re.search(pattern, p) for p in paths):
                raise UserError(f"config.optim.frozen: {pattern!r} matches no parameter")
        is_frozen = lambda p: (
            any(re.search(f, p) for f in self.frozen_patterns)
            or (self.adapters and p.startswith("model/"))
        )
        if not self.adapters and all(is_frozen(p) for p in paths if p.startswith("model/")):
            raise UserError(
                "config.optim.frozen: the patterns match all of the model, so nothing would train"
            )
        frozen = _pick(params, is_frozen, self.dtype)
        if not trains:
            return None, frozen
        train = _pick(params, lambda p: not is_frozen(p), self.param_dtype)
        if self.adapters:
            train["lora"] = lora_adapters.init(params["model"], self.adapters, key)
        return train, frozen

    def merge(self, train: dict, frozen: dict) -> dict:
        """The parameters that a forward pass takes, {"model": ..., ...}: both halves as one tree, no array copied."""
        params = _join({k: v for k, v in train.items() if k != "lora"}, frozen)
        if self.adapters:
            params["model"] = lora_adapters.join(params["model"], train["lora"], self.adapters)
        return params

    def base_params(self, frozen: dict) -> dict | None:
        """The model that adapters started from; None without adapters, when what it was has been trained on."""
        return frozen["model"] if self.adapters else None

    def export_params(self, train: dict, frozen: dict) -> dict:
        """The model alone, adapters folded into its kernels: for export."""
        params = _join({k: v for k, v in train.items() if k != "lora"}, frozen)["model"]
        return (
            lora_adapters.merge(params, train["lora"], self.adapters) if self.adapters else params
        )

    def export_adapters(self, train: dict) -> Adapters | None:
        """The adapters alone: for export."""
        return Adapters(train["lora"], self.adapters) if self.adapters else None


def _pick(tree: dict, wanted, dtype, prefix: str = "") -> dict:
    """The leaves whose path is wanted, as arrays of their own of type dtype; a dict without any is left out."""
    out = {}
    for name, value in tree.items():
        path = prefix + name
        if isinstance(value, dict):
            if inner := _pick(value, wanted, dtype, path + "/"):
                out[name] = inner
        elif wanted(path):
            out[name] = jnp.array(value, dtype)  # a copy: steps take over what trains
    return out


def _join(a: dict, b: dict) -> dict:
    """Two nested dicts without a common leaf as one."""
    out = {**a, **b}
    for name in a.keys() & b.keys():
        out[name] = _join(a[name], b[name])
    return out
