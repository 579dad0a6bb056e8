"""What a row of a manifest is, once it is read, and which rows say again what a row before them has said.

Repeated rows are counted, left out on request, and refused where they contradict. Several answers to one question about
one film are no repeats: they are several samples to imitate.
"""

import collections
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cxr_jax.data.json_rows import BadRowError
from cxr_jax.data.prompts import IMAGE_MARK, Conversation, Message, Prompt, as_prompt
from cxr_jax.data.sources.policy import COMPLETE, LabelPolicy
from cxr_jax.data.studies.order import Taken
from cxr_jax.data.studies.subjects import Subject
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

_ANSWER_TAG = "<answer"  # of an answer list, closed or not


@dataclass(frozen=True)
class Row:
    """One question about a film, or several, with its truth."""

    id: str
    image_paths: tuple[Path, ...]  # in the order in which the prompt asks about them
    prompt: str  # with marks of their places, see `prompts.mark_films`
    solution: str  # positive labels in CheXpert order, ", " between them; "" where there is none
    target: str | None  # the assistant's text, if the manifest has one
    known: tuple[bool, ...]  # of the 14: does the manifest say positive or negative?
    group: str  # patient, as far as the manifest tells; a split never divides it
    patient: str | None = None  # as the manifest spells it; None: it does not tell
    view: str | None = None  # of sources.views
    policy: LabelPolicy = COMPLETE  # what blank and uncertain labels count as
    # Of the 14: may it be there, so that nobody is wrong to name it? What is neither known nor this is blank. None: all
    # that is not known.
    hedged: tuple[bool, ...] | None = None
    system: str | None = None  # the text of a system turn, if the manifest has one
    former_group: str = ""  # what `group` was for runs of before (`patients.former_group`)
    times: int = 1  # rows of the manifest that say this, where each is read once (below)
    study: str | None = None  # as the manifest spells it, of its patient
    split: str | None = None  # as the manifest has it: a run draws its own, the guard reads it
    taken: Taken = Taken()  # when the study was made, as far as the manifest tells
    subject: Subject = Subject()  # sex, age .. as far as the manifest tells
    roles: tuple[str, ...] = ()  # of the films (`prompts.ROLES`), if the manifest has them
    # Where somebody has drawn findings on the first film: left, top, width, height as shares of its sides.
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    later: Conversation = ()  # the turns that follow on prompt and target, with marks of the films that stand there

    @property
    def positive(self) -> tuple[str, ...]:
        """The labels that are positive."""
        return tuple(filter(None, self.solution.split(", ")))

    @property
    def image_path(self) -> Path:
        """The film that the row is about: the first."""
        return self.image_paths[0]

    @property
    def conversation(self) -> Conversation:
        """What is said in the row, in its order."""
        texts = (("system", self.system), ("user", self.prompt), ("assistant", self.target))
        first = (Message(role, text) for role, text in texts if text is not None)
        return (*first, *self.later)

    @property
    def asked(self) -> Prompt:
        """What is asked and scored: the first question before which all films stand, with what is said before it.

        The row's own answers about films, and those that hold an answer list, are left out with their questions: they
        would tell the truth that the answer is held against. Their films stand before the question that follows.
        """
        said = self.conversation
        questions = [place for place, turn in enumerate(said) if turn.role == "user"]
        marked = [place for place in questions if IMAGE_MARK in said[place].content]
        last = max(marked, default=questions[0])
        kept, films_shown, films_left = [turn for turn in said[:1] if turn.role == "system"], 0, 0
        for place in questions[: questions.index(last)]:
            question, answer = said[place : place + 2]
            films_shown += question.content.count(IMAGE_MARK)
            # In words as well as in a list; what was said before any film tells nothing of it.
            if films_shown or _ANSWER_TAG in answer.content.lower():
                films_left += question.content.count(IMAGE_MARK)
            else:
                kept += [question, answer]
        return as_prompt((*kept, Message("user", IMAGE_MARK * films_left + said[last].content)))


def conversations_of(rows: Sequence[Row], name: str) -> list[Conversation]:
    """Give the conversations of rows, to train on.

    Args:
        name: what a message calls the rows.

    Raises:
        UserError: for a row without an assistant's text.
    """
    for row in rows:
        if not row.target:
            raise UserError(f"{name}: row {row.id} has no assistant text to train on")
    return [row.conversation for row in rows]


# ---- Repeated rows ---------------------------------------------------------------------------------


class Seen:
    """The rows of a manifest so far.

    Args:
        repeats: "keep" reads every row, and refuses an id that comes again; "once" leaves out a row that repeats one
            before it, whatever its id.
    """

    def __init__(self, repeats: str = "keep") -> None:
        self._once = repeats == "once"
        self._place_of_id: dict[str, str] = {}
        # Film and question -> each of their truths, with the place where it first stands.
        self._truths: dict[tuple, list[tuple[str, Row]]] = {}
        self._times: collections.Counter[tuple] = collections.Counter()

    def add(self, row: Row, place: str) -> bool:
        """Take note of a row; tells whether it is to be read.

        Raises:
            BadRowError: for an id that comes again, and for one film and question with two truths.
        """
        truths = self._truths.setdefault(_question(row), [])
        # All of them: a label that the first row does not know may be there in the second and absent in the third.
        for place_of_truth, other in truths:
            if _contradict(other, row):
                raise BadRowError(
                    f"the same film and question as {place_of_truth}, with another solution"
                )
        if all((other.solution, other.known) != (row.solution, row.known) for _, other in truths):
            truths.append((place, row))
        self._times[_content(row)] += 1
        if self._once and self._times[_content(row)] > 1:
            return False
        # An id that comes again with another content names two things.
        if (place_of_id := self._place_of_id.setdefault(row.id, place)) != place:
            raise BadRowError(f"the id is that of {place_of_id}")
        return True

    def counted(self, rows: list[Row]) -> list[Row]:
        """Give the rows that were read with `times` set, where each was read once."""
        if not self._once:
            return rows
        return [replace(row, times=self._times[_content(row)]) for row in rows]


def _question(row: Row) -> tuple:
    return row.image_paths, row.asked


def _content(row: Row) -> tuple:
    """All that a row says but its id and patient."""
    return (row.image_paths, row.conversation, row.solution, row.known, row.hedged)


def _contradict(one: Row, other: Row) -> bool:
    """Whether a label is there in one row and is known to be absent in the other."""
    positive = [set(row.positive) for row in (one, other)]
    if positive[0] == positive[1]:
        return False
    known = [dict(zip(CHEXPERT_14, row.known, strict=True)) for row in (one, other)]
    return any(
        known[0][label] and known[1][label]
        for label in positive[0].symmetric_difference(positive[1])
    )


def describe_repeats(rows: Sequence[Row]) -> str | None:
    """Count repeated rows in one line, with what became of them; None where no row repeats another."""
    total = sum(row.times for row in rows)
    count = total - len({_content(row) for row in rows})
    if not count:
        return None
    policy = "each is read once (config.data.repeats=once)"
    if total == len(rows):
        policy = "all are read (config.data.repeats=keep)"
    return (
        f"repeats: {count:,} of {total:,} rows repeat another's film, question and answer; {policy}"
    )
