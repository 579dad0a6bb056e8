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
from typing import Any

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
    root = load() if schema is None else schema
    found: list[str] = []
    _check(document, root, root, "", found)
    return found[:_MOST_PROBLEMS]


def _check(
    value: Any, rules: Mapping[str, Any], root: Mapping[str, Any], place: str, found: list[str]
) -> None:
    """Hold a value against rules, and add to `found` what is wrong."""
    for keyword, rule in rules.items():
        if len(found) >= _MOST_PROBLEMS or keyword in _NOTES:
            continue
        # References lead to the definitions of the same file, and nowhere else.
        if keyword == "$ref":
            _check(value, root["$defs"][rule.removeprefix("#/$defs/")], root, place, found)
        elif keyword in _OF_PARTS:
            _OF_PARTS[keyword](value, rule, rules, root, place, found)
        elif keyword in _OF_VALUES:
            if not _OF_VALUES[keyword](value, rule):
                found.append(f"{place or 'document'}: {keyword}")
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


def _is_long(value: Any, least: int) -> bool:
    return not isinstance(value, str) or len(value) >= least


def _is_short(value: Any, most: int) -> bool:
    return not isinstance(value, str) or len(value) <= most


def _has_at_least(value: Any, least: int) -> bool:
    return not isinstance(value, list) or len(value) >= least


def _has_at_most(value: Any, most: int) -> bool:
    return not isinstance(value, list) or len(value) <= most


def _is_from(value: Any, least: float) -> bool:
    return not _is_number(value) or value >= least


def _is_up_to(value: Any, most: float) -> bool:
    return not _is_number(value) or value <= most


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


# All take what `_check` takes, and the rules that their own stands beside.


def _check_required(value, rule, rules, root, place, found) -> None:  # noqa: ANN001  as _check
    if isinstance(value, dict):
        found += [f"{place or 'document'}: {name} is missing" for name in rule if name not in value]


def _check_properties(value, rule, rules, root, place, found) -> None:  # noqa: ANN001  as _check
    if isinstance(value, dict):
        for name, of_property in rule.items():
            if name in value:
                _check(value[name], of_property, root, f"{place}.{name}".lstrip("."), found)


def _check_additional(value, rule, rules, root, place, found) -> None:  # noqa: ANN001  as _check
    if not isinstance(value, dict):
        return
    others = set(value) - set(rules.get("properties", ()))
    # Their names are not told: a name may be as private as a value.
    if rule is False and others:
        found.append(f"{place or 'document'}: {len(others)} properties that the schema has not")


def _check_items(value, rule, rules, root, place, found) -> None:  # noqa: ANN001  as _check
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, rule, root, f"{place}[{index}]", found)


def _check_any(value, rule, rules, root, place, found) -> None:  # noqa: ANN001  as _check
    # What is wrong with one option is no news where another fits.
    for option in rule:
        tried: list[str] = []
        _check(value, option, root, place, tried)
        if not tried:
            return
    found.append(f"{place or 'document'}: anyOf")


_OF_PARTS: dict[str, Callable[..., None]] = {
    "required": _check_required,
    "properties": _check_properties,
    "additionalProperties": _check_additional,
    "items": _check_items,
    "anyOf": _check_any,
}
