"""What the model would answer after the trace of a row that has just been drawn."""

from __future__ import annotations

from dataclasses import replace

from cxr_jax.inference import trace_readings
from cxr_jax.inference.constrained import Constraint
from cxr_jax.inference.generation import Prefix
from cxr_jax.inference.requests import Completion
from cxr_jax.serve.slots.programs import Room
from cxr_jax.serve.slots.rooms import Machine


def probabilities_of(
    machine: Machine, prefix: Prefix, row: Room, completion: Completion, seed: int
) -> dict[str, float]:
    """Compute the 14 labels' probabilities after a completion's trace, from the keys of its row.

    Args:
        row: of `Rooms.keys_of`.
    """
    rules: Constraint | None = machine.rules
    assert rules is not None, "asks for probabilities are refused without rules"
    # The row's copy of its prompt, which has as many slots as the program expects.
    with_keys = replace(prefix, device=prefix.device._replace(keys=row.prompt_keys))
    # Nothing of the trace is computed again: its keys are those that drew it.
    found = trace_readings.after(
        machine.model,
        machine.layers,
        with_keys,
        [completion],
        rules.after_if_valid(prefix.opened),
        seed,
        row.own_keys,
    )
    return trace_readings.by_label(found["trace"][0][0])
