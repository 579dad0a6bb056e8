"""Planted errors: one finding added, dropped, moved to the other side, or said with another certainty.

Made by the phantom's grammar (`grammar.py`) or taken from a list that people have reviewed; the labeler then has to
read an error as it was meant, and nothing else may have changed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cxr_jax.labels.taxonomy import CHEXPERT_14, NEGATIVE, POSITIVE
from cxr_jax.study.shown import ABSENT, PRESENT, SIDE_WORDS, STATE_WORDS, UNSURE, Frozen

if TYPE_CHECKING:
    from cxr_jax.labels.sentences import Reading

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

    def lacks_side(self, state: str | None, side_name: str | None) -> bool:
        """Tell whether a report states a finding whose side was swapped, and no side: nobody knows which it means."""
        return self.kind == "side" and state in (PRESENT, UNSURE) and side_name is None

    def is_corrected(self, state: str | None, side_name: str | None) -> bool:
        """Tell whether a report says what is so; one that does not carry the error may have another one instead."""
        said = state if state in (PRESENT, UNSURE) else ABSENT
        wanted = self.state_true if self.state_true in (PRESENT, UNSURE) else ABSENT
        return said == wanted and (self.kind != "side" or side_name == self.side_true)

    def is_carried(self, state: str | None, side_name: str | None) -> bool:
        """Tell whether a signed report says what was planted.

        Args:
            state: what the report says of the label; None or "not_mentioned": nothing, which denies it.
            side: the side that it gives.
        """
        # What a report does not mention, it denies.
        said = state if state in (PRESENT, UNSURE) else ABSENT
        if self.kind == "side":
            # Without a side the error is not repeated; nor is it found (`lacks_side`).
            return said != ABSENT and side_name == self.side_shown
        if self.kind == "drop":
            return said == ABSENT
        if self.kind == "add":
            return said != ABSENT
        return said == self.state_shown


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
    states = truth.states[label_name], shown.states[label_name]
    if not _fits(error_kind, states, (truth.sides.get(label_name), shown.sides.get(label_name))):
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


def _fits(
    error_kind: str, states: tuple[str, str], side_names: tuple[str | None, str | None]
) -> bool:
    """Tell whether a change, from what is so to what is shown, is one of the kind that it is called."""
    was_said, is_said = (state in (PRESENT, UNSURE) for state in states)
    # By what is said, since what is denied and what is not mentioned are one to readers.
    fits = {
        "add": not was_said and is_said,
        "drop": was_said and not is_said,
        "side": was_said and states[0] == states[1] and None not in side_names,
        "hedge": was_said and is_said and states[0] != states[1],
    }
    return fits[error_kind]


# ---- Checks ----------------------------------------------------------------------------------------


def problems(shown: Frozen, reading: "Reading") -> list[str]:
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
    return mismatches + contradictions(reading)


def contradictions(reading: "Reading") -> list[str]:
    """Say where one sentence affirms what another one denies: that would give an error away."""
    mismatches = []
    said: dict[tuple[str, str], set[int]] = {}
    for statement in reading.statements:
        for claim in statement.claims:
            said.setdefault((claim.label, claim.side), set()).add(claim.state)
    for (finding, side_name), states in said.items():
        # What is none of the labels may be two things of which one is there and the other is not.
        if finding not in CHEXPERT_14 or finding in _FOLLOWING:
            continue
        # What is denied without a side is denied on both.
        denied = {NEGATIVE} & said.get((finding, ""), set()) if POSITIVE in states else set()
        if len(states | denied) > 1:
            mismatches.append(f"{finding} {side_name}: sentences contradict each other")
    return mismatches
