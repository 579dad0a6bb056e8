"""One ask on its way through the engine."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from cxr_jax.inference.generation import Prefix
from cxr_jax.inference.requests import Completion
from cxr_jax.serve.asks import Ask, Listener
from cxr_jax.serve.slots.programs import Room
from cxr_jax.serve.slots.prompts import Prepared
from cxr_jax.serve.slots.rooms import Row


class Job:
    """One ask on its way. Made by `Engine.submit`.

    Attributes:
        id: a name without meaning, for logs.
    """

    def __init__(
        self,
        ask: Ask,
        prepared: Prepared,
        listener: Listener,
        arrival: int,
        wake: Callable[[], object],
    ) -> None:
        """Begin with nothing drawn; `wake` lets the engine's thread look at it."""
        # By chance, so that a log tells nothing of what was asked, nor how often.
        self.id = uuid.uuid4().hex
        self.is_cancelled = False
        self._wake = wake
        # ---- Of the engine's thread alone ----
        # What it wants, and who hears of it.
        self.ask, self.prepared, self.listener = ask, prepared, listener
        self.arrival = arrival
        # What it has so far.
        self.prefix: Prefix | None = None
        self.cached_tokens = 0
        self.rows: list[Row] = []
        self.begun, self.finished, self.tokens = 0, 0, 0
        # The row that the probabilities are read from, until their turn comes.
        self.trace: tuple[Room, Completion] | None = None
        self.owes_probabilities = ask.probabilities
        self.is_over = False

    def cancel(self) -> None:
        """End it at the next boundary, from any thread; the last event is then Failed("cancelled")."""
        # A flag, which the thread reads when it comes round: no lock, and no error if it is over.
        self.is_cancelled = True
        self._wake()
