"""One image -> its record: reasoning, answer, probabilities, warnings."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cxr_jax.data import images
from cxr_jax.data.radiograph import Image
from cxr_jax.errors import UserError
from cxr_jax.inference.requests import ReadyModel
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.weights import hf_folder

# The reward's own pattern.
_FORMAT = re.compile(r"^<think>.*?</think>\s*<answer>.*?</answer>$", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BY_LOWER = {name.lower(): name for name in CHEXPERT_14}


# ---- One completion -> its parts ---------------------------------------------------------------------------


def split_answer(text: str) -> tuple[list[str], list[str]] | None:
    """Read the first <answer> as the accuracy reward does: split at commas, strip, compare in lower case.

    Returns:
        (labels in the order written, other names), or None without an answer.
    """
    match = _ANSWER.search(text)
    if not match:
        return None
    items = [item.strip() for item in match.group(1).split(",")]
    labels = [_BY_LOWER[item.lower()] for item in items if item.lower() in _BY_LOWER]
    others = [item for item in items if item and item.lower() not in _BY_LOWER]
    return list(dict.fromkeys(labels)), others


def reasoning_of(text: str) -> str:
    """Cut out the text of the first <think> element, as far as it goes; without the tag, what precedes <answer>."""
    before, tag, after = text.partition("<think>")
    body = after if tag else before
    return re.split(r"</think>|<answer>", body, maxsplit=1)[0].strip()


def answer_warnings(text: str, finish_reason: str) -> list[str]:
    """Say what is wrong with a completion, in plain words."""
    notes = []
    if finish_reason == "length":
        notes.append("the answer was cut at the length limit")
    split = split_answer(text)
    if split is None:
        return [*notes, "the model gave no answer list"]
    labels, others = split
    if others:
        notes.append(
            f"{len(others)} names in the answer are none of the 14 labels and were dropped"
        )
    if "No Finding" in labels and set(labels) - {"No Finding", "Support Devices"}:
        notes.append("the answer contradicts itself: No Finding beside a finding")
    return notes


def shares(texts: Sequence[str]) -> dict[str, float]:
    """Compute for each of the 14 labels the share of the texts whose answer names it; no answer names none."""
    named = [set((split_answer(text) or ([], []))[0]) for text in texts]
    return {label: sum(label in names for names in named) / len(named) for label in CHEXPERT_14}


# ---- One image -> its record -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How an image is read, as the command line says it.

    Attributes:
        model: the name or folder that was given, for the record.
        constrained: whether the answer shown must be a valid list.
    """

    model: str
    prompt: str
    samples: int
    max_new_tokens: int
    seed: int
    constrained: bool


def read_usable(path: str | os.PathLike, renderer: str, read_anyway: bool = False) -> Image:
    """Read one file.

    Raises:
        UserError: also for a picture that is visibly no frontal chest radiograph, unless read_anyway.
    """
    image = images.read_image(path, renderer)
    if image.meta["unusable"] and not read_anyway:
        reasons = "; ".join(image.meta["unusable"])
        raise UserError(f"{path}: not read: {reasons} (--read_anyway reads it all the same)")
    return image


def why_no_probabilities(model: ReadyModel) -> str | None:
    """Say why the model's tokenizer cannot express valid answers; None if it can. Takes seconds, once."""
    try:
        model.answers  # noqa: B018  compiled on first use
    except UserError as error:
        return str(error)
    return None


def reading_record(
    model: ReadyModel,
    path: str | os.PathLike,
    image: Image,
    options: ReadingOptions,
    unable: str | None = None,
) -> dict[str, Any]:
    """Read one image into exactly the keys of `--json`.

    Args:
        unable: see `why_no_probabilities`; probabilities are then shares of the sampled answers.
    """
    reading = model.read(
        image.pixels,
        options.prompt,
        options.samples,
        options.max_new_tokens,
        options.seed,
        constraint="answers" if options.constrained else None,
        probabilities=unable is None,
    )
    shown, notes = reading.shown, []
    if unable is not None:
        notes = [f"the probabilities are shares of sampled answers: {unable}"]
    labels, _ = split_answer(shown.text) or ([], [])
    answered = [completion.text for completion in reading.samples or [shown]]
    return {
        "image": str(path),
        "model": options.model,
        "weights_sha256": hf_folder.weights_sha256(model.folder),
        "renderer": image.meta["renderer"],
        "prompt": options.prompt,
        "seed": options.seed,
        "reasoning": reasoning_of(shown.text),
        "answer": labels,
        "probabilities": reading.probabilities or shares(answered),
        "valid_format": _FORMAT.match(shown.text) is not None,
        "warnings": [
            *image.meta["warnings"],
            *answer_warnings(shown.text, shown.finish_reason),
            *notes,
        ],
    }


def as_text(record: dict[str, Any], samples: int, unable: str | None = None) -> str:
    """Write a record for a reader; unable as for `reading_record`."""
    likely = sorted(record["probabilities"].items(), key=lambda item: -item[1])
    lines = [
        record["image"],
        f"  model {record['model']}, renderer {record['renderer']}, seed {record['seed']}",
        f"  Reasoning: {_printable(record['reasoning']) or '(none)'}",
        f"  Answer: {', '.join(record['answer']) or '(none)'}",
        f"  Probability that the answer names it ({_basis(samples, unable)}; no calibrated risk):",
        *(
            f"    {probability:5.0%}  {label}"
            for label, probability in likely
            if probability >= 0.005
        ),
    ]
    if not record["valid_format"]:
        lines.append("  Warning: the model did not keep to its answer format")
    lines += [f"  Warning: {note}" for note in record["warnings"]]
    return "\n".join(lines)


def _basis(samples: int, unable: str | None) -> str:
    """What the probabilities are of."""
    if unable is None:
        return f"mean over {samples} sampled traces" if samples else "after the trace above"
    return f"share of {samples} sampled answers" if samples else "1 for the labels of the answer"


def _printable(text: str) -> str:
    """Without control characters: those of model text can rewrite a screen."""
    return _CONTROL_CHARACTERS.sub("", text)
