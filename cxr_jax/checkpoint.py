"""Orbax checkpoints of the plain-dict train state: the last two for resuming, and one best-by-OOD."""

import os

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """`<workdir>/checkpoints/`: `last/` holds the newest `keep` states, `best/` the parameters with the best score.

    Saves are synchronous on purpose: the state is small on one machine, and what `save` returned from is on disk.
    """

    def __init__(self, workdir: str, keep: int = 2):
        root = os.path.abspath(os.path.join(workdir, "checkpoints"))

        def manager(name, n):
            options = ocp.CheckpointManagerOptions(
                max_to_keep=n, enable_async_checkpointing=False, cleanup_tmp_directories=True, create=True
            )
            return ocp.CheckpointManager(os.path.join(root, name), options=options)

        self.last, self.best = manager("last", keep), manager("best", 1)

    def save(self, step: int, state: dict, meta: dict) -> None:
        """Saves the whole state at `step` with JSON-able `meta`. A step that is already saved is left alone."""
        if step in self.last.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.last.save(step, args=args, force=True)
        self.last.wait_until_finished()

    def restore(self, like: dict) -> tuple[dict, dict, int] | None:
        """(state, meta, step) of the newest checkpoint that loads, or None. A damaged one is passed over, aloud."""
        for step in sorted(self.last.all_steps(), reverse=True):
            try:
                args = ocp.args.Composite(
                    state=ocp.args.StandardRestore(_abstract(like)), meta=ocp.args.JsonRestore()
                )
                got = self.last.restore(step, args=args)
                return _own(got["state"]), got["meta"], step
            except Exception as e:  # noqa: BLE001 - whatever is wrong with it, the one before may be good
                print(
                    f"checkpoint of step {step} does not load ({type(e).__name__}); trying the one before",
                    flush=True,
                )
        return None

    def save_best(self, step: int, params: dict, meta: dict) -> None:
        """Keeps `params` as the best so far."""
        args = ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
        if step not in self.best.all_steps():
            self.best.save(step, args=args, force=True)
            self.best.wait_until_finished()

    def restore_best(self, like: dict) -> tuple[dict, dict, int] | None:
        """(params, meta, step) of the best checkpoint, or None when there is none."""
        step = self.best.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(like)), meta=ocp.args.JsonRestore()
        )
        got = self.best.restore(step, args=args)
        return _own(got["params"]), got["meta"], step

    def close(self) -> None:
        self.last.close()
        self.best.close()


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=getattr(x, "sharding", None)), tree
    )


def _own(tree):
    # Restored arrays can share memory with the reader's buffers; donated steps need arrays of their own.
    return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), tree)
