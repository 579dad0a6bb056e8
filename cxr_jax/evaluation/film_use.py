"""Does a model use every film of a study? Its answers with each film changed alone, beside those to the study as it is.

The audit of whole images (`run.answer_all`) changes all that a model sees: a model that reads the frontal alone passes
it. Here one film at a time is that of another patient, is grey, or is left out of the prompt; the others stay.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cxr_jax.data.prompts import Prompt, as_text, ask_of_roles, count_films
from cxr_jax.data.sources.base import Batch
from cxr_jax.evaluation.reader import Reader, Readings
from cxr_jax.metrics.scores import Answers
from cxr_jax.models.image_batches import blank, images_of, pick
from cxr_jax.runtime.trees import Tree

BLANK_LEVEL = 0.5  # mid-grey: an image without a finding, without a chest


def answer_from_other_images(
    reader: Reader, params: Tree, images: Any, texts: Sequence[Prompt], real: Readings
) -> dict[str, Answers]:
    """Answer the prompts of a set with mid-grey images ("blank") and with those of another prompt ("swapped").

    Questions stay where they are: only what is seen changes. Where all ask the same of films of one kind, one grey
    reading stands for all, and the swapped readings are the real ones moved by one.

    Args:
        images: as of `image_batches.images_of`.
        real: the readings of the images themselves.
    """
    count = len(texts)
    if len({as_text(text) for text in texts}) == 1:
        grey = reader.read(params, blank(images[:1], BLANK_LEVEL), texts[:1])
        blank_answers = Answers(
            np.repeat(grey.answer, count, axis=0), np.repeat(grey.valid, count, axis=0)
        )
        # Reading the moved images once more would give the same readings, moved.
        moved = Answers(np.roll(real.answer, 1, axis=0), np.roll(real.valid, 1))
        return {"blank": blank_answers, "swapped": moved}
    blank_answers = _read(reader, params, blank(images, BLANK_LEVEL), texts)
    others = pick(images, _others_of_as_many([count_films(text) for text in texts]))
    return {"blank": blank_answers, "swapped": _read(reader, params, others, texts)}


def _others_of_as_many(film_counts: Sequence[int]) -> np.ndarray:
    """For each prompt the one before it that asks about as many films, round about: int [N]. A lone one has itself."""
    counts, order = np.asarray(film_counts), np.arange(len(film_counts))
    for count in set(film_counts):
        alike = np.flatnonzero(counts == count)
        order[alike] = np.roll(alike, 1)
    return order


def answer_with_films_swapped(
    reader: Reader, params: Tree, held_out_batch: Batch
) -> dict[str, Answers]:
    """Answer the studies of a set with each film but the first that of the next study, another patient's.

    Returns:
        "swapped ROLE" -> what is answered; nothing where the set's "views" do not tell several films.
    """
    images, texts = images_of(held_out_batch), held_out_batch["texts"]
    return {
        f"swapped {role}": _read(reader, params, swap_film(images, place), texts)
        for place, role in enumerate(held_out_batch.get("views", ()))
        if place
    }


def swap_film(images: np.ndarray, place: int) -> np.ndarray:
    """Give images [N, n, S, S] with the films of a place those of the next study."""
    # The other way round than whole images are swapped, so that two films are never of one other patient.
    swapped = np.array(images)
    swapped[:, place] = np.roll(swapped[:, place], -1, axis=0)
    return swapped


def _read(reader: Reader, params: Tree, shown: Any, asked: Sequence[Prompt]) -> Answers:
    readings = reader.read(params, shown, asked)
    return Answers(readings.answer, readings.valid)


def answer_with_films_changed(
    reader: Reader, params: Tree, held_out_batch: Batch, views: Sequence[str], question: str
) -> dict[str, Answers]:
    """Answer the studies of a set, and the same with one film changed.

    Args:
        reader: of prompts that are as wide as those of all films.
        held_out_batch: "image" float32 [N, n, S, S] and "texts" (`splits.held_out`).
        views: the roles of the n films, in their order.
        question: the question of the texts, without its films.

    Returns:
        "real", and for every role, where there are several films, "swapped ROLE" (that of the next study), "blank ROLE"
        and "without ROLE"; `scores.image_use_audit` takes them.
    """
    images, texts = np.asarray(held_out_batch["image"]), held_out_batch["texts"]

    answers = {"real": _read(reader, params, images, texts)}
    for place, role in enumerate(views if len(views) > 1 else ()):
        # Of the next study, which is another patient's: each phantom is a patient of its own.
        swapped = swap_film(images, place)
        answers[f"swapped {role}"] = _read(reader, params, swapped, texts)
        grey = images.copy()
        grey[:, place] = BLANK_LEVEL
        answers[f"blank {role}"] = _read(reader, params, grey, texts)
        # Asked as of a study that never had it.
        others = [other for other in views if other != role]
        fewer = np.delete(images, place, axis=1)
        asked = [ask_of_roles(others, question)] * len(texts)
        answers[f"without {role}"] = _read(reader, params, fewer, asked)
    return answers
