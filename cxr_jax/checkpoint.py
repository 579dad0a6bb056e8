"""Orbax checkpoints of the plain-dict train state: the last two for resuming, and one best-by-OOD."""

import os
import shutil
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """`<workdir>/checkpoints/`: `last/` holds the newest `keep` states, `best/` the parameters with the best score.

    Saves are synchronous on purpose: the state is small on one machine, and what `save` returned from is on disk.
    Each carries a checksum over its arrays, so that a bit that flipped on disk is noticed, too.
    """

    def __init__(self, workdir: str, keep: int = 2):
        self._root = os.path.abspath(os.path.join(workdir, "checkpoints"))

        def manager(name, n):
            options = ocp.CheckpointManagerOptions(
                max_to_keep=n, enable_async_checkpointing=False, cleanup_tmp_directories=True, create=True
            )
            return ocp.CheckpointManager(os.path.join(self._root, name), options=options)

        self.last, self.best = manager("last", keep), manager("best", 1)

    def save(self, step: int, state: dict, meta: dict) -> None:
        """Saves the whole state at `step` with JSON-able `meta`. A step that is already saved is left alone."""
        if step not in self.last.all_steps():
            _save(self.last, step, state, meta)

    def restore(self, like: dict) -> tuple[dict, dict, int] | None:
        """(state, meta, step) of the newest checkpoint that loads, or None. A damaged one is passed over, aloud.

        It moves to `checkpoints/damaged_*`: its step will be saved again, and nothing is deleted.
        """
        return self._newest("last", self.last, like)

    def save_best(self, step: int, params: dict, meta: dict) -> None:
        """Keeps `params` as the best so far."""
        # A run that was killed after this step may have left its own; what this run has found replaces it.
        for later in [s for s in self.best.all_steps() if s >= step]:
            self.best.delete(later)
        _save(self.best, step, params, meta)

    def restore_best(self, like: dict) -> tuple[dict, dict, int] | None:
        """(params, meta, step) of the best checkpoint, or None when there is none."""
        return self._newest("best", self.best, like)

    def _newest(self, name, manager, like):
        steps = sorted(manager.all_steps(), reverse=True)
        for step, before in zip(steps, [*steps, None][1:], strict=True):
            try:
                return *_restore(manager, step, like), step
            except Exception as e:  # noqa: BLE001 - whatever is wrong with it, the one before may be good
                then = "there is none before it" if before is None else f"trying the one of step {before}"
                print(f"checkpoint {name}/{step} does not load ({type(e).__name__}); {then}", flush=True)
                self._set_aside(name, step)
                manager.reload()
        return None

    def _set_aside(self, name, step):
        target = os.path.join(self._root, f"damaged_{name}_{step}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(os.path.join(self._root, name, str(step)), target)

    def close(self) -> None:
        self.last.close()
        self.best.close()


def _save(manager, step, tree, meta):
    meta = {**meta, "checksum": _checksum(tree)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
    manager.save(step, args=args, force=True)
    manager.wait_until_finished()


def _restore(manager, step, like):
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(like)), meta=ocp.args.JsonRestore())
    got = manager.restore(step, args=args)
    # Restored arrays can share memory with the reader's buffers; donated steps need arrays of their own.
    tree, meta = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), got["state"]), dict(got["meta"])
    if meta.pop("checksum", None) not in (None, _checksum(tree)):
        raise ValueError("the checksum does not match")
    return tree, meta


def _checksum(tree) -> int:
    """One CRC-32 over the bytes of all leaves, in tree order."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), crc)
    return crc


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=getattr(x, "sharding", None)), tree
    )
