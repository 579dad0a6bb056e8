"""What a program costs, without running it: floating-point operations from its jaxpr, collectives from its HLO.

XLA's own cost analysis counts the body of a loop once. Here loops count as often as they run: scans by their length;
a `while` (a stage of the decode loop) by a number that the caller knows. Of branches, the dearest counts.
"""

import math
import re
from collections.abc import Sequence

import jax

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
_CALLEE = re.compile(
    r"(?:body|calls|to_apply|(?:true|false)_computation|branch_computations)="
    r"\{?%?([\w.-]+(?:, %[\w.-]+)*)"
)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def flops(fn, *args, while_trips: Sequence[int] = (1,)) -> int:
    """Multiplications and additions of all matrix products in fn(*args), over all devices; args may be abstract.

    while_trips: the turns of each `while`, in the order in which they run; the last goes for all that follow.
    """
    return _flops(jax.make_jaxpr(fn)(*args).jaxpr, list(while_trips))


def _flops(jaxpr, trips: list[int]) -> int:
    """Takes from `trips` those of the loops in jaxpr."""
    total = 0
    for eqn in jaxpr.eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = p["dimension_numbers"]
            k = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2 * k * math.prod(eqn.outvars[0].aval.shape)
        elif name == "while":
            turns = trips.pop(0) if len(trips) > 1 else trips[0]
            total += turns * _flops(p["body_jaxpr"].jaxpr, trips)
        elif name == "cond":
            branches = [
                (_flops(b.jaxpr, left), left) for b in p["branches"] for left in [list(trips)]
            ]
            most, trips[:] = max(branches, key=lambda branch: branch[0])
            total += most
        else:
            times = p["length"] if name == "scan" else 1
            # Of a custom gradient, only the forward function is in the program; its rules are callables.
            total += times * sum(_flops(j, trips) for j in _inner(p))
    return total


def _inner(params: dict):
    for value in params.values():
        for v in value if isinstance(value, (tuple, list)) else [value]:
            if hasattr(v, "eqns"):
                yield v
            elif hasattr(v, "jaxpr"):
                yield v.jaxpr


def collectives(hlo: str, devices: int, while_trips: float = 1) -> dict[str, int]:
    """Bytes that a device sends for each kind of collective, in one run of a compiled program (`compiled.as_text()`).

    Counted as rings move them, among all devices: an all-gather and an all-to-all their result, a reduce-scatter its
    operand, an all-reduce (both of these) twice its result. Of branches, the one that moves most counts. while_trips:
    for loops whose number of turns the compiler does not know, their mean.
    """
    weight = {"all-reduce": 2, "reduce-scatter": devices}
    bodies, entry = _computations(hlo)
    known: dict[str, dict] = {}

    def of(name: str) -> dict[str, int]:
        if name not in known:
            known[name] = total = dict.fromkeys(COLLECTIVES, 0)
            for line in bodies.get(name, ()):
                if m := re.search(r"= (.*?) ([a-z-]+?)(?:-start)?\(", line):
                    if m[2] in total:
                        kind = (
                            m[1].rsplit(", ", 1)[-1] if "-start(" in line else m[1]
                        )  # (operand, result)
                        total[m[2]] += weight.get(m[2], 1) * _size(kind)
                turns = 1
                if re.search(r"\bwhile\(", line):
                    n = re.search(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)', line)
                    turns = int(n[1]) if n else while_trips
                called = [
                    of(callee) for callee in re.split(r", %", ", %".join(_CALLEE.findall(line)))
                ]
                if re.search(r"\bconditional\(", line):
                    called = [max(called, key=lambda moved: sum(moved.values()))]
                for moved in called:
                    for kind, size in moved.items():
                        total[kind] += round(turns * size)
        return known[name]

    return of(entry)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """({name of a computation: its lines}, name of the entry)."""
    bodies, entry, name = {}, "", None
    for line in hlo.splitlines():
        if m := re.match(r"(ENTRY )?%?([\w.-]+) .*\{\s*$", line):
            name = m[2]
            bodies[name] = []
            entry = name if m[1] else entry
        elif name and line.startswith("  "):
            bodies[name].append(line)
    return bodies, entry


def _size(shapes: str) -> int:
    """Bytes of all arrays in an HLO type such as `(f32[2,3]{1,0}, bf16[4])`."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(
        _BYTES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(","))))
        for kind, dims in found
    )
