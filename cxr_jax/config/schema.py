"""Every key of a run's config: its type, range, default and what it is, read from keys.toml.

From that one table come the configs that presets begin with (`defaults`), the checks (`check_values`), `--help`
(`help_text`) and docs/config.md (`markdown`). The typed sections that code below the doors reads are in sections.py.
"""

import functools
import math
import numbers
import operator
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import ml_collections
import numpy as np

from cxr_jax.errors import UserError

TASKS = ("sft", "rl", "evaluate")
TOP = "run"  # the table of keys that stand in no section
# The four signs of a rule such as ">= 0, < 1".
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
# Whatever is computed with in float32 becomes infinite beyond.
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
# Not None, which a config may hold.
_ABSENT = object()


# ---- The table -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a config.

    Attributes:
        name: dotted, as in `--config.NAME=VALUE`.
        type: see the head of keys.toml.
        range: rule of a number, as in ">= 0, < 1", or the values of a choice.
        default: task -> value that its phantom preset has.
        tasks: whose config holds the key.
        source: value of `data.source` that has the key; "" if all have.
        line: what the key is.
    """

    name: str
    type: str
    range: str | tuple[str, ...]
    default: dict[str, Any]
    tasks: tuple[str, ...]
    source: str
    line: str

    @property
    def section(self) -> str:
        """Name of the section that the key stands in, "" at the top."""
        return self.name.rpartition(".")[0]


def _key(section: str, name: str, entry: dict[str, Any]) -> Key:
    # TOML has lists; a key that is hashed and compared wants tuples.
    fields: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value for field, value in entry.items()
    }
    # A key belongs to every task, unless the table says which.
    tasks = fields.get("tasks", TASKS)
    # Said once here, and not in every line of the table.
    if section == "rl":
        tasks = ("rl",)
    if section != TOP:
        name = f"{section}.{name}"
    return Key(
        name=name,
        type=fields["type"],
        range=fields.get("range", ""),
        # A task's own default goes before the common one.
        default={task: fields.get(task, fields.get("default")) for task in tasks},
        tasks=tasks,
        source=fields.get("source", ""),
        line=fields["line"],
    )


# Read once: the file ships with the package, and does not change.
@functools.cache
def keys() -> dict[str, Key]:
    """Return every key by its dotted name, in the order of keys.toml."""
    text = resources.files("cxr_jax.config").joinpath("keys.toml").read_text(encoding="utf-8")
    entries = [
        _key(section, name, entry)
        for section, table in tomllib.loads(text).items()
        for name, entry in table.items()
    ]
    return {key.name: key for key in entries}


def choices(name: str) -> tuple[str, ...]:
    """Return the values that a key of type choice may have."""
    return tuple(keys()[name].range)


def defaults(task: str, source: str = "phantom") -> ml_collections.ConfigDict:
    """Build the config that the presets of a task begin with: every key that it has, at its default.

    Args:
        task: "sft", "rl" or "evaluate".
        source: "phantom" or "files": where the images come from; decides which keys `data` has.
    """
    config = ml_collections.ConfigDict()
    for key in keys().values():
        # A config holds only keys that do something; a flag for any other is an error.
        if task not in key.tasks or key.source not in ("", source):
            continue
        # Sections are made as their first key comes along.
        section = config
        for part in filter(None, key.section.split(".")):
            if part not in section:
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        value = key.default[task]
        # A copy of its own for each config, since a config is changed in place.
        if key.type in ("section", "sources"):
            value = ml_collections.ConfigDict(value)
        section[key.name.rpartition(".")[2]] = value
    config.data.source = source
    return config


# ---- Checks ----------------------------------------------------------------------------------------


def check_values(config: ml_collections.ConfigDict) -> None:
    """Refuse values that mean nothing, by the config alone; keys that the config lacks are passed over.

    Raises:
        UserError: naming the first key that is wrong, its value and what it must be.
    """
    values = Values(config)
    # Sections first: where a flag has put a number in their place, no key is to be found.
    for section in ("data", "optim", "eval", "lora", "mesh", "rl", "rl.reward_weights"):
        values.require(section, _is_section, "must be a section of keys")
    for key in keys().values():
        if key.type == "patterns":
            is_sequence = functools.partial(_is_of, kinds=(tuple, list))
            # The container before its content, so that a text is not taken for a tuple of letters.
            values.require(key.name, is_sequence, "must be a tuple")
            values.require(key.name, _is_patterns, "holds a bad regular expression")
        elif key.type in _RULES:
            values.require(key.name, *_RULES[key.type](key.range))
    # What depends on several keys comes last, when each of them is known to be good.
    if "epochs" not in config:
        values.require("steps", *_RULES["whole"](">= 1"))
    values.require_divides("batch_size", "micro_batches")
    values.require_divides("rl.prompts_per_step", "rl.micro_batches", "rl.minibatches")


def rule_of(name: str) -> tuple[Callable[[Any], bool], str] | None:
    """Find what a value of a key must pass, and what a message says that it must be; None if there is no such rule."""
    key = keys().get(name)
    if key is None or key.type not in _RULES:
        return None
    return _RULES[key.type](key.range)


def is_number(value: Any, rule: str = "", *, whole: bool = False) -> bool:
    """Tell whether a value is a finite number that keeps a rule like ">= 0, < 1".

    A whole number must fit an int32; any other is held to the rule as float32, in which it is used.
    """
    kind: Any = numbers.Integral if whole else numbers.Real
    # A bool is a number to Python, and a slip in a config.
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    # A comparison and not `isfinite`: whole numbers of any size come by, and NaN fails it, too.
    if not -_LARGEST_FLOAT32 <= value <= _LARGEST_FLOAT32:
        return False
    if whole and value >= 2**31:
        return False
    bounds = [part.split() for part in rule.split(", ") if part]
    # A fraction below 1 that rounds to 1 in float32 is 1 where it is used.
    compared = value if whole else np.float32(value)
    return all(_COMPARE[sign](compared, float(bound)) for sign, bound in bounds)


class Values:
    """The values of a config by dotted name, and what they must be; keys that the config lacks are passed over."""

    def __init__(self, resolved: ml_collections.ConfigDict) -> None:
        self._resolved = resolved

    def at(self, name: str) -> Any:
        """Return the value at a dotted name, or a mark of its own if the config has no such key."""
        value: Any = self._resolved
        for part in name.split("."):
            # A section that a flag has replaced is no section any more.
            if not _is_section(value) or part not in value:
                return _ABSENT
            value = value[part]
        return value

    def require(self, name: str, is_good: Callable[[Any], bool], must: str) -> None:
        """Refuse the value at a dotted name if it is there and not good; `must` says what it must be.

        Raises:
            UserError: naming the key and its value.
        """
        value = self.at(name)
        if value is not _ABSENT and not is_good(value):
            raise UserError(f"config.{name}={value!r} {must}")

    def require_divides(self, rows: str, micro_batches: str, minibatches: str = "") -> None:
        """Refuse rows that do not divide into equal minibatches, and those into equal micro-batches.

        Args:
            rows: dotted name of the key that counts the rows of a step; the others are named likewise.

        Raises:
            UserError: naming the key and both counts.
        """
        count, turns = self.at(rows), self.at(micro_batches)
        updates = 1
        if minibatches and self.at(minibatches) is not _ABSENT:
            updates = self.at(minibatches)
        # Of a task that lacks a key there is nothing to divide.
        if count is _ABSENT or turns is _ABSENT or count % (updates * turns) == 0:
            return
        # The message speaks of minibatches only where there are several.
        into = f"{turns} micro-batches"
        if updates != 1:
            into = f"{updates} minibatches of {into}"
        raise UserError(f"config.{rows}={count} does not divide into {into}")


def _is_section(value: object) -> bool:
    return isinstance(value, ml_collections.ConfigDict)


def _is_patterns(value: Any) -> bool:
    try:
        return all(re.compile(pattern) for pattern in value)
    except (re.error, TypeError):
        return False


# ---- Types of values -----------------------------------------------------------------------------------

# What a value must pass, and what a message says that it must be.
_Rule = tuple[Callable[[Any], bool], str]


def _whole(limits: str) -> _Rule:
    # Sizes of images: whole numbers of patches that are merged two by two.
    if limits.startswith("a multiple of "):
        unit = int(limits.rsplit(" ", 1)[1])

        def is_multiple(value: Any) -> bool:
            return is_number(value, f">= {unit}", whole=True) and value % unit == 0

        return is_multiple, f"must be {limits}"
    # Off, or a limit that can be kept.
    if limits.startswith("0, or "):
        bound = limits.removeprefix("0, or ")

        def is_off_or_within(value: Any) -> bool:
            return is_number(value, whole=True) and (value == 0 or is_number(value, bound))

        return is_off_or_within, f"must be a whole number, {limits}"
    return functools.partial(is_number, rule=limits, whole=True), f"must be a whole number {limits}"


def _number(limits: str) -> _Rule:
    if not limits:
        # Whoever uses the value refuses it, in words of its own.
        return _anything, ""
    if limits.endswith(", or inf"):
        finite = limits.removesuffix(", or inf")

        def is_number_or_inf(value: Any) -> bool:
            return value == math.inf or is_number(value, finite)

        return is_number_or_inf, f"must be a number {limits}"
    return functools.partial(is_number, rule=limits), f"must be a finite number {limits}"


def _seed(limits: str) -> _Rule:
    def is_seed(value: Any) -> bool:
        # A whole number may be written as a float, as in 1e3.
        return is_number(value) and value == int(value) and 0 <= value < 2**32

    return is_seed, "must be from 0 to 2^32 - 1: keys know no more bits"


def _axis(limits: str) -> _Rule:
    def is_axis(value: Any) -> bool:
        return value == -1 or is_number(value, ">= 1", whole=True)

    return is_axis, "must be a whole number >= 1, or -1: what remains"


def _choice(values: tuple[str, ...]) -> _Rule:
    return values.__contains__, f"is not one of {', '.join(values)}"


def _text(limits: str) -> _Rule:
    return functools.partial(_is_of, kinds=str), "must be a text"


def _switch(limits: str) -> _Rule:
    return functools.partial(_is_of, kinds=bool), "must be True or False"


def _is_of(value: object, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds)


def _anything(value: object) -> bool:
    return True


# Type of a key -> (its range -> rule). Names and sections have no rule of their own.
_RULES: dict[str, Callable[[Any], _Rule]] = {
    "whole": _whole,
    "number": _number,
    "seed": _seed,
    "axis": _axis,
    "choice": _choice,
    "text": _text,
    "switch": _switch,
}


# ---- What people read ------------------------------------------------------------------------------


def help_text() -> str:
    """Return all keys as plain text for `--help`: name, range, default, line."""
    lines = ["", "Keys of a config, as --config.KEY=VALUE (docs/config.md has the same as a page):"]
    for key in keys().values():
        lines.append(f"  {key.name}  [{_range_of(key)}]  default {_default_of(key)}")
        lines.append(f"      {key.line}")
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """Return docs/config.md: a table for each section."""
    lines = [
        "# Every key of a config",
        "",
        "Made from `cxr_jax/config/keys.toml` by `python -m scripts.config_page`; a test holds the two together.",
        "A key is set by `--config.KEY=VALUE`. Defaults are those of the phantom presets; `files` and `nv_reason_3b`",
        "set their own (`cxr_jax/presets/`). Only the tasks named have the key; keys marked *phantom* or *files* are",
        "those of that `data.source`.",
    ]
    # Keys of a section stand together in keys.toml, so a change of section begins a table.
    section = None
    for key in keys().values():
        if key.section != section:
            section = key.section
            title = f"`config.{section}`" if section else "`config`"
            lines += [
                "",
                f"## {title}",
                "",
                "| key | type and range | default | tasks | what it is |",
                "|---|---|---|---|---|",
            ]
        tasks = ", ".join(key.tasks) if key.tasks != TASKS else "all"
        if key.source:
            tasks += f" (*{key.source}*)"
        lines.append(
            f"| `{key.name.rpartition('.')[2]}` | {_range_of(key)} | {_default_of(key)} | {tasks} | {key.line} |"
        )
    return "\n".join(lines) + "\n"


# Type of a key -> what the page and `--help` call it.
_TYPE_NAMES = {
    "whole": "whole number",
    "number": "number",
    "seed": "whole number, 0 to 2^32 - 1",
    "axis": "whole number >= 1, or -1",
    "text": "text",
    "switch": "True or False",
    "patterns": "tuple of texts",
    "names": "tuple of texts",
    "section": "section",
    "sources": "sources by name",
}


def _range_of(key: Key) -> str:
    # Of a choice, its values are all there is to say.
    if isinstance(key.range, tuple):
        return ", ".join(key.range)
    return f"{_TYPE_NAMES[key.type]} {key.range}".strip()


def _default_of(key: Key) -> str:
    if key.type == "sources":
        return "none"
    # One value where all tasks agree, else each with its task.
    shown = {task: _shown(value) for task, value in key.default.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{task} {value}" for task, value in shown.items())


def _shown(value: object) -> str:
    # Weights of the reward: every preset has its own.
    if value == {}:
        return "per preset"
    return f"{value:g}" if isinstance(value, float) else repr(value)
