"""LoRA: trained low-rank additions to frozen kernels, W + (alpha / rank) A B (Hu et al., arXiv:2106.09685).

Adapters are a tree of their own, {module path...: {"a": float32 [.., din, r], "b": float32 [.., r, dout]}}, stacked
where the kernel is. `join` hands them to the forward beside the parameters, `merge` adds them for good.
`weights/peft_folder.py` reads and writes them.
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cxr_jax.errors import UserError
from cxr_jax.models.layers import merge_adapters
from cxr_jax.runtime.trees import Tree, flatten

# By what people train: the language model alone, the tower, or the layers between them. Of a group, each model has the
# modules of its family: gate, up and down, or fc1 and fc2; qkv, or q, k and v.
TARGETS = {
    "decoder": tuple(
        f"text/layers/{module}"
        for module in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    ),
    "vision": tuple(
        f"vision/blocks/{module}"
        for module in (
            *("attn/qkv", "attn/proj", "mlp/gate", "mlp/up", "mlp/down"),
            *("mlp/fc1", "mlp/fc2", "attn/q", "attn/k", "attn/v"),
        )
    ),
    "merger": ("vision/merger/fc1", "vision/merger/fc2", "vision/taps/fc1", "vision/taps/fc2"),
}
"""Group -> the Linear modules that can carry an adapter."""

# Of families that came later, in the order in which they came.
_LATER = (
    *("vision/blocks/mlp/fc1", "vision/blocks/mlp/fc2", "vision/taps/fc1", "vision/taps/fc2"),
    *("vision/blocks/attn/q", "vision/blocks/attn/k", "vision/blocks/attn/v"),
)
# In a fixed order: `init` draws by a module's place in it, so new targets belong at the end.
PATHS = (*(path for group in TARGETS.values() for path in group if path not in _LATER), *_LATER)


@dataclass(frozen=True)
class Lora:
    """Which modules carry adapters, and how large.

    Attributes:
        rank: r, the inner size of an adapter.
        alpha: the sum is scaled by alpha / r.
        targets: groups or single paths of TARGETS.

    Raises:
        UserError: for values out of range, and for targets that are unknown or named twice.
    """

    rank: int  # at least 1
    alpha: float  # above 0
    targets: tuple[str, ...] = ("decoder",)

    def __post_init__(self) -> None:
        """Check every field."""
        # Checked here, because settings come from flags and from files of others alike.
        if not _is_number(self.rank, int) or self.rank < 1:
            raise UserError(f"lora rank must be an integer >= 1, got {self.rank!r}")
        if not _is_number(self.alpha, int, float) or not 0 < self.alpha <= sys.float_info.max:
            raise UserError(f"lora alpha must be a finite number > 0, got {self.alpha!r}")
        if not isinstance(self.targets, tuple) or not self.targets:
            raise UserError(
                f"lora targets must be a tuple of names, at least one, got {self.targets!r}"
            )
        # A name may be a group or the path of one module.
        for target in self.targets:
            if target not in TARGETS and target not in PATHS:
                raise UserError(
                    f"lora target {target!r} is unknown; known are {', '.join(TARGETS)}, and the paths of "
                    f"single modules such as {PATHS[0]}"
                )
        # A group and one of its paths would give the path twice.
        expanded = [
            module_path for target in self.targets for module_path in TARGETS.get(target, (target,))
        ]
        if repeated := sorted(
            {module_path for module_path in expanded if expanded.count(module_path) > 1}
        ):
            raise UserError(f"lora targets name {repeated[0]} twice")

    @property
    def scale(self) -> float:
        """What the product of the two halves is multiplied by."""
        return self.alpha / self.rank

    def paths_in(self, modules: Collection[str]) -> tuple[str, ...]:
        """List the targeted modules that a model has, in the order of TARGETS.

        Args:
            modules: paths of the model's Linear modules, see `modules_of`.

        Raises:
            UserError: for a target that the model has nothing of.
        """
        for target in self.targets:
            if not set(TARGETS.get(target, (target,))) & set(modules):
                raise UserError(f"lora target {target!r}: this model has no such module")
        return tuple(
            module_path
            for group, group_paths in TARGETS.items()
            for module_path in group_paths
            if {group, module_path} & set(self.targets) and module_path in modules
        )


def _is_number(value: object, *kinds: type) -> bool:
    # A bool is an int to Python, and no rank.
    return isinstance(value, kinds) and not isinstance(value, bool)


def modules_of(params: Tree) -> set[str]:
    """List the modules of a model that can carry an adapter, as paths. Of arrays, or of shapes."""
    has_kernel = {"/".join(path[:-1]) for path, _ in flatten(params) if path[-1] == "kernel"}
    return has_kernel.intersection(PATHS)


def init(params: Tree, lora: Lora, key: jax.Array) -> Tree:
    """Draw fresh adapters: a uniform in +-1/sqrt(din), as in PEFT, and b zero.

    A module's a depends on the key, its own shape and the rank only, not on the other targets.

    Args:
        params: arrays or shapes.

    Raises:
        UserError: for a rank that a target cannot have, and for a target that the model has nothing of.
    """
    adapters: Tree = {}
    for module_path in lora.paths_in(modules_of(params)):
        # Down to the module in both trees.
        module, adapter = params, adapters
        for name in module_path.split("/"):
            module, adapter = module[name], adapter.setdefault(name, {})
        # Stacked layers have an axis in front; the last two are the matrix.
        *stack, din, dout = module["kernel"].shape
        if lora.rank > min(din, dout):
            raise UserError(
                f"lora rank {lora.rank} is more than {module_path} [{din}, {dout}] can have"
            )
        # By its place in all PATHS, so that another choice of targets draws the same.
        own_key = jax.random.fold_in(key, PATHS.index(module_path))
        a_shape, half_width = (*stack, din, lora.rank), din**-0.5
        adapter["a"] = jax.random.uniform(own_key, a_shape, jnp.float32, -half_width, half_width)
        # Zero: at first the model is the base model.
        adapter["b"] = jnp.zeros((*stack, lora.rank, dout), jnp.float32)
    return adapters


def join(params: Tree, adapters: Tree, lora: Lora) -> Tree:
    """Put adapters beside their kernels, for the forward: "lora_a" (scaled) and "lora_b"; kernels are untouched.

    Differentiate a loss of join(params, adapters, lora) with respect to the adapters alone: the kernels' gradients
    are then never formed.
    """

    def beside(module: Tree, adapter: Tree) -> Tree:
        # Scaled here and not after the product: a is much smaller than what it gives.
        return {**module, "lora_a": lora.scale * adapter["a"], "lora_b": adapter["b"]}

    return _at_targets(params, adapters, beside)


def merge(params: Tree, adapters: Tree, lora: Lora) -> Tree:
    """Add adapters to their kernels for good: kernel + scale * a b, formed in float32, in the types of `params`."""

    def added(module: Tree, adapter: Tree) -> Tree:
        return merge_adapters(join(module, adapter, lora))

    return _at_targets(params, adapters, added)


def _at_targets(params: Tree, adapters: Tree, change: Callable[[Tree, Tree], Tree]) -> Tree:
    """A copy of the tree with change(module's parameters, {"a", "b"}) at every adapter."""
    # An adapter ends where its two halves stand; above it are only names of modules.
    if adapters.keys() == {"a", "b"}:
        return change(params, adapters)
    changed = {
        name: _at_targets(params[name], adapter, change) for name, adapter in adapters.items()
    }
    return {**params, **changed}
