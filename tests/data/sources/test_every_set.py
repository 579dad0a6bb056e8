"""What holds for every data set: paths made of ids stay below the root, and `--out` is never a file of the set."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest
from made_tables import run, write_table

from cxr_jax.data.sources import sets
from cxr_jax.data.sources.__main__ import main
from cxr_jax.labels.taxonomy import CHEXPERT_14

BLANKS = [""] * len(CHEXPERT_14)
STUDY = "train/patient00001/study1"


def write_chexpert(root, film):
    header = ["Path", *CHEXPERT_14]
    rows = [[f"{STUDY}/view1_frontal.jpg", *BLANKS], [f"{film}/{STUDY}/view2.jpg", *BLANKS]]
    write_table(root / "train.csv", header, rows)
    return root / "train.csv"


def write_chexpert_test(root, film):
    rows = [[f"{STUDY}/view1_frontal.jpg", *BLANKS], [f"{film}/{STUDY}/view2.jpg", *BLANKS]]
    write_table(root / "test_labels.csv", ["Path", *CHEXPERT_14], rows)
    return root / "test_labels.csv"


def write_chexpert_plus(root, film):
    rows = [[f"{STUDY}/view1.jpg", "train"], [f"{film}/{STUDY}/view2.jpg", "train"]]
    write_table(root / "df_chexpert_plus_240401.csv", ["path_to_image", "split"], rows)
    return root / "df_chexpert_plus_240401.csv"


def write_mimic(root, film):
    rows = [["a-b", "10000001", "50000001"], [film, "10000001", "50000002"]]
    path = root / "mimic-cxr-2.0.0-metadata.csv"
    write_table(path, ["dicom_id", "subject_id", "study_id"], rows)
    return path


def write_nih(root, film):
    rows = [["00000001_000.png", "Mass", "1"], [film, "Mass", "2"]]
    write_table(root / "Data_Entry_2017.csv", ["Image Index", "Finding Labels", "Patient ID"], rows)
    return root / "Data_Entry_2017.csv"


def write_vindr(root, film):
    rows = [["a" * 32, "No finding", "R1"], [film, "No finding", "R2"]]
    write_table(root / "train.csv", ["image_id", "class_name", "rad_id"], rows)
    return root / "train.csv"


def write_padchest(root, film):
    header = ["ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Labels"]
    rows = [["a.png", "0", "1", "1", "PA", "['mass']"], ["b.png", film, "2", "2", "PA", "['mass']"]]
    write_table(root / "PADCHEST_labels.csv", header, rows)
    return root / "PADCHEST_labels.csv"


def write_padchest_gr(root, film):
    rows = [["1", "a.png", "1", "mass"], ["2", film, "2", "mass"]]
    write_table(root / "master_table.csv", ["StudyID", "ImageID", "PatientID", "label"], rows)
    return root / "master_table.csv"


def write_openi(root, film):
    write_table(root / "indiana_reports.csv", ["uid", "MeSH"], [["1", "normal"], ["2", "normal"]])
    rows = [["1", "a.png", "Frontal"], ["2", film, "Frontal"]]
    write_table(root / "indiana_projections.csv", ["uid", "filename", "projection"], rows)
    return root / "indiana_projections.csv"


def write_brax(root, film):
    header = ["PngPath", "PatientID", "AccessionNumber", *CHEXPERT_14]
    rows = [["images/a.png", "1", "1", *BLANKS], [film, "2", "2", *BLANKS]]
    write_table(root / "master_spreadsheet_update.csv", header, rows)
    return root / "master_spreadsheet_update.csv"


def write_rsna(root, film):
    rows = [["a", "", "", "", "", "0"], [film, "", "", "", "", "0"]]
    header = ["patientId", "x", "y", "width", "height", "Target"]
    write_table(root / "stage_2_train_labels.csv", header, rows)
    return root / "stage_2_train_labels.csv"


def write_siim(root, film):
    write_table(
        root / "train-rle.csv", ["ImageId", " EncodedPixels"], [["1.2.3", "-1"], [film, "1 2"]]
    )
    return root / "train-rle.csv"


def write_rexgradient(root, film):
    path = "{}deid_png/GRDN1/GRDN2/studies/1/series/2/instances/{}.png"
    studies = [{"ImagePath": [path.format(*made)]} for made in (("../", 1), (f"{film}/", 2))]
    root.mkdir(parents=True)
    (root / "train_metadata.json").write_text(json.dumps({"S1": studies[0], "S2": studies[1]}))
    return root / "train_metadata.json"


def write_nv_reason(root, film):
    asked = [{"from": "human", "value": "Find."}]
    rows = [
        {"id": name, "image": name, "conversations": asked, "solution": "Edema"}
        for name in ("patient1/study1/view1_frontal.jpg", film)
    ]
    root.mkdir(parents=True)
    (root / "grpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "grpo.jsonl"


WRITERS = {
    name: globals()[f"write_{name}"]
    for name in sets.SETS
    # Of tfds the tables are not ours: a file of its own tests it.
    if name != "tfds"
}
# Sets whose files have no lines, and what they say instead.
PLACES = {"rexgradient": ": study 2 (S2): "}


@pytest.mark.parametrize("film", ["../../etc", "a/../..", "/etc", "https://a.org/b"])
@pytest.mark.parametrize("name", WRITERS)
def test_no_film_is_outside_the_root(capsys, tmp_path, name, film):
    table = WRITERS[name](tmp_path / "set", film)
    # NV-Reason's own rows begin with a slash, which stands for the root.
    if (name, film) == ("nv_reason", "/etc"):
        film = "//etc"
    code, rows, out, err = run(capsys, tmp_path, name, tmp_path / "set")
    if name == "nv_reason" and code == 0:
        assert not any(row["image"].startswith(("/", ".")) for row in rows)
        return
    assert code == 2 and rows is None and not out and err.count("\n") == 1
    place = PLACES.get(name, f":{3 if table.suffix == '.csv' else 2}: ")
    assert err.startswith(f"error: {table}{place}") and "image" in err


@pytest.mark.parametrize("name", WRITERS)
def test_out_is_never_a_file_of_the_set(capsys, tmp_path, name):
    root = tmp_path / "set"
    table = WRITERS[name](root, "b/c.png")
    beside = root / "masks.csv"
    beside.write_text("a,b\n")
    link = tmp_path / "link.jsonl"
    link.symlink_to(table)
    before = {path: path.read_bytes() for path in (table, beside)}
    for out in (table, beside, link, root, "", tmp_path / "none/rows.jsonl", f"{table}/rows"):
        assert main([name, str(root), f"--out={out}"]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and not printed.out
    assert {path: path.read_bytes() for path in before} == before
    # A file of rows may be written again, inside the set, too.
    for _ in range(2):
        assert main([name, str(root), f"--out={root}/rows.jsonl"]) == 0
    assert (root / "rows.jsonl").read_text().count("\n") == 2
    assert not list(tmp_path.rglob("*.partial"))


def test_out_may_be_a_pipe_or_a_link(tmp_path):
    write_siim(tmp_path / "set", "1.2.4")
    pipe, target, link = (tmp_path / name for name in ("pipe", "rows.jsonl", "link.jsonl"))
    os.mkfifo(pipe)
    link.symlink_to(target)
    target.write_text("")
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    assert main(["siim", str(tmp_path / "set"), f"--out={pipe}"]) == 0
    reader.join(10)
    assert main(["siim", str(tmp_path / "set"), f"--out={link}"]) == 0
    assert got == [target.read_text()] and got[0].count("\n") == 2
    assert link.is_symlink() and pipe.is_fifo()


@pytest.mark.parametrize("kind", ["closed", "full"])
def test_stdout_that_takes_nothing_is_one_line(tmp_path, monkeypatch, capsys, kind):
    if kind == "full" and not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full")
    write_siim(tmp_path / "set", "1.2.4")
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open("/dev/full" if kind == "full" else write_end, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["siim", str(tmp_path / "set"), f"--out={tmp_path}/rows.jsonl"]) == 1
    # Rows are there: who reads the summary has them.
    err = capsys.readouterr().err
    assert err.startswith("error: stdout cannot be written") and err.count("\n") == 1
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 2


def test_a_damaged_list_beside_the_tables_is_refused_before_rows_are_written(capsys, tmp_path):
    root = tmp_path / "set"
    write_mimic(root, "c-d")
    listed = root / "mimic-cxr-2.1.0-test-set-labeled.csv"
    listed.write_text("study_id,Edema\n50000001\n")
    code, rows, out, err = run(capsys, tmp_path, "mimic", root)
    assert code == 2 and rows is None and not out and f"{listed}:2: " in err


@pytest.mark.parametrize(
    "name, flags, rows",
    [
        ("padchest", [], ["a.png|0|1|1|PA|['exclude']", "b.png|0|1|1|EXCLUDE|['mass']"]),
        ("padchest", ["--labels=physician"], ["a.png|0|1|1|PA|['mass']"]),
        ("rexgradient", [], ""),
    ],
)
def test_a_set_of_which_no_film_is_left(capsys, tmp_path, name, flags, rows):
    header = ["ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Labels"]
    write_table(tmp_path / "set/PADCHEST_labels.csv", header, rows)
    (tmp_path / "set/train_metadata.json").write_text('{"S1": {"ImagePath": []}}')
    code, got, out, err = run(capsys, tmp_path, name, tmp_path / "set", *flags)
    assert code == 2 and got is None and not out and err.count("\n") == 1
    assert "no film is left" in err


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("root", ["x" * 300, "/dev/null", "none"])
def test_roots_that_are_none(capsys, tmp_path, name, root):
    code, rows, out, err = run(capsys, tmp_path, name, tmp_path / root)
    assert code == 2 and rows is None and not out and err.count("\n") == 1


def test_the_folder_of_a_split_as_the_working_folder(capsys, tmp_path, monkeypatch):
    write_chexpert(tmp_path / "set", "b")
    (tmp_path / "set/train").mkdir()
    monkeypatch.chdir(tmp_path / "set/train")
    code, rows, _, _ = run(capsys, tmp_path, "chexpert", ".")
    assert code == 0 and len(rows) == 2


def test_labels_of_another_patients_study(capsys, tmp_path):
    table = write_mimic(tmp_path / "set", "c-d")
    labels = table.with_name("mimic-cxr-2.0.0-chexpert.csv")
    rows = [
        [patient, f"5000000{number}", *BLANKS] for number, patient in ((1, "10000001"), (2, "9"))
    ]
    write_table(labels, ["subject_id", "study_id", *CHEXPERT_14], rows)
    code, got, _, err = run(capsys, tmp_path, "mimic", tmp_path / "set")
    assert code == 2 and got is None and f"{labels}:3: the study is another patient's" in err


def test_mimic_ids_with_letters_and_suffixes(capsys, tmp_path):
    table = write_mimic(tmp_path / "set", "c-d")
    split = [
        ["a-b.dcm", "p10000001", "s50000001", "train"],
        ["c-d", "10000001", "50000002", "test"],
    ]
    columns = ["dicom_id", "subject_id", "study_id", "split"]
    write_table(table.with_name("mimic-cxr-2.0.0-split.csv"), columns, split)
    labels = [["p10000001", "s50000001", *["1"] * len(CHEXPERT_14)]]
    columns = ["subject_id", "study_id", *CHEXPERT_14]
    write_table(table.with_name("mimic-cxr-2.0.0-chexpert.csv"), columns, labels)
    _, rows, _, _ = run(capsys, tmp_path, "mimic", tmp_path / "set")
    assert [row["split"] for row in rows] == ["train", "test"]
    assert [row["labels"]["Edema"] for row in rows] == [1, None]
