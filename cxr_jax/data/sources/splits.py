"""The sources of a run: what trains, what a checkpoint is chosen by, what is reported.

Phantoms: disjoint streams ("train", "select", "test") of the training hospital and of the out-of-distribution one.
Files: some patients are held out (`manifest.open_split`), a third of them for selection and the others for the test.
"""

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cxr_jax.config.sections import DataConfig
from cxr_jax.data import image_gate, json_rows, resize
from cxr_jax.data.image_cache import ImageCache
from cxr_jax.data.json_rows import BadRowError
from cxr_jax.data.prompts import Prompt
from cxr_jax.data.sources import manifest, phantom, policy
from cxr_jax.data.sources.base import Batch, Source
from cxr_jax.data.sources.dialogue import parse_dialogue
from cxr_jax.data.sources.films import rows as film_rows
from cxr_jax.data.sources.patients import (
    FORMER,
    NOT_DRAWN,
    LostDigitsError,
    PatientOfRow,
    Sides,
    find_patient,
    former_group,
    place_of,
    same_patient_key,
    short_place,
)
from cxr_jax.data.sources.rows import Row, describe_repeats
from cxr_jax.data.sources.unreadable import UnreadableFiles
from cxr_jax.data.sources.views import LATERAL, OTHER
from cxr_jax.data.studies import gather
from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.models.image_processor import ImageProcessor
from cxr_jax.runtime import processes

HELD_OUT_PART = 64  # examples that `held_out` asks a source for at a time


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The sources of a run; no patient is in two of the three splits, unless a manifest has only two patients.

    Attributes:
        train: what trains.
        select: by display name, what a checkpoint is chosen by.
        test: by display name, what is reported.
        out_of_distribution: the name, in `select` and `test`, of the set that decides which checkpoint is best.
        label_policy: what blank and uncertain labels count as, to stand beside every number; "" of phantoms, whose
            labels are all known.
        about: what a run says of its rows before it begins, a line each.
        contaminated: what stands beside every number of a run that trained on what it is tested on; "" of others.
        warnings: what a person should look at, a line each.
        sides: which patients are on which side: with it, a run whose rows change later keeps every patient there.
            Empty of phantoms.
    """

    train: Source
    select: dict[str, Source]
    test: dict[str, Source]
    out_of_distribution: str
    label_policy: str = ""
    about: tuple[str, ...] = ()
    contaminated: str = ""
    warnings: tuple[str, ...] = ()
    sides: Sides = NOT_DRAWN

    @property
    def lexicon(self) -> str | None:
        """The phrases that reports of any of the sources use beyond labels/lexicon.toml: one program reads them all."""
        sources = (self.train, *self.select.values(), *self.test.values())
        return next(filter(None, (source.lexicon for source in sources)), None)

    def prompts(self) -> tuple[Prompt, ...]:
        """List every prompt, each once: held-out rows may ask what training rows do not."""
        sources = [self.train, *self.select.values(), *self.test.values()]
        return tuple(dict.fromkeys(prompt for source in sources for prompt in source.prompts()))


def open_splits(
    data: DataConfig,
    sides: Sides = NOT_DRAWN,
    processor: ImageProcessor | None = None,
    *,
    only_scores: bool = False,
) -> Splits:
    """Open the sources that a run's `config.data` names.

    Args:
        sides: `Splits.sides` of the run when it began.
        processor: of the run's model, which resizes films where they keep their aspect ratio (`data.max_pixels`);
            None: nobody will read an image.
        only_scores: nothing trains; all films may be scored then (`data.scored`).

    Raises:
        UserError: for a bad manifest, or a number that is out of range.
    """
    if data.source == "phantom":
        return _phantom_splits(data)
    return _file_splits(data, sides, processor, only_scores)


def _phantom_splits(data_config: DataConfig) -> Splits:
    def hold_out(split: str) -> dict[str, Source]:
        return {
            hospital: phantom.open_phantoms(data_config, hospital, split)
            for hospital in (data_config.hospital, data_config.ood_hospital)
        }

    train = phantom.open_phantoms(data_config, data_config.hospital, "train")
    return Splits(
        train=train,
        select=hold_out("select"),
        test=hold_out("test"),
        out_of_distribution=data_config.ood_hospital,
    )


def former_sides(data: DataConfig) -> Sides:
    """Find the sides of a run on files that has trained and kept none of them: it was split by the rules of before.

    Returns:
        Those of today's rules, where they draw the same.

    Raises:
        UserError: for a bad manifest.
    """
    today, former = (_file_splits(data, Sides(patients_by=rule)) for rule in ("", FORMER))
    row_ids = [
        [
            [row.id for row in source.rows]
            for source in (splits.train, *splits.select.values(), *splits.test.values())
            if isinstance(source, manifest.FilesSource)
        ]
        for splits in (today, former)
    ]
    return (today if row_ids[0] == row_ids[1] else former).sides


def describe_kept(splits: Splits, sides: Sides) -> tuple[str, ...]:
    """Say where patients are in a split that is as when the run began, not as one is drawn now: a line each.

    Args:
        sides: what the run had kept of it.
    """
    lines = [f"{splits.about[0]}; split as when the run began"]
    if splits.sides.patients_by:
        sources = [splits.train, *splits.select.values(), *splits.test.values()]
        train, *held = (_who(source) for source in sources)
        lines[0] += f", by {splits.sides.patients_by}"
        if shared := len(train & set().union(*held)):
            lines.append(
                f"warning: {shared:,} patients, as all columns and paths are read now, train and are held out as well"
            )
    if not sides.selected:
        lines[0] += (
            ", but for who chooses the checkpoint and who tests it: drawn by the rows as they are"
        )
    return tuple(lines)


def _who(source: Source) -> set[Hashable]:
    """The patients of a source of films; of rows without one the films."""
    assert isinstance(source, manifest.FilesSource)
    return {same_patient_key(row.patient) if row.patient else row.image_path for row in source.rows}


def _file_splits(
    data_config: DataConfig,
    sides: Sides,
    processor: ImageProcessor | None = None,
    only_scores: bool = False,
) -> Splits:
    rows, films = open_rows(data_config)
    # ---- Who is where ----
    if only_scores and data_config.scores_all:
        parts = _score_all(rows, data_config)
    else:
        parts, sides = _hold_out(rows, data_config, sides)
    set_reading(parts.values(), data_config, processor)
    # ---- What there is to say of them ----
    label_policy = describe_labels(rows, None)
    about: list[str | None] = [_describe_groups(parts), f"labels: {label_policy}"]
    if films is not None:
        label_policy = describe_labels(rows, films)
        about = [_describe_groups(parts), *films.about, f"protocol: {label_policy}"]
    about += [gather.describe(rows), describe_repeats(rows)]
    # A data set goes by its own name in every table.
    shown_name = data_config.source
    return Splits(
        # Where nothing trains it says how films are read.
        train=parts.get("train", parts["test"]),
        select={shown_name: parts["selection"]} if "selection" in parts else {},
        test={shown_name: parts["test"]},
        out_of_distribution=shown_name,
        label_policy=label_policy,
        about=tuple(filter(None, about)),
        warnings=warn_of_rows(_name_of(data_config), rows, "train" in parts),
        sides=sides,
    )


def _hold_out(
    rows: list[Row], data: DataConfig, sides: Sides
) -> tuple[dict[str, manifest.FilesSource], Sides]:
    """Train, selection and test, by patients, and who is on which side."""
    train, held_source = manifest.split_rows(
        rows,
        _name_of(data),
        data.size,
        data.seed,
        cache_mib=data.cache_mib,
        threads=data.threads,
        max_bad=data.max_bad,
        sides=sides,
    )
    for_selection = _choose_selection(data, held_source, sides)
    parts = {"train": train}
    for name, selected in (("selection", True), ("test", False)):
        part = [row for row in held_source.rows if (row.group in for_selection) == selected]
        # Of two patients one is held out and serves for both, which is warned of: an empty set could not be scored.
        parts[name] = _beside(held_source, part or held_source.rows, name)
    return parts, _sides_of(held_source, for_selection, data.seed, sides)


def _score_all(rows: list[Row], data: DataConfig) -> dict[str, manifest.FilesSource]:
    """The test, of all rows, and the selection where the config names a split for it: nothing trains here.

    Raises:
        UserError: for a patient of both.
    """
    test = manifest.FilesSource(
        rows,
        data.size,
        name="files (test)",
        cache=ImageCache(data.cache_mib),
        threads=data.threads,
        unreadable=UnreadableFiles(data.max_bad),
    )
    if not data.select_split:
        return {"test": test}
    chosen = load_films(replace(data, split=data.select_split))
    # What is fitted on a patient says nothing of how it does on others.
    if shared := {row.group for row in rows} & {row.group for row in chosen}:
        raise UserError(
            f"config.data.select_split={data.select_split!r}: {len(shared):,} of its patients are scored, too"
        )
    return {"test": test, "selection": _beside(test, chosen, "selection")}


def _beside(source: manifest.FilesSource, rows: list[Row], name: str) -> manifest.FilesSource:
    """Other rows with the cache and the limits of a source."""
    return beside(source, rows, f"files ({name})")


def beside(source: manifest.FilesSource, rows: list[Row], name: str) -> manifest.FilesSource:
    """Give other rows, read as those of a source, with its cache and its limits."""
    other = manifest.FilesSource(
        rows,
        source.size,
        name=name,
        cache=source.cache,
        threads=source.threads,
        unreadable=source.unreadable,
    )
    other.native, other.watch, other.opened_from = source.native, source.watch, source.opened_from
    return other


def _name_of(data: DataConfig) -> str:
    """What messages call the rows of a run."""
    # As the user has named it.
    return f"{data.source} in {data.root}" if data.is_data_set else data.manifest


def open_rows(data: DataConfig) -> tuple[list[Row], film_rows.FilmRows | None]:
    """Read the rows of a manifest, or of a data set with what there is to say of it. Raises UserError."""
    if not data.is_data_set:
        return manifest.load_rows(data.manifest, data.image_root, data.repeats, data.images), None
    # As of a manifest: groups, what nobody is wrong to name, films that are asked about together.
    films = film_rows.load_rows(data)
    rows = manifest.see_whole(films.rows)
    return gather.gather(rows, gather.parse_images(data.images)), films


def describe_labels(rows: Sequence[Row], films: film_rows.FilmRows | None) -> str:
    """Say what stands beside every number of these rows, in one line.

    Args:
        films: of the data set that they are of, if they are of one.
    """
    if films is not None:
        return films.describe_protocol()
    return policy.describe((row.policy for row in rows), manifest.known_share(rows))


def load_films(data: DataConfig) -> list[Row]:
    """Read the rows of a run on films. Raises UserError for what a run refuses."""
    return open_rows(data)[0]


def digest(data: DataConfig) -> str:
    """Hash what a run on films reads its rows from: the manifest, or the films of a data set."""
    if data.is_data_set:
        return film_rows.digest(data)
    # Its bytes: a row that is added changes who is where.
    with open(data.manifest, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def read_patients(data: DataConfig) -> list[PatientOfRow]:
    """Read whose films a run reads; they need not be there any more. Rows that cannot be read are left out.

    Raises:
        UserError: for tables that cannot be read, or a file that is no manifest.
    """
    if data.is_data_set:
        return film_rows.read_patients(data)
    found = []
    for _, _, record in json_rows.read_rows(data.manifest):
        with contextlib.suppress(BadRowError, LostDigitsError):
            if isinstance(record, BadRowError):
                continue
            films = parse_dialogue(record).films
            image_names = films[0].names if films else ()
            identifier = manifest.parse_id(record, image_names[-1] if image_names else "")
            patient = find_patient(record, [identifier, *image_names])
            found.append(PatientOfRow(patient, former_group(record, identifier)))
    return found


def with_train_rows(splits: Splits) -> Splits:
    """Give splits of files whose test set has the rows that would train, too: for models that have not seen them.

    Raises:
        UserError: if what would train is no single table of films.
    """
    (name, test), train = next(iter(splits.test.items())), splits.train
    # All are scored already.
    if train is test:
        return splits
    if not isinstance(train, manifest.FilesSource) or not isinstance(test, manifest.FilesSource):
        raise UserError("config.eval.include_train scores the films of one source, not of several")
    # One cache for all: films of both are decoded once.
    joined = manifest.FilesSource(
        [*test.rows, *train.rows],
        test.size,
        name="files (test and train)",
        cache=test.cache,
        threads=test.threads,
        unreadable=test.unreadable,
    )
    joined.watch, joined.native = test.watch, test.native
    return replace(splits, test={**splits.test, name: joined})


def set_reading(
    sources: Iterable[manifest.FilesSource],
    data_config: DataConfig,
    processor: ImageProcessor | None,
) -> None:
    """Say how all three sources read their films."""
    # One for all: a run says once how many films are none.
    watch = image_gate.Watch(data_config.image_gate)
    native = None
    # In their own aspect ratio films are read as the model's processor does, which no manifest knows.
    if data_config.is_native and processor is not None:
        native = resize.NativeSize(processor, data_config.min_pixels, data_config.max_pixels)
    for source in sources:
        source.watch, source.native = watch, native


def _choose_selection(
    data_config: DataConfig, held_source: manifest.FilesSource, sides: Sides
) -> set[str]:
    """The held-out patients that choose the checkpoint: the first third as the manifest lists them, or who did before.

    Raises:
        UserError: if who did before, or who tested, is gone.
    """
    held = list(dict.fromkeys(row.group for row in held_source.rows))
    if not sides.selected:
        return set(held[: max(1, len(held) // 3)])
    before = set(sides.selected.split())
    chosen = {group for group in held if short_place(group, data_config.seed) in before}
    if not 0 < len(chosen) < len(held):
        does = "tests the model" if chosen else "chooses the checkpoint"
        raise UserError(f"{_name_of(data_config)}: holds no patient that {does} in this run")
    return chosen


def _sides_of(
    held_source: manifest.FilesSource, for_selection: set[str], seed: int, before: Sides
) -> Sides:
    """The sides as they are drawn, by what the run had `before`."""
    held = {row.group for row in held_source.rows}
    last = before.held_out_up_to or max(place_of(group, seed) for group in held)
    if held == for_selection:
        return Sides(last, "", before.patients_by)
    selected = sorted(short_place(group, seed) for group in for_selection)
    return Sides(last, " ".join(selected), before.patients_by)


def _describe_groups(parts: Mapping[str, manifest.FilesSource]) -> str:
    """The groups of a split in one line: what is drawn as a patient, and how many are where."""
    rows = [row for source in parts.values() for row in source.rows]
    unit = "patients" if all(row.patient is not None for row in rows) else "groups"
    group_count = len({row.group for row in rows})
    counts = {name: len({row.group for row in source.rows}) for name, source in parts.items()}
    shares = ", ".join(f"{name} {count} ({len(parts[name])})" for name, count in counts.items())
    return f"data: {len(rows):,} rows of {group_count:,} {unit}; {unit} (rows): {shares}"


def warn_of_rows(name: str, rows: Sequence[Row], is_divided: bool) -> tuple[str, ...]:
    """Give what no number of a run may be read without, a line each.

    Args:
        is_divided: some of the patients train.
    """
    warnings = []
    if is_divided and len({row.group for row in rows}) == 2:
        warnings.append(
            f"warning: {name}: rows of two patients: the one that is held out both chooses the checkpoint and tests it"
        )
    if unknown := sum(row.patient is None for row in rows):
        which = "any row" if unknown == len(rows) else f"{unknown:,} of {len(rows):,} rows"
        warnings.append(
            f"warning: {name}: no patient is known of {which}: each of these images counts as a patient of its own, "
            "so one patient may stand on both sides of the split (docs/inputs.md: columns and paths that are read)"
        )
    groups_of_films: dict[Path, set[str]] = {}
    for row in rows:
        for path in row.image_paths:
            groups_of_films.setdefault(path, set()).add(row.group)
    if shared := sum(len(groups) > 1 for groups in groups_of_films.values()):
        warnings.append(
            f"warning: {name}: {shared:,} of {len(groups_of_films):,} films are listed under several patients, so one "
            "film may stand on both sides of the split: whose is it?"
        )
    if turned := sum(row.view in (LATERAL, OTHER) for row in rows):
        warnings.append(
            f"warning: {name}: {turned:,} of {len(rows):,} rows are no frontal films by their view or path, and are "
            "asked what frontal ones are"
        )
    if few := policy.warn_few_known(name, manifest.known_share(rows)):
        warnings.append(few)
    return tuple(warnings)


def held_out(source: Source, count: int, poll: Callable[[], object] | None = None) -> Batch:
    """Make the first `count` examples of a source, in order; all of a smaller one. Unreadable files are left out.

    Args:
        poll: called before every HELD_OUT_PART examples; what it raises ends this.

    Returns:
        The keys that every source fills (`base`), "texts" (the prompts), of files "ids", and of phantom studies
        "views", the roles of their films.

    Raises:
        UserError: for one file too many that cannot be read, or none that can.
        RunFailedError: if the processes of a run can read different files.
    """
    count = min(count, len(source))
    parts, taken = [], []
    # In parts, so that a signal is seen between them.
    for start in range(0, count, HELD_OUT_PART):
        if poll is not None:
            poll()
        part = source.readable(range(start, min(start + HELD_OUT_PART, count)))
        if part:
            parts.append(source.batch(np.array(part)))
            taken += part
    # Every process reads its share of one set: with different ones they would wait for each other.
    if not processes.have_same(repr(taken)):
        raise RunFailedError(f"{source.name}: not every process can read the same held-out films")
    if not taken:
        raise UserError(f"{source.name}: none of the first {count} films can be read")
    batch: Batch = {
        key: np.concatenate([np.asarray(part[key]) for part in parts])
        for key in ("image", "solution", "known", "hedged", "sides")
        if key in parts[0]
    }
    # Films of several sizes make no array.
    if "images" in parts[0]:
        batch["images"] = [films for part in parts for films in part["images"]]
    batch["texts"] = source.about(taken)["prompts"]
    # Which film is which, for the audit of each.
    if isinstance(source, phantom.PhantomSource) and len(source.views) > 1:
        batch["views"] = source.views
    # Phantoms have no ids of their own.
    if "ids" in parts[0]:
        batch["ids"] = [name for part in parts for name in part["ids"]]
    return batch
