"""Orbax checkpoints of a train state: the last few for resuming, and the one that was best out of distribution.

    checkpoints/last/STEP/, best/STEP/   one checkpoint each (`checkpoint_folder`); one that is there is whole
    checkpoints/damaged_NAME_STEP/       did not load, or did not read back as it was written; left for a person
    checkpoints/removed_*, replaced_*    what a save takes away, or would put back; gone when it is through

Nothing is removed before what replaces it has been read back. Of several processes, all call the same methods in the
same order, each writes the parts of the arrays that it holds, and process 0 alone moves, removes and prints.
"""

import concurrent.futures
import contextlib
import glob
import itertools
import logging
import os
import re
import shutil
import sys
import time
import warnings

import jax
import orbax.checkpoint as ocp
from jax._src import distributed  # the processes' key-value store has no public name

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.runtime import array_hash, processes
from cxr_jax.runtime import checkpoint_folder as on_disk

# Orbax logs errors with their tracebacks, from its own threads; here they become one line of one exception.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(
    lambda record: "orbax" not in record.getMessage()
)  # tasks it has left behind
warnings.filterwarnings(
    "ignore", r"coroutine 'async_serialize", RuntimeWarning
)  # and those it never began


def _quiet(unraisable, hook=sys.unraisablehook):
    # After the first array that cannot be written Orbax closes its event loop; the writes of all others, as they end,
    # call it from threads of TensorStore, which have nobody to raise to.
    trace = unraisable.exc_traceback
    if not (
        unraisable.exc_type is RuntimeError
        and trace
        and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"
    ):
        hook(unraisable)


sys.unraisablehook = _quiet


class SaveFailedError(RunFailedError, RuntimeError):
    """A checkpoint could not be written. One line: the folder and the reason. Those from before stay loadable."""


class Checkpoints:
    """`<workdir>/checkpoints/`: `last/` holds the newest `keep` states, `best/` the parameters with the best score.

    A save returns when the arrays are copied: a step that takes over (donates) them may follow at once. The rest
    happens in the background: writing, reading back, then removing older ones; one save at a time. What goes wrong
    there is raised by the next `save`, `restore`, `poll`, `wait` or `close`, as SaveFailed. about: JSON-able facts of
    the run (config, git sha, fingerprint of the data), written into every checkpoint. grace: seconds that a run has to
    save when it is told to stop, printed beside what the first save took.

    `saved`: the newest step of `last/` that is known to be whole; 0 before. `last_save`: of the newest save that is
    through: name, step, blocked_seconds (of the caller), seconds (until verified), bytes (of the arrays); or None.
    """

    def __init__(
        self, workdir: str, keep: int = 2, about: dict | None = None, grace: float | None = None
    ):
        self._root = os.path.abspath(os.path.join(workdir, "checkpoints"))
        self._keep, self._about, self._grace, self.saved = keep, about or {}, grace, 0
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending = self.last_save = None
        self._dropped = False
        try:
            if processes.is_main():
                os.makedirs(self._root, exist_ok=True)
                self._tidy()
            processes.barrier("checkpoints are tidy")
            barrier = _Barrier()
            self.last, self.best = (
                _manager(os.path.join(self._root, name), barrier) for name in ("last", "best")
            )
        except OSError as e:
            raise SaveFailedError(f"{self._root}: cannot be written ({e.strerror or e})") from e

    def save(self, step: int, state: dict, meta: dict) -> None:
        """Saves the whole state at `step` with JSON-able `meta`. A step that is already saved is left alone."""
        self.wait()
        if not processes.of_main(step in self.last.all_steps()):
            self._start("last", self.last, step, state, meta)

    def restore(self, like: dict) -> tuple[dict, dict, int] | None:
        """(state, meta, step) of the newest checkpoint that loads, or None. A damaged one is passed over, aloud.

        like: a state, or jax.ShapeDtypeStructs (`Layout.like`): the arrays come to lie as it does, whatever mesh they
        were saved from, and may be donated. A damaged checkpoint moves to `damaged_*`: its step will be saved again,
        and nothing is deleted. Raises UserError for one of another model.
        """
        found = self._newest("last", self.last, like)
        self.saved = found[2] if found else 0
        return found

    def save_best(self, step: int, params: dict, meta: dict) -> None:
        """Keeps `params` as the best so far; the one before goes when they are on disk and verified."""
        self.wait()
        self._start("best", self.best, step, params, meta)

    def restore_best(self, like: dict) -> tuple[dict, dict, int] | None:
        """(params, meta, step) of the best checkpoint, or None when there is none; otherwise as `restore`."""
        return self._newest("best", self.best, like)

    def poll(self) -> None:
        """Ends the save under way if it is through, without waiting. Of several processes, all must call it."""
        self._conclude(block=False)

    def wait(self) -> None:
        """Waits until the save under way is through."""
        self._conclude(block=True)

    def close(self) -> None:
        """Waits until the save under way is through, and lets go of the folder."""
        if self._dropped:
            return self._background.shutdown(wait=False)
        try:
            self.wait()
        finally:
            self._background.shutdown()
            for manager in (self.last, self.best):
                with contextlib.suppress(Exception):  # a failed save, which has been raised already
                    manager.close()

    def drop(self) -> None:
        """Of several processes, one that fails alone: `close` will not wait for the others, nor for the save under way.

        What it has written so far is no checkpoint, and the next start clears it away.
        """
        if processes.count() > 1:
            self._dropped = True

    def _start(self, name, manager, step, tree, meta):
        began = time.monotonic()
        args, size = on_disk.items(tree, meta, self._about)
        self._make_room(name, manager, step)
        try:
            manager.save(step, args=args, force=True)
        except Exception as e:  # noqa: BLE001 - Orbax and TensorStore raise many kinds
            raise self._failed(name, manager, step, e) from e
        facts = {
            "name": name,
            "step": step,
            "bytes": size,
            "blocked_seconds": time.monotonic() - began,
        }
        self._pending = (
            name,
            manager,
            step,
            self._background.submit(self._finish, name, manager, step, facts, began),
        )

    def _make_room(self, name, manager, step):
        """Process 0 finds out whether the folder can be written: the others would wait for it inside Orbax."""
        error, folder, probe = None, self._folder(name, step), os.path.join(self._root, "probe")
        try:
            if processes.is_main():
                with open(probe, "wb") as f:
                    f.write(bytes(4096))
                os.remove(probe)
                if os.path.isdir(folder):  # the best of a step that has come again
                    os.replace(folder, self._aside("replaced", name, step))
        except OSError as e:
            error = e
        if processes.agree(error is not None):
            raise self._failed(name, manager, step, error) from error
        manager.reload()

    def _finish(self, name, manager, step, facts, began):
        """In the background: (facts, what is wrong with what was written, or None)."""
        manager.wait_until_finished()
        problem = None
        if processes.is_main():
            if problem := on_disk.problem(self._folder(name, step)):
                self._set_aside(name, step)
                self._tidy()
            else:
                others = sorted(s for s in manager.all_steps() if s != step)
                spared = 0 if name == "best" else self._keep - 1
                for old in others[: max(0, len(others) - spared)]:
                    # Renamed first: a folder that is half removed must not look like a checkpoint.
                    os.replace(self._folder(name, old), self._aside("removed", name, old))
                self._tidy(verified=self._folder(name, step))
        return {**facts, "seconds": time.monotonic() - began}, problem

    def _conclude(self, block):
        if self._pending is None:
            return
        name, manager, step, future = self._pending
        while processes.agree(not future.done()):
            if not block:
                return
            concurrent.futures.wait([future], timeout=None if processes.count() == 1 else 0.05)
        self._pending, error = None, future.exception()
        if processes.agree(error is not None):
            raise self._failed(name, manager, step, error) from error
        self.last_save, problem = future.result()
        manager.reload()
        if not processes.agree(problem is not None) and name == "last":
            self.saved = step
        if name == "last" and self._grace is not None:
            s = self.last_save
            print(
                f"a save of {s['bytes'] / 2**20:,.0f} MiB takes {s['seconds']:.1f} s, the run waits for "
                f"{s['blocked_seconds']:.1f} s of them (config.grace_seconds={self._grace:g})",
                flush=True,
            )
            self._grace = None  # once is enough
        if problem:
            print(
                f"checkpoint {name}/{step} was written, but {problem}: it is set aside as damaged_{name}_{step}; "
                "the one before stays",
                flush=True,
            )

    def _failed(self, name, manager, step, error) -> SaveFailedError:
        """The exception for it; clears away what was half written, so that its disk space is free again."""
        with contextlib.suppress(Exception):  # Orbax raises in each thread what `error` says
            manager.wait_until_finished()
        if processes.is_main():
            until = time.monotonic() + 10
            while (
                left := glob.glob(glob.escape(self._folder(name, step)) + ".*")
            ) and time.monotonic() < until:
                for half in left:
                    shutil.rmtree(half, ignore_errors=True)
                time.sleep(0.2)  # arrays that were on their way may have made it anew
            self._tidy()
        manager.reload()
        return SaveFailedError(
            f"{os.path.join(self._root, name)}: the checkpoint of step {step} could not be saved: "
            f"{_reason(error)}; those before it are not touched"
        )

    def _newest(self, name, manager, like):
        self.wait()
        wanted, structure = on_disk.named(like), jax.tree.structure(like)
        while (step := processes.of_main(max(manager.all_steps(), default=-1))) >= 0:
            folder, damage, other = self._folder(name, step), None, None
            try:
                meta, table = on_disk.read_json(folder)
                other = on_disk.difference(table, wanted)
                arrays = {} if other else on_disk.read_arrays(folder, wanted)
            except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
                raise  # that is the machine's fault: the next start may read it
            except Exception as e:  # noqa: BLE001 - whatever is wrong with it, the one before may be good
                damage = (
                    f"{type(e).__name__}: {e}"
                    if isinstance(e, on_disk.DamagedError)
                    else type(e).__name__
                )
            if processes.agree(other is not None):
                raise UserError(f"{folder}: is of another model: {other or 'see another process'}")
            if processes.agree(damage is not None):
                damage = damage or "for another process"
            else:  # every process computes the same hashes, and comes to the same verdict
                hashes = array_hash.of({k: x for k, x in arrays.items() if x.size})
                damage = next(
                    (f"the hash of {k} is another" for k, h in hashes.items() if h != table[k][2]),
                    None,
                )
            if damage is None:
                return jax.tree.unflatten(structure, arrays.values()), meta, step
            if processes.is_main():
                before = max((s for s in manager.all_steps() if s < step), default=None)
                then = (
                    "there is none before it"
                    if before is None
                    else f"trying the one of step {before}"
                )
                print(f"checkpoint {name}/{step} does not load ({damage}); {then}", flush=True)
                self._set_aside(name, step)
            processes.barrier(f"{name}/{step} is set aside")
            manager.reload()
        return None

    def _folder(self, name, step) -> str:
        return os.path.join(self._root, name, str(step))

    def _aside(self, why, name, step) -> str:
        return os.path.join(self._root, f"{why}_{name}_{step}")

    def _set_aside(self, name, step):
        target = self._aside("damaged", name, step)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self._folder(name, step), target)

    def _tidy(self, verified=None):
        """Ends what a save that was killed or failed has left; what the folder `verified` replaces goes, too."""
        for entry in os.listdir(self._root):
            if not (found := re.fullmatch(r"(removed|replaced)_(last|best)_(\d+)", entry)):
                continue
            path, new = os.path.join(self._root, entry), self._folder(*found.groups()[1:])
            if found[1] == "replaced" and new != verified and on_disk.problem(new):
                if os.path.isdir(new):
                    self._set_aside(*found.groups()[1:])
                os.replace(path, new)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _manager(folder, barrier):
    # Orbax removes nothing: what goes, and when, is decided after the check.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None,
        cleanup_tmp_directories=True,
        create=True,
        async_options=ocp.AsyncOptions(
            create_directories_asynchronously=False, barrier_sync_fn=barrier
        ),
    )
    return ocp.CheckpointManager(folder, options=options)


class _PeerFailedError(Exception):
    """Another process could not write its part."""


class _Barrier:
    """Where the background threads of all processes meet, in Orbax.

    Orbax's own lets the others wait for one that cannot write, which has gone on to a later barrier, until a timeout
    of 20 minutes. Here each says at its n-th barrier which one it is: all learn at once that they are not the same.
    """

    made = itertools.count()

    def __init__(self):
        self._name, self._turn, self._broken = f"cxr_jax/checkpoints/{next(self.made)}", 0, False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        if processes.count() == 1:
            return
        place = lambda turn, process: f"{self._name}/{turn}/{process}"
        store, me, turn = distributed.global_state.client, processes.index(), self._turn
        self._turn += 1
        if not self._broken:
            store.key_value_set(place(turn, me), key)
            met = [
                store.blocking_key_value_get(place(turn, k), timeout_ms)
                for k in range(processes.count())
            ]
            self._broken = any(other != key for other in met)
        if self._broken:
            raise _PeerFailedError
        if turn:  # all have come to this turn, so all have read the last
            store.key_value_delete(place(turn - 1, me))


def _reason(error) -> str:
    """One line: what the system said, wherever in the chain and whatever it is wrapped in."""
    known = (
        r"No space left on device|Read-only file system|Disk quota exceeded|File too large|Permission denied|"
        r"Input/output error"
    )
    e = error
    while e is not None:
        if isinstance(e, OSError) and e.strerror:
            return e.strerror
        if found := re.search(known, str(e)):
            return found[0]
        e = e.__cause__ or e.__context__
    if error is None or isinstance(error, _PeerFailedError):
        return "another process could not write its part, and says why"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
