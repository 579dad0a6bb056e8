"""Reports of the kinds that were once read wrongly: fields, contractions, abbreviations, lines, languages, ..

report_siblings.tsv was written from docs/report_parser.md and radiology's ways to say things, not from the parser. A
row gives the state of every label that its text mentions (`a|b` where either reading is right); others are not
mentioned, but `*` stands for all that are not named. No Finding counts only where it is named. The files of
../shared/data/cases are of the same kinds.
"""

import pathlib

import numpy as np
import pytest
from places import SHARED

from cxr_jax.data import report_labels
from cxr_jax.labels import read_reports

# The short names of the 14, in their order.
SHORT = ("NF", "EC", "CM", "LO", "LL", "ED", "CO", "PN", "AT", "PX", "PE", "PO", "FX", "SD")
COLUMN = {short: column for column, short in enumerate(SHORT)}
NOT_MENTIONED = -2
CASES = SHARED / "cases"
# What the rules cannot read; the day that they pass is noticed.
LIMITS = "limits"


def rows_of(path: pathlib.Path, text_column: int) -> list[tuple[str, str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines if line]
    return [(row[text_column - 1], row[text_column], row[text_column + 1]) for row in rows]


def allowed_states(expected: str) -> dict[str, set[int]]:
    """Label -> the states that are right, for the labels that a row is about."""
    parts = [] if expected in ("", "blank") else [part.split("=") for part in expected.split()]
    named = {
        short: {NOT_MENTIONED if state == "blank" else int(state) for state in states.split("|")}
        for short, states in parts
    }
    rest = named.pop("*", {NOT_MENTIONED})
    return {short: rest for short in SHORT if short != "NF"} | named


def wrong_rows(rows: list[tuple[str, str, str]], texts: list[str]) -> list[str]:
    wrong = []
    for (kind, _, expected), text, states in zip(
        rows, texts, read_reports(texts)["state"], strict=True
    ):
        allowed = allowed_states(expected)
        if any(int(states[COLUMN[short]]) not in right for short, right in allowed.items()):
            said = {s: int(states[c]) for s, c in COLUMN.items() if states[c] != NOT_MENTIONED}
            wrong.append(f"{kind}: {text!r} is {expected}, read as {said}")
    return wrong


def siblings() -> tuple[list[tuple[str, str, str]], list[str]]:
    rows = rows_of(pathlib.Path(__file__).with_name("report_siblings.tsv"), 1)
    return rows, [row[1].encode("ascii").decode("unicode_escape") for row in rows]


def test_siblings_read_as_a_radiologist_reads_them():
    rows, texts = siblings()
    assert len(rows) > 2500
    wrong = wrong_rows(rows, texts)
    limits = [line for line in wrong if line.startswith(LIMITS)]
    assert wrong == limits, "\n".join(line for line in wrong if line not in limits)
    assert len(limits) == sum(row[0].startswith(LIMITS) for row in rows), "a limit is none any more"


@pytest.mark.skipif(not CASES.exists(), reason="no ../shared/data/cases")
@pytest.mark.parametrize("name", ["reports_wrong.tsv", "reports_right.tsv"])
def test_cases_of_outsiders(name):
    rows, texts = [], []
    for kind, text, expected in rows_of(CASES / name, 2):
        # "blank, or CM=0; never 1": words for a reader.
        words = {"never 1": "*=0|blank", "blank, or": "*=0|blank", "(or blank)": "PX=0|blank"}
        found = [pattern for word, pattern in words.items() if word in expected]
        rows.append((kind, text, found[0] if found else expected))
        texts.append(text.replace("\\n", "\n"))
    assert not wrong_rows(rows, texts)


def test_misspellings_within_one_slip_are_read():
    slips = ["pneumothroax", "pneumothrax", "pneumothorrax", "pneumothorux"]
    got = read_reports([f"No {word}." for word in slips])["state"]
    assert got[:, COLUMN["PX"]].tolist() == [0] * len(slips)


def test_what_was_not_read_leaves_no_finding_blank():
    got = read_reports(
        ["No effusion.", "No effusion. Known XQZ in the left apex.", "No effusion. Sin cambios."]
    )
    assert got["state"][:, COLUMN["NF"]].tolist() == [1, NOT_MENTIONED, NOT_MENTIONED]
    assert got["unread"].tolist()[0] == 0 and (got["unread"][1:] > 0).all()


def test_another_language_is_told_and_never_affirms():
    texts = ["Kein Pneumothorax. Keine Kardiomegalie.", "Sin edema ni cardiomegalia.", "No edema."]
    got = read_reports(texts)
    assert got["foreign"].tolist() == [True, True, False]
    assert (got["state"][:2] <= 0).all() and not np.isin(got["state"][:2], [-1]).any()


def test_label_says_which_reports_are_in_another_language(tmp_path, capsys):
    from cxr_jax import label

    table, out = tmp_path / "in.csv", tmp_path / "out.csv"
    table.write_text("report\nSin derrame pleural. Cardiomegalia.\nThe heart is enlarged.\n")
    assert label.main([str(table), "-o", str(out)]) == 0
    assert "1 of 2 reports are in another language" in capsys.readouterr().err
    lines = out.read_text().splitlines()
    assert lines[0].endswith(f",{report_labels.UNREAD}")
    assert lines[1].endswith(",another language") and lines[2].endswith(",")
    assert label.main([str(table), "-o", str(out), "--force", "--sides"]) == 0

    table.write_text("report\nKein Pneumothorax.\n")
    assert label.main([str(table), "-o", str(out), "--force"]) == 2
    assert "all reports are in another language" in capsys.readouterr().err
