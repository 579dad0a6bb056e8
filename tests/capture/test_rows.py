"""Thoughts as rows: what `experiments/sft.py:files` reads, what is refused, and where each row is from."""

import contextlib
import json

import numpy as np
import pytest
import sqlalchemy as sa
import tiny_model
from PIL import Image as PilImage
from store_films import add_film, smooth_film

from cxr_jax.capture.__main__ import main
from cxr_jax.capture.rows import ExportOptions, export
from cxr_jax.config import schema
from cxr_jax.config.sections import DataConfig
from cxr_jax.data.sources import manifest, splits
from cxr_jax.errors import UserError
from cxr_jax.metrics import run_log
from cxr_jax.runtime.layout import ONE_DEVICE
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.signals import StoppedError
from cxr_jax.sft import loop
from cxr_jax.store import tables
from cxr_jax.training import checks

TEXT = "No pneumothorax. Left effusion."
REPORT = "No pneumothorax is seen. There is a small left pleural effusion."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Hashes of films are kept in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_thought_is_a_row_to_train_on(store, captures, reader, think, heard):
    capture_id = think(TEXT, heard=heard)
    made = export(store, ExportOptions())
    assert made.refused == []
    [row] = made.rows
    assert list(row)[:4] == ["id", "image", "solution", "messages"]
    assert row["solution"] == "Pleural Effusion"
    assert row["labels"] == {"Pneumothorax": 0, "Pleural Effusion": 1}
    target = row["messages"][1]["content"][0]["text"]
    assert target == f"<think>{TEXT}</think><answer>Pleural Effusion</answer>"
    provenance = row["cxr_jax"]["provenance"]
    assert provenance["capture"] == capture_id and provenance["asr_model_sha256"] == "5" * 64
    assert (provenance["heard_words"], provenance["doubted_words"]) == (6, 3)
    assert provenance["corrected_words"] == 4 and provenance["operations"]["replace"] == 1
    # A pseudonym of the store's own, and nothing of the account.
    assert reader.id not in json.dumps(row) and "reader-1" not in json.dumps(row)
    # By the reader of manifests that training uses.
    path = store.folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [loaded] = manifest.load_rows(path, store.folder)
    assert loaded.target == target and loaded.positive == ("Pleural Effusion",)
    assert loaded.known.count(True) == 2 and loaded.image_paths[0].suffix == ".film"


def test_the_reader_has_the_last_word(store, think):
    think(REPORT, labels={"Fracture": {"state": "absent"}})
    [row] = export(store, ExportOptions()).rows
    assert row["labels"]["Fracture"] == 0
    # Typed, so nothing of it was corrected.
    assert row["cxr_jax"]["provenance"]["corrected_words"] == 0


def test_rows_that_contradict_themselves_are_refused(store, think):
    think(REPORT, labels={"Pneumothorax": {"state": "present", "side": "right"}})
    made = export(store, ExportOptions())
    assert (
        made.rows == []
        and made.refused[0].reason == "text and labels contradict each other (Pneumothorax)"
    )
    [row] = export(store, ExportOptions(contradictions=True)).rows
    assert row["cxr_jax"]["provenance"]["contradictions"] == 1


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Left effusion. <answer>Edema</answer>", "the trace holds a tag"),
        ("Possible edema.", "nothing to answer"),
        ("Kein Erguss, keine Stauung, Herz und Lungen sind nicht vergrößert.", "another language"),
    ],
)
def test_texts_that_are_no_trace(store, think, text, reason):
    think(text)
    made = export(store, ExportOptions())
    assert made.rows == [] and reason in made.refused[0].reason


def test_a_translator_is_a_hook(store, think):
    think(
        "Derrame pleural izquierdo, sin neumotorax, los pulmones sin infiltrados.",
        labels={"Pleural Effusion": {"state": "present", "side": "left"}},
    )
    options = ExportOptions(translate=lambda text: "Left effusion.", contradictions=True)
    assert "<think>Left effusion.</think>" in str(export(store, options).rows)


def test_one_film_has_one_truth(store, reader, think):
    other = store.users.add("reader-2", "reader", "another password").actor
    image = add_film(store, smooth_film(1), reader)
    think("Right effusion.", image)
    think("Left effusion and edema.", image)
    made = export(store, ExportOptions())
    assert [row["solution"] for row in made.rows] == ["Edema, Pleural Effusion"]
    assert made.refused[0].reason == "the reader has a later one over this film"
    think("Left effusion.", image, actor=other)
    made = export(store, ExportOptions())
    assert made.rows == [] and "differently" in made.refused[-1].reason


def make_study(store, image):
    with store.engine.begin() as connection:
        study = {"id": "s1", "slug": "demo", "protocol": {}, "protocol_sha256": "0", "seed": 0}
        connection.execute(sa.insert(tables.study), study | {"state": "sealed", "simulated": True})
        case = {"study": "s1", "case_no": 1, "image": image, "block": 0}
        connection.execute(sa.insert(tables.study_case), case)


def test_films_of_a_study_do_not_train(store, reader, think):
    films = [add_film(store, smooth_film(seed), reader) for seed in (1, 2)]
    # The study's film again, smaller and as a negative.
    again = PilImage.fromarray(smooth_film(1)).resize((90, 90), PilImage.Resampling.BOX)
    copy = add_film(store, 255 - np.asarray(again), reader)
    for image in (*films, copy):
        think("Left effusion.", image)
    make_study(store, films[0])
    made = export(store, ExportOptions())
    assert [row["image"] for row in made.rows] == [f"images/{films[1]}.film"]
    assert [refusal.reason for refusal in made.refused] == [
        "its film is a case of the study demo"
    ] * 2
    assert made.study_films == 1


def test_films_of_an_evaluation_set_do_not_train(store, reader, think, tmp_path):
    for seed in (1, 2):
        think("Left effusion.", add_film(store, smooth_film(seed), reader))
    tests = tmp_path / "test_set"
    tests.mkdir()
    PilImage.fromarray(smooth_film(2, 200)).save(tests / "view1_frontal.jpg")
    made = export(store, ExportOptions(tests=(tests,)))
    assert len(made.rows) == 1 and made.test_films == 1
    assert made.refused[0].reason == f"its film is one of {tests}"
    with pytest.raises(UserError, match="no such folder"):
        export(store, ExportOptions(tests=(tmp_path / "none",)))


class AfterTwoSteps:
    """Stops a run as a signal would, after two steps."""

    def __init__(self):
        self.requested, self.unsaved, self.checks = None, None, 0

    def check(self):
        self.checks += 1
        # Once before the first step, too.
        if self.checks > 3:
            raise StoppedError("SIGTERM")

    def poll(self):
        pass

    beat = poll
    unwatched = contextlib.nullcontext


@pytest.mark.slow
def test_rows_train(store, reader, think, tmp_path):
    """By the preset and its own loop, on a random model: the loss is that of the thoughts' words."""
    for seed in range(8):
        think("Left effusion.", add_film(store, smooth_film(seed), reader))
    rows = tmp_path / "rows.jsonl"
    assert main(["export", str(store.folder), "-o", str(rows)]) == 0
    config = schema.defaults("sft", "files")
    config.model = tiny_model.phantom_folder()
    config.steps, config.batch_size, config.log_every = 4, 2, 1
    config.locate_steps, config.locate_weight = 0, 0.0
    config.data.update(
        {"manifest": str(rows), "image_root": str(store.folder), "size": 56, "image_gate": "off"}
    )
    facts = checks.fingerprint(config.model, DataConfig.from_config(config))
    opened = RunFolder(str(tmp_path / "run"), config.to_dict(), facts, may_change=())
    ended = loop.run(config, opened, AfterTwoSteps(), ONE_DEVICE)
    opened.close()
    assert ended["step"] == 2
    losses = [row["loss"] for row in run_log.read(tmp_path / "run") if "loss" in row]
    assert losses and all(0 < loss < 20 for loss in losses)
    # Nothing else was in the batches: their text is that of a thought.
    made = splits.open_splits(DataConfig.from_config(config)).train
    assert {row.target for row in made.rows} == {
        "<think>Left effusion.</think><answer>Pleural Effusion</answer>"
    }


# ---- The command -----------------------------------------------------------------------------------


def test_the_command_writes_rows_and_says_so(store, reader, think, tmp_path, capsys):
    think("Left effusion.", add_film(store, smooth_film(1), reader))
    think("Possible edema.", add_film(store, smooth_film(2), reader))
    out = tmp_path / "rows.jsonl"
    assert main(["export", str(store.folder), "-o", str(out)]) == 0
    said = capsys.readouterr().err
    assert "1 of 2 thoughts gave a row" in said and "Not for diagnosis" in said
    assert "refused, no label is positive" in said and "--test=FOLDER" in said
    assert len(out.read_text().splitlines()) == 1
    [event] = store.events("export")
    assert event.body["kind"] == "capture.jsonl"
    # Not over what is there, unless it is asked for.
    assert main(["export", str(store.folder), "-o", str(out)]) == 2
    assert main(["export", str(store.folder), "-o", str(out), "--force"]) == 0
    assert main(["verify", str(store.folder)]) == 0


def test_the_command_erases(store, captures, think, tmp_path, capsys):
    capture_id = think("Left effusion.")
    assert main(["erase", str(store.folder), capture_id]) == 0
    assert captures.get(capture_id).versions[0].text is None
    assert main(["export", str(store.folder), "-o", str(tmp_path / "r.jsonl")]) == 2
    assert "no thought gave a row" in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "say export"),
        (["export", "{}", "-o", "{}/r.jsonl"], "is no store"),
        (["export", "{}", "-o", "{}/r.json"], "must be named .jsonl"),
        (["export", "{}", "-o", "{}/none/r.jsonl"], "no such folder"),
        (["export", "{}"], "required"),
        (["erase", "{}"], "required"),
        (["import", "{}"], "invalid choice"),
    ],
)
def test_bad_usage_is_one_line(tmp_path, capsys, arguments, reason):
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
