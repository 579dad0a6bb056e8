"""A run's numbers: metrics.jsonl (the truth), TensorBoard beside it, and a progress line now and then."""

import json
import logging
import math
import os
import time
from pathlib import Path

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.runtime import whole_files

FILE = "metrics.jsonl"
log = logging.getLogger(__name__)


def _plain(value):
    """JSON value of a Python, NumPy or JAX scalar or array; a non-finite number becomes null."""
    if isinstance(value, (str, bool, int, type(None))):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "dtype"):
        # float64 first: NumPy does not know every accelerator type (bfloat16) as a Python number.
        value = np.asarray(value)
        value = value.tolist() if value.dtype.kind in "biu" else value.astype(np.float64).tolist()
        return _plain(value) if isinstance(value, list) else _plain_float(value)
    return _plain_float(value)


def _plain_float(value):
    if isinstance(value, (bool, int)):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _lines(path):
    """(raw line, object) of every complete line; a last line that a kill has torn is left out."""
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not raw.endswith(b"\n"):
            return
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
            row["step"]  # noqa: B018  (KeyError or TypeError: not one of our lines)
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path}: line {number} is not a metrics line") from e
        yield raw, row


def read(workdir) -> list[dict]:
    """All lines of WORKDIR/metrics.jsonl, in the order written; [] if there is no such file.

    Each has "step" (int), "kind" ("train" or "eval"), "time" (Unix seconds) and the metrics.
    """
    path = Path(workdir) / FILE
    return [row for _, row in _lines(path)] if path.exists() else []


class MetricsWriter:
    """Appends lines to WORKDIR/metrics.jsonl; scalars go to WORKDIR/tensorboard too, where possible.

    `resume_step`: the step of the restored checkpoint. Lines with a later step are removed (the run will
    write them again), and TensorBoard hides its own. None: keep what is there; -1: start over.
    `redo`: a kind whose lines at `resume_step` itself are removed as well: the run repeats them first.
    `tensorboard`: False leaves it out. `enabled`: False on every process but the first: writes nothing.
    """

    def __init__(
        self,
        workdir,
        *,
        resume_step: int | None = None,
        redo: str | None = None,
        tensorboard: bool = True,
        enabled: bool = True,
    ):
        self._fd, self._board = None, None
        if not enabled:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / FILE
        if path.exists():
            _truncate(path, resume_step, redo)
        # O_APPEND and one write a line: a reader never sees half a line in the middle of the file.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if tensorboard:
            self._board = _tensorboard(workdir / "tensorboard", resume_step)

    def write(self, step: int, metrics: dict, kind: str = "train") -> None:
        """One line. `metrics`: name -> number, string, list or device scalar (fetched here)."""
        if self._fd is None:
            return
        row = {"step": int(step), "kind": kind, "time": round(time.time(), 3)}
        if clash := row.keys() & metrics.keys():
            raise ValueError(f"reserved metric name: {', '.join(sorted(clash))}")
        row |= {name: _plain(value) for name, value in metrics.items()}
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        while data:  # one call unless the disk is full, which raises
            data = data[os.write(self._fd, data) :]
        self._to_board(int(step), row, kind)

    def _to_board(self, step, row, kind):
        if self._board is None:
            return
        try:
            for name, value in row.items():
                if name not in ("step", "time") and isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        except Exception as e:  # a broken board never stops a run: metrics.jsonl holds everything
            log.warning("TensorBoard switched off: %s", e)
            self._board = None

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        if self._board is not None:
            self._board.close()
        self._fd, self._board = None, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _truncate(path, resume_step, redo):
    """Rewrite the file without torn or later lines, by an atomic rename, only if there are any."""

    def stays(row):
        if resume_step is None or row["step"] < resume_step:
            return True
        return row["step"] == resume_step and row.get("kind") != redo

    kept = b"".join(raw for raw, row in _lines(path) if stays(row))
    if len(kept) != path.stat().st_size:
        whole_files.write_bytes(path, kept)


def _tensorboard(folder, resume_step):
    try:
        from tensorboardX import SummaryWriter

        return SummaryWriter(
            str(folder), purge_step=None if resume_step is None else resume_step + 1
        )
    except Exception as e:
        log.warning("no TensorBoard: %s", e)
        return None
