"""A run's folder: the lock, the resolved config, completion."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import cxr_jax
from cxr_jax.errors import UserError
from cxr_jax.runtime.whole_files import check_utf8, partial_path, write_json

MAY_CHANGE = (
    "mesh.",
    "attention ",
    "matmul_precision ",
    "grace_seconds ",
    "step_timeout ",
    "max_skipped ",
    "trackers ",
    "allow_upload ",
    "profile ",
    "data.cache_mib ",
    "data.threads ",
    "data.max_bad ",
    "data.guard ",
    "data.allow_contaminated ",
    "data.image_tokens ",
    "micro_batches ",
    "rl.micro_batches ",
    "rl.sample_micro_batches ",
    "remat ",
    "log_every ",
    "save_every ",
    "eval.every ",
    "eval.n ",
    "eval.batch_size ",
    "rl.patience ",
    "epochs ",  # how the number of steps was said, which is compared itself
)
"""Keys of a config that do not change what a step computes, but for rounding: memory, time limits, and when a run logs,
saves and looks. It may be resumed with others."""

CONTINUABLE = {"steps": "steps ", "manifest": "data.manifest ", "image_root": "data.image_root "}
"""What a run may be continued with another of, by its name in `--may_change` -> its key."""


_OTHER_ROWS = "the rows of the manifest are others"
_MADE_BY_A_RUN = {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "lock"}


class RunFolder:
    """A run's folder, opened or created; it holds the folder's lock until `close`.

    Args:
        resolved: the run's config, as flags and preset have made it.
        data: the fingerprint of the run's data, kept beside the config.
        defaults: of the run's keys: what a config of an earlier version, which lacks some, meant.
        in_todays_words: a config of any version -> the same run as a config of this version, where keys have come to
            mean something else.
        may_change: names of CONTINUABLE: the run goes on with others, which its config.json has from `commit_changes`
            on, and a finished run of fewer steps is one that is not finished.
        writes: False on every process but the first, which only look on: they lock nothing and leave nothing.

    Raises:
        UserError: when the folder cannot be written, is in use by another run, or belongs to another config or other
            data.
    """

    def __init__(
        self,
        path: str,
        resolved: dict,
        data: dict | None = None,
        writes: bool = True,
        defaults: dict | None = None,
        may_change: Sequence[str] = (),
        in_todays_words: Callable[[dict], dict] = dict,
    ) -> None:
        self.path, self._lock, self._writes = os.path.abspath(path), None, writes
        # config.json as it will be, of a run that goes on with others, until `commit_changes`.
        self._pending: dict[str, Any] | None = None
        self._said = ""
        if not writes:
            return
        # Now, and not at the first save.
        check_utf8(path, f"--workdir={path}")
        # What was there before, so that `abandon` takes nothing else away.
        self._created = _missing_parents(self.path)
        try:
            os.makedirs(self.path, exist_ok=True)
            self._before = set(os.listdir(self.path))
            self._lock = open(os.path.join(self.path, "lock"), "a", encoding="utf-8")
        except OSError as error:
            _remove_empty(self._created)
            raise UserError(f"--workdir={path}: cannot be written ({error.strerror})") from error
        try:
            # The system lets go of the lock when the process ends, however it ends.
            _lock(self._lock, path)
            # What a write or an export that was killed has left.
            for partial in glob.glob(os.path.join(glob.escape(self.path), ".*.partial")):
                shutil.rmtree(partial, ignore_errors=True)
                with contextlib.suppress(OSError):
                    os.remove(partial)
            wanted = {"config": resolved, "data": data or {}}
            self._check_config(path, wanted, defaults or {}, may_change, in_todays_words)
        except BaseException:
            self.close()
            raise

    def _check_config(
        self,
        path: str,
        wanted: dict,
        defaults: dict,
        may_change: Sequence[str],
        in_todays_words: Callable[[dict], dict],
    ) -> None:
        """Write config.json of a new run, or refuse a config or data other than those of the run that is there."""
        file_name = self.file("config.json")
        # Written before anything is trained: from here on the folder belongs to this config.
        if not os.path.exists(file_name):
            try:
                write_json(file_name, {**wanted, **environment()})
            except OSError as error:
                self.abandon()
                raise UserError(
                    f"--workdir={path}: cannot be written ({error.strerror})"
                ) from error
            return
        try:
            stored = self.about
            # Compared as JSON gives it back: tuples have become lists.
            before, now = (
                json.loads(json.dumps(_completed(config, defaults)))
                for config in (in_todays_words(stored["config"]), wanted["config"])
            )
            differences = _differences(before, now)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file_name}: is not the config of a run; use another --workdir"
            ) from error
        # A run continued under another config would be neither of the two, unless that is asked for.
        allowed = tuple(CONTINUABLE[name] for name in may_change)
        for difference in differences:
            if not difference.startswith((*MAY_CHANGE, *allowed)):
                raise UserError(
                    f"--workdir={path}: holds a run with another config ({difference}); "
                    f"use another --workdir or the same flags{_hint(difference)}"
                )
        changes = [line for line in differences if allowed and line.startswith(allowed)]
        changes += _data_changes(path, stored, wanted, may_change)
        adjusted = [line for line in differences if line.startswith(MAY_CHANGE)]
        if changes or adjusted:
            self._continue_with(path, stored, wanted, changes, adjusted)

    def _continue_with(
        self, path: str, stored: dict, wanted: dict, changes: list[str], adjusted: list[str]
    ) -> None:
        """Be the changed run from here on, but for the files of the folder: see `commit_changes`."""
        steps, done = wanted["config"].get("steps"), self.steps_saved()
        if steps is not None and steps < done:
            raise UserError(
                f"--workdir={path}: config.steps={steps} is fewer than the {done} that are done"
            )
        facts = {**(stored.get("data") or {}), **wanted["data"]}
        if _OTHER_ROWS in changes and done and "held_out_up_to" not in facts:
            raise UserError(
                f"--workdir={path}: who is held out in this run of an earlier version is not kept yet: continue it "
                "once with the rows that it began with (a finished one with more steps), then with others"
            )
        pending = {**stored, "config": wanted["config"], "data": facts}
        # Apart: only the first make it another run than the one that began.
        for name, lines in (("changes", changes), ("adjusted", adjusted)):
            if lines:
                pending[name] = [*stored.get(name, []), {"step": done, "changes": lines}]
        self._said = f"goes on from step {done} with changes: {'; '.join(changes + adjusted)}"
        self._pending = json.loads(json.dumps(pending))  # as the file will give it back

    def commit_changes(self) -> None:
        """Make the folder one of the changed run, and say so: when what the run goes on with is known to work."""
        if self._pending is None:
            return
        done = self.file("done.json")
        aside = partial_path(Path(done))
        # In this order: a kill in between leaves a run that the same command continues.
        if is_unfinished := os.path.exists(done) and self._changes_steps():
            os.rename(done, aside)
        try:
            write_json(self.file("config.json"), self._pending)
        except BaseException:
            if is_unfinished:
                os.rename(aside, done)
            raise
        aside.unlink(missing_ok=True)
        self._pending = None
        print(self._said, flush=True)

    @property
    def has_changes(self) -> bool:
        """Whether the run is to go on with others, and the folder is still as it was."""
        return self._pending is not None

    def steps_saved(self) -> int:
        """The newest step that `checkpoints/last` has, 0 without one."""
        last = self.file("checkpoints", "last")
        names = os.listdir(last) if os.path.isdir(last) else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def remember(self, **facts: Any) -> None:
        """Keep facts of the run's data in config.json that only its opened sources tell; those there already stay."""
        if not self._writes:
            return
        about = self.about
        kept = about.get("data") or {}
        if not facts.keys() - kept.keys():
            return
        about = {**about, "data": {**facts, **kept}}
        if self.has_changes:
            self._pending = about
        else:
            write_json(self.file("config.json"), about)

    @property
    def about(self) -> dict[str, Any]:
        """What config.json says, or will: config, data, versions."""
        if self._pending is not None:
            return self._pending
        return self._stored()

    def _stored(self) -> dict[str, Any]:
        with open(self.file("config.json"), encoding="utf-8") as opened_file:
            return dict(json.load(opened_file))

    @property
    def data(self) -> dict[str, Any]:
        """The facts of the run's data that config.json keeps."""
        return dict(self.about.get("data") or {})

    @property
    def status(self) -> dict[str, Any]:
        """{} while the run is unfinished, else what `finish` wrote."""
        file_name = os.path.join(self.path, "done.json")
        if not os.path.exists(file_name) or self._changes_steps():
            return {}
        try:
            with open(file_name, encoding="utf-8") as opened_file:
                return dict(json.load(opened_file))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file_name}: cannot be read; remove it to let the run finish again"
            ) from error

    def _changes_steps(self) -> bool:
        if self._pending is None:
            return False
        return self._pending["config"].get("steps") != self._stored()["config"].get("steps")

    def abandon(self) -> None:
        """Take back a new run that failed before its first checkpoint: bad input leaves nothing behind."""
        if not self._writes or "config.json" in self._before:
            return
        # With a checkpoint there is something to resume, and the folder stays.
        last = self.file("checkpoints", "last")
        if os.path.isdir(last) and os.listdir(last):
            return
        # Only what a run makes, and of that only what was not there: a user's files stay.
        for name in _MADE_BY_A_RUN - self._before:
            path = self.file(name)
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.remove(path)
        _remove_empty(self._created)

    def finish(self, **facts: Any) -> None:
        """Write done.json: the time, and these facts."""
        if self._writes:
            write_json(
                self.file("done.json"), {"time": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}
            )

    def file(self, *names: str) -> str:
        """Name a file of the folder."""
        return os.path.join(self.path, *names)

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock:
            self._lock.close()


def _lock(opened_file: IO, path: str) -> None:
    try:
        # Without waiting: whoever has the lock may train for days.
        fcntl.flock(opened_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--workdir={path}: another run is using it") from error
    except OSError as error:
        raise UserError(f"--workdir={path}: cannot be locked ({error.strerror})") from error


def history_of(about: Mapping[str, Any]) -> list[tuple[int, str]]:
    """List what a run has gone on with, (step, change), as its config.json (`RunFolder.about`) keeps it."""
    entries = [*about.get("changes", []), *about.get("adjusted", [])]
    lines = [(int(entry["step"]), line) for entry in entries for line in entry["changes"]]
    return sorted(lines, key=itemgetter(0))


# ---- What a result depends on besides the config ----


def _git(*arguments: str) -> str:
    """What git prints of the code's repository; "" where there is none."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        return subprocess.run(
            ["git", "-C", package, *arguments], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def git_sha() -> str | None:
    """Find the commit of the code; None where there is no repository.

    An installed package may lie inside somebody else's repository, whose commits say nothing about it.
    """
    if not _git("ls-files", "--", "cxr_jax/__init__.py"):
        return None
    return _git("rev-parse", "HEAD") or None


def environment() -> dict[str, Any]:
    """Describe what a result depends on besides the config: code version, libraries, machine."""
    # Not at the top: they are heavy, and only a new run comes here.
    import flax
    import jax
    import numpy
    import optax

    sha = git_sha()
    # What no commit holds is known by the hash of its difference, enough to tell two runs apart.
    diff = _git("diff", "HEAD") if sha else ""
    return {
        "git_sha": sha,
        "git_dirty": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else None,
        "versions": {
            "cxr_jax": cxr_jax.__version__,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "numpy": numpy.__version__,
        },
        "devices": [str(device.device_kind) for device in jax.devices()],
        "cpu_count": os.cpu_count(),
    }


# ---- Helpers ----


def _hint(difference: str) -> str:
    """The flag that lets a run go on with such a difference, if there is one."""
    names = [name for name, key in CONTINUABLE.items() if difference.startswith(key)]
    return f", or continue it by --may_change={names[0]}" if names else ""


def _data_changes(path: str, stored: dict, wanted: dict, may_change: Sequence[str]) -> list[str]:
    """What lies under the names of a config may have changed: a line for what may, a UserError for what may not."""
    before, now = (facts.get("data") or {} for facts in (stored, wanted))
    changes = []
    for key, name, flag in (
        ("manifest_sha256", "data: the manifest", "manifest"),
        ("weights_sha256", "weights: config.model", ""),
    ):
        if not before.get(key) or before[key] == now.get(key):
            continue
        if flag not in may_change:
            hint = f"; --may_change={flag} continues it with these" if flag else ""
            raise UserError(
                f"--workdir={path}: holds a run on other {name} has changed since{hint}"
            )
        changes.append(_OTHER_ROWS)
    return changes


def _completed(stored: dict, defaults: dict) -> dict:
    """A config with the keys of `defaults` that it lacks."""
    completed = dict(stored)
    for key, default in defaults.items():
        if key not in completed:
            completed[key] = default
        elif isinstance(default, dict) and isinstance(completed[key], dict):
            completed[key] = _completed(completed[key], default)
    return completed


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """The keys whose values are others, one line each, in the order of their names."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{prefix} was {before!r}, now {now!r}"]
    differences = []
    for key in sorted({*before, *now}):
        name = f"{prefix}.{key}" if prefix else key
        differences += _differences(before.get(key), now.get(key), name)
    return differences


def _missing_parents(path: str) -> list[str]:
    """The folders that making `path` will make, the innermost first."""
    missing_parents = []
    while not os.path.exists(path):
        missing_parents.append(path)
        path = os.path.dirname(path)
    return missing_parents


def _remove_empty(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.rmdir(path)
