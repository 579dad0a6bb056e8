"""The page of report.html: its sections in order, with its style and script inside."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from markupsafe import Markup

from cxr_jax.report import cases as report_cases
from cxr_jax.report import curves as report_curves
from cxr_jax.report import groups as report_groups
from cxr_jax.report import reliability, tables
from cxr_jax.report.group_records import Group
from cxr_jax.report.markup import render
from cxr_jax.report.records import Case
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.runtime.run_folder import history_of


class Section(NamedTuple):
    """One section of the page. anchor: its id, for the links at the top."""

    anchor: str
    title: str
    body: Markup


def _asset(file_name: str) -> Markup:
    """Our own file, which needs no escaping."""
    return Markup((resources.files("cxr_jax") / "assets" / file_name).read_text(encoding="utf-8"))


def _about(evaluation: Mapping) -> Markup:
    """What was done, how to read the numbers, and the run's own notes."""
    models = evaluation["models"]
    counts = {
        set_name: tables.first_summary(models, set_name)["n"]
        for set_name in tables.set_names(models)
    }
    # Notes are optional in the format.
    notes = list(evaluation.get("notes", ()))
    notes += [f"What is scored: {line}." for line in evaluation.get("protocol", ())]
    # The lines of protocol say it, too; evaluations of before have none.
    if not evaluation.get("protocol") and (label_policy := evaluation.get("label_policy")):
        notes.append(f"What blank and uncertain labels counted as in every number: {label_policy}.")
    return render("about.html", counts=counts, kind=evaluation["kind"], notes=notes)


def _config(evaluation: Mapping) -> Markup:
    # As text in full: it is there to be compared and copied.
    about = evaluation.get("config") or {}
    config = json.dumps(about, indent=2, ensure_ascii=False)
    return render("config.html", config=config, changes=history_of(about))


def page(
    evaluation: Mapping,
    curves: Sequence[Mapping],
    cases: Sequence[tuple[Case, str]],
    groups: Sequence[tuple[Group, str]] = (),
) -> str:
    """Draw the whole page.

    Args:
        evaluation: the object of evaluation.json (`report.records` has its format).
        curves: the lines of metrics.jsonl.
        cases: each with the data URI of its PNG.
        groups: each with the data URI of its PNG.
    """
    # What the page claims depends on whose images these are.
    models, kind = evaluation["models"], evaluation["kind"]
    # The usual orientation of the image is known of phantoms alone.
    shows_sides = kind == "phantom"
    # From the result down to what it was made from.
    sections = [
        Section("about", "What this is", _about(evaluation)),
        Section("result", "Result", tables.result(evaluation)),
        Section("image-use", "Does it look at the image?", tables.image_use(models)),
        Section("trace", "Does the reasoning say so?", tables.trace(models)),
        Section("labels", "Label by label", tables.labels(models)),
        Section(
            "probabilities",
            "What its probabilities are worth",
            reliability.probabilities(evaluation),
        ),
        Section("subgroups", "For whom it works", reliability.subgroups(models)),
        Section("curves", "Training", report_curves.section(curves, models, kind)),
        Section(
            "groups",
            "What RL preferred, and why",
            report_groups.section(groups, shows_sides=shows_sides),
        ),
        Section("cases", "Cases", report_cases.section(cases, shows_sides=shows_sides)),
        Section("config", "Configuration", _config(evaluation)),
    ]
    whole_page = render(
        "page.html",
        title=evaluation["title"],
        kind=kind,
        notice=NOT_FOR_DIAGNOSIS,
        # Over each section: a table is copied without the page around it.
        contaminated=evaluation.get("contaminated", ""),
        # A section without content would be a heading over nothing.
        sections=[section for section in sections if section.body],
        stylesheet=_asset("report.css"),
        script=_asset("report.js"),
    )
    return str(whole_page)
