"""Planted errors: one finding added, dropped, moved to the other side, or said with another certainty.

Made by the phantom's grammar, whose facts are known: the scene is changed and the report written again, so an error
is consistent with itself and differs from the truth in one finding. The labeler then has to read it as it was meant.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_jax.labels.sentences import Reading
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.phantom import report_writer, wording
from cxr_jax.phantom.constants import BOTH, FINDING_INDEX, LEFT, PATHOLOGIES, POSITIVE_AT, RIGHT
from cxr_jax.study.shown import ABSENT, PRESENT, SIDE_WORDS, STATE_WORDS, UNSURE, Frozen

_ADDED, _SUBTLE, _CERTAIN = (
    0.65,
    0.22,
    0.65,
)  # severities: clearly called, clearly hedged, clearly called
_SIDES = {RIGHT: "right", LEFT: "left", BOTH: "bilateral"}
# What has no side on a film, or whose side the grammar does not say.
_MIDLINE = ("enlarged_cardiomediastinum", "cardiomegaly", "edema")
# Labels that follow from others and may change with them.
_FOLLOWING = ("No Finding", "Lung Opacity")


@dataclass(frozen=True, kw_only=True)
class Plant:
    """An error: what was so, what is shown, and how to tell that a report carries it.

    Attributes:
        state_true, state_shown: of the label, words of `shown.py`.
        side_true, side_shown: of the label; None without.
        sentences: numbers, from 1, of the sentences that state it.
    """

    kind: str
    label: str
    state_true: str
    state_shown: str
    side_true: str | None
    side_shown: str | None
    sentences: tuple[int, ...]
    text_before: str
    text_after: str

    def is_carried(self, state: str | None, side_name: str | None) -> bool:
        """Tell whether a signed report says what was planted.

        Args:
            state: what the report says of the label; None or "not_mentioned": nothing, which denies it.
            side: the side that it gives.
        """
        # What a report does not mention, it denies.
        said = state if state in (PRESENT, UNSURE) else ABSENT
        if self.kind == "side":
            # Without a side the error is not repeated.
            return said != ABSENT and side_name == self.side_shown
        if self.kind == "drop":
            return said == ABSENT
        if self.kind == "add":
            return said != ABSENT
        return said == self.state_shown


# ---- The grammar -----------------------------------------------------------------------------------


def frozen_of_scene(scene_row: Mapping[str, Any], hospital: str, seed: Sequence[int]) -> Frozen:
    """Write a scene's report and freeze it by the facts that the grammar put into it."""
    # The wording's seed is the case's own, so that only the plant differs.
    report = report_writer.write(dict(scene_row), hospital, np.random.default_rng(list(seed)))
    # Facts, not words: the labeler is asked only afterwards.
    numbers = report_writer.label_states(report.facts)
    sides: dict[str, str] = {}
    for label_name in CHEXPERT_14:
        said = {
            fact.side
            for fact in report.facts
            if fact.finding == label_name
            and fact.state == numbers.get(label_name)
            and fact.state != 0
            and fact.side is not None
        }
        # Right in one sentence and left in the other is both.
        if said:
            sides[label_name] = _SIDES[said.pop() if len(said) == 1 else BOTH]
    return Frozen(
        sentences=tuple(sentence.text for sentence in report.sentences),
        states={label_name: STATE_WORDS[numbers.get(label_name, 0)] for label_name in CHEXPERT_14},
        sides={
            label_name: side_name
            for label_name, side_name in sides.items()
            if label_name != "Edema"
        },
    )


def candidates(
    scene_row: Mapping[str, Any], error_kind: str, generator: np.random.Generator
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (finding's label, changed scene) for each way to plant an error of a kind, in random order."""
    for index in generator.permutation(PATHOLOGIES):
        finding_name = next(key for key, value in FINDING_INDEX.items() if value == index)
        severity, side_name = float(scene_row["severity"][index]), int(scene_row["side"][index])
        # The border at which the grammar calls a finding.
        is_certain = severity >= np.float32(POSITIVE_AT)
        changed = {key: np.array(value) for key, value in scene_row.items()}
        if error_kind == "add" and severity == 0:
            changed["severity"][index] = _ADDED
            if finding_name not in _MIDLINE:
                changed["side"][index] = generator.integers(2)
        elif error_kind == "drop" and is_certain:
            changed["severity"][index] = 0.0
        elif (
            error_kind == "side"
            and is_certain
            and side_name != BOTH
            and finding_name not in _MIDLINE
        ):
            changed["side"][index] = LEFT if side_name == RIGHT else RIGHT
        elif error_kind == "hedge" and severity > 0:
            changed["severity"][index] = _SUBTLE if is_certain else _CERTAIN
        else:
            continue
        yield wording.LABEL_OF[finding_name], changed


def plant_of(error_kind: str, label_name: str, truth: Frozen, shown: Frozen) -> Plant | None:
    """Describe the difference of two readings as a plant; None where it is not the one that was meant."""
    changed = {
        finding_name
        for finding_name in CHEXPERT_14
        if (truth.states[finding_name], truth.sides.get(finding_name))
        != (shown.states[finding_name], shown.sides.get(finding_name))
    }
    # One finding only, but for the labels that follow from it.
    if label_name not in changed or changed - {label_name, *_FOLLOWING}:
        return None
    # An error that makes a sick patient well, or the reverse, is another size of error: none does.
    if truth.states["No Finding"] != shown.states["No Finding"]:
        return None
    # Sentences that changed with it: the finding's own and the summary's.
    before = [text for text in truth.sentences if text not in shown.sentences]
    numbers = tuple(
        number for number, text in enumerate(shown.sentences, 1) if text not in truth.sentences
    )
    return Plant(
        kind=error_kind,
        label=label_name,
        state_true=truth.states[label_name],
        state_shown=shown.states[label_name],
        side_true=truth.sides.get(label_name),
        side_shown=shown.sides.get(label_name),
        sentences=numbers,
        text_before=" ".join(before),
        text_after=" ".join(shown.sentences[number - 1] for number in numbers),
    )


# ---- Checks ----------------------------------------------------------------------------------------


def problems(shown: Frozen, reading: Reading) -> list[str]:
    """Say where the labeler does not read a frozen reading as it was meant; [] where it does."""
    mismatches = []
    for label_name, state, side_name in zip(
        CHEXPERT_14, reading.states, reading.sides, strict=True
    ):
        read_state = STATE_WORDS.get(state, ABSENT)
        if read_state != shown.states[label_name]:
            mismatches.append(
                f"{label_name}: read as {read_state}, meant {shown.states[label_name]}"
            )
        elif (
            label_name in shown.sides
            and side_name
            and SIDE_WORDS[side_name] != shown.sides[label_name]
        ):
            mismatches.append(
                f"{label_name}: read on the {side_name} side, meant {shown.sides[label_name]}"
            )
    # A sentence that affirms what another one denies would give the error away.
    said: dict[tuple[str, str], set[int]] = {}
    for statement in reading.statements:
        for claim in statement.claims:
            said.setdefault((claim.label, claim.side), set()).add(claim.state)
    for (finding, side_name), states in said.items():
        if len(states) > 1 and finding not in _FOLLOWING:
            mismatches.append(f"{finding} {side_name}: sentences contradict each other")
    return mismatches
