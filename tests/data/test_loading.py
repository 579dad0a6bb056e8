"""Batches: the position is the step, waiting can be interrupted, unknown labels count for nothing."""

import json
import threading
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cxr_jax import rewards
from cxr_jax.config.sections import DataConfig
from cxr_jax.data import loading
from cxr_jax.data.sources import base, phantom, splits
from cxr_jax.errors import UserError
from cxr_jax.labels import answers as labels_answers
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX
from cxr_jax.phantom import human_readers
from cxr_jax.phantom.constants import FINDING_INDEX
from cxr_jax.runtime.signals import StoppedError


def test_steps_come_in_order_from_any_start():
    made = lambda a, b: [x["step"] for x in loading.step_loader(lambda s: {"step": s}, a, b)]
    assert made(0, 7) == [*range(7)] and made(3, 7) == [3, 4, 5, 6] and made(7, 7) == []


def test_an_error_arrives_at_its_step():
    def make(step):
        if step == 2:
            raise UserError("a.png: is torn")
        return step

    loader = loading.step_loader(make, 0, 5)
    assert [next(loader), next(loader)] == [0, 1]
    with pytest.raises(UserError, match="a.png: is torn"):
        next(loader)


def test_waiting_for_data_that_never_come_can_be_interrupted():
    never, asked = threading.Event(), []

    def poll():
        asked.append(1)
        if len(asked) > 1:
            raise StoppedError("SIGTERM")

    loader = loading.step_loader(lambda step: never.wait(), 0, 5, poll=poll)
    began = time.monotonic()
    threading.Timer(1.5, never.set).start()  # so that the test's thread ends, too
    with pytest.raises(StoppedError):
        next(loader)
    assert time.monotonic() - began < 4


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    loader = loading.step_loader(lambda step: step, 0, 10**6)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before and list(loader) == []
    loader = loading.step_loader(lambda step: step, 0, 10**6)  # dropped, not closed
    thread = loader._thread
    del loader
    thread.join(5)
    assert not thread.is_alive()


def test_what_ends_the_thread_that_prepares_reaches_the_program():
    def make(step):
        raise SystemExit(3)

    loader = loading.step_loader(make, 0, 5)
    with pytest.raises(SystemExit):
        next(loader)
    assert list(loader) == []


def test_the_wait_for_data_is_counted_and_batches_are_prepared_ahead():
    go, made = threading.Event(), []

    def make(step):
        go.wait(5)
        made.append(step)
        return step

    loader = loading.step_loader(make, 0, 6, prefetch=2)
    threading.Timer(0.5, go.set).start()
    assert next(loader) == 0 and 0.3 < loader.last_wait < 4
    while len(made) < 4:  # the one that was taken, two that lie ready, one that waits for its place
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3] and next(loader) == 1 and loader.last_wait < 0.1
    stats = loader.stats()
    assert (
        stats["batches"] == 2 and 0.3 < stats["wait_seconds"] < 4 and stats["prepare_seconds"] > 0.3
    )
    assert list(loader) == [2, 3, 4, 5] and loader.stats()["batches"] == 6


def test_rows_are_made_by_several_threads_in_order():
    together = threading.Barrier(3, timeout=5)

    def work(i):
        together.wait()  # passes only if three are at work at a time
        return -i

    before = threading.active_count()
    assert loading.map_in_threads(work, range(6), 3) == [0, -1, -2, -3, -4, -5]
    assert threading.active_count() == before and loading.map_in_threads(work, [], 3) == []


def test_of_several_bad_rows_the_first_is_named():
    late = threading.Event()

    def work(i):
        if i == 1:
            late.wait(5)
            raise UserError("row 1")
        if i == 2:
            late.set()
            raise UserError("row 2")
        return i

    with pytest.raises(UserError, match="row 1"):
        loading.map_in_threads(work, range(100), 3)


def test_closing_ends_a_batch_between_its_rows():
    begun, done = threading.Semaphore(0), []

    def work(i):
        begun.release()
        time.sleep(0.01)
        done.append(i)

    loader = loading.step_loader(lambda step: loading.map_in_threads(work, range(10**4), 2), 0, 5)
    begun.acquire()
    loader.close()
    assert not loader._thread.is_alive() and len(done) < 500


def test_a_finite_source_is_walked_once_an_epoch():
    flat = np.concatenate([base.indices_of(step, 4, 10) for step in range(10)])
    for epoch in flat.reshape(4, 10):
        assert sorted(epoch) == [*range(10)]
    assert list(flat[:10]) != list(flat[10:20])
    other = np.concatenate([base.indices_of(step, 4, 10, seed=1) for step in range(10)])
    assert sorted(other[:10]) == [*range(10)] and list(other[:10]) != list(flat[:10])
    assert list(base.indices_of(7, 4, base.ENDLESS)) == [28, 29, 30, 31]


@pytest.mark.parametrize("sites", [0, 3])
def test_a_row_is_the_same_whichever_rows_are_beside_it(sites):
    source, indices = (
        phantom.PhantomSource("A", "train", 5, sites=sites),
        np.array([9, 2, 40, 3, 17]),
    )
    whole = source.batch(indices)
    for part in ([0], [3, 1], [4, 2, 0]):
        rows = source.batch(indices[part])
        same = lambda a, b, part=part: np.testing.assert_array_equal(a[np.array(part)], b)
        jax.tree.map(same, whole, rows)
    assert whole["image"].shape == (5, 224, 224) and whole["regions"].shape == (5, 12, 8, 8)


@pytest.mark.parametrize("hospital", "AB")
def test_solutions_need_no_images(hospital):
    source, indices = phantom.PhantomSource(hospital, "select", 5), np.arange(40, 44)
    batch = source.batch(indices)
    assert np.array_equal(source.solutions(indices), batch["solution"]) and batch["known"].all()
    assert source.targets(batch, indices) == source.targets(source.batch(indices), indices)


def test_readers_miss_small_findings_and_never_invent():
    source, indices = phantom.PhantomSource("A", "train", 5), np.arange(64)
    batch = source.batch(indices)
    answers = {}
    for miss in (0.0, 0.75, 1.0):
        texts = phantom.PhantomSource("A", "train", 5, miss).targets(batch, indices)
        answers[miss] = np.asarray(labels_answers.parse_texts(texts)["answer"])
    assert np.array_equal(answers[0.0], batch["solution"])
    findings = np.arange(14) != INDEX["No Finding"]
    for few, many in ((1.0, 0.75), (0.75, 0.0)):
        assert not (
            answers[few] & ~answers[many]
        ).any()  # who misses more says less, and nothing else
        assert answers[few][:, findings].sum() < answers[many][:, findings].sum()


def test_confused_readers_err_to_no_side():
    options = {share: {"reader_confused": share} for share in (0.0, 0.3, 1.0)}
    sources = {
        share: phantom.PhantomSource("A", "train", 5, **some) for share, some in options.items()
    }
    indices = np.arange(400)
    facts = sources[0.0].facts(indices)
    said = {}
    for share, source in sources.items():
        texts = source.targets(facts, indices)
        said[share] = np.asarray(labels_answers.parse_texts(texts)["answer"])
        assert texts[7:9] == source.targets(source.facts(indices[7:9]), indices[7:9])
    truth = sources[0.0].solutions(indices)
    assert np.array_equal(said[0.0], truth)
    # Of each finding as many are invented as are left out, but for what 600 draws allow.
    invented, left_out = ((said[0.3] > truth).sum(0), (said[0.3] < truth).sum(0))
    findings = [place for place in range(14) if CHEXPERT_14[place] != "No Finding"]
    assert (
        abs(invented - left_out)[findings] <= 4 * np.sqrt(invented + left_out + 1)[findings]
    ).all()
    wrong = (said[0.3] != truth).mean(0)
    # Of those that are another patient's, most are as the truth by chance.
    chance = 2 * truth.mean(0) * (1 - truth.mean(0))
    assert abs((wrong / chance)[findings].mean() - 0.3) < 0.06
    # Who is confused about everything says nothing of the film.
    both = said[1.0] & truth
    assert abs(both.mean(0) - said[1.0].mean(0) * truth.mean(0))[findings].max() < 0.05


def test_what_a_reader_misses():
    severity = np.zeros(12, np.float32)
    read = lambda s, miss=1.0: human_readers.as_read(
        {"severity": s}, miss, np.random.default_rng(0)
    )["severity"]
    severity[FINDING_INDEX["fracture"]] = 0.45
    assert np.array_equal(read(severity), severity)  # it is all there is
    severity[
        [FINDING_INDEX["edema"], FINDING_INDEX["support_devices"], FINDING_INDEX["lung_lesion"]]
    ] = 0.9, 1.0, 0.2
    without = np.where(np.arange(12) == FINDING_INDEX["fracture"], np.float32(0), severity)
    assert np.array_equal(read(severity), without)
    assert np.array_equal(read(severity, 0.0), severity)
    severity[FINDING_INDEX["fracture"]] = 0.6
    assert np.array_equal(read(severity), severity)  # not small
    severity[FINDING_INDEX["fracture"]] = 0.45
    reads = [
        human_readers.as_read({"severity": severity}, 0.75, np.random.default_rng(i))
        for i in range(2000)
    ]
    assert (
        abs(np.mean([r["severity"][FINDING_INDEX["fracture"]] == 0 for r in reads]) - 0.75) < 0.04
    )


@pytest.fixture
def manifest(tmp_path):
    """20 patients of two images and prompts of different lengths."""
    rows = []
    for i in range(40):
        Image.fromarray(np.full((60, 60), i, np.uint8)).save(tmp_path / f"{i}.png")
        talk = [{"from": "human", "value": "What is wrong" + " here" * (i % 7) + "?"}]
        row = {
            "id": str(i),
            "image": f"{i}.png",
            "patient_id": i // 2,
            "conversations": talk,
            "solution": "Edema",
        }
        rows.append(row)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ConfigDict(
        {
            "data": dict(
                source="files",
                manifest=str(tmp_path / "m.jsonl"),
                image_root=str(tmp_path),
                size=56,
                seed=0,
            )
        }
    )


def test_no_patient_is_in_two_splits(manifest):
    found = splits.open_splits(DataConfig.from_config(manifest))
    parts = [found.train, *found.select.values(), *found.test.values()]
    patients = [{r.group for r in p.rows} for p in parts]
    assert all(patients) and sum(map(len, patients)) == len(set.union(*patients)) == 20
    assert set(found.prompts()) == {r.prompt for p in parts for r in p.rows}
    assert np.array_equal(found.train.solutions([0, 1]), found.train.batch([0, 1])["solution"])


def _mask(*names):
    return np.isin(np.arange(14), [INDEX[n] for n in names])[None]


def test_unknown_labels_count_for_nothing():
    parsed = labels_answers.parse_texts(["<think>x</think><answer>Edema, Fracture</answer>"])
    terms = lambda solution, known: rewards.reward_terms(parsed, solution, known=known)
    score = lambda solution, known: float(terms(solution, known)["accuracy"][0])
    everything = np.ones((1, len(CHEXPERT_14)), bool)
    assert score(_mask("Edema"), everything) == 0.5
    assert (
        score(_mask("Edema"), ~_mask("Fracture")) == 1.0
    )  # Fracture is uncertain: saying it costs nothing
    assert score(_mask("Edema", "Fracture"), ~_mask("Fracture")) == 1.0  # and earns nothing
    assert score(_mask("Pneumonia"), ~_mask("Edema", "Fracture")) == 0.0
    plain = rewards.reward_terms(parsed, _mask("Edema"))
    full = terms(_mask("Edema"), everything)
    assert {k: float(v[0]) for k, v in plain.items()} == {k: float(v[0]) for k, v in full.items()}
