"""The readings in other programs' forms: iMRMC's text, MRMCaov's table, and an R script that redoes every number."""

from collections.abc import Sequence
from pathlib import Path

from cxr_jax.study.analysis.rows import Row, any_truth
from cxr_jax.study.protocol import Protocol

_SCRIPT = Path(__file__).parents[1] / "templates" / "analysis.R"


def _any_score(reading: Row, labels: Sequence[str]) -> tuple[float, int] | None:
    """Largest suspicion and whether any label is so; None where something is not known."""
    # Any missing one would make the largest of the others look like an answer.
    ratings = [reading[f"rating_{label_name}"] for label_name in labels]
    truth = any_truth([reading[f"truth_{label_name}"] for label_name in labels])
    if None in ratings or truth is None:
        return None
    return max(ratings), truth


def imrmc(protocol: Protocol, rows: Sequence[Row]) -> str:
    """Write iMRMC's text: truth rows, then a score for each reader, case and arm (largest of the suspicions)."""
    # Truth stands once a case, whatever number of readings it has.
    truth: dict[int, int] = {}
    scores = []
    for reading in rows:
        any_score = _any_score(reading, protocol.suspicion_labels)
        if reading["state"] != "signed" or any_score is None:
            continue
        truth[reading["case"]] = any_score[1]
        scores.append(
            f"reader{reading['reader']},case{reading['case']},{reading['arm']},{any_score[0]}"
        )
    if not scores:
        return ""
    # Free lines stand before the data; the program wants these four counts.
    head = [
        f"{protocol.name}: largest suspicion of {', '.join(protocol.suspicion_labels)}",
        "SIMULATED readers" if protocol.simulated else "readers are people",
        f"N0: {sum(not kind for kind in truth.values())}",
        f"N1: {sum(truth.values())}",
        f"NR: {len({reading['reader'] for reading in rows})}",
        f"NM: {len(protocol.arms)}",
        "BEGIN DATA:",
    ]
    truth_lines = [f"truth,case{case},0,{kind}" for case, kind in sorted(truth.items())]
    return "\n".join([*head, *truth_lines, *scores]) + "\n"


def mrmcaov(protocol: Protocol, rows: Sequence[Row]) -> str:
    """Write MRMCaov's columns, one block of rows a label and one for the largest suspicion."""
    # A block of rows a label: its column tells which.
    csv_lines = ["label,reader,treatment,case,truth,rating"]
    for reading in rows:
        if reading["state"] != "signed":
            continue
        for label_name in protocol.suspicion_labels:
            rating, truth = reading[f"rating_{label_name}"], reading[f"truth_{label_name}"]
            if rating is not None and truth is not None:
                csv_lines.append(
                    f"{label_name},{reading['reader']},{reading['arm']},{reading['case']},{truth},{rating}"
                )
        any_score = _any_score(reading, protocol.suspicion_labels)
        if any_score is not None:
            csv_lines.append(
                f"any,{reading['reader']},{reading['arm']},{reading['case']},{any_score[1]},{any_score[0]}"
            )
    return "\n".join(csv_lines) + "\n" if len(csv_lines) > 1 else ""


def r_script(protocol: Protocol) -> str:
    """Write the R script of this study; it reads rows.csv beside it and prints name and value, a line each."""
    # Names and what the protocol fixes go into the script; all results come from rows.csv.
    values = {
        "@ARMS@": ", ".join(f'"{arm_name}"' for arm_name in protocol.arms),
        "@SPLIT@": "TRUE" if protocol.design == "split" else "FALSE",
        "@MARGIN@": repr(protocol.over_reliance_margin),
        "@LABELS@": ", ".join(f'"{label_name}"' for label_name in protocol.suspicion_labels),
    }
    script_text = _SCRIPT.read_text(encoding="utf-8")
    for mark, value in values.items():
        script_text = script_text.replace(mark, value)
    return script_text
