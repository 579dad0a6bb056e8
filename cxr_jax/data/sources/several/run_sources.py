"""The sources of a run: that of `config.data.source`, or those that train together; and named sets beside its own.

No patient of a named set is split by what trains: a third of them choose the checkpoint and the others test. Who is who
is a hash of the patient, so more rows later change no side. Whether patients of a named set train is the guard's.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cxr_jax.config.sections import DataConfig
from cxr_jax.config.source_specs import WEIGHT
from cxr_jax.data.image_cache import ImageCache
from cxr_jax.data.sources import splits
from cxr_jax.data.sources.base import Source
from cxr_jax.data.sources.films.rows import FilmRows
from cxr_jax.data.sources.manifest import FilesSource
from cxr_jax.data.sources.patients import NOT_DRAWN, PatientOfRow, Sides, place_of
from cxr_jax.data.sources.phantom import open_phantoms
from cxr_jax.data.sources.rows import Row
from cxr_jax.data.sources.several.mixture import Mixture
from cxr_jax.data.sources.splits import Splits
from cxr_jax.data.sources.unreadable import UnreadableFiles
from cxr_jax.errors import UserError
from cxr_jax.models.image_processor import ImageProcessor

CHOOSE = 3  # one in so many patients of a named set chooses the checkpoint
# What a named source says of its own; all else is as the run has it.
_OWN = {
    **{"manifest": "", "image_root": "", "root": "", "labels": "", "split": ""},
    **{"views": ("frontal",), "train": {}, "eval": {}, "select_split": ""},
}


def open_sources(
    data: DataConfig,
    sides: Sides = NOT_DRAWN,
    processor: ImageProcessor | None = None,
    *,
    only_scores: bool = False,
) -> Splits:
    """Open the sources of a run; arguments and errors are those of `splits.open_splits`."""
    if data.train and not only_scores:
        opened = _open_together(data, processor)
    else:
        opened = splits.open_splits(data, sides, processor, only_scores=only_scores)
    for source_name, source_spec in data.eval.items():
        if source_name in opened.test:
            raise UserError(
                f"config.data.eval.{source_name}: the run has a set of that name already"
            )
        opened = _with_named(
            opened, source_name, config_of(data, source_spec), processor, only_scores
        )
    _check_images(opened)
    if not only_scores and data.eval:
        # A set of another kind is further off than held-out patients of what trains. By name: a config has no order.
        opened = replace(opened, out_of_distribution=min(data.eval))
    if data.ood and not only_scores:
        if data.ood not in opened.select:
            raise UserError(
                f"config.data.ood={data.ood!r} is none of the sets that are looked at: {', '.join(opened.select)}"
            )
        opened = replace(opened, out_of_distribution=data.ood)
    return opened


def config_of(data: DataConfig, source_spec: Mapping[str, Any]) -> DataConfig:
    """Give the `config.data` of one named source."""
    # The weight is the mixture's, not the source's.
    said_keys = {key: value for key, value in source_spec.items() if key != WEIGHT}
    return replace(data, **{**_OWN, **said_keys})


def configs_of(data: DataConfig) -> list[DataConfig]:
    """Give the `config.data` of every source that trains, where there are several, and of every named set."""
    return [
        config_of(data, source_spec) for source_spec in (*data.train.values(), *data.eval.values())
    ]


# ---- What trains together --------------------------------------------------------------------------


def _open_together(data: DataConfig, processor: ImageProcessor | None) -> Splits:
    if not data.eval:
        raise UserError(
            "config.data.train needs config.data.eval: sets of other patients to look at (docs/inputs.md)"
        )
    # Opened whole: nobody of them is held out.
    sources: dict[str, tuple[Source, float]] = {}
    about: list[str] = []
    warnings: list[str] = []
    for source_name, source_spec in data.train.items():
        own_data = config_of(data, source_spec)
        if own_data.source == "phantom":
            source: Source = open_phantoms(own_data, own_data.hospital, "train")
        else:
            films, _ = _open_films(own_data, source_name, processor)
            warnings += splits.warn_of_rows(source_name, films.rows, False)
            source = films
        sources[source_name] = source, source_spec[WEIGHT]
    total = sum(weight for _, weight in sources.values())
    for source_name, (source, weight) in sources.items():
        rows_there = f"{len(source):,} rows" if isinstance(source, FilesSource) else "phantoms"
        about.append(f"trains: {source_name}, {rows_there}, {weight / total:.1%} of the examples")
    # One alone keeps its end, and with it its epochs.
    only = next(iter(sources.values()))[0]
    return Splits(
        train=only if len(sources) == 1 else Mixture(sources, data.seed),
        select={},
        test={},
        out_of_distribution="",
        about=tuple(about),
        warnings=tuple(warnings),
    )


def _open_films(
    own_data: DataConfig, source_name: str, processor: ImageProcessor | None
) -> tuple[FilesSource, FilmRows | None]:
    """All films of a named source, and what there is to say of a data set. Raises UserError that names the source."""
    try:
        rows, films = splits.open_rows(own_data)
    except UserError as error:
        raise UserError(f"source {source_name}: {error}") from None
    source = FilesSource(
        rows,
        own_data.size,
        name=source_name,
        cache=ImageCache(own_data.cache_mib),
        threads=own_data.threads,
        unreadable=UnreadableFiles(own_data.max_bad),
    )
    source.opened_from = own_data
    splits.set_reading([source], own_data, processor)
    return source, films


# ---- Named sets ------------------------------------------------------------------------------------


def _with_named(
    opened: Splits,
    source_name: str,
    own_data: DataConfig,
    processor: ImageProcessor | None,
    only_scores: bool,
) -> Splits:
    """The sources with one named set more."""
    if own_data.source == "phantom":
        return replace(
            opened,
            select={
                **opened.select,
                source_name: open_phantoms(own_data, own_data.hospital, "select"),
            },
            test={**opened.test, source_name: open_phantoms(own_data, own_data.hospital, "test")},
            about=(
                *opened.about,
                f"looked at: {source_name}, phantoms of hospital {own_data.hospital}",
            ),
        )
    whole, films = _open_films(own_data, source_name, processor)
    # Where nothing trains, nobody has to choose: all are scored.
    parts = {"test": whole}
    if not only_scores:
        choosers = _choosers(whole.rows, source_name)
        for part, chooses in (("selection", True), ("test", False)):
            rows = [row for row in whole.rows if (row.group in choosers) == chooses]
            parts[part] = splits.beside(whole, rows, f"{source_name} ({part})")
    label_policy = splits.describe_labels(whole.rows, films)
    counts = ", ".join(
        f"{part} {len(source)} rows of {len({row.group for row in source.rows})} patients"
        for part, source in parts.items()
    )
    # Its line stands beside those of the other sets: policies may differ.
    select = {source_name: parts["selection"]} if "selection" in parts else {}
    return replace(
        opened,
        select={**opened.select, **select},
        test={**opened.test, source_name: parts["test"]},
        label_policy="; ".join(
            filter(None, (opened.label_policy, f"{source_name}: {label_policy}"))
        ),
        about=(
            *opened.about,
            f"looked at: {source_name}, {counts}",
            f"labels of {source_name}: {label_policy}",
        ),
        warnings=(*opened.warnings, *splits.warn_of_rows(source_name, whole.rows, False)),
    )


def _choosers(rows: list[Row], source_name: str) -> set[str]:
    """The patients of a set who choose the checkpoint. Raises UserError for a set of one patient."""
    groups = {row.group for row in rows}
    # By no seed of a run: runs of several seeds are tested on the same patients.
    choosers = {
        group for group in groups if int(place_of(f"{source_name} {group}", 0), 16) % CHOOSE == 0
    }
    # By chance a small set may have all of them on one side.
    if not choosers or choosers == groups:
        order = sorted(groups, key=lambda group: place_of(group, 0))
        choosers = set(order[: max(1, len(order) // CHOOSE)])
    if choosers == groups:
        raise UserError(
            f"config.data.eval.{source_name}: is of one patient: one has to choose the checkpoint and another to test"
        )
    return choosers


def _check_images(opened: Splits) -> None:
    """Refuse sets whose images are not of the kind that trains: one program reads all."""
    kinds = {
        source_name: (source.size, getattr(source, "native", None) is not None)
        for source_name, source in {
            "what trains": opened.train,
            **opened.select,
            **opened.test,
        }.items()
    }
    if len(set(kinds.values())) > 1:
        said = ", ".join(
            f"{source_name} {'its own sizes' if native else f'{size} pixels'}"
            for source_name, (size, native) in kinds.items()
        )
        raise UserError(
            f"config.data: the sources of one run must have images of one size, or all their own aspect ratio: {said} "
            "(phantoms have 224: --config.data.size=224)"
        )


# ---- What a run keeps of them ----------------------------------------------------------------------


def digest(data: DataConfig) -> str:
    """Hash what a run on films reads its rows from: SHA-256; "" of phantoms."""
    if not data.train and not data.eval:
        return splits.digest(data) if data.kind == "files" else ""
    parts = [] if data.train or data.source == "phantom" else [splits.digest(data)]
    parts += [
        splits.digest(own_data) if own_data.source != "phantom" else own_data.hospital
        for own_data in configs_of(data)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def trained_patients(data: DataConfig) -> list[PatientOfRow]:
    """Read whose films of several sources a run has trained on. Raises UserError for what cannot be read."""
    return [
        patient
        for source_spec in data.train.values()
        if source_spec["source"] != "phantom"
        for patient in splits.read_patients(config_of(data, source_spec))
    ]
