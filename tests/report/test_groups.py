"""report/groups.py, labels/sentences.py: the record of groups survives kills, sentences are judged as rewards judge
them, and the page says why one completion was preferred."""

import json
import random
import re
import tomllib

import fuzz_reports
import jax
import numpy as np
import pytest

from cxr_jax import phantom, report
from cxr_jax.errors import UserError
from cxr_jax.labels import lexicon, phrase_reading, sentences
from cxr_jax.labels.answers import extract_trace
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX
from cxr_jax.phantom import report_writer as phantom_report
from cxr_jax.report import group_records, preference
from cxr_jax.report import groups as report_groups
from cxr_jax.report.group_records import Completion, Group
from cxr_jax.report.groups import Sentence

MORE = phantom.LEXICON  # everywhere: one lexicon is one program


def flags(*names):
    return np.array([n in names for n in CHEXPERT_14])


# Sentences -----------------------------------------------------------------------------------------


def counts(read):
    said = [[s.verdict for s in text] for text in read]
    false = [v.count("contradicts") for v in said]
    return np.array(false), np.array([len(v) - v.count("nothing claimed") for v in said])


def whole(texts, present, hedged, sides):
    """What `trace_false` counts: the parser over the whole trace."""
    bank, said = load_phrase_bank(None, MORE), []
    for start in range(0, len(texts), fuzz_reports.BATCH):
        part = slice(start, start + fuzz_reports.BATCH)
        traces = [extract_trace(t).encode() for t in texts[part]]
        truth = phrase_reading.Truth.from_arrays(present[part], hedged[part], sides[part])
        width = 1 << (max(map(len, traces)) - 1).bit_length()
        packed = fuzz_reports.packed(traces, len(traces), max(width, 2048))
        said.append(jax.device_get(fuzz_reports.PROGRAM(*packed, bank, truth)))
    return [np.concatenate([part[name] for part in said]) for name in ("wrong", "claims")]


def test_as_many_sentences_contradict_as_trace_false_counts():
    n, rng = 256, random.Random(0)
    keys = phantom.example_keys(3, "test", "B", np.arange(n))
    scenes = jax.tree.map(np.asarray, phantom.sample_scenes(keys, "B"))
    labels, sides = np.asarray(phantom.labels(scenes)), np.asarray(phantom.sides(scenes))
    rows = [phantom.scene_row(scenes, i) for i in range(n)]
    texts = [
        phantom_report.target(phantom_report.write(s, "B", np.random.default_rng(i)))
        for i, s in enumerate(rows)
    ]
    gaps = [". ", ".\n\n", "\n- ", " .5. ", "? ", " ", ".", "\n\n* ", ", "]
    odd = ["".join(p + rng.choice(gaps) for p in rng.choice(texts).split(". ")) for _ in texts]
    truth = (labels == 1, labels == -1, sides)
    others = [np.roll(x, 1, axis=0) for x in truth]  # another patient's
    found = []
    for some, what in ((texts, truth), (texts, others), (odd, others)):
        got = counts(sentences.sentence_verdicts(some, *what, MORE))
        for mine, want in zip(got, whole(some, *what), strict=True):
            np.testing.assert_array_equal(mine, want)
        found.append(got[0].mean())
    assert found[0] == 0 and min(found[1:]) > 2


def test_the_same_on_random_texts_of_the_lexicon():
    rng = random.Random(7)
    with open(lexicon.DEFAULT, "rb") as file:
        draw = fuzz_reports.Texts(tomllib.load(file)).draw
    texts = [b"".join(draw(rng)).decode("utf-8", "replace") for _ in range(256)]
    masks = fuzz_reports.masks([fuzz_reports.draw_truth(rng) for _ in texts])
    bits = lambda mask: np.asarray(phrase_reading.to_bits(mask))
    truth = (
        bits(masks.present),
        bits(masks.hedged),
        np.stack([bits(masks.sides >> 16), bits(masks.sides)], -1),
    )
    got = counts(sentences.sentence_verdicts(texts, *truth, MORE))
    for mine, want in zip(got, whole(texts, *truth), strict=True):
        np.testing.assert_array_equal(mine, want)
    assert got[0].sum() > 100


def judged(text, truth=(), hedged=(), right=(), left=()):
    sides = np.stack([flags(*right), flags(*left)], -1)
    return sentences.sentence_verdicts(
        [text], flags(*truth)[None], flags(*hedged)[None], sides[None], MORE
    )[0]


def test_verdicts_and_what_is_wrong():
    text = (
        "<think>The film is AP. Left pleural effusion. No pneumothorax. Possible nodule.\n\nEdema on the right.\n- No "
        "edema. Normal chest. Cannot exclude pneumonia. Granuloma.</think><answer>No rib fracture. Edema</answer>"
    )
    got = judged(
        text,
        ["Pleural Effusion", "Edema"],
        ["Pneumonia"],
        right=["Pleural Effusion"],
        left=["Edema"],
    )
    assert got == [
        ("The film is AP.", "nothing claimed", []),
        ("Left pleural effusion.", "contradicts", ["Pleural Effusion is on the right only"]),
        ("No pneumothorax.", "agrees", []),
        ("Possible nodule.", "contradicts", ["no Lung Lesion"]),
        ("Edema on the right.", "contradicts", ["Edema is on the left only"]),
        ("No edema.", "contradicts", ["Edema is there"]),
        ("Normal chest.", "contradicts", ["the film is not normal"]),
        ("Cannot exclude pneumonia.", "open", []),  # subtle: may be called or not
        ("Granuloma.", "open", []),  # none of the 14
    ]
    assert judged("Normal chest.", ["No Finding"])[0].verdict == "agrees"
    assert (
        judged("") == []
        and sentences.sentence_verdicts([], *(np.zeros((0, 14)),) * 2, np.zeros((0, 14, 2))) == []
    )


def test_of_a_label_that_is_not_known_nothing_is_said():
    """A manifest that knows Edema alone: the rest may be there."""
    unknown = [n for n in CHEXPERT_14 if n != "Edema"]
    got = judged("Right effusion. No fracture. Normal chest. Edema.", [], unknown)
    assert [s.verdict for s in got] == ["open", "open", "open", "contradicts"]
    with pytest.raises(ValueError, match="2 texts"):
        sentences.sentence_verdicts(["a", "b"], flags()[None], flags()[None], np.zeros((1, 14, 2)))


def test_texts_go_through_in_one_shape_and_come_back_in_order():
    find = lambda stream, sizes, bank: {"size": sizes, "width": sizes * 0 + stream.shape[1]}
    for n, longest, width in ((1, 5, 2048), (64, 2048, 2048), (150, 2049, 4096)):
        texts = [b"x" * (i % 7) for i in range(n - 1)] + [b"x" * longest]
        got = sentences._search(texts, None, find)
        assert got["size"].tolist() == [len(t) for t in texts]
        assert set(got["width"]) == {width}


# From a rollout ---------------------------------------------------------------------------------------


def test_groups_that_spread_are_chosen_and_one_that_does_not():
    reward = np.array([[1, 1, 1], [0, 1, 2], [0, 0, 0], [0, 0, 5], [1, 1, 2]], float)
    assert group_records.choose(reward, 3) == [3, 1, 0]
    assert group_records.choose(reward, 1) == [3]
    assert group_records.choose(reward, 9) == [3, 1, 4, 0, 2]
    assert group_records.choose(reward[[0, 2, 3]], 3) == [2, 0, 1]
    assert group_records.choose(reward[[1, 3]], 2) == [1, 0]


class Words:
    """A tokenizer of whole texts: id i stands for texts[i]."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, ids, skip_special_tokens):
        return "".join(self.texts[i] for i in ids)


TEXTS = (
    "<think>Left pleural effusion.</think>",
    "<answer>Pleural Effusion</answer>",
    "<think>Clear. No effusion.</think>",
    "<answer>Fracture</answer>",
)


@pytest.fixture(scope="module")
def rollout():
    """Two prompts x 3: the first says what is so, then what is not, then is cut; the second says one thing."""
    tokens = np.array([[[0, 1], [2, 3], [2, 3]], [[0, 1]] * 3])
    answer = np.zeros((2, 3, 14), bool)
    answer[:, :, INDEX["Pleural Effusion"]] = [[1, 0, 0], [1, 1, 1]]
    answer[0, 1, INDEX["Fracture"]] = True
    right = np.array([[1, 0, 0], [1, 1, 1]], np.float32)
    terms = {
        "accuracy": right,
        "format": np.array([[1, 1, 0], [1, 1, 1]], np.float32),
        "overshort": right * 0 - 0.5,
    }
    finished = np.array([[True, True, False], [True] * 3])
    ro = {
        "tokens": tokens,
        "lengths": np.where(finished, 2, 1),
        "finished": finished,
        "terms": terms,
        "answer": answer,
        "reward": 2 * terms["accuracy"] + terms["format"] + terms["overshort"],
        "advantages": np.array([[1.4, -0.6, -0.8], [0, 0, 0]]),
        "kept": np.array([0]),
        "train_mask": np.repeat(finished[..., None], 2, -1),
    }
    sides = np.zeros((2, 14, 2), bool)
    sides[:, INDEX["Pleural Effusion"], 1] = True
    truth = np.stack([flags("Pleural Effusion")] * 2)
    batch = {
        "image": np.zeros((2, 8, 8)),
        "solution": truth,
        "known": truth | True,
        "hedged": truth & False,
    }
    return ro, batch | {"sides": sides}


def groups_at(rollout, step, **changes):
    weights = {"accuracy": 2.0, "format": 1.0, "overshort": 1.0, "accuracy_hard": 0.0}
    fields = {
        "step": step,
        "weights": weights,
        "set_name": "A",
        "prompts": "Look.",
        "lexicon": MORE,
    }
    return group_records.groups_of(*rollout, Words(TEXTS), **{**fields, **changes})


def test_a_rollout_becomes_groups(rollout):
    first, second = groups_at(rollout, 10, ids=["a", "b"])
    assert (first.id, first.truth, first.known, first.sides) == (
        "a",
        ["Pleural Effusion"],
        None,
        {"Pleural Effusion": "left"},
    )
    assert first.kept and not second.kept
    good, bad, cut = first.completions
    assert good.text == TEXTS[0] + TEXTS[1] and [s.verdict for s in good.sentences] == ["agrees"]
    assert [s.why for s in bad.sentences if s.verdict == "contradicts"] == [
        ["Pleural Effusion is there"]
    ]
    assert (bad.answer, bad.trained, bad.valid_format) == (["Fracture"], True, True)
    assert (cut.text, cut.trained, cut.finished, cut.valid_format) == (
        TEXTS[2],
        False,
        False,
        False,
    )
    assert not any(c.trained for c in second.completions)
    for c in first.completions + second.completions:
        assert sum(preference.contributions(first, c).values()) == pytest.approx(c.reward)


# The record -------------------------------------------------------------------------------------------


def state(folder):
    return (folder / "samples.jsonl").read_text(), sorted(
        f.name for f in (folder / "groups").iterdir()
    )


def test_a_resumed_run_ends_with_the_same_record(rollout, tmp_path):
    whole_run, killed = tmp_path / "a", tmp_path / "b"
    for folder in (whole_run, killed):
        folder.mkdir()
        report.save_groups(folder, resume_step=-1)
    for step in (10, 20, 30):
        report.save_groups(whole_run, groups_at(rollout, step))
    for step in (10, 20):
        report.save_groups(killed, groups_at(rollout, step))
    lines = (killed / "samples.jsonl").read_bytes()
    (killed / "samples.jsonl").write_bytes(lines + lines[:100])  # a kill while it wrote step 30
    (killed / "groups" / "000030_0.png").write_bytes(b"half")
    assert [g.step for g in report.load_groups(killed)] == [
        10,
        10,
        20,
        20,
    ]  # what is torn is left out
    report.save_groups(killed, resume_step=10)
    assert [g.step for g in report.load_groups(killed)] == [10, 10]
    for step in (20, 30):
        report.save_groups(killed, groups_at(rollout, step))
    assert state(killed) == state(whole_run)
    report.save_groups(killed, resume_step=-1)
    assert state(killed) == ("", [])


def test_groups_and_cases_keep_out_of_each_others_way(rollout, tmp_path):
    groups = groups_at(rollout, 10)
    report.save_groups(tmp_path, groups)
    case = dict(prompt="p", completion="c", answer=[], truth=[], score=None, id="i", hospital="A")
    for n in (2, 1):
        report.save_cases(tmp_path, [report.Case(image=np.zeros((4, 4)), **case)] * n)
        assert len(report.load_cases(tmp_path)) == n
    report.save_groups(tmp_path, groups_at(rollout, 20), resume_step=10)
    assert len(report.load_cases(tmp_path)) == 1
    got = report.load_groups(tmp_path)
    assert [g.step for g in got] == [10, 10, 20, 20] and got[0].png.startswith(b"\x89PNG")
    for mine, want in zip(got, groups, strict=False):
        assert mine.row() == want.row()


@pytest.mark.parametrize(
    "change",
    [
        {"image": "../secret.png"},
        {"step": None},
        {"completions": []},
        {"completions": "x"},
        {"truth": "Edema"},
        {"weights": {"a": "b"}},
        {"sides": 3},
    ],
)
def test_a_bad_line_gets_one_line(rollout, tmp_path, change):
    report.save_groups(tmp_path, groups_at(rollout, 10, count=1))
    row = json.loads((tmp_path / "samples.jsonl").read_text())
    (tmp_path / "samples.jsonl").write_text(json.dumps(row | change) + "\n")
    with pytest.raises(UserError, match="samples.jsonl: "):
        report.load_groups(tmp_path)


# The page ---------------------------------------------------------------------------------------------


def completion(advantage, answer=(), **changes):
    fields = dict(
        text="<think>x</think><answer>y</answer>",
        length=50,
        finished=True,
        answer=list(answer),
        valid_format=True,
        terms={"accuracy": 0.0},
        reward=0.0,
        advantage=advantage,
        trained=True,
        sentences=[],
    )
    return Completion(**{**fields, **changes})


def group(*completions, weights=None, **changes):
    fields = dict(
        step=1,
        id="i",
        set="A",
        prompt="",
        truth=["Edema"],
        hedged=[],
        known=None,
        sides={},
        kept=True,
        completions=list(completions),
        weights=weights or {"accuracy": 1.0},
    )
    return Group(**{**fields, **changes})


def test_the_sentence_says_what_decided():
    false = Sentence("Rib fracture.", "contradicts", ["no Fracture"])
    weights = {
        "accuracy_hard": 1.0,
        "trace_findings": 1.0,
        "overshort": 1.0,
        "repetition": -0.5,
        "accuracy": 0.0,
    }
    terms = lambda *values: dict(zip(weights, values, strict=True))
    best = completion(1.0, ["Edema"], terms=terms(1, 1, 0, 0.0, 1), reward=2.0, length=80)
    middle = completion(0.2, ["Edema"], terms=terms(1, 0, 0, 0, 1), reward=1.0)
    worst = completion(
        -1.0,
        ["Fracture"],
        terms=terms(0, 0.25, -0.5, 0.02, 0.5),
        reward=-0.26,
        length=40,
        sentences=[false],
    )
    g = group(middle, worst, best, weights=weights)
    assert preference.ranked(g) == [best, middle, worst]
    assert preference.why(g) == (
        "Best against worst, +2.26 reward: +1.00 accuracy_hard (names Edema, which the worst misses; the worst adds "
        "Fracture), +0.75 trace_findings (false sentences: 0 against 1; in truth: no Fracture), +0.50 overshort (80 "
        "against 40 tokens), +0.01 all else."
    )
    worst.valid_format = False
    assert "+1.00 accuracy_hard (the worst’s format is invalid)" in preference.why(g)
    assert "nothing to learn" in preference.why(group(*[completion(0.0)] * 3))
    unknown = group(best, worst, weights=weights, known=["Edema"])
    worst.valid_format = True
    assert "Fracture)" not in preference.why(unknown).split("trace_findings")[0]


def shown(*groups, **kw):
    page = report_groups.section([(g, "data:,") for g in groups], **kw)
    return page, " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_section_shows_a_group():
    sentence = Sentence("No edema.", "contradicts", ["Edema is there"])
    terms = [{"accuracy": a, "format": 1.0, "trace_false": f} for a, f in ((1.0, 0), (0.25, 1))]
    good = completion(0.9, ["Edema"], terms=terms[0], reward=1.5)
    bad = completion(
        -0.9,
        ["Fracture"],
        terms=terms[1],
        reward=0.75,
        trained=False,
        finished=False,
        sentences=[sentence],
    )
    weights = {"accuracy": 1.0, "format": 0.5, "trace_false": 0.0}
    page, text = shown(group(bad, good, weights=weights, sides={"Edema": "left"}, kept=True))
    best, worst = (text.index(f"{x} of 2") for x in ("Best", "Worst"))
    assert best < worst and "Truth: Edema (left)" in text and "R (patient’s right)" in text
    assert (
        "✓ Edema" in text[best:worst]
        and "false Fracture" in text[worst:]
        and "missed Edema" in text[worst:]
    )
    assert "✗ No edema. [Edema is there]" in text[worst:]
    assert "Truncated at the token limit. Left out of the update." in text[worst:]
    for place, numbers in (
        (best, "accuracy 1.00 × 1 +1.00 same in all +0.50 reward +1.50"),
        (worst, "accuracy 0.25 × 1 +0.25 same in all +0.50 reward +0.75"),
    ):
        assert numbers in text[place : place + 400]
    assert (
        "Terms that are the same in all format 1.00 × 0.5" in text
        and "trace_false 1.00" in text[worst:]
    )
    assert "The update did not take this group." not in text
    _, text = shown(
        group(good, bad, kept=False, hedged=["Fracture"], known=["Edema"]), shows_sides=False
    )
    assert "The update did not take this group." in text and "patient’s right" not in text
    assert "Not known: Fracture" in text and "? Fracture" in text


def test_long_groups_and_many_looks_are_folded():
    many = [completion(x, reward=x) for x in range(8)]
    page, text = shown(group(*many))
    assert "4 more between" in text and page.count('class="comp"') == 8
    assert text.index("Worst of 8") < text.index("4 more between") < text.index("Place 5 of 8")
    looks = [group(completion(0.0), step=s) for s in range(0, 200, 10)]
    page, text = shown(*looks)
    steps = [int(x) for x in re.findall(r"<(?:h3|summary)>Step (\d+)</", page)]
    assert steps == [*range(190, 80, -10), 0] and "8 more steps are in samples.jsonl" in text
    assert page.index("<h3>Step 190</h3>") < page.index("<summary>Step 180</summary>")
    assert report_groups.section([]) == ""
