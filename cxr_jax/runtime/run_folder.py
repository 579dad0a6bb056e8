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

from cxr_jax.errors import UserError
from cxr_jax.runtime.whole_files import write_json

MAY_CHANGE = (
    "mesh.",
    "grace_seconds ",
    "step_timeout ",
    "max_skipped ",
    "data.cache_mib ",
    "data.threads ",
)
"""Keys of a config that do not change what a run computes, but for rounding: it may be resumed with others."""


class RunFolder:
    """Opens (or creates) a run's folder and holds its lock until `close`.

    `data`: the fingerprint of the run's data, kept beside the config. `writes`: False on every process but the first,
    which only look on: they lock nothing and leave nothing. Raises UserError when the folder cannot be written, is in
    use by another run, or belongs to another config or other data.
    """

    def __init__(self, path: str, config: dict, data: dict | None = None, writes: bool = True):
        self.path, self._lock, self._writes = os.path.abspath(path), None, writes
        if not writes:
            return
        self._created = _missing_parents(self.path)
        try:
            os.makedirs(self.path, exist_ok=True)
            self._before = set(os.listdir(self.path))
            self._lock = open(os.path.join(self.path, "lock"), "a")
        except OSError as e:
            _remove_empty(self._created)
            raise UserError(f"--workdir={path}: cannot be written ({e.strerror})") from e
        try:
            _lock(self._lock, path)
            for left in glob.glob(
                os.path.join(glob.escape(self.path), ".*.partial")
            ):  # by an export that was killed
                shutil.rmtree(left, ignore_errors=True)
            self._check_config(path, {"config": config, "data": data or {}})
        except BaseException:
            self.close()
            raise

    def _check_config(self, path, wanted):
        file = self.file("config.json")
        if not os.path.exists(file):
            try:
                write_json(file, {**wanted, **environment()})
            except OSError as e:
                self.abandon()
                raise UserError(f"--workdir={path}: cannot be written ({e.strerror})") from e
            return
        try:
            with open(file) as f:
                old = json.load(f)
            changed = _differences(old["config"], json.loads(json.dumps(wanted["config"])))
            changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file}: is not the config of a run; use another --workdir") from e
        if changed:
            raise UserError(
                f"--workdir={path}: holds a run with another config ({changed[0]}); "
                "use another --workdir or the same flags"
            )
        for key, what in (
            ("manifest_sha256", "data: the manifest"),
            ("weights_sha256", "weights: config.model"),
        ):
            before, now = ((x.get("data") or {}).get(key) for x in (old, wanted))
            if before and before != now:
                raise UserError(f"--workdir={path}: holds a run on other {what} has changed since")

    @property
    def about(self) -> dict:
        """What config.json says: config, data, versions."""
        with open(self.file("config.json")) as f:
            return dict(json.load(f))

    @property
    def status(self) -> dict:
        """{} while the run is unfinished, else what `finish` wrote."""
        file = os.path.join(self.path, "done.json")
        if not os.path.exists(file):
            return {}
        try:
            with open(file) as f:
                return dict(json.load(f))
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{file}: cannot be read; remove it to let the run finish again") from e

    def abandon(self) -> None:
        """Takes back a new run that failed before its first checkpoint: bad input leaves nothing behind."""
        last = self.file("checkpoints", "last")
        if (
            not self._writes
            or "config.json" in self._before
            or (os.path.isdir(last) and os.listdir(last))
        ):
            return
        for name in {
            "config.json",
            "metrics.jsonl",
            "tensorboard",
            "checkpoints",
            "lock",
        } - self._before:
            path = self.file(name)
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.remove(path)
        _remove_empty(self._created)

    def finish(self, **facts) -> None:
        if self._writes:
            write_json(
                self.file("done.json"), {"time": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}
            )

    def file(self, *names: str) -> str:
        return os.path.join(self.path, *names)

    def close(self) -> None:
        if self._lock:
            self._lock.close()


def _lock(file, path):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"--workdir={path}: another run is using it") from e
    except OSError as e:
        raise UserError(f"--workdir={path}: cannot be locked ({e.strerror})") from e


def _git(*args) -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        return subprocess.run(
            ["git", "-C", root, *args], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def git_sha() -> str | None:
    """The commit of the code; None where there is no repository."""
    return _git("rev-parse", "HEAD") or None


def environment() -> dict:
    """What a result depends on besides the config: code version, libraries, machine."""
    import flax
    import jax
    import numpy
    import optax

    diff = _git("diff", "HEAD")
    return {
        "git_sha": git_sha(),
        "git_dirty": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else None,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "numpy": numpy.__version__,
        },
        "devices": [str(d.device_kind) for d in jax.devices()],
        "cpu_count": os.cpu_count(),
    }


def _differences(a, b, prefix="") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d
            for k in sorted({*a, *b})
            for d in _differences(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else k)
        ]
    return [] if a == b else [f"{prefix} was {a!r}, now {b!r}"]


def _missing_parents(path):
    missing = []
    while not os.path.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _remove_empty(paths):
    for p in paths:
        with contextlib.suppress(OSError):
            os.rmdir(p)
