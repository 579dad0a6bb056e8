"""Label tables: separators, torn and repeated rows, blank and uncertain cells by policy, views."""

import csv
import gzip
import json
import random
import re

import pytest
from places import SHARED
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from cxr_jax.data import report_rows, report_tables
from cxr_jax.data.dicom import header, words
from cxr_jax.data.sources import label_table, policy, views
from cxr_jax.data.sources.policy import LabelPolicy
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

HEADER = ("Path", "Sex", *CHEXPERT_14)
FULL = ["0"] * 13 + ["1"]


def write(folder, rows, header=HEADER, separator=",", name="t.csv"):
    path = folder / name
    lines = [separator.join(row) for row in (header, *rows)]
    path.write_bytes(("\n".join(lines) + "\n").encode())
    return path


def convert(capsys, table, *flags):
    """(exit code, rows or None, stdout, stderr) of the command."""
    out = table.with_suffix(".jsonl")
    code = label_table.main([str(table), str(out), *flags])
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else None
    return code, rows, *capsys.readouterr()


def refusal(capsys, table, *flags):
    code, rows, out, err = convert(capsys, table, *flags)
    assert (code, rows, out) == (2, None, "") and err.count("\n") == 1
    return err


# ---- The form of a table -----------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_every_separator_gives_the_same_rows(tmp_path, capsys, separator, start):
    draw = random.Random(3)
    rows = [[f"{i}.png", "F", *draw.choices(["1", "0", "-1", ""], k=13), "1"] for i in range(30)]
    want = convert(capsys, write(tmp_path, rows))[1]
    table = write(tmp_path, rows, separator=separator, name="other.csv")
    table.write_bytes(start + table.read_bytes().replace(b"\n", b"\r\n"))
    assert convert(capsys, table)[1] == want
    table.with_suffix(".csv").write_bytes(gzip.compress(table.read_bytes()))
    assert convert(capsys, table)[1] == want


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_tables_with_every_cell_in_quotes(tmp_path, capsys, separator):
    rows = [["a, b;c|d.png", "M", *FULL], ["b.png", "F", *FULL]]
    plain = [["a.png", "M", *FULL], rows[1]]
    for cells in (rows, plain):
        path = tmp_path / "quoted.csv"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL)
            writer.writerows([HEADER, *cells])
        code, read, _, err = convert(capsys, path)
        assert code == 0, err
        assert [row["image"] for row in read] == [cells[0][0], "b.png"]


def test_a_later_image_column_may_stand_there_twice(tmp_path, capsys):
    row = ["x", "a.png", "M", *FULL, "y"]
    code, rows, _, _ = convert(capsys, write(tmp_path, [row], ("img", *HEADER, "IMG")))
    assert code == 0 and rows[0]["image"] == "a.png"
    table = write(
        tmp_path, [["a.png", "b.png", *FULL]], ("path", "PATH", *CHEXPERT_14), name="u.csv"
    )
    assert "stands there twice" in refusal(capsys, table)


def test_rows_that_repeat_another_are_left_out_and_counted(tmp_path, capsys):
    films = [["a.png", "M", *FULL], ["b.png", "M", *FULL], ["a.png", "M", *FULL]]
    code, rows, out, _ = convert(capsys, write(tmp_path, [*films, films[0]]))
    assert code == 0 and [row["id"] for row in rows] == ["a.png", "b.png"]
    assert "2 left out: repeated" in out


def test_a_state_that_is_none_is_not_shown(tmp_path, capsys):
    said = refusal(capsys, write(tmp_path, [["a.png", "M", "Jane Doe", *FULL[1:]]]))
    assert f"t.csv:2: {CHEXPERT_14[0]} is not one of" in said and "Doe" not in said


def test_cells_as_programs_write_them(tmp_path, capsys):
    cells = ["0,0", "1.0", "1,0", "0", "0.00", "-1", "-1.0", "U", "u", "", "nan", "NA", " ", "None"]
    table = write(tmp_path, [["a.png", "M", *cells]], separator=";")
    [row] = convert(capsys, table)[1]
    states = [row["labels"].get(label) for label in CHEXPERT_14]
    assert states == [0, 1, 1, 0, 0, -1, -1, -1, -1, None, None, None, None, None]


@pytest.mark.parametrize("cut", range(1, 16))
def test_a_short_row_is_refused_wherever_it_is_torn(tmp_path, capsys, cut):
    table = write(tmp_path, [["a.png", "M", *FULL], ["b.png", "M", *FULL][:cut]])
    assert f"t.csv:3: {cut} cells, 16 columns" in refusal(capsys, table)


@pytest.mark.parametrize("more", [["x"], ["", "1.0"]])
def test_a_long_row_is_refused(tmp_path, capsys, more):
    table = write(tmp_path, [["a.png", "M", *FULL, *more]])
    assert f"t.csv:2: {16 + len(more)} cells, 16 columns" in refusal(capsys, table)


def test_blank_cells_and_rows_beyond_the_table_are_none(tmp_path, capsys):
    rows = [["a.png", "M", *FULL, "", ""], [""] * 16, ["b.png", "M", *FULL]]
    assert [row["id"] for row in convert(capsys, write(tmp_path, rows))[1]] == ["a.png", "b.png"]


def test_a_quoted_line_end_does_not_move_the_line_that_is_named(tmp_path, capsys):
    table = write(tmp_path, [["a.png", '"M\nF"', *FULL], ["b.png", "M", *FULL[:-1], "7"]])
    assert "t.csv:4: Support Devices is not one" in refusal(capsys, table)


BAD = {
    "stands there twice": [(*HEADER, "edema"), ["a.png", "M", *FULL, "0"]],
    "separated by a semicolon": [(*HEADER[:5], *HEADER[6:]), ["a.png", "M", *FULL[1:]]],
    "has a header and no rows": [HEADER],
    "not valid CSV": [HEADER, ['"a.png', "M", *FULL]],
    "a NUL character": [HEADER, ["a.png", "M\0", *FULL]],
    "of more than": [HEADER, ["a.png", "x" * 200_000, *FULL]],
    "relative to the image root": [HEADER, ["/data/a.png", "M", *FULL]],
    "relative to the image root ": [HEADER, ["https://example.org/a.png", "M", *FULL]],
    "leaves the image root": [HEADER, ["x/../../a.png", "M", *FULL]],
    "relative to the image root  ": [HEADER, ["/", "M", *FULL]],
    "the image root itself": [HEADER, [".", "M", *FULL]],
    "with another view": [
        ("View", *HEADER),
        ["PA", "a.png", "M", *FULL],
        ["LL", "a.png", "M", *FULL],
    ],
    "with other labels": [HEADER, ["a.png", "M", *FULL], ["a.png", "M", "1", *FULL[1:]]],
    "a rounded number": [("PatientID", *HEADER), ["2.34e+35", "a.png", "M", *FULL]],
}


@pytest.mark.parametrize("reason", BAD)
def test_tables_that_would_be_read_wrongly_are_refused(tmp_path, capsys, reason):
    header, *rows = BAD[reason]
    separator = ";" if "semicolon" in reason else ","
    table = write(tmp_path, rows, header, separator)
    assert reason.strip() in refusal(capsys, table)


def test_readers_of_tables_with_other_limits_of_a_cell_leave_each_other_alone(tmp_path, capsys):
    """csv's limit is one for the process: a reader of long reports must not raise it for another, even half-way."""
    limit = csv.field_size_limit()
    reports, long = tmp_path / "reports.csv", "No effusion. " * 20_000
    reports.write_text(f"id,report\n1,{long}\n2,{long}\n3,Clear.\n")
    labels = write(tmp_path, [["a.png", "x" * 200_000, *FULL]])
    rows = iter(report_tables.CsvTable(str(reports), report_rows.Options()))
    for number in (1, 2):
        assert next(rows).row == number
        assert csv.field_size_limit() == limit
        assert "a cell of more than 131,072 characters" in refusal(capsys, labels)
    assert next(rows).text == "Clear." and csv.field_size_limit() == limit
    # Nor does a limit that somebody else has set count for either.
    try:
        csv.field_size_limit(100)
        rows = [*report_tables.CsvTable(str(reports), report_rows.Options())]
        assert [len(row.text) > 100 for row in rows] == [True, True, False]
        csv.field_size_limit(10**9)
        assert "a cell of more than 131,072 characters" in refusal(capsys, labels)
    finally:
        csv.field_size_limit(limit)


def test_a_compressed_table_is_read_and_a_damaged_one_refused(tmp_path, capsys):
    plain = write(tmp_path, [["a.png", "M", *FULL]])
    packed, table = gzip.compress(plain.read_bytes()), tmp_path / "other.csv"
    for content, reason in (
        (packed, None),
        (packed + packed[:20], "cut off"),
        (packed[:-12], "cut off"),
        (packed[:15] + b"\xff\xff" + packed[17:], "damaged|cut off"),
        (plain.read_text().encode("utf-16"), "is UTF-16 text"),
    ):
        table.write_bytes(content)
        table.with_suffix(".jsonl").unlink(missing_ok=True)
        if reason:
            assert re.search(reason, refusal(capsys, table))
        else:
            assert [row["id"] for row in convert(capsys, table)[1]] == ["a.png"]


def test_a_film_of_two_patients_is_said_and_keeps_two_ids(tmp_path, capsys):
    header = ("patient", *HEADER)
    table = write(tmp_path, [[p, "a.png", "M", *FULL] for p in "PQ"], header)
    code, rows, _, err = convert(capsys, table)
    assert code == 0 and [row["id"] for row in rows] == ["a.png", "a.png#3"]
    assert "1 rows list a film that another patient's row lists" in err


def test_films_without_a_positive_label_are_kept_if_that_is_asked_for(tmp_path, capsys):
    states = {"none.png": "0", "nobody.png": "", "maybe.png": "-1", "some.png": "1"}
    table = write(tmp_path, [[name, "M", state, *[""] * 13] for name, state in states.items()])
    assert [row["id"] for row in convert(capsys, table)[1]] == ["some.png"]
    code, rows, out, _ = convert(capsys, table, "--empty=keep")
    assert code == 0 and [(row["id"], row["solution"]) for row in rows] == [
        ("none.png", ""),
        ("some.png", "No Finding"),
    ]
    assert "2 left out: no label known to be positive" in out
    # What an uncertain cell counts as decides, too.
    _, rows, _, _ = convert(capsys, table, "--empty=keep", "--uncertain=negative")
    assert [row["id"] for row in rows] == ["none.png", "maybe.png", "some.png"]


# ---- Blank and uncertain cells -----------------------------------------------------------------------


def test_policies_settle_what_blank_and_uncertain_cells_count_as(tmp_path, capsys):
    table = write(tmp_path, [["a.png", "M", "", "-1", "U", "0", "", "1", *[""] * 8]])
    for blank in policy.BLANK_CHOICES:
        for uncertain in policy.UNCERTAIN_CHOICES:
            code, [row], out, _ = convert(
                capsys, table, f"--blank={blank}", f"--uncertain={uncertain}"
            )
            assert code == 0 and f"labels: blank={blank}, uncertain={uncertain};" in out
            assert row["policy"] == {"blank": blank, "uncertain": uncertain}
            hedged = [CHEXPERT_14[1], CHEXPERT_14[2]]
            assert row["solution"].split(", ") == [
                *(hedged if uncertain == "positive" else []),
                "Edema",
            ]
            state = {"unknown": -1, "negative": 0, "positive": 1}[uncertain]
            assert [row["labels"][label] for label in hedged] == [state, state]
            assert len(row["labels"]) == (14 if blank == "negative" else 4)
    assert "--blank" in refusal(capsys, table.rename(tmp_path / "u.csv"), "--blank=maybe")


@pytest.mark.parametrize("known, warns", [(2, True), (3, False)])
def test_a_table_of_which_little_is_known_is_warned_of(tmp_path, capsys, known, warns):
    cells = ["1", *["0"] * (known - 1), *[""] * (14 - known)]
    cells[0], cells[1] = cells[1], cells[0]  # not No Finding
    table = write(tmp_path, [["patient1.png", "M", *cells]])
    _, _, out, err = convert(capsys, table)
    assert f"{known / 14:.0%} of the label cells known" in out
    assert (err.count("\n") == 1 and "--blank=negative" in err) == warns
    assert not convert(capsys, table, "--blank=negative")[3]


def test_a_policy_has_known_names_only():
    with pytest.raises(UserError, match="uncertain"):
        LabelPolicy("unknown", "maybe")


# ---- Views -------------------------------------------------------------------------------------------

LATERAL = ("LL", "L", "LATERAL", "lateral", "left lateral", "RL", "LLAT", "LAT", "LARGE LATERAL")
FRONTAL = (
    "PA",
    "AP",
    "Frontal",
    "AP_horizontal",
    "POSTERO_ANTERIOR",
    "antero-posterior",
    "AP Supine",
)
OTHER = ("LAO", "left oblique", "Axial", "LATERAL DECUBITUS", "COSTAL", "EXCLUDE")
OTHER += ("PA and lateral", "PA LATERAL", "PA/LAT", "frontal, lateral")
UNKNOWN = ("", "UNK", "nan", "erect")


@pytest.mark.parametrize(
    "texts, view", [(LATERAL, "lateral"), (FRONTAL, "frontal"), (OTHER, "other"), (UNKNOWN, None)]
)
def test_words_of_views(texts, view):
    for text in texts:
        assert views.view_of_text(text) == view, text


# Every word of the table, and what people write around it.
VIEW_WORDS = [*words.FRONTAL, *words.FRONTAL_WORDS, *words.LATERAL_WORDS, *words.LATERAL_STEMS]
VIEW_WORDS += [words.LATERAL_ALONE, *words.OTHER_VIEWS, *words.OTHER_VIEW_STEMS]
WRITTEN = ("L LL LAT PROFILE ML CV TANGENTIAL P.A. A-P a/p POSTEROANTERIOR PosteroAnterior").split()
WRITTEN += ["PA AND LAT", "PA LATERAL", "AP SUPINE", "PA ERECT", "PA/AP", "left lateral"]
IN_COLUMN = {"PA": "frontal", "AP": "frontal", "LATERAL": "lateral", "OTHER": "other"}


@pytest.mark.parametrize(
    "form", ["{}", "{} erect", "_{}_", "(portable) {}", "{} PA", "{}, lateral"]
)
def test_columns_and_headers_understand_the_same_words_of_views(form):
    for text in (form.format(word) for word in (*VIEW_WORDS, *words.SAYS_NOTHING, *WRITTEN)):
        for spelled in (text, text.lower(), text.title()):
            film = Dataset()
            with disable_value_validation():
                film.ViewPosition = spelled
            meta = {"warnings": [], "unusable": []}
            header.describe(film, meta)
            in_column = views.view_of_text(spelled)
            # A header has no word for a film of which only the way is unknown.
            assert in_column in (IN_COLUMN.get(meta["view"]), "frontal"), spelled
            assert (in_column in ("lateral", "other")) == (
                "not a frontal view" in meta["unusable"]
            ), spelled


def test_every_word_of_views_names_one():
    assert all(views.view_of_text(word) for word in VIEW_WORDS)
    assert not any(views.view_of_text(word) for word in words.SAYS_NOTHING)
    assert {word for word in views.PATH_LATERAL if views.view_of_text(word) != "lateral"} == set()


def test_views_that_are_written_are_read_back(tmp_path, capsys):
    films = [[view, f"{n}.png", "M", *FULL] for n, view in enumerate(("PA", "LL", "LAO"))]
    table = write(tmp_path, films, ("view", *HEADER))
    _, rows, _, _ = convert(capsys, table, "--views=any")
    written = [row["view"] for row in rows]
    assert written == ["frontal", "lateral", "other"]
    assert [views.find_view(row, ["a.png"]) for row in rows] == written


PATHS = {
    "patient00001/study1/view2_lateral.jpg": "lateral",
    "lateral/00012.png": "lateral",
    "x/1_lat.png": "lateral",
    "patient00001/study1/view1_frontal.jpg": "frontal",
    "bilateral_effusion.png": None,
    "collateral/plate.png": None,
    "L.png": None,
}


@pytest.mark.parametrize("path", PATHS)
def test_views_of_paths(path):
    assert views.view_in_path(path) == PATHS[path]


COLUMNS = ("ViewPosition", "View Position", "Frontal/Lateral", "AP/PA", "Projection", "view")
COLUMNS += ("frontal_lateral", "ViewCodeSequence_CodeMeaning", "VIEW_POSITION")


@pytest.mark.parametrize("column", COLUMNS)
def test_lateral_rows_are_left_out_or_written_with_their_view(tmp_path, capsys, column):
    cells = ["PA", *LATERAL, "Axial", ""]
    rows = [[cell, f"{i}.png", "M", *FULL] for i, cell in enumerate(cells)]
    table = write(tmp_path, rows, (column, *HEADER))
    _, written, out, _ = convert(capsys, table)
    assert [row.get("view") for row in written] == ["frontal", None]
    assert (
        f"{len(LATERAL)} left out: a lateral view" in out and "1 left out: no frontal film" in out
    )
    _, written, out, _ = convert(capsys, table, "--views=any")
    want = ["frontal", *["lateral"] * len(LATERAL), "other", None]
    assert [row.get("view") for row in written] == want and "left out" not in out


def test_columns_that_say_yes_or_no():
    assert views.find_view({"is_lateral": "1.0"}, []) == "lateral"
    assert views.find_view({"Lateral": "False"}, ["a.png"]) == "frontal"
    assert views.find_view({"Frontal/Lateral": "Frontal", "AP/PA": "LL"}, []) == "lateral"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
def test_given_tables_that_are_bad(tmp_path, capsys):
    folder = SHARED / "tables/synthetic/bad"
    refused = [
        *("missing_label", "two_same_columns", "header_only", "unknown_state", "url", "absolute"),
        *("dotdot", "short_row", "long_row", "nul", "latin1", "huge_field"),
    ]
    for table in [SHARED / "cases/tables/short.csv", *(folder / f"{name}.csv" for name in refused)]:
        assert label_table.main([str(table), str(tmp_path / "o.jsonl")]) == 2, table
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "o.jsonl").exists()
    for name in (
        "duplicate_row",
        "semicolon",
        "state_u",
        "state_nan",
        "windows",
        "quoted_newline",
        "formula",
    ):
        assert label_table.main([str(folder / f"{name}.csv"), str(tmp_path / "o.jsonl")]) == 0
