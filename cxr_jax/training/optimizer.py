"""AdamW with warm-up and cosine, decay on matrices only, float32 masters, and the guarded update."""

import re

import jax
import jax.numpy as jnp
import optax

from cxr_jax.config.sections import OptimizerConfig
from cxr_jax.runtime.trees import float32, path_string


def learning_rate(settings: OptimizerConfig, steps: int):
    """Schedule over `steps`: linear warm-up, then cosine to `final_fraction` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.lr,
        warmup_steps=max(1, settings.warmup_steps),
        decay_steps=max(steps, settings.warmup_steps + 1),
        end_value=settings.lr * settings.final_fraction,
    )


def decay_mask(params):
    """True on leaves that weight decay applies to: not norms, not biases."""
    return jax.tree_util.tree_map_with_path(
        lambda p, x: not re.search(r"(norm|bias|ln_q)", path_string(p)), params
    )


def make_optimizer(settings: OptimizerConfig, steps: int, updates: int = 1):
    """optax transformation over `steps` of so many updates each for all that trains (see `trainable`)."""
    of_step = learning_rate(settings, steps)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            lambda count: of_step(count // updates),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=decay_mask,
        ),
    )


def guarded_update(optimizer, state, grads):
    """One optimizer step, skipped and counted if any gradient is not finite.

    state: dict(params, opt_state, step, skipped and, for narrow parameters, master). Returns (state, grad_norm). The
    step counter always advances: it is the position in the data.
    """
    grads = float32(grads)
    norm = optax.global_norm(grads)
    ok = jnp.isfinite(norm)
    safe = jax.tree.map(lambda g: jnp.where(ok, g, 0.0), grads)
    master = state.get("master", state["params"])
    updates, opt_state = optimizer.update(safe, state["opt_state"], master)
    # The schedule counts skipped updates, too: the learning rate is a function of the step.
    counts = lambda x: isinstance(x, optax.ScaleByScheduleState)
    kept = lambda a, b: a if counts(a) else jnp.where(ok, a, b)
    keep = lambda new, old: jax.tree.map(kept, new, old, is_leaf=counts)
    new = {
        "params": keep(optax.apply_updates(master, updates), master),
        "opt_state": keep(opt_state, state["opt_state"]),
        "step": state["step"] + 1,
        "skipped": state["skipped"] + jnp.where(ok, 0, 1),
    }
    if "master" in state:
        new["master"] = new["params"]
        new["params"] = jax.tree.map(lambda m, p: m.astype(p.dtype), new["master"], state["params"])
    return new, norm


def init_state(optimizer, params):
    """Train state: plain nested dict of params, opt_state, step, skipped.

    If parameters are narrower than float32, also of their float32 masters, which the optimizer updates: steps of a
    small learning rate vanish in bfloat16. The moments are float32 always.
    """
    state = {
        "params": params,
        "opt_state": optimizer.init(float32(params)),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }
    narrow = any(x.dtype != jnp.float32 for x in jax.tree.leaves(params))
    # Copies: of what is float32 already, too, for a step takes over both.
    return (
        {**state, "master": jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)}
        if narrow
        else state
    )
