"""AdamW with warm-up and cosine, rates of parts, a mean of the parameters, float32 masters, and the guarded update."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cxr_jax.config.sections import OptimizerConfig
from cxr_jax.runtime.trees import Tree, float32, path_string

# Norms and biases: a decay towards 0 would change what they mean, not how large the model is.
_NEVER_DECAYS = re.compile(r"(norm|bias|ln_q)")


def learning_rate(
    settings: OptimizerConfig, steps: int, *, from_zero: bool = False
) -> optax.Schedule:
    """Build the schedule over `steps`: linear warm-up, then cosine to `final_fraction` of the peak.

    Step i, counted from 0, of a warm-up of w has (i + 1) / w of the peak, step w the peak: no step learns nothing.

    Args:
        from_zero: i / w instead, and w at least 1: the first step learns nothing. Runs of earlier versions go on so.
    """
    peak = settings.lr
    # As Hugging Face has it: the ratio counts where no number of steps is given, and is rounded up.
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * steps)
    first = peak / max(1, warmup)
    if from_zero:
        warmup, first = max(1, warmup), 0.0
    # A run shorter than its warm-up ends on the way up.
    # From the step behind the warm-up, which has the peak, to one behind the last.
    falls = max(steps - warmup, 1)
    decay = optax.cosine_decay_schedule(peak, falls, alpha=settings.final_fraction)
    if not warmup:
        return decay
    rise = optax.linear_schedule(first, peak, warmup if from_zero else warmup - 1)
    return optax.join_schedules([rise, decay], [warmup])


def began_from_zero(meta: Mapping[str, Any]) -> bool:
    """Tell whether a run that resumes began with `from_zero`, from what its checkpoint says beside its arrays.

    Args:
        meta: {} of a new run.
    """
    return bool(meta) and meta.get("from_zero", True)


def decay_mask(params: Tree) -> Tree:
    """Mark the leaves that weight decay applies to: not norms, not biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: not _NEVER_DECAYS.search(path_string(path)), params
    )


def make_optimizer(
    settings: OptimizerConfig, steps: int, updates: int = 1, *, from_zero: bool = False
) -> optax.GradientTransformation:
    """Build the optimizer of all that trains (see `trainable`).

    Args:
        steps: of the whole run.
        updates: optimizer steps of one step of the run; they share its learning rate.
        from_zero: as for `learning_rate`.
    """
    rate_of_step = learning_rate(settings, steps, from_zero=from_zero)
    transformations = [
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            lambda count: rate_of_step(count // updates),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=decay_mask,
            # The mean of squares stays: in bfloat16 it would stop where b2 is near 1.
            mu_dtype=None if settings.mu_dtype == "float32" else settings.mu_dtype,
        ),
    ]
    # What is not asked for has no part in the state either.
    rates = {
        "tower": settings.lr_tower,
        "merger": settings.lr_merger,
        "decoder": settings.lr_decoder,
    }
    factors = {part: rate / settings.lr for part, rate in rates.items() if rate}
    if factors:
        transformations.append(optax.stateless(functools.partial(_scale_parts, factors)))
    if settings.ema:
        transformations.append(_mean_of_params(settings.ema))
    return optax.chain(*transformations)


# ---- Rates of parts ----------------------------------------------------------------------------------------


def part_of(path: str) -> str:
    """Name the part of a model that a parameter, or an adapter of one, belongs to: tower, merger, decoder, or "other".

    What brings a tower's taps to the decoder is a merger, too; heads beside the model are "other".
    """
    # "model" or "lora" comes first, or the name of a head.
    names = path.split("/")
    if "vision" in names:
        return "merger" if {"merger", "taps"} & set(names) else "tower"
    return "decoder" if "text" in names else "other"


def _scale_parts(factors: Mapping[str, float], updates: Tree, params: Tree | None = None) -> Tree:
    def scale(path: Any, update: jax.Array) -> jax.Array:
        return update * factors.get(part_of(path_string(path)), 1.0)

    return jax.tree_util.tree_map_with_path(scale, updates)


# ---- The mean of the parameters over the run ---------------------------------------------------------------


class MeanState(NamedTuple):
    """An exponential moving average of what trains, in float32, and the number of updates that are in it."""

    mean: Tree
    step: jax.Array


def _mean_of_params(decay: float) -> optax.GradientTransformation:
    """Keep mean <- d mean + (1 - d) params behind each update, d = min(decay, (1 + n) / (10 + n)) after n updates.

    The rise is that of TensorFlow's `ExponentialMovingAverage`: without it a short run's mean would stay at its start.
    """

    def init(params: Tree) -> MeanState:
        # A copy: a step takes over both.
        return MeanState(jax.tree.map(jnp.array, params), jnp.zeros((), jnp.int32))

    def update(
        updates: Tree, state: MeanState, params: Tree | None = None
    ) -> tuple[Tree, MeanState]:
        assert params is not None
        # Updates that were left out are none: the guard puts this state back, too.
        kept = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        mean = jax.tree.map(
            lambda mean, param, update: kept * mean + (1 - kept) * (param + update),
            state.mean,
            params,
            updates,
        )
        return updates, MeanState(mean, state.step + 1)

    return optax.GradientTransformation(init, update)


def params_to_use(state: Tree) -> Tree:
    """Give what is evaluated and exported of a train state: the mean over the run where one is kept, in its types."""
    nodes = jax.tree.leaves(state.get("opt_state"), is_leaf=_is_mean)
    # Wherever in the chain it stands; without one nothing is copied.
    means = [node.mean for node in nodes if _is_mean(node)]
    if not means:
        return state["params"]
    return jax.tree.map(lambda mean, param: mean.astype(param.dtype), means[0], state["params"])


def _is_mean(node: Any) -> bool:
    return isinstance(node, MeanState)


# ---- Updates ------------------------------------------------------------------------------------------------


def guarded_update(
    optimizer: optax.GradientTransformation, state: Tree, gradients: Tree
) -> tuple[Tree, jax.Array]:
    """Take one optimizer step, skipped and counted if any gradient is not finite.

    The step counter always advances: it is the position in the data.

    Args:
        state: dict(params, opt_state, step, skipped and, for narrow parameters, master).

    Returns:
        The state and the gradients' norm.
    """
    gradients = float32(gradients)
    norm = optax.global_norm(gradients)
    is_finite = jnp.isfinite(norm)
    # Zeros in place of what is not finite: the optimizer's arithmetic runs either way.
    safe = jax.tree.map(lambda gradient: jnp.where(is_finite, gradient, 0.0), gradients)
    master = state.get("master", state["params"])
    updates, opt_state = optimizer.update(safe, state["opt_state"], master)

    def keep(new: Any, old: Any) -> Any:
        # The schedule counts skipped updates, too: the learning rate is a function of the step.
        return new if _is_schedule(new) else jnp.where(is_finite, new, old)

    new_state = {
        "params": jax.tree.map(keep, optax.apply_updates(master, updates), master),
        "opt_state": jax.tree.map(keep, opt_state, state["opt_state"], is_leaf=_is_schedule),
        "step": state["step"] + 1,
        "skipped": state["skipped"] + jnp.where(is_finite, 0, 1),
    }
    if "master" in state:
        new_state["master"] = new_state["params"]
        new_state["params"] = jax.tree.map(
            lambda wide, narrow: wide.astype(narrow.dtype), new_state["master"], state["params"]
        )
    return new_state, norm


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def init_state(optimizer: optax.GradientTransformation, params: Tree) -> Tree:
    """Build a train state: plain nested dict of params, opt_state, step, skipped.

    If parameters are narrower than float32, also of their float32 masters, which the optimizer updates: steps of a
    small learning rate vanish in bfloat16. The moments are float32 always.
    """
    state = {
        "params": params,
        "opt_state": optimizer.init(float32(params)),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }
    if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params)):
        # Copies: of what is float32 already, too, for a step takes over both.
        state["master"] = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return state
