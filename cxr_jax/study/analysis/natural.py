"""The AI's own errors, held against the reference: kept apart from planted ones, whose truth and share are known.

A flag on a sentence that is wrong by itself is a good catch and no false alarm, so it must be known which those are.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.study.folder import SealedCase
from cxr_jax.study.plant import Plant
from cxr_jax.study.shown import ABSENT, PRESENT, SILENT, Frozen, read_texts

# Neither is a finding that a reader could be misled about.
_NO_FINDINGS = ("No Finding", "Support Devices")


@dataclass(frozen=True)
class NaturalErrors:
    """What is wrong by itself in the reading of one case.

    Attributes:
        errors: one a label, told as a plant would be.
        sentences: numbers, from 1, of the sentences that speak of one of these labels.
    """

    errors: tuple[Plant, ...] = ()
    sentences: Set[int] = frozenset()

    @property
    def labels(self) -> Set[str]:
        """The labels that the AI has wrong."""
        return {error.label for error in self.errors}


def find_errors(sealed_case: SealedCase, shown: Frozen) -> list[Plant]:
    """List where a reading differs from a reference that is known; what was planted is left out.

    Args:
        shown: the reading as readers see it.
    """
    errors = []
    for label_name in CHEXPERT_14:
        truth, said = sealed_case.truth.get(label_name), shown.states[label_name]
        side_true, side_said = sealed_case.truth_sides.get(label_name), shown.sides.get(label_name)
        natural = sealed_case.natural
        # The plant's own label, and labels that changed with it, say nothing of the AI.
        is_planted = (natural.states[label_name], natural.sides.get(label_name)) != (
            said,
            side_said,
        ) or (sealed_case.plant is not None and sealed_case.plant.label == label_name)
        if label_name in _NO_FINDINGS or is_planted:
            continue
        # Uncertain on either side is no error: nobody can say which way it would be one.
        if truth == ABSENT and said == PRESENT:
            error_kind = "add"
        elif truth == PRESENT and said in (ABSENT, SILENT):
            error_kind = "drop"
        elif truth == said == PRESENT and side_true and side_said and side_true != side_said:
            error_kind = "side"
        else:
            continue
        errors.append(
            Plant(
                kind=error_kind,
                label=label_name,
                state_true=truth,
                state_shown=said,
                side_true=side_true,
                side_shown=side_said,
                sentences=(),
                text_before="",
                text_after="",
            )
        )
    return errors


def errors_of_cases(
    sealed: Sequence[SealedCase], shown: Sequence[Frozen], *, is_phantom: bool
) -> list[NaturalErrors]:
    """Find the natural errors of all cases, and the sentences that state them."""
    errors = [find_errors(*pair) for pair in zip(sealed, shown, strict=True)]
    # One text a sentence, all at once; phantoms' readings are right by themselves, and cost nothing here.
    wanted = [
        (case_no, number, text)
        for case_no, reading in enumerate(shown)
        if errors[case_no]
        for number, text in enumerate(reading.sentences, 1)
    ]
    read = read_texts([text for *_, text in wanted], is_phantom=is_phantom) if wanted else []
    spoken_of: Mapping[int, set[int]] = {case_no: set() for case_no, *_ in wanted}
    for (case_no, number, _), reading in zip(wanted, read, strict=True):
        claimed = {claim.label for statement in reading.statements for claim in statement.claims}
        if claimed & {error.label for error in errors[case_no]}:
            spoken_of[case_no].add(number)
    return [
        NaturalErrors(tuple(of_case), frozenset(spoken_of.get(case_no, ())))
        for case_no, of_case in enumerate(errors)
    ]
