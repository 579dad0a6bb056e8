"""The converter of label tables to manifests."""

import pytest
from places import SHARED

from cxr_jax.data.sources import label_table, manifest
from cxr_jax.labels.taxonomy import CHEXPERT_14


def table(tmp_path, *rows, header=("file", *CHEXPERT_14)):
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(",".join(row) for row in (header, *rows)) + "\n", encoding="utf-8")
    return path


def cells(**states):
    return [states.get(name.replace(" ", "_"), "") for name in CHEXPERT_14]


def test_converter_keeps_what_is_known(tmp_path, root, capsys):
    path = table(
        tmp_path,
        [
            "a.png",
            *cells(Edema="1.0", Fracture="0", Pneumonia="-1", Pleural_Other="U", Lung_Lesion="nan"),
        ],
        ["b.png", *cells(No_Finding="1", Support_Devices="1")],
        ["c.png", *cells(Fracture="0")],
        ["d.png", *cells(No_Finding="1", Edema="1")],
    )
    out = tmp_path / "out.jsonl"
    assert label_table.main([str(path), str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        "2 rows" in said
        and "1 left out: no label" in said
        and "1 left out: No Finding together" in said
    )
    one, two = manifest.load_rows(out, root)
    assert one.solution == "Edema" and sum(one.known) == 2
    assert two.solution == "No Finding, Support Devices"


def test_converter_reads_columns_by_name(tmp_path):
    header = ("Path", *reversed(CHEXPERT_14))
    path = table(tmp_path, ["a.png", *reversed(cells(Edema="1"))], header=header)
    [row] = label_table.convert(label_table.read_table(path))[0]
    assert row["image"] == "a.png" and row["solution"] == "Edema"


@pytest.mark.parametrize(
    "header, row, reason",
    [
        (("file", *CHEXPERT_14[1:]), ["a.png", *cells()[1:]], "no column 'No Finding'"),
        (("pic", *CHEXPERT_14), ["a.png", *cells()], "no image column"),
        (("file", *CHEXPERT_14), ["a.png", *cells(Edema="2")], "labels.csv:2: Edema is not one of"),
        (("file", *CHEXPERT_14), [" ", *cells(Edema="1")], "labels.csv:2: no image name"),
        (("file", *CHEXPERT_14), ["a.png", *cells()], "no row has a label"),
    ],
)
def test_converter_refuses(tmp_path, capsys, header, row, reason):
    out = tmp_path / "out.jsonl"
    assert label_table.main([str(table(tmp_path, row, header=header)), str(out)]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1 and not out.exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
def test_real_label_table(tmp_path):
    out = tmp_path / "out.jsonl"
    assert label_table.main([str(SHARED / "images" / "manifest.csv"), str(out)]) == 0
    train, held = manifest.open_split(out, SHARED, size=56, seed=1)
    assert len(train) > len(held) >= 20
    assert held.batch(range(2))["image"].std() > 0.1
