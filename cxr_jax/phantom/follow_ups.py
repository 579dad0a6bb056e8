"""Answers the questions that follow a reading: differentials, a structured report, an examination in a few sentences.

The published model is asked these after (or in place of) the list of abnormalities. Here each is answered from the
facts of the report that was written for the scene, so that no answer says more, or less, than the reading before it.
"""

from typing import NamedTuple

import numpy as np

from cxr_jax.phantom import wording
from cxr_jax.phantom.constants import BOTH
from cxr_jax.phantom.report_writer import (
    Fact,
    Report,
    Sentence,
    affirmed_sides,
    join_words,
    list_causes,
)

EXAMINE = "Examine the chest X-ray."
DIFFERENTIALS = "Provide differentials."
STRUCTURED = "Write a structured report."
QUESTIONS = (EXAMINE, DIFFERENTIALS, STRUCTURED)

CHARACTERS = 1800  # of a conversation of three turns: with their frames, 480 tokens of the embedded tokenizer
_EXAMINED = 0.25  # how often a conversation begins with EXAMINE
_NAME_OF = {label: name for name, label in wording.LABEL_OF.items()}
# What a scene puts on a side, and how its place is said.
_PHRASES = {
    "enlarged_cardiomediastinum": "mediastinal widening",
    "cardiomegaly": "cardiomegaly",
    "lung_lesion": "{side} {zone} zone lesion",
    "edema": "{side} edema",
    "consolidation": "{side} {zone} zone consolidation",
    "pneumonia": "{side} {zone} zone pneumonia",
    "atelectasis": "{side} {zone} zone atelectasis",
    "pneumothorax": "{side} pneumothorax {place}",
    "pleural_effusion": "{side} pleural effusion",
    "pleural_other": "{side} {zone} zone pleural thickening",
    "fracture": "{side} {zone} zone rib fracture",
}
# Organs of which phantoms have nothing to say but that they are as they should be.
_ALWAYS_NORMAL = ("Airways:", "Abdomen:")


_NOTHING = Sentence("No finding.", (Fact("No Finding", 1),))


class _Found(NamedTuple):
    """A finding that a report affirms or hedges."""

    name: str
    fact: Fact


def talk(
    question: str, target: str, report: Report, hospital: str, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Make a conversation about a scene: a reading, then one or two of the other questions.

    Args:
        question: what the reading answers; one in four times `EXAMINE` is asked in its place.
        target: the reading of the report (`report_writer.target`).
        hospital: whose wording is used.
        rng: chooses questions and wordings.

    Returns:
        (question, answer) of each turn. The second question is left out where it would make a long conversation
        longer than CHARACTERS.
    """
    # Every number is drawn whatever comes of it, in this order.
    if rng.random() < _EXAMINED:
        question = EXAMINE
    count = int(rng.integers(1, 3))
    others = [str(other) for other in rng.permutation(QUESTIONS) if other != question][:count]
    turns = [
        (question, target),
        *((other, answer(other, report, hospital, rng)) for other in others),
    ]
    if sum(len(text) for turn in turns for text in turn) > CHARACTERS:
        turns = turns[:2]
    return turns


def answer(question: str, report: Report, hospital: str, rng: np.random.Generator) -> str:
    """Answer one of `QUESTIONS` about the scene of a report.

    Args:
        hospital: whose wording is used.
        rng: drawn from once; it only chooses between wordings, never between facts.
    """
    # A table and no chain of ifs: whoever adds a question adds a line.
    write = {EXAMINE: examination, DIFFERENTIALS: differentials, STRUCTURED: structured_report}
    hedge = str(rng.choice(wording.PHRASES[hospital]["hedge"]))
    # Sections are lines; elsewhere sentences follow each other.
    separator = "\n" if question == STRUCTURED else " "
    return separator.join(sentence.text for sentence in write[question](report, hedge))


# ---- The answers -----------------------------------------------------------------------------------


def examination(report: Report, hedge: str) -> list[Sentence]:
    """Say how the film was taken, what is there, what may be, and that nothing else is.

    Args:
        hedge: the phrase for what may be there, with {noun} in it.
    """
    quality = report.sentences[0]
    technique = Sentence(quality.text.removeprefix("Quality: "), quality.facts)
    impression = _impression(report, hedge)
    # "No other finding" would speak of one.
    if impression[0] == _NOTHING:
        return [technique, *impression]
    return [technique, *impression, Sentence("No other finding.", ())]


def differentials(report: Report, hedge: str) -> list[Sentence]:
    """Give the causes of each finding that is there, likeliest first, and name those that have to be confirmed.

    Args:
        hedge: see `examination`.
    """
    affirmed = affirmed_sides(report.sentences[:-1])
    sentences = []
    for finding in _findings(report):
        # What may not be there has no causes yet.
        if finding.fact.state < 0:
            sentences.append(_sentence(finding, hedge))
            continue
        # The likeliest apart: a list alone would weigh all causes alike.
        first, *others = list_causes(finding.name, affirmed)
        text = f"{_capital(_phrase(finding))} likely from {first}; consider {join_words(others, 'or')}."
        sentences.append(Sentence(text, (finding.fact,)))
    return sentences or [_NOTHING]


def structured_report(report: Report, hedge: str) -> list[Sentence]:
    """Write technique, findings by organ as the reading has them, and an impression, the most urgent first.

    Args:
        hedge: see `examination`.
    """
    # Without the summary: its place has the impression.
    quality, *organs, _ = report.sentences
    return [
        Sentence(quality.text.replace("Quality", "Technique"), quality.facts),
        Sentence("Findings:", ()),
        *(organ for organ in organs if not organ.text.startswith(_ALWAYS_NORMAL)),
        Sentence("Impression:", ()),
        *(
            Sentence(f"{number}. {sentence.text}", sentence.facts)
            for number, sentence in enumerate(_impression(report, hedge), 1)
        ),
    ]


def _impression(report: Report, hedge: str) -> list[Sentence]:
    """What the answer's list stands for: findings, or that there is none; then what is unsure, and devices."""
    found = _findings(report)
    sentences = [_sentence(finding, hedge) for finding in found]
    # As in the answer: beside devices and what is unsure stands that nothing was found.
    if not found or found[0].fact.state < 0:
        sentences.insert(0, _NOTHING)
    devices = report.sentences[1].facts
    named = [fact.finding.removeprefix("device:") for fact in devices]
    if words := [wording.DEVICE_WORDS[name] for name in named if name in wording.DEVICE_WORDS]:
        sentences.append(Sentence(f"{_capital(join_words(words, 'and'))}.", devices))
    return sentences


# ---- Findings and their words ------------------------------------------------------------------------


def _findings(report: Report) -> list[_Found]:
    """What the sentences of the organs affirm or hedge, each once, the most urgent first and hedges last."""
    facts: dict[str, Fact] = {}
    for sentence in report.sentences[:-1]:
        for fact in sentence.facts:
            name = _NAME_OF.get(fact.finding)
            if name not in _PHRASES or not fact.state:
                continue
            # Sentences repeat a finding with less: what one leaves out another says, and right and left are both.
            known = facts.get(name, fact)
            side = known.side if known.side == fact.side else BOTH
            zone = fact.zone if known.zone is None else known.zone
            facts[name] = Fact(
                fact.finding, fact.state, side, zone, known.severity or fact.severity
            )
    # Sorting keeps the order of urgency within each state.
    found = [_Found(name, facts[name]) for name in wording.URGENCY if name in facts]
    return sorted(found, key=lambda finding: -finding.fact.state)


def _sentence(finding: _Found, hedge: str) -> Sentence:
    """A finding with its place and size; of one that is hedged the place."""
    name, fact = finding
    text = _phrase(finding)
    if fact.state < 0:
        text = hedge.replace("{noun}", text)
    elif fact.severity is not None:
        text += f", {wording.SEVERITY_WORDS[name][wording.SEVERITIES.index(fact.severity)]}"
    return Sentence(f"{_capital(text)}.", (fact,))


def _phrase(finding: _Found) -> str:
    name, fact = finding
    # What its words do not say a finding may lack.
    zone, side = fact.zone or 0, BOTH if fact.side is None else fact.side
    return _PHRASES[name].format(
        side=wording.SIDES[side], zone=wording.ZONES[zone], place=wording.PLEURAL_PLACES[zone]
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
