"""A run's numbers: metrics.jsonl (the truth), and trackers beside it."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.metrics import trackers as run_trackers
from cxr_jax.runtime import whole_files

FILE = "metrics.jsonl"
logger = logging.getLogger(__name__)


# ---- Strict JSON ----


def finite(number: Any) -> float | None:
    """Return a number as a float, None where it is not finite."""
    # A scalar of NumPy or JAX becomes a plain float, which JSON can hold.
    number = float(number)
    return number if math.isfinite(number) else None


def json_value(value: Any, other: Callable[[Any], Any] = finite) -> Any:
    """Return a value as strict JSON holds it: arrays as lists, a number that is not finite as None.

    Args:
        value: a Python, NumPy or JAX scalar or array, or dicts, lists and tuples of them.
        other: what becomes of a value of any other type.
    """
    # Names in JSON are text: a number becomes one, too.
    if isinstance(value, dict):
        return {
            str(entry_name): json_value(element, other) for entry_name, element in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [json_value(element, other) for element in value]
    if hasattr(value, "dtype"):
        # A device array is fetched here, once.
        array = np.asarray(value)
        # float64 first: NumPy does not know every accelerator type (bfloat16, of kind V) as a Python number.
        if array.dtype.kind in "fV":
            array = array.astype(np.float64)
        return json_value(array.tolist(), other)
    # Strict JSON knows neither NaN nor infinity, and neither do the readers of the page.
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, (str, bool, int, type(None))):
        return value
    return other(value)


# ---- Reading ----


def _lines(log_path: Path) -> Iterator[tuple[bytes, dict]]:
    """(raw line, object) of every complete line; a last line that a kill has torn is left out."""
    for line_number, raw_line in enumerate(
        log_path.read_bytes().splitlines(keepends=True), start=1
    ):
        # Only the last line can lack its newline: a kill stopped its write.
        if not raw_line.endswith(b"\n"):
            return
        if not raw_line.strip():
            continue
        try:
            metrics_row = json.loads(raw_line)
            # Every line has a step, which resuming relies on.
            metrics_row["step"]  # noqa: B018  (KeyError or TypeError: not one of our lines)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{log_path}: line {line_number} is not a metrics line") from error
        yield raw_line, metrics_row


def read(workdir: str | os.PathLike) -> list[dict]:
    """Read all lines of WORKDIR/metrics.jsonl, in the order written; [] if there is no such file.

    Returns:
        A dict a line: "step" (int), "kind" ("train", "eval", or "change": of the config), "time" (Unix seconds) and
        the metrics.

    Raises:
        UserError: if a line is not one of ours.
    """
    # A run that has not logged yet has no file: that is no error.
    log_path = Path(workdir) / FILE
    return [metrics_row for raw_line, metrics_row in _lines(log_path)] if log_path.exists() else []


# ---- Writing ----


class MetricsWriter:
    """Appends lines to WORKDIR/metrics.jsonl; scalars go to trackers too, where possible."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int | None = None,
        redo: str | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        numbers: Mapping[str, float] | None = None,
        enabled: bool = True,
    ) -> None:
        """Open the file, and take out what a resumed run will write again.

        Args:
            workdir: the run's folder; made if it is not there.
            resume_step: the step of the restored checkpoint. Lines with a later step are removed, and TensorBoard
                hides its own. None: keep what is there; -1: start over.
            redo: a kind whose lines at `resume_step` itself are removed as well: the run repeats them first.
            trackers: names of `metrics.trackers`.
            numbers: of the run's config, for trackers.
            enabled: False on every process but the first: writes nothing.
        """
        self._file: int | None = None
        self._trackers: dict[str, run_trackers.Tracker] = {}
        # One process writes: the others would add the same lines.
        if not enabled:
            return
        workdir = self._workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        log_path = workdir / FILE
        # Before the file is opened to append: it is replaced as a whole.
        if log_path.exists():
            _truncate(log_path, resume_step, redo)
        # O_APPEND and one write a line: a reader never sees half a line in the middle of the file.
        self._file = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._trackers = run_trackers.open_trackers(trackers, workdir, resume_step, numbers)

    def write(self, step: int, metrics: Mapping[str, Any], kind: str = "train") -> None:
        """Write one line.

        Args:
            step: of the run.
            metrics: name -> number, string, list or device scalar (fetched here).
            kind: "train", "eval" or "change".

        Raises:
            ValueError: if a metric has the name of one of the line's own fields.
        """
        if self._file is None:
            return
        metrics_row = {"step": int(step), "kind": kind, "time": round(time.time(), 3)}
        # A metric must not overwrite what resuming reads.
        if reserved_names := metrics_row.keys() & metrics.keys():
            raise ValueError(f"reserved metric name: {', '.join(sorted(reserved_names))}")
        metrics_row |= {metric_name: json_value(value) for metric_name, value in metrics.items()}
        unwritten = (json.dumps(metrics_row, allow_nan=False) + "\n").encode()
        while unwritten:  # one call unless the disk is full, which raises
            unwritten = unwritten[os.write(self._file, unwritten) :]
        # Trackers come last: what they show stands in the file.
        self._track(int(step), metrics_row, kind)

    def write_changes(self, changes: Iterable[tuple[int, str]]) -> None:
        """Write a line of kind "change" for each (step, change) of a run's config that has none yet."""
        if self._file is None:
            return
        logged = [row["change"] for row in read(self._workdir) if row["kind"] == "change"]
        for step, change in changes:
            # A change that was made twice, there and back again, has two lines.
            if change in logged:
                logged.remove(change)
            else:
                self.write(step, {"change": change}, kind="change")

    def _track(self, step: int, metrics_row: Mapping[str, Any], line_kind: str) -> None:
        # Trackers have a step and a clock of their own, and hold numbers alone.
        numbers = {
            f"{line_kind}/{metric_name}": value
            for metric_name, value in metrics_row.items()
            if metric_name not in ("step", "time") and isinstance(value, (int, float))
        }
        # A change of the config is a text.
        if not numbers:
            return
        # A copy: one that breaks is taken out.
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(step, numbers)
            except Exception as error:  # never stops a run: metrics.jsonl holds everything
                logger.warning("%s switched off: %s", name, error)
                del self._trackers[name]

    def close(self, files: Sequence[Path] = ()) -> None:
        """Close the files; harmless if they are closed. files: of a complete run, for the trackers."""
        if self._file is not None:
            os.close(self._file)
        self._file = None
        # One after the other: what one of them raises is no reason to lose the next.
        for name, tracker in self._trackers.items():
            try:
                tracker.close(files)
            except Exception as error:
                logger.warning("%s did not close: %s", name, error)
        self._trackers = {}

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the files."""
        self.close()


def _truncate(log_path: Path, resume_step: int | None, repeated_kind: str | None) -> None:
    """Rewrite the file without torn or later lines, only if there are any."""

    def stays(metrics_row: Mapping[str, Any]) -> bool:
        # What came before the checkpoint is not repeated; without one, nothing is.
        if resume_step is None or metrics_row["step"] < resume_step:
            return True
        return metrics_row["step"] == resume_step and metrics_row.get("kind") != repeated_kind

    kept_lines = b"".join(
        raw_line for raw_line, metrics_row in _lines(log_path) if stays(metrics_row)
    )
    # The size tells whether a line was dropped: the lines that stay are unchanged.
    if len(kept_lines) != log_path.stat().st_size:
        whole_files.write_bytes(log_path, kept_lines)
