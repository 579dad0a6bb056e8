"""Conversations: rendering by the chat template, and turns that keep what is computed.

The conversation that the model sees is always what its chat template makes of the messages. Of its tokens, those
that lead the tokens already on the device keep their keys; only the rest is computed. So a turn costs its own
tokens, and equals reading the whole conversation afresh, whatever a template does to earlier turns.
"""

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.inference import generation, sampling
from cxr_jax.inference.generation import Completion, Request, Settings
from cxr_jax.inference.prompts import render_prompt


class Chat:
    """A conversation about one image (or none): `ask` as often as wanted. Made by `Model.chat`.

    messages: what was said, without the image. computed: tokens that each answer's prompt had to compute; the first
    counts the image. A turn that raises leaves the conversation as it was.
    """

    def __init__(self, model, image=None, system: str | None = None):
        self.model = model
        self.patches, self.grid = model.prepare(image)
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.computed: list[int] = []
        self._features = None
        self._ids: list[int] = []  # the tokens whose keys are on the device
        self._keys = None

    def ask(
        self,
        text: str,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        *,
        top_p=None,
        top_k=None,
        stream=None,
        constraint=None,
    ) -> Completion:
        """The model's answer to `text`, which becomes part of the conversation.

        Arguments (constraint="answers" among them) and errors as for `Model.generate`; stream is called with
        (0, 0, new text).
        """
        if not isinstance(text, str):
            raise UserError("a question must be a text")
        model = self.model
        settings = Settings(max_new_tokens, temperature, 1, seed, top_p, top_k)
        rules = model.constraint(constraint, settings.max_new_tokens)
        messages = [*self.messages, {"role": "user", "content": text}]
        request = Request(
            render_prompt(model.tokenizer, model.config, messages, self.grid),
            self.patches,
            self.grid,
        )
        generation.check_room(
            model.config, len(request.ids), settings.max_new_tokens, "the conversation"
        )
        prefix, kept = self._prefix(request)
        tell = None if stream is None else (lambda _, piece: stream(0, 0, piece))
        layers = sampling.decode_layers(model.params, model.config)
        [answer], own = generation.decode(model, layers, [(prefix, 0)], settings, tell, rules)
        ids = request.ids + answer.token_ids
        self._keys = sampling.append(
            prefix.device["keys"],
            np.array([prefix.length], np.int32),
            own,
            room=generation.bucket(len(ids)),
        )
        self._ids = ids
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self.computed.append(len(request.ids) - kept)
        return answer

    def _prefix(self, request: Request):
        """(the prefix of the conversation so far, how many of its tokens had their keys already)."""
        ids, model_config = request.ids, self.model.config
        kept = _common(
            ids[:-1], self._ids
        )  # the last token is always computed: the answer is drawn from it
        if model_config.image_token_id not in ids[kept:] and kept:
            return generation.extend(self.model, self._keys, kept, request), kept
        if self.patches is not None and self._features is None:
            [self._features] = self.model.image_features(self.patches, [self.grid])
        return generation.prefill(self.model, request, self._features), 0


def _common(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
