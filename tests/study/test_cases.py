"""Which phantoms become cases, and where a study is."""

import numpy as np

from cxr_jax.study import cases
from cxr_jax.study.folder import StudyFolder, place_of
from cxr_jax.study.protocol import make_protocol

from .conftest import frozen


def test_each_label_of_the_protocol_gets_its_share_of_the_cases():
    protocol = make_protocol(name="t")
    generator = np.random.default_rng(1)
    # As phantoms come: half have none of the labels, and the rarest is there once in twenty scenes.
    readings = []
    for _ in range(240):
        shares = (0.05, 0.08, 0.1, 0.2, 0.3) if generator.random() < 0.5 else (0,) * 5
        drawn = generator.random(5) < shares
        present = [
            name
            for name, is_there in zip(protocol.suspicion_labels, drawn, strict=True)
            if is_there
        ]
        readings.append(frozen(*present))
    chosen = cases._mixed(protocol, range(240), readings, 60)
    assert len(set(chosen)) == 60 and chosen == sorted(chosen)
    present = [
        {name for name in protocol.suspicion_labels if readings[number].states[name] == "present"}
        for number in chosen
    ]
    rarest = protocol.suspicion_labels[0]
    there = sum(reading.states[rarest] == "present" for reading in readings)
    assert sum(rarest in names for names in present) == min(there, 12)
    assert sum(protocol.suspicion_labels[4] in names for names in present) >= 10
    # An area under a curve asks for films of the other kind, too.
    assert sum(not names for names in present) >= 20


def test_study_is_in_its_folder_or_in_a_database_whose_url_names_one(tmp_path):
    url = "postgresql+pg8000://reader@127.0.0.1:1/room"
    assert place_of("demo", None) == "demo" and place_of("demo", "elsewhere") == "elsewhere"
    named = place_of("demo", f"{url}?folder={tmp_path}")
    assert StudyFolder.at(named).path == tmp_path
    # Without one the files lie where those of a study without a database do.
    unnamed = StudyFolder.at(place_of(str(tmp_path / "a b"), url))
    assert unnamed.path == tmp_path / "a b" and unnamed.store_place.startswith(url)
    assert StudyFolder.at("demo").store_place == "demo"
