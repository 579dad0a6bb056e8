"""`python -m cxr_jax.label`: kinds of input, bad rows, unusable files, whole output, no text in messages."""

import csv
import errno
import gzip
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from cxr_jax import label, labels
from cxr_jax.data import report_files, report_labels, report_rows, report_sections
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX

SECRET = "Xyzzy"  # stands in every report; must never be in a message
EDEMA = f"{SECRET}. Edema."
NO_EDEMA = f"{SECRET}. No edema."


@pytest.fixture
def stub(monkeypatch):
    """A reader that knows one finding. Returns the list of its calls: (texts, lexicon, parents)."""
    calls = []

    def read_reports(texts, lexicon=None, parents=False):
        calls.append((list(texts), lexicon, parents))
        state = np.full((len(texts), 14), -2, np.int8)
        for i, text in enumerate(texts):
            text = text.lower()
            text.encode()  # what the parser takes is valid Unicode
            if "edema" in text:
                state[i, INDEX["Edema"]] = (
                    -1 if "possible" in text else 0 if "no edema" in text else 1
                )
        side = lambda word: (state > -2) & np.array([word in text for text in texts])[:, None]
        foreign, unread = np.zeros(len(texts), bool), np.zeros(len(texts), np.int32)
        sides = {"right": side("right"), "left": side("left")}
        return {"state": state, **sides, "foreign": foreign, "unread": unread}

    monkeypatch.setattr(labels, "read_reports", read_reports, raising=False)
    return calls


@pytest.fixture
def run(tmp_path, capsys):
    """run(*argv) -> (exit code, rows of OUT or None, rows of the errors file or None, stdout, stderr)."""

    def call(*argv, out="out.csv"):
        out = tmp_path / out
        code = label.main([*map(str, argv), "-o", str(out)])
        shown = capsys.readouterr()
        errors = out.with_suffix(".errors.csv")
        assert SECRET not in shown.out + shown.err
        assert not errors.exists() or SECRET not in errors.read_text()
        assert not list(tmp_path.glob(".*.partial"))
        read = lambda path: (
            list(csv.DictReader(open(path, newline="", encoding="utf-8")))
            if path.exists()
            else None
        )
        return code, read(out), read(errors), shown.out, shown.err

    return call


def write(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts_of(path, **options):
    return [
        report.text
        for report in report_files.read(
            report_files.open_inputs([path], report_files.Options(**options))
        )
    ]


# --- output


def test_a_row_has_the_id_and_the_14_labels(tmp_path, run, stub):
    table = write(
        tmp_path / "in.csv",
        f"study_id,report\n007,{EDEMA}\n50414267,possible edema\nx,{NO_EDEMA}\ny,\n",
    )
    code, rows, errors, out, err = run(table)
    assert code == 0 and err == "" and errors is None
    assert list(rows[0]) == ["id", *CHEXPERT_14, "Unread"]
    assert [(row["id"], row["Edema"]) for row in rows] == [
        ("007", "1"),
        ("50414267", "-1"),
        ("x", "0"),
        ("y", ""),
    ]
    assert {row["Fracture"] for row in rows} == {""}
    edema = next(line for line in out.splitlines() if line.startswith("Edema"))
    assert edema.split() == [
        "Edema",
        "1",
        "1",
        "1",
        "1",
    ]  # positive, negative, uncertain, not mentioned
    assert (
        "4 reports" in out and "empty reports: 1; bad rows: 0" in out and "Research use only" in out
    )


def test_options_reach_the_parser_and_add_columns(tmp_path, run, stub):
    table = write(
        tmp_path / "in.csv",
        f'report\n"{SECRET} right edema, left"\nright edema\nleft edema\nedema\nright\n',
    )
    code, rows, *_ = run(table, "--sides", "--with-text", "--parents")
    assert code == 0 and stub[0][2] is True
    assert list(rows[0]) == [
        "id",
        "Reports",
        *CHEXPERT_14,
        *(f"{name} side" for name in CHEXPERT_14[3:]),
        "Unread",
    ]
    assert [row["Edema side"] for row in rows] == ["both", "right", "left", "", ""]
    assert rows[0]["Reports"] == f"{SECRET} right edema, left"


def test_text_of_any_kind_comes_back_as_it_was_read(tmp_path, run, stub):
    odd = 'a,"b"\x00c\r\nd\re\n\nf \u00e9 \U0001f600'
    rows = "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate((odd, "", "\ud800x"))
    )
    code, rows, _, out, _ = run(write(tmp_path / "in.jsonl", rows), "--with-text", "--sections=all")
    assert code == 0
    assert [row["Reports"] for row in rows] == [
        odd.replace("\r\n", "\n").replace("\r", "\n"),
        "",
        "\ufffdx",
    ]
    assert "Warning: 1 reports hold bytes that are not UTF-8" in out


def test_report_text_is_no_id(tmp_path, run, stub):
    for name, text in (
        ("in.csv", f"report\n{SECRET}\n"),
        ("in.jsonl", json.dumps({"report": SECRET})),
    ):
        code, rows, _, _, err = run(write(tmp_path / name, text), "--id-column=report")
        assert code == 2 and rows is None and "--id_column=report is the text" in err


def test_the_first_text_column_that_is_not_blank_is_read(tmp_path, run, stub):
    code, rows, *_ = run(write(tmp_path / "in.csv", "report,text\n,edema\nno edema,edema\n,\n"))
    assert code == 0 and [row["Edema"] for row in rows] == ["1", "0", ""]
    _, _, _, out, _ = run(write(tmp_path / "blank.csv", "report\n \n\t\n"), "--force")
    assert "Warning: every report is empty" in out


def test_a_file_that_has_come_meanwhile_is_not_replaced(tmp_path, run, stub, monkeypatch):
    read = labels.read_reports

    def slow(*args, **options):
        write(tmp_path / "out.csv", "mine")
        return read(*args, **options)

    monkeypatch.setattr(labels, "read_reports", slow)
    table = write(tmp_path / "in.jsonl", json.dumps({"report": EDEMA}) + "\n[]\n")
    assert label.main([str(table), "-o", str(tmp_path / "out.csv")]) == 2
    assert (tmp_path / "out.csv").read_text() == "mine" and not (
        tmp_path / "out.errors.csv"
    ).exists()


def test_a_signal_ends_it_and_leaves_nothing(tmp_path):
    rows = "report\n" + "No edema.\n" * 300_000
    command = [
        sys.executable,
        "-m",
        "cxr_jax.label",
        write(tmp_path / "in.csv", rows),
        "-o",
        tmp_path / "out.csv",
    ]
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=label.__file__.rsplit("/", 2)[0]
    )
    while run.poll() is None and not list(tmp_path.glob(".*.partial")):
        pass  # it is at work when its files are there
    run.terminate()
    assert (
        run.wait(60) == 1
        and run.stderr.read() == "error: stopped before the end; OUT was not written\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["in.csv"]


def test_a_signal_finds_whose_the_files_are_as_soon_as_they_are_there(
    tmp_path, run, stub, monkeypatch
):
    opened = []

    def watched(path, *args, **options):
        opened.append(path)
        assert [path in table.parts for table in label._running] == [True]
        return open(path, *args, **options)

    monkeypatch.setattr(report_labels, "open", watched, raising=False)
    code, *_ = run(write(tmp_path / "in.csv", "report\nNo edema.\n"))
    assert code == 0 and len(opened) == 2


def test_reads_in_chunks_of_bounded_size(tmp_path, run, stub, monkeypatch):
    monkeypatch.setattr(report_labels, "CHUNK", 4)
    monkeypatch.setattr(report_labels, "CHUNK_BYTES", 100)
    write(tmp_path / "in.txt", "edema\n" * 10 + f"{'x' * 200}\n" * 2)
    code, rows, *_ = run(tmp_path / "in.txt")
    assert code == 0 and [row["id"] for row in rows] == [str(i) for i in range(1, 13)]
    assert [len(texts) for texts, *_ in stub] == [4, 4, 3, 1]


def test_several_inputs_and_ids_that_say_which(tmp_path, run, stub):
    (tmp_path / "films").mkdir()
    write(tmp_path / "films" / "s1.txt", "FINDINGS: edema")
    one, two = (
        write(tmp_path / "a.txt", "edema\nno edema\n"),
        write(tmp_path / "b.csv", "id,text\n9,x\n"),
    )
    code, rows, *_ = run(one, two, tmp_path / "films")
    assert code == 0 and [row["id"] for row in rows] == ["a.txt:1", "a.txt:2", "9", "s1"]


def test_out_is_not_overwritten_unless_forced(tmp_path, run, stub):
    table = write(tmp_path / "in.csv", "report\nedema\n")
    write(tmp_path / "out.csv", "kept")
    write(tmp_path / "out.errors.csv", "old")
    code, *_, err = run(table)
    assert (
        code == 2
        and "out.csv: exists; --force" in err
        and (tmp_path / "out.csv").read_text() == "kept"
    )
    code, rows, errors, *_ = run(table, "--force")
    assert (
        code == 0 and len(rows) == 1 and errors is None
    )  # the old list of errors is not of this OUT


@pytest.mark.parametrize("out", ["in.csv", "link.csv", "hard.csv"])
def test_out_is_never_an_input(tmp_path, run, stub, out):
    table = write(tmp_path / "in.csv", "report\nedema\n")
    (tmp_path / "link.csv").symlink_to(table)
    os.link(table, tmp_path / "hard.csv")
    code, *_, err = run(table, "--force", out=out)
    assert code == 2 and "is an input" in err and table.read_text() == "report\nedema\n"


def test_the_errors_file_is_never_an_input(tmp_path, run, stub):
    table = write(tmp_path / "out.errors.csv", "report\nedema\n")
    assert label.main([str(table), "--force", "-o", str(tmp_path / "out.csv")]) == 2
    assert table.read_text() == "report\nedema\n"


@pytest.mark.parametrize(
    ("out", "reason"),
    [("out.jsonl", "named .csv"), ("no/out.csv", "no such folder"), ("d.csv", "not a file")],
)
def test_bad_names_of_out(tmp_path, stub, capsys, out, reason):
    (tmp_path / "d.csv").mkdir()
    table = write(tmp_path / "in.csv", "report\nedema\n")
    assert label.main([str(table), "--force", "-o", str(tmp_path / out)]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["x.csv"],
        ["x.csv", "-o", "y.csv", "--sections=history"],
        ["x.csv", "-o", "y.csv", "--tex"],
    ],
)
def test_bad_usage_is_one_line(argv, capsys):
    assert label.main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left"),
        (RuntimeError(SECRET), 1, "RuntimeError"),  # the message could be a report
        (KeyboardInterrupt(), 1, "stopped before the end"),
    ],
)
def test_a_failed_run_leaves_nothing_and_tells_nothing(
    tmp_path, run, stub, monkeypatch, error, code, reason
):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    write(tmp_path / "out.csv", "kept")
    got, _, _, _, err = run(write(tmp_path / "in.csv", "report\nedema\n"), "--force")
    assert got == code and reason in err and len(err.splitlines()) == 1
    assert (tmp_path / "out.csv").read_text() == "kept"


# --- tables


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
        ("in.csv", gzip.compress(b"report\nx\n"), "gzip"),
        ("in.csv.gz", gzip.compress(b"report\nx\n")[:12], "damaged"),
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


# --- files of one report

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


def test_help_and_errors_need_no_jax(tmp_path):
    script = """if True:
        import sys
        from cxr_jax import label
        code = label.main(sys.argv[1:])
        assert "jax" not in sys.modules
        sys.exit(code)"""
    argv = [sys.executable, "-c", script, "nowhere.csv", "-o", str(tmp_path / "out.csv")]
    done = subprocess.run(argv, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: nowhere.csv")


# --- with the parser itself


def test_labels_of_real_wording(tmp_path, run):
    table = write(
        tmp_path / "in.csv",
        (
            "study,Reports\n1,Heart size normal and lungs are clear. No edema or pneumonia. No effusion\n"
            '2,"1. Left pleural effusion with adjacent atelectasis.\n\n2. Cardiomegaly without overt edema."\n3,\n'
        ),
    )
    code, rows, _, out, _ = run(table, "--sides")
    assert code == 0 and [row["id"] for row in rows] == ["1", "2", "3"]
    first, second, empty = rows
    assert (first["No Finding"], first["Edema"], first["Pneumonia"], first["Pleural Effusion"]) == (
        "1",
        "0",
        "0",
        "0",
    )
    assert (second["Pleural Effusion"], second["Cardiomegaly"], second["Edema"]) == ("1", "1", "0")
    assert second["Pleural Effusion side"] == "left"
    assert {empty[name] for name in CHEXPERT_14} == {""} and "empty reports: 1" in out


def test_the_indication_is_not_a_finding(tmp_path, run):
    (tmp_path / "films").mkdir()
    text = "INDICATION: Pneumothorax.\n\nFINDINGS: Lungs are clear.\n\nIMPRESSION: No pneumonia."
    write(tmp_path / "films" / "s1.txt", text)
    code, rows, *_ = run(tmp_path / "films")
    assert code == 0 and (rows[0]["Pneumothorax"], rows[0]["Pneumonia"], rows[0]["No Finding"]) == (
        "",
        "0",
        "1",
    )


def test_a_lexicon_that_cannot_be_read_is_one_line(tmp_path, run):
    table = write(tmp_path / "in.csv", "report\nedema\n")
    code, rows, *_, err = run(table, f"--lexicon={tmp_path / 'nowhere.toml'}")
    assert code == 2 and rows is None and "nowhere.toml" in err and len(err.splitlines()) == 1
