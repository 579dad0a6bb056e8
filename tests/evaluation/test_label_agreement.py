"""`cxr_jax.evaluation.label_agreement`: numbers of a made folder by hand, bad folders, the shared reports."""

import csv

import numpy as np
import pytest
from places import SHARED

from cxr_jax.evaluation import label_agreement

DATA = SHARED / "reports"
SOURCES = list(label_agreement.load_map(label_agreement.MAP).labels)

# (findings, impression, gold): an FP of No Finding and an FN of Lung Lesion in r2, an FN of Edema in r3 (it is hedged).
REPORTS = {
    "r1": ("Cardiomegaly. Small left effusion.", "", ("Cardiomegaly", "Effusion")),
    "r2": ("The lungs are clear.", "No acute disease.", ("Nodule",)),
    "r3": ("Possible edema.", "", ("Edema",)),
    "r4": ("", "A nodule and a mass.", ("Nodule", "Mass")),
    "r5": ("No effusion.", "", ("normal",)),
}


def make(folder, reports=REPORTS, columns=SOURCES):
    """A folder of the layout of the shared one; its path as a string."""
    (folder / "xml").mkdir()
    rows = []
    for name, (findings, impression, gold) in reports.items():
        texts = "".join(
            f'<AbstractText Label="{label}">{text}</AbstractText>'
            for label, text in (
                ("INDICATION", "Pneumonia."),
                ("FINDINGS", findings),
                ("IMPRESSION", impression),
            )
            if text
        )
        (folder / "xml" / f"{name}.xml").write_text(
            f"<eCitation><Abstract>{texts}</Abstract></eCitation>"
        )
        rows.append([f"xml/{name}.xml", name, *(int(c in gold) for c in columns)])
    with open(folder / "openi_manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "report_id", *(f"gold_{c}" for c in columns)], *rows])
    return str(folder)


def run(capsys, *argv):
    code = label_agreement.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def row(out, label):
    """The cells of a label's line."""
    return next(line for line in out.splitlines() if line.startswith(label))[len(label) :].split()


def test_numbers_of_a_made_folder(tmp_path, capsys):
    errors = tmp_path / "errors.csv"
    code, out, _ = run(capsys, make(tmp_path, columns=[*SOURCES, "Hernia"]), "--errors", errors)
    assert code == 0
    # tp: Cardiomegaly, Effusion, Lesion (r4, once for two sources), No Finding (r5); 1 fp, 2 fn: 2*4 / (2*4 + 3).
    assert "5 reports; map openi_gold version 1; uncertain = negative" in out
    assert "\nmicro-F1 0.727 [" in out
    assert "\nmicro-F1 without No Finding 0.750 [" in out  # 2*3 / (2*3 + 2)
    assert "\nmacro-F1 0.667 [" in out and "over the 5 labels" in out  # (1 + 1 + 2/3 + 2/3 + 0) / 5
    assert "micro-F1 with uncertain = positive: 0.833" in out  # 2*5 / (2*5 + 2)
    assert row(out, "No Finding") == ["1", "1", "1", "0", "1", "0.500", "1.000", "0.667"]
    assert row(out, "Lung Lesion") == ["2", "1", "0", "1", "1", "1.000", "0.500", "0.667"]
    assert row(out, "Pneumonia") == [
        "0",
        "0",
        "0",
        "0",
        "0",
        "-",
        "-",
        "-",
    ]  # an indication is not read
    assert "3 errors in 2 reports" in out and "not scored: Hernia" in out
    assert "Support Devices" not in out and "Lung Opacity" not in out  # nothing maps to them
    assert errors.read_text().splitlines() == [
        "report_id,label,kind,state",
        "r2,No Finding,FP,1",
        "r2,Lung Lesion,FN,",
        "r3,Edema,FN,-1",
    ]


def test_uncertain_as_positive(tmp_path, capsys):
    code, out, _ = run(capsys, make(tmp_path), "--uncertain", "positive")
    assert code == 0
    assert "\nmicro-F1 0.833 [" in out and "micro-F1 with uncertain = negative: 0.727" in out
    assert row(out, "Edema") == ["1", "1", "0", "0", "0", "1.000", "1.000", "1.000"]


def test_full_agreement_has_no_spread(tmp_path, capsys):
    reports = {f"r{i}": ("Pneumothorax.", "", ("Pneumothorax",)) for i in range(3)}
    _, out, _ = run(capsys, make(tmp_path, reports))
    assert "micro-F1 1.000 [1.000, 1.000]" in out and "0 errors in 0 reports" in out


def test_another_manifest_and_lexicon(tmp_path, capsys):
    make(tmp_path)
    lexicon = tmp_path / "few.toml"
    lexicon.write_text('[findings]\nCardiomegaly = ["effusion"]\n[stops]\nsentence = ["."]\n')
    (tmp_path / "openi_manifest.csv").rename(tmp_path / "other.csv")
    code, out, _ = run(capsys, tmp_path, "--manifest", "other.csv", "--lexicon", lexicon)
    assert code == 0
    assert row(out, "Cardiomegaly")[:4] == [
        "1",
        "1",
        "1",
        "0",
    ]  # "No effusion" affirms it: no cue is known


def test_no_text_in_output(tmp_path, capsys):
    reports = {"r1": ("Xyzzy edema.", "", ()), "r2": ("Xyzzy.", "", ("Edema",))}
    errors = tmp_path / "errors.csv"
    _, out, err = run(capsys, make(tmp_path, reports), "--errors", errors)
    assert "yzzy" not in out + err + errors.read_text()


def manifest(change):
    """A folder's manifest with one text replaced."""

    def apply(folder):
        path = folder / "openi_manifest.csv"
        path.write_text(change(path.read_text()))

    return apply


BAD = {
    "no manifest": (
        lambda f: (f / "openi_manifest.csv").unlink(),
        "openi_manifest.csv: No such file",
    ),
    "empty": (manifest(lambda s: ""), "no column 'file'"),
    "no rows": (manifest(lambda s: s.splitlines()[0] + "\n"), "lists no reports"),
    "no id": (manifest(lambda s: s.replace("report_id", "id")), "no column 'report_id'"),
    "no gold": (manifest(lambda s: s.replace("gold_Mass", "Mass")), "no column 'gold_Mass'"),
    "blank gold": (
        manifest(lambda s: s.replace("xml/r1.xml,r1,0", "xml/r1.xml,r1,")),
        "row 1: gold_Atelectasis",
    ),
    "short row": (
        manifest(lambda s: s + "xml/r1.xml,r9\n"),
        "row 6: gold_Atelectasis is neither 0 nor 1",
    ),
    "torn quote": (manifest(lambda s: s + '"xml'), "not a CSV file"),
    "no file": (lambda f: (f / "xml" / "r2.xml").unlink(), "r2.xml: there is no such file"),
    "not xml": (
        manifest(lambda s: s.replace("xml/r1.xml", "openi_manifest.csv")),
        "not the name of an .xml file",
    ),
    "torn xml": (
        lambda f: (f / "xml" / "r3.xml").write_text("<eCitation>"),
        "r3.xml: not well-formed XML",
    ),
    "another xml": (
        lambda f: (f / "xml" / "r3.xml").write_text("<a/>"),
        "r3.xml: has no AbstractText",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_is_one_line(tmp_path, capsys, name):
    make(tmp_path)
    spoil, reason = BAD[name]
    spoil(tmp_path)
    code, out, err = run(capsys, tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1 and reason in err


@pytest.mark.parametrize(
    "flags",
    [
        ["--uncertain", "maybe"],
        ["--errors", "openi_manifest.csv"],
        ["--errors", "x.txt"],
        ["--errors", "none/e.csv"],
        ["--lexicon", "none.toml"],
        ["--what"],
    ],
)
def test_bad_usage_is_one_line(tmp_path, capsys, monkeypatch, flags):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "openi_manifest.csv").read_bytes()
    code, _, err = run(capsys, tmp_path, *flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert (tmp_path / "openi_manifest.csv").read_bytes() == before


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is absent")
def test_shared_reports():
    label_map = label_agreement.load_map(label_agreement.MAP)
    gold = label_agreement.load_gold(DATA, "openi_manifest.csv", label_map)
    states = label_agreement.read_states(gold.paths)
    out = label_agreement.summarise(states, gold.truth, label_map, "negative")
    assert out["micro_f1"]["all"]["value"] >= 0.93
    # The same number without the code above: every error is a miss or a false alarm of a cell.
    wrong = label_agreement.find_errors(gold, states, label_map, "negative")
    hits = sum(x["tp"] for x in out["per_label"].values())
    assert np.isclose(out["micro_f1"]["all"]["value"], 2 * hits / (2 * hits + len(wrong)))
