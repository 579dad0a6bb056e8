"""report.html of a run: one self-contained page, a pure function of the run's folder.

The folder's format (what `write_report` saves, and all that the page is made from):
- `metrics.jsonl`: see metrics/run_log.py. Curves are drawn for the TRL names (`reward`, `rewards/<term>/mean`,
  `completions/mean_length`, `entropy`, `loss`, ...) of kind "train" and for `eval/<set>/jaccard` and
  `eval/<set>/macro_f1` (the prefix `eval/` may be left out) of kind "eval".
- `evaluation.json`: {"format": 1, "title", "kind": "phantom" | "files", "notes": [str], "label_policy": str,
  "contaminated": str, "protocol": [str],
  "config": {...} or null (null: config.json is shown), "models": {model: {set: scores.summary(...)}},
  "comparisons": [{"a", "b", "set", "metric", "diff", "lo", "hi"}]}; diff is metric(b) - metric(a), as
  `scores.paired_bootstrap` gives it.
- `samples.jsonl`: one object a line. {"kind": "group", "step", "image": "groups/000010_0.png", ...} are the groups of
  RL, see `group_records.Group`, in the order of the run. The others with an "image" are the cases: {"id", "hospital",
  "model", "prompt", "completion", "answer": [label], "truth": [label], "known": [label] or null, "score": float or
  null, "image": "cases/0000.png"}; other lines are left alone.
- `cases/*.png`, `groups/*.png`: 8-bit grey, the longer side at most 256 px.
"""

import base64
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics.run_log import json_value
from cxr_jax.report.group_records import Group
from cxr_jax.runtime import whole_files

FORMAT = 1  # of evaluation.json: a page is never drawn from a format that it does not know
KINDS = ("phantom", "files")
IMAGE_SIDE = 256  # px, the longer side: the page holds all images inside
CASE_FIELDS = ("prompt", "completion", "answer", "truth", "score", "id", "hospital")


@dataclass(frozen=True, kw_only=True)
class Remarks:
    """What no number of an evaluation may be read without.

    Attributes:
        label_policy: what blank and uncertain labels counted as; "" where all are known.
        protocol: of each set a line that says what its numbers are numbers of.
        contaminated: what a model trained on that an evaluation set has, in a sentence; "" where there is nothing.
    """

    label_policy: str = ""
    contaminated: str = ""
    protocol: tuple[str, ...] = ()


NO_REMARKS = Remarks()


@dataclass(kw_only=True)
class Case:
    """One image with the model's completion.

    Attributes:
        image: float [H, W] in 0..1 (ignored where `png` is given).
        prompt: as text.
        completion: as written, with its tags.
        answer: label names (or bool [14]) that the completion names.
        truth: label names (or bool [14]) that are there.
        score: Jaccard of this case, 0..1 (None: not scored).
        id: of the image.
        hospital: the name of the test set.
        known: the labels the reference decides (None: all).
        model: the name of the model.
        png: the image's file.
    """

    image: np.ndarray | None
    prompt: str
    completion: str
    answer: Sequence
    truth: Sequence
    score: float | None
    id: str
    hospital: str
    known: Sequence | None = None
    model: str = ""
    png: bytes | None = None

    def __post_init__(self) -> None:
        """Turn flags into names."""
        self.answer, self.truth = label_names(self.answer), label_names(self.truth)
        if self.known is not None:
            self.known = label_names(self.known)


def label_names(labels: Iterable) -> list[str]:
    """Return names from names, or from numbers or bool [14] (non-zero: named)."""
    labels = list(labels)
    # One name among them is enough to tell names from flags.
    if labels and not any(isinstance(label, str) for label in labels):
        return [
            label_name for label_name, is_named in zip(CHEXPERT_14, labels, strict=True) if is_named
        ]
    return [str(label) for label in labels]


# ---- Images ----


def png(image: ArrayLike) -> bytes:
    """Draw an 8-bit grey PNG of float [H, W] in 0..1, the longer side at most IMAGE_SIDE px.

    Raises:
        ValueError: if the image has another shape.
    """
    from PIL import Image  # here: drawing a page again needs none

    # A pixel that is no number is black, not an error: the page is made after the run.
    image = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0.0, 1.0)
    if image.ndim != 2:
        raise ValueError(f"a case image must be [H, W], got {list(image.shape)}")
    picture = Image.fromarray(np.round(image * 255).astype(np.uint8))
    reduction = IMAGE_SIDE / max(picture.size)
    # Small images stay as they are: the page scales them up.
    if reduction < 1:
        reduced_size = [max(1, round(side_length * reduction)) for side_length in picture.size]
        picture = picture.resize(reduced_size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _png_file(record: Case | Group) -> bytes:
    """The image of a record: its file as given, else drawn."""
    if record.png:
        return record.png
    if record.image is None:
        raise ValueError("a case image must be [H, W], got []")
    return png(record.image)


def data_uri(image: bytes) -> str:
    """Write a PNG as the page holds it."""
    # Inside the page, so that it stays one file.
    return "data:image/png;base64," + base64.b64encode(image).decode()


# ---- Saving ----


def save_evaluation(
    workdir: str | os.PathLike,
    *,
    title: str,
    tables: Mapping[str, Mapping[str, Mapping]],
    kind: str = "phantom",
    run_config: Mapping[str, Any] | None = None,
    comparisons: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    remarks: Remarks = NO_REMARKS,
) -> None:
    """Write evaluation.json; the arguments are those of `write_report`.

    Raises:
        ValueError: if `kind` is none of KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    evaluation = {
        "format": FORMAT,
        "title": title,
        "kind": kind,
        "models": tables,
        "comparisons": list(comparisons),
        "notes": list(notes),
        **asdict(remarks),
        "config": run_config,
    }
    evaluation_json = json.dumps(json_value(evaluation, str), indent=1, allow_nan=False)
    whole_files.write_text(Path(workdir) / "evaluation.json", evaluation_json)


def _write_lines(samples_path: Path, sample_lines: Iterable[str]) -> None:
    whole_files.write_text(
        samples_path, "".join(sample_line + "\n" for sample_line in sample_lines)
    )


def save_cases(workdir: str | os.PathLike, cases: Iterable[Case]) -> None:
    """Write cases/*.png and their lines in samples.jsonl, in place of an earlier report's."""
    workdir = Path(workdir)
    case_folder, samples_path = workdir / "cases", workdir / "samples.jsonl"
    # Images of an earlier report must not stay among the new ones.
    shutil.rmtree(case_folder, ignore_errors=True)
    case_folder.mkdir(parents=True)
    # Groups, and lines that others wrote, stay.
    sample_lines = [
        sample_line
        for sample_line, record in _samples(samples_path)
        if _is_group(record) or "image" not in record
    ]
    copied_fields = ("id", "hospital", "model", "prompt", "completion", "answer", "truth", "known")
    for position, case in enumerate(cases):
        image_name = f"cases/{position:04d}.png"  # never the id: ids are other people's text
        (workdir / image_name).write_bytes(_png_file(case))
        record = {field_name: getattr(case, field_name) for field_name in copied_fields}
        # The score may be a scalar of NumPy; JSON knows only numbers of Python.
        record["score"] = None if case.score is None else float(case.score)
        record["image"] = image_name
        sample_lines.append(json.dumps(json_value(record, str)))
    _write_lines(samples_path, sample_lines)


def save_groups(
    workdir: str | os.PathLike, groups: Iterable[Group] = (), resume_step: int | None = None
) -> None:
    """Append the groups of one step to samples.jsonl, and write their images.

    Save a step's groups before its checkpoint: then a run killed anywhere ends with the same lines as one that was
    not.

    Args:
        workdir: the run's folder.
        groups: of one step.
        resume_step: as for `MetricsWriter`: the step of the restored checkpoint, -1 to start over; call once with it
            at the start of a run. Groups of a later step, which the run will record again, are removed.
    """
    workdir = Path(workdir)
    samples_path, group_folder = workdir / "samples.jsonl", workdir / "groups"
    # First what the run will record again, then what it has now.
    if resume_step is not None and samples_path.exists():
        _remove_later_groups(samples_path, group_folder, resume_step)
    sample_lines = []
    for position, group in enumerate(groups):
        group_folder.mkdir(parents=True, exist_ok=True)
        image_name = f"groups/{group.step:06d}_{position}.png"
        (workdir / image_name).write_bytes(_png_file(group))
        # The line is made after its image: it never names a file that is not there.
        record = json_value(group.row() | {"image": image_name}, str)
        sample_lines.append(json.dumps(record, allow_nan=False) + "\n")
    if sample_lines:
        # One write: a reader sees whole lines, or at most a torn last one.
        with open(samples_path, "ab", buffering=0) as samples_file:
            samples_file.write("".join(sample_lines).encode())


def _remove_later_groups(samples_path: Path, group_folder: Path, last_step: int) -> None:
    """Remove the groups after `last_step`, and every image of the folder that no line names."""
    # Read whole before the file is written anew.
    samples = list(_samples(samples_path))
    _write_lines(
        samples_path,
        [
            sample_line
            for sample_line, record in samples
            if not _is_group(record) or _step(samples_path, record) <= last_step
        ],
    )
    # Images are written before their lines, so a kill can leave one that no line names.
    kept_images = {
        str(record.get("image"))
        for _, record in samples
        if _is_group(record) and record["step"] <= last_step
    }
    for image_file in group_folder.glob("*.png"):
        if f"groups/{image_file.name}" not in kept_images:
            image_file.unlink()


# ---- Loading ----


def read_json(path: Path) -> Any:
    """Read a file of an evaluated run.

    Raises:
        UserError: if it is not there, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; the run has not been evaluated") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON") from error


def _samples(samples_path: Path) -> Iterator[tuple[str, dict]]:
    """(line, object) of each line of samples.jsonl, if there is one; a last line that a kill has torn is left out."""
    if not samples_path.exists():
        return
    *whole_lines, last_line = samples_path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line_number, sample_line in enumerate([*whole_lines, last_line], start=1):
        # The text ends with a newline, so the last piece is empty.
        if not sample_line.strip():
            continue
        try:
            record = json.loads(sample_line)
        except ValueError as error:
            # Only the last line can be torn: every line before it ended with a newline.
            if line_number > len(whole_lines):
                return
            raise UserError(f"{samples_path}: line {line_number} is not JSON") from error
        if not isinstance(record, dict):
            raise UserError(f"{samples_path}: line {line_number} is not an object")
        yield sample_line, record


def _is_group(record: Mapping) -> bool:
    return record.get("kind") == "group"


def _step(samples_path: Path, record: Mapping) -> int:
    if not isinstance(record.get("step"), int):
        raise UserError(f"{samples_path}: a group has no step")
    return record["step"]


def _image(workdir: Path, record: Mapping, folder_name: str) -> bytes:
    """The PNG that a line of samples.jsonl names. UserError for what is no file of WORKDIR/folder."""
    # The name comes from a file that anybody may have edited: it must not lead out of the folder.
    image_file = (workdir / str(record["image"])).resolve()
    if not image_file.is_relative_to((workdir / folder_name).resolve()) or not image_file.is_file():
        samples_path = workdir / "samples.jsonl"
        raise UserError(
            f"{samples_path}: image {record['image']} is not a file of the folder {folder_name}/"
        )
    return image_file.read_bytes()


def load_groups(workdir: str | os.PathLike) -> list[Group]:
    """Read the groups of samples.jsonl, with their PNG bytes.

    Raises:
        UserError: if a line or an image is not of the format.
    """
    workdir = Path(workdir)
    samples_path, groups = workdir / "samples.jsonl", []
    for _, record in _samples(samples_path):
        if not _is_group(record):
            continue
        try:
            # The lines of a run's folder may come from elsewhere, so nothing of them is taken for granted.
            groups.append(Group.from_row(record, _image(workdir, record, "groups")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            train_step = record.get("step")
            raise UserError(
                f"{samples_path}: a group of step {train_step} is not of the format: {error!r}"
            ) from error
    return groups


def load_cases(workdir: str | os.PathLike) -> list[Case]:
    """Read the cases of samples.jsonl, with their PNG bytes.

    Raises:
        UserError: if a line or an image is not of the format.
    """
    workdir = Path(workdir)
    samples_path, cases = workdir / "samples.jsonl", []
    for _, record in _samples(samples_path):
        # Lines that are neither cases nor groups belong to others.
        if _is_group(record) or "image" not in record:
            continue
        image = _image(workdir, record, "cases")
        try:
            case_fields = {field_name: record[field_name] for field_name in CASE_FIELDS}
        except KeyError as error:
            raise UserError(f"{samples_path}: a case has no {error}") from error
        # These two have defaults, as in `Case`.
        known, model = record.get("known"), record.get("model", "")
        cases.append(Case(image=None, png=image, known=known, model=model, **case_fields))
    return cases
