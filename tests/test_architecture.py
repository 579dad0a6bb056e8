"""The rooms of the package: imports run down only, no circles, no room too full. The floors stand in pyproject.toml."""

import ast
import collections
import functools
import graphlib
import tomllib

from places import ROOT

PACKAGE = ROOT / "cxr_jax"
# Doors under their old names, kept for one release, and the face that hands rooms on: they import what they name.
APART = ("cxr_jax", "cxr_jax.tools", "cxr_jax.data.phantom")


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name) -> set[str]:
    """Modules of the package that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
            if not names <= MODULES.keys():
                found.add(node.module)
    return {m for m in found if m in MODULES} - {name}


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module -> those that it imports."""
    inside = (name for name in MODULES if not name.startswith(APART[1:]) and name != "cxr_jax")
    return {name: imports_of(name) for name in inside}


def floors() -> dict[str, int]:
    """Room -> its floor, 0 the highest."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ][0]
    layers = [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]
    assert len(layers) == 12
    return {room: floor for floor, rooms in enumerate(layers) for room in rooms}


def room_of(module) -> str:
    return ".".join(module.split(".")[:2])


def test_imports_run_down_only():
    floor = floors()
    up = [
        f"{name} -> {used}"
        for name, uses in graph().items()
        for used in uses
        if room_of(name) != room_of(used)
        and room_of(used) != "cxr_jax"
        and floor[room_of(used)] <= floor[room_of(name)]
    ]
    assert not up, "imports that run up, or across a floor:\n" + "\n".join(sorted(up))


def test_no_circles():
    # A package's face imports its files; a file that imports a neighbour does not wait for the face.
    faces = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    inner = {
        name: {used for used in uses if not (used in faces and name.startswith(used + "."))}
        for name, uses in graph().items()
    }
    graphlib.TopologicalSorter(inner).prepare()  # raises CycleError, which names the circle


def test_no_room_is_too_full():
    files = collections.Counter(path.parent for path in MODULES.values())
    folder, most = files.most_common(1)[0]
    assert most <= 15, f"{folder} holds {most} files"
