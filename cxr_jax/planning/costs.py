"""What a program costs, without running it: floating-point operations from its jaxpr, collectives from its HLO.

XLA's own cost analysis counts the body of a loop once. Here loops count as often as they run: scans by their length;
a `while` (a stage of the decode loop) by a number that the caller knows. Of branches, the one that costs most counts.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

# Bytes of one element by HLO's name of its type.
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
# What devices say to each other; all else that a program does stays on its device.
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Of a line of HLO: the type of its result and its operation, ..
_OPERATION = re.compile(r"= (.*?) ([a-z-]+?)(?:-start)?\(")
# .. the computations that it calls, and how often, where it is a loop whose turns the compiler knows.
_CALLEE = re.compile(
    r"(?:body|calls|to_apply|(?:true|false)_computation|branch_computations)="
    r"\{?%?([\w.-]+(?:, %[\w.-]+)*)"
)
_KNOWN_TURNS = re.compile(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)')


# ---- Floating-point operations ---------------------------------------------------------------------


def flops(function: Callable[..., Any], *arguments: Any, while_trips: Sequence[int] = (1,)) -> int:
    """Count multiplications and additions of all matrix products in function(*arguments), over all devices.

    Args:
        function: jitted or not.
        *arguments: may be abstract.
        while_trips: the turns of each `while`, in the order in which they run; the last goes for all that follow.
    """
    # Copied, because it is used up as loops are met, in the order of the program.
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr, list(while_trips))


def _flops(jaxpr: Any, trip_counts: list[int]) -> int:
    """Count the operations of `jaxpr`, and take from `trip_counts` those of its loops."""
    operation_count = 0
    for equation in jaxpr.eqns:
        primitive, parameters = equation.primitive.name, equation.params
        # A product of [.., m, k] and [.., k, n]: one multiplication and one addition for each k.
        if primitive == "dot_general":
            (contracted_axes, right_axes), batch_axes = parameters["dimension_numbers"]
            left_shape = equation.invars[0].aval.shape
            contracted = math.prod(left_shape[axis] for axis in contracted_axes)
            operation_count += 2 * contracted * math.prod(equation.outvars[0].aval.shape)
        elif primitive == "while":
            # The last number is never taken out: it goes for all loops that follow.
            loop_turns = trip_counts[0]
            if len(trip_counts) > 1:
                del trip_counts[0]
            operation_count += loop_turns * _flops(parameters["body_jaxpr"].jaxpr, trip_counts)
        elif primitive == "cond":
            operation_count += _flops_of_dearest(parameters["branches"], trip_counts)
        else:
            # A scan knows its turns; other primitives with an inner program run it once.
            repetitions = parameters["length"] if primitive == "scan" else 1
            # Of a custom gradient, only the forward function is in the program; its rules are callables.
            operation_count += repetitions * sum(
                _flops(inner_jaxpr, trip_counts) for inner_jaxpr in _inner_jaxprs(parameters)
            )
    return operation_count


def _flops_of_dearest(branches: Sequence[Any], trip_counts: list[int]) -> int:
    """Count the branch that costs most, and leave in `trip_counts` what it leaves."""
    most_operations, trips_left = -1, trip_counts
    for branch in branches:
        branch_trips = list(trip_counts)
        # Each branch counts with its own copy, since only one of them runs.
        branch_operations = _flops(branch.jaxpr, branch_trips)
        if branch_operations > most_operations:
            most_operations, trips_left = branch_operations, branch_trips
    # In place: the caller goes on with the same list.
    trip_counts[:] = trips_left
    return most_operations


def _inner_jaxprs(parameters: Mapping[str, Any]) -> Iterator[Any]:
    for parameter in parameters.values():
        # Inner programs stand in the parameters of a primitive under many names, alone or in a row.
        for element in parameter if isinstance(parameter, (tuple, list)) else [parameter]:
            if hasattr(element, "eqns"):
                yield element
            elif hasattr(element, "jaxpr"):
                yield element.jaxpr


# ---- Collectives -----------------------------------------------------------------------------------


def collectives(hlo: str, devices: int, while_trips: float = 1) -> dict[str, int]:
    """Count bytes that a device sends for each kind of collective, in one run of a compiled program.

    Counted as rings move them, among all devices: an all-gather and an all-to-all their result, a reduce-scatter its
    operand, an all-reduce (both of these) twice its result. Of branches, the one that moves most counts.

    Args:
        hlo: `compiled.as_text()`.
        devices: how many the program runs on.
        while_trips: for loops whose number of turns the compiler does not know, their mean.
    """
    # Factors of a result's bytes, by the rule above; the other kinds send it once.
    result_weights = {"all-reduce": 2, "reduce-scatter": devices}
    lines_by_computation, entry = _computations(hlo)
    counted: dict[str, dict[str, int]] = {}

    # Called from several places, a computation is counted once and remembered.
    def moved_by(computation: str) -> dict[str, int]:
        if computation in counted:
            return counted[computation]
        counted[computation] = total_bytes = dict.fromkeys(COLLECTIVES, 0)
        for hlo_line in lines_by_computation.get(computation, ()):
            # What the line itself moves.
            operation = _OPERATION.search(hlo_line)
            if operation and operation[2] in total_bytes:
                result_type = operation[1]
                if "-start(" in hlo_line:  # its type is (operand, result)
                    result_type = result_type.rsplit(", ", 1)[-1]
                weight = result_weights.get(operation[2], 1)
                total_bytes[operation[2]] += weight * _size(result_type)

            # What the computations that it calls move, as often as it calls them.
            call_count: float = 1
            if re.search(r"\bwhile\(", hlo_line):
                known_turns = _KNOWN_TURNS.search(hlo_line)
                call_count = int(known_turns[1]) if known_turns else while_trips
            callees = re.split(r", %", ", %".join(_CALLEE.findall(hlo_line)))
            callee_bytes = [moved_by(callee) for callee in callees]
            if re.search(r"\bconditional\(", hlo_line):
                # Which branch will run is not known; the dearest is an upper bound.
                callee_bytes = [max(callee_bytes, key=lambda moved: sum(moved.values()))]
            for bytes_moved in callee_bytes:
                for collective, byte_count in bytes_moved.items():
                    total_bytes[collective] += round(call_count * byte_count)
        return total_bytes

    return moved_by(entry)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Return ({name of a computation: its lines}, name of the entry)."""
    lines_by_computation: dict[str, list[str]] = {}
    entry = computation = ""
    for hlo_line in hlo.splitlines():
        # A header opens a computation; its lines are indented by two blanks or more.
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{\s*$", hlo_line):
            computation = header[2]
            lines_by_computation[computation] = []
            if header[1]:
                entry = computation
        elif computation and hlo_line.startswith("  "):
            lines_by_computation[computation].append(hlo_line)
    return lines_by_computation, entry


def _size(array_types: str) -> int:
    """Count bytes of all arrays in an HLO type such as `(f32[2,3]{1,0}, bf16[4])`."""
    return sum(
        # An unknown type counts 4 bytes, and a scalar has no lengths: one element.
        _BYTES.get(element_type, 4)
        * math.prod(int(length) for length in lengths.split(",") if length)
        for element_type, lengths in re.findall(r"(\w+)\[([\d,]*)\]", array_types)
    )
