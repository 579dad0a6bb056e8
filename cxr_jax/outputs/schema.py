"""JSON Schema `cxr_reading` v1 and a checker of the keywords that it uses, so that no package is needed to hold it.

The file beside this one is the schema, as other programs take it. The checker refuses a keyword that it does not know:
a rule that is not checked would be worse than none. Messages name places and rules, and never hold a value.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

NAME = "cxr_reading/1"
PATH = Path(__file__).with_name("cxr_reading.v1.json")
# Said of a schema, and nothing of a value.
_NOTES = {"$schema", "$id", "$defs", "title", "description"}
_MOST_PROBLEMS = 20


@functools.cache
def load() -> dict[str, Any]:
    """Read the schema. Shared by all callers: do not change it."""
    return json.loads(PATH.read_text())


def problems(document: object, schema: Mapping[str, Any] | None = None) -> list[str]:
    """List what is wrong with a document, at most 20 problems; [] if it is valid.

    Args:
        document: parsed JSON.
        schema: another one of the same keywords; None: `cxr_reading`.

    Raises:
        ValueError: for a schema with a keyword that is not known here.
    """
    root_schema = load() if schema is None else schema
    found_problems: list[str] = []
    _check(_Checked(document, root_schema, root_schema, "", found_problems))
    return found_problems[:_MOST_PROBLEMS]


class _Checked(NamedTuple):
    """A value and what it is held against.

    Attributes:
        value: any JSON.
        rules: keyword -> rule.
        root_schema: that has the definitions.
        value_place: where in the document it stands.
        found_problems: to which is added what is wrong.
    """

    value: Any
    rules: Mapping[str, Any]
    root_schema: Mapping[str, Any]
    value_place: str
    found_problems: list[str]

    def part(self, value: Any, rules: Mapping[str, Any], value_place: str) -> "_Checked":
        """The same check of a part of the value."""
        return self._replace(value=value, rules=rules, value_place=value_place)

    def add(self, problem: str) -> None:
        """Note what is wrong, at this place."""
        self.found_problems.append(f"{self.value_place or 'document'}: {problem}")


def _check(checked: _Checked) -> None:
    """Hold a value against its rules."""
    for keyword, keyword_rule in checked.rules.items():
        if len(checked.found_problems) >= _MOST_PROBLEMS or keyword in _NOTES:
            continue
        # References lead to the definitions of the same file, and nowhere else.
        if keyword == "$ref":
            definition = checked.root_schema["$defs"][keyword_rule.removeprefix("#/$defs/")]
            _check(checked._replace(rules=definition))
        elif keyword in _OF_PARTS:
            _OF_PARTS[keyword](checked, keyword_rule)
        elif keyword in _OF_VALUES:
            if not _OF_VALUES[keyword](checked.value, keyword_rule):
                checked.add(keyword)
        else:
            raise ValueError(f"the schema has a keyword that is not checked: {keyword}")


# ---- Keywords of a value ----


def _has_type(value: Any, names: str | list[str]) -> bool:
    return any(_TYPES[name](value) for name in ([names] if isinstance(names, str) else names))


def _is_number(value: Any) -> bool:
    # NaN and infinity are no JSON, though Python reads them.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer()


def _is_kind(kind: type) -> Callable[[Any], bool]:
    def is_kind(value: Any) -> bool:
        return isinstance(value, kind)

    return is_kind


# Booleans are no numbers, and whole floats are integers, as JSON Schema has it.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": _is_kind(dict),
    "array": _is_kind(list),
    "string": _is_kind(str),
    "boolean": _is_kind(bool),
    "null": _is_kind(type(None)),
    "number": _is_number,
    "integer": _is_integer,
}


def _is_same(value: Any, other: Any) -> bool:
    # In Python True is 1; in JSON it is not.
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _is_one_of(value: Any, options: list[Any]) -> bool:
    return any(_is_same(value, option) for option in options)


def _matches(value: Any, pattern: str) -> bool:
    return not isinstance(value, str) or re.search(pattern, value) is not None


def _is_long(value: Any, least_allowed: int) -> bool:
    return not isinstance(value, str) or len(value) >= least_allowed


def _is_short(value: Any, most_allowed: int) -> bool:
    return not isinstance(value, str) or len(value) <= most_allowed


def _has_at_least(value: Any, least_allowed: int) -> bool:
    return not isinstance(value, list) or len(value) >= least_allowed


def _has_at_most(value: Any, most_allowed: int) -> bool:
    return not isinstance(value, list) or len(value) <= most_allowed


def _is_from(value: Any, least_allowed: float) -> bool:
    return not _is_number(value) or value >= least_allowed


def _is_up_to(value: Any, most_allowed: float) -> bool:
    return not _is_number(value) or value <= most_allowed


def _is_unique(value: Any, wanted: bool) -> bool:
    if not wanted or not isinstance(value, list):
        return True
    # Compared as JSON, where the order of keys is no difference.
    texts = [json.dumps(item, sort_keys=True) for item in value]
    return len(set(texts)) == len(texts)


# Each is true of values that it does not speak of, as JSON Schema has it.
_OF_VALUES: dict[str, Callable[[Any, Any], bool]] = {
    "type": _has_type,
    "const": _is_same,
    "enum": _is_one_of,
    "pattern": _matches,
    "minLength": _is_long,
    "maxLength": _is_short,
    "minItems": _has_at_least,
    "maxItems": _has_at_most,
    "minimum": _is_from,
    "maximum": _is_up_to,
    "uniqueItems": _is_unique,
}


# ---- Keywords of parts of a value ----


def _check_required(checked: _Checked, names: list[str]) -> None:
    if isinstance(checked.value, dict):
        for name in names:
            if name not in checked.value:
                checked.add(f"{name} is missing")


def _check_properties(checked: _Checked, properties: Mapping[str, Any]) -> None:
    if isinstance(checked.value, dict):
        for name, rules_of_property in properties.items():
            if name in checked.value:
                inner_place = f"{checked.value_place}.{name}".lstrip(".")
                _check(checked.part(checked.value[name], rules_of_property, inner_place))


def _check_additional(checked: _Checked, are_allowed: bool) -> None:
    if isinstance(checked.value, dict) and not are_allowed:
        other_names = set(checked.value) - set(checked.rules.get("properties", ()))
        # They are not told: a name may be as private as a value.
        if other_names:
            checked.add(f"{len(other_names)} properties that the schema has not")


def _check_items(checked: _Checked, rules_of_items: Mapping[str, Any]) -> None:
    if isinstance(checked.value, list):
        for index, list_item in enumerate(checked.value):
            _check(checked.part(list_item, rules_of_items, f"{checked.value_place}[{index}]"))


def _check_any(checked: _Checked, options: list[Mapping[str, Any]]) -> None:
    for option in options:
        # What is wrong with one option is no news where another fits.
        own_problems: list[str] = []
        _check(checked._replace(rules=option, found_problems=own_problems))
        if not own_problems:
            return
    checked.add("anyOf")


_OF_PARTS: dict[str, Callable[[_Checked, Any], None]] = {
    "required": _check_required,
    "properties": _check_properties,
    "additionalProperties": _check_additional,
    "items": _check_items,
    "anyOf": _check_any,
}
