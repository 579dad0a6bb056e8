"""Rows of JSON: one object a line, or one array of objects. The one reader of every tool that takes such rows.

A byte order mark, CR LF, blank lines and gzip are read. A row is refused that two readers could understand differently:
a key that stands twice in one object, a line that is cut off. No reason holds anything that was read.
"""

import functools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cxr_jax.data import radiograph
from cxr_jax.errors import UserError

NOT_JSON = "not valid JSON"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_GZIP_MARK = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")


class BadRowError(Exception):
    """A row that is refused; the message is the reason."""


class JsonRow(NamedTuple):
    """A row of a file, or why it is none.

    Attributes:
        number: from 1, of the line, blank ones counted; in an array, of the element.
        place: how a message names it: "line 3", "row 3".
        record: the object, or the reason why there is none.
    """

    number: int
    place: str
    record: dict[str, Any] | BadRowError


# ---- One object ------------------------------------------------------------------------------------


def parse_object(text: str) -> dict[str, Any]:
    """Parse the JSON object that a line holds.

    Raises:
        BadRowError: not JSON, no object, or a key that occurs twice, at any depth.
    """
    start = _skip_space(text, 0)
    record, end = _parse_value(text, start)
    if _skip_space(text, end) != len(text):
        raise BadRowError(NOT_JSON)
    return _check_object(record)


class _Doubled(dict):
    """An object that has a key twice, or holds one that has."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    # json would take the last of the two; another reader the first.
    if len(made) < len(pairs) or any(_is_doubled(value) for value in made.values()):
        return _Doubled(made)
    return made


def _is_doubled(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_doubled, value))
    return isinstance(value, _Doubled)


_decoder = json.JSONDecoder(object_pairs_hook=_make_object)


def _parse_value(text: str, start: int) -> tuple[Any, int]:
    try:
        return _decoder.raw_decode(text, start)
    except (ValueError, RecursionError):  # ValueError: also a number of too many digits
        raise BadRowError(NOT_JSON) from None


def _check_object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRowError("not a JSON object")
    if isinstance(record, _Doubled):
        raise BadRowError("a key occurs twice in one object")
    return record


def is_null(value: object) -> bool:
    """Whether a value says that there is none: null, or NaN, as pandas writes a missing cell."""
    return value is None or value != value


def is_absent(value: object) -> bool:
    """Whether a value is as none at all: data sets that were joined fill what a row lacks with null, NaN, "" or []."""
    return is_null(value) or value == "" or value == []


# ---- One file --------------------------------------------------------------------------------------


def read_rows(path: str | Path, undecodable: str = "strict") -> Iterator[JsonRow]:
    """Read the rows of a file; in an array nothing is read after a row that is not JSON.

    Args:
        undecodable: what becomes of bytes that are not UTF-8, as for `bytes.decode`; "strict" refuses the row.

    Raises:
        UserError: for a file that cannot be used as a whole: missing, too large, damaged gzip, UTF-16.
    """
    content = read_content(path)
    if is_array(content[:64].decode("utf-8", "replace")):
        yield from _array_rows(content, undecodable)
    else:
        yield from _line_rows(content, undecodable)


def is_array(start: str) -> bool:
    """Whether a text that begins so is a JSON array, and no JSON Lines."""
    return start.lstrip("\ufeff \t\r\n").startswith("[")


def read_content(path: str | Path) -> bytes:
    """Read a file of text, unpacked if it is gzip data, without a byte order mark.

    Raises:
        UserError: for a file that is missing, above the limit of size (unpacked, too), damaged gzip data or UTF-16.
    """
    content = radiograph.read_bytes(path)
    if content.startswith(_GZIP_MARK):
        content = _unpack(path, content)
    if content.startswith(_UTF_16_MARKS):
        raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
    return content.removeprefix(_BYTE_ORDER_MARK)


def _unpack(path: str | Path, packed: bytes) -> bytes:
    limit = radiograph.MAX_FILE_BYTES
    parts, unpacked_bytes = [], 0
    # gzip files may be joined: each part has an end of its own.
    while packed:
        unpacker = zlib.decompressobj(wbits=31)
        try:
            part = unpacker.decompress(packed, limit + 1 - unpacked_bytes)
        except zlib.error:
            raise UserError(f"{path}: the compressed data is damaged") from None
        unpacked_bytes += len(part)
        if unpacked_bytes > limit:
            raise UserError(f"{path}: unpacked it is above the limit of {limit // 2**20} MiB")
        if not unpacker.eof:
            raise UserError(f"{path}: the compressed data is cut off")
        parts.append(part)
        packed = unpacker.unused_data
    return b"".join(parts)


def _line_rows(content: bytes, undecodable: str) -> Iterator[JsonRow]:
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record: dict[str, Any] | BadRowError = parse_object(_decode(line, undecodable))
        except BadRowError as reason:
            is_last = not any(map(bytes.strip, lines[number:]))
            record = _explain(reason, content, number, is_last)
        yield JsonRow(number, f"line {number}", record)


def _explain(reason: BadRowError, content: bytes, number: int, is_last: bool) -> BadRowError:
    """The reason with what most likely happened, where the line alone does not tell."""
    if str(reason) != NOT_JSON:
        return reason
    if number == 1 and not is_last and _is_one_value(content):
        return BadRowError(f"{NOT_JSON}: rows go one a line, or into an array [..]")
    if is_last and not content.endswith((b"\n", b"\r")):
        return BadRowError(f"{NOT_JSON}: the last line is cut off")
    return reason


def _is_one_value(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _array_rows(content: bytes, undecodable: str) -> Iterator[JsonRow]:
    try:
        text = _decode(content, undecodable)
    except BadRowError as reason:
        yield JsonRow(1, "row 1", reason)
        return
    position, number = _skip_space(text, text.index("[") + 1), 0
    if text[position : position + 1] == "]":
        number, problem = 1, _end_problem(text, position)
        if problem:
            yield JsonRow(number, f"row {number}", problem)
        return
    while True:
        number += 1
        place = functools.partial(JsonRow, number, f"row {number}")
        try:
            value, position = _parse_value(text, position)
        except BadRowError as reason:
            yield place(BadRowError(f"{reason}; nothing after this row was read"))
            return
        try:
            yield place(_check_object(value))
        except BadRowError as reason:
            yield place(reason)
        # What stands between two rows.
        position = _skip_space(text, position)
        sign = text[position : position + 1]
        if sign != ",":
            break
        position = _skip_space(text, position + 1)
    problem = _end_problem(text, position)
    if problem:
        yield JsonRow(number + 1, f"row {number + 1}", problem)


def _end_problem(text: str, position: int) -> BadRowError | None:
    """What is wrong with the end of an array, which should be at `position`."""
    if position == len(text):
        return BadRowError(f"{NOT_JSON}: the array is cut off")
    if text[position] != "]" or _skip_space(text, position + 1) != len(text):
        return BadRowError(NOT_JSON)
    return None


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None, "it matches nothing at all, too"
    return match.end()


def _decode(data: bytes, undecodable: str) -> str:
    try:
        return data.decode("utf-8", undecodable)
    except UnicodeDecodeError:
        raise BadRowError("not UTF-8 text") from None
