"""JSON that a stranger has sent, parsed within limits: what parsers differ about is refused, not guessed."""

import json
import math
from typing import Any, NoReturn

from cxr_jax.serve.refusals import RefusedError

_DEEPEST = 64  # levels of lists and objects; a request has seven at most
_SHOWN_NAME = 64  # characters of a field's name that an error repeats


def parse_object(body: bytes, most_elements: int) -> dict[str, Any]:
    """Parse a body that is to be one JSON object.

    Args:
        body: as it came.
        most_elements: commas and opening brackets in it, a cheap bound of what parsing will cost.

    Raises:
        RefusedError: 400 for anything else: other encodings than UTF-8, NaN and infinity, names that come twice, half
            characters, depth.
    """
    # Counted by the speed of memory, before a list of millions is built.
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > most_elements:
        raise _bad(f"the JSON has more than {most_elements:,} elements")
    # A text that is cut in the middle of a character is damaged, wherever it is.
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad("the body is not UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise _bad(f"the JSON is nested deeper than {_DEEPEST} levels") from None
    except ValueError:
        # Python's message quotes nothing of the text, but its numbers of characters help nobody either.
        raise _bad("the body is not JSON") from None
    if not isinstance(value, dict):
        raise _bad("the body must be a JSON object")
    _check(value, 1)
    return value


def field_name(name: str) -> str:
    """Make a client's own name of a field fit for a message or a header: ASCII letters, digits and a few signs."""
    kept = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-[]") else "?"
        for letter in name[:_SHOWN_NAME]
    )
    return kept or "?"


def _bad(message: str) -> RefusedError:
    return RefusedError(400, message, code="invalid_json")


def _refuse_constant(_constant: str) -> NoReturn:
    raise _bad("NaN and Infinity are no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no name comes twice: parsers keep the first or the last, and what is checked is not used."""
    as_object = dict(pairs)
    if len(as_object) < len(pairs):
        raise _bad("a name comes twice in one object")
    return as_object


def _check(value: Any, depth: int) -> None:
    """Refuse depth, half characters and numbers that no field could hold, wherever they are."""
    if depth > _DEEPEST:
        raise _bad(f"the JSON is nested deeper than {_DEEPEST} levels")
    if isinstance(value, str):
        # Half of a surrogate pair is valid JSON, and no text that could be encoded again.
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _bad("a text holds half a character (a lone surrogate)") from None
    elif isinstance(value, float):
        # 1e999 is JSON, and infinity to Python.
        if not math.isfinite(value):
            raise _bad("a number is too large")
    elif isinstance(value, dict):
        for name, inner_value in value.items():
            _check(name, depth)
            _check(inner_value, depth + 1)
    elif isinstance(value, list):
        for inner_value in value:
            _check(inner_value, depth + 1)
