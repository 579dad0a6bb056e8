"""Radiographs on disk, listed by a JSON Lines manifest in the formats that NV-Reason-CXR publishes.

- `grpo.jsonl`: {id, image, conversations: [{from: "human", value: prompt}], solution: "A, B"}
- `sft.jsonl`: {id, image, subject_id, study_id, solution, messages: [{role, content}]}; the assistant's text
  is the target.

Our extension, optional in both: `labels`, a dict of label name -> 1 / 0 / -1 / null. Labels that are
uncertain or blank there are left out of every score; without it the solution is taken as complete.

Reading is strict: the first problem is a UserError that names the manifest, the line and the reason, so a run
never starts on half of its data.
"""

import hashlib
import json
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from cxr_jax.data import images, loading, radiograph, resize
from cxr_jax.data.image_cache import CACHE_MIB, ImageCache
from cxr_jax.data.sources.base import Batch, Indices
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, find_label

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One image with its prompt and its truth."""

    id: str
    image_path: Path
    prompt: str
    solution: str  # positive labels in CheXpert order, ", " between them
    target: str | None  # the assistant's text, if the manifest has one
    known: tuple[bool, ...]  # of the 14: does the manifest say positive or negative?
    group: str  # patient, as far as the manifest tells; a split never divides it


class _BadRowError(Exception):
    """The reason why a line is refused."""


class _Dialogue(NamedTuple):
    """What is said in a row."""

    prompt: str
    target: str | None
    image: str | None  # the path that a message names


# ---- Manifest -> rows ------------------------------------------------------------------------------


def load_rows(manifest: str | Path, image_root: str | Path) -> list[Row]:
    """Read every row of a manifest.

    Args:
        image_root: the folder below which images are looked for: by their path, then by their bare name.

    Raises:
        UserError: naming `manifest:line` and the reason: not JSON, a missing field, an image that is missing or outside
            `image_root`, a label that is none of the 14, a repeated id.
    """
    content = radiograph.read_bytes(manifest)
    root = Path(image_root)
    if not root.is_dir():
        raise UserError(f"{image_root}: the image root is not a directory")
    rows: list[Row] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(content.removeprefix(_BYTE_ORDER_MARK).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = _parse_row(line, root)
            if row.id in line_of_id:
                raise _BadRowError(f"the id is that of line {line_of_id[row.id]}")
        except _BadRowError as reason:
            raise UserError(f"{manifest}:{number}: {reason}") from None
        line_of_id[row.id] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{manifest}: holds no rows")
    return rows


def _parse_row(line: bytes, image_root: Path) -> Row:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _BadRowError("not UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError):
        raise _BadRowError("not valid JSON") from None
    if not isinstance(record, dict):
        raise _BadRowError("not a JSON object")
    # In this order: a row is refused for the first of its problems.
    dialogue = _parse_dialogue(record)
    image_name = record.get("image", dialogue.image)
    if not isinstance(image_name, str) or not image_name.strip():
        raise _BadRowError("no image")
    image_path = _find_image(image_name.strip(), image_root)
    solution, known = _parse_truth(record)
    # Without an id the image's name is one.
    identifier = record.get("id", image_name)
    if not isinstance(identifier, str | int) or not str(identifier).strip():
        raise _BadRowError("the id is not a string")
    return Row(
        id=str(identifier),
        image_path=image_path,
        prompt=dialogue.prompt,
        solution=solution,
        target=dialogue.target,
        known=known,
        group=_patient_of(record, str(identifier)),
    )


def _parse_dialogue(record: dict[str, Any]) -> _Dialogue:
    # Both formats as (role, text) in order.
    turns, image = [], None
    if isinstance(record.get("messages"), list):
        for turn in record["messages"]:
            role = turn.get("role") if isinstance(turn, dict) else None
            spoken, shown = _parse_content(turn.get("content") if role else None)
            image = image or shown
            turns.append((role, spoken))
    elif isinstance(record.get("conversations"), list):
        for turn in record["conversations"]:
            turn = turn if isinstance(turn, dict) else {}
            value = turn.get("value")
            spoken = value if isinstance(value, str) else ""
            # "<image>" is how LLaVA-style files mark the place of the picture; ours always comes first.
            turns.append((turn.get("from"), spoken.replace("<image>", "").strip()))
    else:
        raise _BadRowError("neither messages nor conversations")

    # The first turn of each; more turns are allowed and not used.
    prompt = next((spoken for role, spoken in turns if role in ("user", "human")), "")
    target = next((spoken for role, spoken in turns if role in ("assistant", "gpt")), None)
    if not prompt:
        raise _BadRowError("no prompt (a user or human turn with text)")
    if target is not None and not target:
        raise _BadRowError("the assistant's turn is empty")
    return _Dialogue(prompt, target, image)


def _parse_content(content: object) -> tuple[str, str | None]:
    """Text and image path of one message: a string, or a list of {type: text | image, ...}."""
    if isinstance(content, str):
        return content.strip(), None
    parts = []
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    shown = [part["image"] for part in parts if isinstance(part.get("image"), str)]
    if len(shown) > 1:
        raise _BadRowError("several images in one row")
    return "\n".join(texts).strip(), (shown or [None])[0]


def _find_image(name: str, image_root: Path) -> Path:
    # Paths of either system, and never out of the root: a manifest comes from elsewhere.
    windows_path = PureWindowsPath(name)
    if (
        "://" in name
        or "\0" in name
        or name.startswith("/")
        or windows_path.drive
        or windows_path.is_absolute()
    ):
        raise _BadRowError("the image is not a path relative to the image root")
    parts = windows_path.parts  # splits at / and at \ alike
    if ".." in parts:
        raise _BadRowError("the image path leaves the image root")
    # Published manifests name folders that users flatten.
    for candidate in (image_root.joinpath(*parts), image_root / parts[-1]):
        if candidate.is_file():
            if not candidate.resolve().is_relative_to(image_root.resolve()):
                raise _BadRowError("the image is a link that leaves the image root")
            return candidate
    raise _BadRowError(f"image file not found: {name!r} below {str(image_root)!r}")


def _canonical_label(name: object) -> str:
    label = find_label(name) if isinstance(name, str) else None
    if label is None:
        raise _BadRowError(f"{name!r} is none of the 14 labels")
    return label


def _parse_truth(record: dict[str, Any]) -> tuple[str, tuple[bool, ...]]:
    """The solution in CheXpert order, and which labels are known. The two ways of saying it must agree."""
    solution = record.get("solution")
    if not isinstance(solution, str) or not solution.strip():
        raise _BadRowError("no solution")
    positive = {_canonical_label(name) for name in solution.split(",")}
    known = [True] * len(CHEXPERT_14)
    if record.get("labels") is not None:
        if not isinstance(record["labels"], dict):
            raise _BadRowError("labels is not an object of label: state")
        states = {_canonical_label(name): state for name, state in record["labels"].items()}
        if not all(state in (1, 0, -1, None) for state in states.values()):
            raise _BadRowError("a state in labels is none of 1, 0, -1, null")
        # Solution and labels must name the same positive ones.
        if positive != {name for name, state in states.items() if state == 1}:
            raise _BadRowError("solution and labels contradict each other")
        known = [states.get(name) in (0, 1) for name in CHEXPERT_14]
    return ", ".join(sorted(positive, key=INDEX.__getitem__)), tuple(known)


def _patient_of(record: dict[str, Any], identifier: str) -> str:
    """The patient of a row; the row's own id where the manifest does not tell."""
    for field in ("patient_id", "subject_id"):
        if isinstance(record.get(field), str | int):
            return str(record[field])
    patient = re.search(r"patient\d+", identifier)  # CheXpert's paths
    return patient.group() if patient else identifier


# ---- Rows -> batches -------------------------------------------------------------------------------


class FilesSource:
    """Rows as a training source: `batch(indices)` gives arrays of one size. Safe to call from threads.

    Args:
        size: pixels a side after `resize.fit`.
        renderer: see `images.read_image`.
        cache: of decoded images; None for one of its own.
        threads: that decode the images of one batch, 0 for one a core; each keeps a process that decodes compressed
            DICOMs (`dicom.codecs`).

    Raises:
        UserError: for a negative number of threads, or no rows.
    """

    lexicon: str | None = (
        None  # reports of films have no words of their own: see labels/lexicon.toml
    )

    def __init__(
        self,
        rows: Iterable[Row],
        size: int = 224,
        *,
        renderer: str = "voi",
        name: str = "files",
        cache: ImageCache | None = None,
        threads: int = 0,
    ) -> None:
        if threads < 0:
            raise UserError(
                f"config.data.threads={threads} must be a number of threads, 0 for one a core"
            )
        self.rows, self.size, self.renderer, self.name = list(rows), size, renderer, name
        if not self.rows:
            raise UserError(f"{name}: no rows")
        self.prompt = self.rows[0].prompt
        self.cache, self.threads = cache or ImageCache(), threads

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def prompts(self) -> tuple[str, ...]:
        """List every prompt text that batches can hold, each once."""
        return tuple(dict.fromkeys(row.prompt for row in self.rows))

    def image(self, index: int) -> np.ndarray:
        """Read the image of a row, or take it from the cache: float32 [size, size] in 0..1.

        Raises:
            UserError: for a file that cannot be read.
        """
        path = self.rows[index].image_path

        def decode() -> np.ndarray:
            return resize.fit(images.read_image(path, self.renderer).pixels, self.size)

        return self.cache.get(self._cache_key(index), decode)

    def _cache_key(self, index: int) -> Hashable:
        return self.rows[index].image_path, self.size, self.renderer

    def _images(self, indices: list[int]) -> list[np.ndarray]:
        # Threads pay only where something has to be decoded.
        any_absent = any(self._cache_key(index) not in self.cache for index in indices)
        return loading.map_in_threads(self.image, indices, self.threads if any_absent else 1)

    def batch(self, indices: Indices) -> Batch:
        """Read the rows of `indices`, with the keys that `sources.base` lists: what is not known may be there, and
        sides are not known.

        Raises:
            IndexError: for an index outside 0..len-1.
            UserError: for a file that cannot be read.
        """
        indices = [int(index) for index in np.asarray(indices).ravel()]
        if any(not 0 <= index < len(self.rows) for index in indices):
            raise IndexError(f"{self.name}: index outside 0..{len(self.rows) - 1}")
        rows = [self.rows[index] for index in indices]
        # What is not known is taken as possible: nobody is wrong to mention it.
        known = np.array([row.known for row in rows], bool)
        return {
            "image": np.stack(self._images(indices)),
            "solution": self.solutions(indices),
            "known": known,
            "hedged": ~known,
            "sides": np.zeros((*known.shape, 2), bool),
            "targets": [row.target for row in rows],
            **self.about(indices),
        }

    def about(self, indices: Indices) -> dict[str, list[str]]:
        """List prompts and ids of the rows, without reading the images."""
        rows = [self.rows[int(index)] for index in indices]
        return {"prompts": [row.prompt for row in rows], "ids": [row.id for row in rows]}

    def solutions(self, indices: Indices) -> np.ndarray:
        """Give the solutions of `batch`, bool [B, 14], without reading the images."""
        solutions = np.zeros((len(indices), len(CHEXPERT_14)), bool)
        for solution, index in zip(solutions, indices, strict=True):
            positive = self.rows[int(index)].solution.split(", ")
            solution[[INDEX[name] for name in positive]] = True
        return solutions

    def targets(self, batch: Batch, indices: Indices) -> list[str]:
        """Give the assistant's text of each row, to train on.

        Raises:
            UserError: for a row that has none.
        """
        for index, target in zip(indices, batch["targets"], strict=True):
            if not target:
                raise UserError(
                    f"{self.name}: row {self.rows[int(index)].id} has no assistant text to train on"
                )
        return batch["targets"]


# ---- Patients held out -----------------------------------------------------------------------------


def open_split(
    manifest: str | Path,
    image_root: str | Path,
    size: int = 224,
    seed: int = 0,
    *,
    renderer: str = "voi",
    cache_mib: float = CACHE_MIB,
    threads: int = 0,
) -> tuple[FilesSource, FilesSource]:
    """Open a manifest as (train, held-out) sources, split by patient; they share one `ImageCache`.

    A tenth of the patients is held out, or 30 where that is more and no more than a third. Which ones depends on
    `seed` and on their own id alone, so adding rows moves few of them.

    Raises:
        UserError: for a bad manifest, or one of a single patient.
    """
    # One cache, so that the limit holds for both together.
    cache = ImageCache(cache_mib)
    rows = load_rows(manifest, image_root)

    # A hash of the seed and the patient's id is the patient's place in the order.
    def place(patient: str) -> bytes:
        return hashlib.sha256(f"{seed}:{patient}".encode()).digest()

    patients = sorted({row.group for row in rows}, key=place)
    if len(patients) < 2:
        raise UserError(f"{manifest}: rows of at least two patients are needed, to hold some out")
    # Fewer than about 30 patients say little.
    enough = min(30, len(patients) // 3)
    held_patients = set(patients[: max(1, enough, round(len(patients) / 10))])

    def open_part(name: str, is_held_out: bool) -> FilesSource:
        part = [row for row in rows if (row.group in held_patients) == is_held_out]
        return FilesSource(
            part, size, renderer=renderer, name=f"files ({name})", cache=cache, threads=threads
        )

    return open_part("train", False), open_part("held out", True)
