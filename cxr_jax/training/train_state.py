"""The state that a run starts or goes on with."""

import functools

import jax


def train_state(config, params: dict, trainable, tx, layout, checkpoints, keep_start=False):
    """(state, train, fixed, meta, step): the newest checkpoint that loads, or step 0 of params {"model": ..., ...}.

    meta: the checkpoint's, {} at step 0. train: what trains as it is at step 0, not divided yet; None after a resume
    if not keep_start. A checkpoint is read, and the state of step 0 is not made then: a run that fits in the memory can
    be resumed in it.
    """
    from cxr_jax.training import optimizer

    split = functools.partial(trainable.split, key=jax.random.key(config.seed))
    like = jax.eval_shape(lambda params: optimizer.init_state(tx, split(params)[0]), params)
    found = checkpoints.restore(layout.like(like))
    with layout.on_host():
        train, frozen = split(params, trains=keep_start or not found)
    frozen = layout.state(frozen)
    if found:
        print(f"resuming at step {found[2]}", flush=True)
        return found[0], train, frozen, *found[1:]
    return layout.state(optimizer.init_state(tx, layout.state(train))), train, frozen, {}, 0
