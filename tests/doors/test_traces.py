"""`python -m cxr_jax.traces`: files in, rows and rejected reports out, whole or not at all."""

import csv
import json

import pytest
from films import draw_film
from PIL import Image

from cxr_jax import label, traces
from cxr_jax.data.sources import manifest
from cxr_jax.data.sources.rows import conversations_of

SECRET = "Xyzzy"
TABLE = [
    ("path_to_image", "study_id", "subject_id", "section_findings", "section_impression", "Edema"),
    ("p10/a.png", "s1", "p10", f"{SECRET}. Moderate edema.", "Pulmonary edema.", "1.0"),
    ("p10/b.png", "s2", "p10", "Edema.", "", "0"),
    ("p11/c.png", "s3", "p11", "Mild pulmonary edema. No effusion.", "", "1"),
    ("p12/d.png", "s4", "p12", f"{SECRET}. Lungs are clear.", "", ""),
]


def write_table(path, rows=TABLE):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_table_with_labels_and_films(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert traces.main([write_table(tmp_path / "in.csv"), "-o", str(out)]) == 0
    rows, rejected = read(out), read(tmp_path / "rows.rejected.jsonl")
    assert [row["id"] for row in rows] == ["s1", "s3"]
    assert rows[1] == {
        "id": "s3",
        "image": "p11/c.png",
        "subject_id": "p11",
        "study_id": "s3",
        "solution": "Edema",
        "labels": {"Edema": 1},
        "policy": {"blank": "unknown", "uncertain": "unknown"},
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "p11/c.png"},
                    {"type": "text", "text": "Find abnormalities and support devices."},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {
                        "type": "text",
                        "text": "<think>Lungs: Mild pulmonary edema. Pleura: No effusion.</think>"
                        "<answer>Edema</answer>",
                    }
                ],
            },
        ],
    }
    assert [(record["id"], record["row"]) for record in rejected] == [("s2", 2), ("s4", 4)]
    assert rejected[0]["reasons"][0] == "Edema: negative by the labels; the report affirms it"
    output = capsys.readouterr()
    assert "2 of 4 reports gave a row (50.0%)" in output.out and output.err == ""
    assert SECRET not in output.out + json.dumps(rejected)


def test_rows_are_a_manifest_to_train_on(tmp_path):
    write_table(tmp_path / "in.csv")
    out = tmp_path / "rows.jsonl"
    assert traces.main([str(tmp_path / "in.csv"), "-o", str(out)]) == 0
    for number, name in enumerate("ac"):
        Image.fromarray(draw_film(64, 64, number)).save(tmp_path / f"{name}.png")
    rows = manifest.load_rows(out, tmp_path)
    assert [row.patient for row in rows] == ["p10", "p11"]
    assert [talk[-1].content for talk in conversations_of(rows, "rows")] == [
        row["messages"][1]["content"][0]["text"] for row in read(out)
    ]


def test_what_label_writes_is_read(tmp_path):
    """Its labels and sides are the report's, so every row agrees."""
    reports = tmp_path / "in.txt"
    reports.write_text("Right effusion.\nPossible edema. Left rib fracture.\nGranuloma.\n")
    table = tmp_path / "labels.csv"
    assert label.main([str(reports), "-o", str(table), "--sides", "--with_text"]) == 0
    out = tmp_path / "rows.jsonl"
    assert traces.main([str(table), "-o", str(out)]) == 0
    assert [row["solution"] for row in read(out)] == ["Pleural Effusion", "Fracture"]
    # Another side is another finding.
    table.write_text(table.read_text().replace(",right,", ",left,"))
    assert traces.main([str(table), "-o", str(out), "--force"]) == 0
    reasons = read(tmp_path / "rows.rejected.jsonl")[0]["reasons"]
    assert reasons == ["Pleural Effusion: left by the labels; the report says right side"]


@pytest.mark.parametrize(
    ("name", "content", "flags", "line"),
    [
        (
            "in.csv",
            "id,report,Edema\n1,Edema.,1\n2,Edema.,maybe\n",
            [],
            "row 2: Edema is not one of",
        ),
        ("in.csv", f"id,report\n1,Edema.\n2,{SECRET},x\n", [], "row 2: 3 cells, 2 columns"),
        (
            "in.jsonl",
            '{"report": "Edema."}\n{"report": 3}\n',
            [],
            "row 2: the text is not a string",
        ),
        ("in.jsonl", '{"report": "Edema."}\n{', [], "row 2: not valid JSON"),
        ("in.jsonl", '{"report": "Edema.", "labels": {"Flu": 1}}', [], "row 1: name 1 in labels"),
        ("in.csv", "id,report,image\n1,Edema.,../a.png\n", [], "row 1:"),
        (
            "in.csv",
            "id,report\n1,Edema.\n",
            ["--image_column=film"],
            "row 1: no column --image_column",
        ),
        ("in.csv", "id,x\n1,2\n", [], "has no text column"),
        ("in.csv", "", [], "is empty"),
        ("in.txt", "Edema.\n", ["--prompt= "], "nothing is asked"),
        ("in.txt", "Edema.\n", ["--tries=0"], "--tries is not between"),
        ("in.txt", "Edema.\n", ["--model=x"], "--endpoint and --model go together"),
        ("in.txt", "Edema.\n", ["--endpoint=http://192.0.2.1", "--model=x"], "not this machine"),
        ("in.txt", "Edema.\n", ["--rejected=OUT"], "--rejected is OUT"),
        ("in.txt", "Edema.\n", ["--lexicon=none.toml"], "none.toml"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, name, content, flags, line):
    (tmp_path / name).write_text(content)
    out = tmp_path / "rows.jsonl"
    flags = [flag.replace("=OUT", f"={out}") for flag in flags]
    assert traces.main([str(tmp_path / name), "-o", str(out), *flags]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and line in output.err
    assert output.out == "" and SECRET not in output.err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_that_stand_there_are_not_replaced(tmp_path, capsys):
    reports = tmp_path / "in.txt"
    reports.write_text("Edema.\n")
    for name in ("rows.jsonl", "rows.rejected.jsonl"):
        (tmp_path / name).write_text("mine")
        assert traces.main([str(reports), "-o", str(tmp_path / "rows.jsonl")]) == 2
        assert "--force replaces it" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert traces.main([str(reports), "-o", str(reports)]) == 2
    assert traces.main([str(reports), "-o", str(tmp_path / "none" / "rows.jsonl")]) == 2
    assert reports.read_text() == "Edema.\n"


def test_no_row_at_all(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("Granuloma.\n\n")
    out = tmp_path / "rows.jsonl"
    assert traces.main([str(tmp_path / "in.txt"), "-o", str(out)]) == 2
    assert out.read_text() == "" and len(read(tmp_path / "rows.rejected.jsonl")) == 2
    assert capsys.readouterr().err.startswith("error: no report gave a row;")
