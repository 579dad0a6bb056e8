"""What the engine is asked for and what it answers with: types alone, without JAX's programs.

An `Ask` goes in by `Engine.submit`; events come out, one after the other, to the listener that came with it. `Done` or
`Failed` is always the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cxr_jax.inference.requests import Completion, GenerationSettings

# ---- What goes in ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one request wants.

    Attributes:
        images: float32 [H, W] in 0..1 each, in reading order; empty for text alone.
        messages: a conversation as `Model.generate` takes it, {"role", "content"} each; it ends with the user's turn.
        settings: how to draw; settings.n completions.
        constraint: "answers" for completions that end with a valid answer list, or None.
        stop: texts that end a completion, and that its text does not show.
        probabilities: whether the 14 labels' probabilities after the first completion's trace are wanted, too.
    """

    # ---- What is asked ----
    images: tuple[np.ndarray, ...] = ()
    messages: list[dict[str, Any]]
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    # ---- What the answer may be, and what is wanted beside it ----
    constraint: str | None = None
    stop: tuple[str, ...] = ()
    probabilities: bool = False


# ---- What comes out ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """New text of a completion; the texts of its pieces add up to its text, and so do their tokens to its tokens.

    Attributes:
        index: the completion's number, below settings.n.
        text: what is new; empty where tokens show none, or not yet.
        token_ids: what is new.
        logprobs: of these tokens.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Finished:
    """A completion is whole. All its pieces came before.

    Attributes:
        index: the completion's number.
        completion: as `Model.generate` gives it; of one that a stop text has ended, text and tokens are those before
            it, and its finish_reason is "stop".
    """

    index: int
    completion: Completion


@dataclass(frozen=True)
class Probabilities:
    """The probability that the answer names each of the 14 labels, after the first completion's trace."""

    by_label: dict[str, float]


@dataclass(frozen=True)
class Done:
    """All that was asked for has come.

    Attributes:
        prompt_tokens: of the prompt, those of its images counted.
        completion_tokens: of all completions.
        cached_tokens: of the prompt, those that had been computed for an earlier ask.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


# Compared by who delivers: a client that has left is no failure.
CANCELLED = "cancelled"


@dataclass(frozen=True)
class Failed:
    """Nothing more comes. The message is one line, without any text of the ask; `CANCELLED` after `Job.cancel`."""

    message: str


# Whoever adds a kind adds it to each listener, too: they look at the class.
Event = Piece | Finished | Probabilities | Done | Failed

Listener = Callable[[Event], None]
"""Called on the engine's thread, so it must not block. One that raises loses its ask, and nobody else's."""


# ---- What refuses ------------------------------------------------------------------------------------------


class QueueFullError(Exception):
    """As many asks wait as may.

    Attributes:
        retry_after_s: seconds after which there may be a place, from what was measured of late; at least 1.
    """

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        """Keep when to try again."""
        # For people, too: some clients show the text alone.
        super().__init__(f"{waiting} requests wait already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class NotReadyError(Exception):
    """The engine has not finished its warm-up, or has not been started."""


class StoppedError(Exception):
    """The engine has stopped, or could not start."""
