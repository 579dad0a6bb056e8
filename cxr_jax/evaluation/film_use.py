"""Does a model use every film of a study? Its answers with each film changed alone, beside those to the study as it is.

The audit of whole images (`run.answer_all`) changes all that a model sees: a model that reads the frontal alone passes
it. Here one film at a time is that of another patient, is grey, or is left out of the prompt; the others stay.
"""

from collections.abc import Sequence

import numpy as np

from cxr_jax.data.prompts import ask_of_roles
from cxr_jax.data.sources.base import Batch
from cxr_jax.evaluation.reader import Reader
from cxr_jax.metrics.scores import Answers
from cxr_jax.models.image_batches import images_of
from cxr_jax.runtime.trees import Tree

BLANK_LEVEL = 0.5  # mid-grey: an image without a finding, without a chest


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


def _read(reader: Reader, params: Tree, shown: np.ndarray, asked: Sequence[str]) -> Answers:
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
