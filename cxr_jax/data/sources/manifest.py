"""Radiographs on disk, listed by a JSON Lines manifest in the formats that NV-Reason-CXR publishes.

- `grpo.jsonl`: {id, image, conversations: [{from: "human", value: prompt}], solution: "A, B"}
- `sft.jsonl`: {id, image, subject_id, study_id, solution, messages: [{role, content}]}; the assistant's text
  is the target.

Our extension, optional in both: `labels`, a dict of label name -> 1 / 0 / -1 / null. Labels that are
uncertain or blank there are left out of every score; without it the solution is taken as complete.

Reading is strict: the first problem is a UserError that names the manifest, the line and the reason, so a run
never starts on half of its data.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path, PureWindowsPath

import numpy as np

from cxr_jax.data import images, loading, radiograph, resize
from cxr_jax.data.image_cache import CACHE_MIB, ImageCache
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, find_label


@dataclasses.dataclass(frozen=True)
class Row:
    """One image with its prompt and its truth."""

    id: str
    image_path: Path
    prompt: str
    solution: str  # positive labels in CheXpert order, ", " between them
    target: str | None  # the assistant's text, if the manifest has one
    known: tuple[bool, ...]  # of the 14: does the manifest say positive or negative?
    group: str  # patient, as far as the manifest tells; a split never divides it


# Manifest -> rows


def load_rows(manifest, image_root) -> list[Row]:
    """Every row of a manifest. Images are looked for below `image_root`: by their path, then by their bare
    name.

    Raises UserError naming `manifest:line` and the reason: not JSON, a missing field, an image that is
    missing or outside `image_root`, a label that is none of the 14, a repeated id.
    """
    data = radiograph.read_bytes(manifest)
    root = Path(image_root)
    if not root.is_dir():
        raise UserError(f"{image_root}: the image root is not a directory")
    rows, seen = [], {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = _row(line, root)
            if row.id in seen:
                raise _BadRowError(f"the id is that of line {seen[row.id]}")
        except _BadRowError as bad:
            raise UserError(f"{manifest}:{number}: {bad}") from None
        seen[row.id] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{manifest}: holds no rows")
    return rows


class _BadRowError(Exception):
    """The reason why a line is refused."""


def _row(line, root) -> Row:
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _BadRowError("not UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError):
        raise _BadRowError("not valid JSON") from None
    if not isinstance(item, dict):
        raise _BadRowError("not a JSON object")
    prompt, target, shown = _talk(item)
    name = item.get("image", shown)
    if not isinstance(name, str) or not name.strip():
        raise _BadRowError("no image")
    path = _find(name.strip(), root)
    solution, known = _truth(item)
    key = item.get("id", name)
    if not isinstance(key, str | int) or not str(key).strip():
        raise _BadRowError("the id is not a string")
    return Row(str(key), path, prompt, solution, target, known, _group(item, str(key)))


def _talk(item):
    """-> (prompt, target or None, image path named inside the messages or None)."""
    turns, shown = [], None
    if isinstance(item.get("messages"), list):
        for turn in item["messages"]:
            role = turn.get("role") if isinstance(turn, dict) else None
            text, image = _content(turn.get("content") if role else None)
            shown = shown or image
            turns.append((role, text))
    elif isinstance(item.get("conversations"), list):
        for turn in item["conversations"]:
            turn = turn if isinstance(turn, dict) else {}
            text = turn.get("value")
            text = text if isinstance(text, str) else ""
            # "<image>" is how LLaVA-style files mark the place of the picture; ours always comes first.
            turns.append((turn.get("from"), text.replace("<image>", "").strip()))
    else:
        raise _BadRowError("neither messages nor conversations")
    prompt = next((text for role, text in turns if role in ("user", "human")), "")
    target = next((text for role, text in turns if role in ("assistant", "gpt")), None)
    if not prompt:
        raise _BadRowError("no prompt (a user or human turn with text)")
    if target is not None and not target:
        raise _BadRowError("the assistant's turn is empty")
    return prompt, target, shown


def _content(content):
    """Text and image path of one message: a string, or a list of {type: text | image, ...}."""
    if isinstance(content, str):
        return content.strip(), None
    parts = [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []
    texts = [p["text"] for p in parts if isinstance(p.get("text"), str)]
    shown = [p["image"] for p in parts if isinstance(p.get("image"), str)]
    if len(shown) > 1:
        raise _BadRowError("several images in one row")
    return "\n".join(texts).strip(), (shown or [None])[0]


def _find(name, root) -> Path:
    windows = PureWindowsPath(name)
    if (
        "://" in name
        or "\0" in name
        or name.startswith("/")
        or windows.drive
        or windows.is_absolute()
    ):
        raise _BadRowError("the image is not a path relative to the image root")
    parts = windows.parts  # splits at / and at \ alike
    if ".." in parts:
        raise _BadRowError("the image path leaves the image root")
    # published manifests name folders that users flatten
    for candidate in (root.joinpath(*parts), root / parts[-1]):
        if candidate.is_file():
            if not candidate.resolve().is_relative_to(root.resolve()):
                raise _BadRowError("the image is a link that leaves the image root")
            return candidate
    raise _BadRowError(f"image file not found: {name!r} below {str(root)!r}")


def _label(name):
    canonical = find_label(name) if isinstance(name, str) else None
    if canonical is None:
        raise _BadRowError(f"{name!r} is none of the 14 labels")
    return canonical


def _truth(item):
    """-> (solution in CheXpert order, known flags). The two ways of saying it must agree."""
    solution = item.get("solution")
    if not isinstance(solution, str) or not solution.strip():
        raise _BadRowError("no solution")
    positive = {_label(name) for name in solution.split(",")}
    known = [True] * len(CHEXPERT_14)
    if item.get("labels") is not None:
        if not isinstance(item["labels"], dict):
            raise _BadRowError("labels is not an object of label: state")
        states = {_label(name): state for name, state in item["labels"].items()}
        if not all(state in (1, 0, -1, None) for state in states.values()):
            raise _BadRowError("a state in labels is none of 1, 0, -1, null")
        if positive != {name for name, state in states.items() if state == 1}:
            raise _BadRowError("solution and labels contradict each other")
        known = [states.get(name) in (0, 1) for name in CHEXPERT_14]
    return ", ".join(sorted(positive, key=INDEX.get)), tuple(known)


def _group(item, key):
    for field in ("patient_id", "subject_id"):
        if isinstance(item.get(field), str | int):
            return str(item[field])
    patient = re.search(r"patient\d+", key)  # CheXpert's paths
    return patient.group() if patient else key


class FilesSource:
    """Rows as a training source: `batch(indices)` gives arrays of one size. Safe to call from threads.

    `size`: pixels a side after `preprocess.fit`. `renderer`: see `images.read_image`. `cache`: an `ImageCache`, by
    default one of its own. `threads`: that decode the images of one batch, 0 for one a core; each keeps a
    process that decodes compressed DICOMs (`decoders`). UserError for a negative number.
    """

    lexicon = None  # reports of films have no words of their own: see labels/lexicon.toml

    def __init__(self, rows, size=224, *, renderer="voi", name="files", cache=None, threads=0):
        if threads < 0:
            raise UserError(
                f"config.data.threads={threads} must be a number of threads, 0 for one a core"
            )
        self.rows, self.size, self.renderer, self.name = list(rows), size, renderer, name
        if not self.rows:
            raise UserError(f"{name}: no rows")
        self.prompt = self.rows[0].prompt
        self.cache, self.threads = cache or ImageCache(), threads

    def __len__(self):
        return len(self.rows)

    def prompts(self) -> tuple[str, ...]:
        """Every prompt text that batches can hold."""
        return tuple(dict.fromkeys(row.prompt for row in self.rows))

    def image(self, index: int) -> np.ndarray:
        """float32 [size, size] in 0..1. Raises UserError for a file that cannot be read."""
        path = self.rows[index].image_path
        decode = lambda: resize.fit(images.read_image(path, self.renderer).pixels, self.size)
        return self.cache.get(self._key(index), decode)

    def _key(self, index):
        return self.rows[index].image_path, self.size, self.renderer

    def _images(self, indices):
        absent = any(self._key(i) not in self.cache for i in indices)
        return loading.in_threads(self.image, indices, self.threads if absent else 1)

    def batch(self, indices) -> dict:
        """-> image float32 [B, size, size], solution, known and hedged bool [B, 14], sides bool [B, 14, 2]; lists
        prompts, targets and ids. What is not known may be there; sides are not known.

        A target is None where the manifest has none. Indices must lie in 0..len-1 (IndexError otherwise).
        """
        indices = [int(i) for i in np.asarray(indices).ravel()]
        if any(not 0 <= i < len(self.rows) for i in indices):
            raise IndexError(f"{self.name}: index outside 0..{len(self.rows) - 1}")
        rows = [self.rows[i] for i in indices]
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

    def about(self, indices) -> dict:
        """prompts and ids of the rows, without reading the images."""
        rows = [self.rows[int(i)] for i in indices]
        return {"prompts": [row.prompt for row in rows], "ids": [row.id for row in rows]}

    def solutions(self, indices) -> np.ndarray:
        """bool [B, 14]: the solutions of `batch`, without reading the images."""
        solution = np.zeros((len(indices), len(CHEXPERT_14)), bool)
        for hit, i in zip(solution, indices, strict=True):
            hit[[INDEX[name] for name in self.rows[int(i)].solution.split(", ")]] = True
        return solution

    def targets(self, batch: dict, indices) -> list[str]:
        """The assistant's text of each row, to train on. UserError for a row that has none."""
        for i, target in zip(indices, batch["targets"], strict=True):
            if not target:
                raise UserError(
                    f"{self.name}: row {self.rows[int(i)].id} has no assistant text to train on"
                )
        return batch["targets"]


def open_split(
    manifest, image_root, size=224, seed=0, *, renderer="voi", cache_mib=CACHE_MIB, threads=0
):
    """-> (train, held-out) sources of one manifest, split by patient; they share one `ImageCache`.

    A tenth of the patients is held out, or 30 where that is more and no more than a third. Which ones depends on
    `seed` and on their own id alone, so adding rows moves few of them. Raises UserError for a bad manifest, or one of
    a single patient.
    """
    cache = ImageCache(cache_mib)
    rows = load_rows(manifest, image_root)
    groups = sorted(
        {r.group for r in rows}, key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest()
    )
    if len(groups) < 2:
        raise UserError(f"{manifest}: rows of at least two patients are needed, to hold some out")
    few = min(30, len(groups) // 3)
    held = set(groups[: max(1, few, round(len(groups) / 10))])
    parts = [[r for r in rows if (r.group in held) == side] for side in (False, True)]
    make = lambda rows, name: FilesSource(
        rows, size, renderer=renderer, name=name, cache=cache, threads=threads
    )
    return make(parts[0], "files (train)"), make(parts[1], "files (held out)")
