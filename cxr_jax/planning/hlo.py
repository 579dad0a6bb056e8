"""The text of a compiled program: its computations, the turns of its loops, and the bytes of its arrays, padded or not.

`compiled.as_text()` is HLO after scheduling. CPU and TPU write it alike, but for layouts: an array of the type
`bf16[4,299,80]{2,1,0:T(8,128)}` lies in tiles of 8 x 128, so its last two axes are filled up to multiples of these
(openxla.org, "Tiled layout").
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

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
# Of a line of HLO: the name of its result, the type, and its operation.
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z-]*)\(")
_KNOWN_TURNS = re.compile(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)')
# An array's type: element, lengths, and its layout: order of the axes from the last, tiles, memory space.
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
# Operations whose result is no new array: parts, whole tuples and other names of arrays that there are.
_NO_ARRAY = frozenset(
    ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant")
)


class Operation(NamedTuple):
    """One line of a computation.

    Attributes:
        name: of its result.
        type: of its result, with layouts.
        kind: `fusion`, `all-gather-start`, ..
        line: all of it.
    """

    name: str
    type: str
    kind: str
    line: str


class Program(NamedTuple):
    """The computations of a program by name, and the name of the one that it begins with."""

    computations: dict[str, list[str]]
    entry: str

    def operations(self, computation: str) -> Iterator[Operation]:
        """Yield the operations of a computation in their order; of an unknown one, none."""
        for line in self.computations.get(computation, ()):
            if parts := _LINE.match(line):
                yield Operation(parts[1], parts[2], parts[3], line)


def parse(text: str) -> Program:
    """Cut `compiled.as_text()` into its computations."""
    lines_by_computation: dict[str, list[str]] = {}
    entry = computation = ""
    for line in text.splitlines():
        # A header opens a computation; its lines are indented by two blanks or more.
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{\s*$", line):
            computation = header[2]
            lines_by_computation[computation] = []
            if header[1]:
                entry = computation
        elif computation and line.startswith("  "):
            lines_by_computation[computation].append(line)
    return Program(lines_by_computation, entry)


# ---- Loops -----------------------------------------------------------------------------------------


def loop_turns(program: Program, line: str) -> int | None:
    """Return how often the `while` of a line runs: as the compiler says, or as its counter does.

    A counter begins at 0, as that of a scan and of a loop that the compiler makes of a product and its collective; by
    how much a turn adds to it is read in the body. None: the loop ends by something else.
    """
    if known := _KNOWN_TURNS.search(line):
        return int(known[1])
    condition, body = (re.search(rf"{part}=%?([\w.-]+)", line) for part in ("condition", "body"))
    if not condition or not body:
        return None
    operations = _by_name(program, condition[1])
    # The last operation is the answer: counter < constant, both by name.
    answer = list(operations.values())[-1] if operations else None
    if answer is None or answer.kind != "compare" or "direction=LT" not in answer.line:
        return None
    counter, bound = (operations.get(name) for name in operands(answer)[:2])
    turns = _constant(bound)
    index = re.search(r"index=(\d+)", counter.line) if counter else None
    if turns is None or counter is None or counter.kind != "get-tuple-element" or index is None:
        return None
    return math.ceil(turns / _added_each_turn(program, body[1], int(index[1])))


def operands(operation: Operation) -> list[str]:
    """Return the names of an operation's operands."""
    rest = operation.line.split(f" {operation.kind}(", 1)[1]
    return re.findall(r"%([\w.-]+)", rest.split(")", 1)[0])


def _by_name(program: Program, computation: str) -> dict[str, Operation]:
    return {operation.name: operation for operation in program.operations(computation)}


def _constant(operation: Operation | None) -> int | None:
    value = re.search(r" constant\((\d+)\)", operation.line) if operation else None
    return int(value[1]) if value else None


def _added_each_turn(program: Program, body: str, index: int) -> int:
    """What the body of a loop adds to a counter, the element `index` of its state; 1 if that cannot be read."""
    operations = _by_name(program, body)
    state = list(operations.values())[-1] if operations else None
    names = operands(state) if state else []
    total, operation = 0, operations.get(names[index]) if index < len(names) else None
    # Unrolled bodies add several times.
    while operation is not None and operation.kind in ("add", "copy"):
        values = [operations.get(name) for name in operands(operation)]
        total += sum(filter(None, map(_constant, values)))
        others = [value for value in values if _constant(value) is None]
        operation = others[0] if len(others) == 1 else None
    return max(total, 1)


# ---- Bytes -----------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Bytes of arrays in the memory of a device (HBM): their elements alone, and with what fills up their tiles."""

    elements: int
    padded: int


def bytes_of(array_types: str) -> int:
    """Count bytes of all arrays in a type such as `(f32[2,3]{1,0}, bf16[4])`, without padding, wherever they lie."""
    return sum(_element_bytes(array) for array in _ARRAY.finditer(array_types))


def sizes_of(array_types: str) -> Sizes:
    """Count bytes of the arrays of a type that lie in HBM."""
    return _total(size for _, size in _in_hbm(array_types))


def _total(sizes: Iterable[Sizes]) -> Sizes:
    total = Sizes(0, 0)
    for size in sizes:
        total = Sizes(total.elements + size.elements, total.padded + size.padded)
    return total


def _in_hbm(array_types: str) -> Iterator[tuple[str, Sizes]]:
    """Yield the arrays of a type that lie in HBM; layouts name every other memory: S(1) and so on."""
    for array in _ARRAY.finditer(array_types):
        layout = array[4] or ""
        if not re.search(r"S\([1-9]", layout):
            byte_count = _element_bytes(array)
            growth = _growth(array[2], array[3] or "", layout)
            yield array[0], Sizes(byte_count, round(byte_count * growth))


def _element_bytes(array: re.Match[str]) -> int:
    # An unknown type counts 4 bytes, and a scalar has no lengths: one element.
    lengths = (int(length) for length in array[2].split(",") if length)
    return _BYTES.get(array[1], 4) * math.prod(lengths)


def _growth(lengths: str, order: str, layout: str) -> float:
    """By what factor an array grows, since the axes under its first tile are filled up to multiples of it."""
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if not tile or not lengths:
        # A scalar's tile is a few hundred bytes: nothing.
        return 1.0
    sizes = [int(length) for length in lengths.split(",")]
    axes = [int(axis) for axis in order.split(",") if axis] or list(range(len(sizes)))[::-1]
    factor = 1.0
    # Tiles are written from the outer axis in, axes of a layout from the inner one out.
    for tile_side, axis in zip(reversed(tile[1].split(",")), axes, strict=False):
        if sizes[axis]:
            factor *= math.ceil(sizes[axis] / int(tile_side)) * int(tile_side) / sizes[axis]
    return factor


class Padding(NamedTuple):
    """What padding takes of a program's arrays in HBM.

    Attributes:
        arguments: of the program.
        made: all that it writes while it runs, each line once.
        worst: type of the array that wastes most, with its layout; "" if none wastes.
        worst_sizes: its bytes.
    """

    arguments: Sizes
    made: Sizes
    worst: str
    worst_sizes: Sizes


def padding(program: Program) -> Padding:
    """Count what the tiles of arrays waste. Arrays inside a fusion are never stored, so they do not count."""
    fused = _fused_computations(program)
    arguments: list[tuple[str, Sizes]] = []
    made: list[tuple[str, Sizes]] = []
    for computation in (name for name in program.computations if name not in fused):
        for operation in program.operations(computation):
            if operation.kind == "parameter" and computation == program.entry:
                arguments += _in_hbm(operation.type)
            # What is only begun is counted where it is done.
            elif operation.kind not in _NO_ARRAY and not operation.kind.endswith("-start"):
                made += _in_hbm(operation.type)
    nothing = ("", Sizes(0, 0))
    worst = max((*arguments, *made, nothing), key=lambda array: array[1].padded - array[1].elements)
    if worst[1].padded == worst[1].elements:
        worst = nothing
    argument_sizes, made_sizes = (
        _total(size for _, size in arrays) for arrays in (arguments, made)
    )
    return Padding(argument_sizes, made_sizes, *worst)


def _fused_computations(program: Program) -> set[str]:
    """Names of the computations that are not run line by line: those of fusions, and reducers."""
    return {
        callee
        for computation in program.computations
        for operation in program.operations(computation)
        if operation.kind != "call" and not operation.kind.startswith("async")
        for callee in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", operation.line)
    }
