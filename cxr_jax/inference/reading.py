"""One image -> its record: reasoning, answer, probabilities, warnings."""

import re

from cxr_jax.data import images
from cxr_jax.errors import UserError
from cxr_jax.labels.answer_text import ANSWER_PATTERN, FORMAT_PATTERN
from cxr_jax.labels.taxonomy import CHEXPERT_14, find_label
from cxr_jax.weights import hf_folder

NOTICE = "Research use only. Not for diagnosis."


# One completion -> its parts


def split_answer(text):
    """-> (labels of the first <answer>, in the order written; other names in it), or None without an answer.

    The semantics of the accuracy reward: split at commas, strip, compare in lower case.
    """
    found = ANSWER_PATTERN.search(text)
    if not found:
        return None
    items = [item.strip() for item in found.group(1).split(",")]
    labels = [label for label in map(find_label, items) if label is not None]
    others = [item for item in items if item and find_label(item) is None]
    return list(dict.fromkeys(labels)), others


def reasoning_of(text):
    """The text of the first <think> element, as far as it goes; without the tag, what precedes <answer>."""
    start = text.partition("<think>")
    body = start[2] if start[1] else start[0]
    return re.split(r"</think>|<answer>", body, maxsplit=1)[0].strip()


def answer_warnings(text, finish_reason):
    """What is wrong with a completion, in plain words."""
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


def shares(texts):
    """For each of the 14 labels, the share of the texts whose answer names it; no answer names none."""
    named = [set((split_answer(text) or ([], []))[0]) for text in texts]
    return {label: sum(label in names for names in named) / len(named) for label in CHEXPERT_14}


# One image -> its report


def read_usable(path, renderer, read_anyway=False):
    """Read one file. Raises UserError also for a picture that is visibly no frontal chest radiograph."""
    image = images.read_image(path, renderer)
    if image.meta["unusable"] and not read_anyway:
        reasons = "; ".join(image.meta["unusable"])
        raise UserError(f"{path}: not read: {reasons} (--read_anyway reads it all the same)")
    return image


def why_no_probabilities(model):
    """Why the model's tokenizer cannot express valid answers; None if it can. Takes seconds, once."""
    try:
        model.answers  # noqa: B018  compiled on first use
    except UserError as error:
        return str(error)
    return None


def reading_record(model, path, image, args, unable=None):
    """The record of one image: exactly the keys of `--json`. unable: see `why_no_probabilities`."""
    read = model.read(
        image.pixels,
        args.prompt,
        args.samples,
        args.max_new_tokens,
        args.seed,
        constraint="answers" if args.constrained else None,
        probabilities=unable is None,
    )
    reading, notes = read.shown, []
    if unable is not None:
        notes = [f"the probabilities are shares of sampled answers: {unable}"]
    labels, _ = split_answer(reading.text) or ([], [])
    return {
        "image": str(path),
        "model": args.model,
        "weights_sha256": hf_folder.weights_sha256(model.folder),
        "renderer": image.meta["renderer"],
        "prompt": args.prompt,
        "seed": args.seed,
        "reasoning": reasoning_of(reading.text),
        "answer": labels,
        "probabilities": read.probabilities or shares([c.text for c in read.samples or [reading]]),
        "valid_format": FORMAT_PATTERN.match(reading.text) is not None,
        "warnings": [
            *image.meta["warnings"],
            *answer_warnings(reading.text, reading.finish_reason),
            *notes,
        ],
    }


def as_text(record, samples, unable=None):
    """The record for a reader; unable as for `report`.

    Control characters of model text are dropped: they can rewrite a screen.
    """
    clean = lambda text: re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    likely = sorted(record["probabilities"].items(), key=lambda item: -item[1])
    traces = f"mean over {samples} sampled traces" if samples else "after the trace above"
    if unable is not None:
        traces = (
            f"share of {samples} sampled answers" if samples else "1 for the labels of the answer"
        )
    lines = [
        record["image"],
        f"  model {record['model']}, renderer {record['renderer']}, seed {record['seed']}",
        f"  Reasoning: {clean(record['reasoning']) or '(none)'}",
        f"  Answer: {', '.join(record['answer']) or '(none)'}",
        f"  Probability that the answer names it ({traces}; no calibrated risk):",
        *(f"    {p:5.0%}  {label}" for label, p in likely if p >= 0.005),
    ]
    if not record["valid_format"]:
        lines.append("  Warning: the model did not keep to its answer format")
    lines += [f"  Warning: {note}" for note in record["warnings"]]
    return "\n".join(lines)
