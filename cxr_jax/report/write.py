"""Draws report.html from the records of a run's folder."""

import json
from pathlib import Path

from cxr_jax.errors import UserError
from cxr_jax.metrics import run_log
from cxr_jax.report import page as report_page
from cxr_jax.report.records import (
    FORMAT,
    KINDS,
    _finite,
    _json,
    data_uri,
    load_cases,
    load_groups,
    save_cases,
    save_evaluation,
)
from cxr_jax.runtime import whole_files


def render(workdir) -> Path:
    """Draw WORKDIR/report.html from the files of the folder. Returns its path."""
    workdir = Path(workdir)
    evaluation = _json(workdir / "evaluation.json")
    keys = {"title", "kind", "models"}
    if (
        not isinstance(evaluation, dict)
        or evaluation.get("format") != FORMAT
        or not keys <= evaluation.keys()
    ):
        raise UserError(f"{workdir / 'evaluation.json'}: not an evaluation of format {FORMAT}")
    if evaluation["kind"] not in KINDS:
        raise UserError(f"{workdir / 'evaluation.json'}: kind is not one of {', '.join(KINDS)}")
    if evaluation.get("config") is None and (workdir / "config.json").exists():
        evaluation["config"] = _json(workdir / "config.json")
    cases = [(case, data_uri(case.png)) for case in load_cases(workdir)]
    groups = [(group, data_uri(group.png)) for group in load_groups(workdir)]
    page = report_page.page(evaluation, run_log.read(workdir), cases, groups)
    path = workdir / "report.html"
    whole_files.write_bytes(path, page.encode("utf-8", errors="replace"))
    return path


def write_report(
    workdir,
    *,
    title,
    config=None,
    curves=None,
    tables,
    cases=(),
    notes=(),
    kind="phantom",
    comparisons=(),
) -> Path:
    """Save the evaluation and the cases in `workdir` and draw report.html from the folder. Returns its path.

    `tables`: {model: {set: scoring.summary(...)}}, models in the order base, SFT, RL (the last one is the
    result); sets are usually "A" and "B". `config`: None shows config.json. `curves`: lines as `metrics.read`
    gives them; None, or a folder that has its own metrics.jsonl: that file is the truth. `comparisons`: see
    the module's docstring. `kind`: "phantom", or "files" for real radiographs (the page then says what the
    embedded model has seen).
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if curves and not (workdir / run_log.FILE).exists():
        lines = "".join(json.dumps(_finite(row)) + "\n" for row in curves)
        whole_files.write_text(workdir / run_log.FILE, lines)
    save_evaluation(
        workdir,
        title=title,
        tables=tables,
        kind=kind,
        config=config,
        comparisons=comparisons,
        notes=notes,
    )
    save_cases(workdir, cases)
    return render(workdir)
