"""What trained a model, in a run and in those before it: it may not choose or test what comes of it now."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cxr_jax.config.sections import DataConfig, RunConfig
from cxr_jax.data.sources import patients, splits
from cxr_jax.data.sources.base import Source
from cxr_jax.data.sources.guard import Finding
from cxr_jax.data.sources.guard.of_run import find_in_run
from cxr_jax.data.sources.patients import FORMER, Sides
from cxr_jax.data.sources.rows import Row
from cxr_jax.data.sources.several import run_sources
from cxr_jax.data.sources.several.mixture import films_of
from cxr_jax.data.sources.splits import Splits
from cxr_jax.errors import UserError
from cxr_jax.runtime import processes
from cxr_jax.weights import pretrained

CONTAMINATED = "CONTAMINATED"


class EarlierRun(NamedTuple):
    """A run that trained on films.

    Attributes:
        folder: of the run.
        manifest: as its config names it; of a data set its root.
        seed: of its split.
        facts: of its data, from its config.json.
        data: `config.data` of it.
    """

    folder: Path
    manifest: str
    seed: int
    facts: dict[str, Any]
    data: dict[str, Any] = {}  # noqa: RUF012 - never written to


def trained_on_films(model: str) -> Iterator[EarlierRun]:
    """Yield the runs that made a model, the newest first: those whose folders tell and that trained on films."""
    visited: set[Path] = set()
    # Names that stand for a model wherever one stands are no folders, even where there is one of that name.
    while model and not pretrained.is_built_in(model):
        # A run's folder, or what it exports in it.
        folders = [Path(model)]
        if folders[0].name in ("hf", "adapter"):
            folders.append(folders[0].parent)
        abouts = ((folder, _read_about(folder)) for folder in folders)
        folder, about = next(((folder, about) for folder, about in abouts if about), (None, {}))
        # A run whose folder was moved over that of the one before begins, by its config, with itself.
        if folder is None or folder.resolve() in visited:
            return
        visited.add(folder.resolve())
        config = about["config"]
        data = config.get("data") or {}
        if config.get("task") in ("sft", "rl") and _reads_films(data):
            facts = about.get("data") or {}
            place = str(
                data.get("manifest") or data.get("root") or ", ".join(data.get("train", ()))
            )
            yield EarlierRun(folder, place, int(data.get("seed", 0)), facts, dict(data))
        model = str(config.get("model", ""))


def _reads_films(data: dict[str, Any]) -> bool:
    together = data.get("train") or {}
    sources = [spec.get("source") for spec in together.values()] or [data.get("source")]
    return set(sources) != {"phantom"}


def _read_about(folder: Path) -> dict[str, Any]:
    """config.json of a run; {} where there is none, or only that of a model."""
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_run = isinstance(about, dict) and isinstance(about.get("config"), dict)
    return about if is_run and "task" in about["config"] else {}


def check_held_out(model: str, data: DataConfig, opened: Splits, *, only_scores: bool) -> list[str]:
    """Look for held-out patients of a run in what trained its model.

    Args:
        model: `config.model`.
        data: of the run.
        opened: its sources, of films.
        only_scores: the run is an evaluation, which can as well be made with another seed.

    Returns:
        Warnings, a line each: of held-out patients that trained the model.

    Raises:
        UserError: for an evaluation, if one seed holds out the patients of all runs on the same manifest, and another
            was given.
    """
    runs = list(trained_on_films(model))
    digest = run_sources.digest(data) if runs else ""
    seeds = {run.seed for run in runs if run.facts.get("manifest_sha256") == digest}
    held_rows = _rows([*opened.select.values(), *opened.test.values()])
    everyone = [
        _Person(row.group, row.group, row.former_group)
        for row in [*_rows([opened.train]), *held_rows]
    ]
    held = {row.group for row in held_rows}
    warnings = []
    for run in runs:
        # Where several sources have trained, all of their patients have.
        if run.facts.get("manifest_sha256") == digest and not run.data.get("train"):
            trained = _trained(everyone, run) & held
            # Runs of several seeds have together trained on whoever is held out now: that can only be said.
            if trained and only_scores and seeds == {run.seed} != {data.seed}:
                raise UserError(
                    f"config.data.seed={data.seed}: {len(trained)} of {len(held)} held-out patients trained "
                    f"config.model={model!r}, whose run held out others of the same rows: give "
                    f"--config.data.seed={run.seed}"
                )
        else:
            try:
                trained = _trained_elsewhere(run, [*held_rows, *_named_rows(run, opened)])
            except UserError:
                warnings.append(
                    f"warning: config.model={model!r}: the rows that trained it are not at {run.manifest!r}: whether "
                    "they share patients with the held-out ones is not known"
                )
                continue
        if trained:
            warnings.append(
                f"warning: config.model={model!r}: {len(trained)} of {len(held)} held-out patients trained it, in the "
                f"run {str(run.folder)!r}, with config.data.seed={run.seed}: scores on them are not those of new "
                "patients"
            )
    return warnings


def _named_rows(run: EarlierRun, opened: Splits) -> list[Row]:
    """The rows of named sets of the data sets that a run trained on: elsewhere an id is somebody else's."""
    together = run.data.get("train") or {}
    trained = {spec["source"] for spec in together.values()} or {run.data.get("source")}
    return [
        row
        for source in (*opened.select.values(), *opened.test.values())
        for part in films_of(source)
        if part.opened_from is not None and part.opened_from.source in trained
        for row in part.rows
    ]


def _rows(sources: Sequence[Source]) -> list[Row]:
    """The rows of sources of films that the run splits: named sets are of other people (but see the guard)."""
    films = [part for source in sources for part in films_of(source)]
    return [row for source in films if source.opened_from is None for row in source.rows]


class _Person(NamedTuple):
    """Whose a row is: a name, and what a split of today and one of before draw."""

    name: str
    group: str
    former_group: str


def _trained(people: Iterable[_Person], run: EarlierRun) -> set[str]:
    """The names of those that a run trained on. Runs that do not keep who was held out split by the rules of before."""
    sides = Sides.of_run(run.facts)
    if not sides.held_out_up_to:
        sides = Sides(patients_by=FORMER)
    is_former = sides.patients_by == FORMER
    names_of_groups: dict[str, set[str]] = {}
    for person in people:
        group = person.former_group if is_former else person.group
        names_of_groups.setdefault(group, set()).add(person.name)
    if not names_of_groups:
        return set()
    last = sides.last_of(names_of_groups, run.seed)
    return {
        name
        for group, names in names_of_groups.items()
        if patients.place_of(group, run.seed) > last
        for name in names
    }


def _trained_elsewhere(run: EarlierRun, held_rows: Sequence[Row]) -> set[str]:
    """The groups of rows whose patient is in another manifest, among those that trained. Raises UserError."""
    data = DataConfig.with_defaults(**run.data)
    if data.train:
        keys = {
            patients.same_patient_key(found.patient)
            for found in run_sources.trained_patients(data)
            if found.patient
        }
        return {
            row.group
            for row in held_rows
            if row.patient and patients.same_patient_key(row.patient) in keys
        }
    rows = splits.read_patients(data)
    # A patient's group has the least of its spellings.
    groups: dict[str, str] = {}
    for patient, _ in rows:
        if patient:
            key = patients.same_patient_key(patient)
            groups[key] = min(patient, groups.get(key, patient))
    people = []
    for patient, former_group in rows:
        # Of an unknown patient only the former group counts, among those that were drawn from.
        key = patients.same_patient_key(patient) if patient else ""
        people.append(_Person(key, groups.get(key, ""), former_group))
    trained = _trained(people, run)
    return {
        row.group
        for row in held_rows
        if row.patient and patients.same_patient_key(row.patient) in trained
    }


# ---- Films of evaluation sets ------------------------------------------------------------------------


def check_contamination(settings: RunConfig, opened: Splits) -> list[str]:
    """Refuse training films that an evaluation set has; an evaluation may read any.

    Returns:
        A warning, if there is something to say: of this run, or of those that made its model.

    Raises:
        UserError: with how many they are and the first of them.
    """
    data, findings = settings.data, _findings(settings, opened)
    if findings and not data.allow_contaminated:
        said = "; ".join(f"{finding.text}: {finding.named}" for finding in findings)
        raise UserError(
            f"{_place_of(data)}: {said}. Leave them out: a model that has trained on a film says "
            f"nothing about it (--config.data.allow_contaminated=True trains, and writes {CONTAMINATED} beside every "
            "number)"
        )
    line = _contamination(settings, findings)
    return [f"warning: {line}"] if line else []


def _place_of(data: DataConfig) -> str:
    # The key that the user has given.
    name = "root" if data.is_data_set else "manifest"
    return f"config.data.{name}={getattr(data, name)!r}"


def contamination(settings: RunConfig, opened: Splits) -> str:
    """Say what stands beside every number of a run: "CONTAMINATED: .." with counts alone, or "" for nothing."""
    # Only the first process writes numbers.
    if not processes.is_main():
        return ""
    return _contamination(settings, _findings(settings, opened))


def _findings(settings: RunConfig, opened: Splits) -> list[Finding]:
    # Who only reads may read any film.
    if settings.task == "evaluate":
        return []
    return find_in_run(settings.data, opened)


def _contamination(settings: RunConfig, findings: Sequence[Finding]) -> str:
    said = [finding.text for finding in findings]
    # Not by its name: this goes into a card, where paths of this machine tell nothing, and should not.
    said += [
        f"the model that it started from: {before.removeprefix(f'{CONTAMINATED}: ')}"
        for run in trained_on_films(settings.model)
        if (before := str(run.facts.get("contaminated", "")))
    ]
    return f"{CONTAMINATED}: {'; '.join(said)}" if said else ""
