"""Writes the reasoning trace, answer and report of one phantom scene, with the facts each sentence states.

The trace is a radiologist's tour in a fixed order: quality, devices, airways, right lung, left lung, pleura,
mediastinum, hila, heart, abdomen, bones, summary. It affirms, denies or hedges every one of the 14 labels.
The summary names the positive labels in the words and order of the answer, which only has to repeat them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.phantom import wording
from cxr_jax.phantom.constants import BOTH, DEVICES, FINDING_INDEX, LEFT, POSITIVE_AT, RIGHT

ORDER = (
    "Quality",
    "Devices",
    "Airways",
    "Right lung",
    "Left lung",
    "Pleura",
    "Mediastinum",
    "Hila",
    "Heart",
    "Abdomen",
    "Bones",
    "Summary",
)
QUALITIES = ("quality:ap", "quality:rotation", "quality:low_inspiration")

# A scene's severities are float32: compare with the float32 border, as the scene's own labels do.
_POSITIVE_AT = float(np.float32(POSITIVE_AT))
MODERATE_AT, LARGE_AT = 0.6, 0.8  # thirds of what a scene draws as positive
# Up to so many findings the summary explains two, or one, of them: it has to stay short.
_FEW, _MANY = 2, 5
_DRAWS = 32  # random numbers for the wording of a report, more than it has clauses to choose
_NAME_OF = {label: name for name, label in wording.LABEL_OF.items()}


@dataclass(frozen=True)
class Fact:
    """One claim of a sentence. `finding` is one of CHEXPERT_14, "device:<name>", "quality:<ap | rotation |
    low_inspiration>", "airway", "hila" or "abdomen"; of the last three, state 1 means abnormal.

    state: 1 affirmed, 0 denied, -1 hedged. side: 0 the patient's right, 1 left, 2 both or midline.
    zone: 0 upper, 1 mid, 2 lower. severity: "small", "moderate" or "large". change: since the prior film, "new",
    "larger", "smaller", "unchanged" or "resolved". None: not said.
    """

    finding: str
    state: int
    side: int | None = None
    zone: int | None = None
    severity: str | None = None
    change: str | None = None


@dataclass(frozen=True)
class Sentence:
    """A sentence and the facts that it states."""

    text: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Report:
    """Twelve sentences, in the order of ORDER, and the answer: the positive labels, comma separated."""

    sentences: list[Sentence]
    answer: str

    @property
    def trace(self) -> str:
        """All sentences as one text."""
        return " ".join(sentence.text for sentence in self.sentences)

    @property
    def facts(self) -> list[Fact]:
        """The facts of all sentences, in their order."""
        return [fact for sentence in self.sentences for fact in sentence.facts]


class Clause(NamedTuple):
    """A part of a sentence, and the fact that it states."""

    text: str
    fact: Fact


make_fact = lru_cache(maxsize=4096)(Fact)  # few distinct facts, made very often


# ---- What others call ------------------------------------------------------------------------------


def write(scene_row: dict[str, Any], hospital: str, rng: np.random.Generator) -> Report:
    """Write the report of one scene in the wording of a hospital.

    Args:
        scene_row: severity float [12], side int [12], zone int [12], device bool [5], quality int [3]; other keys are
            ignored.
        hospital: "A" or "B".
        rng: drawn from once; it only chooses between wordings, never between facts.

    Raises:
        UserError: for an unknown hospital.
    """
    if hospital not in wording.PHRASES:
        known = ", ".join(wording.PHRASES)
        raise UserError(f"hospital: {hospital!r} is unknown, use one of {known}")
    writer = Writer(scene_row, wording.PHRASES[hospital], rng)
    # In this order: every sentence takes the next of the random numbers.
    body = [
        writer.quality(),
        writer.devices(),
        writer.airways(),
        writer.lung(RIGHT),
        writer.lung(LEFT),
        writer.slots("Pleura", "pleural_effusion", "pneumothorax", "pleural_other"),
        writer.slots("Mediastinum", "enlarged_cardiomediastinum"),
        writer.hila(),
        writer.heart(),
        writer.plain("Abdomen", "abdomen", make_fact("abdomen", 0)),
        writer.slots("Bones", "fracture"),
    ]
    answer = _answer(body)
    return Report([*body, writer.summary(answer, affirmed_sides(body))], answer)


def target(report: Report) -> str:
    """Give the text that a model is trained to write: <think>trace</think><answer>answer</answer>."""
    return f"<think>{report.trace}</think><answer>{report.answer}</answer>"


def label_states(facts: Iterable[Fact]) -> dict[str, int]:
    """Give the state of each label that `facts` name: affirmed (1) outweighs hedged (-1), hedged denied (0)."""
    weight = {1: 2, -1: 1, 0: 0}
    states: dict[str, int] = {}
    for fact in facts:
        if fact.finding not in CHEXPERT_14:  # airways, hila, abdomen, quality, single devices
            continue
        if weight[fact.state] >= weight[states.get(fact.finding, 0)]:
            states[fact.finding] = fact.state
    return states


# ---- Sentence by sentence --------------------------------------------------------------------------


class Writer:
    """One scene being put into words: its columns as Python lists and the wording drawn for each slot."""

    def __init__(
        self,
        scene_row: dict[str, Any],
        phrases: dict[str, tuple[str, ...]],
        rng: np.random.Generator,
    ) -> None:
        self.phrases = phrases
        # Plain Python from here on: reading single elements of arrays would take most of the time.
        self.draws: list[float] = rng.random(_DRAWS).tolist()
        self.draws_used = 0
        self.severity: list[float] = np.asarray(scene_row["severity"]).tolist()
        self.side: list[int] = np.asarray(scene_row["side"]).tolist()
        self.zone: list[int] = np.asarray(scene_row["zone"]).tolist()
        self.has_device: list[bool] = np.asarray(scene_row["device"]).tolist()
        self.qualities: list[int] = np.asarray(scene_row["quality"]).tolist()

    # ---- Parts of sentences ----

    def pick(self, slot: str) -> str:
        """One of the phrases of a slot, by the next random number."""
        options = self.phrases[slot]
        self.draws_used += 1
        return options[int(self.draws[self.draws_used - 1] * len(options))]

    def state(self, finding_name: str) -> int:
        """1, -1 or 0: whether a finding is affirmed, hedged or denied."""
        severity = self.severity[FINDING_INDEX[finding_name]]
        if severity >= _POSITIVE_AT:
            return 1
        return -1 if severity > 0 else 0

    def is_in(self, finding_name: str, side: int) -> bool:
        """Whether a finding that is present is on a side."""
        return self.side[FINDING_INDEX[finding_name]] in (side, BOTH)

    def item(self, finding_name: str, side: int | None = None) -> Clause:
        """Clause of a finding that is not absent; `side` is given in a one-sided sentence."""
        index = FINDING_INDEX[finding_name]
        state, zone = self.state(finding_name), self.zone[index]
        side = self.side[index] if side is None else side
        noun = wording.NOUNS[finding_name]

        # Only what is affirmed, and has a size or a degree, is graded.
        degree = size = None
        if state > 0 and finding_name in wording.SEVERITY_WORDS:
            grade = (self.severity[index] >= MODERATE_AT) + (self.severity[index] >= LARGE_AT)
            degree, size = wording.SEVERITY_WORDS[finding_name][grade], wording.SEVERITIES[grade]

        # A hedge is one phrase for all findings, with a noun in it.
        phrase = (
            self.pick(finding_name) if state > 0 else self.pick("hedge").replace("{noun}", noun)
        )
        text = phrase.format(
            side=wording.SIDES[side],
            on_side=wording.ON_SIDE[side],
            zone=wording.ZONES[zone],
            place=wording.PLEURAL_PLACES[zone],
            severity=degree,
        )
        # A fact holds a zone only where the words say one.
        has_zone = "zone" in noun or "place" in noun
        label = wording.LABEL_OF[finding_name]
        return Clause(text, make_fact(label, state, side, zone if has_zone else None, size))

    def plain(self, organ: str, slot: str, *facts: Fact) -> Sentence:
        """A sentence of one phrase that has no blanks."""
        return Sentence(f"{organ}: {self.pick(slot)}.", facts)

    def slots(self, organ: str, *finding_names: str) -> Sentence:
        """A sentence with one clause for each of `finding_names`, always in the same place."""
        clauses = []
        for finding_name in finding_names:
            if self.state(finding_name):
                clauses.append(self.item(finding_name))
            elif gone := self.gone(finding_name):
                clauses.append(gone)
            else:
                denied = make_fact(wording.LABEL_OF[finding_name], 0)
                clauses.append(Clause(self.pick(f"no_{finding_name}"), denied))
        text = "; ".join(clause.text for clause in clauses)
        return Sentence(f"{organ}: {text}.", tuple(clause.fact for clause in clauses))

    def gone(self, finding_name: str, side: int | None = None) -> Clause | None:
        """Clause of a finding that is absent, but was there before; one film knows of none."""
        return None

    # ---- Sentences, in the order of the tour ----

    def quality(self) -> Sentence:
        """View, rotation, inspiration."""
        is_ap, is_rotated, is_low = self.qualities
        text = self.pick("quality").format(
            view="AP" if is_ap else "PA",
            rotation=self.phrases["rotation"][is_rotated],
            inspiration=self.phrases["inspiration"][is_low],
        )
        facts = tuple(
            make_fact(name, int(state))
            for name, state in zip(QUALITIES, self.qualities, strict=True)
        )
        return Sentence(f"Quality: {text}.", facts)

    def devices(self) -> Sentence:
        """Every device, or that there is none."""
        present = [name for name, here in zip(DEVICES, self.has_device, strict=True) if here]
        if not present:
            return self.plain("Devices", "no_devices", make_fact("Support Devices", 0))
        words = [wording.DEVICE_WORDS[name] for name in present]
        text = self.pick("devices").format(list=join_words(words, "and"))
        facts = [make_fact(f"device:{name}", 1) for name in present]
        return Sentence(f"Devices: {text}.", (make_fact("Support Devices", 1), *facts))

    def airways(self) -> Sentence:
        """The trachea."""
        # A turned patient's trachea is not in the middle of the picture: say why it still counts as midline.
        is_rotated = self.qualities[1]
        slot = "airways_rotated" if is_rotated else "airways"
        return self.plain("Airways", slot, make_fact("airway", 0))

    def lung(self, side: int) -> Sentence:
        """The five parenchymal findings of one lung in label order; "clear" covers those not named."""
        texts, facts = [], []
        for finding_name in wording.LUNG_FINDINGS:
            if self.state(finding_name) and self.is_in(finding_name, side):
                clause = self.item(finding_name, side)
                texts.append(clause.text)
                facts.append(clause.fact)
            elif gone := self.gone(finding_name, side):
                texts.append(gone.text)
                facts.append(gone.fact)
            else:
                facts.append(make_fact(wording.LABEL_OF[finding_name], 0, side))

        # Lung Opacity is what the strongest of them is: affirmed before hedged before denied.
        states = [fact.state for fact in facts]
        opacity = 1 if 1 in states else min(states)
        facts.append(make_fact("Lung Opacity", opacity, side))

        # Fluid below a clear lung is named in the same breath, or "clear" would deny it.
        clear = "rest" if texts else "clear"
        has_effusion = self.state("pleural_effusion") > 0 and self.is_in("pleural_effusion", side)
        if has_effusion and not texts:
            clear = "clear_above"
            facts.append(make_fact("Pleural Effusion", 1, side))
        texts.append(self.pick(clear))
        return Sentence(f"{ORDER[3 + side]}: {'; '.join(texts)}.", tuple(facts))

    def hila(self) -> Sentence:
        """Normal, or blurred by edema."""
        if self.state("edema") > 0:
            facts = make_fact("hila", 1), make_fact("Edema", 1, BOTH)
            return self.plain("Hila", "hila_edema", *facts)
        return self.plain("Hila", "hila", make_fact("hila", 0))

    def heart(self) -> Sentence:
        """Cardiomegaly; where it is hedged on an AP film, why."""
        sentence = self.slots("Heart", "cardiomegaly")
        is_ap = self.qualities[0]
        if self.state("cardiomegaly") >= 0 or not is_ap:
            return sentence
        # Why a borderline heart stays uncertain.
        text = f"{sentence.text[:-1]}; {self.pick('ap_heart')}."
        return Sentence(text, (*sentence.facts, make_fact("quality:ap", 1)))

    def summary(self, answer: str, affirmed: dict[str, int]) -> Sentence:
        """The answer's names, the causes of the most urgent findings, what has to be looked at again."""
        names = answer.split(", ")
        clauses, facts = [answer], [make_fact(name, 1) for name in names]
        if "No Finding" not in names:
            facts.append(make_fact("No Finding", 0))

        # The fewer findings, the more of them are explained.
        urgent = [finding_name for finding_name in wording.URGENCY if finding_name in affirmed]
        explained = (len(urgent) <= _FEW) + (len(urgent) <= _MANY)
        for finding_name in urgent[:explained]:
            causes = join_words(list_causes(finding_name, affirmed)[:2], "or")
            clauses.append(
                self.pick("causes").format(name=wording.SHORT_NAMES[finding_name], causes=causes)
            )

        # What is unsure asks for another look.
        hedged = [finding_name for finding_name in wording.URGENCY if self.state(finding_name) < 0]
        if hedged:
            short_names = join_words(
                [wording.SHORT_NAMES[finding_name] for finding_name in hedged], "or"
            )
            clauses.append(self.pick("recheck").format(names=short_names))
            facts.extend(make_fact(wording.LABEL_OF[finding_name], -1) for finding_name in hedged)
        return Sentence(f"Summary: {'; '.join(clauses)}.", tuple(facts))


# ---- What follows from the sentences ---------------------------------------------------------------


def join_words(words: Iterable[str], conjunction: str) -> str:
    """List words, with a conjunction before the last."""
    *others, last = words
    return f"{', '.join(others)} {conjunction} {last}" if others else last


def _answer(body: list[Sentence]) -> str:
    """The positive labels, in CheXpert order."""
    states = label_states(fact for sentence in body for fact in sentence.facts)
    positive = [name for name in CHEXPERT_14 if states.get(name) == 1]
    # Devices are no pathology: beside them alone stands No Finding.
    if all(name == "Support Devices" for name in positive):
        positive.insert(0, "No Finding")
    return ", ".join(positive)


def affirmed_sides(body: list[Sentence]) -> dict[str, int]:
    """Give name -> side of everything that the sentences affirm; devices and quality count for both sides."""
    side_of: dict[str, int] = {}
    for fact in (fact for sentence in body for fact in sentence.facts if fact.state > 0):
        name = _NAME_OF.get(fact.finding, fact.finding.removeprefix("device:"))
        side = BOTH if fact.side is None else fact.side
        # Right in one sentence and left in another is both.
        side_of[name] = side if side_of.get(name, side) == side else BOTH
    return side_of


def list_causes(finding_name: str, affirmed: dict[str, int]) -> list[str]:
    """List the causes of a finding, likeliest first, in the light of what else was found on its side.

    Args:
        affirmed: `affirmed_sides` of the report.
    """
    causes = list(wording.CAUSES[finding_name])
    side = affirmed.get(finding_name, BOTH)
    # The last sign that applies moves its cause to the front.
    for sign, cause in wording.EVIDENCE.get(finding_name, ()):
        if sign in affirmed and (affirmed[sign] == side or BOTH in (affirmed[sign], side)):
            causes = [cause, *(other for other in causes if other != cause)]
    return causes
