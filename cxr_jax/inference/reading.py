"""One image -> its record: reasoning, answer, probabilities, warnings."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cxr_jax.data import image_gate, prompts
from cxr_jax.data.radiograph import Image
from cxr_jax.data.studies import origins
from cxr_jax.data.studies import roles as study_roles
from cxr_jax.errors import UserError, as_utf8, printable
from cxr_jax.inference.requests import Completion, ReadyModel
from cxr_jax.labels.answers import FORMAT_PATTERN, answer_warnings, reasoning_of, split_answer
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.weights import hf_folder

# A screen does not show a probability below this.
_LEAST_SHOWN = 0.005
# All control characters but tab and line feed, and those that turn the direction of text: they can rewrite a screen.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How an image is read.

    Attributes:
        model: its name or folder, for the record.
        prompt: the question.
        samples: completions at temperature 1 behind the probabilities; 0: none.
        max_new_tokens: of each completion.
        seed: of the sampling.
        constrained: whether the reading that is shown is forced to end with a valid answer list.
    """

    model: str
    prompt: str
    samples: int = 8
    max_new_tokens: int = 512
    seed: int = 0
    constrained: bool = False


# ---- Several completions ------------------------------------------------------------------------------


def shares(texts: Sequence[str]) -> dict[str, float]:
    """Count for each of the 14 labels the share of the texts whose answer names it; no answer names none."""
    answers = [split_answer(text) for text in texts]
    return {
        label: sum(answer is not None and label in answer.labels for answer in answers) / len(texts)
        for label in CHEXPERT_14
    }


# ---- Images -> their report ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Film:
    """A film that was read from a file.

    Attributes:
        path: of the file.
        image: as `images.read_image` and `fit_to_role` give it.
        role: of `prompts.ROLES`, what it is to the question; None for a film by itself.
    """

    path: str | Path
    image: Image
    role: str | None = None


def check_usable(
    path: str | Path, image: Image, read_anyway: bool = False, gate_policy: str = "refuse"
) -> None:
    """Refuse an image that is visibly no chest radiograph fit to be read; what is let pass gets a warning in its meta.

    Args:
        path: only the name used in messages.
        read_anyway: whether to read what is visibly no frontal chest radiograph, too.
        gate_policy: what becomes of a picture that `image_gate` takes for no chest film, one of its POLICIES.

    Raises:
        UserError: with the reasons.
    """
    # Refused with its reasons: a report on something else would be confident and wrong.
    if image.meta["unusable"] and not read_anyway:
        reasons = "; ".join(image.meta["unusable"])
        raise UserError(f"{path}: not read: {reasons} (--read_anyway reads it all the same)")
    # What is said to be a chest film may still be noise: the pixels have their own say.
    if read_anyway and gate_policy == "refuse":
        gate_policy = "warn"
    image_gate.check(path, image, gate_policy)


def why_no_probabilities(model: ReadyModel) -> str | None:
    """Say why the model's tokenizer cannot express valid answers; None if it can. Takes seconds, once."""
    try:
        model.answers  # noqa: B018  compiled on first use
    except UserError as error:
        return str(error)
    return None


def study_of(
    paths: Sequence[str], loaded: Sequence[Image], roles: Sequence[str] | None, in_order: bool
) -> list[Film]:
    """Make films that are read together of files.

    Args:
        roles: of `prompts.ROLES`, for each file; None: by headers and names. One file alone needs none.
        in_order: whether the films stay in the order of the files, and are not brought into that of `prompts.ROLES`.

    Raises:
        UserError: if roles do not follow from headers and names, or headers speak against them.
    """
    if roles is None and len(paths) == 1:
        return [Film(paths[0], loaded[0])]
    found = study_roles.find_roles(paths, loaded) if roles is None else roles
    with_headers = [at for at, image in enumerate(loaded) if image.meta["kind"] == "DICOM"]
    origins.check_together([paths[at] for at in with_headers], [found[at] for at in with_headers])
    films = [
        Film(path, study_roles.fit_to_role(image, role), role)
        for path, image, role in zip(paths, loaded, found, strict=True)
    ]
    order = list(prompts.ROLES)
    return films if in_order else sorted(films, key=lambda film: order.index(film.role or ""))


def ask_of(films: Sequence[Film], question: str) -> str:
    """Write the question about films: of those with roles it says which is which, unless it marks their places."""
    roles = [film.role for film in films if film.role is not None]
    if not roles or prompts.IMAGE_MARK in question:
        return question
    return prompts.ask_of_roles(roles, question)


class FilmReading(NamedTuple):
    """The record of a reading, and the completion that it was made from."""

    record: dict[str, Any]
    completion: Completion


def reading_record(
    model: ReadyModel, films: Sequence[Film], options: ReadingOptions, why_shares: str | None = None
) -> dict[str, Any]:
    """Read as `read_films` does, and return the record alone: exactly the keys of `--json`."""
    return read_films(model, films, options, why_shares).record


def read_films(
    model: ReadyModel, films: Sequence[Film], options: ReadingOptions, why_shares: str | None = None
) -> FilmReading:
    """Read a film, or several together.

    Args:
        model: that reads.
        films: in the order of their places; of one without a role the record has no key "images".
        options: how they are read.
        why_shares: as `why_no_probabilities` says; with a reason, the probabilities are shares of sampled answers.
    """
    # One film by itself is no list: it is read as ever.
    pixels = [film.image.pixels for film in films]
    prompt = ask_of(films, options.prompt)
    # All in one call: images are encoded and the prompt computed once.
    result = model.read(
        pixels if len(pixels) > 1 else pixels[0],
        prompt,
        options.samples,
        options.max_new_tokens,
        options.seed,
        constraint="answers" if options.constrained else None,
        probabilities=why_shares is None,
    )
    reading = result.shown
    # What the probabilities are is said in every record, for readers who see nothing else.
    notes = []
    if why_shares is not None:
        notes.append(f"the probabilities are shares of sampled answers: {why_shares}")
    answer = split_answer(reading.text)
    probabilities = result.probabilities
    # A tokenizer that cannot spell the answers leaves the shares of what was sampled.
    if not probabilities:
        probabilities = shares([sample.text for sample in result.samples or [reading]])
    # Nearly always one: a study may hold a DICOM beside a picture.
    renderers = dict.fromkeys(film.image.meta["renderer"] for film in films)
    record: dict[str, Any] = {
        "image": as_utf8(films[0].path),
        "model": as_utf8(options.model),
        "weights_sha256": hf_folder.weights_sha256(model.folder),
        "renderer": ", ".join(renderers),
        # With the numbers that the model adds: this text by itself is read as it was.
        "prompt": prompts.number_films(prompt, len(films)) if model.number_images else prompt,
        "seed": options.seed,
        "reasoning": reasoning_of(reading.text),
        "answer": answer.labels if answer else [],
        "probabilities": probabilities,
        "valid_format": FORMAT_PATTERN.match(reading.text) is not None,
        "warnings": [
            *_warnings_of(films),
            *answer_warnings(reading.text, reading.finish_reason),
            *notes,
        ],
    }
    if films[0].role is not None:
        record["images"] = [{"image": as_utf8(film.path), "role": film.role} for film in films]
    return FilmReading(record, reading)


def _warnings_of(films: Sequence[Film]) -> list[str]:
    if len(films) == 1:
        return list(films[0].image.meta["warnings"])
    return [f"{film.role}: {warning}" for film in films for warning in film.image.meta["warnings"]]


def as_text(record: dict[str, Any], samples: int, why_shares: str | None = None) -> str:
    """Write a record for a reader at a terminal.

    Control characters of model text are dropped: they can rewrite a screen.

    Args:
        record: of `reading_record`.
        samples: how many traces were sampled.
        why_shares: as for `reading_record`.
    """
    # What the figures are, which depends on how they came about.
    traces = f"mean over {samples} sampled traces" if samples else "after the trace above"
    if why_shares is not None:
        traces = "1 for the labels of the answer"
        if samples:
            traces = f"share of {samples} sampled answers"
    reasoning = _CONTROL_CHARACTERS.sub("", record["reasoning"])
    # Most likely first; Python's sort keeps the order of labels among equals.
    by_probability = sorted(record["probabilities"].items(), key=lambda item: -item[1])
    images_shown = record.get("images", [{"image": record["image"]}])
    lines = [
        *(
            printable(shown["image"]) + (f" ({shown['role']})" if "role" in shown else "")
            for shown in images_shown
        ),
        f"  model {record['model']}, renderer {record['renderer']}, seed {record['seed']}",
        f"  Reasoning: {reasoning or '(none)'}",
        f"  Answer: {', '.join(record['answer']) or '(none)'}",
        f"  Probability that the answer names it ({traces}; no calibrated risk):",
    ]
    for label, probability in by_probability:
        if probability >= _LEAST_SHOWN:
            lines.append(f"    {probability:5.0%}  {label}")
    if not record["valid_format"]:
        lines.append("  Warning: the model did not keep to its answer format")
    lines += [f"  Warning: {note}" for note in record["warnings"]]
    return "\n".join(lines)
