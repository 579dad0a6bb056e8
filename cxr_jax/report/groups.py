"""The report's groups: why RL preferred one completion of an image to another.

A group is one image and prompt of a training step with its G sampled completions, every reward term of each, and the
advantages that the step learned from. `group_records.groups_of` takes a few from a rollout, `records.py` keeps them in
samples.jsonl, and `section` draws them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from cxr_jax.labels.answers import extract_trace
from cxr_jax.labels.sentences import AGREES, CONTRADICTS, NOTHING, OPEN, Sentence
from cxr_jax.report.cases import Mark, compare_labels
from cxr_jax.report.group_records import SAME, Completion, Group
from cxr_jax.report.markup import render
from cxr_jax.report.preference import ABOUT, contributions, is_same_in_all, number, ranked, why

STEPS_SHOWN = 12  # steps of a run that the page shows: the first, and the latest
END_CARDS = 2  # completions shown of each end of a group; those between are folded


class VerdictMark(NamedTuple):
    """How a verdict looks: the class of its style, its sign, and what the legend says of it."""

    kind: str
    sign: str
    meaning: str


# A sign beside the colour: the verdicts can be told apart without seeing colours.
MARKS = {
    AGREES: VerdictMark("agrees", "✓", "agrees with the truth"),
    CONTRADICTS: VerdictMark("contradicts", "✗", "contradicts it"),
    OPEN: VerdictMark("open", "~", "the truth does not decide it"),
    NOTHING: VerdictMark("nothing", "", "claims nothing about a finding"),
}


# ---- What the templates draw ----


class Claim(NamedTuple):
    """A sentence of a trace, with the mark of its verdict and what is wrong with it."""

    kind: str
    mark: str
    text: str
    reasons: str


@dataclass(frozen=True)
class Part:
    """One reward term of a completion: value x weight = product. width: of its bar, in percent; None: no bar."""

    term: str
    value: str
    weight: str
    product: str
    direction: str
    width: str | None


class Bar(NamedTuple):
    """The advantage as a bar from the middle. left, width: in percent of the whole."""

    direction: str
    left: str
    width: str


@dataclass(frozen=True, kw_only=True)
class CompletionCard:
    """What the page shows of one completion. same_in_all: the sum of the terms that are the same in all."""

    place: str
    advantage: str
    bar: Bar
    notes: str
    marks: list[Mark]
    parts: list[Part]
    same_in_all: str | None
    reward: str
    length: int
    trained: bool
    claims: list[Claim]
    as_written: str
    unweighed: str


@dataclass(frozen=True, kw_only=True)
class GroupCard:
    """What the page shows of one group. between: completions that are folded; truth: title -> labels."""

    uri: str
    id: str
    step: int
    set_name: str
    prompt: str
    kept: bool
    truth: dict[str, str]
    reason: str
    same_terms: str
    shown: list[CompletionCard]
    between: list[CompletionCard]


@dataclass(frozen=True)
class _Scale:
    """What the bars of a group are held against: its largest advantage and its largest part of a reward."""

    advantage: float
    part: float
    varied: list[str]  # the weighed terms that are not the same in all


# ---- One completion ----


def _claim(sentence: Sentence) -> Claim:
    # A record may come from a version that knows other verdicts: those get no mark.
    shown_mark = MARKS.get(sentence.verdict, MARKS[NOTHING])
    return Claim(shown_mark.kind, shown_mark.sign, sentence.text, ", ".join(sentence.why))


def _legend() -> list[Claim]:
    """A sentence of each verdict that says what the verdict means."""
    claims = []
    for verdict, shown_mark in MARKS.items():
        # Only a contradiction is shown with a reason, so only its sample has one.
        reasons = ["what is so"] if verdict == CONTRADICTS else []
        claims.append(_claim(Sentence(shown_mark.meaning, verdict, reasons)))
    return claims


def _part(group: Group, completion: Completion, reward_term: str, group_scale: _Scale) -> Part:
    # The bar shows the product: a large value of a small weight moves little.
    product, weight = contributions(group, completion)[reward_term], group.weights[reward_term]
    # Bars of one group have one scale, so that they can be compared.
    bar_width = None
    if group_scale.part > 0:
        bar_width = f"{min(100.0, 100 * abs(product) / group_scale.part):.0f}"
    return Part(
        term=reward_term,
        value=number(completion.terms[reward_term]),
        weight=f"× {weight:g}".replace("-", "−"),
        product=number(product, sign=True),
        direction="up" if product > 0 else "down",
        width=bar_width,
    )


def _same_in_all(group: Group, completion: Completion, varied_terms: Sequence[str]) -> str | None:
    """The sum of the terms that are the same in all, None without such a term."""
    products = contributions(group, completion)
    # Without such a term there is no row, not a row of 0.
    if len(varied_terms) == len(products):
        return None
    total = sum(
        product for reward_term, product in products.items() if reward_term not in varied_terms
    )
    return number(total, sign=True)


def _bar(advantage: float, largest: float) -> Bar:
    # A group without spread has no largest advantage to hold the others against.
    bar_width = 0.0
    if largest > 0:
        bar_width = 50 * min(1.0, abs(np.nan_to_num(advantage)) / largest)
    # From the middle to the right what was encouraged, to the left what was not.
    if advantage > 0:
        return Bar("up", "50.0", f"{bar_width:.1f}")
    return Bar("down", f"{50 - bar_width:.1f}", f"{bar_width:.1f}")


def _notes(group: Group, completion: Completion) -> str:
    notes = []
    if not completion.valid_format:
        notes.append("Invalid format.")
    if not completion.finished:
        notes.append("Truncated at the token limit.")
    # Of a group that was not taken, the card of the group says so once.
    if group.kept and not completion.trained:
        notes.append("Left out of the update.")
    return " ".join(notes)


def _completion_card(
    group: Group, completion: Completion, place: str, group_scale: _Scale
) -> CompletionCard:
    # A term of weight 0 is only watched: it is named below the bars.
    unweighed = [
        reward_term for reward_term in completion.terms if not group.weights.get(reward_term)
    ]
    return CompletionCard(
        place=place,
        advantage=number(completion.advantage, sign=True),
        bar=_bar(completion.advantage, group_scale.advantage),
        notes=_notes(group, completion),
        # An answer that can be made out is shown even where the format is invalid: accuracy counts it.
        marks=compare_labels(completion.answer, group.truth, group.known),
        parts=[
            _part(group, completion, reward_term, group_scale) for reward_term in group_scale.varied
        ],
        same_in_all=_same_in_all(group, completion, group_scale.varied),
        reward=number(completion.reward, sign=True),
        length=completion.length,
        trained=completion.trained,
        claims=[_claim(sentence) for sentence in completion.sentences],
        as_written=completion.text[len(extract_trace(completion.text)) :],
        unweighed=", ".join(
            f"{reward_term} {number(completion.terms[reward_term])}" for reward_term in unweighed
        ),
    )


# ---- One group ----


def _truth(group: Group) -> dict[str, str]:
    """Title -> labels with their sides; what is not known is left out where all is."""

    def join_labels(labels: Sequence[str]) -> str:
        sided_labels = []
        for label in labels:
            side = f" ({group.sides[label]})" if label in group.sides else ""
            sided_labels.append(label + side)
        return ", ".join(sided_labels) or "no label"

    labels_by_title = {
        "Truth": join_labels([label for label in group.truth if label not in group.hedged])
    }
    # With all labels known, hedged ones are findings too subtle to be sure of.
    if group.hedged:
        hedged_title = "Subtle, may be hedged" if group.known is None else "Not known"
        labels_by_title[hedged_title] = join_labels(group.hedged)
    return labels_by_title


def _scale(group: Group, best_first: Sequence[Completion]) -> _Scale:
    # Terms that are the same in all teach nothing: they get no row of their own.
    # Every completion has the same terms, so the first stands for all.
    weighed = contributions(group, best_first[0])
    varied_terms = [
        reward_term for reward_term in weighed if not is_same_in_all(group, reward_term)
    ]
    magnitudes = (
        abs(product)
        for completion in best_first
        for reward_term, product in contributions(group, completion).items()
        if reward_term in varied_terms
    )
    # An advantage that was not finite stands as NaN in a record, and counts as 0 here.
    advantage = max(abs(np.nan_to_num(completion.advantage)) for completion in best_first)
    return _Scale(advantage, max(magnitudes, default=0.0), varied_terms)


def _places(completion_count: int, all_equal: bool) -> list[str]:
    """What stands above each completion, best first."""
    # Where all are equal, no place is better than another.
    if all_equal:
        return [f"{place} of {completion_count}" for place in range(1, completion_count + 1)]
    place_names = [f"Place {place}" for place in range(1, completion_count + 1)]
    place_names[-1] = "Worst"
    place_names[0] = "Best"  # after "Worst": a group of one has a best and no worst
    return [f"{place_name} of {completion_count}" for place_name in place_names]


def _group_card(group: Group, image_uri: str) -> GroupCard:
    # Best first: the sentence beside the image speaks of the first and the last.
    best_first = ranked(group)
    group_scale = _scale(group, best_first)
    places = _places(len(best_first), group_scale.advantage < SAME)
    cards = [
        _completion_card(group, completion, place, group_scale)
        for completion, place in zip(best_first, places, strict=True)
    ]
    # In a long group the ends tell most.
    shown_cards, folded_cards = cards, []
    if len(cards) > 2 * END_CARDS:
        shown_cards, folded_cards = (
            cards[:END_CARDS] + cards[-END_CARDS:],
            cards[END_CARDS:-END_CARDS],
        )
    # They are told in one line, as they do not tell completions apart.
    equal_terms = [
        reward_term
        for reward_term in contributions(group, best_first[0])
        if reward_term not in group_scale.varied
    ]
    same_terms = ", ".join(
        f"{reward_term} {number(best_first[0].terms[reward_term])} × {group.weights[reward_term]:g}"
        for reward_term in equal_terms
    )
    return GroupCard(
        uri=image_uri,
        id=group.id,
        step=group.step,
        set_name=group.set,
        prompt=group.prompt,
        kept=group.kept,
        truth=_truth(group),
        reason=why(group),
        same_terms=same_terms.replace("-", "−"),
        shown=shown_cards,
        between=folded_cards,
    )


# ---- The section ----


def _steps_shown(train_steps: Sequence[int]) -> list[int]:
    """The steps that the page shows, latest first; steps: in order."""
    # The first step is what the latest ones are held against.
    if len(train_steps) > STEPS_SHOWN:
        train_steps = [train_steps[0], *train_steps[1 - STEPS_SHOWN :]]
    return list(reversed(train_steps))


def _glossary(groups: Sequence[tuple[Group, str]]) -> Mapping[str, str]:
    """What the terms that occur in the groups are."""
    # A short glossary: the page explains no term that it does not show.
    used_terms = {
        reward_term
        for group, _ in groups
        for completion in group.completions
        for reward_term in completion.terms
    }
    return {
        reward_term: meaning for reward_term, meaning in ABOUT.items() if reward_term in used_terms
    }


def section(groups: Sequence[tuple[Group, str]], *, shows_sides: bool = True) -> Markup:
    """Draw the groups, the latest step open, earlier ones folded; nothing without any.

    Args:
        groups: each with the data URI of its PNG.
        shows_sides: mark the patient's right and left (the image is known to be in the usual orientation).
    """
    if not groups:
        return Markup()
    # A long run has many steps: the page shows the first, and the latest.
    train_steps = sorted({group.step for group, _ in groups})
    shown_steps = _steps_shown(train_steps)
    cards_by_step = {
        train_step: [
            _group_card(group, image_uri) for group, image_uri in groups if group.step == train_step
        ]
        for train_step in shown_steps
    }
    # One prompt for all is shown once, above the groups.
    prompts = {group.prompt for group, _ in groups}
    return render(
        "groups.html",
        steps=cards_by_step,
        steps_left_out=len(train_steps) - len(shown_steps),
        shared_prompt=prompts.pop() if len(prompts) == 1 else None,
        shows_sides=shows_sides,
        legend=_legend(),
        glossary=_glossary(groups),
    )
