"""Where films lie: in several folders, under other suffixes, in part; and that no file stands for two films."""

import json

import pytest
from made_tables import run, write_table

from cxr_jax.labels.taxonomy import CHEXPERT_14

BLANKS = [""] * len(CHEXPERT_14)


def make_files(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@pytest.mark.parametrize(
    "folder, suffix",
    [("images_{:03d}/images", ".png"), ("images_{:03d}", ".jpg"), ("images_{:03d}", ".PNG")],
)
def test_nih_in_its_twelve_folders(capsys, tmp_path, folder, suffix):
    root = tmp_path / "set"
    names = [f"{number:08d}_000" for number in range(30)]
    rows = [[f"{name}.png", "Mass", name] for name in names]
    write_table(root / "Data_Entry_2017.csv", ["Image Index", "Finding Labels", "Patient ID"], rows)
    # The last is missing.
    there = [f"{folder.format(n % 12 + 1)}/{name}{suffix}" for n, name in enumerate(names[:-1])]
    make_files(root, there)
    _, got, out, _ = run(capsys, tmp_path, "nih", root, "--check=all")
    assert "in several folders" in out and f"1 are not there, the first {names[-1]}.png" in out
    assert [row["image"] for row in got] == [name + suffix for name in names]


def test_chexpert_in_batches(capsys, tmp_path):
    root = tmp_path / "set"
    names = [f"patient{number:05d}/study1/view1_frontal.jpg" for number in range(9)]
    rows = [[f"CheXpert-v1.0/train/{name}", *BLANKS] for name in names]
    write_table(root / "train.csv", ["Path", *CHEXPERT_14], rows)
    make_files(root, [f"CheXpert-v1.0 batch {n % 3 + 2}/{name}" for n, name in enumerate(names)])
    _, _, out, _ = run(capsys, tmp_path, "chexpert", root)
    assert "in several folders" in out and "all are there" in out


@pytest.mark.parametrize("of_patients", [1, 2])
def test_bare_names_are_films_only_where_they_are_distinct(capsys, tmp_path, of_patients):
    root = tmp_path / "set"
    paths = [f"CheXpert-v1.0/train/patient{n:05d}/study1/v.jpg" for n in range(of_patients)]
    write_table(root / "train.csv", ["Path", *CHEXPERT_14], [[path, *BLANKS] for path in paths])
    make_files(root, ["v.jpg"])
    _, _, out, _ = run(capsys, tmp_path, "chexpert", root)
    assert ("all are there" in out) == (of_patients == 1)
    assert ("none was found" in out) == (of_patients == 2)


@pytest.mark.parametrize("there", [[0], [1, 2], [0, 1, 2], []])
def test_a_test_set_that_is_there_in_part(capsys, tmp_path, there):
    root = tmp_path / "set"
    studies = [f"CheXpert-v1.0/test/patient{n}/study1" for n in (64741, 64742, 64743)]
    write_table(root / "groundtruth.csv", ["Study", *CHEXPERT_14], [[s, *BLANKS] for s in studies])
    # Empty folders, and what a download has left half done.
    make_files(root, [f"{study.partition('/')[2]}/view1.jpg.tmp" for study in studies])
    films = {number: f"{studies[number]}/view1_frontal.jpg" for number in there}
    make_files(root, [film.partition("/")[2] for film in films.values()])
    code, got, out, _ = run(capsys, tmp_path, "chexpert_test", root)
    assert code == 0 and [row["image"] for row in got] == [
        films.get(number, study) for number, study in enumerate(studies)
    ]
    assert [row["view"] for row in got] == ["FRONTAL" if n in films else "" for n in range(3)]
    missing = 3 - len(there)
    assert (f"{missing} studies have no film here" in out) == (0 < missing < 3)


@pytest.mark.parametrize(
    "before, after", [("", ".png"), ("/", ".jpg"), ("PNG/", ".jpg"), ("", ".dcm"), ("", "")]
)
def test_labels_of_chexpert_plus_whatever_the_path(capsys, tmp_path, before, after):
    root = tmp_path / "set"
    film = "train/patient00001/study1/view1_frontal"
    path = root / "df_chexpert_plus_240401.csv"
    write_table(path, ["path_to_image", "split"], [[f"{film}.jpg", "train"]])
    states = {label: 1.0 if label == "Edema" else None for label in CHEXPERT_14}
    labels = json.dumps({"path_to_image": before + film + after, **states})
    (root / "report_fixed.json").write_text(labels + "\n")
    _, got, out, _ = run(capsys, tmp_path, "chexpert_plus", root)
    assert got[0]["labels"]["Edema"] == 1 and "no row of labels" not in out
    # One film under two suffixes is one film.
    rows = [[f"{film}.jpg", "train"], [f"{film}.png", "train"]]
    write_table(path, ["path_to_image", "split"], rows)
    code, got, _, err = run(capsys, tmp_path, "chexpert_plus", root)
    assert code == 2 and got is None and f"{path}:3: the film is that of line 2" in err


def test_a_film_under_two_suffixes(capsys, tmp_path):
    rows = [["00000001_000.png", "Mass", "1"], ["00000001_000.jpg", "Hernia", "1"]]
    path = tmp_path / "set/Data_Entry_2017.csv"
    write_table(path, ["Image Index", "Finding Labels", "Patient ID"], rows)
    code, got, _, err = run(capsys, tmp_path, "nih", tmp_path / "set")
    assert code == 2 and got is None and f"{path}:3: the film is that of line 2" in err


def test_studies_whose_films_differ_are_counted(capsys, tmp_path):
    rows = [
        [f"train/patient{patient}/study1/view{view}_frontal.jpg", *[state] * 14]
        for patient, view, state in ((1, 1, "1"), (1, 2, "0"), (2, 1, "1"), (2, 2, "1"))
    ]
    write_table(tmp_path / "set/train.csv", ["Path", *CHEXPERT_14], rows)
    _, _, out, _ = run(capsys, tmp_path, "chexpert", tmp_path / "set")
    assert "1 studies have films with different labels" in out


def test_rexgradient_spellings(capsys, tmp_path):
    path = tmp_path / "set/train_metadata.json"
    path.parent.mkdir()
    film = r"..\\deid_png\\GRDN1\\GRDN2\\studies\\1\\series\\2\\instances\\3.png"
    study = f'"S1": {{"ImagePath": ["{film}"]}}'
    path.write_text(f"{{{study}}}")
    _, got, _, _ = run(capsys, tmp_path, "rexgradient", path.parent)
    assert got[0]["image"] == "deid_png/GRDN1/GRDN2/studies/1/series/2/instances/3.png"
    path.write_text(f"{{{study}, {study}}}")
    code, got, _, err = run(capsys, tmp_path, "rexgradient", path.parent)
    assert code == 2 and got is None and "S1 stands twice" in err
