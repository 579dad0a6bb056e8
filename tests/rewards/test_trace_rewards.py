"""Rewards of the trace: equal to plain Python on random completions; exploits earn less than honest readers; alarms."""

import functools
import os
import random
import subprocess
import sys

import fuzz_reports
import jax
import numpy as np
import oracle_rewards
import pytest
from places import ROOT

import cxr_jax.labels
from cxr_jax import phantom, rewards
from cxr_jax.errors import UserError
from cxr_jax.labels import CHEXPERT_14, phrase_reading, report_text
from cxr_jax.labels import answers as labels_answers
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.labels.taxonomy import PARENTS
from cxr_jax.labels.text_batches import map_texts
from cxr_jax.phantom import report_writer
from cxr_jax.rl import loop
from experiments import rl as experiment
from experiments.analysis import exploits

ROWS, WIDTH = fuzz_reports.BATCH, 1024


def trace_terms(reader, text: bytes, truth: dict) -> dict[str, float]:
    """The terms of the trace in plain Python, from the oracle of the report parser."""
    said = reader.read(text.split(b"<answer>")[0])
    answer = oracle_rewards.answer_items(text.decode("utf-8", "replace"))
    answer = None if answer is None else {n for n in CHEXPERT_14 if n.lower() in answer}
    state = dict(zip(CHEXPERT_14, said["state"], strict=True))
    affirmed = {n for n, s in state.items() if s == 1}
    hedged = {n for n, s in state.items() if s == -1}
    supported = (affirmed | hedged) - {"No Finding"}
    supported |= {p for p, children in PARENTS.items() if supported & set(children)}
    if affirmed <= {"No Finding", "Support Devices"}:
        supported.add("No Finding")
    agree = 0.0
    says_something = any(s != -2 for s in said["state"]) or said["other"] != -2
    if answer is not None and says_something:
        either = answer | affirmed
        agree = len(answer & supported) / len(either) if either else 1.0
    present, absent = truth["present"], set(CHEXPERT_14) - truth["present"] - truth["hedged"]
    earned = 0.0
    for i, name in enumerate(CHEXPERT_14):
        sides = {s for s in ("right", "left") if said[s][i]}
        if name in present & affirmed:
            known = set(truth["sides"][name])
            placed = not known or name in PARENTS or sides == known
            earned += 1.0 if placed else -0.25 if sides - known else 0.25
        elif name in present & hedged:
            earned += 0.5
    total = len(present) + len(affirmed & absent) + 0.5 * len(hedged & absent)
    blank = truth.get("blank", set())  # of what the truth hedges: to claim it is half a false claim
    total += 0.5 * (len(affirmed & blank) + 0.5 * len(hedged & blank))
    sure = (present | absent) - {"No Finding"}
    covered = sum(1 for n in sure if (n in present & affirmed) or (n in absent and state[n] == 0))
    wrong = sum(
        any(fuzz_reports.is_false(c, truth) for c in sentence) for sentence in said["claims"]
    )
    claims = len(said["claims"])
    return {
        "trace_answer": agree,
        "trace_findings": earned / total if total else 1.0,
        "trace_coverage": covered / max(1, len(sure)),
        "trace_truth": (claims - wrong) / claims if claims else 0.0,
        "trace_false": float(wrong),
    }


@pytest.fixture(scope="module")
def pair():
    return fuzz_reports.built_in()


@jax.jit
def device_terms(stream, sizes, bank, truth):
    solution = np.zeros((len(stream), 14), bool)
    return rewards.reward_terms(rewards.read_bytes(stream, sizes, bank, truth), solution)


def test_terms_of_the_trace_equal_plain_python(pair):
    rng = random.Random(5)
    for _ in range(4):
        texts, truths = [], [fuzz_reports.draw_truth(rng) for _ in range(ROWS)]
        for truth in truths[::2]:
            possible = sorted(truth["hedged"] - truth["present"])
            truth["blank"] = set(rng.sample(possible, rng.randrange(len(possible) + 1)))
        for _ in range(ROWS):
            trace = b"".join(pair.texts.draw(rng))
            names = ", ".join(rng.sample(CHEXPERT_14, rng.randrange(4))).encode()
            answer = b"<answer>%b</answer>"
            answer = rng.choice(
                [answer, answer, answer + b"<answer>Edema</answer>", b"%b", b"<answer>%b"]
            )
            texts.append(rng.choice([b"<think>%b</think>", b"%b"]) % trace + answer % names)
        stream, sizes = fuzz_reports.packed(texts, ROWS, WIDTH)
        blank = [[name in truth.get("blank", ()) for name in CHEXPERT_14] for truth in truths]
        truth_masks = fuzz_reports.masks(truths)._replace(
            blank=phrase_reading.to_mask(np.array(blank))
        )
        got = jax.device_get(device_terms(stream, sizes, pair.bank, truth_masks))
        for i, (text, truth) in enumerate(zip(texts, truths, strict=True)):
            for term, want in trace_terms(pair.reader, text, truth).items():
                assert got[term][i] == pytest.approx(want, abs=1e-6), (term, text, truth)


def test_repetition_equals_plain_python():
    rng = np.random.default_rng(0)
    n = rewards.NGRAM
    tokens = rng.integers(0, 2, (200, 60)).astype(np.int32)  # two words: n-grams come again
    lengths = rng.integers(0, 61, 200).astype(np.int32)
    lengths[:3] = 0, n - 1, n
    for row, length, share in zip(tokens, lengths, rewards.repeated(tokens, lengths), strict=True):
        grams = [tuple(row[i : i + n]) for i in range(max(0, length - n + 1))]
        assert share == pytest.approx((len(grams) - len(set(grams))) / max(1, len(grams)), abs=1e-6)
    assert rewards.repeated(tokens[:, : n - 1], lengths).shape == (200,)
    words = "no effusion is seen on the left side today " * 3
    text = f"<think>{words}</think><answer>No Finding</answer>"
    got = rewards.score([text, "a b c"], ["No Finding"] * 2)["repetition"]
    assert got[0] > 0.4 and got[1] == 0


def test_overlong_falls_to_the_limit():
    parsed = jax.jit(labels_answers.parse_bytes)(np.zeros((5, 8), np.uint8), np.zeros(5, np.int32))
    lengths = np.array([0, 100, 150, 200, 300])
    terms = jax.jit(functools.partial(rewards.reward_terms, max_length=100, limit=200))(
        parsed, np.zeros((5, 14), bool), lengths
    )
    np.testing.assert_allclose(terms["overlong"], [0, 0, -0.5, -1, -1])
    with pytest.raises(UserError, match="below the limit of 200 tokens, got 200"):
        rewards.reward_terms(parsed, np.zeros((5, 14), bool), lengths, max_length=200, limit=200)


def test_score_reads_the_trace_of_a_text():
    trace = "Small left pleural effusion. No pneumothorax. Possible edema."
    texts = [
        f"<think>{trace}</think><answer>Pleural Effusion</answer>",
        f"<think>{trace}</think><answer>Edema, Pneumothorax</answer>",
        "<think></think><answer>Pleural Effusion</answer>",
        "<think>Normal chest.</think><answer>No Finding</answer>",
    ]
    got = rewards.score(texts, ["Pleural Effusion"] * 4)
    np.testing.assert_allclose(got["trace_answer"], [1, 1 / 3, 0, 1])
    np.testing.assert_allclose(got["trace_findings"], [1 / 1.5, 1 / 1.5, 0, 0])
    np.testing.assert_allclose(
        got["trace_false"], [1, 1, 0, 1]
    )  # the hedge, and the call of a normal film
    assert set(got) | {"overlong", "overshort"} == set(rewards.TERMS)


def test_what_an_answer_of_parents_and_hedges_agrees_with():
    agree = lambda trace, answer: rewards.score([f"{trace}<answer>{answer}</answer>"], [""])[
        "trace_answer"
    ][0]
    assert (
        agree("Left basilar consolidation.", "Lung Opacity, Consolidation") == 1
    )  # a child stands for its parent,
    assert (
        agree("Left basilar opacity.", "Lung Opacity, Consolidation") == 0.5
    )  # and not the reverse
    assert agree("Cannot exclude a nodule.", "No Finding") == 1  # a hedge binds neither way
    assert agree("Cannot exclude a nodule.", "Lung Lesion") == 1
    assert agree("Calcified granuloma.", "No Finding") == 1  # an abnormality that is none of the 14
    assert agree("Pneumonia.", "No Finding") == 0
    assert agree("PICC line. Lungs are clear.", "No Finding, Support Devices") == 1
    assert agree("The patient is here.", "") == 0  # it says nothing


@pytest.mark.parametrize("hospital", phantom.HOSPITALS)
def test_every_sentence_of_a_perfect_trace_agrees_with_its_scene(hospital):
    n = 256
    keys = phantom.example_keys(3, "test", hospital, np.arange(n))
    scenes = jax.tree.map(np.asarray, phantom.sample_scenes(keys, hospital))
    labels, sides = np.asarray(phantom.labels(scenes)), np.asarray(phantom.sides(scenes))
    written = [
        report_writer.write(phantom.scene_row(scenes, i), hospital, np.random.default_rng(i))
        for i in range(n)
    ]
    bank = jax.device_put(load_phrase_bank(None, phantom.LEXICON))
    read = jax.jit(
        lambda stream, lengths, labels, sides: report_text.read_bytes(
            stream,
            lengths,
            bank,
            phrase_reading.Truth.from_arrays(labels == 1, labels == -1, sides),
        )
    )
    right = map_texts(read, [r.trace for r in written], labels, sides)
    assert (right["claims"] >= 6).all() and not right["wrong"].any()
    flipped = np.roll(labels, 1, axis=0)  # another patient's truth
    assert map_texts(read, [r.trace for r in written], flipped, sides)["wrong"].mean() > 2
    for row, state in zip(written, right["state"], strict=True):
        facts = report_writer.label_states(row.facts)
        # Lung Opacity is hedged by its hedged parts, and "clear" denies what it does not name.
        said = {
            k: v
            for k, v in facts.items()
            if v != 0 and (k, v) != ("Lung Opacity", -1) and k != "No Finding"
        }
        assert said == {k: state[CHEXPERT_14.index(k)] for k in said}, row.trace


def test_the_same_on_rows_spread_over_devices():
    script = ROOT / "tests" / "helpers" / "sharded_rewards.py"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.stdout == "same on 4\n", done.stderr


def test_what_is_not_known_of_a_label_counts_neither_way():
    """An unknown label is no reason to leave it out of the trace; an unknown side makes no denial of a side false."""
    text = "<think>Bilateral edema. Pneumonia.</think><answer>Edema, Pneumonia</answer>"
    parsed = labels_answers.parse_texts([text])
    parsed["trace"] = report_text.read_reports(["Bilateral edema. Pneumonia."])
    solution = np.array([[name == "Pneumonia" for name in CHEXPERT_14]])
    known = np.array([[name != "Edema" for name in CHEXPERT_14]])
    terms = rewards.reward_terms(parsed, solution, known=known)
    assert terms["accuracy"][0] == 1 and terms["trace_answer"][0] == 1
    trace = "Right pleural effusion. No left pleural effusion."
    got = rewards.score(
        [f"<think>{trace}</think><answer>Pleural Effusion</answer>"], ["Pleural Effusion"]
    )
    assert got["trace_false"][0] == 0 and got["trace_findings"][0] == 1


# Exploits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def earned():
    return exploits.table(64)


def test_no_exploit_earns_more_than_an_honest_mediocre_reader(earned):
    honest = earned["honest perfect reader"], earned["honest mediocre reader"]
    assert honest[0]["checked"] > honest[1]["checked"] + 0.5
    for name, row in list(earned.items())[2:]:
        assert row["checked"] < honest[1]["checked"], name


def test_the_published_set_pays_for_them(earned):
    """Why the other set is there: padding to 400 tokens pays more than reading, and junk names cost nothing."""
    honest = earned["honest mediocre reader"]["published"]
    for name in (
        "trace of filler words, to the floor",
        "pasted normal trace, padded",
        "most frequent three, padded",
    ):
        assert earned[name]["published"] > honest, name
    assert earned["junk names beside the answer"]["published"] >= honest


def test_each_exploit_is_seen_by_the_term_that_is_for_it(earned):
    honest = earned["honest mediocre reader"]
    assert earned["junk names beside the answer"]["invented"] == 10
    assert earned["all labels"]["no_finding_conflict"] == 1
    assert earned["trace of filler words, to the floor"]["repetition"] > 0.9
    assert earned["empty trace"]["trace_answer"] == earned["empty trace"]["trace_findings"] == 0
    assert earned["pasted normal trace"]["trace_answer"] < 0.5 < honest["trace_answer"]
    assert earned["everything hedged"]["trace_findings"] < 0.5 * honest["trace_findings"]
    for name in ("answer given twice", "second answer with all labels"):
        assert earned[name]["accuracy_hard"] == 0


def test_modal_share():
    answers = np.eye(14, dtype=bool)
    assert rewards.modal_share(answers) == pytest.approx(1 / 14)
    assert rewards.modal_share(
        np.concatenate([answers, answers[:1], answers[:1]])
    ) == pytest.approx(3 / 16)
    assert rewards.modal_share(np.zeros((7, 14), bool)) == 1


# Bad input ----------------------------------------------------------------------------------------


def test_a_tokenizer_that_cannot_write_the_tags_is_refused():
    from completions import small_tokenizer
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken("<answer>", special=True)])  # decoding drops it
    with pytest.raises(UserError, match="cannot write <answer>"):
        labels_answers.TokenBytes.from_tokenizer(tokenizer)


@pytest.mark.parametrize("texts", ["edema", b"edema", {"edema": 1}, [None], [float("nan")]])
def test_what_is_no_list_of_texts_is_refused(texts):
    with pytest.raises(UserError, match="^texts: "):
        report_text.read_reports(texts)


@pytest.mark.parametrize("lengths", [[-1], [1.5], [[1]], [2**40], [float("nan")]])
def test_bad_lengths_are_refused(lengths):
    with pytest.raises(UserError, match="whole numbers of tokens"):
        rewards.score(["x"], ["Edema"], lengths)
    with pytest.raises(UserError, match="not one str"):
        rewards.score("x", ["Edema"], [1])


@pytest.mark.parametrize(
    "value, reason", [("nan", "is not a finite number"), (0.0, "weighs nothing")]
)
def test_weights_that_mean_nothing_are_refused(value, reason):
    config = experiment.get_config()
    assert set(config.rl.reward_weights) == set(rewards.TERMS)  # so that each can be set by a flag
    for term in rewards.TERMS:
        config.rl.reward_weights[term] = float(value)
    with pytest.raises(UserError, match=reason):
        loop.check(config)


def test_exploits_refuses_bad_arguments(capsys):
    for argv in (["-n", "0"], ["-n", "x"], ["--seed", "-1"], ["--see", "1"], ["x"]):
        assert exploits.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_public_names():
    assert cxr_jax.labels.parse_reports(["No effusion."]).tolist()[0][10] == 0
    assert report_text.parse_reports([]).shape == (0, 14)
