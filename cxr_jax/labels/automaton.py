"""Finite automata over bytes: written as a plain Python step function, compiled to a table, run on the device.

A reader is described by `step(state, byte) -> (state, event)` over hashable states. `compile_machine` enumerates every
reachable state, so the table is right wherever the step function is. `join_machines` puts several machines that read
the same stream into one table; `run` advances all of them together, one byte a step, vectorised over the batch.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# The machines here have hundreds of states; one that remembers its text has no end.
MAX_STATES = 50_000

Array = jax.Array | np.ndarray  # texts come from the device or from the host

State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True)
class Machine:
    """A compiled reader; the start is state 0.

    Attributes:
        next: int32 [S, 256], the state after each byte.
        event: int32 [S, 256], what it says at each byte; 0 is nothing.
        final: int32 [S], what the state says at the end of the text.
    """

    next: np.ndarray
    event: np.ndarray
    final: np.ndarray


def _nothing(_state: Hashable) -> int:
    return 0


def compile_machine(
    start: State,
    step: Callable[[State, int], tuple[State, int]],
    final: Callable[[State], int] = _nothing,
    told_apart: bytes = bytes(range(256)),
) -> Machine:
    """Compile a step function to a table, by enumerating the states that can be reached from `start`.

    Args:
        start: the first state.
        step: (state, byte) -> (next state, event). Events are small ints; event 0 is nothing.
        final: state -> its final value, a small int.
        told_apart: the bytes that `step` may treat as no other byte; all others are tried as one.

    Raises:
        ValueError: past MAX_STATES: the step function then most likely remembers the whole text.
    """
    number_of = {start: 0}
    states = [start]
    next_rows, event_rows = [], []
    others = [byte for byte in range(256) if byte not in told_apart]
    stands_for = np.arange(256)
    stands_for[others] = others[:1]
    tried = np.unique(stands_for)
    column = np.searchsorted(tried, stands_for)
    for state in states:  # grows while we walk it
        next_row, event_row = [], []
        for byte in tried.tolist():
            target, event = step(state, byte)
            if target not in number_of:
                number_of[target] = len(states)
                states.append(target)
            next_row.append(number_of[target])
            event_row.append(event)
        next_rows.append(next_row)
        event_rows.append(event_row)
        if len(states) > MAX_STATES:
            raise ValueError(f"the automaton has more than {MAX_STATES} states")
    return Machine(
        np.array(next_rows, np.int32)[:, column],
        np.array(event_rows, np.int32)[:, column],
        np.array([final(state) for state in states], np.int32),
    )


@dataclass(frozen=True)
class JoinedMachines:
    """Several machines in one table. All arrays are numpy and become constants of the compiled program.

    Attributes:
        classes: int32 [256]; bytes that no machine tells apart share a class. The last class, which no byte has, is
            padding: it has no effect.
        next: int32 [rows * C]; a state is stored as row * C, so that state + class is the index of its cell.
        event: int32 [rows * C].
        starts: int32 [K], the first state of each machine.
        final: int32 [rows].
        class_count: C.
    """

    classes: np.ndarray
    next: np.ndarray
    event: np.ndarray
    starts: np.ndarray
    final: np.ndarray
    class_count: int


def join_machines(machines: list[Machine]) -> JoinedMachines:
    """Put machines that read the same bytes into one table, in the order given."""
    # Each machine keeps a range of rows of its own.
    sizes = [len(machine.final) for machine in machines]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    shifted = [machine.next + offset for machine, offset in zip(machines, offsets, strict=True)]
    table = np.concatenate(shifted)
    event = np.concatenate([machine.event for machine in machines])

    # Bytes whose columns are equal in both tables are one class.
    columns = np.concatenate([table, event])
    _, chosen, classes = np.unique(columns, axis=1, return_index=True, return_inverse=True)

    # Padding leads back to its state, and says nothing.
    same_state = np.arange(len(table))[:, None]
    table = np.concatenate([table[:, chosen], same_state], axis=1)
    event = np.concatenate([event[:, chosen], np.zeros_like(same_state)], axis=1)
    class_count = table.shape[1]
    return JoinedMachines(
        classes=classes.reshape(-1).astype(np.int32),
        next=(table * class_count).reshape(-1).astype(np.int32),
        event=event.reshape(-1).astype(np.int32),
        starts=(offsets * class_count).astype(np.int32),
        final=np.concatenate([machine.final for machine in machines]),
        class_count=class_count,
    )


def run(machines: JoinedMachines, stream: Array, lengths: Array) -> tuple[jax.Array, jax.Array]:
    """Run all machines over texts. Works under jit and vmap.

    Args:
        machines: K machines.
        stream: uint8 [B, L].
        lengths: int [B]: the first bytes of each row, which count.

    Returns:
        Events int32 [K, L, B]: what each machine said at each byte. And final int32 [K, B]: the final value of the
        state that it ended in.
    """
    batch_size, width = stream.shape
    # Bytes past the end of a text are padding, whatever they are.
    inside = jnp.arange(width)[:, None] < lengths[None, :]
    padding = machines.class_count - 1
    codes = jnp.where(inside, jnp.asarray(machines.classes)[stream.T], padding)
    table = jnp.asarray(machines.next)

    def advance(state: jax.Array, code: jax.Array) -> tuple[jax.Array, jax.Array]:
        cell = state + code[None, :]
        return table[cell], cell

    # The carry is the row of each machine in each text, [K, B].
    starts = jnp.asarray(machines.starts)[:, None]
    start = jnp.broadcast_to(starts, (len(machines.starts), batch_size))
    state, cells = jax.lax.scan(advance, start, codes)
    # Events are looked up after the scan, all at once: inside, they would be one more gather a byte.
    events = jnp.asarray(machines.event)[cells]
    return jnp.moveaxis(events, 0, 1), jnp.asarray(machines.final)[state // machines.class_count]
