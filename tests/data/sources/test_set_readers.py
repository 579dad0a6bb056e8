"""The reader of each data set, by rows made up here: published quirks, other spellings of a table."""

import csv
import json
import random

import pytest
from made_tables import SPELLINGS, STATES, cells_of, run, write_table

from cxr_jax.data.sources import sets
from cxr_jax.labels.taxonomy import CHEXPERT_14


def made_states(generator, cells=("1.0", "0.0", "-1.0", "", "", "")):
    return [generator.choice(cells) for _ in CHEXPERT_14]


def truth(cells):
    return [STATES[cell] for cell in cells]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_chexpert_tables(capsys, tmp_path, spelling):
    generator = random.Random(spelling)
    rows, wanted = [], []
    for patient in range(30):
        for study in range(1, generator.randint(2, 4)):
            states = made_states(generator)
            for view in range(1, generator.randint(2, 4)):
                side = generator.choice(("Frontal", "Lateral"))
                way = generator.choice(("AP", "PA", "LL", "RL")) if side == "Frontal" else ""
                name = f"patient{patient:05d}/study{study}"
                path = f"CheXpert-v1.0/train/{name}/view{view}_{side.lower()}.jpg"
                rows.append([path, "Male", "54", side, way, *states])
                shown = way if way in ("AP", "PA") else "UNKNOWN" if way else "LATERAL"
                wanted.append((path, name.split("/")[0], name, shown, "train", truth(states)))
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_14]
    # Labels of the study stand on every film of it.
    # Of CheXpert the files lie at the root, or in the folder that paths begin with.
    folder = tmp_path / "set" / generator.choice(("", "CheXpert-v1.0"))
    write_table(folder / "train.csv", header, rows, spelling)
    code, got, _, err = run(capsys, tmp_path, "chexpert", tmp_path / "set")
    assert (code, err) == (0, "") and list(map(cells_of, got)) == wanted


def test_chexpert_test_films_where_folders_are_there(capsys, tmp_path):
    states = [["0"] * 14, ["1", *["0"] * 13]]
    studies = [f"CheXpert-v1.0/test/patient{number}/study1" for number in (64741, 64742)]
    rows = [[study, *row] for study, row in zip(studies, states, strict=True)]
    write_table(tmp_path / "set/groundtruth.csv", ["Study", *CHEXPERT_14], rows)
    # A reader's table beside it is left alone.
    write_table(tmp_path / "set/bc4.csv", ["Study", *CHEXPERT_14], [[studies[0], *["1"] * 14]])
    # No folders: the studies are the rows.
    code, got, out, _ = run(capsys, tmp_path, "chexpert_test", tmp_path / "set")
    assert [row["image"] for row in got] == studies and "rows are studies" in out
    assert [row["view"] for row in got] == ["", ""]
    for number, names in (
        (64741, ("view1_frontal.jpg", "view2_lateral.jpg")),
        (64742, ("view1_frontal.jpg",)),
    ):
        folder = tmp_path / f"set/test/patient{number}/study1"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(b"")
    code, got, out, _ = run(capsys, tmp_path, "chexpert_test", tmp_path / "set")
    assert code == 0 and "all are there" in out
    assert [(row["image"], row["view"], row["labels"]["No Finding"]) for row in got] == [
        (f"{studies[0]}/view1_frontal.jpg", "FRONTAL", 0),
        (f"{studies[0]}/view2_lateral.jpg", "LATERAL", 0),
        (f"{studies[1]}/view1_frontal.jpg", "FRONTAL", 1),
    ]
    # The test set as it is downloaded: a row a film.
    films = [
        [f"{study.removeprefix('CheXpert-v1.0/')}/view1_frontal.jpg", *row]
        for study, row in zip(studies, states, strict=True)
    ]
    write_table(tmp_path / "aimi/test_labels.csv", ["Path", *CHEXPERT_14], films)
    code, got, _, _ = run(capsys, tmp_path, "chexpert_test", tmp_path / "aimi")
    assert [row["image"] for row in got] == [film[0] for film in films]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_mimic_tables(capsys, tmp_path, spelling):
    generator = random.Random(spelling)
    metadata, splits, label_rows, wanted = [], [], [], []
    for number in range(25):
        patient, study = f"9900{number:04d}", f"5000{number:04d}"
        # Some studies have no labels, some films no split.
        states = made_states(generator) if number % 5 else None
        if states:
            label_rows.append([patient, study, *states])
        for film in range(generator.randint(1, 3)):
            dicom = f"{number:08x}-{film:08x}"
            view, shown = generator.choice(
                (
                    ("PA", "PA"),
                    ("AP", "AP"),
                    ("LL", "LATERAL"),
                    ("LATERAL", "LATERAL"),
                    ("", "UNKNOWN"),
                    ("LAO", "UNKNOWN"),
                )
            )
            metadata.append([dicom, patient, study, view, "21800506", "213014.531"])
            split = generator.choice(("train", "validate", "test", ""))
            if split:
                splits.append([dicom, study, patient, split])
            path = f"files/p99/p{patient}/s{study}/{dicom}.jpg"
            wanted.append((path, patient, study, shown, split, truth(states or [""] * 14)))
    # Releases keep the old number in their names, or not.
    root, release = tmp_path / "set", generator.choice(("2.0.0", "2.1.0"))
    header = ["dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime"]
    write_table(root / f"mimic-cxr-{release}-metadata.csv", header, metadata, spelling)
    write_table(
        root / f"mimic-cxr-{release}-split.csv",
        ["dicom_id", "study_id", "subject_id", "split"],
        splits,
        spelling,
    )
    write_table(
        root / f"mimic-cxr-{release}-chexpert.csv",
        ["subject_id", "study_id", *CHEXPERT_14],
        label_rows,
        spelling,
    )
    code, got, out, err = run(capsys, tmp_path, "mimic", root)
    assert (code, err) == (0, "") and list(map(cells_of, got)) == wanted
    assert "without a row of labels" in out
    # Radiologists' labels, under an older name of one of them.
    names = ["Airspace Opacity" if label == "Lung Opacity" else label for label in CHEXPERT_14]
    write_table(
        root / "mimic-cxr-2.1.0-test-set-labeled.csv",
        ["study_id", *names],
        [[wanted[0][2], *["1"] * 14]],
    )
    code, got, _, _ = run(capsys, tmp_path, "mimic", root, "--labels=test")
    assert set(got[0]["labels"].values()) == {1} and set(got[-1]["labels"].values()) == {None}


def test_ids_that_a_program_has_written_as_floats(capsys, tmp_path):
    root = tmp_path / "set"
    write_table(
        root / "mimic-cxr-2.0.0-metadata.csv",
        ["dicom_id", "subject_id", "study_id", "ViewPosition"],
        [["a-b", "99000001", "99100001", "PA"]],
    )
    path = "mimic-cxr-2.0.0-chexpert.csv"
    write_table(
        root / path,
        ["subject_id", "study_id", *CHEXPERT_14],
        [["99000001.0", "99100001.0", *["1.0"] * 14]],
    )
    # A whole float is joined to the id.
    _, got, _, _ = run(capsys, tmp_path, "mimic", root)
    assert set(got[0]["labels"].values()) == {1}
    write_table(
        root / path, ["subject_id", "study_id", *CHEXPERT_14], [["1", "1.0512e+35", *["1.0"] * 14]]
    )
    # A rounded one is somebody else's, perhaps.
    code, got, _, err = run(capsys, tmp_path, "mimic", root)
    assert code == 2 and got is None and f"{root / path}:2: study_id is a rounded number" in err


def test_nih_lists_boxes_and_radiologists(capsys, tmp_path):
    root = tmp_path / "set"
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    )
    # Old ages, spaces around bars, a label that maps to nothing, blank cells.
    named = ("Effusion|Infiltration", "No Finding", "Hernia", "Nodule | Mass")
    cases = zip(named, ("058Y", "41", "3", ""), ("AP", "PA", "", "PA"), strict=True)
    rows = [
        [f"0000000{n}_000.png", labels, "0", str(n), age, "F", view]
        for n, (labels, age, view) in enumerate(cases)
    ]
    write_table(root / "Data_Entry_2017.csv", header, rows)
    # The last film is in neither list.
    (root / "train_val_list.txt").write_text("00000000_000.png\n00000001_000.png\n")
    (root / "test_list.txt").write_text("00000002_000.png\r\n")
    (root / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000000_000.png,Infiltrate,512,0,256,1024\n"
    )
    code, got, _, _ = run(capsys, tmp_path, "nih", root)
    assert [row["split"] for row in got] == ["train", "train", "test", ""]
    positive = [[label for label, state in row["labels"].items() if state == 1] for row in got]
    assert positive == [["Pleural Effusion"], ["No Finding"], [], ["Lung Lesion"]]
    assert got[2]["labels"]["No Finding"] == 0 and got[2]["labels"]["Fracture"] is None
    films = sets.open_films("nih", root)
    assert films.boxes[0] == (("Infiltrate", 0.5, 0.0, 0.25, 1.0),) and films.boxes[1] == ()
    assert got[0]["boxes"] == [[0.5, 0.0, 0.25, 1.0]] and "boxes" not in got[1]
    assert films.ages[:3].tolist() == [58, 41, 3] and films.ages[3] != films.ages[3]
    google = f"{header},Fracture,Pneumothorax,Airspace opacity,Nodule or mass,Set Id"
    write_table(
        root / "google2019_nih-chest-xray-labels.csv",
        google,
        [[*rows[0], "NO", "YES", "NO", "NO", "test"]],
        "gzip",
    )
    _, got, out, _ = run(capsys, tmp_path, "nih", root, "--labels=google")
    known = {label: state for label, state in got[0]["labels"].items() if state is not None}
    assert known == {"Fracture": 0, "Pneumothorax": 1, "Lung Opacity": 0, "Lung Lesion": 0}
    assert "radiologists" in out and got[0]["split"] == "test"


def test_vindr_readers(capsys, tmp_path):
    """Random readings against a count by hand of one label, and of one that two source labels assert."""
    with open(sets.__file__.replace("sets/__init__.py", "maps/vindr_v1.csv"), newline="") as file:
        sources = list(dict.fromkeys(row["source"] for row in csv.DictReader(file)))
    generator = random.Random(3)
    rows, wanted = [], []
    for number in range(40):
        film = f"{number:032x}"
        readings = [[generator.choice("00001") for _ in sources] for _ in range(3)]
        rows += [[film, f"R{reader}", *reading] for reader, reading in enumerate(readings)]
        votes = {s: sum(r[i] == "1" for r in readings) for i, s in enumerate(sources)}
        per_source = {s: 1 if count >= 2 else -1 if count else 0 for s, count in votes.items()}
        # One source label, two of them, and one that another hides.
        edema = per_source["Edema"]
        both = (per_source["Rib fracture"], per_source["Clavicle fracture"])
        fracture = 1 if 1 in both else -1 if -1 in both else 0
        pneumonia = per_source["Pneumonia"] or (None if votes["Tuberculosis"] else 0)
        wanted.append((film, edema, fracture, pneumonia))
    names = [name.replace("Other diseases", "Other disease") for name in sources]
    # Readings of a film lie apart in the published table.
    generator.shuffle(rows)
    write_table(
        tmp_path / "set/annotations/image_labels_train.csv", ["image_id", "rad_ID", *names], rows
    )
    _, got, out, _ = run(capsys, tmp_path, "vindr", tmp_path / "set")
    found = {r["id"]: [r["labels"][x] for x in ("Edema", "Fracture", "Pneumonia")] for r in got}
    assert found == {film: list(states) for film, *states in wanted}
    assert "no patients" in out and {row["view"] for row in got} == {"PA"}
    # A reading twice would be a reader more.
    rows.append(rows[0])
    write_table(
        tmp_path / "set/annotations/image_labels_train.csv", ["image_id", "rad_ID", *names], rows
    )
    code, _, _, err = run(capsys, tmp_path, "vindr", tmp_path / "set")
    assert code == 2 and ":122: the reading is that of line 2" in err


def test_padchest_labels(capsys, tmp_path):
    # The first published column has no name.
    header = ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
    header += "Projection,Pediatric,Report,MethodLabel,Labels"
    blank = dict.fromkeys(CHEXPERT_14)
    unchanged = {"Pneumothorax": 1, "Pleural Effusion": 1, "Edema": None, "No Finding": None}
    cases = {
        # Not by substring: a mass of soft tissue is none of the lung.
        "[' pneumothorax', 'soft tissue mass', '']": {"Pneumothorax": 1, "Lung Lesion": 0},
        "['hydropneumothorax', 'unchanged']": unchanged,
        "nan": blank,
        "['']": blank,
        "['NORMAL', 'suboptimal study']": {"No Finding": 1, "Edema": 0},
        # A blocked label is unknown; what the map does not have may be any that seems absent.
        "['costophrenic angle blunting', 'kyphosis']": {"Pleural Effusion": None, "Edema": 0},
        "['pneumonia', 'never heard of']": {"Pneumonia": 1, "Edema": None},
        "['exclude', 'pneumonia']": None,
    }
    ways = ("PA", "AP_horizontal", "L", "COSTAL", "UNK", "PA", "PA", "PA")
    rows = [
        f"{n}|f{n}.png|7|20140915|{f'{n}' * 38}|{f'9{n}' * 18}|1950.0|F|{way}|No|sin|Physician|{labels}"
        for n, (way, labels) in enumerate(zip(ways, cases, strict=True))
    ]
    # Two that a network read: one no film of a chest.
    rows += [
        f"{n}|f{n}.png|0|20140915|9|9||O|{way}|PED||RNN_model|['normal']"
        for n, way in ((9, "EXCLUDE"), (10, "PA"))
    ]
    path = tmp_path / "set/PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    write_table(path, header, rows, "gzip")
    code, got, out, _ = run(capsys, tmp_path, "padchest", tmp_path / "set")
    assert code == 0 and [row["image"] for row in got] == [
        *(f"7/f{n}.png" for n in range(7)),
        "0/f10.png",
    ]
    assert [row["view"] for row in got[:5]] == ["PA", "AP", "LATERAL", "UNKNOWN", "UNKNOWN"]
    assert got[3]["patient_id"] == "93" * 18 and got[3]["study_id"] == "3" * 38
    for row, wanted in zip(got[:7], list(cases.values())[:7], strict=True):
        assert wanted.items() <= row["labels"].items()
    for line in (
        "left out: 1 rows: label exclude",
        "left out: 1 rows: projection EXCLUDE",
        "1 labels are not in the map",
    ):
        assert line in out
    _, got, _, _ = run(capsys, tmp_path, "padchest", tmp_path / "set", "--labels=physician")
    assert len(got) == 7
    # A cell that would do something if it were run.
    rows[0] = rows[0].rpartition("|")[0] + "|['a', open('x')]"
    write_table(path, header, rows, "gzip")
    code, _, _, err = run(capsys, tmp_path, "padchest", tmp_path / "set")
    assert code == 2 and ".gz:2: Labels is no list of labels" in err


def test_rsna_without_classes_and_contradictions(capsys, tmp_path):
    root = tmp_path / "set"
    # Two boxes of one film are one row.
    rows = ["a|||||0", "b|256|0|512|1024|1", "b|1|1|1|1|1"]
    write_table(root / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", rows)
    _, got, out, _ = run(capsys, tmp_path, "rsna", root)
    assert [(row["labels"]["Lung Opacity"], row["labels"]["No Finding"]) for row in got] == [
        (0, None),
        (1, 0),
    ]
    assert len(sets.open_films("rsna", root).boxes[1]) == 2 and "no patients" in out
    write_table(
        root / "stage_2_detailed_class_info.csv", ["patientId", "class"], [["a", "Lung Opacity"]]
    )
    # The class says an opacity, the target none.
    code, _, _, err = run(capsys, tmp_path, "rsna", root)
    assert code == 2 and "stage_2_detailed_class_info.csv:2: " in err


def test_siim_masks(capsys, tmp_path):
    # Several masks of one film are one row.
    rows = [["1.2.3", " -1"], ["1.2.4", " 5 6"], ["1.2.4", "7 8"]]
    write_table(tmp_path / "set/train-rle.csv", ["ImageId", " EncodedPixels"], rows)
    folder = tmp_path / "set/dicom-images-train/study/series"
    folder.mkdir(parents=True)
    (folder / "1.2.4.dcm").write_bytes(b"")
    _, got, out, _ = run(capsys, tmp_path, "siim", tmp_path / "set")
    assert [row["labels"]["Pneumothorax"] for row in got] == [0, 1]
    assert (
        got[1]["image"] == "dicom-images-train/study/series/1.2.4.dcm" and "1 are not there" in out
    )


def test_openi_in_both_layouts(capsys, tmp_path):
    # The second has no findings, the third was not read for its terms.
    reports = ("1|Cardiomegaly/mild;Thickening/pleura||Big heart.|||", "2|normal|normal||Clear.||")
    reports += ("3|No Indexing||x|||",)
    header = "uid,MeSH,Problems,findings,impression,indication,comparison"
    write_table(tmp_path / "kaggle/indiana_reports.csv", header, reports)
    films = ["1|1_IM.png|Frontal", "1|1_IM2.png|Lateral", "2|2_IM.png|Frontal", "3|3.png|Frontal"]
    write_table(tmp_path / "kaggle/indiana_projections.csv", "uid,filename,projection", films)
    _, got, _, _ = run(capsys, tmp_path, "openi", tmp_path / "kaggle")
    assert [row["view"] for row in got] == ["FRONTAL", "LATERAL", "FRONTAL", "FRONTAL"]
    positive = [[label for label, state in row["labels"].items() if state == 1] for row in got]
    assert positive == [["Cardiomegaly", "Pleural Other"]] * 2 + [["No Finding"], []]
    assert set(got[3]["labels"].values()) == {None}
    terms = "<uId id='CXR7'/><MeSH><major>Pneumothorax/apex/left</major></MeSH>"
    xml = f"<e>{terms}<AbstractText Label='FINDINGS'>A.</AbstractText>{{}}</e>"
    folder = tmp_path / "xml/ecgen-radiology"
    folder.mkdir(parents=True)
    (folder / "7.xml").write_text(
        xml.format("<parentImage id='CXR7_IM-1'/><parentImage id='CXR7_IM-2'/>")
    )
    # A report without films.
    (folder / "8.xml").write_text(xml.format(""))
    _, got, out, _ = run(capsys, tmp_path, "openi", tmp_path / "xml")
    assert [(row["image"], row["patient_id"]) for row in got] == [
        ("NLMCXR_png/CXR7_IM-1.png", "7"),
        ("NLMCXR_png/CXR7_IM-2.png", "7"),
    ]
    assert (
        got[0]["labels"]["Pneumothorax"] == 1
        and "left out: 1 rows: reports without an image" in out
    )
    # A file that is cut off ends it: half a set would look whole.
    (folder / "9.xml").write_text("<e>")
    assert run(capsys, tmp_path, "openi", tmp_path / "xml")[0] == 2


def test_rexgradient_and_nv_reason(capsys, tmp_path):
    path = "../deid_png/GRDNP{0}/GRDNA{0}/studies/1/series/2/instances/{1}.png"
    study = {
        "ImagePath": [path.format(7, 0), path.format(7, 1)],
        "ImageViewPosition": [None, "PA"],
        "PatientAge": "002D",
        "Findings": float("nan"),
        "Impression": "Clear.",
    }
    folder = tmp_path / "rex/metadata"
    folder.mkdir(parents=True)
    (folder / "test_metadata.json").write_text(json.dumps({"S1": study}))
    _, got, _, _ = run(capsys, tmp_path, "rexgradient", tmp_path / "rex")
    assert [(row["patient_id"], row["study_id"], row["view"], row["split"]) for row in got] == [
        ("GRDNP7", "S1", "UNKNOWN", "test"),
        ("GRDNP7", "S1", "PA", "test"),
    ]
    assert got[0]["image"].startswith("deid_png/GRDNP7")
    # One step up is published, two leave the set.
    (folder / "test_metadata.json").write_text('{"S1": {"ImagePath": ["../../etc/passwd"]}}')
    assert run(capsys, tmp_path, "rexgradient", tmp_path / "rex")[0] == 2

    name = "test/patient64741/study1/view1_frontal.jpg"
    row = {
        "id": name,
        "image": f"images/CheXpert/{name}",
        "conversations": [{"from": "human", "value": "Find."}],
        "solution": "Edema, Lung Opacity",
    }
    (tmp_path / "nv").mkdir()
    (tmp_path / "nv/grpo.jsonl").write_text(json.dumps(row) + "\n")
    _, got, _, _ = run(capsys, tmp_path, "nv_reason", tmp_path / "nv")
    assert (got[0]["id"], got[0]["patient_id"], got[0]["solution"], got[0]["view"]) == (
        name,
        "patient64741",
        "Lung Opacity, Edema",
        "FRONTAL",
    )
    assert sum(got[0]["labels"].values()) == 2 and got[0]["prompt"].endswith("Find.")
