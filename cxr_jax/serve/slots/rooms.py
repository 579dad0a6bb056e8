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
    """The rows of one room, between turns."""

    def __init__(self, machine: Machine, room_size: Size) -> None:
        self.machine = machine
        self.room_size = room_size
        model = machine.model
        has_rules = machine.rules is not None
        self.room = programs.empty_room(
            model.config, room_size=room_size, has_rules=has_rules, dtype=model.dtype
        )
        self.rows: list[Row | None] = [None] * room_size.rows
        # Rows that have gone since the last turn: the next one tells the device.
        self.left = np.zeros(room_size.rows, bool)
        self._drawn: tuple[programs.Drawn, list[Row | None]] | None = None

    @property
    def live(self) -> list[Row]:
        return [row for row in self.rows if row is not None]

    @property
    def has_place(self) -> bool:
        return None in self.rows

    def seat(self, row: Row) -> int:
        """Find a free slot, and note whose it is."""
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

    def take(self, row: Row, room_size: Size) -> programs.Room:
        """Copy a row, its keys above all, in as many slots as another room has."""
        assert row.place is not None, "it waits for a place"
        return programs.take_row(self.room, np.int32(row.place[1]), room_size=room_size)

    def put(self, row: Row, copied: programs.Room) -> None:
        """Go on with a copied row in a free slot."""
        self.room = programs.put_row(self.room, copied, np.int32(self.seat(row)))

    def start_turn(self) -> None:
        """Begin to draw, if there is anybody to draw for; the device works while the host does other things."""
        # An empty room costs nothing.
        if not self.live:
            return
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
    """The usual rooms, that of long prompts and answers, and who waits to go from the ones to the other."""

    machine: Machine
    layout: Layout
    usual: list[_Room] = field(init=False)
    long: _Room = field(init=False)
    _outgrown: deque[tuple[Row, programs.Room]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        """Make all rooms, empty."""
        self.usual = [_Room(self.machine, self.layout.usual) for _ in range(self.layout.rooms)]
        self.long = _Room(self.machine, self.layout.long)

    def _room_for(self, prompt_tokens: int) -> _Room | None:
        # By its prompt alone: how long an answer gets nobody knows before.
        if prompt_tokens > self.layout.usual.prompt_slots:
            # Those that have begun already go first.
            return self.long if self.long.has_place and not self._outgrown else None
        # The first with a place, so that as few rooms as can be have anybody in them.
        return next((room for room in self.usual if room.has_place), None)

    def has_place(self, prompt_tokens: int) -> bool:
        """Tell whether a completion of a prompt of so many tokens can begin now."""
        return self._room_for(prompt_tokens) is not None

    @property
    def live_rows(self) -> list[Row]:
        """All completions that are being drawn."""
        seated = [row for room in (*self.usual, self.long) for row in room.live]
        return seated + [row for row, _ in self._outgrown]

    def join(self, row: Row, prefix: Prefix) -> None:
        """Begin a completion of a computed prompt; `has_place` must have said so."""
        room = self._room_for(prefix.length)
        assert room is not None, "there is no place"
        # The slot is data, too.
        entry = row.entry._replace(slot_number=np.int32(room.seat(row)))
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
        return row.place[0].take(row, self.layout.long)

    # ---- Turns ---------------------------------------------------------------------------------------------

    def start_turn(self) -> None:
        """Let all rows draw TOKENS_A_TURN tokens, those that wait for a place excepted."""
        self._move_outgrown()
        self._close_ranks()
        # All rooms before any is waited for: where there are cores for it, they draw at the same time.
        for room in (*self.usual, self.long):
            room.start_turn()

    def end_turn(self) -> Iterator[News]:
        """Wait for the turn to end, room by room, and give its news."""
        for room in (*self.usual, self.long):
            yield from room.end_turn()

    def _move_outgrown(self) -> None:
        """Take rows to the long room that have no slot for another turn's tokens; who finds no place there waits."""
        # Few completions get as long, so usual rooms need not have slots for all that they may have.
        own_slots = self.layout.usual.own_slots
        for row in [row for room in self.usual for row in room.live]:
            if row.drawn + TOKENS_A_TURN > own_slots:
                self._outgrown.append((row, self.keys_of(row)))
                self.leave(row)
        # First come, first served, and before any new ask.
        while self._outgrown and self.long.has_place:
            self.long.put(*self._outgrown.popleft())

    def _close_ranks(self) -> None:
        """Empty the last room where its rows find places in those before: a room costs the same for one row or all."""
        used = [room for room in self.usual if room.live]
        if not used:
            return
        *before, last = used
        places = sum(room.rows.count(None) for room in before)
        if len(last.live) > places:
            return
        for row in last.live:
            copied = last.take(row, self.layout.usual)
            self.leave(row)
            next(room for room in before if room.has_place).put(row, copied)
