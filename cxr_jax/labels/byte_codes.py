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
    text, line_length = _clean(data, inside)
    layers = _Layers(
        alone=jnp.asarray(BYTE_CODES, jnp.uint8)[text.at(0)],
        added=_code_ends(text),
        signs=_code_signs(text),
        stops=_code_stops(text),
        roles=_line_roles(text),
        line_length=line_length,
    )
    return _join(layers)


_MARGIN = 8  # zero bytes before and behind a text: no neighbour is farther


class _Text(NamedTuple):
    """Bytes of texts, between zeros: a neighbour is a slice, and no place needs to be looked at."""

    padded: jax.Array  # uint8 [L + 2 * _MARGIN, B]

    def at(self, steps: int) -> jax.Array:
        """uint8 [L, B]: the byte so many places further on (before, where negative); zero past both ends."""
        start = _MARGIN + steps
        return self.padded[start : start + self.padded.shape[0] - 2 * _MARGIN]


def _clean(data: Array, inside: Array) -> tuple[_Text, jax.Array]:
    """The texts, with a line feed for a carriage return alone; and how far back the newline before a byte is.

    The second is uint8 [L, B]: bytes since the newline, or since the start of the text; at most _FAR. In a loop: what a
    loop writes is computed once, and anything else by XLA for every neighbour that reads it.
    """
    data, inside = jnp.asarray(data), jnp.asarray(inside)
    length, batch_size = data.shape
    newline = ord("\n")

    def read_byte(
        index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        since, padded, counts = state
        behind = jnp.minimum(index + 1, length - 1)
        ends_line = inside[behind] & (data[behind] == newline) & (behind > index)
        here = jnp.where(inside[index], data[index], 0).astype(jnp.uint8)
        clean = jnp.where((here == ord("\r")) & ~ends_line, jnp.uint8(newline), here)
        counts = jax.lax.dynamic_update_index_in_dim(counts, since, index, 0)
        padded = jax.lax.dynamic_update_index_in_dim(padded, clean, index + _MARGIN, 0)
        further = (jnp.minimum(since, _FAR - 1) + 1).astype(jnp.uint8)
        return jnp.where(clean == newline, jnp.uint8(0), further), padded, counts

    start = (
        jnp.zeros(batch_size, jnp.uint8),
        jnp.zeros((length + 2 * _MARGIN, batch_size), jnp.uint8),
        jnp.zeros((length, batch_size), jnp.uint8),
    )
    _, padded, counts = jax.lax.fori_loop(0, length, read_byte, start)
    return _Text(padded), counts


class _Layers(NamedTuple):
    """What a byte's code is made of, uint8 [L, B] each; `_join` puts them together."""

    alone: jax.Array  # the code that a byte has in whatever word it stands
    added: jax.Array  # to that, for a word's last letter
    # Instead of that, 0 for none: a sign or mark that ends here, a decimal point, the x of a mark; and full stops that
    # may end nothing, and question marks that open a word.
    signs: jax.Array
    stops: jax.Array
    roles: jax.Array  # what the byte is to a line that starts with it
    line_length: jax.Array  # bytes since the newline before


def _code_ends(text: _Text) -> jax.Array:
    ends_word = _is_letter(text, 0) & ~_is_letter(text, 1)
    is_abbreviation = ends_word & _may_be_abbreviation(text)
    return _where(ends_word, LETTER_COUNT) + _where(is_abbreviation, CAPITALS)


def _code_signs(text: _Text) -> jax.Array:
    here, before, before_2, before_3 = (text.at(-steps) for steps in range(4))
    after = text.at(1)
    codes = _where(_is_point(text, 0), DECIMAL_POINT)
    is_sign = (here == 0xC3) & ((after == 0x97) | (after == 0xB7))
    codes |= _where(is_sign | _is_cross(text, 0), OTHER)
    is_arrow = (here == ord(">")) & ((before == ord("-")) | (before == ord("=")))
    codes |= _where(is_arrow, COLON)
    # Signs of several bytes get their code at the last of them.
    for (second, last), code in SIGNS.items():
        codes |= _where(_ends_sign(text, second, last), code)
    codes |= _where((here == 0xB7) & (before == 0xC2), STAR)  # a middle dot
    # A tab between words parts the cells of a table; behind "no" it is only a wide blank.
    is_cell = _is_ascii_letter(after) & _is_ascii_letter(before)
    is_cell &= _is_ascii_letter(before_2) & _is_ascii_letter(before_3)
    codes |= _where((here == ord("\t")) & is_cell, BAR)
    codes |= _where((here == ord("<")) & _is_tag(text), BREAK_SIGN)
    is_spaced = _is_blank(before) & _is_blank(after)
    is_stroke = (here == ord("-")) & (is_spaced | (before == ord("-")))
    # A stroke stands apart, is long, or is typed as two hyphens.
    codes |= _where(is_stroke | _ends_sign(text, 0x80, 0x94), STROKE)
    # A short dash is a long one between blanks, and else a hyphen.
    is_short_dash, is_apart = _ends_sign(text, 0x80, 0x93), _is_blank(before_3) & _is_blank(after)
    codes |= _where(is_short_dash & is_apart, STROKE) | _where(is_short_dash & ~is_apart, DASH)
    for opened, closed in ("()", "[]"):
        closes = here == ord(closed)
        # A number in brackets, by itself: the next of a list.
        is_number = closes & _is_digit(before) & (before_2 == ord(opened)) & _is_blank(after)
        codes |= _where(is_number & ~_is_alphanumeric(before_3), BREAK_SIGN)
        around_one = closes & (before_2 == ord(opened))
        is_no = (around_one & _is_any(before, "- ")) | (closes & (before == ord(opened)))
        codes |= _where(around_one & _is_any(before, "+xX"), YES) | _where(is_no, NO)
    return codes


def _code_stops(text: _Text) -> jax.Array:
    here, before, after, after_2, after_3 = (text.at(steps) for steps in (0, -1, 1, 2, 3))
    in_capitals = _is_capital(after_2) & (_is_capital(after_3) | _is_blank(after_3))
    goes_on = _is_lower(after_2) | _is_digit(after_2) | (_is_lower(before) & in_capitals)
    behind_word = _is_alphanumeric(before)
    is_soft = behind_word & _is_blank(after) & goes_on
    # A full stop directly before other punctuation ends nothing, whatever word it stands behind.
    is_inner = behind_word & _is_any(after, ",;:)")
    is_stop = (here == ord(".")) & ~_is_point(text, 0)
    codes = _where(is_stop & is_inner, OTHER) | _where(is_stop & is_soft & ~is_inner, SOFT_POINT)

    starts_line = (jnp.arange(here.shape[0])[:, None] == 0) | (before == ord("\n"))
    spaced_next = _is_blank(after) & _is_ascii_letter(after_2)
    is_apart = starts_line | (_is_blank(before) & _is_lower(after_2))
    opens_word = _is_ascii_letter(after) | (spaced_next & is_apart)
    opens_word &= ~(behind_word | _is_any(before, ")]*?"))
    return codes | _where((here == ord("?")) & opens_word, OPENING_QUESTION)


# ---- Bytes -----------------------------------------------------------------------------------------------------------


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


def _where(condition: jax.Array, value: int) -> jax.Array:
    """uint8: the value where the condition holds, 0 elsewhere."""
    return jnp.where(condition, jnp.uint8(value), jnp.uint8(0))


# ---- Bytes and their neighbours --------------------------------------------------------------------------------------


def _is_point(text: _Text, steps: int) -> jax.Array:
    """A point between digits."""
    before, here, after = (text.at(steps + further) for further in (-1, 0, 1))
    return (here == ord(".")) & _is_digit(before) & _is_digit(after)


def _is_cross(text: _Text, steps: int) -> jax.Array:
    """The x of a mark."""
    before, here, after = (text.at(steps + further) for further in (-1, 0, 1))
    pairs = [(before == ord(opened)) & (after == ord(closed)) for opened, closed in ("()", "[]")]
    return _is_any(here, "xX") & functools.reduce(operator.or_, pairs)


def _is_letter(text: _Text, steps: int) -> jax.Array:
    """A letter or digit of a word, or the point of a number."""
    is_word = _is_alphanumeric(text.at(steps)) & ~_is_cross(text, steps)
    return is_word | _is_point(text, steps)


def _ends_sign(text: _Text, second: int, last: int) -> jax.Array:
    """bool [L, B]: the last byte of a sign of three, of which the first is 0xE2."""
    return (text.at(0) == last) & (text.at(-1) == second) & (text.at(-2) == 0xE2)


def _is_tag(text: _Text) -> jax.Array:
    """bool [L, B]: what follows is a tag's name, but not that of bold or slanted words."""
    after, after_2, after_3 = (text.at(steps) for steps in (1, 2, 3))
    is_closing = after == ord("/")
    first, second = jnp.where(is_closing, after_2, after), jnp.where(is_closing, after_3, after_2)
    is_style = _is_any(first, "biuBIU") & (second == ord(">"))
    for name in ("em", "ma", "sp", "st", "su"):
        is_style |= (first | 0x20 == ord(name[0])) & (second | 0x20 == ord(name[1]))
    return (_is_ascii_letter(after) | is_closing) & ~is_style


def _may_be_abbreviation(text: _Text) -> jax.Array:
    """bool [L, B]: the last letters of words of 2 to 5 capitals beside a word that ends, or begins, in lower case."""
    lower_behind = _is_blank(text.at(1)) & _is_lower(text.at(2))
    run = _is_capital(text.at(0))
    found = jnp.zeros_like(run)
    for size in range(2, _LONGEST_ABBREVIATION + 1):
        run = run & _is_capital(text.at(1 - size))
        before, before_2 = text.at(-size), text.at(-size - 1)
        lower_before = _is_blank(before) & _is_lower(before_2)
        found |= run & ~_is_alphanumeric(before) & (lower_behind | lower_before)
    return found


# ---- Lines -----------------------------------------------------------------------------------------------------------

# What a byte is to the line that starts with it, as bits.
_CAPITAL, _NUMBER_OR_TITLE, _FIELD = 1, 2, 4  # kinds of starts; no byte is a field by itself,
_CLOSING = _FIELD  # so the bit is free for a bracket
_LETTER, _IN_FIELD, _COLON, _SKIPPED, _NEWLINE = 8, 16, 32, 64, 128
_FAR = 255


def _line_roles(text: _Text) -> jax.Array:
    here, after, after_2 = (text.at(steps) for steps in range(3))
    is_capital, is_digit, is_blank = _is_capital(here), _is_digit(here), _is_blank(here)
    after_point = (after == ord(".")) & ~_is_digit(after_2)
    before_bracket = (is_digit | _is_ascii_letter(here)) & (after == ord(")"))
    is_number = (is_digit & after_point) | before_bracket
    is_title = is_capital & (_is_lower(after) | (_is_blank(after) & _is_lower(after_2)))
    roles = {
        _CAPITAL: is_capital,
        _NUMBER_OR_TITLE: is_number | is_title,
        _LETTER: _is_ascii_letter(here),
        _IN_FIELD: _is_alphanumeric(here) | _is_any(here, " \t/-*()_"),
        _CLOSING: _is_any(here, ")]"),
        _COLON: _is_any(here, ":=") & ~_is_digit(after),
        _SKIPPED: is_blank | _is_any(here, "*#_\"'>"),
        _NEWLINE: here == ord("\n"),
    }
    return functools.reduce(operator.or_, [_where(holds, bit) for bit, holds in roles.items()])


class _NextLine(NamedTuple):
    """What `_join` knows of the bytes behind, uint8 [B], and its result. Few arrays: see `_clean`."""

    to_colon: jax.Array  # bytes of a field up to its colon
    # What the start of a line that began here would be, as bits; _CLOSES_WORD: one word or less, and then a closing
    # bracket; and times _SKIPPED_ONE, bytes up to that start.
    start: jax.Array
    codes: jax.Array  # [L, B]


_KINDS = _CAPITAL | _NUMBER_OR_TITLE | _FIELD
_CLOSES_WORD, _SKIPPED_ONE, _MOST_SKIPPED = 8, 16, 15


def _join(layers: _Layers) -> jax.Array:
    """Join the layers, from the end of the text: what a newline is depends on the line behind it."""
    length = layers.roles.shape[0]

    def read_byte(step: jax.Array, behind: _NextLine) -> _NextLine:
        index = length - 1 - step
        here = _Layers(*(layer[index] for layer in layers))
        role, skipped = here.roles, behind.start // _SKIPPED_ONE
        starts = jnp.where(skipped < _START_WITHIN, behind.start, 0)
        unless_hanging = starts & (_NUMBER_OR_TITLE | _FIELD) != 0
        unless_hanging |= (starts & _CAPITAL != 0) & (here.line_length < _SHORT_LINE)
        newline = jnp.where(unless_hanging, NEWLINE_UNLESS_HANGING, NEWLINE)
        code = jnp.where(role & _NEWLINE != 0, newline, here.alone + here.added)
        # Brackets around one word part nothing.
        is_transparent = (code == BRACKET) & (behind.start & _CLOSES_WORD != 0)
        code = jnp.where(is_transparent, OTHER, code)
        instead = here.signs | here.stops
        code = jnp.where(instead != 0, instead, code).astype(jnp.uint8)

        # The start of a line passes over what is skipped; a field is a run of bytes up to a colon.
        further = jnp.where(role & _IN_FIELD != 0, jnp.minimum(behind.to_colon, _FAR - 1) + 1, _FAR)
        to_colon = jnp.where(role & _COLON != 0, 0, further).astype(jnp.uint8)
        is_field = (role & _LETTER != 0) & (to_colon < _LONGEST_FIELD)
        kind = (role & (_CAPITAL | _NUMBER_OR_TITLE)) | _where(is_field, _FIELD)
        one_more = jnp.minimum(skipped + 1, _MOST_SKIPPED) * _SKIPPED_ONE
        is_skipped = role & _SKIPPED != 0
        start = jnp.where(is_skipped, (behind.start & _KINDS) | one_more, kind)
        closes = _where(role & _CLOSING != 0, _CLOSES_WORD)
        closes = jnp.where(role & _LETTER != 0, behind.start & _CLOSES_WORD, closes)
        return _NextLine(
            to_colon=to_colon,
            start=(start | closes).astype(jnp.uint8),
            codes=jax.lax.dynamic_update_index_in_dim(behind.codes, code, index, 0),
        )

    zero = jnp.zeros(layers.roles.shape[1], jnp.uint8)
    start = _NextLine(zero + _FAR, zero, jnp.zeros_like(layers.roles))
    return jax.lax.fori_loop(0, length, read_byte, start).codes
