"""`python -m cxr_jax.label` reads tables: kinds of table, columns, bad rows, unusable files."""

import gzip
import json
import random

import pytest
from label_inputs import EDEMA, NO_EDEMA, SECRET, texts_of, write

from cxr_jax.data import report_files, report_rows


@pytest.mark.parametrize(
    ("header", "cells", "options", "expected"),
    [
        ("Reports", ["a"], {}, "a"),
        ("TEXT,x", ["a", "b"], {}, "a"),
        ("x,notes", ["a", "b"], {"text_column": "Notes"}, "b"),
        (
            "uid,MeSH,Problems,image,indication,comparison,findings,impression",
            list("abcdefgh"),
            {},
            "g\n\nh",
        ),
        ("uid,findings,impression", ["a", "", "c"], {}, "c"),
        ("uid,findings,impression", ["a", "b", "c"], {"sections": ("impression",)}, "c"),
        ("uid,findings,impression", ["a", "b", ""], {"sections": ("impression",)}, "b"),
        ("uid,findings,impression", ["a", "b", "c"], {"sections": ()}, "b\n\nc"),
        ("uid,findings,impression", ["a", "", ""], {}, ""),
        (
            "study,impression,findings,last_paragraph,comparison",
            ["s", "i", "f", "", "c"],
            {},
            "f\n\ni",
        ),
        ("study,impression,findings,last_paragraph,comparison", ["s", "", "", "l", "c"], {}, "l"),
        (
            "path_to_image,report,section_findings,section_impression",
            ["p", "r", "f", "i"],
            {},
            "f\n\ni",
        ),
        ("path_to_image,report,section_findings,section_impression", ["p", "r", "", ""], {}, "r"),
        (
            "path_to_image,report,section_findings,section_impression",
            ["p", "r", "f", "i"],
            {"sections": ()},
            "r",
        ),
        ("path_to_image,report,section_findings", ["p", "r", "f"], {"text_column": "report"}, "r"),
    ],
)
def test_which_column_is_read(tmp_path, header, cells, options, expected):
    table = write(tmp_path / "in.csv", f"{header}\n{','.join(cells)}\n")
    assert texts_of(table, **options) == [expected]
    names = dict(zip(header.split(","), cells, strict=True))
    assert texts_of(write(tmp_path / "in.jsonl", json.dumps(names)), **options) == [expected]


@pytest.mark.parametrize(
    ("header", "expected"),
    [("subject_id,study_id,text", "b"), ("Path,age,text", "a"), ("age,sex,text", "1")],
)
def test_which_column_is_the_id(tmp_path, header, expected):
    table = write(tmp_path / "in.csv", f"{header}\na,b,c\n")
    assert [r.id for r in report_files.read(report_files.open_inputs([table]))] == [expected]
    options = report_files.Options(id_column=header.split(",")[1])
    assert [r.id for r in report_files.read(report_files.open_inputs([table], options))] == ["b"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bom.csv", '\ufeffreport,id\r\none,1\r\n\r\n"two\r\nlines",2\r\n'),
        ("old_mac.csv", 'report,id\rone,1\r"two\nlines",2\r'),
        ("semicolon.csv", 'id;report\n1;one\n2;"two\nlines"'),
        ("tab.tsv", 'id\treport\n1\tone\n2\t"two\nlines"\n'),
        ("packed.csv.gz", 'report\none\n"two\nlines"\n'),
        ("LINES.JSONL", '\ufeff{"report": "one"}\r\n\r\n{"report": "two\\nlines", "x": null}'),
        ("packed.jsonl.gz", '{"report": "one"}\n{"text": "two\\nlines"}\n'),
        ("array.json", '[{"report": "one"}, {"report": "two\\nlines"}]'),
        ("array.jsonl", '\ufeff\r\n[\n {"report": "one"},\n {"report": "two\\nlines"}\n]\n'),
        ("lines.json", '{"report": "one"}\n{"report": "two\\nlines"}'),
        ("packed.json.gz", '[{"report": "one"}, {"text": "two\\nlines"}]'),
    ],
)
def test_shapes_of_tables(tmp_path, name, data):
    assert texts_of(write(tmp_path / name, data)) == ["one", "two\nlines"]


def test_an_array_on_one_line_may_be_longer_than_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(report_rows, "MAX_RECORD", 40)
    data = '[{"report": "one"}, {"report": "two\\nlines"}, {"report": "a third of some length"}]'
    got = texts_of(write(tmp_path / "array.json", data))
    assert got == ["one", "two\nlines", "a third of some length"]


def test_table_without_header(tmp_path, run, stub):
    table = write(tmp_path / "in.csv", f'{NO_EDEMA}\n"1. {EDEMA}\n\n2. Effusion."\n')
    code, rows, *_ = run(table, "--no-header")
    assert code == 0 and [row["Edema"] for row in rows] == ["0", "1"]
    code, *_, err = run(
        table, "--force"
    )  # the line taken for a header is a report, and is not in the message
    assert code == 2 and "no text column" in err and "--no_header" in err
    wide = write(tmp_path / "wide.csv", f"7,{EDEMA}\n8,{NO_EDEMA}\n")
    code, *_, err = run(wide, "--no-header", "--force")
    assert code == 2 and "--text_column=NUMBER" in err
    code, rows, *_ = run(wide, "--no-header", "--text-column=2", "--id-column=1", "--force")
    assert code == 0 and [(row["id"], row["Edema"]) for row in rows] == [("7", "1"), ("8", "0")]


def test_bad_rows_of_a_csv_do_not_lose_the_others(tmp_path, run, stub):
    table = write(
        tmp_path / "in.csv",
        (
            f'id,report\na,{EDEMA}\nb,{SECRET}, with, commas\nc\nd,"{SECRET} never closed\ne,{EDEMA}\n'
            f'f,"{SECRET} closed" early\ng,"{EDEMA}"\nh,"{"x" * 1_000_001}"\ni,{NO_EDEMA}\n'
            f'j,"{SECRET}, the end\nk,{EDEMA}'
        ),
    )
    code, rows, errors, out, err = run(table)
    assert code == 2 and "bad rows: 6" in out
    assert (
        err.startswith("error: 6 of 11 rows are bad")
        and "out.errors.csv" in err
        and len(err.splitlines()) == 1
    )
    assert "".join(row["id"] for row in rows) == "aegik"
    assert [(row["row"], row["reason"].split()[0]) for row in errors] == [
        ("2", "4"),
        ("3", "1"),
        ("4", "not"),
        ("6", "not"),
        ("8", "the"),
        ("10", "not"),
    ]
    assert {row["source"] for row in errors} == {str(table)}


def test_bad_rows_of_json_lines_do_not_lose_the_others(tmp_path, run, stub):
    deep = '{"report": ' + "[" * 100_000
    lines = [
        {"id": 1, "report": EDEMA},
        f'{{"report": "{SECRET}',
        [SECRET],
        SECRET,
        {"report": 7},
        {"id": 2, "x": SECRET},
        {"report": None},
        {"report": float("nan")},
        {"report": "x", "id": [SECRET]},
        deep,
        "9" * 5000,
        {"report": ""},
        {"report": "x" * 1_000_001},
        {"findings": None, "impression": NO_EDEMA, "id": None},
    ]
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    code, rows, errors, out, _ = run(write(tmp_path / "in.jsonl", "\n".join(lines)))
    assert code == 2 and [(row["id"], row["Edema"]) for row in rows] == [
        ("1", "1"),
        ("12", ""),
        ("", "0"),
    ]
    assert [int(row["row"]) for row in errors] == [*range(2, 12), 13]
    reasons = [row["reason"] for row in errors]
    assert reasons[:4] == [
        "not valid JSON",
        "not a JSON object",
        "not valid JSON",
        "the text is not a string",
    ]
    assert reasons[4:7] == ["no text"] * 3 and "empty reports: 1; bad rows: 11" in out


def test_rows_of_an_array_that_cannot_be_read_cost_those_rows(tmp_path, run, stub):
    rows = [{"report": EDEMA}, [SECRET], {"report": NO_EDEMA}]
    text = (
        json.dumps(rows)[:-1] + f', {{"report": "{SECRET}", "report": "x"}}, {{"report": "{SECRET}'
    )
    code, rows, errors, *_ = run(write(tmp_path / "in.json", text))
    assert code == 2 and [(row["id"], row["Edema"]) for row in rows] == [("1", "1"), ("3", "0")]
    assert [(row["row"], row["reason"]) for row in errors] == [
        ("2", "not a JSON object"),
        ("4", "a key occurs twice in one object"),
        ("5", "not valid JSON; nothing after this row was read"),
    ]


def test_reports_up_to_the_limit_are_read(tmp_path):
    at, over = (
        "\u00e9" * (report_rows.MAX_BYTES // 2),
        "\u00e9" * (report_rows.MAX_BYTES // 2) + "x",
    )
    lines = write(tmp_path / "in.txt", f"{at}\n{over}\n{'y' * 10_000_000}\nz\n")
    rows = list(report_files.read(report_files.open_inputs([lines])))
    assert [row.text is None for row in rows] == [False, True, True, False]
    assert "over 1,000,000 bytes" in rows[1].reason and rows[3].text == "z"


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl", "in.txt"])
def test_a_line_without_end_is_skipped_unread(tmp_path, monkeypatch, name):
    monkeypatch.setattr(report_rows, "MAX_RECORD", 1000)
    wrap = {"in.csv": "{}\n", "in.jsonl": '{{"report": "{}"}}\n', "in.txt": "{}\n"}[name]
    head = "report\n" if name == "in.csv" else ""
    table = write(
        tmp_path / name, head + wrap.format("one") + wrap.format("x" * 5000) + wrap.format("two")
    )
    rows = list(report_files.read(report_files.open_inputs([table])))
    assert [row.text for row in rows] == ["one", None, "two"] and "over 1,000 characters" in rows[
        1
    ].reason


def test_bytes_that_are_not_utf8_are_counted(tmp_path, run, stub):
    table = write(tmp_path / "in.csv", b"id,report\n\xe9,edema \xe9\xff\n2,edema\n")
    code, rows, _, out, _ = run(table, "--with-text")
    assert code == 0 and rows[0]["Reports"] == "edema \ufffd\ufffd" and rows[0]["id"] == "\ufffd"
    assert "Warning: 1 reports hold bytes" in out


def test_damaged_gzip_keeps_what_came_before(tmp_path, run, stub):
    noise = random.Random(0)
    lines = "".join(f"{i},{EDEMA} {noise.randbytes(30).hex()}\n" for i in range(5000))
    path = write(tmp_path / "in.csv.gz", "id,report\n" + lines)
    path.write_bytes(path.read_bytes()[:-5000])
    code, rows, errors, *_ = run(path)
    assert (
        code == 2
        and 1000 < len(rows) < 5000
        and len(errors) == 1
        and "damaged" in errors[0]["reason"]
    )


# --- unusable as a whole


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("in.csv", None, "No such file"),
        ("in.csv", "", "is empty"),
        ("in.csv", "\n\n", "is empty"),
        ("in.csv", "report\n", "no rows"),
        ("in.csv", f"{SECRET},{SECRET}\na,b\n", "no text column"),
        ("in.csv", f'"{SECRET}\n{SECRET}', "not valid CSV"),
        ("in.csv", f"report\n{SECRET},{SECRET}\n", "row 1: 2 cells, 1 columns (none of 1"),
        ("in.csv", f"report\n{SECRET}\n".encode("utf-16"), "UTF-16"),
        ("in.csv", gzip.compress(b"report\nx\n", mtime=0), "gzip"),
        ("in.csv.gz", gzip.compress(b"report\nx\n", mtime=0)[:12], "damaged"),
        ("in.jsonl", "\n \n", "is empty"),
        ("in.jsonl", json.dumps({"x": SECRET}), "row 1: no text"),
        ("in.json", " [\n]", "is an array without rows"),
        ("in.json", json.dumps([{"report": SECRET}])[:-4], "row 1: not valid JSON"),
        ("in.json", f'{{"report": "{SECRET}", "report": "x"}}', "row 1: a key occurs twice"),
        ("in.txt", "", "is empty"),
        ("in.xml", f"<a>{SECRET}</a>", "not an Open-i report"),
        ("in.xlsx", SECRET, "not a folder"),
        ("in", SECRET, "not a folder"),
        ("folder", None, "no .xml and no .txt"),
    ],
)
def test_an_unusable_input_is_one_line_and_no_out(tmp_path, run, stub, name, data, reason):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "x.csv", "report\nx\n")
    if data is not None:
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    good = write(tmp_path / "good.csv", "report\nedema\n")
    bad_row = name == "in.xml" or reason.startswith("row")
    for inputs in ([tmp_path / name], [good, tmp_path / name]):
        if bad_row and len(inputs) == 2:
            continue  # a bad row does not lose the good ones
        code, rows, errors, out, err = run(*inputs)
        assert code == 2 and rows is None and errors is None and out == ""
        assert len(err.splitlines()) == 1 and reason in err and "in" in err


@pytest.mark.parametrize("option", ["--text_column=nope", "--id_column=nope"])
def test_a_column_that_is_not_there(tmp_path, run, stub, option):
    code, rows, *_, err = run(write(tmp_path / "in.csv", f"report\n{SECRET}\n"), option)
    assert code == 2 and rows is None and f"has no column {option}" in err
    code, rows, *_, err = run(write(tmp_path / "in.jsonl", json.dumps({"report": SECRET})), option)
    assert code == 2 and rows is None
