"""The guard: registered evaluation sets by rule, patients on both sides, films that were stored anew."""

import json
import random

import numpy as np
import pytest
from PIL import Image, ImageOps
from places import ROOT

from cxr_jax.config.sections import DataConfig
from cxr_jax.data import images
from cxr_jax.data.sources import guard, splits
from cxr_jax.data.sources.guard import __main__ as door
from cxr_jax.data.sources.guard import film_hash, findings, hash_files, of_run

FILMS = ROOT.parent / "shared" / "data" / "films" / "images"


def columns(ids, name="files", **more):
    blank = [None] * len(ids)
    return guard.Columns(
        name=name, ids=ids, **{"patients": blank, "studies": blank, "splits": blank} | more
    )


# ---- Registered sets -----------------------------------------------------------------------------------

CHEXPERT = "CheXpert-v1.0-small/train/patient{}/study1/view1_frontal.jpg"


@pytest.mark.parametrize(
    "form", [CHEXPERT, "patient{}_study1_view1", "Patient {}.png", "x\\patient0{}\\a"]
)
def test_patients_of_chexpert_are_told_by_their_number(form):
    numbers = ("64540", "64541", "64740", "64741", "65240", "65241", "647410", "6474")
    ids = [form.format(number) for number in numbers]
    assert guard.registered_rows(columns(ids)) == {
        "chexpert_valid": [1, 2],
        "chexpert_test": [3, 4],
    }
    # In a row with an id of its own, by the column of patients or by where the film lies.
    own = [str(place) for place in range(len(ids))]
    for given in (
        columns(own, patients=ids),
        columns([f"{one}\n{other}" for one, other in zip(own, ids, strict=True)]),
    ):
        assert guard.overlaps(given) == {"chexpert_valid": 2, "chexpert_test": 2}


def test_numbers_alone_are_patients_of_chexpert_only_under_its_name():
    numbers = ["64741", "65241", "00064741"]
    assert guard.overlaps(columns(["a", "b", "c"], patients=numbers)) == {}
    assert guard.overlaps(columns(["a", "b", "c"], "mimic", patients=numbers)) == {}
    plus = columns(["a", "b", "c"], "chexpert_plus", patients=numbers)
    assert guard.registered_rows(plus) == {"chexpert_test": [0, 2]}


def test_splits_count_within_their_data_set_alone():
    parts = ["train", "validate", "test", None]
    paths = [f"files/p10/p1000003{n}/s5041426{n}/{n}.jpg" for n in range(4)]
    assert guard.registered_rows(columns(paths, splits=parts)) == {"mimic_cxr": [1, 2]}
    assert guard.overlaps(columns(list("abcd"), splits=parts)) == {}
    assert guard.overlaps(columns(list("abcd"), "mimic", splits=parts)) == {"mimic_cxr": 2}
    assert guard.overlaps(columns(list("abcd"), "nih", splits=parts)) == {"nih_test": 1}
    assert guard.overlaps(columns(list("abcd"), "padchest_gr")) == {"padchest_gr": 4}


def test_published_lists_beside_the_data_are_read(tmp_path):
    nih = [f"images/0000000{n}_000.png" for n in range(6)]
    (tmp_path / "test_list.txt").write_text("00000001_000.png\n")
    (tmp_path / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\r\n00000002_000.png,Mass,1,2,3,4\r\n"
    )
    google = "Set Id,Image Index,Fracture\ntest,00000003_000.png,NO\nval,00000004_000.png,NO\n"
    (tmp_path / "google2019_nih-chest-xray-labels.csv").write_text(google)
    assert guard.registered_rows(columns(nih), [tmp_path]) == {"nih_test": [1, 2, 3]}
    assert guard.overlaps(columns(nih)) == {}

    grounded = [{"StudyID": "1", "ImageID": "9" * 24 + "_00-1.png", "findings": []}]
    (tmp_path / "grounded_reports_20240819.json").write_text(json.dumps(grounded))
    padchest = ["0/" + digit * 24 + f"_00-{part}.png" for digit in "98" for part in (1, 2)]
    films = columns(padchest, "padchest", studies=["s9", "s9", "s8", "s8"])
    # The other film of the study, too.
    assert guard.registered_rows(films, [tmp_path]) == {"padchest_gr": [0, 1]}

    (tmp_path / "image_labels_test.csv").write_text("image_id,Edema\n" + "ab" * 16 + ",0\n")
    vindr = ["train/" + code * 16 + ".dicom" for code in ("ab", "cd")]
    assert guard.overlaps(columns(vindr, "vindr"), [tmp_path]) == {"vindr_test": 1}

    (tmp_path / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text("Edema,study_id\n1,50414267\n")
    mimic = columns(["a", "b"], "mimic", studies=["50414267", "50414268"])
    assert guard.registered_rows(mimic, [tmp_path]) == {"mimic_cxr": [0]}

    (tmp_path / "ReXRank_IUXray_test.json").write_text('{"CXR12_IM-0055": {"split": "test"}}')
    openi = columns(["CXR12_IM-0055-1001.png", "12_IM-0055-2001.dcm.png", "CXR1_1_IM-0001.png"])
    assert guard.registered_rows(openi, [tmp_path]) == {"openi_rexrank": [0, 1]}


def test_patients_on_both_sides_are_found_within_one_data_set():
    train = columns(["a", "b", "c"], patients=["patient7", None, "8"])
    test = columns(["d", "e"], patients=["007", None])
    [found] = guard.find_patients(train, {"B": test})
    assert found.text == "1 of 3 training films are of patients of B" and found.named == "a"
    assert guard.find_patients(train, {"B": columns(["d"], "nih", patients=["7"])}) == []


# ---- Films stored anew -----------------------------------------------------------------------------------


def draw(seed, height=96, width=80):
    """A picture of smooth shades that no other seed has: float32 in 0..1."""
    coarse = np.random.default_rng(seed).random((9, 8)).astype(np.float32)
    shades = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(shades), 0, 1)


def as_levels(pixels):
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def sixteen_bits(film):
    return Image.fromarray(np.asarray(film).astype(np.uint16) * 257)


def windowed(film):
    return Image.fromarray(np.clip((np.asarray(film, float) - 25) * 255 / 205, 0, 255).astype("u1"))


ANEW = {
    "jpg": [
        lambda film: film,
        lambda film: film.resize((224, 224)),
        lambda film: film.resize((film.width * 2, film.height * 2)),
        lambda film: ImageOps.invert(ImageOps.equalize(film)),
        ImageOps.equalize,
        windowed,
        lambda film: film.point([round(255 * (level / 255) ** 0.5) for level in range(256)]),
    ],
    "png": [sixteen_bits, lambda film: sixteen_bits(ImageOps.invert(film)), ImageOps.grayscale],
}


def store_anew(films, folder):
    """Each film in each way: its new file -> which it was."""
    folder.mkdir()
    made = {}
    for place, film in enumerate(films):
        for kind, ways in ANEW.items():
            for number, way in enumerate(ways):
                path = folder / f"{len(made)}.{kind}"
                way(film).save(path, quality=50) if kind == "jpg" else way(film).save(path)
                made[path] = place, kind, number
    return made


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_films_stored_anew_are_found_and_no_others(tmp_path):
    films = [as_levels(draw(seed)) for seed in range(30)]
    (tmp_path / "films").mkdir()
    paths = [tmp_path / "films" / f"{number}.png" for number in range(30)]
    for film, path in zip(films, paths, strict=True):
        film.save(path)
    made = store_anew(films[:6], tmp_path / "new")
    hashes = hash_files.hash_files([*paths, *made], tmp_path)
    found = findings.same_films(list(made), paths[:6], hashes)
    assert {path: paths.index(other) for path, other in found.items()} == {
        path: place for path, (place, *_) in made.items()
    }
    assert findings.same_films(paths[6:], list(made), hashes) == {}
    # A blank film is like no other, its own kind included.
    for name in ("one.png", "two.png"):
        Image.new("L", (40, 40), 7).save(tmp_path / name)
    blank = [tmp_path / "one.png", tmp_path / "two.png"]
    assert findings.same_films(blank[:1], blank[1:], hash_files.hash_files(blank, tmp_path)) == {}


@pytest.mark.skipif(not FILMS.is_dir(), reason="the films are not here")
def test_real_films_stored_anew_are_found_and_no_others(tmp_path):
    chosen = random.Random(0).sample(sorted(FILMS.iterdir()), 150)
    test, rest = chosen[:12], chosen[12:]
    made = store_anew([Image.open(path).convert("L") for path in test], tmp_path / "new")
    hashes = hash_files.hash_files([*chosen, *made], FILMS)
    found = findings.same_films(list(made), test, hashes)
    assert {path: test.index(other) for path, other in found.items()} == {
        path: place for path, (place, *_) in made.items()
    }
    assert findings.same_films(rest, test, hashes) == {}


def test_the_command_compares_folders_and_manifests(tmp_path, capsys):
    films = [as_levels(draw(seed)) for seed in range(12)]
    for folder, chosen in (("test", films[:6]), ("train", films[6:])):
        (tmp_path / folder).mkdir()
        for number, film in enumerate(chosen):
            film.save(tmp_path / folder / f"{number}.png")
    (tmp_path / "train" / "notes.txt").write_text("no film")
    places = [str(tmp_path / "train"), str(tmp_path / "test")]
    assert door.main(places) == 0
    assert (
        "0 of 7 films are among the 6 of" in (said := capsys.readouterr().out) and "1 files" in said
    )
    made = store_anew(films[:2], tmp_path / "train" / "anew")
    assert door.main(places) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {tuple(line.split(" is ")) for line in lines[:-1]} == {
        (str(path), str(tmp_path / "test" / f"{place}.png")) for path, (place, *_) in made.items()
    }
    # By its name alone, and of a manifest.
    talk = [{"from": "human", "value": "Find."}]
    row = {"id": "patient64741_1", "image": "0.png", "conversations": talk, "solution": "Edema"}
    (tmp_path / "test" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert door.main([places[0], str(tmp_path / "test" / "rows.jsonl")]) == 1
    films[7].save(tmp_path / "test" / "patient64741.png")
    assert door.main([places[1], str(tmp_path / "test" / "rows.jsonl")]) == 1
    assert "(chexpert_test): patient64741.png" in capsys.readouterr().out
    assert door.main([places[0], str(tmp_path / "none")]) == 2


def test_the_command_reads_what_rows_say_of_their_films(tmp_path, capsys):
    for folder in ("test", "train"):
        (tmp_path / folder).mkdir()
        as_levels(draw(len(folder))).save(tmp_path / folder / "film.png")
    tested = tmp_path / "test" / "rows.jsonl"
    trained = tmp_path / "train" / "rows.jsonl"
    row = {"id": "one", "image": "film.png", "prompt": "Find.", "solution": "Edema"}
    tested.write_text(json.dumps(row | {"subject_id": "anna"}) + "\n")
    for said, expected in (
        ({"subject_id": "bert"}, None),
        ({"subject_id": "patient64741"}, "(chexpert_test): one"),
        ({"subject_id": "Anna "}, f"are of patients of {tested}: one"),
        ({"image": "film.png", "id": "files/p10/s1/a", "split": "test"}, None),
    ):
        trained.write_text(json.dumps(row | said) + "\n")
        assert door.main([str(trained), str(tested)]) == int(expected is not None), said
        assert expected is None or expected in capsys.readouterr().out


def test_the_hash_is_the_one_that_is_described():
    """By sums of cosines, one frequency at a time, and ranks by counting."""
    small = film_hash.thumbnail(draw(3, 64, 64), 64)
    flat = small.ravel()
    ranks = [(np.sum(flat < grey) + np.sum(flat <= grey) - 1) / 2 for grey in flat]
    ranks = np.array(ranks).reshape(64, 64)
    steps = (2 * np.arange(64) + 1) * np.pi / 128
    spectrum = [
        np.sum(ranks * np.cos(steps * row)[:, None] * np.cos(steps * column)[None])
        for row in range(16)
        for column in range(16)
    ]
    bits = np.array(spectrum) > np.median(spectrum)
    assert np.array_equal(np.unpackbits(film_hash.film_hash(draw(3, 64, 64))), bits)


def test_pairs_are_those_that_counting_finds(monkeypatch):
    monkeypatch.setattr(film_hash, "_AT_ONCE", 7)
    drawn = np.random.default_rng(0)
    hashes = drawn.integers(0, 256, (20, 32), np.uint8)
    others = drawn.integers(0, 256, (23, 32), np.uint8)
    for row, bits, sign in ((3, 52, 0), (4, 53, 0), (5, 52, 255), (19, 0, 255)):
        changed = np.unpackbits(hashes[row])
        changed[drawn.permutation(256)[:bits]] ^= 1
        others[row] = np.packbits(changed) ^ sign
    assert set(film_hash.near_pairs(hashes, others)) == {(3, 3), (5, 5), (19, 19)}


def test_hashes_are_computed_once_and_again_for_a_film_that_changed(tmp_path, monkeypatch, capsys):
    read = []
    read_image = images.read_image
    monkeypatch.setattr(
        images, "read_image", lambda path: read.append(path.name) or read_image(path)
    )
    paths = [tmp_path / name for name in ("a.png", "b.png", "torn.png")]
    for seed, path in enumerate(paths):
        as_levels(draw(seed)).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:60])

    def hash_anew():
        hash_files._load.cache_clear()  # as another process begins
        read.clear()
        return hash_files.hash_files([*paths, paths[0]], tmp_path, threads=1)

    first = hash_anew()
    assert sorted(read) == ["a.png", "b.png", "torn.png"] and set(first) == set(paths[:2])
    # What cannot be read is tried again; the rest is kept, but for what has changed.
    assert all(np.array_equal(hash_anew()[path], first[path]) for path in first)
    assert read == ["torn.png"]
    as_levels(draw(9)).save(paths[1])
    assert not np.array_equal(hash_anew()[paths[1]], first[paths[1]]) and "b.png" in read
    # A damaged file of hashes, and a place that takes none.
    [store] = hash_files.cache_folder().iterdir()
    store.write_bytes(b"\xff\tno\n" + store.read_bytes()[:40])
    assert set(hash_anew()) == set(paths[:2]) and "a.png" in read
    monkeypatch.setenv("XDG_CACHE_HOME", str(paths[0]))
    assert set(hash_anew()) == set(hash_anew()) == set(paths[:2])
    assert capsys.readouterr().err.count("for this run alone") == 1


def test_a_run_compares_its_films_on_request(tmp_path):
    """Forty patients; one film of a held-out patient is a training patient's, too, as a negative."""
    talk = [{"from": "human", "value": "Find."}]
    rows = [
        {
            "id": f"{n}",
            "image": f"{n}.png",
            "patient_id": n,
            "conversations": talk,
            "solution": "Edema",
        }
        for n in range(40)
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(40):
        as_levels(draw(n)).save(tmp_path / f"{n}.png")
    data = {"source": "files", "manifest": str(manifest), "image_root": str(tmp_path), "size": 28}
    settings = DataConfig.with_defaults(**data, guard="hash")
    opened = splits.open_splits(settings)
    assert of_run.find_in_run(settings, opened) == []
    train, test = (int(part.rows[0].id) for part in (opened.train, opened.test["files"]))
    ImageOps.invert(as_levels(draw(test))).resize((300, 200)).save(tmp_path / f"{train}.png")
    [found] = of_run.find_in_run(settings, opened)
    assert found.named == f"{train}.png is {test}.png"
    assert (
        found.text
        == f"1 of {len(opened.train)} training films are films of files (test), stored anew"
    )
    by_ids = DataConfig.with_defaults(**data)
    assert of_run.find_in_run(by_ids, opened) == []


@pytest.mark.parametrize(
    "patient",
    ["pat64741", "pt64741", "Patient: 64741", "patient#64741", "patient.64741", "PAT_64741"],
)
def test_spellings_of_a_patient_that_a_split_joins(patient):
    films = guard.Columns(name="rows", ids=["a"], patients=[patient], studies=[None], splits=[None])
    assert guard.overlaps(films) == {"chexpert_test": 1}


@pytest.mark.parametrize(
    "name, film, patient, wanted",
    [
        ("rows", "patient/64741/study1/a.jpg", "", {"chexpert_test": 1}),
        ("rows", "chexpertpatient64741_a.jpg", "", {"chexpert_test": 1}),
        ("chexpert", "a.jpg", "64741.0", {"chexpert_test": 1}),
        ("rows", "outpatient64741.jpg", "", {}),
        ("rows", "patient647410.jpg", "", {}),
        ("rows", f"test/{'a1' * 16}.dicom", "", {"vindr_test": 1}),
        ("rows", f"train/{'a1' * 16}.dicom", "", {}),
        # Ids of other sets mean nothing to CheXpert's rules.
        ("brax", "patient64741/x.png", "", {}),
        ("rsna", "a", "patient64741", {}),
    ],
)
def test_films_that_names_and_paths_tell(name, film, patient, wanted):
    films = guard.Columns(name=name, ids=[film], patients=[patient], studies=[""], splits=[""])
    assert guard.overlaps(films) == wanted
