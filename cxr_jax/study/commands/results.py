"""The end of a study: analyse and export, once it is unblinded."""

import hashlib
import json
from pathlib import Path

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.runtime.whole_files import write_text
from cxr_jax.store.records.actors import OPERATOR
from cxr_jax.study.analysis import forms
from cxr_jax.study.analysis.rows import make_rows, to_csv
from cxr_jax.study.analysis.study import analyse as analyse_study
from cxr_jax.study.commands.manage import open_study
from cxr_jax.study.page.report import make_page

ANALYSIS, REPORT, ROWS, SCRIPT = "analysis.json", "report.html", "rows.csv", "analysis.R"


def analyse(place: str | Path) -> list[str]:
    """Write analysis.json, report.html, rows.csv and analysis.R into the study's folder.

    Raises:
        UserError: for a study that is not unblinded.
        RunFailedError: if a reading was never signed, so there is nothing to analyse.
    """
    with open_study(place) as study:
        study.need_state("unblinded")
        if not any(record.state == "signed" for record in study.ledger.tasks.values()):
            raise RunFailedError(f"{study.folder.path}: no reading was signed")
        # Everything is computed before anything is written.
        analysis = analyse_study(study.folder, study.store, study.ledger)
        document = analysis.document
        # All four from one table, so that they agree.
        files = {
            ROWS: to_csv(analysis.rows),
            SCRIPT: forms.r_script(study.protocol),
            REPORT: make_page(study.protocol, document),
            ANALYSIS: json.dumps(document, indent=2, allow_nan=False) + "\n",
        }
        for file_name, text in files.items():
            write_text(study.folder.path / file_name, text)
        study.append(
            "study.analysed",
            {
                file_name: hashlib.sha256(text.encode()).hexdigest()
                for file_name, text in files.items()
            },
        )
    lines = ["SIMULATED readers: these numbers are about a program, not about people"]
    lines = lines if document["simulated"] else []
    lines.append(document["first_line"])
    if document["shortest_washout_days"] is not None:
        lines.append(
            f"shortest washout that was kept: {document['shortest_washout_days']:.2f} days"
        )
    for hypothesis in document["hypotheses"]:
        # In one line each, for a terminal.
        verdict = "supported" if hypothesis["supported"] else "not supported"
        lines.append(
            f"{hypothesis['name']} {verdict}: {hypothesis['measure']} {hypothesis['estimate']:.3f} "
            f"[{hypothesis['low']:.3f}, {hypothesis['high']:.3f}], p {hypothesis['p_value']:.2g}, "
            f"Holm {hypothesis['p_holm']:.2g}"
        )
        # Its p value is the larger of two, which the interval before it does not show.
        if gap := hypothesis.get("over_reliance_gap"):
            lines.append(
                f"   of two parts: detection, p {hypothesis['p_detection']:.2g}; planted errors in signed reports, "
                f"full - manual {gap['estimate']:.3f} [{gap['low']:.3f}, {gap['high']:.3f}], "
                f"p {hypothesis['p_over_reliance']:.2g}"
            )
    # Asked by the protocol's arms, and not answered by what was read.
    lines += [
        f"{entry['name']} no answer: {entry['refused']}" for entry in document["hypotheses_refused"]
    ]
    return [*lines, f"{study.folder.path / ANALYSIS}", f"{study.folder.path / REPORT}"]


def export(place: str | Path, form: str, out: Path | None) -> list[str]:
    """Write the readings in a form that other programs read.

    Raises:
        UserError: for a study that is not unblinded, or a form that has no rows.
    """
    with open_study(place) as study:
        study.need_state("unblinded")
        # From the chain again, not from an earlier file.
        rows = make_rows(study.folder, study.store, study.ledger, study.folder.read_sealed())
        counted = [reading for reading in rows if not reading["practice"]]
        # Each form is a function of the same rows.
        makers = {
            "csv": lambda: to_csv(rows),
            "imrmc": lambda: forms.imrmc(study.protocol, counted),
            "mrmcaov": lambda: forms.mrmcaov(study.protocol, counted),
            "r": lambda: forms.r_script(study.protocol),
        }
        text = makers[form]()
        if not text:
            raise UserError(f"{study.folder.path}: no reading was signed")
        suffixes = {"csv": "csv", "imrmc": "imrmc", "mrmcaov": "mrmcaov.csv", "r": "R"}
        target = out or study.folder.path / f"{study.protocol.name}.{suffixes[form]}"
        write_text(target, text)
        head = study.store.head()
        # What left the house, with the head that the chain had: a later chain without it has lost its tail.
        study.store.exports.add(
            f"study.{form}",
            hashlib.sha256(text.encode()).hexdigest(),
            head=head,
            actor=OPERATOR,
            params={"study": study.protocol.name},
        )
    return [f"{target}"]
