"""Finite automata over bytes: written as a plain Python step function, compiled to a table, run on the
device.

A reader is described by `step(state, byte) -> (state, event)` over hashable states. `compile_machine`
enumerates every reachable state, so the table is right wherever the step function is. `Bank` joins several
machines that read the same stream; `run` advances all of them together, one byte a step, vectorised over the
batch.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

MAX_STATES = 50_000


@dataclass(frozen=True)
class Machine:
    """A compiled reader. `next` and `event` int32 [S, 256], `final` int32 [S]; the start is state 0."""

    next: np.ndarray
    event: np.ndarray
    final: np.ndarray


def compile_machine(
    start: Hashable,
    step: Callable[[Hashable, int], tuple[Hashable, int]],
    final: Callable[[Hashable], int] = lambda state: 0,
) -> Machine:
    """Enumerate the states reachable from `start`. Events and final values are small ints; event 0 is
    nothing.

    Raises ValueError past MAX_STATES: the step function then most likely remembers the whole text.
    """
    number = {start: 0}
    states = [start]
    nexts, events = [], []
    for state in states:  # grows while we walk it
        row_next, row_event = [], []
        for byte in range(256):
            target, event = step(state, byte)
            if target not in number:
                number[target] = len(states)
                states.append(target)
            row_next.append(number[target])
            row_event.append(event)
        nexts.append(row_next)
        events.append(row_event)
        if len(states) > MAX_STATES:
            raise ValueError(f"the automaton has more than {MAX_STATES} states")
    return Machine(
        np.array(nexts, np.int32),
        np.array(events, np.int32),
        np.array([final(s) for s in states], np.int32),
    )


@dataclass(frozen=True)
class Bank:
    """Several machines in one table. All arrays are numpy and become constants of the compiled program.

    classes int32 [256]: bytes that no machine tells apart share a class; the last class is padding (no
    effect). next, event int32 [rows * C]; a state is stored as row * C, so that state + class is the index of
    its cell. starts int32 [K]; final int32 [rows].
    """

    classes: np.ndarray
    next: np.ndarray
    event: np.ndarray
    starts: np.ndarray
    final: np.ndarray
    n_classes: int


def join(machines: list[Machine]) -> Bank:
    """Put machines that read the same bytes into one bank, in the order given."""
    sizes = [len(m.final) for m in machines]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    table = np.concatenate([m.next + o for m, o in zip(machines, offsets, strict=True)])
    event = np.concatenate([m.event for m in machines])
    cells = np.concatenate([table, event])
    _, chosen, classes = np.unique(cells, axis=1, return_index=True, return_inverse=True)
    pad_next = np.arange(len(table))[:, None]
    table = np.concatenate([table[:, chosen], pad_next], axis=1)
    event = np.concatenate([event[:, chosen], np.zeros_like(pad_next)], axis=1)
    n = table.shape[1]
    return Bank(
        classes=classes.reshape(-1).astype(np.int32),
        next=(table * n).reshape(-1).astype(np.int32),
        event=event.reshape(-1).astype(np.int32),
        starts=(offsets * n).astype(np.int32),
        final=np.concatenate([m.final for m in machines]),
        n_classes=n,
    )


def run(bank: Bank, stream: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read stream uint8 [B, L], of which the first lengths [B] bytes count.

    Returns events int32 [K, L, B] (what each machine said at each byte) and final int32 [K, B] (the final
    value of the state it ended in). Works under jit and vmap.
    """
    batch, width = stream.shape
    inside = jnp.arange(width)[:, None] < lengths[None, :]
    codes = jnp.where(inside, jnp.asarray(bank.classes)[stream.T], bank.n_classes - 1)
    table = jnp.asarray(bank.next)

    def advance(state, code):
        cell = state + code[None, :]
        return table[cell], cell

    start = jnp.broadcast_to(jnp.asarray(bank.starts)[:, None], (len(bank.starts), batch))
    state, cells = jax.lax.scan(advance, start, codes)
    events = jnp.asarray(bank.event)[cells]
    return jnp.moveaxis(events, 0, 1), jnp.asarray(bank.final)[state // bank.n_classes]
