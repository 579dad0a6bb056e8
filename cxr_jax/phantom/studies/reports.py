"""Writes the trace, answer and facts of a study of several films: what the lateral shows, what has changed.

The tour is that of `report_writer`, with a sentence more for each film beside the frontal: "Lateral" names what lies
behind the heart and in the posterior sulci, "Prior" how the earlier film was taken. With a prior every finding has its
change in front ("new right effusion", "unchanged cardiomegaly", "resolved left pneumothorax"), and the summary and the
answer name what is new alone; nothing new is No Finding.

Every trace is a true report of the current study to the parser of reports. To the rewards of studies with a prior,
whose question is what is new, "changes.toml" reads it as an answer to that: new affirms, any other change denies.
"""

from typing import Any

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.phantom import wording
from cxr_jax.phantom.constants import (
    BOTH,
    DEVICES,
    FINDING_INDEX,
    LEFT,
    POSITIVE_AT,
    RIGHT,
    Finding,
)
from cxr_jax.phantom.human_readers import as_read
from cxr_jax.phantom.report_writer import (
    Clause,
    Report,
    Sentence,
    Writer,
    affirmed_sides,
    join_words,
    label_states,
    make_fact,
)
from cxr_jax.phantom.studies.hidden import RETROCARDIAC
from cxr_jax.phantom.studies.priors import Change

# What is said in front of a finding, in each hospital's words.
CHANGE_WORDS = {
    hospital: {
        Change.NEW: "new",
        Change.LARGER: "larger",
        Change.SMALLER: "smaller",
        Change.UNCHANGED: unchanged,
    }
    for hospital, unchanged in (("A", "unchanged"), ("B", "stable"))
}
_DEVICES = int(Finding.SUPPORT_DEVICES)


def as_studied(study: dict[str, Any], miss: float, rng: np.random.Generator) -> dict[str, Any]:
    """Give the study that its reader reports, see `human_readers.as_read`: what is missed is missed in all films.

    Args:
        study: a row of `studies.make_batch`: scene, hidden, and change and prior, if there is a prior.
        miss: the probability with which a finding that can be missed is.
        rng: drawn from once, whatever the study.
    """
    # Who overlooks a finding has no opinion of its change.
    scene = as_read(study["scene"], miss, rng)
    is_missed = (np.asarray(study["scene"]["severity"]) > 0) & (scene["severity"] == 0)
    read = {**study, "scene": scene, "hidden": np.asarray(study["hidden"]) & ~is_missed}
    if "change" in study:
        read["change"] = np.where(is_missed, int(Change.ABSENT), study["change"])
    return read


def write(
    study: dict[str, Any], hospital: str, views: tuple[str, ...], rng: np.random.Generator
) -> Report:
    """Write the report of one study in the wording of a hospital.

    Args:
        study: see `as_studied`.
        hospital: "A" or "B".
        views: the roles of the films that are shown.
        rng: drawn from once; it only chooses between wordings, never between facts.

    Raises:
        UserError: for an unknown hospital.
    """
    if hospital not in wording.PHRASES:
        known = ", ".join(wording.PHRASES)
        raise UserError(f"hospital: {hospital!r} is unknown, use one of {known}")
    writer = _StudyWriter(study, hospital, rng)
    # In this order: every sentence takes the next of the random numbers.
    body = [writer.quality()]
    if "prior" in views:
        body.append(writer.prior())
    body += [writer.devices(), writer.airways()]
    if "lateral" in views:
        body.append(writer.lateral())
    body += [
        writer.lung(RIGHT),
        writer.lung(LEFT),
        writer.slots("Pleura", "pleural_effusion", "pneumothorax", "pleural_other"),
        writer.slots("Mediastinum", "enlarged_cardiomediastinum"),
        writer.hila(),
        writer.heart(),
        writer.plain("Abdomen", "abdomen", make_fact("abdomen", 0)),
        writer.slots("Bones", "fracture"),
    ]
    # What is asked: with a prior what is new, else all.
    counted = body
    if writer.change is not None:
        counted = [
            Sentence(s.text, tuple(fact for fact in s.facts if fact.change == "new")) for s in body
        ]
    answer = _answer(counted)
    return Report([*body, writer.summary(answer, affirmed_sides(counted))], answer)


def _answer(sentences: list[Sentence]) -> str:
    """The labels that facts affirm, with their parent, in CheXpert order; without a pathology No Finding."""
    states = label_states(fact for sentence in sentences for fact in sentence.facts)
    positive = {name for name, state in states.items() if state == 1}
    # The parent is as new as the newest of its parts.
    if positive & {wording.LABEL_OF[name] for name in wording.LUNG_FINDINGS}:
        positive.add("Lung Opacity")
    if not positive - {"Support Devices"}:
        positive.add("No Finding")
    return ", ".join(name for name in CHEXPERT_14 if name in positive)


class _StudyWriter(Writer):
    """One study being put into words."""

    def __init__(self, study: dict[str, Any], hospital: str, rng: np.random.Generator) -> None:
        super().__init__(study["scene"], wording.PHRASES[hospital], rng)
        self.words = CHANGE_WORDS[hospital]
        self.is_hidden: list[bool] = np.asarray(study["hidden"]).tolist()
        self.change: list[int] | None = None
        if "change" in study:
            self.change = np.asarray(study["change"]).tolist()
            self.had_device: list[bool] = np.asarray(study["prior"]["device"]).tolist()
            self.prior_qualities: list[int] = np.asarray(study["prior"]["quality"]).tolist()

    # ---- Parts of sentences ----

    def change_word(self, finding: int) -> str:
        """The word of a finding's change with a blank behind it; nothing without a prior."""
        return "" if self.change is None else f"{self.words[Change(self.change[finding])]} "

    def change_name(self, finding: int) -> str | None:
        """The change as facts have it."""
        return None if self.change is None else Change(self.change[finding]).name.lower()

    def item(self, finding_name: str, side: int | None = None) -> Clause:
        """Clause of a finding that is not absent, with its change."""
        clause = super().item(finding_name, side)
        if self.change is None:
            return clause
        finding, fact = FINDING_INDEX[finding_name], clause.fact
        changed = make_fact(
            fact.finding, fact.state, fact.side, fact.zone, fact.severity, self.change_name(finding)
        )
        # "Heart: unchanged enlarged" would be two facts: the one word says both.
        text = clause.text.replace("enlarged, ", "")
        if fact.state < 0:  # "unchanged cannot exclude" is no English
            return Clause(f"{text}, {self.change_word(finding).strip()}", changed)
        return Clause(self.change_word(finding) + text, changed)

    def gone(self, finding_name: str, side: int | None = None) -> Clause | None:
        """Clause of a finding that the prior film shows and this one does not."""
        finding = FINDING_INDEX[finding_name]
        if self.change is None or self.change[finding] != Change.RESOLVED:
            return None
        if side is not None and not self.is_in(finding_name, side):
            return None
        side = self.side[finding] if side is None else side
        zone = self.zone[finding]
        # No size: of what is gone there is none.
        noun = wording.NOUNS[finding_name]
        text = noun.format(
            side=wording.SIDES[side], zone=wording.ZONES[zone], place=wording.PLEURAL_PLACES[zone]
        )
        has_zone = "zone" in noun or "place" in noun
        label = wording.LABEL_OF[finding_name]
        fact = make_fact(label, 0, side, zone if has_zone else None, None, "resolved")
        return Clause(f"resolved {text}", fact)

    # ---- Sentences ----

    def prior(self) -> Sentence:
        """How the earlier film was taken."""
        is_ap, is_rotated, is_low = self.prior_qualities
        rotation, inspiration = (self.phrases[slot] for slot in ("rotation", "inspiration"))
        text = f"{'AP' if is_ap else 'PA'} film, {rotation[is_rotated]}, {inspiration[is_low]}"
        names = ("prior:ap", "prior:rotation", "prior:low_inspiration")
        facts = tuple(map(make_fact, names, map(int, self.prior_qualities)))
        return Sentence(f"Prior: {text}.", facts)

    def lateral(self) -> Sentence:
        """What lies behind the heart and in the posterior sulci; of what the frontal hides, that it is seen here
        alone."""
        texts, facts = [], []
        behind = [finding for finding in RETROCARDIAC if self.is_hidden[finding]]
        for finding in behind:
            name = finding.name.lower()
            word = self.change_word(finding)
            texts.append(f"{word}retrocardiac {wording.SHORT_NAMES[name]}, seen here alone")
            change = self.change_name(finding)
            facts.append(make_fact(wording.LABEL_OF[name], 1, LEFT, None, None, change))
        if not behind:
            texts.append("clear retrocardiac space")

        effusion = Finding.PLEURAL_EFFUSION
        if self.severity[effusion] >= np.float32(POSITIVE_AT):
            alone = ", seen here alone" if self.is_hidden[effusion] else ""
            texts.append(f"{self.change_word(effusion)}posterior effusion{alone}")
            change = self.change_name(effusion)
            facts.append(make_fact("Pleural Effusion", 1, None, None, None, change))
        elif self.severity[effusion] == 0:
            texts.append("sharp posterior sulci")
        return Sentence(f"Lateral: {'; '.join(texts)}.", tuple(facts))

    def devices(self) -> Sentence:
        """Every device, new or not, or that there is none any more."""
        if self.change is None:
            return super().devices()
        if Change(self.change[_DEVICES]) == Change.RESOLVED:
            had = [name for name, was in zip(DEVICES, self.had_device, strict=True) if was]
            words = join_words([wording.DEVICE_WORDS[name] for name in had], "and")
            denied = make_fact("Support Devices", 0, None, None, None, "resolved")
            return Sentence(f"Devices: {words} removed; {self.pick('no_devices')}.", (denied,))
        sentence = super().devices()
        if not any(self.has_device):
            return sentence
        # One word for all of them: they come and go together (`priors`).
        text = sentence.text.replace("Devices: ", f"Devices: {self.change_word(_DEVICES)}")
        change = self.change_name(_DEVICES)
        facts = tuple(
            make_fact(fact.finding, fact.state, None, None, None, change) for fact in sentence.facts
        )
        return Sentence(text, facts)

    def lung(self, side: int) -> Sentence:
        """The parenchymal findings of one lung; fluid below a clear one has its change, too."""
        sentence = super().lung(side)
        effusion = Finding.PLEURAL_EFFUSION
        if self.change is None or not sentence.text.endswith(tuple(self._above_effusion())):
            return sentence
        text = sentence.text.replace("the effusion", f"the {self.change_word(effusion)}effusion")
        facts = tuple(
            fact
            if fact.finding != "Pleural Effusion"
            else make_fact(fact.finding, 1, fact.side, None, None, self.change_name(effusion))
            for fact in sentence.facts
        )
        return Sentence(text, facts)

    def _above_effusion(self) -> list[str]:
        return [f"{phrase}." for phrase in self.phrases["clear_above"]]

    def hila(self) -> Sentence:
        """Normal, or blurred by edema, which is new or was there before."""
        sentence, edema = super().hila(), Finding.EDEMA
        if self.change is None or self.state("edema") <= 0:
            return sentence
        # Named once more only where it answers the question.
        if self.change[edema] != Change.NEW:
            return Sentence("Hila: blurred as before.", (make_fact("hila", 1),))
        text = sentence.text.replace("edema", "new edema")
        return Sentence(
            text, (make_fact("hila", 1), make_fact("Edema", 1, BOTH, None, None, "new"))
        )

    def summary(self, answer: str, affirmed: dict[str, int]) -> Sentence:
        """The answer's names, causes, what to look at again; of a study without anything new it says just that, as what
        was there before is a finding."""
        sentence = super().summary(answer, affirmed)
        # "No Finding" would deny what is unchanged.
        if self.change is None or "No Finding" not in answer:
            return sentence
        devices = "Support Devices; " if "Support Devices" in answer else ""
        text = sentence.text.replace(answer, f"{devices}no new findings", 1)
        return Sentence(text, sentence.facts)
