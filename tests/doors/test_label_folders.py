"""`python -m cxr_jax.label` reads files of one report, of Open-i and of MIMIC-CXR, and cuts them into sections."""

import os

import pytest
from label_inputs import SECRET, write

from cxr_jax.data import report_sections

OPENI = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><Abstract><AbstractText Label="INDICATION">edema?</AbstractText>
<AbstractText Label="FINDINGS">{}</AbstractText>
<AbstractText Label="IMPRESSION">{}</AbstractText></Abstract></eCitation>"""
BOMB = (
    '<!DOCTYPE a [<!ENTITY b "' + SECRET * 10 + '"><!ENTITY c "' + "&b;" * 99 + '">]>'
    '<a><AbstractText Label="FINDINGS">&c;</AbstractText></a>'
)


def test_folder_of_openi_reports(tmp_path, run, stub):
    below = tmp_path / "films" / "below"
    below.mkdir(parents=True)
    write(tmp_path / "films" / "CXR2.xml", OPENI.format("No <b>edema</b> &lt; &#101;.", "Clear."))
    write(tmp_path / "films" / "CXR1.xml", OPENI.format("", ""))
    write(below / "CXR0.XML", OPENI.format("", "Edema."))
    write(below / "bomb.xml", BOMB)
    write(below / "torn.xml", OPENI.format(SECRET, "")[:-20])
    write(below / "long.xml", OPENI.format("x" * 1_000_001, ""))
    write(below / "strange.xml", '<?xml version="1.0" encoding="nonsense"?><a/>')
    write(below / "._CXR0.xml", b"\0\x05\x16\x07")  # what macOS leaves beside files
    write(below / "readme.txt", SECRET)
    code, rows, errors, *_ = run(tmp_path / "films", "--with-text")
    assert code == 2 and [(row["id"], row["Edema"]) for row in rows] == [
        ("CXR1", ""),
        ("CXR2", "0"),
        ("CXR0", "1"),
    ]
    assert (
        rows[1]["Reports"] == "No edema < e.\n\nClear." and rows[0]["Reports"] == ""
    )  # never the indication
    assert [(os.path.basename(row["source"]), row["reason"]) for row in errors] == [
        ("bomb.xml", "has a document type, which is not read"),
        ("long.xml", "the report is over 1,000,000 bytes"),
        ("strange.xml", "not well-formed XML"),
        ("torn.xml", "not well-formed XML"),
    ]


def test_sections_of_one_label_stay_apart():
    xml = '<a><AbstractText Label="Findings">a</AbstractText><AbstractText Label="FINDINGS"> b</AbstractText></a>'
    assert report_sections.read_openi(xml.encode()) == {"findings": "a\n\n b"}


def test_folder_of_mimic_reports(tmp_path, run, stub):
    for name, text in {
        "s2": "FINAL REPORT\n INDICATION:  edema\n \n FINDINGS:\n\n Clear.\n IMPRESSION:  No edema.",
        "s1": "FINAL REPORT\n HISTORY:  edema\n \n Lungs\n clear.\n \n Heart normal.",
    }.items():
        folder = tmp_path / "files" / "p10" / f"p1{name}"
        folder.mkdir(parents=True)
        write(folder / f"{name}.txt", text)
    (tmp_path / "files" / "p10" / "pipe.txt").symlink_to("/dev/zero")
    (tmp_path / "files" / "p10" / "gone.txt").symlink_to("nowhere")
    code, rows, errors, *_ = run(tmp_path / "files", "--with-text")
    assert code == 2 and [row["reason"] for row in errors] == [
        "cannot be read (No such file or directory)",
        "not a regular file",
    ]
    assert [(row["id"], row["Reports"], row["Edema"]) for row in rows] == [
        ("s1", "Lungs\n clear.\n \n Heart normal.", ""),
        ("s2", "Clear.\n\nNo edema.", "0"),
    ]
    one = tmp_path / "files" / "p10" / "p1s2" / "s2.txt"
    code, rows, *_ = run(one, "--one-report", "--sections=impression", "--with-text", "--force")
    assert code == 0 and [(row["id"], row["Reports"]) for row in rows] == [("s2", "No edema.")]


@pytest.mark.parametrize(
    ("text", "reports"),
    [
        ("No edema.\nClear lungs.\n", 2),
        ("FINDINGS: No edema.\nClear lungs.\nIMPRESSION: Normal.\n", 1),
        ("FINDINGS:\nNo edema.\nIMPRESSION: Normal.\nFINDINGS: Clear.\n", 1),
        ("FINDINGS: No edema. IMPRESSION: Normal.\nFINDINGS: Clear. IMPRESSION: Normal.\n", 2),
        ("FINDINGS: No edema. IMPRESSION: Normal.\n", 1),
    ],
)
def test_a_text_file_is_one_report_or_one_a_line(tmp_path, run, stub, text, reports):
    write(tmp_path / "in.txt", text)
    code, rows, *_ = run(tmp_path / "in.txt")
    assert code == 0 and len(rows) == reports


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Clear lungs.", "Clear lungs."),
        ("Findings: a\nImpression: b", "a\n\nb"),
        ("IMPRESSION: b\nFINDINGS: a", "a\n\nb"),
        (
            "INDICATION: c FINDINGS: a IMPRESSION: b",
            "a\n\nb",
        ),  # a table that has lost its line ends
        ("Indication: Cough. Findings: a. Impression: b", "a.\n\nb"),
        ("IMPRESSION\n\na\n\nRECOMMENDATION(S): c\nNOTIFICATION: d", "a"),
        ("HISTORY: c\nCONCLUSION: a", "a"),
        ("FINDINGS:\nLUNGS: a\nHEART: b\nIMPRESSION: c", "LUNGS: a\nHEART: b\n\nc"),
        ("INDICATION: c\nRIGHT LUNG: a\nHEART: b", "RIGHT LUNG: a\nHEART: b"),
        ("CHEST, PA AND LATERAL:\n\nINDICATION: c\n\nFINDINGS: a", "a"),
        ("PORTABLE CHEST: a\n\nCOMPARISON: none", "PORTABLE CHEST: a"),
        ("FINDINGS AND IMPRESSION: a", "a"),
        ("FINDINGS: ___\nIMPRESSION: a", "a"),
        ("FINDINGS: a\nADDENDUM: c\nFINDINGS: b", "a\n\nb"),
        ("INDICATION: c\n\na\n\nb", "a\n\nb"),
        ("INDICATION: c", "INDICATION: c"),
        ("The impression: a is wrong; see findings", "The impression: a is wrong; see findings"),
    ],
)
def test_sections_of_a_text(text, expected):
    assert report_sections.cut(text)[0] == expected


@pytest.mark.parametrize(
    "text",
    ["FINDINGS" * 120_000, " " * 1_000_000, "A " * 500_000, "EXAM \t" * 160_000, "\n " * 500_000],
)
def test_sections_of_a_long_text_take_linear_time(text):
    assert report_sections.cut(text, ("impression",))[0].strip() == text.strip()
