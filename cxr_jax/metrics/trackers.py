"""Trackers that show the numbers of metrics.jsonl elsewhere, by name: TensorBoard, Weights & Biases, MLflow.

Numbers alone go to them: no image, no text, no path, no output of the terminal. With `config.allow_upload` a complete
run's report and samples go, too. A tracker that breaks never stops a run: metrics.jsonl holds everything.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cxr_jax.errors import UserError

# They hold images and texts.
_FILES = ("report.html", "samples.jsonl")
logger = logging.getLogger(__name__)

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Tracking:
    """What trackers a run has, and what they may be given.

    Attributes:
        names: `config.trackers`.
        numbers: of the run's config.
        files: names in the run's folder that a complete run hands over.
        profile: `config.profile`.
    """

    names: Sequence[str] = ("tensorboard",)
    numbers: Numbers = field(default_factory=dict)
    files: Sequence[str] = ()
    profile: str = ""

    @classmethod
    def of_run(cls, resolved: Mapping[str, Any]) -> "Tracking":
        """Read the resolved config of a run: its numbers may leave the machine, and files only where it says so."""
        # A config of an earlier version has neither key.
        names = resolved.get("trackers", ("tensorboard",))
        files = _FILES if resolved.get("allow_upload") else ()
        return cls(names, numbers_of(resolved), files, resolved.get("profile", ""))


class Tracker(Protocol):
    """What shows the numbers of a run."""

    def log(self, step: int, numbers: Numbers) -> None:
        """Show the numbers of one line, by names as "train/loss"."""
        ...

    def close(self, files: Sequence[Path] = ()) -> None:
        """End, and take the files of a complete run along."""
        ...


# ---- By name -----------------------------------------------------------------------------------------


def check(names: Sequence[str]) -> None:
    """Refuse trackers that there are not, or whose package is missing.

    Raises:
        UserError: naming the first.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"config.trackers={names!r} must be a tuple of texts, as in ('wandb',)")
    for name in names:
        if name not in _OPEN:
            raise UserError(f"config.trackers: {name!r} is not one of {', '.join(_OPEN)}")
        # TensorBoard comes with the package, and was never needed for a run.
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(
                f"config.trackers: {name} is not installed: pip install 'cxr_jax[{name}]'"
            )


def open_trackers(
    names: Sequence[str], workdir: Path, resume_step: int | None, numbers: Numbers | None = None
) -> dict[str, Tracker]:
    """Open trackers of a run; one that cannot be opened is said once, and left out.

    Args:
        names: `config.trackers`.
        workdir: the run's folder, in which all of them write.
        resume_step: the step that the run goes on from; None or -1: from its start.
        numbers: of the run's config, shown beside its metrics.
    """
    trackers: dict[str, Tracker] = {}
    # One that fails takes none of the others along.
    for name in names:
        try:
            trackers[name] = _OPEN[name](workdir, resume_step, numbers or {})
        except Exception as error:
            logger.warning("no %s: %s", name, error)
    return trackers


def numbers_of(resolved: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Give the numbers and switches of a config by dotted name: what may leave the machine. Texts may hold a path."""
    # Nested sections by dotted names, as flags spell them.
    found: dict[str, float] = {}
    for name, value in resolved.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float):
            found[f"{prefix}{name}"] = value
    return found


def _name_of(workdir: Path) -> str:
    """A name of the run that is the same when it resumes, and tells no path."""
    return hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]


# ---- The trackers --------------------------------------------------------------------------------------


class _TensorBoard:
    def __init__(self, workdir: Path, resume_step: int | None, numbers: Numbers) -> None:
        from tensorboardX import SummaryWriter

        # It hides what a resumed run writes again.
        purge_step = None if resume_step is None else resume_step + 1
        # Its files lie where they always did.
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, numbers: Numbers) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self, files: Sequence[Path] = ()) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, workdir: Path, resume_step: int | None, numbers: Numbers) -> None:
        import wandb

        # Beside the other files of the run, whatever folder the user stands in.
        folder = workdir / "wandb"
        folder.mkdir(exist_ok=True)
        # What it would send by itself: the terminal's output, code, the command line, the machine.
        settings = wandb.Settings(
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cxr_jax"),
            dir=str(folder),
            id=_name_of(workdir),
            resume="allow",
            # Offline unless the user's variable says otherwise: `wandb sync` sends a run later.
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(numbers),
            settings=settings,
        )
        # A step of ours may have lines of two kinds; its own counter knows only forward.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    # One row a line, so that its numbers stay together.
    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, files: Sequence[Path] = ()) -> None:
        # Copies in its own folder, which a sync takes along.
        for file in files:
            self._run.save(str(file), base_path=str(file.parent), policy="now")
        self._run.finish()


class _Mlflow:
    def __init__(self, workdir: Path, resume_step: int | None, numbers: Numbers) -> None:
        # It asks for a database by default, which a run's folder has no use for.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        # Files in the run's folder, unless the user's variable names a server.
        folder = (workdir / "mlruns").resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or folder.as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        # One experiment for all runs, as its users expect.
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cxr_jax")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(name)
        )
        # A resumed run goes on in the run that it has there.
        found = self._client.search_runs([experiment_id], f"tags.workdir = '{_name_of(workdir)}'")
        if found:
            self._run_id = found[0].info.run_id
        else:
            run = self._client.create_run(experiment_id, tags={"workdir": _name_of(workdir)})
            self._run_id = run.info.run_id
            for key, number in numbers.items():
                self._client.log_param(self._run_id, key, number)

    def log(self, step: int, numbers: Numbers) -> None:
        for name, number in numbers.items():
            self._client.log_metric(self._run_id, _plain(name), number, step=step)

    def close(self, files: Sequence[Path] = ()) -> None:
        for file in files:
            self._client.log_artifact(self._run_id, str(file))
        self._client.set_terminated(self._run_id)


def _plain(name: str) -> str:
    """A name of letters that MLflow takes."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)


_OPEN: dict[str, Callable[[Path, int | None, Numbers], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
