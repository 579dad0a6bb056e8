"""Conversations: rendering by the chat template, and turns that keep what is computed.

The conversation that the model sees is always what its chat template makes of the messages. Of its tokens, those
that lead the tokens already on the device keep their keys; only the rest is computed. So a turn costs its own
tokens, and equals reading the whole conversation afresh, whatever a template does to earlier turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.inference import generation, sampling
from cxr_jax.inference.prompts import render_question
from cxr_jax.inference.requests import (
    Completion,
    GenerationSettings,
    ReadyModel,
    Request,
    check_constraint,
    check_room,
)
from cxr_jax.models.network import Seen


class Chat:
    """A conversation about one image (or none): `ask` as often as wanted. Made by `Model.chat`.

    A turn that raises leaves the conversation as it was.

    Attributes:
        messages: what was said, without the image.
        computed: tokens that each answer's prompt had to compute; the first counts the image.
    """

    def __init__(self, model: ReadyModel, image: Any = None, system: str | None = None) -> None:
        """Prepare the image (as for `Model.generate`); system replaces the template's own prompt."""
        self.model = model
        self.patches, self.grid = model.prepare(image)
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.computed: list[int] = []
        # Computed with the first question, and kept: another turn may have to read the image again.
        self._features: Seen | None = None
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
        top_p: float | None = None,
        top_k: int | None = None,
        stream: Callable[[int, int, str], None] | None = None,
        constraint: Any = None,
    ) -> Completion:
        """Answer `text`; both become part of the conversation.

        Arguments (constraint="answers" among them) and errors as for `Model.generate`.

        Args:
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
        rendered = render_question(
            model.tokenizer, model.config, messages, [] if self.grid is None else [self.grid]
        )
        ids = rendered.ids
        rules = model.constraint(constraint, settings.max_new_tokens, rendered.opened)
        request = Request(ids, self.patches, self.grid, rendered.opened)
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
        # Counted, to show that a turn costs only its own tokens.
        self.computed.append(len(ids) - kept)
        return answer

    def _prefix(self, request: Request) -> tuple[generation.Prefix, int]:
        """(the prefix of the conversation so far, how many of its tokens had their keys already)."""
        ids, model_config = request.ids, self.model.config
        # The last token is always computed: the answer is drawn from it.
        kept = _common(ids[:-1], self._ids)
        # What is left may be extended, unless the image itself has to be read again.
        if model_config.image_token_id not in ids[kept:] and kept:
            assert self._keys is not None, "set with the ids"
            return generation.extend(self.model, self._keys, kept, request), kept
        if self.patches is not None and self._features is None:
            [self._features] = self.model.image_features(self.patches, [self.grid])
        return generation.prefill(self.model, request, self._features), 0


def _common(first: list[int], second: list[int]) -> int:
    """How many leading items two lists share."""
    # Of equal beginnings the shorter list's length counts.
    pairs = enumerate(zip(first, second, strict=False))
    differing = (index for index, (one, other) in pairs if one != other)
    return next(differing, min(len(first), len(second)))
