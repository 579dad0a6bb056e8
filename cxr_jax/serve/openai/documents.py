"""Answers in JSON: in the form of our own published schema alone, built from a reading and never generated as text.

The model reads as ever, with an answer list that is valid by construction; trace, answer and probabilities become a
`cxr_reading` document. So the JSON is always valid, and another schema is refused: nobody could vouch for its content.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from concurrent.futures import Future

from cxr_jax.inference.reading import Film
from cxr_jax.inference.requests import Completion
from cxr_jax.outputs import document, schema, trace_sentences
from cxr_jax.outputs.document import CompletionFacts, ImageFacts, ModelFacts
from cxr_jax.serve.asks import (
    Done,
    Event,
    Failed,
    Finished,
    Listener,
    Piece,
    Probabilities,
    StoppedError,
)
from cxr_jax.serve.openai.fields import ChatRequest, TextPart
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.state import ServerState

_LOG = logging.getLogger(__name__)
SCHEMA_NAME = "cxr_reading"
_PARAM = "response_format"


def wants_document(request: ChatRequest) -> bool:
    """Whether the answer is to be a document.

    Raises:
        RefusedError: 400 for another schema than ours, and for what does not go together with it.
    """
    response_format = request.response_format
    if response_format is None or response_format.type == "text":
        return False
    wanted = response_format.json_schema
    # By its name alone, or in full: clients that make schemas from classes send all of it.
    is_named = wanted is not None and wanted.schema_ is None and wanted.name == SCHEMA_NAME
    is_ours = wanted is not None and wanted.schema_ == schema.load()
    if not is_named and not is_ours:
        raise RefusedError(
            400,
            f"{_PARAM}: only the schema {SCHEMA_NAME} (GET /v1/schemas/{SCHEMA_NAME}) can be kept",
            f"{_PARAM}.json_schema",
            code="unsupported_schema",
        )
    _check_others(request)
    return True


def _check_others(request: ChatRequest) -> None:
    """Refuse fields that a document has no place for, rather than leave them out without a word."""
    # One reading, whole: whatever would cut it or show it otherwise.
    not_together = {
        "n": (request.n or 1) > 1,
        "stop": bool(request.stop),
        "logprobs": bool(request.logprobs),
        "reasoning_format": request.reasoning_format == "split",
        "include_reasoning": request.include_reasoning is False,
    }
    for name, is_asked in not_together.items():
        if is_asked:
            raise RefusedError(400, f"{name}: not together with a JSON schema", name)
    # A document is one reading of films: what was said before it has no place in it.
    if [message.role for message in request.messages if message.role != "system"] != ["user"]:
        raise RefusedError(
            400, "messages: a document is the answer to one question about a film", "messages"
        )


def check_films(films: Sequence[Film]) -> None:
    """Refuse a document about nothing. Raises RefusedError (400)."""
    if not films:
        raise RefusedError(400, "messages: a document needs a film to be about", "messages")


class DocumentListener:
    """Stands between the engine and an answer: what comes out of it is one piece of text, the document.

    Building it computes with JAX, so the engine is asked to do that between two of its steps.
    """

    def __init__(
        self, state: ServerState, films: Sequence[Film], request: ChatRequest, tell: Listener
    ) -> None:
        """Keep what is known before the model has read; `tell` gets the events of the answer."""
        self._state, self._tell = state, tell
        self._prompt = "".join(
            part.text for part in request.messages[-1].content if isinstance(part, TextPart)
        )
        self._seed = request.seed or 0
        self._images = [_facts_of(film) for film in films]
        self._warnings = [warning for film in films for warning in film.image.meta["warnings"]]
        # Filled as the events come, on the engine's thread alone.
        self._completion: Completion | None = None
        self._probabilities: dict[str, float] | None = None

    def __call__(self, event: Event) -> None:
        """Take an event on the engine's thread."""
        if isinstance(event, Finished):
            self._completion = event.completion
        elif isinstance(event, Probabilities):
            self._probabilities = event.by_label
        elif isinstance(event, Failed):
            self._tell(event)
        elif isinstance(event, Done):
            # Not here, where the engine waits for this function to return.
            try:
                building = self._state.engine.call(self._build)
            except StoppedError:
                self._tell(Failed("stopped"))
                return
            building.add_done_callback(functools.partial(self._finish, event))

    def _finish(self, done: Done, building: Future[str]) -> None:
        # Its reason may quote what the model wrote, so neither the client nor a log is told.
        completion = self._completion
        if completion is None or building.cancelled() or building.exception() is not None:
            _LOG.error("a document could not be built")
            self._tell(Failed("no document"))
            return
        text = building.result()
        # In place of what the model wrote: its tokens are not those of this text.
        whole = dataclasses.replace(completion, text=text, token_ids=[], logprobs=[])
        for event in (Piece(0, text, [], []), Finished(0, whole), done):
            self._tell(event)

    def _build(self) -> str:
        """The document as JSON."""
        state, completion = self._state, self._completion
        assert completion is not None
        # The embedded model writes of a made-up world, which the parser reads with other words.
        words = trace_sentences.find_words(state.model.folder) if state.model.folder else "films"
        built = document.build(
            self._images[0],
            ModelFacts(name=state.model_name, weights_sha256=state.weights_sha256, words=words),
            CompletionFacts(
                text=completion.text,
                finish_reason=completion.finish_reason,
                prompt=self._prompt,
                seed=self._seed,
                probabilities=self._probabilities,
                warnings=self._warnings,
            ),
            self._images[1:],
        )
        return document.to_bytes(built).decode()


def _facts_of(film: Film) -> ImageFacts:
    return document.image_facts(film.image.meta["sha256"], film.image, film.role)
