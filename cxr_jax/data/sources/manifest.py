"""Radiographs on disk, listed by a manifest: JSON Lines or one JSON array, a row a film, compressed by gzip or not.

NV-Reason-CXR publishes two forms, and `sources.dialogue` reads the other usual schemas as well:

- `grpo.jsonl`: {id, image, conversations: [{from: "human", value: prompt}], solution: "A, B"}
- `sft.jsonl`: {id, image, subject_id, study_id, solution, messages: [{role, content}]}; the assistant's text
  is the target.

Our extensions, optional in all: `labels`, a dict of label name -> 1 / 0 / -1 / null; without it the solution is taken
as complete. `policy`, {"blank": .., "uncertain": ..}: what labels that are blank or uncertain there count as
(`sources.policy`); by default they are unknown. `patient_id`, or another usual name (`sources.patients`).

Reading is strict: the first problem is a UserError that names the manifest, the line and the reason, so a run
never starts on half of its data.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cxr_jax.config.sections import DataConfig
from cxr_jax.data import image_gate, images, json_rows, loading, resize
from cxr_jax.data.image_cache import CACHE_MIB, ImageCache
from cxr_jax.data.json_rows import BadRowError, is_absent
from cxr_jax.data.prompts import Conversation, Prompt
from cxr_jax.data.sources import patients, views
from cxr_jax.data.sources.base import About, Batch, Indices
from cxr_jax.data.sources.dialogue import parse_dialogue
from cxr_jax.data.sources.image_files import BadNameError, ImageFinder
from cxr_jax.data.sources.policy import COMPLETE, LabelPolicy, may_be_named
from cxr_jax.data.sources.rows import Row, Seen, conversations_of
from cxr_jax.data.sources.unreadable import UnreadableFiles
from cxr_jax.data.studies import drawn, gather, order, subjects
from cxr_jax.errors import UserError, as_utf8
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, find_label

# ---- Manifest -> rows ------------------------------------------------------------------------------


def load_rows(
    manifest: str | Path, image_root: str | Path, repeats: str = "keep", images: str = ""
) -> list[Row]:
    """Read every row of a manifest.

    Args:
        image_root: the folder below which images are looked for: by their path, then by their bare name.
        repeats: "keep", or "once" to leave out rows that say what one before them says (`sources.rows`).
        images: `config.data.images`: what is asked about (`studies.gather`).

    Raises:
        UserError: naming `manifest:line` and the reason: not JSON, a missing field, an image that is missing or outside
            `image_root`, a label that is none of the 14, a repeated id, one film and question with two truths.
    """
    roles = gather.parse_images(images)
    finder = ImageFinder(image_root)
    rows: list[Row] = []
    seen = Seen(repeats)
    for number, place, record in json_rows.read_rows(manifest):
        try:
            if isinstance(record, BadRowError):
                raise record
            row = _parse_row(record, finder)
            if seen.add(row, place):
                rows.append(row)
        except (BadRowError, BadNameError, patients.LostDigitsError) as reason:
            line = f":{number}" if place.startswith("line") else f": {place}"
            raise UserError(f"{manifest}{line}: {reason}") from None
    if not rows:
        raise UserError(f"{manifest}: holds no rows")
    return gather.gather(see_whole(seen.counted(rows)), roles)


def see_whole(rows: list[Row]) -> list[Row]:
    """Settle what no row tells by itself: which rows are one patient's, and which labels nobody was asked about."""
    # Rows that share a film are one patient's, whoever that is.
    files = patients.join_files([row.image_paths for row in rows])
    films = [
        patients.Film(row.id, row.patient, file) for row, file in zip(rows, files, strict=True)
    ]
    known, uncertain = (
        np.array([row.known for row in rows]),
        np.array([row.hedged for row in rows]),
    )
    hedged = may_be_named(_solution_mask(rows), known, uncertain)
    return [
        replace(row, group=group, hedged=tuple(row_hedged))
        for row, group, row_hedged in zip(
            rows, patients.group_films(films), hedged.tolist(), strict=True
        )
    ]


def _solution_mask(rows: Sequence[Row]) -> np.ndarray:
    """The positive labels of rows, bool [N, 14]."""
    mask = np.zeros((len(rows), len(CHEXPERT_14)), bool)
    for row_mask, row in zip(mask, rows, strict=True):
        row_mask[[INDEX[name] for name in row.positive]] = True
    return mask


def _parse_row(record: dict[str, Any], finder: ImageFinder) -> Row:
    # In this order: a row is refused for the first of its problems.
    dialogue = parse_dialogue(record)
    image_name, paths = finder.find_all([film.names for film in dialogue.films])
    truth = parse_truth(record)
    identifier = parse_id(record, image_name)
    names = (identifier, image_name)
    return Row(
        id=as_utf8(identifier),
        image_paths=paths,
        prompt=dialogue.prompt,
        target=dialogue.target,
        later=dialogue.later,
        group=identifier,  # until all rows are seen
        patient=patients.find_patient(record, names),
        view=views.find_view(record, names),
        study=order.find_study(record, names),
        split=patients.clean_id(record.get("split")),
        taken=order.find_taken(record, names),
        subject=subjects.find_subject(record),
        system=dialogue.system,
        former_group=patients.former_group(record, identifier),
        roles=tuple(film.role for film in dialogue.films if film.role is not None),
        boxes=drawn.find_boxes(record),
        **truth._asdict(),
    )


def parse_id(record: dict[str, Any], image_name: str) -> str:
    """Read the id of a row; without one the image's name is it. Raises BadRowError."""
    identifier = record.get("id")
    if is_absent(identifier):
        return image_name
    is_text = isinstance(identifier, str | int) and not isinstance(identifier, bool)
    if not is_text or not str(identifier).strip():
        raise BadRowError("the id is not a string")
    return str(identifier)


def _canonical_label(name: object, key: str, number: int) -> str:
    label = find_label(name) if isinstance(name, str) else None
    if label is None:
        # It is not shown: it may be a person's name, or a report.
        raise BadRowError(f"name {number} in {key} is none of the 14 labels")
    return label


class Truth(NamedTuple):
    """What a row says of the 14 labels: fields of `Row`."""

    solution: str
    known: tuple[bool, ...]
    hedged: tuple[bool, ...]
    policy: LabelPolicy


def parse_truth(record: dict[str, Any]) -> Truth:
    """Read the solution in CheXpert order, and which labels are known. The two ways of saying it must agree.

    A row may have no positive: then `labels` says what is absent.

    Raises:
        BadRowError: with the reason.
    """
    solution = record.get("solution")
    # A list is as clear as a text with commas.
    if isinstance(solution, list) and all(isinstance(name, str) for name in solution):
        solution = ",".join(solution)
    has_labels = not is_absent(record.get("labels"))
    # Nothing is there: only states can say so, since no solution at all may be a slip.
    if is_absent(solution) and has_labels:
        solution = None
    elif not isinstance(solution, str) or not solution.strip():
        raise BadRowError("no solution")
    names = [] if solution is None else solution.split(",")
    positive = {_canonical_label(name, "solution", number) for number, name in enumerate(names, 1)}
    states: dict[str, int | None] = dict.fromkeys(positive, 1)
    policy = COMPLETE
    if has_labels:
        if not isinstance(record["labels"], dict):
            raise BadRowError("labels is not an object of label: state")
        states = {
            _canonical_label(name, "labels", number): None if is_absent(state) else state
            for number, (name, state) in enumerate(record["labels"].items(), 1)
        }
        if len(states) < len(record["labels"]):
            raise BadRowError("labels names one of the 14 twice")
        if not all(state in (1, 0, -1, None) for state in states.values()):
            raise BadRowError("a state in labels is none of 1, 0, -1, null")
        policy = LabelPolicy()
    if not is_absent(record.get("policy")):
        policy = _parse_policy(record["policy"])
    states = policy.apply(states)
    labelled = {name for name, state in states.items() if state == 1}
    if solution is None:
        positive = labelled
    # Solution and labels must name the same positive ones.
    elif positive != labelled:
        raise BadRowError("solution and labels contradict each other")
    if solution is None and not any(state in (1, 0) for state in states.values()):
        raise BadRowError("no solution, and no label is known")
    return Truth(
        solution=", ".join(sorted(positive, key=INDEX.__getitem__)),
        known=tuple(states[name] in (0, 1) for name in CHEXPERT_14),
        hedged=tuple(states[name] == -1 for name in CHEXPERT_14),
        policy=policy,
    )


def _parse_policy(policy: object) -> LabelPolicy:
    known = {"blank", "uncertain", "parents", "no_finding"}
    if not isinstance(policy, dict) or not policy.keys() <= known:
        raise BadRowError("policy is not an object of blank and uncertain")
    given = {name: choice for name, choice in policy.items() if not is_absent(choice)}
    try:
        return LabelPolicy(**given)
    except UserError as error:
        raise BadRowError(str(error)) from None


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
        unreadable: the run's count of files that cannot be read; None: not one may be.
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
        unreadable: UnreadableFiles | None = None,
    ) -> None:
        if threads < 0:
            raise UserError(
                f"config.data.threads={threads} must be a number of threads, 0 for one a core"
            )
        self.rows, self.size, self.renderer, self.name = list(rows), size, renderer, name
        # Films in their own aspect ratio instead of squares, if that is set.
        self.native: resize.NativeSize | None = None
        if not self.rows:
            raise UserError(f"{name}: no rows")
        self.prompt = self.rows[0].prompt
        self.cache, self.threads = cache or ImageCache(), threads
        self.unreadable = unreadable or UnreadableFiles()
        self.watch: image_gate.Watch | None = None  # judges what is decoded, if anybody does
        self.opened_from: DataConfig | None = None  # of a named source what it says of its own
        # Rows that were asked for -> those that were read in their place, mostly themselves.
        self._stand_ins: dict[int, int] = {}

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def prompts(self) -> tuple[Prompt, ...]:
        """List every prompt that batches can hold, each once."""
        return tuple(dict.fromkeys(row.asked for row in self.rows))

    def image(self, index: int) -> np.ndarray:
        """Read the first image of a row, see `images`."""
        return self._image(self.rows[index].image_path)

    def images(self, index: int) -> tuple[np.ndarray, ...]:
        """Read the images of a row, or take them from the cache: float32 [size, size] in 0..1 each, or levels uint8
        [h, w].

        Raises:
            UserError: for a file that cannot be read.
        """
        return tuple(map(self._image, self.rows[index].image_paths))

    def _image(self, path: Path) -> np.ndarray:
        def decode() -> np.ndarray:
            film = images.read_image(path, self.renderer)
            if self.watch:
                self.watch.look(path, film)
            # Squares are fitted in float and rounded by the program; levels are what a processor makes of 8 bits.
            if self.native is None:
                return resize.fit(film.pixels, self.size)
            try:
                return self.native.levels(film.pixels)
            except UserError as error:
                raise UserError(f"{path.name}: {error}") from None

        return self.cache.get(self._cache_key(path), decode)

    def _cache_key(self, path: Path) -> Hashable:
        # One cache may serve sources of both kinds.
        return path, self.native or self.size, self.renderer

    def _read(self, index: int) -> tuple[int, tuple[np.ndarray, ...]]:
        """Read the images of a row, or of the next one whose files can be read; tells which one it was.

        A function of the files alone: neither of what was read before nor of the rows beside it.
        """
        for distance in range(len(self.rows)):
            stand_in = (index + distance) % len(self.rows)
            found = []
            for path in self.rows[stand_in].image_paths:
                if path in self.unreadable:
                    break
                try:
                    found.append(self._image(path))
                except UserError as error:
                    self.unreadable.add(path, error)
                    break
            else:
                self._stand_ins[index] = stand_in
                return stand_in, tuple(found)
        raise UserError(
            f"{self.name}: not one of {len(self.rows)} rows has a film that can be read"
        )

    def _read_all(self, indices: list[int]) -> list[tuple[int, tuple[np.ndarray, ...]]]:
        # Threads pay only where something has to be decoded.
        paths = (path for index in indices for path in self.rows[index].image_paths)
        any_absent = any(self._cache_key(path) not in self.cache for path in paths)
        return loading.map_in_threads(self._read, indices, self.threads if any_absent else 1)

    def _stand_ins_of(self, indices: Indices) -> list[int]:
        """The rows that `batch` reads for those of `indices`; files are read only where some may be unreadable."""
        indices = [int(index) for index in indices]
        if not self.unreadable.limit:
            return indices
        unknown = [index for index in indices if index not in self._stand_ins]
        if unknown:
            self._read_all(unknown)
        return [self._stand_ins[index] for index in indices]

    def readable(self, indices: Indices) -> list[int]:
        """List those of `indices` whose files can be read: a set that is scored must not hold a row twice."""
        asked = [int(index) for index in indices]
        stand_ins = self._stand_ins_of(asked)
        return [
            index for index, stand_in in zip(asked, stand_ins, strict=True) if index == stand_in
        ]

    def batch(self, indices: Indices) -> Batch:
        """Read the rows of `indices`, with the keys that `sources.base` lists; sides are not known.

        A row whose file cannot be read is left out, up to the limit of such files: the next one that can stands in its
        place, with its own truth.

        Raises:
            IndexError: for an index outside 0..len-1.
            UserError: for one file too many that cannot be read.
        """
        indices = [int(index) for index in np.asarray(indices).ravel()]
        if any(not 0 <= index < len(self.rows) for index in indices):
            raise IndexError(f"{self.name}: index outside 0..{len(self.rows) - 1}")
        read = self._read_all(indices)
        indices = [stand_in for stand_in, _ in read]
        rows = [self.rows[index] for index in indices]
        known, hedged = self.masks(indices)
        # Films of several sizes make no array.
        if self.native is None:
            images: Batch = {
                "image": resize.stack([row_images for _, row_images in read], self.name)
            }
        else:
            images = {"images": [row_images for _, row_images in read]}
        return {
            **images,
            "solution": self.solutions(indices),
            "known": known,
            "hedged": hedged,
            "sides": np.zeros((*known.shape, 2), bool),
            "targets": [row.target for row in rows],
            "prompts": [row.asked for row in rows],
            "ids": [row.id for row in rows],
        }

    def about(self, indices: Indices) -> About:
        """List prompts and ids of the rows as `batch` has them; reads no images where all must be readable."""
        rows = [self.rows[index] for index in self._stand_ins_of(indices)]
        return {"prompts": [row.asked for row in rows], "ids": [row.id for row in rows]}

    def solutions(self, indices: Indices) -> np.ndarray:
        """Give the solutions of the rows, bool [B, 14], without reading the images."""
        return _solution_mask([self.rows[int(index)] for index in indices])

    def masks(self, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
        """Give `known` and `hedged` of `batch`, bool [B, 14], without reading the images."""
        rows = [self.rows[int(index)] for index in indices]
        known = np.array([row.known for row in rows], bool)
        hedged = [
            row_known if row.hedged is None else row.hedged
            for row, row_known in zip(rows, ~known, strict=True)
        ]
        return known, np.array(hedged, bool)

    def conversations(self, batch: Batch, indices: Indices) -> list[Conversation]:
        """Give the conversation of each row, to train on.

        Raises:
            UserError: for a row without an assistant's text.
        """
        rows = [self.rows[index] for index in self._stand_ins_of(indices)]
        return conversations_of(rows, self.name)


# ---- Patients held out -----------------------------------------------------------------------------


def open_split(
    manifest: str | Path,
    image_root: str | Path,
    size: int = 224,
    seed: int = 0,
    *,
    repeats: str = "keep",
    images: str = "",
    **options: Any,
) -> tuple[FilesSource, FilesSource]:
    """Open a manifest as `split_rows` opens its rows.

    Args:
        repeats, images: see `load_rows`.
        **options: of `split_rows`.

    Raises:
        UserError: for a bad manifest, or one of a single patient.
    """
    rows = load_rows(manifest, image_root, repeats, images)
    return split_rows(rows, str(manifest), size, seed, **options)


def split_rows(
    rows: list[Row],
    name: str,
    size: int,
    seed: int,
    *,
    cache_mib: float = CACHE_MIB,
    threads: int = 0,
    max_bad: int = 0,
    sides: patients.Sides = patients.NOT_DRAWN,
) -> tuple[FilesSource, FilesSource]:
    """Open rows as (train, held-out) sources, split by patient; they share one `ImageCache`.

    A tenth of the patients is held out, or 30 where that is more and no more than a third; of three at least two, so
    that a checkpoint is not chosen by those it is tested on. Which ones depends on `seed` and on their own id alone, so
    adding rows moves few of them.

    Args:
        name: what a message calls the rows.
        max_bad: files that may be unreadable.
        sides: of a run whose rows, or the rules of splits, have changed since: no patient then changes sides.

    Raises:
        UserError: for rows of a single patient.
    """
    # One of each, so that the limits hold for both together.
    cache, unreadable = ImageCache(cache_mib), UnreadableFiles(max_bad)
    if sides.patients_by == patients.FORMER:
        rows = [replace(row, group=row.former_group) for row in rows]
    held_groups = patients.held_out_groups((row.group for row in rows), name, seed, sides)

    def open_part(part_name: str, is_held_out: bool) -> FilesSource:
        part = [row for row in rows if (row.group in held_groups) == is_held_out]
        source_name = f"files ({part_name})"
        return FilesSource(
            part, size, name=source_name, cache=cache, threads=threads, unreadable=unreadable
        )

    return open_part("train", False), open_part("held out", True)
