"""Plant errors by the phantom's grammar, whose facts are known: the scene is changed and its report written again.

So an error is consistent with itself and differs from the truth in one finding. It draws with JAX, as phantoms do, and
is imported by what makes a study only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.phantom import report_writer, wording
from cxr_jax.phantom.constants import BOTH, FINDING_INDEX, LEFT, PATHOLOGIES, POSITIVE_AT, RIGHT
from cxr_jax.study.shown import STATE_WORDS, Frozen

# Severities: clearly called, clearly hedged, clearly called.
_ADDED, _SUBTLE, _CERTAIN = 0.65, 0.22, 0.65
_SIDES = {RIGHT: "right", LEFT: "left", BOTH: "bilateral"}
# What has no side on a film, or whose side the grammar does not say.
_MIDLINE = ("enlarged_cardiomediastinum", "cardiomegaly", "edema")


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
