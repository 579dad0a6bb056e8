"""Names that are no text, and terminals that cannot show them: no batch ends, and every output can be read."""

import csv
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from films import draw_film
from PIL import Image as PilImage
from places import ROOT

import cxr_jax
from cxr_jax import __main__ as console
from cxr_jax import convert, label, labels, main, predict
from cxr_jax.config import command_line
from cxr_jax.data.sources import label_table, manifest, unreadable
from cxr_jax.errors import UserError, as_utf8, exit_code, print_any_text, printable
from cxr_jax.evaluation import label_agreement
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.report.__main__ import main as draw_report
from cxr_jax.runtime import whole_files
from cxr_jax.runtime.run_folder import RunFolder

# As the system holds them: no UTF-8, several lines, control characters, text that turns round, other alphabets, markup.
NAMES = [
    b"film\xff",
    b"film\xfe",
    b"two\nlines",
    b"tab\tescape\x1b[2J\x07",
    "turned\u202egnp".encode(),
    "Zürich 中文 \U0001fac1".encode(),
    "separated\u2028\x85\xa0".encode(),
    b"<b>&'\"",
]
ENCODINGS = ["ascii", "cp1252", "latin-1", "utf-8"]


@pytest.fixture(params=ENCODINGS)
def open_terminal(request, monkeypatch):
    """A function, to be called in the test itself, that puts streams in place which take one encoding and nothing else.

    It returns a function that gives what (stdout, stderr) have taken, and empties them.
    """

    def open_streams():
        streams = {}
        for name in ("stdout", "stderr"):
            streams[name] = io.TextIOWrapper(io.BytesIO(), request.param, errors="strict")
            monkeypatch.setattr(sys, name, streams[name])

        def read():
            texts = []
            for stream in streams.values():
                stream.flush()
                texts.append(stream.buffer.getvalue().decode(request.param))
                stream.seek(0)
                stream.truncate()
            return texts

        return read

    return open_streams


def is_plain(text):
    """Whether a text is lines and nothing that moves a cursor."""
    return all(line.isprintable() for line in text.split("\n"))


def path_of(folder, name, suffix):
    return os.fsdecode(os.path.join(os.fsencode(folder), name + suffix))


@pytest.fixture
def films(tmp_path):
    pixels = PilImage.fromarray(draw_film(40, 60))
    paths = [path_of(tmp_path, name, b".png") for name in NAMES]
    for path in paths:
        with open(path, "wb") as file:
            pixels.save(file, "PNG")
    return paths


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    text = "<think>\u202eHeart.\x1b[2J \udcff</think><answer>Cardiomegaly</answer>"
    result = types.SimpleNamespace(
        shown=types.SimpleNamespace(text=text, finish_reason="stop"),
        samples=[],
        probabilities=dict.fromkeys(CHEXPERT_14, 0.5),
    )
    rote = types.SimpleNamespace(
        folder=tmp_path,
        answers="rules",
        read=lambda *arguments, **options: result,
        programs=lambda: {"vision": 1},
    )
    monkeypatch.setattr(cxr_jax, "load", lambda name, grids, **options: rote)


def test_predict_reads_every_film_whatever_its_name_and_the_terminal(films, model, open_terminal):
    terminal = open_terminal()
    bad = [path.replace(".png", ".dcm") for path in films]
    for path in bad:
        with open(path, "wb") as file:
            file.write(b"no image")
    paths = [path for pair in zip(films, bad, strict=True) for path in pair]
    assert predict.main([*paths, "--samples=0"]) == 2
    out, err = terminal()
    assert out.count("Reasoning:") == len(films) and is_plain(out)
    assert err.count("error: ") == len(bad) and err.count("\n") == len(bad) + 1 and is_plain(err)
    assert "film\\xff.png" in out and "film\\xff.dcm" in err and "two\\nlines.png" in out


def test_predict_writes_json_that_any_reader_takes(films, model, open_terminal):
    terminal = open_terminal()
    assert predict.main([*films, "--json", "--samples=0"]) == 0
    out, err = terminal()
    images = [json.loads(line)["image"] for line in out.splitlines()]
    assert len(set(images)) == len(films) and err == ""
    for path, image in zip(films, images, strict=True):
        image.encode()  # no lone surrogate, which strict readers refuse
        assert image == path or "film\\x" in image


def test_label_writes_tables_in_utf8(tmp_path, open_terminal, monkeypatch):
    terminal = open_terminal()
    reports = tmp_path / os.fsdecode(b"reports\xff")
    reports.mkdir()
    for name in NAMES:
        with open(path_of(reports, name, b".txt"), "wb") as file:
            file.write(b"FINDINGS: Edema.")
        with open(path_of(reports, name + b" bad", b".txt"), "wb") as file:
            file.write(b"\xff\xfe")
    read = lambda texts, **options: (
        dict.fromkeys(("state", "right", "left"), np.zeros((len(texts), 14), np.int8))
        | dict.fromkeys(("foreign", "unread"), np.zeros(len(texts), np.int8))
    )
    monkeypatch.setattr(labels, "read_reports", read, raising=False)
    out_path = tmp_path / os.fsdecode(b"out\xff\n.csv")
    assert label.main([str(reports), "-o", str(out_path)]) == 2
    out, err = terminal()
    assert is_plain(out) and err.startswith("error: 8 of 16 rows are bad") and err.count("\n") == 1
    for path in (out_path, out_path.with_suffix(".errors.csv")):
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8"))))
        assert len({tuple(row) for row in rows}) == len(NAMES) + 1


def test_manifest_and_rows_keep_names_and_their_ids_can_be_written(tmp_path, films):
    names = [os.path.basename(path) for path in films]
    rows = [
        {
            "id": name,
            "image": name,
            "conversations": [{"from": "human", "value": "?"}],
            "solution": "Edema",
        }
        for name in names
    ]
    path = tmp_path / os.fsdecode(b"rows\xff.jsonl")
    label_table.write_rows(path, rows)
    read = manifest.load_rows(path, tmp_path)
    assert [str(row.image_path) for row in read] == films
    assert len({row.id for row in read}) == len(films)
    for row in read:
        row.id.encode()


def test_manifest_command(tmp_path, open_terminal):
    terminal = open_terminal()
    table = tmp_path / os.fsdecode(b"table\xff.csv")
    header = ",".join(["path", "patient_id", *CHEXPERT_14])
    cells = ",".join("1" if name == "Edema" else "0" for name in CHEXPERT_14)
    rows = [f"films/{number}/Zürich\u202e.png,{number},{cells}" for number in range(3)]
    table.write_text("\n".join([header, *rows]), encoding="utf-8")
    out = tmp_path / os.fsdecode(b"out\xff.jsonl")
    assert label_table.main([str(table), str(out), "--prompt=\udcff?"]) == 0
    assert len(out.read_bytes().decode("utf-8").splitlines()) == 3
    terminal()
    assert label_table.main([str(tmp_path / os.fsdecode(b"no\xff\x1b.csv")), str(out)]) == 2
    assert "no\\xff\\x1b.csv" in terminal()[1]


def test_unreadable_films_are_named_a_line_each(tmp_path, open_terminal):
    terminal = open_terminal()
    print_any_text()  # as every door does
    bad = unreadable.UnreadableFiles(len(NAMES))
    paths = [Path(path_of(tmp_path, name, b".png")) for name in NAMES]
    for path in paths:
        bad.add(path, UserError(f"{path}: no such file"))
    unreadable.check_files(paths, limit=len(NAMES))
    out, err = terminal()
    assert out.count("\n") == err.count("\n") == len(NAMES) and is_plain(out + err)


def test_agreement_writes_errors_in_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"errors\xff.csv")
    error = label_agreement.LabelError("report\udcff", "Edema", "FP", 1)
    label_agreement.write_errors(path, [error])
    assert "report\\udcff" in path.read_bytes().decode("utf-8")


def commands(path, folder):
    """Commands that do not find a file of this name."""

    def fail():
        raise UserError(f"{path}: no")

    return [
        lambda: draw_report([path]),
        lambda: convert.main(["from-hf", path, f"{folder}/out"]),
        lambda: convert.main(["to-hf", path, f"{path} out"]),
        lambda: label.main([path, "-o", f"{folder}/out.csv"]),
        lambda: label_agreement.main([path]),
        lambda: main.main(["main", f"--config={path}"]),
        lambda: exit_code(fail),
    ]


def test_messages_of_every_command_are_one_printable_line(tmp_path, open_terminal):
    terminal = open_terminal()
    for name in NAMES:
        for command in commands(path_of(tmp_path, name, b".none"), tmp_path):
            assert command() == 2
            out, err = terminal()
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1
            assert is_plain(err)


def test_help_is_shown_on_any_terminal(open_terminal):
    terminal = open_terminal()
    assert console.main(["--help"]) == 0
    assert command_line.main(["main", "--help"], "cxr_jax.main", lambda: 0) == 0
    assert "--config" in terminal()[0]


def test_a_run_folder_that_checkpoints_cannot_be_written_to_is_refused_at_once(tmp_path):
    path = tmp_path / os.fsdecode(b"run\xff")
    for folder in (path, path / "below"):
        with pytest.raises(UserError, match="not UTF-8"):
            RunFolder(str(folder), {})
    assert not path.exists()
    RunFolder(str(tmp_path / "Zürich\n中文"), {}).close()


def test_names_as_text():
    for name in map(os.fsdecode, NAMES):
        as_utf8(name).encode()
        assert printable(name).isprintable()
        assert as_utf8(as_utf8(name)) == as_utf8(name)
    assert as_utf8("Zürich \udc80\ud800") == "Zürich \\udc80\\ud800"
    # Under a locale of ASCII, Python holds the bytes of other letters one by one.
    assert as_utf8("Z\udcc3\udcbcrich") == "Zürich"
    assert as_utf8("film\udcff") == "film\\xff"


def test_text_files_are_utf8_whatever_the_locale(tmp_path):
    whole_files.write_text(tmp_path / "a", 'name: "\udcff"')
    assert (tmp_path / "a").read_bytes() == b'name: "\\udcff"'
    # Every file of text names its encoding.
    command = [sys.executable, "-m", "ruff", "check", "--preview", "--select=PLW1514", "cxr_jax"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
