"""report.html of a run: one self-contained page, a pure function of the run's folder.

The folder's format (what `write_report` saves, and all that the page is made from):
- `metrics.jsonl`: see metrics/run_log.py. Curves are drawn for the TRL names (`reward`, `rewards/<term>/mean`,
  `completions/mean_length`, `entropy`, `loss`, ...) of kind "train" and for `eval/<set>/jaccard` and
  `eval/<set>/macro_f1` (the prefix `eval/` may be left out) of kind "eval".
- `evaluation.json`: {"format": 1, "title", "kind": "phantom" | "files", "notes": [str], "config": {...} or null
  (null: config.json is shown), "models": {model: {set: scores.summary(...)}}, "comparisons": [{"a", "b", "set",
  "metric", "diff", "lo", "hi"}]}; diff is metric(b) - metric(a), as `scores.paired_bootstrap` gives it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics.run_log import json_value
from cxr_jax.report.group_records import Group
from cxr_jax.runtime import whole_files

FORMAT = 1
KINDS = ("phantom", "files")
IMAGE_SIDE = 256
CASE_FIELDS = ("prompt", "completion", "answer", "truth", "score", "id", "hospital")


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
        self.known = None if self.known is None else label_names(self.known)


def label_names(labels: Iterable) -> list[str]:
    """Return names from names, or from numbers or bool [14] (non-zero: named)."""
    labels = list(labels)
    if labels and not any(isinstance(label, str) for label in labels):
        return [name for name, is_named in zip(CHEXPERT_14, labels, strict=True) if is_named]
    return [str(label) for label in labels]


# ---- Images ----


def png(image: ArrayLike) -> bytes:
    """Draw an 8-bit grey PNG of float [H, W] in 0..1, the longer side at most IMAGE_SIDE px.

    Raises:
        ValueError: if the image has another shape.
    """
    from PIL import Image

    # A pixel that is no number is black, not an error: the page is made after the run.
    image = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0.0, 1.0)
    if image.ndim != 2:
        raise ValueError(f"a case image must be [H, W], got {list(image.shape)}")
    picture = Image.fromarray(np.round(image * 255).astype(np.uint8))
    scale = IMAGE_SIDE / max(picture.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.LANCZOS)
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
        "config": run_config,
    }
    text = json.dumps(json_value(evaluation, str), indent=1, allow_nan=False)
    whole_files.write_text(Path(workdir) / "evaluation.json", text)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    whole_files.write_text(path, "".join(line + "\n" for line in lines))


def save_cases(workdir: str | os.PathLike, cases: Iterable[Case]) -> None:
    """Write cases/*.png and their lines in samples.jsonl, in place of an earlier report's."""
    workdir = Path(workdir)
    folder, path = workdir / "cases", workdir / "samples.jsonl"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Groups, and lines that others wrote, stay.
    lines = [line for line, record in _samples(path) if _is_group(record) or "image" not in record]
    copied = ("id", "hospital", "model", "prompt", "completion", "answer", "truth", "known")
    for position, case in enumerate(cases):
        name = f"cases/{position:04d}.png"  # never the id: ids are other people's text
        (workdir / name).write_bytes(_png_file(case))
        record = {field: getattr(case, field) for field in copied}
        record["score"] = None if case.score is None else float(case.score)
        record["image"] = name
        lines.append(json.dumps(json_value(record, str)))
    _write_lines(path, lines)


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
    path, folder = workdir / "samples.jsonl", workdir / "groups"
    if resume_step is not None and path.exists():
        _remove_later_groups(path, folder, resume_step)
    lines = []
    for position, group in enumerate(groups):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"groups/{group.step:06d}_{position}.png"
        (workdir / name).write_bytes(_png_file(group))
        record = json_value(group.row() | {"image": name}, str)
        lines.append(json.dumps(record, allow_nan=False) + "\n")
    if lines:
        # One write: a reader sees whole lines, or at most a torn last one.
        with open(path, "ab", buffering=0) as file:
            file.write("".join(lines).encode())


def _remove_later_groups(path: Path, folder: Path, last_step: int) -> None:
    """Remove the groups after `last_step`, and every image of the folder that no line names."""
    rows = list(_samples(path))
    _write_lines(
        path,
        [
            line
            for line, record in rows
            if not _is_group(record) or _step(path, record) <= last_step
        ],
    )
    images = {
        str(record.get("image"))
        for _, record in rows
        if _is_group(record) and record["step"] <= last_step
    }
    for file in folder.glob("*.png"):
        if f"groups/{file.name}" not in images:
            file.unlink()


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


def _samples(path: Path) -> Iterator[tuple[str, dict]]:
    """(line, object) of each line of samples.jsonl, if there is one; a last line that a kill has torn is left out."""
    if not path.exists():
        return
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, last], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            # Only the last line can be torn: every line before it ended with a newline.
            if number > len(lines):
                return
            raise UserError(f"{path}: line {number} is not JSON") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not an object")
        yield line, record


def _is_group(record: Mapping) -> bool:
    return record.get("kind") == "group"


def _step(path: Path, record: Mapping) -> int:
    if not isinstance(record.get("step"), int):
        raise UserError(f"{path}: a group has no step")
    return record["step"]


def _image(workdir: Path, record: Mapping, folder: str) -> bytes:
    """The PNG that a line of samples.jsonl names. UserError for what is no file of WORKDIR/folder."""
    # The name comes from a file that anybody may have edited: it must not lead out of the folder.
    file = (workdir / str(record["image"])).resolve()
    if not file.is_relative_to((workdir / folder).resolve()) or not file.is_file():
        path = workdir / "samples.jsonl"
        raise UserError(f"{path}: image {record['image']} is not a file of the folder {folder}/")
    return file.read_bytes()


def load_groups(workdir: str | os.PathLike) -> list[Group]:
    """Read the groups of samples.jsonl, with their PNG bytes.

    Raises:
        UserError: if a line or an image is not of the format.
    """
    workdir = Path(workdir)
    path, groups = workdir / "samples.jsonl", []
    for _, record in _samples(path):
        if not _is_group(record):
            continue
        try:
            groups.append(Group.from_row(record, _image(workdir, record, "groups")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            step = record.get("step")
            raise UserError(
                f"{path}: a group of step {step} is not of the format: {error!r}"
            ) from error
    return groups


def load_cases(workdir: str | os.PathLike) -> list[Case]:
    """Read the cases of samples.jsonl, with their PNG bytes.

    Raises:
        UserError: if a line or an image is not of the format.
    """
    workdir = Path(workdir)
    path, cases = workdir / "samples.jsonl", []
    for _, record in _samples(path):
        if _is_group(record) or "image" not in record:
            continue
        image = _image(workdir, record, "cases")
        try:
            fields = {name: record[name] for name in CASE_FIELDS}
        except KeyError as error:
            raise UserError(f"{path}: a case has no {error}") from error
        known, model = record.get("known"), record.get("model", "")
        cases.append(Case(image=None, png=image, known=known, model=model, **fields))
    return cases
