"""Section 1 of docs/report_parser.md on the device: each byte of a text gets a code, which depends on its neighbours.

All bytes at once: a code is made of a few shifted copies of the text. What depends on words (whether what stands before
a line end hangs, whether a mark leads) is left to `labels/phrase_search.py`.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.labels.automaton import Array
from cxr_jax.labels.phrase_bank import (
    BAR,
    BRACKET,
    BREAK_SIGN,
    BYTE_CODES,
    CAPITALS,
    COLON,
    DASH,
    DECIMAL_POINT,
    LETTER_COUNT,
    NEWLINE,
    NEWLINE_BEFORE_FIELD,
    NEWLINE_UNLESS_HANGING,
    NO,
    OPENING_QUESTION,
    OTHER,
    SIGNS,
    SOFT_POINT,
    STAR,
    STROKE,
    YES,
)

_START_WITHIN = 8  # bytes behind a newline in which the next line's start is looked for
_SHORT_LINE, _LONGEST_FIELD = 32, 32  # bytes; both have fewer
_LONGEST_ABBREVIATION = 5


def code_bytes(data: Array, inside: Array) -> jax.Array:
    """Give each byte its code, of `labels/phrase_bank.py`.

    Args:
        data: uint8 [L, B].
        inside: bool [L, B]: which bytes belong to their text.

    Returns:
        uint8 [L, B]. A word's last letter has a code of its own, and CAPITALS beside it where it may be an
        abbreviation; a point between digits is a letter.
    """
    data = _clean(data, inside)
    layers = _Layers(
        alone=jnp.asarray(BYTE_CODES, jnp.uint8)[data],
        added=_code_ends(data),
        signs=_code_signs(data),
        stops=_code_stops(data),
        roles=_line_roles(data),
        line_length=_bytes_since_newline(data == ord("\n")),
    )
    return _join(layers)


def _clean(data: Array, inside: Array) -> jax.Array:
    """uint8 [L, B]: 0 outside of the texts, a line feed for a carriage return alone. In a loop: see `_Layers`."""
    data, inside = jnp.asarray(data), jnp.asarray(inside)
    length, batch_size = data.shape

    def read_byte(
        step: jax.Array, state: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        behind, cleaned = state
        index = length - 1 - step
        here = jnp.where(inside[index], data[index], 0).astype(jnp.uint8)
        is_return = (here == ord("\r")) & (behind != ord("\n"))
        clean = jnp.where(is_return, jnp.uint8(ord("\n")), here)
        return here, jax.lax.dynamic_update_index_in_dim(cleaned, clean, index, 0)

    start = (jnp.zeros(batch_size, jnp.uint8), jnp.zeros((length, batch_size), jnp.uint8))
    return jax.lax.fori_loop(0, length, read_byte, start)[1]


class _Layers(NamedTuple):
    """What a byte's code is made of, uint8 [L, B] each. A loop joins them: in one expression, XLA would compute each
    for every neighbour that reads it."""

    alone: jax.Array  # the code that a byte has in whatever word it stands
    added: jax.Array  # to that, for a word's last letter
    signs: jax.Array  # instead of that: a sign or mark that ends here, a decimal point, the x of a mark; 0 for none
    stops: (
        jax.Array
    )  # likewise: full stops that may end nothing, and question marks that open a word
    roles: jax.Array  # what the byte is to a line that starts with it
    line_length: jax.Array  # bytes since the newline before


def _code_ends(data: jax.Array) -> jax.Array:
    is_digit = _is_digit(data)
    is_point = (data == ord(".")) & _shift(is_digit, -1) & _shift(is_digit, 1)
    is_letter = (_is_alphanumeric(data) & ~_is_cross(data)) | is_point
    ends_word = is_letter & ~_shift(is_letter, 1)
    is_abbreviation = ends_word & _may_be_abbreviation(data)
    return _where(ends_word, LETTER_COUNT) + _where(is_abbreviation, CAPITALS)


def _code_signs(data: jax.Array) -> jax.Array:
    before, before_2, after = _shift(data, -1), _shift(data, -2), _shift(data, 1)
    is_digit = _is_digit(data)
    is_point = (data == ord(".")) & _shift(is_digit, -1) & _shift(is_digit, 1)
    codes = _where(is_point, DECIMAL_POINT)
    is_sign = (data == 0xC3) & ((after == 0x97) | (after == 0xB7))
    codes |= _where(is_sign | _is_cross(data), OTHER)
    is_arrow = (data == ord(">")) & ((before == ord("-")) | (before == ord("=")))
    codes |= _where(is_arrow, COLON)
    # Signs of several bytes get their code at the last of them.
    for (second, last), code in SIGNS.items():
        codes |= _where(_ends_sign(data, second, last), code)
    codes |= _where((data == 0xB7) & (before == 0xC2), STAR)  # a middle dot
    # A tab between words parts the cells of a table; behind "no" it is only a wide blank.
    is_cell = _is_ascii_letter(after) & _is_ascii_letter(before)
    is_cell &= _is_ascii_letter(before_2) & _is_ascii_letter(_shift(data, -3))
    codes |= _where((data == ord("\t")) & is_cell, BAR)
    codes |= _where((data == ord("<")) & _is_tag(data), BREAK_SIGN)
    is_spaced = _is_blank(before) & _is_blank(after)
    is_stroke = (data == ord("-")) & (is_spaced | (before == ord("-")))
    # A stroke stands apart, is long, or is typed as two hyphens.
    before_3 = _shift(data, -3)
    codes |= _where(is_stroke | _ends_sign(data, 0x80, 0x94), STROKE)
    # A short dash is a long one between blanks, and else a hyphen.
    is_short_dash, is_apart = _ends_sign(data, 0x80, 0x93), _is_blank(before_3) & _is_blank(after)
    codes |= _where(is_short_dash & is_apart, STROKE) | _where(is_short_dash & ~is_apart, DASH)
    for opened, closed in ("()", "[]"):
        closes = data == ord(closed)
        # A number in brackets, by itself: the next of a list.
        is_number = closes & _is_digit(before) & (before_2 == ord(opened)) & _is_blank(after)
        codes |= _where(is_number & ~_is_alphanumeric(before_3), BREAK_SIGN)
        around_one = closes & (before_2 == ord(opened))
        is_no = (around_one & _is_any(before, "- ")) | (closes & (before == ord(opened)))
        codes |= _where(around_one & _is_any(before, "+xX"), YES) | _where(is_no, NO)
    return codes


def _code_stops(data: jax.Array) -> jax.Array:
    is_blank, is_digit, is_word = _is_blank(data), _is_digit(data), _is_alphanumeric(data)
    is_lower = _is_lower(data)
    is_point = _shift(is_digit, -1) & _shift(is_digit, 1)
    is_capital = _is_capital(data)
    in_capitals = is_capital & _shift(is_capital | is_blank, 1)
    goes_on = _shift(is_lower | is_digit, 2) | (_shift(is_lower, -1) & _shift(in_capitals, 2))
    is_soft = _shift(is_word, -1) & _shift(is_blank, 1) & goes_on
    # A full stop directly before other punctuation ends nothing, whatever word it stands behind.
    is_inner = _shift(is_word, -1) & _is_any(_shift(data, 1), ",;:)")
    opens_word = _shift(_is_ascii_letter(data), 1)
    before = _shift(data, -1)
    starts_line = (jnp.arange(data.shape[0])[:, None] == 0) | (before == ord("\n"))
    spaced_next = _shift(is_blank, 1) & _shift(_is_ascii_letter(data), 2)
    opens_word |= spaced_next & (starts_line | (_is_blank(before) & _shift(is_lower, 2)))
    opens_word &= ~(_shift(is_word, -1) | _is_any(before, ")]*?"))
    is_stop = (data == ord(".")) & ~is_point
    codes = _where(is_stop & is_inner, OTHER) | _where(is_stop & is_soft & ~is_inner, SOFT_POINT)
    return codes | _where((data == ord("?")) & opens_word, OPENING_QUESTION)


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def _shift(values: jax.Array, steps: int) -> jax.Array:
    """Values [L, B] so many places further on (before, where negative); zero past both ends."""
    length = values.shape[0]
    if abs(steps) >= length:
        return jnp.zeros_like(values)
    if steps >= 0:
        return jnp.pad(values[steps:], ((0, steps), (0, 0)))
    return jnp.pad(values[:steps], ((-steps, 0), (0, 0)))


def _is_any(data: jax.Array, characters: str) -> jax.Array:
    return functools.reduce(operator.or_, [data == ord(character) for character in characters])


def _is_digit(data: jax.Array) -> jax.Array:
    return (data >= ord("0")) & (data <= ord("9"))


def _is_lower(data: jax.Array) -> jax.Array:
    return (data >= ord("a")) & (data <= ord("z"))


def _is_blank(data: jax.Array) -> jax.Array:
    return _is_any(data, " \t")


def _is_capital(data: jax.Array) -> jax.Array:
    return (data >= ord("A")) & (data <= ord("Z"))


def _is_ascii_letter(data: jax.Array) -> jax.Array:
    folded = data | 0x20
    return (folded >= ord("a")) & (folded <= ord("z"))


def _is_alphanumeric(data: jax.Array) -> jax.Array:
    return _is_ascii_letter(data) | _is_digit(data)


def _ends_sign(data: jax.Array, second: int, last: int) -> jax.Array:
    """bool [L, B]: the last byte of a sign of three, of which the first is 0xE2."""
    return (data == last) & (_shift(data, -1) == second) & (_shift(data, -2) == 0xE2)


def _is_tag(data: jax.Array) -> jax.Array:
    """bool [L, B]: what follows is a tag's name, but not that of bold or slanted words."""
    after, after_2, after_3 = (_shift(data, steps) for steps in (1, 2, 3))
    is_closing = after == ord("/")
    first, second = jnp.where(is_closing, after_2, after), jnp.where(is_closing, after_3, after_2)
    is_style = _is_any(first, "biuBIU") & (second == ord(">"))
    for name in ("em", "ma", "sp", "st", "su"):
        is_style |= (first | 0x20 == ord(name[0])) & (second | 0x20 == ord(name[1]))
    return (_is_ascii_letter(after) | is_closing) & ~is_style


def _is_cross(data: jax.Array) -> jax.Array:
    """The x of a mark."""
    before, behind = _shift(data, -1), _shift(data, 1)
    pairs = [(before == ord(opened)) & (behind == ord(closed)) for opened, closed in ("()", "[]")]
    return _is_any(data, "xX") & functools.reduce(operator.or_, pairs)


def _where(condition: jax.Array, value: int) -> jax.Array:
    """uint8: the value where the condition holds, 0 elsewhere."""
    return jnp.where(condition, jnp.uint8(value), jnp.uint8(0))


# ---- What reaches further --------------------------------------------------------------------------------------------


def _may_be_abbreviation(data: jax.Array) -> jax.Array:
    """bool [L, B]: the last letters of words of 2 to 5 capitals beside a word that ends, or begins, in lower case."""
    is_capital, is_word = _is_capital(data), _is_alphanumeric(data)
    is_blank, is_lower = _is_blank(data), _is_lower(data)
    lower_behind = _shift(is_blank, 1) & _shift(is_lower, 2)
    run, found = is_capital, jnp.zeros_like(is_capital)
    for size in range(2, _LONGEST_ABBREVIATION + 1):
        run = run & _shift(is_capital, 1 - size)
        lower_before = _shift(is_blank, -size) & _shift(is_lower, -size - 1)
        found |= run & ~_shift(is_word, -size) & (lower_behind | lower_before)
    return found


# What a byte is to the line that starts with it, as bits.
_CAPITAL, _NUMBER_OR_TITLE, _FIELD = 1, 2, 4  # kinds of starts; no byte is a field by itself,
_CLOSING = _FIELD  # so the bit is free for a bracket
_LETTER, _IN_FIELD, _COLON, _SKIPPED, _NEWLINE = 8, 16, 32, 64, 128
_FAR = 255


def _line_roles(data: jax.Array) -> jax.Array:
    is_capital, is_digit, is_blank = _is_capital(data), _is_digit(data), _is_blank(data)
    after_point = _is_any(_shift(data, 1), ".") & ~_shift(is_digit, 2)
    before_bracket = (is_digit | _is_ascii_letter(data)) & _is_any(_shift(data, 1), ")")
    is_number = (is_digit & after_point) | before_bracket
    is_lower = _is_lower(data)
    is_title = is_capital & (_shift(is_lower, 1) | (_shift(is_blank, 1) & _shift(is_lower, 2)))
    roles = {
        _CAPITAL: is_capital,
        _NUMBER_OR_TITLE: is_number | is_title,
        _LETTER: _is_ascii_letter(data),
        _IN_FIELD: _is_alphanumeric(data) | _is_any(data, " \t/-*()_"),
        _CLOSING: _is_any(data, ")]"),
        _COLON: _is_any(data, ":=") & ~_shift(is_digit, 1),
        _SKIPPED: is_blank | _is_any(data, "*#_\"'>"),
        _NEWLINE: data == ord("\n"),
    }
    return functools.reduce(operator.or_, [_where(holds, bit) for bit, holds in roles.items()])


def _bytes_since_newline(is_newline: jax.Array) -> jax.Array:
    """uint8 [L, B]: bytes since the newline before, or since the start of the text; at most _FAR."""

    def read_byte(
        index: jax.Array, state: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        since, counts = state
        counts = jax.lax.dynamic_update_index_in_dim(counts, since, index, 0)
        since = jnp.where(is_newline[index], 0, jnp.minimum(since, _FAR - 1) + 1).astype(jnp.uint8)
        return since, counts

    zero = jnp.zeros(is_newline.shape[1], jnp.uint8)
    start = (zero, jnp.zeros(is_newline.shape, jnp.uint8))
    return jax.lax.fori_loop(0, is_newline.shape[0], read_byte, start)[1]


class _NextLine(NamedTuple):
    """What `_join` knows of the bytes behind, uint8 [B], and its result."""

    to_colon: jax.Array  # bytes of a field up to its colon
    kind: jax.Array  # what the start of a line that began here would be, as bits
    skipped: jax.Array  # bytes up to that start
    closes_word: jax.Array  # 1: one word or less, and then a closing bracket
    codes: jax.Array  # [L, B]


def _join(layers: _Layers) -> jax.Array:
    """Join the layers, from the end of the text: what a newline is depends on the line behind it."""
    length = layers.roles.shape[0]

    def read_byte(step: jax.Array, behind: _NextLine) -> _NextLine:
        index = length - 1 - step
        here = _Layers(*(layer[index] for layer in layers))
        role = here.roles
        starts = jnp.where(behind.skipped < _START_WITHIN, behind.kind, 0)
        capital = (starts & _CAPITAL != 0) & (here.line_length < _SHORT_LINE)
        unless_hanging = (starts & _NUMBER_OR_TITLE != 0) | capital
        newline = jnp.where(unless_hanging, NEWLINE_UNLESS_HANGING, NEWLINE)
        newline = jnp.where(starts & _FIELD != 0, NEWLINE_BEFORE_FIELD, newline)
        code = jnp.where(role & _NEWLINE != 0, newline, here.alone + here.added)
        # Brackets around one word part nothing.
        is_transparent = (code == BRACKET) & (behind.closes_word == 1)
        code = jnp.where(is_transparent, OTHER, code)
        instead = here.signs | here.stops
        code = jnp.where(instead != 0, instead, code).astype(jnp.uint8)

        # The start of a line passes over what is skipped; a field is a run of bytes up to a colon.
        further = jnp.where(role & _IN_FIELD != 0, jnp.minimum(behind.to_colon, _FAR - 1) + 1, _FAR)
        to_colon = jnp.where(role & _COLON != 0, 0, further).astype(jnp.uint8)
        is_field = (role & _LETTER != 0) & (to_colon < _LONGEST_FIELD)
        kind = (role & (_CAPITAL | _NUMBER_OR_TITLE)) | _where(is_field, _FIELD)
        is_skipped = role & _SKIPPED != 0
        skipped = jnp.minimum(behind.skipped, _FAR - 1) + 1
        closes_word = jnp.where(
            role & _LETTER != 0, behind.closes_word, _where(role & _CLOSING != 0, 1)
        )
        return _NextLine(
            to_colon=to_colon,
            kind=jnp.where(is_skipped, behind.kind, kind),
            skipped=jnp.where(is_skipped, skipped, 0).astype(jnp.uint8),
            closes_word=closes_word,
            codes=jax.lax.dynamic_update_index_in_dim(behind.codes, code, index, 0),
        )

    zero = jnp.zeros(layers.roles.shape[1], jnp.uint8)
    start = _NextLine(zero + _FAR, zero, zero, zero, jnp.zeros_like(layers.roles))
    return jax.lax.fori_loop(0, length, read_byte, start).codes
