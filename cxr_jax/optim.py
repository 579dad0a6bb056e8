"""AdamW with warm-up and cosine, decay on matrices only, frozen parts by pattern, and the guarded update."""

import re

import jax
import jax.numpy as jnp
import optax

from cxr_jax.errors import UserError


def path_string(path) -> str:
    """('text', 'layers', 'q') -> 'text/layers/q'."""
    return "/".join(str(getattr(p, "key", p)) for p in path)


def learning_rate(config, steps: int):
    """Schedule over `steps`: linear warm-up, then cosine to `final_fraction` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.lr,
        warmup_steps=max(1, config.warmup_steps),
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.lr * config.final_fraction,
    )


def decay_mask(params):
    """True on leaves that weight decay applies to: not norms, not biases."""
    return jax.tree_util.tree_map_with_path(
        lambda p, x: not re.search(r"(norm|bias|ln_q)", path_string(p)), params
    )


def make(config, params, steps: int):
    """optax transformation for `params` over `steps`. `config.frozen`: regexes of paths that do not train.

    Raises UserError for a pattern that matches no path: what was meant to be frozen would train.
    """
    paths = [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in config.frozen:
        if not any(re.search(pattern, p) for p in paths):
            raise UserError(f"config.optim.frozen: {pattern!r} matches no parameter")
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
    if not config.frozen:
        return tx
    label = lambda p, x: "frozen" if any(re.search(f, path_string(p)) for f in config.frozen) else "train"
    return optax.multi_transform(
        {"train": tx, "frozen": optax.set_to_zero()}, jax.tree_util.tree_map_with_path(label, params)
    )


def guarded_update(tx, state, grads):
    """One optimizer step, skipped and counted if any gradient is not finite.

    state: dict(params, opt_state, step, skipped). Returns (state, grad_norm). The step counter always advances: it is
    the position in the data.
    """
    norm = optax.global_norm(grads)
    ok = jnp.isfinite(norm)
    safe = jax.tree.map(lambda g: jnp.where(ok, g, 0.0), grads)
    updates, opt_state = tx.update(safe, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
    return {
        "params": keep(params, state["params"]),
        "opt_state": keep(opt_state, state["opt_state"]),
        "step": state["step"] + 1,
        "skipped": state["skipped"] + jnp.where(ok, 0, 1),
    }, norm


def init_state(tx, params):
    """Train state: plain nested dict of params, opt_state, step, skipped."""
    return {
        "params": params,
        "opt_state": tx.init(params),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }
