"""LoRA: trained low-rank additions to frozen kernels, W + (alpha / rank) A B (Hu et al., arXiv:2106.09685).

Adapters are a tree of their own, {module path...: {"a": float32 [.., din, r], "b": float32 [.., r, dout]}}, stacked
where the kernel is. `join` hands them to the forward beside the parameters, `merge` adds them for good.
`peft.py` reads and writes them.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cxr_jax.errors import UserError
from cxr_jax.models.layers import merge_adapters

TARGETS = {
    "decoder": tuple(
        f"text/layers/{x}"
        for x in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    ),
    "vision": tuple(
        f"vision/blocks/{x}" for x in ("attn/qkv", "attn/proj", "mlp/gate", "mlp/up", "mlp/down")
    ),
    "merger": ("vision/merger/fc1", "vision/merger/fc2"),
}
"""Group -> the Linear modules that can carry an adapter."""

PATHS = tuple(path for group in TARGETS.values() for path in group)


@dataclass(frozen=True)
class Lora:
    """rank r; alpha: the sum is scaled by alpha / r; targets: groups or single paths of TARGETS.

    Raises UserError for values out of range, and for targets that are unknown or named twice.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("decoder",)

    def __post_init__(self):
        number = lambda x, *kinds: isinstance(x, kinds) and not isinstance(x, bool)
        if not number(self.rank, int) or self.rank < 1:
            raise UserError(f"lora rank must be an integer >= 1, got {self.rank!r}")
        if not number(self.alpha, int, float) or not 0 < self.alpha <= sys.float_info.max:
            raise UserError(f"lora alpha must be a finite number > 0, got {self.alpha!r}")
        if not isinstance(self.targets, tuple) or not self.targets:
            raise UserError(
                f"lora targets must be a tuple of names, at least one, got {self.targets!r}"
            )
        for name in self.targets:
            if name not in TARGETS and name not in PATHS:
                raise UserError(
                    f"lora target {name!r} is unknown; known are {', '.join(TARGETS)}, and the paths of "
                    f"single modules such as {PATHS[0]}"
                )
        expanded = [path for name in self.targets for path in TARGETS.get(name, (name,))]
        if twice := sorted({path for path in expanded if expanded.count(path) > 1}):
            raise UserError(f"lora targets name {twice[0]} twice")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def paths(self) -> tuple[str, ...]:
        """The targeted modules, in the order of TARGETS."""
        return tuple(
            p for group, paths in TARGETS.items() for p in paths if {group, p} & set(self.targets)
        )


def init(params: dict, lora: Lora, key) -> dict:
    """Fresh adapters for params (arrays or shapes): a uniform in +-1/sqrt(din), as in PEFT, and b zero.

    A module's a depends on the key, its own shape and the rank only, not on the other targets. Raises UserError for a
    rank that a target cannot have.
    """
    adapters: dict = {}
    for path in lora.paths:
        node, out = params, adapters
        for name in path.split("/"):
            node, out = node[name], out.setdefault(name, {})
        *stack, din, dout = node["kernel"].shape
        if lora.rank > min(din, dout):
            raise UserError(f"lora rank {lora.rank} is more than {path} [{din}, {dout}] can have")
        own = jax.random.fold_in(key, PATHS.index(path))
        bound = din**-0.5
        out["a"] = jax.random.uniform(own, (*stack, din, lora.rank), jnp.float32, -bound, bound)
        out["b"] = jnp.zeros((*stack, lora.rank, dout), jnp.float32)
    return adapters


def join(params: dict, adapters: dict, lora: Lora) -> dict:
    """Parameters for the forward: each target also holds "lora_a" (scaled) and "lora_b"; kernels are untouched.

    Differentiate a loss of join(params, adapters, lora) with respect to the adapters alone: the kernels' gradients
    are then never formed.
    """
    return _at_targets(
        params, adapters, lambda p, x: {**p, "lora_a": lora.scale * x["a"], "lora_b": x["b"]}
    )


def merge(params: dict, adapters: dict, lora: Lora) -> dict:
    """Parameters of the structure and types of `params`, kernel + scale * a b at the targets, formed in float32."""
    add = lambda p, x: merge_adapters(join(p, x, lora))
    return _at_targets(params, adapters, add)


def _at_targets(params: dict, adapters: dict, change: Callable) -> dict:
    """A copy of the tree with change(module's parameters, {"a", "b"}) at every adapter."""
    if adapters.keys() == {"a", "b"}:
        return change(params, adapters)
    return {
        **params,
        **{name: _at_targets(params[name], x, change) for name, x in adapters.items()},
    }
