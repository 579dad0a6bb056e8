"""pyproject.toml and requirements.txt against each other and against what the package imports."""

import ast
import itertools
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOT

import cxr_jax
from cxr_jax.__main__ import COMMANDS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(text) for text in texts]
    for name, texts in PROJECT["optional-dependencies"].items()
}
PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
# Modules whose package has another name.
DISTRIBUTIONS = {
    **{"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint", "yaml": "pyyaml"},
    "argon2": "argon2-cffi",
    "fhir": "fhir.resources",
    "multipart": "python-multipart",
    "mlflow": "mlflow-skinny",
    "google": "protobuf",
}


def third_party(folder: str) -> dict[str, str]:
    """Distribution -> a file below `folder` that imports it, at its top or inside a function."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            else:
                continue
            for top in {module.partition(".")[0] for module in modules}:
                if top not in sys.stdlib_module_names and top != "cxr_jax":
                    name = canonicalize_name(DISTRIBUTIONS.get(top, top))
                    found.setdefault(name, str(path.relative_to(ROOT)))
    return found


def test_every_import_of_the_package_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in RANGES}
    # What only some users need is an extra, and imported where it is asked for.
    users = [extra for name, extra in EXTRAS.items() if name != "dev"]
    declared |= {canonicalize_name(requirement.name) for extra in users for requirement in extra}
    missing = {k: v for k, v in third_party("cxr_jax").items() if k not in declared}
    assert not missing, f"not in pyproject.toml's dependencies: {missing}"


@pytest.mark.parametrize("pin", PINS, ids=str)
def test_every_pin_lies_in_its_range(pin):
    """Every pin is one version, and of a package that pyproject.toml knows, in its range there."""
    [specifier] = pin.specifier
    assert specifier.operator == "=="
    known = [*RANGES, *itertools.chain(*EXTRAS.values())]
    ranges = [r for r in known if canonicalize_name(r.name) == canonicalize_name(pin.name)]
    assert ranges, f"{pin.name} is not in pyproject.toml"
    assert all(r.specifier.contains(specifier.version) for r in ranges)


def test_every_dependency_is_pinned_on_every_python():
    for python in ("3.11", "3.12", "3.13"):
        pinned = [
            canonicalize_name(pin.name)
            for pin in PINS
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        ]
        assert len(pinned) == len(set(pinned)), f"two pins of one package on Python {python}"
        assert {canonicalize_name(r.name) for r in RANGES} <= set(pinned)


def test_ranges_have_both_ends():
    for requirement in RANGES:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, str(requirement)


def test_version_and_script():
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", cxr_jax.__version__)
    module, function = PROJECT["scripts"]["cxr-jax"].split(":")
    assert (module, function) == ("cxr_jax.__main__", "main")
    assert all(command.module.startswith("cxr_jax.") for command in COMMANDS.values())
