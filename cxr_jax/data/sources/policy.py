"""What a label counts as that a table leaves blank or calls uncertain: the one place where four states become two.

`unknown`: it is neither positive nor negative, and no score has it, but to name what is blank costs
`taxonomy.BLANK_PRICE`. The policy goes with the rows, and its name with every number.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, PARENTS

BLANK_CHOICES = ("unknown", "negative")
UNCERTAIN_CHOICES = ("unknown", "negative", "positive")
FEW_KNOWN = 0.2  # share of known cells below which a table is warned of

_STATE_OF = {"unknown": None, "negative": 0, "positive": 1}
States = Mapping[str, int | None]  # label -> 1, 0, -1 (uncertain) or None (blank)


@dataclass(frozen=True)
class LabelPolicy:
    """What blank and uncertain labels count as: names of BLANK_CHOICES and UNCERTAIN_CHOICES."""

    blank: str = "unknown"
    uncertain: str = "unknown"

    def __post_init__(self) -> None:
        """Refuse other names. Raises UserError."""
        for name, choices in (("blank", BLANK_CHOICES), ("uncertain", UNCERTAIN_CHOICES)):
            if getattr(self, name) not in choices:
                raise UserError(f"policy {name} is not one of {', '.join(choices)}")

    def __str__(self) -> str:
        """Name it, as it stands beside numbers."""
        return f"blank={self.blank}, uncertain={self.uncertain}"

    def apply(self, states: States) -> dict[str, int | None]:
        """Give the state of each of the 14 labels; under `unknown` -1 and None stay what they are."""
        applied: dict[str, int | None] = {}
        for label in CHEXPERT_14:
            state = states.get(label)
            if state is None:
                state = _STATE_OF[self.blank]
            elif state == -1 and self.uncertain != "unknown":
                state = _STATE_OF[self.uncertain]
            applied[label] = state
        return applied


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
