"""The answer of a row: which labels are there, by a table or by the report, and whether the two agree."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from cxr_jax.data.json_rows import BadRowError, is_absent
from cxr_jax.data.sources.policy import LabelPolicy
from cxr_jax.data.sources.table import read_state
from cxr_jax.labels.sentences import Reading
from cxr_jax.labels.taxonomy import (
    CHEXPERT_14,
    INDEX,
    NEGATIVE,
    NOT_MENTIONED,
    PARENTS,
    POSITIVE,
    UNCERTAIN,
    find_label,
)

_STATE_WORDS = {1: "positive", 0: "negative", -1: "uncertain", None: "blank"}
_READ_WORDS = {
    POSITIVE: "affirms it",
    NEGATIVE: "denies it",
    UNCERTAIN: "hedges it",
    NOT_MENTIONED: "does not mention it",
}
_SIDES = ("right", "left", "both")


class Labels(NamedTuple):
    """What a table says of one film.

    Attributes:
        states: label -> 1, 0, -1 or None; all 14.
        sides: label -> "right", "left" or "both", where a column says so.
    """

    states: dict[str, int | None]
    sides: dict[str, str]


# ---- Labels of a row -----------------------------------------------------------------------------------------------


def find_labels(cells: Mapping[str, Any]) -> Labels | None:
    """Find the labels of a row: an object `labels`, else columns by the names of the 14; else a `solution`.

    Columns are those of `cxr-jax label` and of CheXpert's tables, whatever their case, with `_` for spaces or not;
    "<Label> side" is a side.

    Returns:
        None where the row has none.

    Raises:
        BadRowError: for a state that is none, a label that is none of the 14.
    """
    sides: dict[str, str] = {}
    states: dict[str, int | None] = {}
    # An object goes before columns: a joined table may have both, and the object is ours.
    given = cells.get("labels")
    if not is_absent(given):
        if not isinstance(given, Mapping):
            raise BadRowError("labels is not an object of label: state")
        for number, (name, cell_value) in enumerate(given.items(), 1):
            label_name = find_label(str(name).replace("_", " "))
            if label_name is None:
                raise BadRowError(f"name {number} in labels is none of the 14 labels")
            states[label_name] = _read_state(label_name, cell_value)
    else:
        for name, cell_value in cells.items():
            column = name.replace("_", " ").strip().lower()
            if label_name := find_label(column):
                states[label_name] = _read_state(label_name, cell_value)
            elif column.endswith(" side") and (
                label_name := find_label(column.removesuffix(" side"))
            ):
                side_name = "" if is_absent(cell_value) else str(cell_value).strip().lower()
                if side_name and side_name not in _SIDES:
                    raise BadRowError(f"the side of {label_name} is not one of {', '.join(_SIDES)}")
                if side_name:
                    sides[label_name] = side_name
    # A list of positives says nothing of the others.
    if not states:
        states = _states_of_solution(cells.get("solution"))
    if not states:
        return None
    return Labels({label_name: states.get(label_name) for label_name in CHEXPERT_14}, sides)


def _states_of_solution(solution: object) -> dict[str, int | None]:
    if is_absent(solution):
        return {}
    names = solution.split(",") if isinstance(solution, str) else solution
    if not isinstance(names, list):
        raise BadRowError("solution is not a list of labels")
    states: dict[str, int | None] = {}
    for number, name in enumerate(names, 1):
        label_name = find_label(name) if isinstance(name, str) else None
        if label_name is None:
            raise BadRowError(f"name {number} in solution is none of the 14 labels")
        states[label_name] = 1
    return states


def _read_state(label_name: str, cell_value: object) -> int | None:
    if is_absent(cell_value):
        return None
    try:
        return read_state(str(cell_value))
    except ValueError:
        raise BadRowError(f"{label_name} is not one of 1, 0, -1, U, blank") from None


# ---- Labels and report ---------------------------------------------------------------------------------------------


def disagreements(labels: Labels, report: Reading) -> list[str]:
    """Say which labels a table and a report differ about; [] for none.

    They agree where they say the same; where the table says no more than the report (blank beside a denial), or denies
    what the report does not mention; and where a label is the parent of one that the report gives the same state.
    """
    reasons = []
    for label_name, label_state in labels.states.items():
        report_state = report.states[INDEX[label_name]]
        if not _agree(label_name, label_state, report_state, report):
            reasons.append(
                f"{label_name}: {_STATE_WORDS[label_state]} by the labels; "
                f"the report {_READ_WORDS[report_state]}"
            )
    for label_name, side_name in labels.sides.items():
        said = report.sides[INDEX[label_name]]
        if labels.states[label_name] is not None and said != side_name:
            reasons.append(
                f"{label_name}: {side_name} by the labels; the report says {said or 'no'} side"
            )
    return reasons


def _agree(label_name: str, label_state: int | None, report_state: int, report: Reading) -> bool:
    if label_name == "No Finding":
        # It is derived: tables differ in when they set it, and not to set it says nothing.
        return label_state != 1 or report_state == POSITIVE
    if label_state == report_state:
        return True
    # Blank: the table says nothing, so the report may deny, and not affirm.
    if label_state is None:
        return report_state in (NEGATIVE, NOT_MENTIONED)
    # From here on the report denies or is silent, and the table is not blank.
    if report_state not in (NOT_MENTIONED, NEGATIVE):
        return False
    if label_state == 0:
        return True
    # What is said of a child is said of its parent (CheXpert's hierarchy).
    children = PARENTS.get(label_name, ())
    return report_state == NOT_MENTIONED and any(
        report.states[INDEX[child]] == label_state for child in children
    )


def states_of(report: Reading) -> dict[str, int | None]:
    """Give what a report says of the labels, as a table would."""
    return {
        label_name: None if label_state == NOT_MENTIONED else label_state
        for label_name, label_state in zip(CHEXPERT_14, report.states, strict=True)
    }


def positive(states: Mapping[str, int | None], policy: LabelPolicy) -> list[str]:
    """List the labels that are there under a policy, in CheXpert's order."""
    applied = policy.apply(states)
    return [label_name for label_name in CHEXPERT_14 if applied[label_name] == 1]
