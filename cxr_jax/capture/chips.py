"""The 14 labels of a thought, as the labeler reads its text and as the reader sets them, and where the two differ.

What the reader sets is gold. A text that says otherwise teaches a model to reason to another answer than the one it
gives, so the differences are listed until either is mended. Reads by JAX: call it where JAX runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cxr_jax.errors import UserError
from cxr_jax.labels.lexicon import SIDELESS
from cxr_jax.labels.sentences import Reading, Statement, read_statements
from cxr_jax.labels.taxonomy import CHEXPERT_14, NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN

# The words of `cxr_reading` for the four states, so that readings and thoughts compare.
STATE_WORDS = {
    POSITIVE: "present",
    UNCERTAIN: "uncertain",
    NEGATIVE: "absent",
    NOT_MENTIONED: "not_mentioned",
}
NUMBERS = {word: number for number, word in STATE_WORDS.items()}
# What the parser calls a side -> what `cxr_reading` does.
_SIDES = {"right": "right", "left": "left", "both": "bilateral", "": None}
SIDES = ("right", "left", "bilateral")


class Chip(NamedTuple):
    """What is said, or set, of a label.

    Attributes:
        state: "present", "uncertain", "absent" or "not_mentioned".
        side: "right", "left", "bilateral", or None.
    """

    state: str
    side: str | None = None

    def as_json(self) -> dict[str, str | None]:
        """Return it as the page and the store have it."""
        return {"state": self.state, "side": self.side}


Chips = dict[str, Chip]  # all 14


class Read(NamedTuple):
    """A text as the labeler reads it.

    Attributes:
        chips: of the 14.
        statements: its sentences, each with its claims.
        is_foreign: the text is in another language, of which nothing is read.
        unread: words that look like findings and are not known.
    """

    chips: Chips
    statements: tuple[Statement, ...]
    is_foreign: bool
    unread: int

    def as_json(self) -> dict[str, Any]:
        """Return it as the page has it: chips with the numbers, from 1, of the sentences that speak of them."""
        # A label is shown with the sentences that speak of it, so that a reader sees why a chip says what it says.
        sentences: dict[str, list[int]] = {label: [] for label in CHEXPERT_14}
        for number, statement in enumerate(self.statements, 1):
            for label in {claim.label for claim in statement.claims} & sentences.keys():
                sentences[label].append(number)
        return {
            "findings": [
                {"label": label, **label_chip.as_json(), "sentences": sentences[label]}
                for label, label_chip in self.chips.items()
            ],
            "sentences": [statement.text for statement in self.statements],
            "is_foreign": self.is_foreign,
            "unread": self.unread,
        }


def read_text(text: str) -> Read:
    """Read a text by the report parser."""
    # One text a call: it is padded to the batch that the evaluator compiles anyhow.
    reading: Reading = read_statements([text])[0]
    chips = {
        label: Chip(STATE_WORDS[state], _SIDES[side])
        for label, state, side in zip(CHEXPERT_14, reading.states, reading.sides, strict=True)
    }
    return Read(chips, reading.statements, reading.is_foreign, reading.unread)


def parse_chips(sent_labels: Any) -> Chips:
    """Read the chips that a page sends: label -> {state, side}; labels left out are not mentioned.

    Raises:
        UserError: for a label, state or side that is none.
    """
    # As it comes from a client: every level may be anything.
    if not isinstance(sent_labels, Mapping):
        raise UserError("labels is not an object of label: {state, side}")
    chips = dict.fromkeys(CHEXPERT_14, Chip(STATE_WORDS[NOT_MENTIONED]))
    for label, label_chip in sent_labels.items():
        if label not in chips:
            raise UserError("labels names a label that is none of the 14")
        state = label_chip.get("state") if isinstance(label_chip, Mapping) else None
        if not isinstance(state, str) or state not in NUMBERS:
            raise UserError(f"labels: the state of {label} is none of {', '.join(NUMBERS)}")
        side = label_chip.get("side") if state in ("present", "uncertain") else None
        if side is not None and (side not in SIDES or label in SIDELESS):
            raise UserError(f"labels: {label} has no such side")
        chips[label] = Chip(state, side)
    return chips


def find_contradictions(gold: Chips, said: Chips) -> list[dict[str, str]]:
    """List where what the reader sets and what the text says differ: {label, kind, gold, text}, in the labels' order.

    Kinds are "state" and "side". That a text does not mention what is set as absent is no difference, nor the reverse;
    nor that a text sums up as "No Finding" what the reader does not.
    """
    # "Absent" and "not mentioned" give the same answer, and a text need not deny all that is not there.
    differences = []
    silent = ("absent", "not_mentioned")
    for label, label_chip in gold.items():
        said_chip = said[label]
        # It is derived from the other thirteen, whose own differences say what is wrong.
        if label == "No Finding" and label_chip.state != "present":
            continue
        if label_chip.state != said_chip.state and not (
            label_chip.state in silent and said_chip.state in silent
        ):
            differences.append(
                {"label": label, "kind": "state", "gold": label_chip.state, "text": said_chip.state}
            )
        elif label_chip.state not in silent and label_chip.side != said_chip.side:
            differences.append(
                {
                    "label": label,
                    "kind": "side",
                    "gold": label_chip.side or "no side",
                    "text": said_chip.side or "no side",
                }
            )
    return differences


def check_answer(gold: Chips) -> Sequence[str]:
    """Say what in the reader's labels cannot be together; [] for nothing."""
    # A device is no finding: a normal film may show one.
    findings = [
        label
        for label, label_chip in gold.items()
        if label_chip.state == "present" and label not in ("No Finding", "Support Devices")
    ]
    if gold["No Finding"].state == "present" and findings:
        return [f"No Finding is set beside {', '.join(findings)}"]
    return []
