"""Label maps: every published one can be read, and bad ones are refused."""

import csv

import pytest

from cxr_jax.data.sources import maps
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

FILES = sorted(maps.MAPS.glob("*.csv"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_maps(path):
    name, _, version = path.stem.rpartition("_v")
    label_map = maps.load_map(name, int(version))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    covered = {row["target"] for row in rows if row["relation"] in ("exact", "narrower")}
    assert {
        label for label, scored in zip(CHEXPERT_14, label_map.scored(), strict=True) if scored
    } == covered
    # One label at a time, as the file says it.
    reader = label_map.reader()
    for source in {row["source"] for row in rows}:
        own = [row for row in rows if row["source"] == source]
        asserted = {row["target"] for row in own if row["relation"] in ("exact", "narrower")}
        blocked = {row["target"] for row in own if row["relation"] == "blocks"}
        wanted = [
            1 if label in asserted else -2 if label in blocked or label not in covered else 0
            for label in CHEXPERT_14
        ]
        assert reader.states([f" {source.upper()}"]).tolist() == wanted
    assert not reader.unknown and len(FILES) >= 9


def test_what_is_there_goes_before_what_hides_it(tmp_path):
    reader = maps.load_map("vindr").reader()
    opacity = CHEXPERT_14.index("Lung Opacity")
    assert reader.states(["ILD", "Lung Opacity"])[opacity] == 1
    assert reader.states(["Infiltration", "ILD"])[opacity] == 1
    assert reader.states(["ILD", "unheard of"])[opacity] == -2
    assert reader.unknown == {"unheard of": 1}


@pytest.mark.parametrize(
    "text, reason",
    [
        ("source,target,relation\nMass,Lump,exact", ":2: Mass maps to 'Lump'"),
        ("source,target,relation\nMass,Lung Lesion,like", ":2: Mass: the relation is none"),
        ("source,target,relation\nMass,Lung Lesion,unmapped", ":2: Mass maps to"),
        ("source,target\nMass,Lung Lesion", "has no columns"),
        ("source,target,relation\n", "no rows"),
    ],
)
def test_bad_maps(tmp_path, text, reason):
    (tmp_path / "mine_v1.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        maps.load_map("mine", folder=tmp_path)
    with pytest.raises(UserError, match="mine_v2.csv"):
        maps.load_map("mine", 2, tmp_path)
