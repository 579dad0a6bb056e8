"""The image gate: films and phantoms pass, what is plainly something else is refused with a reason; its policies."""

import csv
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from dicom_files import build
from PIL import Image as PilImage
from places import SHARED

from cxr_jax import predict
from cxr_jax.config.sections import DataConfig
from cxr_jax.data import image_gate, images, radiograph
from cxr_jax.data.sources import splits
from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.errors import UserError
from cxr_jax.inference import image_inputs, reading
from experiments.analysis import gate_pictures
from experiments.analysis import image_gate as measure

# What a reason names at least once among six pictures of the kind.
WORDS = {
    "white_noise": "most like noise or a texture (neighbouring pixels do not agree)",
    "coloured_noise": "most like noise or a texture",
    "gradient": "a drawing or a pattern",
    "checkers": "a drawing or a pattern",
    "shapes": "hard edges on flat ground",
    "text_page": "a page of text",
    "hand_drawn": "a hand or another limb",
    "knees_drawn": "a hand or another limb",
    "ct_slice_drawn": "a CT or MR slice",
    "head_drawn": "a CT or MR slice",
}
NOISE = np.random.default_rng(5).integers(0, 4096, (300, 260)).astype(np.uint16)


@pytest.fixture(scope="module")
def phantoms():
    """A few films of one hospital, and of sites around the other."""
    sources = [PhantomSource("A", "test", 3), PhantomSource("B", "train", 4, sites=7)]
    return np.concatenate([np.asarray(source.batch(np.arange(7))["image"]) for source in sources])


def as_file(path, pixels):
    """A picture in 0..1 as an 8-bit PNG."""
    PilImage.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)).save(path)
    return path


# ---- What passes -----------------------------------------------------------------------------------


def test_every_phantom_passes_at_every_size(phantoms):
    for film in phantoms:
        for side in (28, 32, 48, 56, 64, 112, 224, 448):
            copy = np.asarray(PilImage.fromarray(film).resize((side, side)))
            assert image_gate.judge(np.clip(copy, 0, 1)).reason is None


def test_films_turned_inverted_framed_dim_or_in_parts_pass(phantoms):
    for film in phantoms[::4]:
        framed = np.pad(film, 30, constant_values=1.0)
        changed = [np.rot90(film, turns) for turns in range(4)] + [1 - film, framed, film**2]
        changed += [0.4 + 0.2 * film, film[:, ::-1], film[10:-20, 5:-15], np.sqrt(film)]
        for copy in changed:
            assert image_gate.judge(copy).reason is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
def test_real_films_pass():
    with open(SHARED / "films" / "manifest.csv", encoding="utf-8") as file:
        names = [row["file"] for row in csv.DictReader(file)][::40]
    names = [SHARED / "films" / name for name in names]
    names += sorted((SHARED / "images").glob("*.[pj]*"))[::5]
    names += sorted((SHARED / "cases" / "dicom").glob("*.dcm"))
    names.append(SHARED / "dicom" / "real" / "RG1_chest_mono1_j2k_lossy.dcm")
    assert len(names) > 40
    for name in names:
        assert image_gate.judge(images.read_image(name).pixels).reason is None, name.name


# ---- What does not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", gate_pictures.MAKERS)
def test_what_is_no_chest_film_is_refused_in_words(kind):
    reasons = [image_gate.judge(gate_pictures.make(kind, 1000 + i)).reason for i in range(6)]
    refused = [reason for reason in reasons if reason]
    # The kinds that it misses now and then; the table of docs/inputs.md says how often.
    assert len(refused) >= (4 if kind in ("coloured_noise", "knees_drawn", "shapes") else 6)
    assert any(WORDS[kind] in reason for reason in refused)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (90, 60), (300, 260), (1500, 1200)])
@pytest.mark.parametrize("sort", ["uniform", "normal", "faint", "salt"])
def test_white_noise_of_any_size_and_sort_is_refused(size, sort):
    random = np.random.default_rng(1)
    noise = {
        "uniform": lambda: random.random(size),
        "normal": lambda: np.clip(random.normal(0.5, 0.2, size), 0, 1),
        "faint": lambda: 0.5 + 0.02 * random.random(size),
        "salt": lambda: (random.random(size) < 0.05).astype(float),
    }[sort]()
    assert image_gate.judge(noise).reason


def test_a_blank_picture_is_blank():
    assert "blank" in image_gate.judge(np.full((64, 64), 0.4, np.float32)).reason


def test_the_card_has_the_statistics_that_are_computed():
    card = image_gate.load_card()
    assert list(card["statistics"]) == list(measure.NAMES)
    assert set(image_gate.statistics(NOISE / 4095)) == set(measure.NAMES)
    for look in card["looks"].values():
        assert len(look["weights"]) == len(measure.NAMES)


# ---- predict ---------------------------------------------------------------------------------------


def read_usable(path, **options):
    image = images.read_image(path)
    reading.check_usable(path, image, **options)
    return image


def test_noise_in_a_dx_header_meets_the_policy(tmp_path):
    path = tmp_path / "dx.dcm"
    path.write_bytes(build(NOISE, WindowCenter=2048, WindowWidth=4096))
    with pytest.raises(UserError) as refusal:
        read_usable(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: not read: no chest film by its pixels: most like noise")
    assert "--image_gate=warn" in message and "\n" not in message

    warned = read_usable(path, gate_policy="warn")
    assert "no chest film by its pixels" in warned.meta["warnings"][-1]
    assert (
        warned.meta["image_gate"]["points"] < 0 and "noise" in warned.meta["image_gate"]["reason"]
    )
    json.dumps(warned.meta["image_gate"], allow_nan=False)
    # A reader who reads anyway is told all the same.
    assert read_usable(path, read_anyway=True).meta["image_gate"]
    silent = read_usable(path, gate_policy="off")
    assert "image_gate" not in silent.meta and not silent.meta["warnings"]
    np.testing.assert_array_equal(silent.pixels, warned.pixels)


def test_predict_refuses_pictures_and_goes_on_with_films(tmp_path, monkeypatch, capsys, phantoms):
    read = []

    def record(model, films, options, why_shares):
        [film] = films
        read.append(film.path)
        shown = {"image": film.path, "warnings": film.image.meta["warnings"]}
        return SimpleNamespace(record=shown)

    monkeypatch.setattr(predict, "_load", lambda *arguments: SimpleNamespace())
    monkeypatch.setattr(predict, "why_no_probabilities", lambda model: None)
    monkeypatch.setattr(predict, "read_films", record)
    page = str(as_file(tmp_path / "page.png", gate_pictures.make("text_page", 1)))
    film = str(as_file(tmp_path / "film.png", phantoms[0]))
    assert predict.main([page, film, "--json"]) == 2
    out, err = capsys.readouterr()
    assert read == [film] and json.loads(out) == {"image": film, "warnings": []}
    assert err.count("\n") == 1 and "a page of text" in err and err.startswith(f"error: {page}")

    assert predict.main([page, film, "--json", "--image-gate=warn"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert "a page of text" in first["warnings"][-1] and not second["warnings"]
    assert predict.main([page, "--image_gate=off", "--json"]) == 0
    assert predict.main([page, "--image_gate=maybe"]) == 2


def test_image_files_given_to_a_model_meet_its_gate(tmp_path, caplog, phantoms):
    page = as_file(tmp_path / "page.png", gate_pictures.make("text_page", 2))
    with pytest.raises(UserError, match="image_gate=warn"):
        image_inputs.pixels_of(page, "refuse")
    image_inputs.pixels_of(page, "warn")
    assert caplog.text.count("no chest film by its pixels") == 1
    caplog.clear()
    image_inputs.pixels_of(page, "off")
    image_inputs.pixels_of(as_file(tmp_path / "film.png", phantoms[1]), "refuse")
    # What a program made itself is its own affair.
    image_inputs.pixels_of(NOISE / 4095, "refuse")
    assert not caplog.text
    with pytest.raises(UserError, match="image_gate=perhaps: choose one of refuse, warn, off"):
        image_inputs.pixels_of(page, "perhaps")


# ---- Training and evaluation -----------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path, phantoms):
    """Nine films and three pages as rows of a manifest."""
    lines = []
    for i in range(12):
        picture = gate_pictures.make("text_page", i) if i % 4 == 1 else phantoms[i]
        as_file(tmp_path / f"{i}.png", picture)
        turns = [{"from": "human", "value": "Find."}]
        row = {"id": str(i), "image": f"{i}.png", "conversations": turns, "solution": "Edema"}
        lines.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def config_of(rows, **keys):
    return DataConfig.with_defaults(
        source="files", manifest=str(rows / "rows.jsonl"), image_root=str(rows), size=28, **keys
    )


def read_everything(opened):
    for source in [opened.train, *opened.select.values(), *opened.test.values()]:
        source.batch(range(len(source)))
        source.batch(range(len(source)))


def test_a_run_counts_what_is_no_chest_film_in_one_line(rows):
    image_gate.take_count_lines()
    read_everything(splits.open_splits(config_of(rows, cache_mib=0)))
    [line] = image_gate.take_count_lines()
    assert line.startswith("config.data.image_gate=warn: no chest film by its pixels: ")
    assert line.endswith("and 2 more") and str(rows) not in line
    assert image_gate.take_count_lines() == []


def test_a_run_can_refuse_or_not_look(rows):
    with pytest.raises(UserError, match=r"\.png: not read: no chest film.*data\.image_gate=warn"):
        read_everything(splits.open_splits(config_of(rows, image_gate="refuse")))
    read_everything(splits.open_splits(config_of(rows, image_gate="off")))
    assert image_gate.take_count_lines() == []
    with pytest.raises(UserError, match="choose one of"):
        image_gate.Watch("yes")


def test_a_watch_counts_every_file_once_from_many_threads():
    watch = image_gate.Watch("warn")
    films = [
        radiograph.Image(
            NOISE[:64, :64].astype(np.float32) / 4095, radiograph.new_meta("PNG", "voi")
        )
        for _ in range(8)
    ]
    threads = [
        threading.Thread(target=watch.look, args=(f"f{i % 2}.png", film))
        for i, film in enumerate(films)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watch.count_line().endswith(", and 1 more")
    image_gate.take_count_lines()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_finite_numbers_are_no_film(number):
    pixels = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    pixels[5, 7] = number
    assert "no finite numbers" in image_gate.judge(pixels).reason


def test_a_warned_record_has_the_keys_of_every_record():
    reading_of_model = SimpleNamespace(text="", finish_reason="stop")
    result = SimpleNamespace(shown=reading_of_model, probabilities={"Edema": 0.5}, samples=[])
    model = SimpleNamespace(
        read=lambda *arguments, **options: result, folder="phantom", number_images=False
    )
    options = SimpleNamespace(
        **dict.fromkeys(("prompt", "samples", "max_new_tokens", "seed", "constrained"), 0),
        model="phantom",
    )
    gate = {"reason": "a page of text", "points": -1.0}
    records = []
    for more in ({}, {"image_gate": gate}):
        meta = {"renderer": "voi", "warnings": ["a page of text"], **more}
        image = SimpleNamespace(pixels=None, meta=meta)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading.hf_folder, "weights_sha256", lambda folder: "0")
            records.append(
                reading.reading_record(model, [reading.Film("film.png", image)], options)
            )
    assert records[0] == records[1] and "a page of text" in records[1]["warnings"]
