"""The phrases of texts, found on the device: which byte ends a word, which phrase ends there, which phrases count.

Two of the parser's three passes (`labels/report_text.py` has the third): forward over the bytes, and backward over the
tokens, since of two phrases that overlap the one that ends last is taken, and hides what it covers. Tables, vectorised
over the batch; batches stand on the last axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.labels.phrase_bank import (
    AFTER_DASH,
    ARROW,
    BRACKET,
    BREAK_SIGN,
    CAPITALS,
    CLASS_MASK,
    COLON,
    DASH,
    ENDS_TOKEN,
    FLAG_SHIFT,
    FOUND_ITEM_BITS,
    FOUND_ITEM_MASK,
    LEADS,
    NEWLINE,
    NEWLINE_UNLESS_HANGING,
    NO,
    SOFT_POINT,
    STROKE,
    STROKE_TOKEN,
    YES,
    PhraseBank,
)
from cxr_jax.labels.phrase_tables import WordFlags


class Evidence(NamedTuple):
    """What the words of each text tell of its language, and of what was not read; int32 [B]."""

    english: jax.Array  # 2 for each word of [words] english
    foreign: jax.Array  # 4 for each word of [words] foreign, 1 for each letter that is not ASCII
    unread: jax.Array  # words that look like findings and are not known


class _Search(NamedTuple):
    """What `find_phrases` knows after some bytes; few arrays, since a loop computes each by itself."""

    word: jax.Array  # int32 [B]: state of the table of words, as an offset into it
    phrase: jax.Array  # int32 [B]: state of the table of phrases
    line: (
        jax.Array
    )  # int32 [B]: `WordFlags` of the last word or token, and `_LINE_IS_BLANK`, `_MARKS_LEAD`
    ends: jax.Array  # int16 [L + 1, B]: the result
    told: jax.Array  # uint8 [L, B]: what the word or token that ends at a byte tells, `_ENGLISH` ..


# No word or token stands on the line so far; a mark was the first on the line.
_LINE_IS_BLANK, _MARKS_LEAD = (1 << len(WordFlags) + place for place in range(2))
_ALL_FLAGS = (1 << len(WordFlags)) - 1
_ENGLISH, _FOREIGN_WORD, _FOREIGN_LETTER, _UNREAD = (1 << bit for bit in range(4))


def find_phrases(
    bank: PhraseBank, codes: jax.Array, longest: jax.Array
) -> tuple[jax.Array, Evidence]:
    """Run the tables of words and of phrases over codes uint8 [L, B], from the left.

    Args:
        bank: the lexicon.
        codes: from `byte_codes.code_bytes`.
        longest: int, bytes of the longest text; none past it are looked at.

    Returns:
        int16 [L + 1, B]: 1 + the state of the phrase table at the last byte of every word and token, 0 elsewhere; the
        last is the break at the end of the text. And what the words tell.
    """
    words = jnp.asarray(bank.words)
    colon, stroke = words[COLON], words[STROKE_TOKEN]

    def read_byte(index: jax.Array, search: _Search) -> _Search:
        code_and_case = codes[index].astype(jnp.int32)
        code = code_and_case & (CAPITALS - 1)
        # Marks lead on a line that begins with one.
        is_mark = (code == YES) | (code == NO)
        is_blank = search.line & _LINE_IS_BLANK != 0
        marks_lead = (search.line & _MARKS_LEAD != 0) | (is_mark & is_blank)
        code = jnp.where(is_mark & marks_lead, code + LEADS, code)
        cell = words[search.word + code]

        # A stroke or an arrow that is no break is a token of its own.
        passes, is_break = _passes(code, search.line, is_blank, marks_lead)
        is_sign = ((code == STROKE) | (code == ARROW)) & ~is_break
        cell = jnp.where(is_sign, jnp.where(code == ARROW, colon, stroke), cell)
        ends_here = cell >= ENDS_TOKEN
        is_token = ends_here & (~passes | is_sign)

        # A word or token takes the table of phrases one step on.
        word_class = jnp.where(is_token, cell & CLASS_MASK, 0)
        phrase = jnp.where(is_token, _next_phrase(bank, search.phrase, word_class), search.phrase)
        ends = jnp.where(is_token, phrase + 1, 0).astype(search.ends.dtype)
        # Behind a dash that is no token the next word is dashed; other signs that are none change nothing.
        behind_sign = jnp.where(code == DASH, AFTER_DASH, search.word)
        word = jnp.where(is_token, 0, behind_sign)

        flags = _flags_of(cell, search.line)
        told = jnp.where(is_token, _told(flags, code_and_case), 0).astype(search.told.dtype)
        flags = jnp.where(is_token, flags, search.line & _ALL_FLAGS)
        return _Search(
            word=jnp.where(ends_here, word, cell),
            phrase=phrase,
            line=flags | _line_marks(code, is_blank, marks_lead),
            ends=jax.lax.dynamic_update_index_in_dim(search.ends, ends, index, 0),
            told=jax.lax.dynamic_update_index_in_dim(search.told, told, index, 0),
        )

    # Bytes past the longest text of the batch are many where a budget is fixed, as in RL: they are not looked at.
    search = jax.lax.fori_loop(0, longest, read_byte, _start_of_search(codes))
    # The end of the text is a break.
    break_class = words[NEWLINE] & CLASS_MASK
    at_end = _next_phrase(bank, search.phrase, break_class) + 1
    return search.ends.at[-1].set(at_end.astype(jnp.int16)), _gather_evidence(search.told)


def _start_of_search(codes: jax.Array) -> _Search:
    """What is known before the first byte of codes [L, B]."""
    length, batch_size = codes.shape
    zero = jnp.zeros(batch_size, jnp.int32)
    ends = jnp.zeros((length + 1, batch_size), jnp.int16)
    return _Search(zero, zero, zero | _LINE_IS_BLANK, ends, jnp.zeros_like(codes))


def _next_phrase(bank: PhraseBank, phrase: jax.Array, word_class: jax.Array) -> jax.Array:
    """One step of the table of phrases."""
    class_count = bank.phrases.shape[1]
    flat = jnp.asarray(bank.phrases).reshape(-1)
    return flat[phrase * class_count + word_class].astype(jnp.int32)


def _flags_of(cell: jax.Array, line: jax.Array) -> jax.Array:
    """int32 [B]: `WordFlags` of the word or token that ends in a cell."""
    flags = cell >> FLAG_SHIFT & _ALL_FLAGS
    # The first word behind a separator is a value, and may end a line.
    is_value = line & WordFlags.SEPARATOR != 0
    return jnp.where(is_value, flags & ~int(WordFlags.HANGING), flags)


def _passes(
    code: jax.Array, line: jax.Array, is_blank: jax.Array, marks_lead: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which bytes are no token after all, and which are breaks if they are one. bool [B] each.

    Line ends, dashes and stars are breaks by what stands on the line; some full stops are no token.
    """
    is_newline = (code >= NEWLINE) & (code <= NEWLINE_UNLESS_HANGING)
    may_be_break = (code >= BREAK_SIGN) & (code < BRACKET)
    hangs = line & WordFlags.HANGING != 0
    is_break = is_blank | (code == BREAK_SIGN)
    is_break |= (code == NEWLINE_UNLESS_HANGING) & ~hangs
    is_break |= is_newline & marks_lead
    is_abbreviated = line & WordFlags.ABBREVIATED != 0
    passes = (may_be_break & ~is_break) | ((code == SOFT_POINT) & is_abbreviated)
    return passes, is_break


def _line_marks(code: jax.Array, is_blank: jax.Array, marks_lead: jax.Array) -> jax.Array:
    """int32 [B]: whether the line is blank, and whether marks lead on it, behind this byte."""
    is_newline = (code >= NEWLINE) & (code <= NEWLINE_UNLESS_HANGING)
    is_blank = is_newline | (is_blank & (code >= BREAK_SIGN))
    marks = jnp.where(is_blank, _LINE_IS_BLANK, 0)
    return marks | jnp.where(marks_lead & ~is_newline, _MARKS_LEAD, 0)


def _told(flags: jax.Array, code_and_case: jax.Array) -> jax.Array:
    """What a word or token tells, as bits."""
    is_word = code_and_case & (CAPITALS - 1) < YES
    is_foreign = flags & WordFlags.FOREIGN != 0
    is_unknown = (flags & WordFlags.UNKNOWN != 0) & (code_and_case >= CAPITALS)
    told = jnp.where(flags & WordFlags.ENGLISH != 0, _ENGLISH, 0)
    told |= jnp.where(is_foreign, jnp.where(is_word, _FOREIGN_WORD, _FOREIGN_LETTER), 0)
    return told | jnp.where(is_unknown | (is_foreign & is_word), _UNREAD, 0)


def _gather_evidence(told: jax.Array) -> Evidence:
    """Add up what the words of each text tell, uint8 [L, B]."""

    def count(bit: int) -> jax.Array:
        return jnp.sum(told & bit != 0, axis=0, dtype=jnp.int32)

    return Evidence(
        english=2 * count(_ENGLISH),
        foreign=4 * count(_FOREIGN_WORD) + count(_FOREIGN_LETTER),
        unread=count(_UNREAD),
    )


class _Selection(NamedTuple):
    """What `take_phrases` has taken of some tokens, from the right."""

    hidden: jax.Array  # int32 [B]: how many tokens to the left the phrase taken last still covers
    taken: jax.Array  # int32 [B]: phrases taken
    items: jax.Array  # int16 [L, B]: indices of their items


def take_phrases(bank: PhraseBank, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Take phrases from the right: each hides the tokens that it covers.

    Args:
        bank: the lexicon.
        ends: int16 [L, B], from `find_phrases`.

    Returns:
        int16 [L, B]: indices of the items of the phrases taken, the last of the text first, closed up; and the most
        that a text has.
    """
    found = jnp.asarray(bank.found)
    rows = jnp.arange(ends.shape[1])

    # What is no token is left out at once, in parallel; then tokens are passed over one by one, as phrases hide them.
    is_token = ends != 0
    number = jnp.cumsum(is_token[::-1].astype(jnp.int32), axis=0)[::-1]  # from the right, from 1
    place = jnp.where(is_token, number - 1, ends.shape[0])
    tokens = jnp.zeros_like(ends).at[place, rows[None]].set(ends, mode="drop")

    def pass_token(index: jax.Array, selection: _Selection) -> _Selection:
        state = tokens[index].astype(jnp.int32) - 1
        phrase = jnp.where(tokens[index] > 0, found[state], 0)
        width = phrase >> FOUND_ITEM_BITS
        is_taken = (selection.hidden == 0) & (width > 0)
        item = (phrase & FOUND_ITEM_MASK).astype(selection.items.dtype)
        # A place past the end is dropped: a text whose token is not taken writes nothing.
        target = jnp.where(is_taken, selection.taken, ends.shape[0])
        return _Selection(
            hidden=jnp.where(is_taken, width - 1, jnp.maximum(selection.hidden - 1, 0)),
            taken=selection.taken + is_taken,
            items=selection.items.at[target, rows].set(item, mode="drop"),
        )

    zero = jnp.zeros(rows.shape, jnp.int32)
    start = _Selection(zero, zero, jnp.zeros(ends.shape, jnp.int16))
    selection = jax.lax.fori_loop(0, jnp.max(number[0]), pass_token, start)
    return selection.items, jnp.max(selection.taken)
