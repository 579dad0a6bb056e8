"""AdamW with warm-up and cosine, decay on matrices only, float32 masters, and the guarded update."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cxr_jax.config.sections import OptimizerConfig
from cxr_jax.runtime.trees import Tree, float32, path_string

# Norms and biases: a decay towards 0 would change what they mean, not how large the model is.
_NEVER_DECAYS = re.compile(r"(norm|bias|ln_q)")


def learning_rate(settings: OptimizerConfig, steps: int) -> optax.Schedule:
    """Build the schedule over `steps`: linear warm-up, then cosine to `final_fraction` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.lr,
        warmup_steps=max(1, settings.warmup_steps),
        # A run shorter than its warm-up ends on the way up.
        decay_steps=max(steps, settings.warmup_steps + 1),
        end_value=settings.lr * settings.final_fraction,
    )


def decay_mask(params: Tree) -> Tree:
    """Mark the leaves that weight decay applies to: not norms, not biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: not _NEVER_DECAYS.search(path_string(path)), params
    )


def make_optimizer(
    settings: OptimizerConfig, steps: int, updates: int = 1
) -> optax.GradientTransformation:
    """Build the optimizer of all that trains (see `trainable`).

    Args:
        steps: of the whole run.
        updates: optimizer steps of one step of the run; they share its learning rate.
    """
    rate_of_step = learning_rate(settings, steps)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            lambda count: rate_of_step(count // updates),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=decay_mask,
        ),
    )


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
