"""What of a model trains: everything, all but frozen patterns, or LoRA adapters on a frozen base.

A run's train state holds only what trains. The rest, `frozen`, goes to each step beside the state: it has no gradient,
no optimizer moments and no copy in a checkpoint (it comes from `config.model` again), and it lies in the compute type,
in which it is used anyway.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cxr_jax.config.sections import LoraConfig
from cxr_jax.errors import UserError
from cxr_jax.models import lora as lora_adapters
from cxr_jax.runtime.trees import Tree, path_string
from cxr_jax.weights.export import Adapters
from cxr_jax.weights.pretrained import DTYPES


@dataclass(frozen=True)
class Trainable:
    """What trains, and the types of both halves.

    Attributes:
        frozen_patterns: regexes of parameter paths that do not train.
        adapters: LoRA in place of all of "model", or None. Adapters are always float32: they are small.
        dtype: of the computation and of what is frozen.
        param_dtype: of what trains (with bfloat16 the optimizer keeps float32 masters, see `optimizer.init_state`).
    """

    frozen_patterns: tuple[str, ...] = ()
    adapters: lora_adapters.Lora | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @classmethod
    def create(
        cls, lora: LoraConfig, frozen: tuple[str, ...], dtype: str, param_dtype: str
    ) -> Self:
        """Make one from a run's settings: `config.lora`, `config.optim.frozen` and the two types by name.

        Raises:
            UserError: for LoRA settings that mean nothing, or patterns beside adapters.
        """
        adapters = None
        # Rank 0 is the default: no adapters.
        if lora.rank:
            adapters = lora_adapters.Lora(lora.rank, lora.alpha, lora.targets)
            if frozen:
                raise UserError(
                    "config.optim.frozen must be empty with LoRA: the whole model is frozen then"
                )
        return cls(frozen, adapters, DTYPES[dtype], DTYPES[param_dtype])

    def split(self, params: Tree, key: jax.Array, trains: bool = True) -> tuple[Any, Tree]:
        """Split a model's parameters, and what else is trained beside them, into both halves, all on the device.

        Args:
            params: {"model": ..., ...}.
            key: for fresh adapters.
            trains: False gives None for what trains.

        Returns:
            (train, frozen).

        Raises:
            UserError: for a pattern that matches no parameter: what was meant to be frozen would train; for patterns
                that leave nothing to train.
        """
        self._check_patterns(params)
        # Each half in its own type: what is frozen is only read.
        frozen = _pick(params, self._is_frozen, self.dtype)
        if not trains:
            return None, frozen
        train = _pick(params, lambda path: not self._is_frozen(path), self.param_dtype)
        if self.adapters:
            train["lora"] = lora_adapters.init(params["model"], self.adapters, key)
        return train, frozen

    def _is_frozen(self, path: str) -> bool:
        # Under adapters the whole model stays; what is trained beside it still trains.
        if self.adapters and path.startswith("model/"):
            return True
        return any(re.search(pattern, path) for pattern in self.frozen_patterns)

    def _check_patterns(self, params: Tree) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        paths = [path_string(path) for path, _ in leaves]
        for pattern in self.frozen_patterns:
            if not any(re.search(pattern, path) for path in paths):
                raise UserError(f"config.optim.frozen: {pattern!r} matches no parameter")
        # Heads beside the model are no model: they would train alone.
        of_model = [path for path in paths if path.startswith("model/")]
        if not self.adapters and all(map(self._is_frozen, of_model)):
            raise UserError(
                "config.optim.frozen: the patterns match all of the model, so nothing would train"
            )

    def merge(self, train: Tree, frozen: Tree) -> Tree:
        """Put both halves into one tree that a forward pass takes, {"model": ..., ...}; no array is copied."""
        params = join_trees(_without_adapters(train), frozen)
        # Beside their kernels, which no gradient is formed of.
        if self.adapters:
            params["model"] = lora_adapters.join(params["model"], train["lora"], self.adapters)
        return params

    def base_params(self, frozen: Tree) -> Tree | None:
        """Give the model that adapters started from; None without adapters: what it was has been trained on."""
        return frozen["model"] if self.adapters else None

    def export_params(self, train: Tree, frozen: Tree) -> Tree:
        """Give the model alone, adapters folded into its kernels: for export."""
        params = join_trees(_without_adapters(train), frozen)["model"]
        if self.adapters:
            return lora_adapters.merge(params, train["lora"], self.adapters)
        return params

    def export_adapters(self, train: Tree) -> Adapters | None:
        """Give the adapters alone, if there are any: for export."""
        return Adapters(train["lora"], self.adapters) if self.adapters else None


def _without_adapters(train: Tree) -> Tree:
    return {name: value for name, value in train.items() if name != "lora"}


def _pick(tree: Tree, is_wanted: Callable[[str], bool], dtype: DTypeLike, prefix: str = "") -> Tree:
    """The leaves whose path is wanted, as arrays of their own of type dtype; a dict without any is left out."""
    picked: Tree = {}
    for name, value in tree.items():
        path = prefix + name
        if isinstance(value, dict):
            if inner := _pick(value, is_wanted, dtype, path + "/"):
                picked[name] = inner
        elif is_wanted(path):
            picked[name] = jnp.array(value, dtype)  # a copy: steps take over what trains
    return picked


def split_tower(train: Tree) -> tuple[Tree, Tree]:
    """Split what trains into what the image features depend on and the rest; `join_trees` undoes it.

    Of either kind, the model's parameters and adapters, and without a leaf where the tower is frozen.
    """
    # Groups are "model" and "lora": adapters of the tower are part of it.
    tower = {group: {"vision": tree["vision"]} for group, tree in train.items() if "vision" in tree}
    rest = {
        group: {name: value for name, value in tree.items() if name != "vision"}
        for group, tree in train.items()
    }
    return tower, rest


def join_trees(first: Tree, second: Tree) -> Tree:
    """Put two nested dicts without a common leaf into one."""
    joined = {**first, **second}
    # Only dicts can be in both; a leaf is in one of them.
    for name in first.keys() & second.keys():
        joined[name] = join_trees(first[name], second[name])
    return joined
