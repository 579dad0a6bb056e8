"""Draws report.html from the records of a run's folder."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_jax.errors import UserError
from cxr_jax.metrics import run_log
from cxr_jax.report import page as report_page
from cxr_jax.report.records import (
    FORMAT,
    KINDS,
    NO_REMARKS,
    Case,
    Remarks,
    data_uri,
    load_cases,
    load_groups,
    read_json,
    save_cases,
    save_evaluation,
)
from cxr_jax.runtime import whole_files


def render(workdir: str | os.PathLike) -> Path:
    """Draw WORKDIR/report.html from the files of the folder.

    Returns:
        The path of the page.

    Raises:
        UserError: if the run has not been evaluated, or a file of the folder is not of its format.
    """
    workdir = Path(workdir)
    evaluation_path = workdir / "evaluation.json"
    # The page is made from files alone, so that it can be drawn again at any time.
    evaluation = read_json(evaluation_path)
    required_keys = {"title", "kind", "models"}
    is_evaluation = isinstance(evaluation, dict) and evaluation.get("format") == FORMAT
    if not is_evaluation or not required_keys <= evaluation.keys():
        raise UserError(f"{evaluation_path}: not an evaluation of format {FORMAT}")
    # The kind decides what the page says of the images.
    if evaluation["kind"] not in KINDS:
        raise UserError(f"{evaluation_path}: kind is not one of {', '.join(KINDS)}")
    # A run keeps its config in a file of its own; an evaluation may bring another.
    if evaluation.get("config") is None and (workdir / "config.json").exists():
        evaluation["config"] = read_json(workdir / "config.json")
    # Images go inside the page: it stays whole when it is copied.
    cases = [(case, data_uri(case.png or b"")) for case in load_cases(workdir)]
    groups = [(group, data_uri(group.png or b"")) for group in load_groups(workdir)]
    page_html = report_page.page(evaluation, run_log.read(workdir), cases, groups)
    report_path = workdir / "report.html"
    # Half a character of another alphabet in a model's text must not stop the page.
    whole_files.write_bytes(report_path, page_html.encode("utf-8", errors="replace"))
    return report_path


def write_report(
    workdir: str | os.PathLike,
    *,
    title: str,
    run_config: Mapping[str, Any] | None = None,
    curves: Sequence[Mapping[str, Any]] | None = None,
    tables: Mapping[str, Mapping[str, Mapping]],
    cases: Iterable[Case] = (),
    notes: Sequence[str] = (),
    kind: str = "phantom",
    comparisons: Sequence[Mapping[str, Any]] = (),
    remarks: Remarks = NO_REMARKS,
) -> Path:
    """Save the evaluation and the cases in `workdir` and draw report.html from the folder.

    Args:
        workdir: the run's folder; made if it is not there.
        title: of the page.
        run_config: None shows config.json.
        curves: lines as `run_log.read` gives them; None, or a folder that has its own metrics.jsonl: that file is
            the truth.
        tables: {model: {set: metrics.scores.summary}}, models in the order base, SFT, RL (the last one is the
            result); sets are usually "A" and "B".
        cases: what the page shows of single images.
        notes: of this run, a sentence each.
        kind: "phantom", or "files" for real radiographs (the page then says what the embedded model has seen).
        comparisons: paired differences; `report.records` has their format.
        remarks: what stands beside every number.

    Returns:
        The path of the page.

    Raises:
        ValueError: if `kind` is none of these.
    """
    workdir = Path(workdir)
    # A report of results that no run has made needs a folder, too.
    workdir.mkdir(parents=True, exist_ok=True)
    # The run's own file is the truth: it is never overwritten.
    if curves and not (workdir / run_log.FILE).exists():
        log_lines = "".join(
            json.dumps(run_log.json_value(log_row, str)) + "\n" for log_row in curves
        )
        whole_files.write_text(workdir / run_log.FILE, log_lines)
    save_evaluation(
        workdir,
        title=title,
        tables=tables,
        kind=kind,
        run_config=run_config,
        comparisons=comparisons,
        notes=notes,
        remarks=remarks,
    )
    # All that is drawn is first written, then read back.
    save_cases(workdir, cases)
    return render(workdir)
