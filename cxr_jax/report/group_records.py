"""Groups of completions of one prompt, as records for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import jax
import numpy as np
from jax.typing import ArrayLike

from cxr_jax.labels import sentences
from cxr_jax.labels.sentences import Sentence
from cxr_jax.labels.taxonomy import CHEXPERT_14, side_name
from cxr_jax.models.tokenizer import Tokenizer, completion_text

SAME = 1e-6  # rewards of a group that spread less are the same


@dataclass(kw_only=True)
class Completion:
    """One sampled completion.

    Attributes:
        text: with its tags, and with what the chat template opened it with.
        length: in tokens.
        finished: False if it was cut at the token limit.
        answer: labels named.
        valid_format: as the reward judged it.
        terms: every reward term's value, unweighted.
        reward: the weighed sum of the terms.
        advantage: what the step learned from.
        trained: False if the update left it out (truncated and masked, or its group was not taken).
        sentences: of the reasoning, each with its verdict.
    """

    text: str
    length: int
    finished: bool
    answer: list[str]
    valid_format: bool
    terms: dict[str, float]
    reward: float
    advantage: float
    trained: bool
    sentences: list[Sentence]

    def row(self) -> dict[str, Any]:
        """Return what stands in samples.jsonl."""
        return vars(self) | {"sentences": [sentence._asdict() for sentence in self.sentences]}

    @classmethod
    def from_row(cls, record: Mapping[str, Any]) -> Self:
        """Read what `row` gave. Raises as `Group.from_row` does."""
        return cls(
            text=str(record["text"]),
            length=int(record["length"]),
            finished=bool(record["finished"]),
            answer=_texts(record["answer"]),
            valid_format=bool(record["valid_format"]),
            terms=_numbers(record["terms"]),
            reward=_number(record["reward"]),
            advantage=_number(record["advantage"]),
            trained=bool(record["trained"]),
            sentences=[_sentence(sentence) for sentence in record["sentences"]],
        )


@dataclass(kw_only=True)
class Group:
    """The completions of one prompt at one step.

    Attributes:
        step: the step that learned from it.
        id: of the image.
        set: the name of the data.
        prompt: as text.
        truth: labels that are there.
        hedged: labels that may be there (subtle, or not known).
        known: the labels that the reference decides (None: all).
        sides: label -> right, left or both sides.
        completions: in the order sampled.
        weights: reward term -> weight.
        kept: the update took it.
        image: float [H, W] in 0..1, or
        png: its file.
    """

    step: int
    id: str
    set: str
    prompt: str
    truth: list[str]
    hedged: list[str]
    known: list[str] | None
    sides: dict[str, str]
    completions: list[Completion]
    weights: dict[str, float]
    kept: bool
    image: np.ndarray | None = None
    png: bytes | None = None

    def row(self) -> dict[str, Any]:
        """Return the line of samples.jsonl, without its image."""
        # The image is a file of its own, and completions are rows themselves.
        separate_fields = ("image", "png", "completions")
        plain_fields = {
            plain_field.name: getattr(self, plain_field.name)
            for plain_field in fields(self)
            if plain_field.name not in separate_fields
        }
        # Nested rows, so that one line holds all of a group.
        completions = [completion.row() for completion in self.completions]
        return {"kind": "group"} | plain_fields | {"completions": completions}

    @classmethod
    def from_row(cls, record: Mapping[str, Any], png: bytes) -> Self:
        """Read a line of samples.jsonl.

        Raises:
            KeyError, TypeError, ValueError or AttributeError: for what is no group.
        """
        completions = [Completion.from_row(completion) for completion in record["completions"]]
        # The page shows the best and the worst: there must be one.
        if not completions:
            raise ValueError("no completion")
        return cls(
            step=int(record["step"]),
            id=str(record["id"]),
            set=str(record["set"]),
            prompt=str(record["prompt"]),
            truth=_texts(record["truth"]),
            hedged=_texts(record["hedged"]),
            # null stands for all 14: most references decide every label.
            known=None if record["known"] is None else _texts(record["known"]),
            # Older lines have no sides.
            sides={str(label): str(side) for label, side in record.get("sides", {}).items()},
            completions=completions,
            weights=_numbers(record["weights"]),
            kept=bool(record["kept"]),
            png=png,
        )


def _number(value: Any) -> float:
    """A number of a record: what was not finite has become null."""
    if value is None:
        return float("nan")
    return float(value)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(term_name): _number(value) for term_name, value in values.items()}


def _texts(values: Any) -> list[str]:
    # A string would pass for a list of its letters.
    if not isinstance(values, list):
        raise TypeError("not a list")
    return [str(element) for element in values]


def _sentence(record: Mapping[str, Any]) -> Sentence:
    return Sentence(str(record["text"]), str(record["verdict"]), _texts(record.get("why", [])))


# ---- From a rollout ----


def choose(reward: ArrayLike, group_count: int) -> list[int]:
    """Choose the most telling groups of reward [P, G]: those that spread most, and one, if any, that does not."""
    # A group teaches by its spread: advantages are differences within it.
    spread = np.asarray(reward).std(axis=1)
    # Stable: of groups that spread alike the first of the batch, on every machine.
    order = np.argsort(-spread, kind="stable")
    varied_groups = [int(prompt_index) for prompt_index in order if spread[prompt_index] >= SAME]
    flat_groups = [int(prompt_index) for prompt_index in order if spread[prompt_index] < SAME]
    # One place is kept for a group that does not spread, where there is one.
    taken_groups = varied_groups[: max(1, group_count - bool(flat_groups))]
    if len(taken_groups) >= group_count:
        return taken_groups
    return (taken_groups + flat_groups)[:group_count]


def _label_names(flags: ArrayLike) -> list[str]:
    """The labels of bool [14]."""
    return [
        label_name
        for label_name, is_set in zip(CHEXPERT_14, np.asarray(flags), strict=True)
        if is_set
    ]


# What a record needs of a rollout; the rest stays on the device.
ROLLOUT_ARRAYS = (
    "tokens",
    "lengths",
    "finished",
    "reward",
    "advantages",
    "terms",
    "answer",
    "train_mask",
    "kept",
)
# Of the batch; what a rollout made is above.
TRUTH_ARRAYS = ("solution", "known", "hedged", "sides")


def _sentences(
    texts: Sequence[str],
    truth: Mapping[str, np.ndarray],
    prompt_rows: np.ndarray,
    lexicon: str | None,
) -> list[list[Sentence]]:
    """The sentences of each text, held against the truth of its row."""
    # A finding that may be hedged is neither there nor absent for certain.
    certain = truth["solution"] & ~truth["hedged"]
    return sentences.sentence_verdicts(
        texts,
        certain[prompt_rows],
        truth["hedged"][prompt_rows],
        truth["sides"][prompt_rows],
        lexicon,
    )


def _completions(
    rollout: Mapping[str, Any],
    truth: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    prompts: Sequence[int],
    lexicon: str | None,
    opened: np.ndarray | None,
) -> list[Completion]:
    """All completions of the given prompts, prompt by prompt; opened int [P, K]: how the prompts began them."""
    group_size = rollout["reward"].shape[1]
    places = [
        (prompt_index, sample_index)
        for prompt_index in prompts
        for sample_index in range(group_size)
    ]
    completion_texts = [
        completion_text(
            tokenizer,
            rollout["tokens"][place],
            rollout["lengths"][place],
            None if opened is None else opened[place[0]],
        )
        for place in places
    ]
    # All texts at once: the parser takes them in batches of one shape.
    prompt_rows = np.repeat(np.array(prompts, int), group_size)
    verdicts = _sentences(completion_texts, truth, prompt_rows, lexicon)
    kept_prompts = set(np.asarray(rollout["kept"]).tolist())
    return [
        Completion(
            text=completion_text,
            length=int(rollout["lengths"][place]),
            finished=bool(rollout["finished"][place]),
            answer=_label_names(rollout["answer"][place]),
            valid_format=bool(rollout["terms"]["format"][place] == 1),
            terms={
                term_name: float(values[place]) for term_name, values in rollout["terms"].items()
            },
            reward=float(rollout["reward"][place]),
            advantage=float(rollout["advantages"][place]),
            # Of a group that was taken, a truncated completion may still be masked out.
            trained=place[0] in kept_prompts and bool(rollout["train_mask"][place].any()),
            sentences=verdict,
        )
        for place, completion_text, verdict in zip(places, completion_texts, verdicts, strict=True)
    ]


def groups_of(
    rollout: Mapping[str, Any],
    batch: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    step: int,
    weights: Mapping[str, float],
    count: int = 4,
    set_name: str = "train",
    lexicon: str | None = None,
    prompts: Sequence[str] | str = "",
    ids: Sequence | None = None,
) -> list[Group]:
    """Make records of the most telling groups of a rollout, for `report.save_groups`.

    Args:
        rollout: as rl.make_rollout gives it (tokens int [P, G, C], lengths, finished, reward, advantages [P, G], terms
            {name: [P, G]}, answer bool [P, G, 14], train_mask bool [P, G, C], kept int [n]).
        batch: image [P, S, S], solution, known, hedged bool [P, 14], sides bool [P, 14, 2]; "prompts" as of
            `Prompts.encode`, for what they opened.
        tokenizer: decodes ids.
        step: of the run.
        weights: of the reward terms.
        count: how many groups, at most.
        set_name: the name of the data.
        lexicon: as in `load_phrase_bank(None, lexicon)`.
        prompts: a text a prompt, or one for all.
        ids: of the images; None: the place in the batch.
    """
    # One transfer of what is needed, and of nothing else: a rollout holds much more.
    rollout = jax.device_get({array_name: rollout[array_name] for array_name in ROLLOUT_ARRAYS})
    truth = {array_name: np.asarray(batch[array_name]) for array_name in TRUTH_ARRAYS}
    # For a page, what is blank may be there as what is hedged may.
    truth["hedged"] = truth["hedged"] | ~truth["known"]
    # Few, since every group costs an image and a screen of the page.
    chosen = choose(rollout["reward"], count)
    # ---- The completions, and the groups that they make ----
    kept_prompts = set(np.asarray(rollout["kept"]).tolist())
    group_size = rollout["reward"].shape[1]

    opened = batch.get("prompts", {}).get("opened")
    completions = _completions(rollout, truth, tokenizer, chosen, lexicon, opened)
    groups = []
    for position, prompt_index in enumerate(chosen):
        # The completions lie prompt by prompt, as many for each.
        first_completion = position * group_size
        groups.append(
            Group(
                step=step,
                id=f"prompt {prompt_index}" if ids is None else str(ids[prompt_index]),
                set=set_name,
                prompt=prompts if isinstance(prompts, str) else str(prompts[prompt_index]),
                **_truth(truth, prompt_index),
                completions=completions[first_completion : first_completion + group_size],
                weights={array_name: float(weight) for array_name, weight in weights.items()},
                kept=prompt_index in kept_prompts,
                image=np.asarray(batch["image"][prompt_index]),
            )
        )
    return groups


def _truth(truth: Mapping[str, np.ndarray], prompt_index: int) -> dict[str, Any]:
    """What is so of one image: the fields truth, hedged, known and sides of a Group."""
    # A finding that may be hedged has its side, too: the page names it with its label.
    labels, hedged, known = (
        truth[array_name][prompt_index] for array_name in ("solution", "hedged", "known")
    )
    sides = {
        CHEXPERT_14[label_index]: side_name(
            *truth["sides"][prompt_index, label_index], both="both sides"
        )
        for label_index in np.flatnonzero(labels | hedged)
    }
    return {
        "truth": _label_names(labels),
        "hedged": _label_names(hedged),
        "known": None if known.all() else _label_names(known),
        "sides": {array_name: side_text for array_name, side_text in sides.items() if side_text},
    }
