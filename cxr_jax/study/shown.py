"""What the AI says of a case as readers see it: frozen before the study, hashed, and the same for all of them.

No model runs during a sitting: a text that streams would measure the model and not the reader.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cxr_jax.labels.taxonomy import CHEXPERT_14, NEGATIVE, POSITIVE, UNCERTAIN
from cxr_jax.store import sha256_of

if TYPE_CHECKING:
    from cxr_jax.labels.sentences import Reading

PRESENT, UNSURE, ABSENT, SILENT = "present", "uncertain", "absent", "not_mentioned"
# How the labeler names sides -> how readings do.
SIDE_WORDS = {"right": "right", "left": "left", "both": "bilateral"}
STATE_WORDS = {POSITIVE: PRESENT, UNCERTAIN: UNSURE, NEGATIVE: ABSENT}


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """One reading, frozen.

    Attributes:
        sentences: of the reasoning, in their order.
        states: of each of the 14 labels, one of the words above.
        sides: "right", "left" or "bilateral" of labels that have one.
    """

    sentences: tuple[str, ...]
    states: Mapping[str, str]
    sides: Mapping[str, str]

    def as_json(self) -> dict:
        """Give it as files and hashes have it."""
        return {
            "sentences": list(self.sentences),
            "states": dict(self.states),
            "sides": dict(self.sides),
        }

    @classmethod
    def from_json(cls, values: Mapping) -> "Frozen":
        """Take it back from `as_json`."""
        return cls(
            sentences=tuple(values["sentences"]),
            states=dict(values["states"]),
            sides=dict(values["sides"]),
        )

    @property
    def sha256(self) -> str:
        """Hash that names the reading."""
        return sha256_of(self.as_json())

    @property
    def text(self) -> str:
        """The reasoning as one text."""
        return " ".join(self.sentences)


def read_texts(texts: Sequence[str], *, is_phantom: bool) -> "list[Reading]":
    """Read texts with the project's own labeler, in the words of the world they are about."""
    # Computed with JAX, which a server of frozen readings has no use for.
    from cxr_jax import phantom
    from cxr_jax.labels.sentences import read_statements

    return read_statements(list(texts), more=phantom.LEXICON if is_phantom else None)


def freeze_text(text: str, reading: "Reading", answer: Sequence[str] = ()) -> Frozen:
    """Freeze a model's text by what the labeler reads in it.

    Args:
        text: the reasoning.
        reading: of that text.
        answer: labels that the model named; they are present, whatever its reasoning says.
    """
    states = {
        label_name: STATE_WORDS.get(state_word, SILENT)
        for label_name, state_word in zip(CHEXPERT_14, reading.states, strict=True)
    }
    # The answer is what counts for chips, as in the room.
    states |= dict.fromkeys((label_name for label_name in answer if label_name in states), PRESENT)
    # A side belongs to what is there, or may be.
    sides = {
        label_name: SIDE_WORDS[side_word]
        for label_name, side_word in zip(CHEXPERT_14, reading.sides, strict=True)
        if side_word and states[label_name] in (PRESENT, UNSURE)
    }
    sentences = tuple(statement.text for statement in reading.statements) or (text,)
    return Frozen(sentences=sentences, states=states, sides=sides)


def payload(frozen: Frozen, shows: Sequence[str]) -> dict:
    """Give what an arm may show of a reading; nothing at all for the manual arm.

    Args:
        shows: of `protocol.SHOWN`.
    """
    shown: dict = {}
    if "labels" in shows:
        # No probabilities in any arm: they would be a second difference between the arms.
        shown["labels"] = [
            {
                "label": label_name,
                "state": frozen.states[label_name],
                "side": frozen.sides.get(label_name),
            }
            for label_name in CHEXPERT_14
        ]
    if "sentences" in shows:
        shown["sentences"] = [
            {"n": number, "text": text} for number, text in enumerate(frozen.sentences, 1)
        ]
    if "draft" in shows:
        shown["draft"] = _draft(frozen)
    return shown


def _draft(frozen: Frozen) -> str:
    """A report without reasoning: one line for what is present or possible, one that denies the rest."""
    draft_lines = []
    for label_name in CHEXPERT_14:
        state_word, side_word = frozen.states[label_name], frozen.sides.get(label_name)
        if state_word in (PRESENT, UNSURE) and label_name != "No Finding":
            place = f"{side_word} " if side_word else ""
            words = f"{place}{label_name.lower()}"
            # Capital letters begin sentences, sides included.
            words = words[0].upper() + words[1:]
            draft_lines.append(f"{'Possible ' + words.lower() if state_word == UNSURE else words}.")
    # Nothing to say is said, too.
    return " ".join(draft_lines) if draft_lines else "No acute abnormality."
