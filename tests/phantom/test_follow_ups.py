"""Follow-ups of phantoms: sentences are true of the scene, nothing that was found is left out, readings stay."""

import re
import types

import jax
import numpy as np
import pytest

import cxr_jax
from cxr_jax import phantom
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.labels import phrase_reading, report_text
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.labels.text_batches import map_texts
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.phantom import follow_ups, report_writer, wording
from cxr_jax.phantom.constants import DEVICES, FINDINGS
from cxr_jax.presets import sft as presets_sft

N = 256
SIDE = ("right", "left", "bilateral")
ZONE = ("upper zone", "mid zone", "lower zone")
AIR = ("at the apex", "along the wall", "at the base")


_sample = jax.jit(phantom.sample_scenes, static_argnames="hospital")


def scenes_of(hospital, split="test"):
    keys = phantom.example_keys(3, split, hospital, np.arange(N))
    return jax.tree.map(np.asarray, _sample(keys, hospital=hospital))


@pytest.fixture(scope="module", params=phantom.HOSPITALS)
def world(request):
    hospital = request.param
    scenes = scenes_of(hospital)
    reports = [
        report_writer.write(phantom.scene_row(scenes, i), hospital, np.random.default_rng(i))
        for i in range(N)
    ]
    texts = {
        question: [
            follow_ups.answer(question, report, hospital, np.random.default_rng(i))
            for i, report in enumerate(reports)
        ]
        for question in follow_ups.QUESTIONS
    }
    return types.SimpleNamespace(hospital=hospital, scenes=scenes, reports=reports, texts=texts)


@pytest.fixture(scope="module")
def read():
    """The project's own parser of reports, with what is so."""
    bank = jax.device_put(load_phrase_bank(None, phantom.LEXICON))
    return jax.jit(
        lambda stream, lengths, labels, sides: report_text.read_bytes(
            stream,
            lengths,
            bank,
            phrase_reading.Truth.from_arrays(labels == 1, labels == -1, sides),
        )
    )


def test_answers_read_back_as_true_of_the_scene(world, read):
    labels, sides = (
        np.asarray(phantom.labels(world.scenes)),
        np.asarray(phantom.sides(world.scenes)),
    )
    everything = [text for question in follow_ups.QUESTIONS for text in world.texts[question]]
    tile = lambda x: np.concatenate([x] * len(follow_ups.QUESTIONS))
    said = map_texts(read, everything, tile(labels), tile(sides))
    assert not said["wrong"].any() and (said["claims"] > 0).mean() > 0.95
    state = said["state"].reshape(len(follow_ups.QUESTIONS), N, 14)
    right_left = np.stack([said["right"], said["left"]], -1).reshape(*state.shape, 2)
    none, opacity, devices = (
        CHEXPERT_14.index(name) for name in ("No Finding", "Lung Opacity", "Support Devices")
    )
    for number, question in enumerate(follow_ups.QUESTIONS):
        affirmed = state[number] == 1
        assert not (affirmed & (labels != 1)).any()
        assert not ((state[number] == -1) & (labels == 0)).any()
        # What is there is said, but for parents; differentials are of findings, and devices are none.
        left_out = (labels == 1) & ~affirmed
        left_out[:, [none, opacity]] = False
        if question == follow_ups.DIFFERENTIALS:
            left_out[:, devices] = False
        assert not left_out.any()
        # On its side; of the midline there is none.
        placed = affirmed & (labels == 1) & sides.any(-1)
        placed[:, opacity] = False
        assert (right_left[number] == sides)[placed].all() and placed.sum() > 100
    # Of another patient most would be wrong: the parser does see it.
    flipped = np.roll(labels, 1, axis=0)
    wrong = map_texts(read, world.texts[follow_ups.STRUCTURED], flipped, sides)["wrong"]
    assert wrong.mean() > 2


def expected_phrases(scene):
    """What an impression has to say, from the arrays of a scene: (finding, words in its line, whether it is there)."""
    for k, name in enumerate(FINDINGS[:11]):
        severity = float(scene["severity"][k])
        if severity <= 0:
            continue
        side, zone = SIDE[scene["side"][k]], ZONE[scene["zone"][k]]
        words = [wording.SHORT_NAMES[name]]
        if name not in ("cardiomegaly", "enlarged_cardiomediastinum", "edema"):
            words.append(side)
        if name == "pneumothorax":
            words.append(AIR[scene["zone"][k]])
        elif name in (*wording.LUNG_FINDINGS, "pleural_other", "fracture") and name != "edema":
            words.append(zone)
        if severity >= 0.35 and name in wording.SEVERITY_WORDS:
            grade = int(severity >= np.float32(0.6)) + int(severity >= np.float32(0.8))
            words.append(wording.SEVERITY_WORDS[name][grade])
        yield name, words, severity >= np.float32(0.35)


def test_an_impression_names_each_finding_once_with_its_place_and_size(world):
    hedged_words = re.compile("possible|cannot|questionable", re.IGNORECASE)
    for i, text in enumerate(world.texts[follow_ups.STRUCTURED]):
        scene = phantom.scene_row(world.scenes, i)
        lines = text.split("Impression:\n")[1].split("\n")
        assert [line.split(". ")[0] for line in lines] == [str(n + 1) for n in range(len(lines))]
        expected = list(expected_phrases(scene))
        for _, words, is_there in expected:
            [line] = [
                line
                for line in lines
                if all(word in line.lower() for word in words)
                and bool(hedged_words.search(line)) != is_there
            ]
            assert line.endswith(".")
        on = [
            name.replace("_", " ")
            for name, here in zip(DEVICES, scene["device"], strict=True)
            if here
        ]
        nothing = not any(is_there for *_, is_there in expected)
        assert len(lines) == len(expected) + bool(on) + nothing
        assert (lines[0] == "1. No finding.") == nothing
        assert [name for name in on if name in lines[-1].lower()] == on
        # The most urgent of those that are there comes first.
        there = [name for name, _, is_there in expected if is_there]
        if there:
            first = min(there, key=list(wording.URGENCY).index)
            assert wording.SHORT_NAMES[first] in lines[0].lower()


def test_a_structured_report_has_its_parts_in_order(world):
    for text, report in zip(world.texts[follow_ups.STRUCTURED], world.reports, strict=True):
        heads = re.findall(r"^([A-Z][a-z ]+):", text, re.MULTILINE)
        assert heads == [
            "Technique",
            "Findings",
            "Devices",
            "Right lung",
            "Left lung",
            "Pleura",
            "Mediastinum",
            "Hila",
            "Heart",
            "Bones",
            "Impression",
        ]
        # Findings are those of the reading, word for word.
        assert report.sentences[5].text in text.split("\n")


def test_differentials_begin_with_the_cause_that_the_reading_gives(world):
    agreed = 0
    for text, report in zip(world.texts[follow_ups.DIFFERENTIALS], world.reports, strict=True):
        for name, causes in wording.CAUSES.items():
            of_finding = re.search(
                rf"{wording.SHORT_NAMES[name]}[a-z ]* likely from ([a-z ]+); consider ([a-z ,]+)\.",
                text.lower(),
            )
            if of_finding is None:
                continue
            first, others = of_finding.groups()
            # Other signs may add one.
            assert {first, *re.split(", | or ", others)} >= set(causes)
            summary = report.sentences[-1].text.lower()
            short = wording.SHORT_NAMES[name]
            told = re.search(
                rf"\b{short} (?:likely )?(?:from|due to) ([a-z ]+?) or ", summary
            ) or re.search(rf"consider ([a-z ]+?) or [a-z ]+ for {short}[;.]", summary)
            if told:
                agreed += 1
                assert told.group(1) == first
    assert agreed > 50


# ---- Conversations -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    return np.arange(N), {"scene": scenes_of("A", "train")}


def test_without_follow_ups_conversations_are_the_readings_of_before(drawn):
    indices, batch = drawn
    source = PhantomSource("A", "train", 3, 0.75)
    targets = source.targets(batch, indices)
    assert source.conversations(batch, indices) == [
        (("user", FIND_PROMPT), ("assistant", target)) for target in targets
    ]
    assert source.prompts() == (FIND_PROMPT,)
    # With them the reading is the same, whatever follows.
    talks = PhantomSource("A", "train", 3, 0.75, follow_ups=1.0).conversations(batch, indices)
    assert [talk[1].content for talk in talks] == targets


def test_a_share_of_conversations_goes_on(drawn):
    indices, batch = drawn
    source = PhantomSource("A", "train", 3, 0.75, follow_ups=0.5)
    talks = source.conversations(batch, indices)
    longer = np.array([len(talk) > 2 for talk in talks])
    assert 0.4 < longer.mean() < 0.6
    questions = [[turn.content for turn in talk if turn.role == "user"] for talk in talks]
    first = {talk[0] for talk in questions}
    assert first == {FIND_PROMPT, follow_ups.EXAMINE} == set(source.prompts())
    examined = np.mean(
        [
            talk[0] == follow_ups.EXAMINE
            for talk, more in zip(questions, longer, strict=True)
            if more
        ]
    )
    assert 0.1 < examined < 0.4
    later = [question for talk in questions for question in talk[1:]]
    assert {later.count(question) > 20 for question in follow_ups.QUESTIONS} == {True}
    assert {len(talk) for talk in questions} == {1, 2, 3}
    assert all(len(set(talk)) == len(talk) for talk in questions)
    roles = [turn.role for turn in max(talks, key=len)]
    assert roles == ["user", "assistant"] * 3


def test_a_conversation_depends_on_its_index_alone(drawn):
    indices, batch = drawn
    source = PhantomSource("A", "train", 3, 0.75, follow_ups=0.5)
    talks = source.conversations(batch, indices)
    some = indices[40:20:-3]
    part = {"scene": {name: values[some] for name, values in batch["scene"].items()}}
    assert source.conversations(part, some) == [talks[i] for i in some]
    other = PhantomSource("A", "train", 4, 0.75, follow_ups=0.5).conversations(batch, indices)
    assert np.mean([a == b for a, b in zip(talks, other, strict=True)]) < 0.1


def test_conversations_fit_the_preset(world):
    """All that follows the first question, in tokens of the embedded model."""
    tokenizer = tokenizers.load(str(cxr_jax.asset("phantom")))
    lengths = []
    for seed in range(3):
        for report in world.reports:
            rng = np.random.default_rng([seed, len(lengths)])
            talk = follow_ups.talk("?", report_writer.target(report), report, world.hospital, rng)
            text = "".join(
                f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
                for question, answer in talk
            )
            lengths.append(len(tokenizer(text)["input_ids"]))
    assert max(lengths) < presets_sft.get_config("follow_ups").max_completion < 1.2 * max(lengths)
