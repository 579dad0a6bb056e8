"""`python -m cxr_jax.label`: output, options, signals, failed runs, no text in messages; the parser itself."""

import errno
import json
import os
import subprocess
import sys

import pytest
from label_inputs import EDEMA, NO_EDEMA, SECRET, write

from cxr_jax import label, labels
from cxr_jax.data import report_labels
from cxr_jax.labels.taxonomy import CHEXPERT_14

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
