"""Conversations: rendering by the chat template, and turns that keep what is computed.

The conversation that the model sees is always what its chat template makes of the messages. Of its tokens, those
that lead the tokens already on the device keep their keys; only the rest is computed. So a turn costs its own
tokens, and equals reading the whole conversation afresh, whatever a template does to earlier turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from cxr_jax.data.prompts import IMAGE_MARK, place_films
from cxr_jax.errors import UserError
from cxr_jax.inference import generation, sampling
from cxr_jax.inference.prompts import render_question
from cxr_jax.inference.requests import (
    Completion,
    GenerationSettings,
    Picture,
    ReadyModel,
    Request,
    check_constraint,
    check_room,
)
from cxr_jax.models.network import Seen


class Chat:
    """A conversation about images (or none): `ask` as often as wanted. Made by `Model.chat`.

    A turn that raises leaves the conversation as it was.

    Attributes:
        messages: what was said, without the images.
        computed: tokens that each answer's prompt had to compute; the first counts the images.
    """

    def __init__(self, model: ReadyModel, image: Any = None, system: str | None = None) -> None:
        """Prepare the image, or several (as for `Model.generate`); system replaces the template's own prompt."""
        self.model = model
        # Those of each of the user's turns; the first turn is to come.
        self._first = model.pictures(image)
        self._pictures: list[tuple[Picture, ...]] = []
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.computed: list[int] = []
        # Of each image, by content, and kept: another turn may have to read them again.
        self._features: dict[Hashable, Seen] = {}
        # The tokens whose keys are on the device, and these.
        self._ids: list[int] = []
        self._keys: list | None = None

    def ask(
        self,
        text: str,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        *,
        images: Any = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stream: Callable[[int, int, str], None] | None = None,
        constraint: Any = None,
    ) -> Completion:
        """Answer `text`; both become part of the conversation.

        Arguments (constraint="answers" among them) and errors as for `Model.generate`.

        Args:
            images: further ones that this turn shows, one or a list: where the text marks their places, else before it.
                The conversation is computed anew then, but for images that it had.
            stream: called with (0, 0, new text).
        """
        # Refused here: the template would fail in words of its own.
        if not isinstance(text, str):
            raise UserError("a question must be a text")
        # ---- Everything is checked before anything is computed ----
        model = self.model
        settings = GenerationSettings(max_new_tokens, temperature, 1, seed, top_p, top_k)
        check_constraint(constraint)
        messages = [*self.messages, {"role": "user", "content": text}]
        turns = [*self._pictures, self._shown_now(images)]
        request = self._request(messages, turns)
        ids = request.ids
        rules = model.constraint(constraint, settings.max_new_tokens, request.opened)
        check_room(model.config, len(ids), settings.max_new_tokens, "the conversation")

        # ---- The answer ----
        prefix, kept = self._prefix(request)
        layers = sampling.decode_layers(model.params, model.config)
        # A stream of many rows becomes that of the one row that there is.
        row_stream = None if stream is None else (lambda _, piece: stream(0, 0, piece))
        [answer], own_keys = generation.decode(
            model, layers, [(prefix, 0)], settings, row_stream, rules
        )

        # ---- What the next turn finds on the device ----
        # With the stop token, which the template may write otherwise: the next turn compares.
        self._ids = ids + answer.token_ids
        self._keys = sampling.append(
            prefix.device.keys,
            np.array([prefix.length], np.int32),
            own_keys,
            room=generation.bucket(len(self._ids)),
        )
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._pictures = turns
        # Counted, to show that a turn costs only its own tokens.
        self.computed.append(len(ids) - kept)
        return answer

    def _shown_now(self, images: Any) -> tuple[Picture, ...]:
        # Those that the conversation began with belong to its first turn.
        first = () if self._pictures else self._first
        return (*first, *self.model.pictures(images))

    def _request(self, messages: list[dict[str, Any]], turns: list[tuple[Picture, ...]]) -> Request:
        """The conversation rendered; turns: the images of each of the user's."""
        shown = tuple(itertools.chain(*turns))
        rendered = render_question(
            self.model.tokenizer,
            self.model.config,
            _with_marks(messages, [len(pictures) for pictures in turns]),
            [picture.grid for picture in shown],
            numbered=self.model.number_images,
        )
        return Request(rendered.ids, shown, rendered.opened)

    def _prefix(self, request: Request) -> tuple[generation.Prefix, int]:
        """(the prefix of the conversation so far, how many of its tokens had their keys already)."""
        ids, model_config = request.ids, self.model.config
        # The last token is always computed: the answer is drawn from it.
        kept = _common(ids[:-1], self._ids)
        # What is left may be extended, unless an image itself has to be read.
        if model_config.image_token_id not in ids[kept:] and kept:
            assert self._keys is not None, "set with the ids"
            return generation.extend(self.model, self._keys, kept, request), kept
        # All of them: their places may have moved, but what the tower saw stays.
        features = []
        for picture in request.pictures:
            if (key := picture.key()) not in self._features:
                [self._features[key]] = self.model.image_features(picture.patches, [picture.grid])
            features.append(self._features[key])
        return generation.prefill(self.model, request, generation.join_features(features)), 0


def _with_marks(messages: list[dict[str, Any]], counts: list[int]) -> list[dict[str, Any]]:
    """The messages with the places of the images of each of the user's turns, where it does not mark them itself."""
    remaining = iter(counts)
    marked = []
    for message in messages:
        text = message["content"]
        if message["role"] == "user":
            count = next(remaining)
            # Counted by the turn: in all, another turn's marks might make up for this one's.
            if text.count(IMAGE_MARK) not in (0, count):
                place_films([text], count)
            text = text if IMAGE_MARK in text else IMAGE_MARK * count + text
        marked.append({**message, "content": text})
    return marked


def _common(first: list[int], second: list[int]) -> int:
    """How many leading items two lists share."""
    # Of equal beginnings the shorter list's length counts.
    pairs = enumerate(zip(first, second, strict=False))
    differing = (index for index, (one, other) in pairs if one != other)
    return next(differing, min(len(first), len(second)))
