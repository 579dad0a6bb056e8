"""Cells that a map or rule does not know: refused with their line, or unknown; never a film without the finding."""

import numpy as np
import pytest
from made_tables import run, write_table

from cxr_jax.data.sources import sets
from cxr_jax.data.sources.films.tables import read_age
from cxr_jax.labels.taxonomy import CHEXPERT_14

NIH = ("nih", "Data_Entry_2017.csv", "Image Index,Finding Labels,Patient ID")
KAGGLE = ("vindr", "train.csv", "image_id,class_name,rad_id")
SIIM = ("siim", "train-rle.csv", "ImageId, EncodedPixels")
RSNA = ("rsna", "stage_2_train_labels.csv", "patientId,x,y,width,height,Target")
PADCHEST = "ImageID,ImageDir,StudyID,PatientID,Projection,Labels"


@pytest.mark.parametrize(
    "table, row, column",
    [
        *((NIH, f"b.png|{cell}|2", "Finding Labels") for cell in ("Atelectasis;Effusion", "Mas")),
        *((KAGGLE, f"b|{cell}|R1", "class_name") for cell in ("Heart big", "", "No findings")),
        *((SIIM, f"b|{cell}", "EncodedPixels") for cell in ("nan", "", "0", "-2", "1 -2", "foo")),
        *((RSNA, f"b|{x}|1|1|1|1", "x is") for x in ("-1", "inf", "left")),
        (RSNA, "b|||||2", "Target"),
    ],
    ids=str,
)
def test_cells_that_nobody_knows_are_refused(capsys, tmp_path, table, row, column):
    name, file, header = table
    first = {"nih": "a.png|Mass|1", "vindr": "a|No finding|R1", "siim": "a|-1", "rsna": "a|||||0"}
    # NIH's cells are divided by what divides cells here.
    cells = [text.split("|") for text in (first[name], row)]
    write_table(tmp_path / "set" / file, header, cells)
    code, rows, out, err = run(capsys, tmp_path, name, tmp_path / "set")
    assert code == 2 and rows is None and not out and err.count("\n") == 1
    assert f"{file}:3: " in err and column in err


@pytest.mark.parametrize("name", ["Weird", "", "Lung  opacities"])
def test_classes_of_rsna(capsys, tmp_path, name):
    write_table(tmp_path / "set" / RSNA[1], RSNA[2], ["a|||||0", "b|||||0"])
    rows = [["a", "no lung opacity/not normal"], ["b", name]]
    file = "stage_2_detailed_class_info.csv"
    write_table(tmp_path / "set" / file, ["patientId", "class"], rows)
    code, got, _, err = run(capsys, tmp_path, "rsna", tmp_path / "set")
    assert code == 2 and got is None and f"{file}:3: class" in err


def test_masks_as_programs_write_them(capsys, tmp_path):
    cells = ("-1", "-1.0", " -1", "557374 2 1015 8", "1 2 ")
    rows = [[f"f{number}", cell] for number, cell in enumerate(cells)]
    write_table(tmp_path / "set" / SIIM[1], SIIM[2], rows)
    _, got, _, _ = run(capsys, tmp_path, "siim", tmp_path / "set")
    assert [row["labels"]["Pneumothorax"] for row in got] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "labels, wanted",
    [
        ("['Unchanged', 'cardiomegaly']", {"Cardiomegaly": 1, "Edema": None}),
        ("[' UNCHANGED ']", {"Cardiomegaly": None}),
        # As numpy writes a list: two labels, not one.
        ("['cardiomegaly' 'nodule']", {"Cardiomegaly": 1, "Lung Lesion": 1, "Edema": 0}),
        ("['cardiomegaly'\n 'nodule']", {"Cardiomegaly": 1, "Lung Lesion": 1, "Edema": 0}),
        ("[\"cardiomegaly\", u'nodule',]", {"Cardiomegaly": 1, "Lung Lesion": 1, "Edema": 0}),
        ("['cardiomegalia', 'nodule']", {"Cardiomegaly": None, "Lung Lesion": 1, "Edema": None}),
        ("['cardiomegaly', 'nan']", {"Cardiomegaly": 1, "Edema": 0}),
        ("['Exclude', 'nodule']", None),
        ("['EXCLUDE ']", None),
    ],
)
def test_padchest_labels_in_other_spellings(capsys, tmp_path, labels, wanted):
    rows = [[f"{name}.png", "0", name, name, "PA", "['normal']"] for name in "ab"]
    rows[0][-1] = labels
    write_table(tmp_path / "set/PADCHEST_labels.csv", PADCHEST, rows)
    _, got, _, _ = run(capsys, tmp_path, "padchest", tmp_path / "set")
    assert len(got) == 1 + (wanted is not None)
    assert wanted is None or wanted.items() <= got[0]["labels"].items()


@pytest.mark.parametrize("labels", ["['a''b']", "['a' + 'b']", "['a', 1]", "'a'", "['a'", "[,]"])
def test_lists_that_are_none(capsys, tmp_path, labels):
    write_table(
        tmp_path / "set/PADCHEST_labels.csv", PADCHEST, [["a", "0", "1", "1", "PA", labels]]
    )
    code, _, _, err = run(capsys, tmp_path, "padchest", tmp_path / "set")
    assert code == 2 and ":2: Labels is no list of labels" in err


def test_rows_of_one_film_of_padchest_gr(capsys, tmp_path):
    header = "StudyID,ImageID,PatientID,label,split"
    rows = ["1|a.png|1|mass|train", "1|a.png|1|exclude|train", "2|b.png|2|normal|test"]
    write_table(tmp_path / "set/master_table.csv", header, rows)
    _, got, out, _ = run(capsys, tmp_path, "padchest_gr", tmp_path / "set")
    assert [row["id"] for row in got] == ["b.png"] and "label exclude" in out
    write_table(tmp_path / "set/master_table.csv", header, [*rows, "2|b.png|3|mass|test"])
    code, _, _, err = run(capsys, tmp_path, "padchest_gr", tmp_path / "set")
    assert code == 2 and ":5: the film of line 4 with another patient" in err


def test_nih_lists_and_boxes(capsys, tmp_path):
    root = tmp_path / "set"
    write_table(root / NIH[1], NIH[2], [[f"0000000{n}_000.png", "Mass", str(n)] for n in range(3)])
    # With a folder, without a suffix.
    (root / "train_val_list.txt").write_text("images\\00000000_000.png\n00000001_000\n")
    (root / "test_list.txt").write_text("images/00000002_000.png\n")
    _, got, _, _ = run(capsys, tmp_path, "nih", root)
    assert [row["split"] for row in got] == ["train", "train", "test"]
    boxes = root / "BBox_List_2017.csv"
    head = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
    boxes.write_text(f"{head}00000000_000.png,Mass,1,2,3,4\n00000009_000.png,Mass,1,2,3,4\n")
    _, _, out, _ = run(capsys, tmp_path, "nih", root)
    assert "1 films have boxes" in out and "1 films with boxes are not in the table" in out
    for text, line in (
        (head.replace("Image Index,Finding Label", "Finding Label,Image Index"), 1),
        ("00000000_000.png,Mass,1,2,3,4\n", 1),
        *((f"{head}00000000_000.png,Mass,1,2,{side},4\n", 2) for side in ("nan", "inf", "-3", "")),
    ):
        boxes.write_text(text)
        code, rows, _, err = run(capsys, tmp_path, "nih", root)
        assert code == 2 and rows is None and f"{boxes}:{line}: " in err


def test_googles_table_as_the_root(tmp_path):
    header = "Image Index,Finding Labels,Patient ID,Fracture,Pneumothorax,Airspace opacity,"
    path = tmp_path / "google.csv"
    write_table(path, header + "Nodule or mass,Set Id", ["a.png|Hernia|1|NO|YES|NO|NO|test"])
    films = sets.open_films("nih", path)
    assert films.splits.tolist() == ["test"] and "Google" in films.basis
    assert films.states[0, CHEXPERT_14.index("Pneumothorax")] == 1


@pytest.mark.parametrize(
    "text, years",
    [
        ("58", 58),
        ("058Y", 58),
        ("6 months", 0.5),
        ("1 month", 1 / 12),
        ("007M", 7 / 12),
        ("5 days", 5 / 365.25),
        ("2 Weeks", 14 / 365.25),
        ("3 yrs", 3),
        ("85 or more", 85),
        ("40 male", 40),
        ("months", None),
        ("1990", None),
    ],
)
def test_ages_with_units(text, years):
    found = read_age(text)
    assert np.isnan(found) if years is None else found == pytest.approx(years)
