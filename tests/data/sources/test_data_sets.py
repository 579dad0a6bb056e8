"""Data sets in their own layouts: answer keys, bad tables, films on disk, what the command prints and writes."""

import csv

import pytest
from made_tables import cells_of, run, write_table
from places import SHARED

from cxr_jax.data.sources import sets
from cxr_jax.data.sources.films import places
from cxr_jax.labels.taxonomy import CHEXPERT_14

TABLES = SHARED / "tables"

# ---- The answer keys -------------------------------------------------------------------------------

KEYS = (
    ("nih", "real/nih", ""),
    ("chexpert", "synthetic/chexpert/train", ""),
    ("chexpert", "synthetic/chexpert/valid", ""),
    ("chexpert_test", "synthetic/chexpert_test", ""),
    ("chexpert_plus", "synthetic/chexpert_plus", ""),
    ("mimic", "synthetic/mimic_jpg", ""),
    ("vindr", "synthetic/vindr/train", ""),
    ("vindr", "synthetic/vindr/test", ""),
    ("padchest", "synthetic/padchest", ""),
    ("rsna", "synthetic/rsna", ""),
    ("brax", "synthetic/brax", ""),
)


@pytest.mark.skipif(not TABLES.is_dir(), reason="the shared data folder is absent")
@pytest.mark.parametrize("name, folder, _", KEYS, ids=[folder for _, folder, _ in KEYS])
def test_answer_keys(capsys, tmp_path, name, folder, _):
    code, rows, _, err = run(capsys, tmp_path, name, TABLES / folder)
    assert code == 0 and not err
    with open(TABLES / folder / "expected.csv", newline="") as file:
        wanted = list(csv.DictReader(file))
    # Row for row, in the order of the table.
    assert len(rows) == len(wanted)
    for row, key in zip(rows, wanted, strict=True):
        states = [None if key[label] == "" else int(key[label]) for label in CHEXPERT_14]
        assert cells_of(row) == (
            *(key[c] for c in ("image", "patient", "study", "view", "split")),
            states,
        )


@pytest.mark.skipif(not TABLES.is_dir(), reason="the shared data folder is absent")
@pytest.mark.parametrize(
    "name, folder, count",
    [
        ("chexpert", "chexpert", 54),
        ("vindr", "vindr", 20),
        ("vindr", "vindr_kaggle", 5),
        ("padchest_gr", "padchest_gr", 6),
        ("siim", "siim", 9),
        ("openi", "openi_kaggle", 11),
        ("rexgradient", "rexgradient", 6),
    ],
)
def test_sets_without_a_key(capsys, tmp_path, name, folder, count):
    code, rows, out, err = run(capsys, tmp_path, name, TABLES / "synthetic" / folder)
    assert (code, err) == (0, "") and len(rows) == count
    # A film is known by its id alone.
    assert len({row["id"] for row in rows}) == count and f"rows: {count} films" in out
    assert all(row["patient_id"] and row["study_id"] for row in rows)


# What is read, by the documented rules, and on which line the others are refused.
READ = ("state_u", "state_nan", "windows", "quoted_newline", "formula", "contradiction")
LINES = {"unknown_state": 2, "url": 2, "absolute": 2, "dotdot": 2, "duplicate_row": 3}
LINES |= {"short_row": 3, "long_row": 2, "nul": 2, "huge_field": 2}
WORDS = {
    "semicolon": "no column 'Path'",
    "missing_label": "'Support Devices'",
    "two_same_columns": "'Edema' stands there twice",
    "header_only": "no rows",
    "unknown_state": "Edema",
    "duplicate_row": "the row is that of line 2",
    "latin1": "not UTF-8",
}


@pytest.mark.skipif(not TABLES.is_dir(), reason="the shared data folder is absent")
@pytest.mark.parametrize(
    "file", sorted((TABLES / "synthetic/bad").glob("*.csv")), ids=lambda p: p.stem
)
def test_bad_tables(capsys, tmp_path, file):
    if file.stem == "manifest":
        return
    code, rows, out, err = run(capsys, tmp_path, "chexpert", file)
    # ---- Read, as documented ----
    if file.stem in READ:
        assert code == 0 and len(rows) == 1 and not err
        states = rows[0]["labels"]
        assert states["Edema"] == {"state_u": -1, "contradiction": 1}.get(file.stem)
        assert rows[0]["image"].count("/") == 4 and "\\" not in rows[0]["image"]
        assert ("No Finding together with a finding" in out) == (file.stem == "contradiction")
        return
    # ---- One line, nothing written ----
    assert code == 2 and rows is None and not out
    assert err.startswith("error: ") and err.count("\n") == 1
    # With the line, where there is one to name.
    place = f"{file}:{LINES[file.stem]}: " if file.stem in LINES else f"{file}: "
    assert err.startswith(f"error: {place}") and WORDS.get(file.stem, "") in err


# ---- Films on disk ---------------------------------------------------------------------------------


def table_of(folder, count, prefix="CheXpert-v1.0-small/"):
    paths = [f"{prefix}train/patient{n:05d}/study1/view1_frontal.jpg" for n in range(count)]
    header = ["Path", "Frontal/Lateral", "AP/PA", *CHEXPERT_14]
    write_table(
        folder / "train.csv", header, [[path, "Frontal", "AP", *["1"] * 14] for path in paths]
    )
    return paths


@pytest.mark.parametrize(
    "where", ["{}", "../{}", "CheXpert-v1.0-small/{}", "{stripped}", "images/{stripped}"]
)
def test_films_are_found_where_published_folders_lie(tmp_path, where):
    root = tmp_path / "set"
    names = table_of(root, 12)
    # One is missing wherever the others are.
    for name in names[:-1]:
        path = root / where.format(name, stripped=name.partition("/")[2])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    films = sets.open_films("chexpert", root)
    found = places.look_for(films)
    assert found.missing.tolist() == [11] and "1 are not there" in found.description
    assert all(found.place.path(name).is_file() for name in films.images[:11])


def test_another_suffix_is_named_in_rows(capsys, tmp_path):
    name = "train/patient00001/study1/view1_frontal"
    columns = ["path_to_image", "frontal_lateral", "ap_pa", "report", "split"]
    write_table(
        tmp_path / "set/df_chexpert_plus_240401.csv",
        columns,
        [[f"{name}.jpg", "Frontal", "PA", "a\nb", "train"]],
    )
    # The table says .jpg.
    for folder, suffix in (("PNG", ".png"), ("", ".dcm")):
        (tmp_path / "set" / folder / name).parent.mkdir(parents=True, exist_ok=True)
        file = tmp_path / "set" / folder / f"{name}{suffix}"
        file.write_bytes(b"")
        _, got, out, _ = run(capsys, tmp_path, "chexpert_plus", tmp_path / "set")
        assert got[0]["image"] == name + suffix and "all are there" in out
        file.unlink()


def test_large_sets_are_sampled(tmp_path, monkeypatch):
    assert (places.CHECK_ALL, places.SAMPLE) == (10_000, 1_000)
    # The same in small: folders of ten thousand patients take seconds to make.
    monkeypatch.setattr(places, "CHECK_ALL", 200)
    monkeypatch.setattr(places, "SAMPLE", 50)
    names = table_of(tmp_path, places.CHECK_ALL + 1)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / names[0]).write_bytes(b"")
    films = sets.open_films("chexpert", tmp_path)
    # A network disk answers each question by a round trip.
    asked = []
    monkeypatch.setattr(places.os.path, "isfile", lambda path: asked.append(path) or True)
    found = places.look_for(films)
    assert len(found.asked) == places.SAMPLE and len(asked) <= places.SAMPLE + 20
    # The same ones each time.
    assert (found.asked == places.look_for(films).asked).all()
    assert len(places.look_for(films, "all").asked) == len(films)
    assert not len(places.look_for(films, "none").asked)


@pytest.mark.parametrize(
    "name, flags, reason",
    [
        ("chexpert", [], "holds no train.csv"),
        ("mimic", [], "metadata"),
        ("openi", [], "indiana_reports.csv"),
        ("chexpert", ["--labels=negbio"], "labels=negbio is none of chexpert's"),
        ("nothing", [], "nothing"),
        ("chexpert", ["--check=some"], "some"),
    ],
)
def test_refusals(capsys, tmp_path, name, flags, reason):
    code, rows, out, err = run(capsys, tmp_path, name, tmp_path, *flags)
    assert code == 2 and rows is None and not out and reason in err and err.count("\n") == 1
