"""What a program costs, without running it: floating-point operations from its jaxpr, collectives from its HLO.

XLA's own cost analysis counts the body of a loop once. Here loops count as often as they run: scans by their length;
a `while` (a stage of the decode loop) by a number that the caller knows. Of branches, the one that costs most counts.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from cxr_jax.planning import hlo as hlo_text

# What slices of TPUs say to each other goes by way of their hosts.
BETWEEN_SLICES = "between-slices"
# What devices say to each other; all else that a program does stays on its device.
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    BETWEEN_SLICES,
)

# The computations that a line of HLO calls.
_CALLEE = re.compile(
    r"(?:body|condition|calls|to_apply|(?:true|false)_computation|branch_computations)="
    r"\{?%?([\w.-]+(?:, %[\w.-]+)*)"
)


# ---- Floating-point operations ---------------------------------------------------------------------


def flops(function: Callable[..., Any], *arguments: Any, while_trips: Sequence[int] = (1,)) -> int:
    """Count multiplications and additions of all matrix products in function(*arguments), over all devices.

    Args:
        function: jitted or not.
        *arguments: may be abstract.
        while_trips: the turns of each `while`, in the order in which they run; the last goes for all that follow.
    """
    return flops_of(jax.make_jaxpr(function)(*arguments).jaxpr, while_trips)


def flops_of(jaxpr: Any, while_trips: Sequence[int] = (1,)) -> int:
    """Count those of a program that is traced already, as `flops` does."""
    # Copied, because it is used up as loops are met, in the order of the program.
    return _flops(jaxpr, list(while_trips))


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


class Traffic(NamedTuple):
    """What a device says to others in one run of a program, by kind of collective.

    Attributes:
        moved: bytes that it sends.
        calls: how often it begins.
    """

    moved: dict[str, int]
    calls: dict[str, int]

    def used(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return both without the kinds of which there are none."""
        moved, calls = ({kind: count for kind, count in counts.items() if count} for counts in self)
        return moved, calls


def collectives(text: str, devices: int, while_trips: float = 1) -> Traffic:
    """Count the bytes that a device sends and its collectives, in one run of a compiled program.

    Counted as rings move them, among all devices: an all-gather and an all-to-all their result, a reduce-scatter its
    operand, an all-reduce (both of these) twice its result. Of branches, the one that moves most counts.

    Args:
        text: `compiled.as_text()`.
        devices: how many the program runs on.
        while_trips: for loops whose number of turns the compiler does not know, their mean.
    """
    program = hlo_text.parse(text)
    counted: dict[str, Traffic] = {}

    # Called from several places, a computation is counted once and remembered.
    def traffic_of(computation: str) -> Traffic:
        if computation in counted:
            return counted[computation]
        total = Traffic(dict.fromkeys(COLLECTIVES, 0), dict.fromkeys(COLLECTIVES, 0))
        counted[computation] = total
        if _is_in_flight(program, computation):
            return total
        for operation in program.operations(computation):
            # What the line itself moves.
            if own := _collective(operation, computation, devices):
                collective, byte_count = own
                total.moved[collective] += byte_count
                total.calls[collective] += 1

            # What the computations that it calls move, as often as it calls them.
            call_count: float = 1
            if operation.kind == "while":
                known_turns = hlo_text.loop_turns(program, operation.line)
                call_count = while_trips if known_turns is None else known_turns
            callees = re.split(r", %", ", %".join(_CALLEE.findall(operation.line)))
            called = [traffic_of(callee) for callee in callees]
            if operation.kind == "conditional":
                # Which branch will run is not known; the dearest is an upper bound.
                called = [max(called, key=lambda traffic: sum(traffic.moved.values()))]
            for traffic in called:
                for sums, counts in zip(total, traffic, strict=True):
                    for collective, count in counts.items():
                        sums[collective] += round(call_count * count)
        return total

    return traffic_of(program.entry)


def _collective(
    operation: hlo_text.Operation, computation: str, devices: int
) -> tuple[str, int] | None:
    """(kind, bytes that a device sends) of a line that begins a collective, else None."""
    # Counted where it is sent: what comes back is another slice's.
    if operation.kind == "send" and "is_host_transfer=true" in operation.line:
        sent = operation.type.removeprefix("(").partition("{")[0]  # and what the runtime needs
        return BETWEEN_SLICES, hlo_text.bytes_of(sent)
    kind = operation.kind.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    result_type = operation.type
    if operation.kind.endswith("-start"):
        result_type = _result_of_start(result_type)
    byte_count = hlo_text.bytes_of(result_type)
    # On TPUs an all-reduce of which each device keeps its part is one kernel: its operand goes round once.
    if computation.startswith("all-reduce-scatter"):
        return "reduce-scatter", byte_count
    # Factors of a result's bytes, by the rule above; the other kinds send it once.
    return kind, {"all-reduce": 2, "reduce-scatter": devices}.get(kind, 1) * byte_count


def _result_of_start(start_type: str) -> str:
    """Of a type (operands, results, numbers of the runtime): the results."""
    # Layouts hold commas and brackets of their own; what is left is nested tuples of arrays.
    arrays = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", start_type).replace(" ", "")
    arrays = re.sub(r",[su]32\[\](?=[,)])", "", arrays)
    if groups := re.findall(r"\(([^()]+)\)", arrays[1:-1]):
        return groups[-1]
    # One operand and one result.
    return re.split(r",(?=[a-z])", arrays.strip("()"))[-1]


def _is_in_flight(program: hlo_text.Program, computation: str) -> bool:
    """Say whether a computation only carries on a collective that another one has begun.

    The compiler of TPUs cuts an all-gather in pieces and fuses them with the work that goes on meanwhile. Each of
    these fusions names the whole collective again; only the first, whose name stays, begins it.
    """
    if computation.startswith("async_collective_fusion"):
        return True
    return any("AsyncCollectiveDone" in line for line in program.computations.get(computation, ()))
