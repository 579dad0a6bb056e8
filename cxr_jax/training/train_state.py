"""The state that a run starts or goes on with."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import optax

from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.runtime.layout import Layout
from cxr_jax.runtime.trees import Tree
from cxr_jax.training.optimizer import init_state
from cxr_jax.training.trainable import Trainable


@dataclass(frozen=True, kw_only=True)
class StartState:
    """Where a run begins: a checkpoint, or step 0.

    Attributes:
        state: the train state, on the devices.
        train: what trains as it is at step 0, on the host; None after a resume that did not ask to keep it.
        frozen: the parameters that do not train, on the devices.
        meta: what the checkpoint says beside its arrays; {} at step 0.
        step: steps that are done.
    """

    state: Tree
    train: Tree | None
    frozen: Tree
    meta: dict[str, Any]
    step: int


def train_state(
    params: Tree,
    trainable: Trainable,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    checkpoints: Checkpoints,
    *,
    seed: int,
    keep_start: bool = False,
) -> StartState:
    """Load the newest checkpoint that can be read, or make the state of step 0.

    A checkpoint is read, and the state of step 0 is not made then: a run that fits in the memory can be resumed in it.

    Args:
        params: {"model": ..., ...} as the run starts, on the host.
        seed: of fresh adapters.
        keep_start: keep `StartState.train` after a resume, too.
    """
    split = functools.partial(trainable.split, key=jax.random.key(seed))
    like = jax.eval_shape(lambda params: init_state(optimizer, split(params)[0]), params)
    # ---- The newest checkpoint; its arrays come to lie as the state of step 0 would ----
    restored = checkpoints.restore(layout.like(like))
    with layout.on_host():
        train, frozen = split(params, trains=keep_start or not restored)
    frozen = layout.state(frozen)

    # ---- Where that leaves the run ----
    if restored:
        state, meta, step = restored
        print(f"resuming at step {step}", flush=True)
    else:
        state, meta, step = layout.state(init_state(optimizer, layout.state(train))), {}, 0
    return StartState(state=state, train=train, frozen=frozen, meta=meta, step=step)
