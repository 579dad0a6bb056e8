"""Runs every program of the engine once, so that none is compiled while somebody waits for an answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import numpy as np

from cxr_jax.inference import generation
from cxr_jax.inference.generation import Prefix
from cxr_jax.inference.requests import Completion, GenerationSettings
from cxr_jax.inference.sampling import ComputedPrompt
from cxr_jax.serve.asks import Ask
from cxr_jax.serve.slots import programs
from cxr_jax.serve.slots.layout import Layout, Size
from cxr_jax.serve.slots.prompts import Prepared, Prompts, prepare
from cxr_jax.serve.slots.rooms import Machine
from cxr_jax.serve.slots.traces import probabilities_of

# Pixels of a side: no model takes more, so that it is the largest image that each takes.
_SIDE = 1024


def picture() -> np.ndarray:
    """Make an image as large as any: float32 [H, W] in 0..1."""
    # Some contrast, for whoever looks at pixels.
    ramp = np.linspace(0, 1, _SIDE, dtype=np.float32)
    return np.broadcast_to(ramp, (_SIDE, _SIDE)).copy()


def steps(
    machine: Machine, layout: Layout, prompts: Prompts
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Give the parts of the warm-up, in order: (what it compiles, the work)."""
    # Each part leaves behind what the next ones run on.
    state = _WarmUp(machine, layout, prompts)
    for bucket_size in layout.prompt_buckets:
        yield f"prompts of {bucket_size} tokens", functools.partial(state.prefill, bucket_size)
    yield "longer prompts", state.extend
    for room_size in (layout.usual, layout.long):
        yield (
            f"{room_size.rows} rows of {room_size.own_slots} tokens",
            functools.partial(state.room, room_size),
        )
    yield "moves between rooms", state.moves
    if machine.rules is not None:
        yield "probabilities", state.probabilities


class _WarmUp:
    def __init__(self, machine: Machine, layout: Layout, prompts: Prompts) -> None:
        self.machine = machine
        self.layout = layout
        self.prompts = prompts
        # Any prompt will do: programs know its shape alone.
        ask = Ask(
            images=(picture(),),
            messages=[{"role": "user", "content": "Find abnormalities."}],
            settings=GenerationSettings(1),
        )
        self.prepared: Prepared = prepare(machine.model, layout, ask)
        self.computed: dict[int, ComputedPrompt] = {}
        self.rooms: dict[Size, programs.Room] = {}

    def prefill(self, bucket_size: int) -> None:
        model, prepared = self.machine.model, self.prepared
        request = prepared.request
        features = generation.join_features(
            [
                seen
                for picture in request.pictures
                for seen in model.image_features(picture.patches, [picture.grid])
            ]
        )
        # Shorter than the bucket or as long: padding makes up for it.
        first = replace(request, ids=request.ids[:bucket_size])
        prefix = generation.prefill(model, first, features, slot_count=bucket_size)
        self.computed[bucket_size] = jax.block_until_ready(prefix.device)

    def extend(self) -> None:
        usual, longest = self.layout.usual.prompt_slots, self.layout.long.prompt_slots
        # A conversation goes on from what its first turn has left, in whatever bucket.
        for computed in [*self.computed.values()]:
            keys = programs.with_slots(computed.keys, slots=longest)
        self.computed[longest], _ = self.prompts.extend(keys, 1, self.prepared)
        # A short conversation goes back into a room of few slots.
        cut = programs.with_slots(self.computed[longest].keys, slots=usual)
        self.computed[usual] = self.computed[longest]._replace(keys=cut)
        programs.with_slots(cut, slots=longest)

    def room(self, room_size: Size) -> None:
        machine, usual = self.machine, self.layout.usual.prompt_slots
        model = machine.model
        # As `_Room` makes it, joins and draws; then it stays, for the moves between rooms.
        room = programs.empty_room(
            model.config,
            room_size=room_size,
            has_rules=machine.rules is not None,
            dtype=model.dtype,
        )
        for slots, computed in self.computed.items():
            # Long ones have a room of their own; where both are of one size, all are usual.
            is_usual = slots <= usual
            if slots <= room_size.prompt_slots and (is_usual or room_size == self.layout.long):
                room = programs.join(room, computed, self.prepared.entry)
        left = np.zeros(room_size.rows, bool)
        room, drawn = programs.advance(
            model.params,
            machine.layers,
            model.config,
            machine.rules,
            room,
            left,
            settings=machine.settings,
        )
        jax.block_until_ready(drawn)
        self.rooms[room_size] = room

    def moves(self) -> None:
        usual, long = self.layout.usual, self.layout.long
        # Rows that close ranks, that have outgrown their room, and whose answers are weighed.
        for before, after in ((usual, usual), (usual, long), (long, long)):
            self.row = programs.take_row(self.rooms[before], np.int32(0), room_size=after)
            self.rooms[after] = programs.put_row(self.rooms[after], self.row, np.int32(0))
        jax.block_until_ready(self.rooms)

    def probabilities(self) -> None:
        # From a row of any room: they are copied in the slots of the long one.
        entry, last = self.prepared.entry, self.computed[self.layout.prompt_buckets[0]].last
        prefix = Prefix(ComputedPrompt(None, last), int(entry.length), int(entry.start), 0, "")
        # What it says does not matter: a trace of one token has the shapes of all.
        completion = Completion("", [0], [0.0], "length")
        probabilities_of(self.machine, prefix, self.row, completion, seed=0)
