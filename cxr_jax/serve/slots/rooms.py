"""The rows of the engine on the host: who sits in which slot of which room, and what a turn has given each.

Used by the engine's thread alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from cxr_jax.inference.constrained import Constraint
from cxr_jax.inference.generation import Prefix
from cxr_jax.inference.requests import ReadyModel
from cxr_jax.inference.token_choice import StepSettings
from cxr_jax.runtime.trees import Tree
from cxr_jax.serve.slots import programs
from cxr_jax.serve.slots.layout import TOKENS_A_TURN, Layout, Size
from cxr_jax.serve.slots.programs import Entry
from cxr_jax.serve.slots.texts import RowText

# A room is made smaller when no more than this share of the smaller one would be filled: so it does not go to and fro.
_SHRINK_AT = 0.75


@dataclass(frozen=True)
class Machine:
    """A model as the turns use it.

    Attributes:
        layers: of `sampling.decode_layers`.
        settings: of a step.
        rules: those of valid answers, or None where the tokenizer cannot express them.
    """

    model: ReadyModel
    layers: list[Tree]
    settings: StepSettings
    rules: Constraint | None


@dataclass(eq=False)
class Row:
    """One completion that is being drawn.

    Attributes:
        owner: whose it is; the engine's business.
        index: its number among the owner's.
        entry: what the device is told of it.
        drawn: tokens that the device has drawn.
        place: (room, slot), or None where it waits for a place in the other room.
    """

    owner: Any
    index: int
    text: RowText
    entry: Entry
    drawn: int = 0
    place: tuple[_Room, int] | None = None


class News(NamedTuple):
    """What a turn has drawn of a row."""

    row: Row
    token_ids: list[int]
    logprobs: list[float]
    has_stopped: bool


class _Room:
    """The rows of one room, between turns. It has the least of its sizes that holds them."""

    def __init__(self, machine: Machine, sizes: tuple[Size, ...]) -> None:
        self.machine = machine
        self.sizes = sizes
        # The least size: a lone reader waits for no idle rows.
        self.room_size = sizes[0]
        self.room = self._empty(self.room_size)
        self.rows: list[Row | None] = [None] * self.room_size.rows
        # Rows that have gone since the last turn: the next one tells the device.
        self.left = np.zeros(self.room_size.rows, bool)
        self._drawn: tuple[programs.Drawn, list[Row | None]] | None = None

    def _empty(self, room_size: Size) -> programs.Room:
        model = self.machine.model
        has_rules = self.machine.rules is not None
        return programs.empty_room(
            model.config, room_size=room_size, has_rules=has_rules, dtype=model.dtype
        )

    @property
    def live(self) -> list[Row]:
        return [row for row in self.rows if row is not None]

    @property
    def has_place(self) -> bool:
        return len(self.live) < self.sizes[-1].rows

    def seat(self, row: Row) -> int:
        """Find a free slot, in a larger room if need be, and note whose it is."""
        if None not in self.rows:
            # By one size at a time; whoever asked has looked whether there is one.
            larger = [room_size for room_size in self.sizes if room_size.rows > self.room_size.rows]
            self._move(larger[0])
        slot_number = self.rows.index(None)
        self.rows[slot_number] = row
        # It may have been freed since the last turn, and is taken again.
        self.left[slot_number] = False
        row.place = self, slot_number
        return slot_number

    def leave(self, slot_number: int) -> None:
        # The device goes on until it is told: a slot is not cleared, only freed.
        self.rows[slot_number] = None
        self.left[slot_number] = True

    def _move(self, room_size: Size) -> None:
        """Move to a room of another size, rows close together."""
        staying = [slot_number for slot_number, row in enumerate(self.rows) if row is not None]
        # Rows keep their order; free ones fill up the rest.
        order = np.full(room_size.rows, -1, np.int32)
        order[: len(staying)] = staying
        self.room = programs.resize(self.room, order)
        rows = [self.rows[slot_number] for slot_number in staying]
        self.rows = rows + [None] * (room_size.rows - len(rows))
        for slot_number, row in enumerate(rows):
            assert row is not None
            row.place = self, slot_number
        self.left, self.room_size = np.zeros(room_size.rows, bool), room_size

    def start_turn(self) -> None:
        """Begin to draw, if there is anybody to draw for; the device works while the host does other things."""
        # An empty room costs nothing.
        live_count = len(self.live)
        if not live_count:
            return
        # The least that holds them with some to spare.
        for room_size in self.sizes:
            if room_size.rows < self.room_size.rows and live_count <= _SHRINK_AT * room_size.rows:
                self._move(room_size)
                break
        machine = self.machine
        self.room, drawn = programs.advance(
            machine.model.params,
            machine.layers,
            machine.model.config,
            machine.rules,
            self.room,
            self.left,
            settings=machine.settings,
        )
        # Who sat where when it began: rows may come and go while the device works.
        self._drawn = drawn, list(self.rows)
        self.left = np.zeros(self.room_size.rows, bool)

    def end_turn(self) -> Iterator[News]:
        """Wait for the device, and give what it has drawn for each row that is still there."""
        if self._drawn is None:
            return
        (drawn, rows), self._drawn = self._drawn, None
        # One transfer for all four arrays: here the host waits for the device.
        drawn = jax.device_get(drawn)
        for slot_number, row in enumerate(rows):
            # Whoever has left meanwhile wants no news, and whoever has come has none.
            if row is None or row is not self.rows[slot_number]:
                continue
            # A row that ended in this turn has drawn less than the others.
            drawn_count = int(drawn.lengths[slot_number])
            row.drawn += drawn_count
            tokens, logprobs = (
                drawn.tokens[slot_number, :drawn_count],
                drawn.logprobs[slot_number, :drawn_count],
            )
            yield News(row, tokens.tolist(), logprobs.tolist(), bool(drawn.done[slot_number]))


@dataclass(eq=False)
class Rooms:
    """The usual room, that of long prompts and answers, and who waits to go from the one to the other."""

    machine: Machine
    layout: Layout
    usual: _Room = field(init=False)
    long: _Room = field(init=False)
    _outgrown: deque[tuple[Row, programs.Room]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        """Make both rooms, empty."""
        # Empty ones are cheap, and made again after a failure.
        self.usual = _Room(self.machine, self.layout.usual)
        self.long = _Room(self.machine, (self.layout.long,))

    def _room_of(self, prompt_tokens: int) -> _Room:
        # By its prompt alone: how long an answer gets nobody knows before.
        fits = prompt_tokens <= self.usual.room_size.prompt_slots
        return self.usual if fits else self.long

    def has_place(self, prompt_tokens: int) -> bool:
        """Tell whether a completion of a prompt of so many tokens can begin now."""
        room = self._room_of(prompt_tokens)
        # Those that have begun already go first.
        return room.has_place and not (room is self.long and self._outgrown)

    @property
    def live_rows(self) -> list[Row]:
        """All completions that are being drawn."""
        return self.usual.live + self.long.live + [row for row, _ in self._outgrown]

    def join(self, row: Row, prefix: Prefix) -> None:
        """Begin a completion of a computed prompt; `has_place` must have said so."""
        room = self._room_of(prefix.length)
        slot_number = room.seat(row)
        # The slot is data, too.
        entry = row.entry._replace(slot_number=np.int32(slot_number))
        room.room = programs.join(room.room, prefix.device, entry)

    def leave(self, row: Row) -> None:
        """Free the slot of a completion that is over."""
        if row.place is None:
            # It waits for a place, and holds none.
            self._outgrown = deque(pair for pair in self._outgrown if pair[0] is not row)
        else:
            room, slot_number = row.place
            room.leave(slot_number)
            row.place = None

    def keys_of(self, row: Row) -> programs.Room:
        """Copy a row, its keys above all, in as many slots as the long room has."""
        assert row.place is not None, "it waits for a place"
        room, slot_number = row.place
        return programs.take_row(room.room, np.int32(slot_number), room_size=self.layout.long)

    def start_turn(self) -> None:
        """Let all rows draw TOKENS_A_TURN tokens, those that wait for a place excepted."""
        # First come, first served, and before any new ask.
        while self._outgrown and self.long.has_place:
            row, copied = self._outgrown.popleft()
            slot_number = self.long.seat(row)
            self.long.room = programs.put_row(self.long.room, copied, np.int32(slot_number))
        self.usual.start_turn()
        self.long.start_turn()

    def end_turn(self) -> list[News]:
        """Wait for the turn to end, and give its news."""
        return [*self.usual.end_turn(), *self.long.end_turn()]

    def move_outgrown(self) -> None:
        """Take rows out of the usual room that have no slot for another turn's tokens; to be called before a turn."""
        # Few completions get as long, so the usual room need not have slots for all that they may have.
        own_slots = self.usual.room_size.own_slots
        for row in self.usual.live:
            if row.drawn + TOKENS_A_TURN > own_slots:
                self._outgrown.append((row, self.keys_of(row)))
                self.leave(row)
