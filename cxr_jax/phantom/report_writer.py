"""Writes the reasoning trace, answer and report of one phantom scene, with the facts each sentence states.

The trace is a radiologist's tour in a fixed order: quality, devices, airways, right lung, left lung, pleura,
mediastinum, hila, heart, abdomen, bones, summary. It affirms, denies or hedges every one of the 14 labels.
The summary names the positive labels in the words and order of the answer, which only has to repeat them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.phantom import wording as P
from cxr_jax.phantom.constants import DEVICES, POSITIVE_AT, F

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
# A scene's severities are float32: compare with the float32 border, as the scene's own labels do.
_POSITIVE_AT = float(np.float32(POSITIVE_AT))
MODERATE_AT, LARGE_AT = 0.6, 0.8  # thirds of what a scene draws as positive
_FEW, _MANY = (
    2,
    5,
)  # up to so many findings the summary explains two, or one, of them: it has to stay short
_NAME_OF = {label: name for name, label in P.LABEL_OF.items()}


@dataclass(frozen=True)
class Fact:
    """One claim of a sentence. `finding` is one of CHEXPERT_14, "device:<name>", "quality:<ap | rotation |
    low_inspiration>", "airway", "hila" or "abdomen"; of the last three, state 1 means abnormal.

    state: 1 affirmed, 0 denied, -1 hedged. side: 0 the patient's right, 1 left, 2 both or midline.
    zone: 0 upper, 1 mid, 2 lower. severity: "small", "moderate" or "large". None: not said.
    """

    finding: str
    state: int
    side: int | None = None
    zone: int | None = None
    severity: str | None = None


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
        return " ".join(s.text for s in self.sentences)

    @property
    def facts(self) -> list[Fact]:
        return [f for s in self.sentences for f in s.facts]


_fact = lru_cache(maxsize=4096)(Fact)  # few distinct facts, made very often


def write(scene_row: dict, hospital: str, rng: np.random.Generator) -> Report:
    """Writes the report of one scene in the wording of `hospital` ("A" or "B").

    scene_row: severity float [12], side int [12], zone int [12], device bool [5], quality int [3]; other keys
    are ignored. `rng` is drawn from once and only chooses between wordings, never between facts.
    Raises UserError for an unknown hospital.
    """
    if hospital not in P.PHRASES:
        raise UserError(f"hospital: {hospital!r} is unknown, use one of {', '.join(P.PHRASES)}")
    w = _Writer(scene_row, P.PHRASES[hospital], rng)
    body = [
        w.quality(),
        w.devices(),
        w.airways(),
        w.lung(0),
        w.lung(1),
        w.slots("Pleura", "pleural_effusion", "pneumothorax", "pleural_other"),
        w.slots("Mediastinum", "enlarged_cardiomediastinum"),
        w.hila(),
        w.heart(),
        w.plain("Abdomen", "abdomen", _fact("abdomen", 0)),
        w.slots("Bones", "fracture"),
    ]
    answer = _answer(body)
    return Report([*body, w.summary(answer, _found(body))], answer)


def target(report: Report) -> str:
    """The text that a model is trained to write: <think>trace</think><answer>answer</answer>."""
    return f"<think>{report.trace}</think><answer>{report.answer}</answer>"


def label_states(facts: Iterable[Fact]) -> dict[str, int]:
    """The state of each label that `facts` name: affirmed (1) outweighs hedged (-1), hedged denied (0)."""
    weight = {1: 2, -1: 1, 0: 0}
    states: dict[str, int] = {}
    for fact in facts:
        if (
            fact.finding in CHEXPERT_14
            and weight[fact.state] >= weight[states.get(fact.finding, 0)]
        ):
            states[fact.finding] = fact.state
    return states


def structured_report(report: Report) -> str:
    """The answer to "Write a structured report": FINDINGS, a line per organ, then a numbered IMPRESSION."""
    lines = [_impression(f) for f in _findings(report)]
    if "No Finding" in report.answer:
        lines.insert(0, "No Finding.")
    devices = [
        P.DEVICE_WORDS[f.finding[7:]] for f in report.facts if f.finding.startswith("device:")
    ]
    if devices:
        lines.append(f"Support Devices: {_join(devices, 'and')}.")
    findings = "\n".join(s.text for s in report.sentences[:-1])
    impression = "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
    return f"FINDINGS:\n{findings}\nIMPRESSION:\n{impression}"


def differentials(report: Report) -> str:
    """The answer to "Provide differentials": the causes of each finding, sure or hedged, likeliest first."""
    lines, found = [], _found(report.sentences[:-1])
    for fact in _findings(report):
        name = _NAME_OF[fact.finding]
        possible = "possible " if fact.state < 0 else ""
        found_here = found | {name: fact.side}
        lines.append(
            _sentence(f"{possible}{P.SHORT_NAMES[name]}: {_join(_causes(name, found_here), 'or')}")
        )
    return "\n".join(lines) or "No Finding: no differentials."


def corpus(
    n: int, seed: int, scenes_fn: Callable[[int], dict], hospital: str = "A"
) -> Iterator[str]:
    """Yields `n` target texts, of the scenes scenes_fn(0..n-1); for training a tokenizer."""
    for i in range(n):
        yield target(write(scenes_fn(i), hospital, np.random.default_rng((seed, i))))


class _Writer:
    """One scene being put into words: its columns as Python lists and the wording drawn for each slot."""

    def __init__(self, row: dict, words: dict, rng: np.random.Generator):
        self.words = words
        self.draws = rng.random(32).tolist()
        self.used = 0
        self.severity = np.asarray(row["severity"]).tolist()
        self.side = np.asarray(row["side"]).tolist()
        self.zone = np.asarray(row["zone"]).tolist()
        self.device = np.asarray(row["device"]).tolist()
        self.quality_ = np.asarray(row["quality"]).tolist()

    def pick(self, key: str) -> str:
        options = self.words[key]
        self.used += 1
        return options[int(self.draws[self.used - 1] * len(options))]

    def state(self, name: str) -> int:
        severity = self.severity[F[name]]
        return 1 if severity >= _POSITIVE_AT else -1 if severity > 0 else 0

    def item(self, name: str, side: int | None = None) -> tuple[str, Fact]:
        """Clause and fact of a finding that is not absent; `side` is given in a one-sided sentence."""
        i = F[name]
        state, zone = self.state(name), self.zone[i]
        side = self.side[i] if side is None else side
        grade = (self.severity[i] >= MODERATE_AT) + (self.severity[i] >= LARGE_AT)
        graded = state > 0 and name in P.SEVERITY_WORDS
        form = self.pick(name) if state > 0 else self.pick("hedge").replace("{noun}", P.NOUNS[name])
        text = form.format(
            side=P.SIDES[side],
            on_side=P.ON_SIDE[side],
            zone=P.ZONES[zone],
            place=P.PLEURAL_PLACES[zone],
            severity=P.SEVERITY_WORDS[name][grade] if graded else None,
        )
        zoned = "zone" in P.NOUNS[name] or "place" in P.NOUNS[name]
        size = P.SEVERITIES[grade] if graded else None
        return text, _fact(P.LABEL_OF[name], state, side, zone if zoned else None, size)

    def plain(self, head: str, key: str, *facts: Fact) -> Sentence:
        return Sentence(f"{head}: {self.pick(key)}.", facts)

    def quality(self) -> Sentence:
        ap, rotated, low = self.quality_
        form = self.pick("quality")
        text = form.format(
            view="AP" if ap else "PA",
            rotation=self.words["rotation"][rotated],
            inspiration=self.words["inspiration"][low],
        )
        names = ("quality:ap", "quality:rotation", "quality:low_inspiration")
        facts = (_fact(n, int(v)) for n, v in zip(names, self.quality_, strict=True))
        return Sentence(f"Quality: {text}.", tuple(facts))

    def airways(self) -> Sentence:
        # A turned patient's trachea is not in the middle of the picture: say why it still counts as midline.
        return self.plain(
            "Airways", "airways_rotated" if self.quality_[1] else "airways", _fact("airway", 0)
        )

    def devices(self) -> Sentence:
        present = [name for name, on in zip(DEVICES, self.device, strict=True) if on]
        if not present:
            return self.plain("Devices", "no_devices", _fact("Support Devices", 0))
        text = self.pick("devices").format(list=_join([P.DEVICE_WORDS[d] for d in present], "and"))
        facts = (_fact("Support Devices", 1), *(_fact(f"device:{d}", 1) for d in present))
        return Sentence(f"Devices: {text}.", facts)

    def lung(self, side: int) -> Sentence:
        """The five parenchymal findings of one lung in label order; "clear" covers those not named."""
        texts, facts = [], []
        for name in P.LUNG_FINDINGS:
            if self.state(name) and self.side[F[name]] in (side, 2):
                text, fact = self.item(name, side)
                texts.append(text)
            else:
                fact = _fact(P.LABEL_OF[name], 0, side)
            facts.append(fact)
        opacity = max((f.state for f in facts), key=lambda s: (s > 0, s < 0))
        facts.append(_fact("Lung Opacity", opacity, side))
        clear = "rest" if texts else "clear"
        if (
            not texts
            and self.state("pleural_effusion") > 0
            and self.side[F["pleural_effusion"]] in (side, 2)
        ):
            clear = "clear_above"
            facts.append(_fact("Pleural Effusion", 1, side))
        texts.append(self.pick(clear))
        return Sentence(f"{ORDER[3 + side]}: {'; '.join(texts)}.", tuple(facts))

    def slots(self, head: str, *names: str) -> Sentence:
        """A sentence with one clause for each of `names`, always in the same place."""
        pairs = [
            self.item(n) if self.state(n) else (self.pick(f"no_{n}"), _fact(P.LABEL_OF[n], 0))
            for n in names
        ]
        return Sentence(f"{head}: {'; '.join(t for t, _ in pairs)}.", tuple(f for _, f in pairs))

    def heart(self) -> Sentence:
        sentence = self.slots("Heart", "cardiomegaly")
        if self.state("cardiomegaly") >= 0 or not self.quality_[0]:
            return sentence
        text = f"{sentence.text[:-1]}; {self.pick('ap_heart')}."  # why a borderline heart stays uncertain
        return Sentence(text, (*sentence.facts, _fact("quality:ap", 1)))

    def hila(self) -> Sentence:
        if self.state("edema") > 0:
            return self.plain("Hila", "hila_edema", _fact("hila", 1), _fact("Edema", 1, 2))
        return self.plain("Hila", "hila", _fact("hila", 0))

    def summary(self, answer: str, found: dict) -> Sentence:
        """The answer's names, the causes of the most urgent findings, what has to be looked at again."""
        names = answer.split(", ")
        clauses, facts = [answer], [_fact(name, 1) for name in names]
        if "No Finding" not in names:
            facts.append(_fact("No Finding", 0))
        sure = [n for n in P.URGENCY if n in found]
        for name in sure[: (len(sure) <= _FEW) + (len(sure) <= _MANY)]:
            causes = _join(_causes(name, found)[:2], "or")
            clauses.append(self.pick("causes").format(name=P.SHORT_NAMES[name], causes=causes))
        hedged = [n for n in P.URGENCY if self.state(n) < 0]
        if hedged:
            clauses.append(
                self.pick("recheck").format(names=_join([P.SHORT_NAMES[n] for n in hedged], "or"))
            )
            facts.extend(_fact(P.LABEL_OF[n], -1) for n in hedged)
        return Sentence(f"Summary: {'; '.join(clauses)}.", tuple(facts))


def _join(words: Iterable[str], last: str) -> str:
    *head, tail = words
    return f"{', '.join(head)} {last} {tail}" if head else tail


def _answer(body: list[Sentence]) -> str:
    states = label_states(f for s in body for f in s.facts)
    positive = [name for name in CHEXPERT_14 if states.get(name) == 1]
    if all(name == "Support Devices" for name in positive):
        positive.insert(0, "No Finding")
    return ", ".join(positive)


def _found(body: list[Sentence]) -> dict[str, int]:
    """Name -> side of everything that the sentences affirm; devices and quality count for both sides."""
    found: dict[str, int] = {}
    for fact in (f for s in body for f in s.facts if f.state > 0):
        name = _NAME_OF.get(fact.finding, fact.finding.removeprefix("device:"))
        side = 2 if fact.side is None else fact.side
        found[name] = side if found.get(name, side) == side else 2
    return found


def _causes(name: str, found: dict[str, int]) -> list[str]:
    """Causes of a finding, likeliest first, in the light of what else was found on its side."""
    causes = list(P.CAUSES[name])
    side = found.get(name, 2)
    for sign, cause in P.EVIDENCE.get(name, ()):
        if sign in found and (found[sign] == side or 2 in (found[sign], side)):
            causes = [cause, *(c for c in causes if c != cause)]
    return causes


def _findings(report: Report) -> list[Fact]:
    """Affirmed, then hedged findings of the organ sentences, urgent ones first; right and left make both."""
    merged: dict[str, Fact] = {}
    for fact in (f for s in report.sentences[:-1] for f in s.facts):
        if fact.state == 0 or fact.finding not in _NAME_OF or fact.finding == "Support Devices":
            continue
        first = merged.get(fact.finding, fact)
        side = fact.side if fact.side == first.side else 2
        merged[fact.finding] = replace(fact if fact.severity else first, side=side)
    return sorted(merged.values(), key=lambda f: (-f.state, P.URGENCY.index(_NAME_OF[f.finding])))


def _impression(fact: Fact) -> str:
    """One line of the impression: "Moderate consolidation in the right lower zone." """
    name = _NAME_OF[fact.finding]
    words = [P.SHORT_NAMES[name], _place(name, fact)]
    if fact.state < 0:
        words.insert(0, "possible")
    elif fact.severity:
        words.insert(0, P.SEVERITY_WORDS[name][P.SEVERITIES.index(fact.severity)])
    return _sentence(" ".join(filter(None, words)) + (", follow up" if fact.state < 0 else ""))


def _place(name: str, fact: Fact) -> str:
    if name in ("enlarged_cardiomediastinum", "cardiomegaly"):
        return ""
    if name == "edema":
        return "in both lungs" if fact.side == 2 else f"in the {P.SIDES[fact.side]} lung"
    if fact.zone is None or name == "pneumothorax":
        place = "" if fact.zone is None else f" {P.PLEURAL_PLACES[fact.zone]}"
        return P.ON_SIDE[fact.side] + place
    zone = P.ZONES[fact.zone]
    return f"in both {zone} zones" if fact.side == 2 else f"in the {P.SIDES[fact.side]} {zone} zone"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
