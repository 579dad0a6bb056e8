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
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax._src import distributed  # the processes' key-value store has no public name

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.runtime import array_hash, checkpoint_folder, processes
from cxr_jax.runtime.trees import Tree


class SaveFailedError(RunFailedError, RuntimeError):
    """A checkpoint could not be written. One line: the folder and the reason. Those from before stay loadable."""


class Restored(NamedTuple):
    """What a checkpoint holds: the state or the parameters, the JSON of whoever saved, and its step."""

    state: Tree
    meta: dict
    step: int


@dataclass(frozen=True)
class _Series:
    """`last/` or `best/`: its name, and Orbax's manager of its folder."""

    name: str
    manager: ocp.CheckpointManager


@dataclass(frozen=True)
class _PendingSave:
    """A save under way. `outcome`: of `_finish`: (facts, what is wrong with what was written, or None)."""

    series: _Series
    step: int
    outcome: concurrent.futures.Future


class Checkpoints:
    """`<workdir>/checkpoints/`: `last/` holds the newest `keep` states, `best/` the parameters with the best score.

    A save returns when the arrays are copied: a step that takes over (donates) them may follow at once. The rest
    happens in the background: writing, reading back, then removing older ones; one save at a time. What goes wrong
    there is raised by the next `save`, `restore`, `poll`, `wait` or `close`, as SaveFailedError.

    Args:
        about: JSON-able facts of the run (config, git sha, fingerprint of the data), written into every checkpoint.
        grace: seconds that a run has to save when it is told to stop, printed beside what the first save took.

    Attributes:
        saved: the newest step of `last/` that is known to be whole; 0 before.
        last_save: of the newest save that is through: name, step, blocked_seconds (of the caller), seconds (until
            verified), bytes (of the arrays); or None.
    """

    def __init__(
        self, workdir: str, keep: int = 2, about: dict | None = None, grace: float | None = None
    ) -> None:
        quieten_orbax()
        self._root = os.path.abspath(os.path.join(workdir, "checkpoints"))
        self._keep, self._about, self._grace, self.saved = keep, about or {}, grace, 0
        # One thread: one save at a time is written and read back.
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: _PendingSave | None = None
        self.last_save: dict[str, Any] | None = None
        self._dropped = False
        try:
            if processes.is_main():
                os.makedirs(self._root, exist_ok=True)
                self._tidy()
            # No process lists the steps before the first one has cleared away what is none.
            processes.barrier("checkpoints are tidy")
            barrier = _Barrier()
            self.last, self.best = (
                _manager(os.path.join(self._root, series_name), barrier)
                for series_name in ("last", "best")
            )
        except OSError as error:
            raise SaveFailedError(
                f"{self._root}: cannot be written ({error.strerror or error})"
            ) from error
        self._last, self._best = _Series("last", self.last), _Series("best", self.best)

    # ---- What a run calls ----

    def save(self, step: int, state: Tree, metadata: dict) -> None:
        """Save the whole state at `step` with JSON-able `meta`. A step that is already saved is left alone."""
        # Before the list of steps is read: a save under way may be of this very step.
        self.wait()
        if not processes.from_main(step in self.last.all_steps()):
            self._start(self._last, step, state, metadata)

    def restore(self, template: Tree) -> Restored | None:
        """Restore the newest checkpoint that loads, if any. A damaged one is passed over, and a line says so.

        A damaged checkpoint moves to `damaged_*`: its step will be saved again, and nothing is deleted.

        Args:
            template: a state, or jax.ShapeDtypeStructs (`Layout.like`): the arrays come to lie as it does, whatever
                mesh they were saved from, and may be donated.

        Raises:
            UserError: for a checkpoint of another model.
        """
        restored = self._restore_newest(self._last, template)
        # A step that could not be restored is not known to be whole, so counting begins anew.
        self.saved = restored.step if restored else 0
        return restored

    def save_best(self, step: int, params: Tree, metadata: dict) -> None:
        """Keep `params` as the best so far; the one before goes when they are on disk and verified."""
        self.wait()
        self._start(self._best, step, params, metadata)

    def restore_best(self, template: Tree) -> Restored | None:
        """Restore the best checkpoint, or None when there is none; otherwise as `restore`."""
        return self._restore_newest(self._best, template)

    def poll(self) -> None:
        """End the save under way if it is through, without waiting. Of several processes, all must call it."""
        self._conclude(block=False)

    def wait(self) -> None:
        """Wait until the save under way is through."""
        self._conclude(block=True)

    def close(self) -> None:
        """Wait until the save under way is through, and let go of the folder."""
        # The others may never come to where `wait` would meet them.
        if self._dropped:
            return self._background.shutdown(wait=False)
        try:
            self.wait()
        finally:
            # Its one thread has ended its save by now, or `wait` has raised what went wrong.
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

    # ---- One save, from its start to its check ----

    def _start(self, series: _Series, step: int, state_tree: Tree, metadata: dict) -> None:
        # The caller waits only for the copy; writing and checking go on behind the training.
        began = time.monotonic()
        items = checkpoint_folder.make_items(state_tree, metadata, self._about)
        # Here every process learns whether it can be written, before any of them enters Orbax.
        self._make_room(series, step)
        try:
            series.manager.save(step, args=items.args, force=True)
        except Exception as error:  # noqa: BLE001 - Orbax and TensorStore raise many kinds
            raise self._failed(series, step, error) from error
        facts = {
            "name": series.name,
            "step": step,
            "bytes": items.nbytes,
            "blocked_seconds": time.monotonic() - began,
        }
        outcome = self._background.submit(self._finish, series, step, facts, began)
        self._pending = _PendingSave(series, step, outcome)

    def _make_room(self, series: _Series, step: int) -> None:
        """Process 0 finds out whether the folder can be written: the others would wait for it inside Orbax."""
        failure = None
        folder, probe = self._folder(series.name, step), os.path.join(self._root, "probe")
        try:
            if processes.is_main():
                # Not an empty file: a full disk may still have room for names.
                with open(probe, "wb") as file:
                    file.write(bytes(4096))
                os.remove(probe)
                if os.path.isdir(folder):  # the best of a step that has come again
                    os.replace(folder, self._aside("replaced", series.name, step))
        except OSError as error:
            failure = error
        # All fail or none does: one that went on alone would wait inside Orbax.
        if processes.agree(failure is not None):
            raise self._failed(series, step, failure) from failure
        series.manager.reload()

    def _finish(
        self, series: _Series, step: int, facts: dict, began: float
    ) -> tuple[dict, str | None]:
        """In the background: (facts, what is wrong with what was written, or None)."""
        # Written is not yet whole: it is read back before anything older goes.
        series.manager.wait_until_finished()
        problem = None
        if processes.is_main():
            folder = self._folder(series.name, step)
            problem = checkpoint_folder.find_problem(folder)
            if problem:
                self._set_aside(series.name, step)
                self._tidy()
            else:
                self._remove_older(series, step)
                self._tidy(verified=folder)
        return {**facts, "seconds": time.monotonic() - began}, problem

    def _remove_older(self, series: _Series, step: int) -> None:
        others = sorted(
            other_step for other_step in series.manager.all_steps() if other_step != step
        )
        # Of the best there is one; of the newest, the ones that the new save leaves room for.
        spared = 0 if series.name == "best" else self._keep - 1
        for old in others[: max(0, len(others) - spared)]:
            # Renamed first: a folder that is half removed must not look like a checkpoint.
            os.replace(self._folder(series.name, old), self._aside("removed", series.name, old))

    def _conclude(self, block: bool) -> None:
        if self._pending is None:
            return
        series, step, outcome = self._pending.series, self._pending.step, self._pending.outcome
        # Processes end a save together: one that is through waits for the others, or none ends it now.
        while processes.agree(not outcome.done()):
            if not block:
                return
            concurrent.futures.wait([outcome], timeout=None if processes.count() == 1 else 0.05)
        self._pending, error = None, outcome.exception()
        if processes.agree(error is not None):
            raise self._failed(series, step, error) from error
        self.last_save, problem = outcome.result()
        series.manager.reload()
        if not processes.agree(problem is not None) and series.name == "last":
            self.saved = step
        if series.name == "last" and self._grace is not None:
            self._print_duration()
            self._grace = None  # once is enough
        if problem:
            print(
                f"checkpoint {series.name}/{step} was written, but {problem}: it is set aside as "
                f"damaged_{series.name}_{step}; the one before stays",
                flush=True,
            )

    def _print_duration(self) -> None:
        save = self.last_save
        assert save is not None
        print(
            f"a save of {save['bytes'] / 2**20:,.0f} MiB takes {save['seconds']:.1f} s, the run waits for "
            f"{save['blocked_seconds']:.1f} s of them (config.grace_seconds={self._grace:g})",
            flush=True,
        )

    def _failed(self, series: _Series, step: int, error: BaseException | None) -> SaveFailedError:
        """The exception for it; clears away what was half written, so that its disk space is free again."""
        with contextlib.suppress(Exception):  # Orbax raises in each thread what `error` says
            series.manager.wait_until_finished()
        if processes.is_main():
            half_written = glob.escape(self._folder(series.name, step)) + ".*"
            until = time.monotonic() + 10
            while (folders := glob.glob(half_written)) and time.monotonic() < until:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
                time.sleep(0.2)  # arrays that were on their way may have made it anew
            self._tidy()
        series.manager.reload()
        return SaveFailedError(
            f"{os.path.join(self._root, series.name)}: the checkpoint of step {step} could not be saved: "
            f"{_reason(error)}; those before it are not touched"
        )

    # ---- Restoring ----

    def _restore_newest(self, series: _Series, template: Tree) -> Restored | None:
        self.wait()
        wanted, structure = checkpoint_folder.leaves_by_path(template), jax.tree.structure(template)
        steps = series.manager.all_steps
        # From the newest to the oldest, as process 0 sees them.
        while (step := processes.from_main(max(steps(), default=-1))) >= 0:
            folder, damage, difference = self._folder(series.name, step), None, None
            # ---- Each process reads its part, and none waits for another meanwhile ----
            try:
                metadata, array_table = checkpoint_folder.read_json(folder)
                difference = checkpoint_folder.first_difference(array_table, wanted)
                arrays = {} if difference else checkpoint_folder.read_arrays(folder, wanted)
            except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
                raise  # that is the machine's fault: the next start may read it
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the one before may be good
                damage = type(error).__name__
                if isinstance(error, checkpoint_folder.DamagedError):
                    damage += f": {error}"
            # ---- They come to one verdict ----
            if processes.agree(difference is not None):
                raise UserError(
                    f"{folder}: is of another model: {difference or 'see another process'}"
                )
            if processes.agree(damage is not None):
                damage = damage or "for another process"
            else:  # every process computes the same hashes, and comes to the same verdict
                damage = _damaged_array(arrays, array_table)
            if damage is None:
                return Restored(jax.tree.unflatten(structure, arrays.values()), metadata, step)
            # One process moves the folder and says so; the others wait at the barrier.
            if processes.is_main():
                before = max(
                    (other_step for other_step in steps() if other_step < step), default=None
                )
                then = "there is none before it"
                if before is not None:
                    then = f"trying the one of step {before}"
                print(
                    f"checkpoint {series.name}/{step} does not load ({damage}); {then}", flush=True
                )
                self._set_aside(series.name, step)
            processes.barrier(f"{series.name}/{step} is set aside")
            series.manager.reload()
        return None

    # ---- Folders ----

    def _folder(self, series_name: str, step: int | str) -> str:
        return os.path.join(self._root, series_name, str(step))

    def _aside(self, reason: str, series_name: str, step: int | str) -> str:
        return os.path.join(self._root, f"{reason}_{series_name}_{step}")

    def _set_aside(self, series_name: str, step: int | str) -> None:
        # An earlier one of the same step tells nothing more.
        target = self._aside("damaged", series_name, step)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self._folder(series_name, step), target)

    def _tidy(self, verified: str | None = None) -> None:
        """Ends what a save that was killed or failed has left; what the folder `verified` replaces goes, too."""
        for entry in os.listdir(self._root):
            found = re.fullmatch(r"(removed|replaced)_(last|best)_(\d+)", entry)
            if not found:
                continue
            reason, series_name, step = found.groups()
            aside_path, new = os.path.join(self._root, entry), self._folder(series_name, step)
            if reason == "replaced" and new != verified and checkpoint_folder.find_problem(new):
                # What should replace it is not whole, so it goes back to its place.
                if os.path.isdir(new):
                    self._set_aside(series_name, step)
                os.replace(aside_path, new)
            else:
                shutil.rmtree(aside_path, ignore_errors=True)


def _damaged_array(
    arrays: dict[str, jax.Array], array_table: checkpoint_folder.ArrayTable
) -> str | None:
    """The first array that is not what was written, for a message."""
    # Empty arrays have no hash: they are not in the files.
    hashes = array_hash.hash_arrays(
        {leaf_path: array for leaf_path, array in arrays.items() if array.size}
    )
    for leaf_path, hashed in hashes.items():
        if hashed != array_table[leaf_path][2]:
            return f"the hash of {leaf_path} is another"
    return None


def _manager(folder: str, barrier: "_Barrier") -> ocp.CheckpointManager:
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

    def __init__(self) -> None:
        self._name, self._turn, self._broken = f"cxr_jax/checkpoints/{next(self.made)}", 0, False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        if processes.count() == 1:
            return
        store: Any = distributed.global_state.client
        turn = self._turn
        self._turn += 1
        # Broken once, broken for good: the processes no longer agree on which turn it is.
        if not self._broken:
            store.key_value_set(self._place(turn, processes.index()), key)
            keys = [
                store.blocking_key_value_get(self._place(turn, process), timeout_ms)
                for process in range(processes.count())
            ]
            self._broken = any(other != key for other in keys)
        if self._broken:
            raise _PeerFailedError
        if turn:  # all have come to this turn, so all have read the last
            store.key_value_delete(self._place(turn - 1, processes.index()))

    def _place(self, turn: int, process: int) -> str:
        return f"{self._name}/{turn}/{process}"


def _reason(error: BaseException | None) -> str:
    """One line: what the system said, wherever in the chain and whatever it is wrapped in."""
    known = (
        r"No space left on device|Read-only file system|Disk quota exceeded|File too large|Permission denied|"
        r"Input/output error"
    )
    # Orbax wraps the system's error several times, and the useful words are at the bottom.
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if found := re.search(known, str(cause)):
            return found[0]
        cause = cause.__cause__ or cause.__context__
    if error is None or isinstance(error, _PeerFailedError):
        return "another process could not write its part, and says why"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


# ---- What Orbax prints ----


def quieten_orbax() -> None:
    """Let Orbax log nothing, for the whole process: what it has to say becomes one line of one exception.

    It logs errors with their tracebacks, from threads of its own. `Checkpoints` calls this; a program calls it when it
    reads what Orbax wrote before there are any. A second call changes nothing.
    """
    logging.getLogger("absl").addFilter(_is_not_from_orbax)
    logging.getLogger("asyncio").addFilter(_is_not_about_orbax)  # tasks that it has left behind
    # And those that it never began.
    warnings.filterwarnings("ignore", r"coroutine 'async_serialize", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _is_not_about_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.getMessage()


class _UnraisableHook:
    """A sys.unraisablehook that leaves out what Orbax's event loop raises once it is closed, and passes on all else.

    After the first array that cannot be written Orbax closes its event loop; the writes of all others, as they end,
    call it from threads of TensorStore, which have nobody to raise to.
    """

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        trace = unraisable.exc_traceback
        is_late_write = (
            unraisable.exc_type is RuntimeError
            and trace
            and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"
        )
        if not is_late_write:
            self._before(unraisable)
