"""report.html of a run: one self-contained page, a pure function of the run's folder.

The folder's format (what `write_report` saves, and all that the page is made from):
- `metrics.jsonl`: see metrics.py. Curves are drawn for the TRL names (`reward`, `rewards/<term>/mean`,
  `completions/mean_length`, `entropy`, `loss`, ...) of kind "train" and for `eval/<set>/jaccard` and
  `eval/<set>/macro_f1` (the prefix `eval/` may be left out) of kind "eval".
- `evaluation.json`: {"format": 1, "title", "kind": "phantom" | "files", "notes": [str], "config": {...} or
null
  (null: config.json is shown), "models": {model: {set: scoring.summary(...)}}, "comparisons": [{"a", "b",
  "set", "metric", "diff", "lo", "hi"}]}; diff is metric(b) - metric(a), as `scoring.paired_bootstrap` gives
  it.
- `samples.jsonl`: one object a line. {"kind": "group", "step", "image": "groups/000010_0.png", ...} are the groups of
  RL, see `report_groups.Group`, in the order of the run. The others with an "image" are the cases: {"id", "hospital",
  "model", "prompt", "completion", "answer": [label], "truth": [label], "known": [label] or null, "score": float or
  null, "image": "cases/0000.png"}; other lines are left alone.
- `cases/*.png`, `groups/*.png`: 8-bit grey, the longer side at most 256 px.
"""

import base64
import io
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.report.group_records import Group
from cxr_jax.runtime import whole_files

FORMAT = 1
KINDS = ("phantom", "files")
IMAGE_SIDE = 256


@dataclass
class Case:
    """One image with the model's completion. `image`: float [H, W] in 0..1 (ignored where `png` is given).

    `answer`, `truth`: label names (or bool [14]); `known`: the labels the reference decides (None: all);
    `score`: Jaccard of this case, 0..1 (None: not scored).
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

    def __post_init__(self):
        self.answer, self.truth = label_names(self.answer), label_names(self.truth)
        self.known = None if self.known is None else label_names(self.known)


def label_names(labels) -> list[str]:
    """Names from names or from numbers or bool [14] (non-zero: named)."""
    labels = list(labels)
    if labels and all(not isinstance(x, str) for x in labels):
        return [name for name, on in zip(CHEXPERT_14, labels, strict=True) if on]
    return [str(x) for x in labels]


def png(image) -> bytes:
    """8-bit grey PNG of float [H, W] in 0..1, the longer side at most IMAGE_SIDE px."""
    from PIL import Image

    image = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0.0, 1.0)
    if image.ndim != 2:
        raise ValueError(f"a case image must be [H, W], got {list(image.shape)}")
    picture = Image.fromarray(np.round(image * 255).astype(np.uint8))
    scale = IMAGE_SIDE / max(picture.size)
    if scale < 1:
        picture = picture.resize(
            [max(1, round(s * scale)) for s in picture.size], Image.Resampling.LANCZOS
        )
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


# Saving --------------------------------------------------------------------------------------------


def _finite(value):
    """The same object with non-finite floats as None: the files are strict JSON."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if hasattr(value, "dtype"):
        return _finite(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def save_evaluation(
    workdir, *, title, tables, kind="phantom", config=None, comparisons=(), notes=()
) -> None:
    """Write evaluation.json."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    data = {
        "format": FORMAT,
        "title": title,
        "kind": kind,
        "models": tables,
        "comparisons": list(comparisons),
        "notes": list(notes),
        "config": config,
    }
    text = json.dumps(_finite(data), indent=1, allow_nan=False)
    whole_files.write_text(Path(workdir) / "evaluation.json", text)


def save_cases(workdir, cases: Iterable[Case]) -> None:
    """Write cases/*.png and their lines in samples.jsonl, in place of an earlier report's."""
    workdir = Path(workdir)
    folder, path = workdir / "cases", workdir / "samples.jsonl"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = [line for line, row in _samples(path) if _is_group(row) or "image" not in row]
    for i, case in enumerate(cases):
        name = f"cases/{i:04d}.png"  # never the id: ids are other people's text
        (workdir / name).write_bytes(case.png or png(case.image))
        row = {k: getattr(case, k) for k in ("id", "hospital", "model", "prompt", "completion")}
        row |= {k: getattr(case, k) for k in ("answer", "truth", "known")}
        score = None if case.score is None else float(case.score)
        lines.append(json.dumps(_finite({**row, "score": score, "image": name})))
    whole_files.write_text(path, "".join(line + "\n" for line in lines))


def save_groups(workdir, groups: Iterable[Group] = (), resume_step: int | None = None) -> None:
    """Append the groups of one step to samples.jsonl, and write their images.

    `resume_step`: as for `metrics.MetricsWriter`: the step of the restored checkpoint, -1 to start over; call once with
    it at the start of a run. Groups of a later step, which the run will record again, are removed. Save a step's groups
    before its checkpoint: then a run killed anywhere ends with the same lines as one that was not.
    """
    workdir = Path(workdir)
    path, folder = workdir / "samples.jsonl", workdir / "groups"
    if resume_step is not None and path.exists():
        rows = list(_samples(path))
        lines = [
            line for line, row in rows if not _is_group(row) or _step(path, row) <= resume_step
        ]
        whole_files.write_text(path, "".join(line + "\n" for line in lines))
        images = {
            str(row.get("image"))
            for line, row in rows
            if _is_group(row) and row["step"] <= resume_step
        }
        for file in folder.glob("*.png"):
            if f"groups/{file.name}" not in images:
                file.unlink()
    lines = []
    for i, group in enumerate(groups):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"groups/{group.step:06d}_{i}.png"
        (workdir / name).write_bytes(group.png or png(group.image))
        lines.append(json.dumps(_finite(group.row() | {"image": name}), allow_nan=False) + "\n")
    if lines:
        with open(
            path, "ab", buffering=0
        ) as file:  # one write: a reader sees whole lines, or at most a torn last one
            file.write("".join(lines).encode())


# Loading -------------------------------------------------------------------------------------------


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; the run has not been evaluated") from e
    except ValueError as e:
        raise UserError(f"{path}: not JSON") from e


def _samples(path: Path):
    """(line, object) of each line of samples.jsonl, if there is one; a last line that a kill has torn is left out."""
    if not path.exists():
        return
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, last], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            if number > len(lines):
                return
            raise UserError(f"{path}: line {number} is not JSON") from e
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not an object")
        yield line, row


def _is_group(row: dict) -> bool:
    return row.get("kind") == "group"


def _step(path: Path, row: dict) -> int:
    if not isinstance(row.get("step"), int):
        raise UserError(f"{path}: a group has no step")
    return row["step"]


def _image(workdir: Path, row: dict, folder: str) -> bytes:
    """The PNG that a line of samples.jsonl names. UserError for what is no file of WORKDIR/folder."""
    file = (workdir / str(row["image"])).resolve()
    if not file.is_relative_to((workdir / folder).resolve()) or not file.is_file():
        path = workdir / "samples.jsonl"
        raise UserError(f"{path}: image {row['image']} is not a file of the folder {folder}/")
    return file.read_bytes()


def load_groups(workdir) -> list[Group]:
    """The groups of samples.jsonl, with their PNG bytes."""
    workdir = Path(workdir)
    path, groups = workdir / "samples.jsonl", []
    for _, row in _samples(path):
        if not _is_group(row):
            continue
        try:
            groups.append(Group.of_row(row, _image(workdir, row, "groups")))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(
                f"{path}: a group of step {row.get('step')} is not of the format: {e!r}"
            ) from e
    return groups


def load_cases(workdir) -> list[Case]:
    """The cases of samples.jsonl, with their PNG bytes."""
    workdir = Path(workdir)
    path, cases = workdir / "samples.jsonl", []
    for _, row in _samples(path):
        if _is_group(row) or "image" not in row:
            continue
        data = _image(workdir, row, "cases")
        try:
            fields = {
                k: row[k]
                for k in ("prompt", "completion", "answer", "truth", "score", "id", "hospital")
            }
        except KeyError as e:
            raise UserError(f"{path}: a case has no {e}") from e
        cases.append(
            Case(None, known=row.get("known"), model=row.get("model", ""), png=data, **fields)
        )
    return cases


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
