"""Radiographs on disk, listed by a JSON Lines manifest in the formats that NV-Reason-CXR publishes.

- `grpo.jsonl`: {id, image, conversations: [{from: "human", value: prompt}], solution: "A, B"}
- `sft.jsonl`: {id, image, subject_id, study_id, solution, messages: [{role, content}]}; the assistant's text
  is the target.

Our extensions, optional in both: `labels`, a dict of label name -> 1 / 0 / -1 / null; without it the solution is taken
as complete. `policy`, {"blank": .., "uncertain": ..}: what labels that are blank or uncertain there count as
(`sources.policy`); by default they are unknown. `patient_id`, or another usual name (`sources.patients`).

Reading is strict: the first problem is a UserError that names the manifest, the line and the reason, so a run
never starts on half of its data.
"""

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cxr_jax.data import images, loading, radiograph, resize
from cxr_jax.data.image_cache import CACHE_MIB, ImageCache
from cxr_jax.data.sources import patients, views
from cxr_jax.data.sources.base import Batch, Indices
from cxr_jax.data.sources.image_files import BadNameError, ImageFinder
from cxr_jax.data.sources.policy import COMPLETE, LabelPolicy
from cxr_jax.errors import UserError, as_utf8
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, PARENTS, find_label

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


# int [14, 14]: is the label of the row a child of the label of the column?
IS_PARENT = np.array(
    [[child in PARENTS.get(parent, ()) for parent in CHEXPERT_14] for child in CHEXPERT_14], int
)


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
    patient: str | None = None  # as the manifest spells it; None: it does not tell
    view: str | None = None  # of sources.views
    policy: LabelPolicy = COMPLETE  # what blank and uncertain labels count as
    # Of the 14: may it be there, so that nobody is wrong to name it? What is neither known nor this is blank. None: all
    # that is not known.
    hedged: tuple[bool, ...] | None = None


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
    finder = ImageFinder(image_root)
    rows: list[Row] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(content.removeprefix(_BYTE_ORDER_MARK).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = _parse_row(line, finder)
            if row.id in line_of_id:
                raise _BadRowError(f"the id is that of line {line_of_id[row.id]}")
        except (_BadRowError, BadNameError, patients.LostDigitsError) as reason:
            raise UserError(f"{manifest}:{number}: {reason}") from None
        line_of_id[row.id] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{manifest}: holds no rows")
    return _see_whole(rows)


def _see_whole(rows: list[Row]) -> list[Row]:
    """Settle what no row tells by itself: which rows are one patient's, and which labels nobody was asked about."""
    films = [patients.Film(row.id, row.patient, row.image_path) for row in rows]
    # A label that no row knows is not blank in this one: the set does not have it, so nobody is wrong to name it.
    is_asked = np.any([row.known for row in rows], axis=0)
    settled = []
    for row, group in zip(rows, patients.group_films(films), strict=True):
        known, hedged = np.array(row.known), np.array(row.hedged)
        # Neither is a parent of what is there or may be: edema is an opacity, whether or not the table says so.
        possible = np.isin(CHEXPERT_14, row.solution.split(", ")) | hedged
        hedged |= ~known & (~is_asked | (possible @ IS_PARENT > 0))
        settled.append(replace(row, group=group, hedged=tuple(hedged.tolist())))
    return settled


def _parse_row(line: bytes, finder: ImageFinder) -> Row:
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
    image_path = finder.find(image_name.strip())
    truth = _parse_truth(record)
    # Without an id the image's name is one.
    identifier = record.get("id", image_name)
    if not isinstance(identifier, str | int) or not str(identifier).strip():
        raise _BadRowError("the id is not a string")
    names = (str(identifier), image_name)
    return Row(
        id=as_utf8(identifier),
        image_path=image_path,
        prompt=dialogue.prompt,
        target=dialogue.target,
        group=str(identifier),  # until all rows are seen
        patient=patients.find_patient(record, names),
        view=views.find_view(record, names),
        **truth._asdict(),
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


def _canonical_label(name: object) -> str:
    label = find_label(name) if isinstance(name, str) else None
    if label is None:
        raise _BadRowError(f"{name!r} is none of the 14 labels")
    return label


class _Truth(NamedTuple):
    """What a row says of the 14 labels: fields of `Row`."""

    solution: str
    known: tuple[bool, ...]
    hedged: tuple[bool, ...]
    policy: LabelPolicy


def _parse_truth(record: dict[str, Any]) -> _Truth:
    """The solution in CheXpert order, and which labels are known. The two ways of saying it must agree."""
    solution = record.get("solution")
    if not isinstance(solution, str) or not solution.strip():
        raise _BadRowError("no solution")
    positive = {_canonical_label(name) for name in solution.split(",")}
    states: dict[str, int | None] = dict.fromkeys(positive, 1)
    policy = COMPLETE
    if record.get("labels") is not None:
        if not isinstance(record["labels"], dict):
            raise _BadRowError("labels is not an object of label: state")
        states = {_canonical_label(name): state for name, state in record["labels"].items()}
        if not all(state in (1, 0, -1, None) for state in states.values()):
            raise _BadRowError("a state in labels is none of 1, 0, -1, null")
        policy = LabelPolicy()
    if record.get("policy") is not None:
        policy = _parse_policy(record["policy"])
    states = policy.apply(states)
    # Solution and labels must name the same positive ones.
    if positive != {name for name, state in states.items() if state == 1}:
        raise _BadRowError("solution and labels contradict each other")
    return _Truth(
        solution=", ".join(sorted(positive, key=INDEX.__getitem__)),
        known=tuple(states[name] in (0, 1) for name in CHEXPERT_14),
        hedged=tuple(states[name] == -1 for name in CHEXPERT_14),
        policy=policy,
    )


def _parse_policy(policy: object) -> LabelPolicy:
    if not isinstance(policy, dict) or not policy.keys() <= {"blank", "uncertain"}:
        raise _BadRowError("policy is not an object of blank and uncertain")
    try:
        return LabelPolicy(**policy)
    except UserError as error:
        raise _BadRowError(str(error)) from None


def known_share(rows: Sequence[Row]) -> float:
    """Give the share of the rows' 14 labels each that are known to be positive or negative."""
    return float(np.mean([row.known for row in rows]))


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
        """Read the rows of `indices`, with the keys that `sources.base` lists; sides are not known.

        Raises:
            IndexError: for an index outside 0..len-1.
            UserError: for a file that cannot be read.
        """
        indices = [int(index) for index in np.asarray(indices).ravel()]
        if any(not 0 <= index < len(self.rows) for index in indices):
            raise IndexError(f"{self.name}: index outside 0..{len(self.rows) - 1}")
        rows = [self.rows[index] for index in indices]
        known, hedged = self.masks(indices)
        return {
            "image": np.stack(self._images(indices)),
            "solution": self.solutions(indices),
            "known": known,
            "hedged": hedged,
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

    def masks(self, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
        """Give `known` and `hedged` of `batch`, bool [B, 14], without reading the images."""
        rows = [self.rows[int(index)] for index in indices]
        known = np.array([row.known for row in rows], bool)
        hedged = [
            row_known if row.hedged is None else row.hedged
            for row, row_known in zip(rows, ~known, strict=True)
        ]
        return known, np.array(hedged, bool)

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

    A tenth of the patients is held out, or 30 where that is more and no more than a third; of three at least two, so
    that a checkpoint is not chosen by those it is tested on. Which ones depends on `seed` and on their own id alone, so
    adding rows moves few of them.

    Raises:
        UserError: for a bad manifest, or one of a single patient.
    """
    # One cache, so that the limit holds for both together.
    cache = ImageCache(cache_mib)
    rows = load_rows(manifest, image_root)

    # A hash of the seed and the patient's id is the patient's place in the order.
    def place(patient: str) -> bytes:
        return hashlib.sha256(f"{seed}:{patient}".encode()).digest()

    groups = sorted({row.group for row in rows}, key=place)
    if len(groups) < 2:
        raise UserError(f"{manifest}: rows of at least two patients are needed, to hold some out")
    # Fewer than about 30 patients say little.
    enough = min(30, len(groups) // 3)
    at_least = min(2, len(groups) - 1)
    held_groups = set(groups[: max(at_least, enough, round(len(groups) / 10))])

    def open_part(name: str, is_held_out: bool) -> FilesSource:
        part = [row for row in rows if (row.group in held_groups) == is_held_out]
        return FilesSource(
            part, size, renderer=renderer, name=f"files ({name})", cache=cache, threads=threads
        )

    return open_part("train", False), open_part("held out", True)
