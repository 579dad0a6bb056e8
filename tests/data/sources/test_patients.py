"""Whose film a row is: columns, paths, spellings of one id, and the groups of a split."""

import json
import random

import numpy as np
import pytest
from PIL import Image
from places import SHARED

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.sources import label_table, manifest, patients, splits
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

COLUMNS = (
    *("subject_id", "PatientID", "patientId", "Patient ID", "patient", "deid_patient_id"),
    *("patient_id", "PATIENT-ID", "Subject", " patientid ", "empi_anon", "MRN", "participant_id"),
)


@pytest.mark.parametrize("column", COLUMNS)
def test_usual_columns_name_the_patient(column):
    assert patients.find_patient({"file": "a.png", column: "17"}, ["a.png"]) == "17"


PATHS = {
    "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg": "patient00001",
    "train\\Patient00042\\study2\\view1.jpg": "Patient00042",
    "files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg": "10000032",
    "p10000032_s50414267_02aa.jpg": "10000032",
    "images_001/images/00000001_000.png": "00000001",
    "nih_00030805_012.jpg": "00030805",
    "images/id_4723ff335fd9618/Study_1034.1/Series_6/image-5.png": "4723ff335fd9618",
    "deid_png/GRDN0000T9Y8/GRDNMMCD/studies/1.2/series/1.3/instances/1.4.png": "GRDN0000T9Y8",
    "sub-S03044/ses-E07985/mod-rx/sub-S03044_ses-E07985_run-1_cxr.png": "S03044",
    "CXR1_1_IM-0001-3001.png": "CXR1",
}


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_public_sets_name_the_patient(path):
    assert patients.find_patient({}, ["row 1", path]) == PATHS[path]


@pytest.mark.parametrize(
    "path",
    [
        "f00.png",
        "20200101_001.png",
        "3188870004903617730279236387173547684_11d7103e.png",
        "07176aab623c6d34bff853ff7d4085b7.dicom",
        "outpatient12.png",
    ],
)
def test_other_paths_name_nobody(path):
    assert patients.find_patient({}, [path]) is None


@pytest.mark.parametrize(
    "value, text",
    [
        (" 12345.0 ", "12345"),
        (12345.0, "12345"),
        ("1.0000032e+07", "10000032"),
        ("1,2345E+04", "12345"),
        *((name, name) for name in ("80e12345", "3e16", "7e20", "12e3", "12e+3", "1e+2345")),
        ("00012", "00012"),
        (7, "7"),
        ("007Y", "007Y"),
        *((blank, None) for blank in ("", " ", "nan", float("nan"), "None", None, "Unknown", True)),
    ],
)
def test_ids_are_read_as_text(value, text):
    assert patients.clean_id(value) == text


@pytest.mark.parametrize("value", ["2.3437158656203213e+35", 2.3437158656203213e35, "1.5e-3e5"])
def test_rounded_ids_are_refused(value):
    if value == "1.5e-3e5":
        assert patients.clean_id(value) == value  # no number at all
        return
    with pytest.raises(patients.LostDigitsError, match="rounded"):
        patients.clean_id(value)


def spellings(number: int, draw: random.Random) -> str | int | float:
    """One id as different programs write it."""
    return draw.choice(
        [
            number,
            float(number),
            f"{number:08d}",
            f" {number}",
            f"patient{number:05d}",
            f"P{number:03d}",
            f"Patient {number}",
            f"{number}.0",
        ]
    )


@pytest.mark.parametrize("seed", range(5))
def test_spellings_of_one_id_are_never_two_patients(tmp_path, seed):
    """Any mixture of columns and spellings: as many groups as patients, none on two sides of the three."""
    draw = random.Random(seed)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    rows = []
    for index in range(120):
        column = draw.choice(["patient_id", "subject_id", "PatientID", "deid_patient_id"])
        row = {"id": f"row {index}", "image": "a.png", column: spellings(index % 20, draw)}
        if draw.random() < 0.3:
            row = {"id": f"row {index}", "image": "a.png", "image_name": "x"}
            row["id"] = f"patient{index % 20:05d}/study{index}/view1_frontal.jpg"
        talk = [{"from": "human", "value": "Find."}]
        rows.append(row | {"conversations": talk, "solution": "Edema"})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_splits(tmp_path, seed=seed)
    parts = [opened.train, *opened.select.values(), *opened.test.values()]
    groups = [{row.group for row in part.rows} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    numbers = [
        {int(row.id.split("/")[0][7:]) for row in part.rows if "/" in row.id} for part in parts
    ]
    assert sum(map(len, numbers)) == len(set.union(*numbers))


def open_splits(folder, **data):
    facts = {"source": "files", "manifest": str(folder / "m.jsonl"), "image_root": str(folder)}
    return splits.open_splits(DataConfig.with_defaults(**facts, size=56, **data))


def write_rows(folder, count, **fields):
    rows = []
    for index in range(count):
        name = f"{index}.png"
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(folder / name)
        talk = [{"from": "human", "value": "Find."}]
        row = {"id": str(index), "image": name, "conversations": talk, "solution": "Edema"}
        rows.append(row | {key: value(index) for key, value in fields.items()})
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_prints_the_groups_of_its_split(tmp_path):
    write_rows(tmp_path, 24, patient_id=lambda index: index // 2)
    opened = open_splits(tmp_path)
    assert opened.about[0] == (
        "data: 24 rows of 12 patients; patients (rows): train 8 (16), selection 1 (2), test 3 (6)"
    )
    assert not any("patient" in warning for warning in opened.warnings)


@pytest.mark.parametrize("known", [0, 5])
def test_unknown_patients_are_said_in_one_line(tmp_path, known):
    write_rows(tmp_path, 12, patient_id=lambda index: index if index < known else None)
    opened = open_splits(tmp_path)
    [warning] = [line for line in opened.warnings if "patient" in line]
    assert ("any row" if not known else "7 of 12 rows") in warning and "\n" not in warning
    assert "12 groups" in opened.about[0]


def test_rows_of_one_file_are_one_group_where_no_patient_is_known(tmp_path):
    write_rows(tmp_path, 12, image=lambda index: f"{index // 3}.png")
    rows = manifest.load_rows(tmp_path / "m.jsonl", tmp_path)
    assert len({row.group for row in rows}) == 4
    opened = open_splits(tmp_path)
    parts = [opened.train, *opened.select.values(), *opened.test.values()]
    files = [{row.image_path for row in part.rows} for part in parts]
    assert sum(map(len, files)) == len(set.union(*files)) == 4


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_no_patient_both_chooses_a_checkpoint_and_tests_it(tmp_path, count):
    write_rows(tmp_path, count, patient_id=lambda index: index)
    if count == 1:
        with pytest.raises(UserError, match="patients are needed"):
            open_splits(tmp_path)
        return
    opened = open_splits(tmp_path)
    [*warnings] = (line for line in opened.warnings if "two patients" in line)
    assert len(warnings) == (count == 2)
    if count == 2:
        return
    parts = [opened.train, *opened.select.values(), *opened.test.values()]
    groups = [{row.group for row in part.rows} for part in parts]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups)) == count


def test_a_table_without_patients_says_so(tmp_path, capsys):
    table = tmp_path / "t.csv"
    lines = [",".join(["file", *CHEXPERT_14])]
    lines += [",".join([f"{i}.png", *["0"] * 13, "1"]) for i in range(3)]
    table.write_text("\n".join(lines))
    assert label_table.main([str(table), str(tmp_path / "o.jsonl")]) == 0
    out, err = capsys.readouterr()
    assert "0 patients, 3 rows of no known patient" in out
    assert err.count("\n") == 1 and "no column and no path names a patient" in err


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
def test_patients_of_the_given_tables(tmp_path, capsys):
    counts = {"cases/tables/patientid.csv": 6, "films/manifest.csv": 844}
    for name, count in counts.items():
        out = tmp_path / "o.jsonl"
        assert label_table.main([str(SHARED / name), str(out)]) == 0
        assert f"; {count} patients\n" in capsys.readouterr().out
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(row["patient_id"] for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
