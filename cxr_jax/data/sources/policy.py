"""What labels count as that a table leaves blank or calls uncertain, and which follow from others: the one place where
four states become two.

`unknown`: it is neither positive nor negative, and no score has it, but to name what is blank costs
`taxonomy.BLANK_PRICE`. The policy goes with the rows, and its name with every number.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cxr_jax.errors import UserError, shown
from cxr_jax.labels.taxonomy import (
    CHEXPERT_14,
    INDEX,
    NEGATIVE,
    NOT_MENTIONED,
    PARENTS,
    PATHOLOGY,
    POSITIVE,
    UNCERTAIN,
    find_label,
)

BLANK_CHOICES = ("unknown", "negative")
UNCERTAIN_CHOICES = ("unknown", "negative", "positive")
PARENT_CHOICES = ("given", "closed")
NO_FINDING_CHOICES = ("given", "derived")
FEW_KNOWN = 0.2  # share of known cells below which a table is warned of

# As the authors of CheXpert call them (arXiv 1901.07031, section 3).
_OTHER_NAMES = {"ignore": "unknown", "zeros": "negative", "ones": "positive"}
# What they found best of the five labels that they compared; of the others nothing is said (section 5).
_PER_LABEL = {
    "chexpert": "Atelectasis=positive, Edema=positive, Cardiomegaly=negative, Consolidation=negative"
}

_STATE_OF = {"unknown": None, "negative": 0, "positive": 1}
States = Mapping[str, int | None]  # label -> 1, 0, -1 (uncertain) or None (blank)


@dataclass(frozen=True)
class LabelPolicy:
    """What blank and uncertain labels count as, and what follows from others.

    Attributes:
        blank: of BLANK_CHOICES.
        uncertain: of UNCERTAIN_CHOICES; "chexpert"; or by label, "Edema=positive, negative": the last for the others.
        parents: "given", or "closed": a child that is there, or may be, makes its parent so.
        no_finding: "given", or "derived": there if all findings are known to be absent, absent if one is there.
    """

    blank: str = "unknown"
    uncertain: str = "unknown"
    parents: str = "given"
    no_finding: str = "given"

    def __post_init__(self) -> None:
        """Refuse other names. Raises UserError."""
        for name, choices in (
            ("blank", BLANK_CHOICES),
            ("parents", PARENT_CHOICES),
            ("no_finding", NO_FINDING_CHOICES),
        ):
            choice = getattr(self, name)
            choice = _usual_name(choice)
            if choice not in choices:
                raise UserError(f"policy {name} is not one of {', '.join(choices)}")
            object.__setattr__(self, name, choice)
        object.__setattr__(self, "uncertain", _usual_name(self.uncertain))
        _uncertain_of_labels(self.uncertain)

    def __str__(self) -> str:
        """Name it, as it stands beside numbers."""
        names = [f"blank={self.blank}", f"uncertain={self.uncertain}"]
        # What is as given needs no word.
        if self.parents == "closed":
            names.append("parents=closed")
        if self.no_finding == "derived":
            names.append("No Finding=derived")
        return ", ".join(names)

    def apply(self, states: States) -> dict[str, int | None]:
        """Give the state of each of the 14 labels; under `unknown` -1 and None stay what they are."""
        # The one implementation is of arrays: a data set is one call, a manifest one a row.
        row = np.full((1, len(CHEXPERT_14)), NOT_MENTIONED, np.int8)
        for label, state in states.items():
            if state is not None:
                row[0, INDEX[label]] = state
        applied = self.apply_states(row)[0].tolist()
        return {
            label: None if state == NOT_MENTIONED else state
            for label, state in zip(CHEXPERT_14, applied, strict=True)
        }

    def apply_states(self, states: np.ndarray) -> np.ndarray:
        """Give the states of N films under this policy, int8 [N, 14]; what stays unknown stays -1 or -2."""
        applied = states.copy()
        # In this order: what follows from others follows from what they count as.
        if self.blank == "negative":
            applied[applied == NOT_MENTIONED] = NEGATIVE
        for place, choice in enumerate(_uncertain_of_labels(self.uncertain)):
            if choice != "unknown":
                column = applied[:, place]
                column[states[:, place] == UNCERTAIN] = _STATE_OF[choice]
        if self.parents == "closed":
            _close_parents(applied)
        if self.no_finding == "derived":
            applied[:, INDEX["No Finding"]] = _derive_no_finding(applied)
        return applied


def _usual_name(choice: object) -> object:
    """A choice by the name that numbers have it under; what is no text stays, to be refused."""
    if not isinstance(choice, str):
        return choice
    return _OTHER_NAMES.get(choice.strip(), choice.strip())


@functools.cache
def _uncertain_of_labels(text: object) -> tuple[str, ...]:
    """What an uncertain state of each of the 14 labels counts as. Raises UserError."""
    choices = ", ".join((*UNCERTAIN_CHOICES, *_PER_LABEL))
    bad = f"policy uncertain is not one of {choices}, or LABEL=CHOICE with commas between"
    if not isinstance(text, str):
        raise UserError(bad)
    # A choice without a label is that of all the others.
    of_label: dict[str, str] = {}
    rest = "unknown"
    for part in _PER_LABEL.get(text, text).split(","):
        name, equals, choice = (piece.strip() for piece in part.rpartition("="))
        choice = str(_usual_name(choice))
        label = find_label(name)
        if choice not in UNCERTAIN_CHOICES or (equals and label is None):
            raise UserError(f"{bad}: {shown(part.strip())!r}")
        if label is None:
            rest = choice
        else:
            of_label[label] = choice
    return tuple(of_label.get(label, rest) for label in CHEXPERT_14)


def _close_parents(states: np.ndarray) -> None:
    """Make the parents of what is there, or may be, so: in place."""
    # No parent is a child of another, so one pass is enough.
    for parent, children in PARENTS.items():
        column = states[:, INDEX[parent]]
        of_children = states[:, [INDEX[child] for child in children]]
        is_there = (of_children == POSITIVE).any(axis=1)
        may_be = (of_children == UNCERTAIN).any(axis=1)
        column[may_be & (column != POSITIVE)] = UNCERTAIN
        column[is_there] = POSITIVE


def _derive_no_finding(states: np.ndarray) -> np.ndarray:
    """No Finding by the findings; Support Devices are none."""
    # One that is not known leaves the whole not known, unless another is there.
    findings = states[:, np.array(PATHOLOGY)]
    is_there = (findings == POSITIVE).any(axis=1)
    all_absent = (findings == NEGATIVE).all(axis=1)
    may_be = (findings == UNCERTAIN).any(axis=1)
    unknown = np.where(may_be, UNCERTAIN, NOT_MENTIONED)
    return np.where(is_there, NEGATIVE, np.where(all_absent, POSITIVE, unknown))


def may_be_named(positive: np.ndarray, known: np.ndarray, uncertain: np.ndarray) -> np.ndarray:
    """Tell which labels that are not known nobody is wrong to name; the others that are not known are blank.

    Those that are uncertain; those that the whole set does not have; parents of what is there or may be: edema is an
    opacity, whether or not the table says so.

    Args:
        positive: bool [N, 14], all rows of a set.
        known: bool [N, 14].
        uncertain: bool [N, 14].
    """
    is_asked = known.any(axis=0)
    may_be = positive | uncertain
    has_child = np.zeros_like(may_be)
    for parent, children in PARENTS.items():
        child_columns = [INDEX[child] for child in children]
        has_child[:, INDEX[parent]] = may_be[:, child_columns].any(axis=1)
    return uncertain | ~known & (~is_asked | has_child)


# Rows without states have a solution that is taken as complete.
COMPLETE = LabelPolicy(blank="negative")


def describe(policies: Iterable[LabelPolicy], known_share: float) -> str:
    """Say the policies of rows in one line, most strict first where they differ, and how much is known."""
    names = sorted({str(policy) for policy in policies})
    mixed = "rows differ: " if len(names) > 1 else ""
    return f"{mixed}{' / '.join(names)}; {known_share:.0%} of the label cells known"


def warn_few_known(name: str, known_share: float) -> str | None:
    """Give the warning of a table or manifest of which little is known, None where enough is."""
    if known_share >= FEW_KNOWN:
        return None
    return (
        f"warning: {name}: only {known_share:.0%} of the label cells are known (blank=unknown): scores rest on "
        "few cells; --blank=negative of cxr-jax manifest takes what a table leaves blank as absent"
    )


def describe_protocol(label_policy: LabelPolicy, states: np.ndarray) -> str:
    """Say everything that was decided between a table and a score, in one line; "none" for what no cell is.

    Args:
        label_policy: of the films.
        states: int8 [N, 14], before the policy.
    """
    # What decided nothing is not named: a reader would look for its effect.
    uncertain = label_policy.uncertain if (states == UNCERTAIN).any() else "none"
    blank = label_policy.blank if (states == NOT_MENTIONED).any() else "none"
    given = {"given": "as given"}
    parents = given.get(label_policy.parents, label_policy.parents)
    no_finding = given.get(label_policy.no_finding, label_policy.no_finding)
    return f"uncertain {uncertain}; blank {blank}; parents {parents}; No Finding {no_finding}"
