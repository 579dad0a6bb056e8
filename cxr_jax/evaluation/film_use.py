"""Does a model use every film of a study? Its answers with each film changed alone, beside those to the study as it is.

The audit of whole images (`OtherImages`) changes all that a model sees: a model that reads the frontal alone passes
it. Here one film at a time is that of another patient, is grey, or is left out of the prompt; the others stay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cxr_jax.data.prompts import Prompt, as_text, ask_of_roles, count_films
from cxr_jax.data.sources.base import Batch
from cxr_jax.evaluation.reader import Reader, Readings
from cxr_jax.metrics.scores import Answers
from cxr_jax.models.image_batches import blank
from cxr_jax.runtime.trees import Tree

BLANK_LEVEL = 0.5  # mid-grey: an image without a finding, without a chest


class OtherImages:
    """What a model answers to other images than those of a set, part by part: questions stay, what is seen changes.

    "blank": mid-grey; "swapped": the images of another prompt; "swapped ROLE", of studies, for each film but the first:
    that film alone is the next study's, another patient's. Where all ask the same of films of one kind, one grey
    reading stands for all, and the swapped readings are the real ones moved by one.

    Args:
        texts: the prompts of the whole set.
        images_at: makes the images of other places of the set.
        views: roles of the films of a study; () where films are not known by roles.
    """

    def __init__(
        self,
        reader: Reader,
        params: Tree,
        texts: Sequence[Prompt],
        images_at: Callable[[np.ndarray], Any],
        views: Sequence[str] = (),
    ) -> None:
        self.reader, self.params, self.texts = reader, params, texts
        self.images_at, self.views = images_at, views
        self.has_one_question = len({as_text(text) for text in texts}) == 1
        # Of a place that of the images that are shown there.
        self.others = _others_of_as_many([count_films(text) for text in texts])
        self.answers: dict[str, list[Answers]] = {}

    def add(self, places: np.ndarray, images: Any) -> None:
        """Read a part of the set: its places, and its images as of `image_batches.images_of`."""
        asked = [self.texts[place] for place in places]
        # Else a film that is swapped would be asked about as another was.
        if not self.has_one_question:
            self._read("blank", blank(images, BLANK_LEVEL), asked)
            self._read("swapped", self.images_at(self.others[places]), asked)
        elif not self.answers:
            self._read("blank", blank(images[:1], BLANK_LEVEL), asked[:1])
        if len(self.views) > 1:
            # The other way round than whole images are swapped, so that two films are never of one other patient.
            next_images = np.asarray(self.images_at((places + 1) % len(self.texts)))
            for place, role in enumerate(self.views[1:], 1):
                shown = np.array(images)
                shown[:, place] = next_images[:, place]
                self._read(f"swapped {role}", shown, asked)

    def _read(self, name: str, shown: Any, asked: Sequence[Prompt]) -> None:
        self.answers.setdefault(name, []).append(_read(self.reader, self.params, shown, asked))

    def joined(self, real: Readings) -> dict[str, Answers]:
        """Give the answers of all parts, by the readings of the images themselves."""
        joined = {name: _join(parts) for name, parts in self.answers.items()}
        if not self.has_one_question:
            return joined
        # The one reading of grey is that of every prompt.
        grey, count = joined.pop("blank"), len(self.texts)
        blank_answers = Answers(
            np.repeat(np.asarray(grey.labels), count, axis=0),
            np.repeat(np.asarray(grey.valid), count, axis=0),
        )
        # Reading the moved images once more would give the same readings, moved.
        swapped_answers = Answers(np.roll(real.answer, 1, axis=0), np.roll(real.valid, 1))
        return {"blank": blank_answers, "swapped": swapped_answers, **joined}


def _join(parts: Sequence[Answers]) -> Answers:
    return Answers(
        np.concatenate([np.asarray(part.labels) for part in parts]),
        np.concatenate([np.asarray(part.valid) for part in parts]),
    )


def _others_of_as_many(film_counts: Sequence[int]) -> np.ndarray:
    """For each prompt the one before it that asks about as many films, round about: int [N]. A lone one has itself."""
    counts, order = np.asarray(film_counts), np.arange(len(film_counts))
    for count in set(film_counts):
        alike = np.flatnonzero(counts == count)
        order[alike] = np.roll(alike, 1)
    return order


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
