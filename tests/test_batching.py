"""Batches: the position is the step, waiting can be interrupted, unknown labels count for nothing."""

import json
import threading
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cxr_jax import evaluate, rewards
from cxr_jax.data import batching
from cxr_jax.data.phantom import readers
from cxr_jax.data.phantom.constants import F
from cxr_jax.errors import UserError
from cxr_jax.labels import parser
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX
from cxr_jax.workdir import Stopped


def test_steps_come_in_order_from_any_start():
    made = lambda a, b: [x["step"] for x in batching.step_loader(lambda s: {"step": s}, a, b)]
    assert made(0, 7) == [*range(7)] and made(3, 7) == [3, 4, 5, 6] and made(7, 7) == []


def test_an_error_arrives_at_its_step():
    def make(step):
        if step == 2:
            raise UserError("a.png: is torn")
        return step

    loader = batching.step_loader(make, 0, 5)
    assert [next(loader), next(loader)] == [0, 1]
    with pytest.raises(UserError, match="a.png: is torn"):
        next(loader)


def test_waiting_for_data_that_never_come_can_be_interrupted():
    never, asked = threading.Event(), []

    def poll():
        asked.append(1)
        if len(asked) > 1:
            raise Stopped("SIGTERM")

    loader = batching.step_loader(lambda step: never.wait(), 0, 5, poll=poll)
    began = time.monotonic()
    threading.Timer(1.5, never.set).start()  # so that the test's thread ends, too
    with pytest.raises(Stopped):
        next(loader)
    assert time.monotonic() - began < 4


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    loader = batching.step_loader(lambda step: step, 0, 10**6)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before


def test_a_finite_source_is_walked_once_an_epoch():
    flat = np.concatenate([batching.indices_of(step, 4, 10) for step in range(10)])
    for epoch in flat.reshape(4, 10):
        assert sorted(epoch) == [*range(10)]
    assert list(flat[:10]) != list(flat[10:20])
    other = np.concatenate([batching.indices_of(step, 4, 10, seed=1) for step in range(10)])
    assert sorted(other[:10]) == [*range(10)] and list(other[:10]) != list(flat[:10])
    assert list(batching.indices_of(7, 4, batching.ENDLESS)) == [28, 29, 30, 31]


@pytest.mark.parametrize("hospital", "AB")
def test_solutions_need_no_images(hospital):
    source, indices = batching.PhantomSource(hospital, "select", 5), np.arange(40, 44)
    batch = source.batch(indices)
    assert np.array_equal(source.solutions(indices), batch["solution"]) and batch["known"].all()
    assert source.targets(batch, indices) == source.targets(source.batch(indices), indices)


def test_readers_miss_small_findings_and_never_invent():
    source, indices = batching.PhantomSource("A", "train", 5), np.arange(64)
    batch = source.batch(indices)
    answers = {}
    for miss in (0.0, 0.75, 1.0):
        texts = batching.PhantomSource("A", "train", 5, miss).targets(batch, indices)
        answers[miss] = np.asarray(parser.parse_texts(texts)["answer"])
    assert np.array_equal(answers[0.0], batch["solution"])
    findings = np.arange(14) != INDEX["No Finding"]
    for few, many in ((1.0, 0.75), (0.75, 0.0)):
        assert not (answers[few] & ~answers[many]).any()  # who misses more says less, and nothing else
        assert answers[few][:, findings].sum() < answers[many][:, findings].sum()


def test_what_a_reader_misses():
    severity = np.zeros(12, np.float32)
    read = lambda s, miss=1.0: readers.as_read({"severity": s}, miss, np.random.default_rng(0))["severity"]
    severity[F["fracture"]] = 0.45
    assert np.array_equal(read(severity), severity)  # it is all there is
    severity[[F["edema"], F["support_devices"], F["lung_lesion"]]] = 0.9, 1.0, 0.2
    without = np.where(np.arange(12) == F["fracture"], np.float32(0), severity)
    assert np.array_equal(read(severity), without)
    assert np.array_equal(read(severity, 0.0), severity)
    severity[F["fracture"]] = 0.6
    assert np.array_equal(read(severity), severity)  # not small
    severity[F["fracture"]] = 0.45
    reads = [readers.as_read({"severity": severity}, 0.75, np.random.default_rng(i)) for i in range(2000)]
    assert abs(np.mean([r["severity"][F["fracture"]] == 0 for r in reads]) - 0.75) < 0.04


@pytest.fixture
def manifest(tmp_path):
    """20 patients of two images and prompts of different lengths."""
    rows = []
    for i in range(40):
        Image.fromarray(np.full((60, 60), i, np.uint8)).save(tmp_path / f"{i}.png")
        talk = [{"from": "human", "value": "What is wrong" + " here" * (i % 7) + "?"}]
        row = {"id": str(i), "image": f"{i}.png", "patient_id": i // 2, "conversations": talk, "solution": "Edema"}
        rows.append(row)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ConfigDict(
        {"data": dict(source="files", manifest=str(tmp_path / "m.jsonl"), image_root=str(tmp_path), size=56, seed=0)}
    )


def test_no_patient_is_in_two_splits(manifest):
    found = evaluate.sources(manifest)
    parts = [found.train, *found.select.values(), *found.test.values()]
    patients = [{r.group for r in p.rows} for p in parts]
    assert all(patients) and sum(map(len, patients)) == len(set.union(*patients)) == 20
    assert set(evaluate.all_prompts(found)) == {r.prompt for p in parts for r in p.rows}
    assert np.array_equal(found.train.solutions([0, 1]), found.train.batch([0, 1])["solution"])


def _mask(*names):
    return np.isin(np.arange(14), [INDEX[n] for n in names])[None]


def test_unknown_labels_count_for_nothing():
    parsed = parser.parse_texts(["<think>x</think><answer>Edema, Fracture</answer>"])
    terms = lambda solution, known: rewards.reward_terms(parsed, solution, known=known)
    score = lambda solution, known: float(terms(solution, known)["accuracy"][0])
    everything = np.ones((1, len(CHEXPERT_14)), bool)
    assert score(_mask("Edema"), everything) == 0.5
    assert score(_mask("Edema"), ~_mask("Fracture")) == 1.0  # Fracture is uncertain: saying it costs nothing
    assert score(_mask("Edema", "Fracture"), ~_mask("Fracture")) == 1.0  # and earns nothing
    assert score(_mask("Pneumonia"), ~_mask("Edema", "Fracture")) == 0.0
    plain = rewards.reward_terms(parsed, _mask("Edema"))
    full = terms(_mask("Edema"), everything)
    assert {k: float(v[0]) for k, v in plain.items()} == {k: float(v[0]) for k, v in full.items()}
