"""The phrases of texts, found on the device: which byte ends a word, which phrase ends there, which phrases count.

Two of the parser's three passes (`labels/report_text.py` has the third): forward over the bytes, and backward over the
tokens, since of two phrases that overlap the one that ends last is taken, and hides what it covers. Tables, vectorised
over the batch; batches stand on the last axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.labels.automaton import Array
from cxr_jax.labels.phrase_bank import (
    BULLET,
    BYTE_CODES,
    DECIMAL_POINT,
    ENDS_TOKEN,
    FOUND_ITEM_BITS,
    FOUND_ITEM_MASK,
    IS_LETTER,
    LETTER_COUNT,
    NEWLINE,
    OTHER,
    PhraseBank,
)


def code_bytes(data: Array, inside: Array) -> jax.Array:
    """Give each byte its code, which depends on its neighbours: a word's last letter has a code of its own.

    Args:
        data: uint8 [L, B].
        inside: bool [L, B]: which bytes belong to their text.

    Returns:
        Codes uint8 [L, B] of `labels/phrase_bank.py`. A point between digits is a letter.
    """
    data = jnp.where(inside, data, 0)
    outside = jnp.zeros((1, data.shape[1]), bool)
    is_digit = (data >= ord("0")) & (data <= ord("9"))
    digit_before = jnp.concatenate([outside, is_digit[:-1]])
    digit_after = jnp.concatenate([is_digit[1:], outside])
    is_point = (data == ord(".")) & digit_before & digit_after
    is_letter = jnp.asarray(IS_LETTER)[data] | is_point
    ends_word = is_letter & ~jnp.concatenate([is_letter[1:], outside])
    codes = jnp.where(is_point, DECIMAL_POINT, jnp.asarray(BYTE_CODES)[data])
    return (codes + jnp.where(ends_word, LETTER_COUNT, 0)).astype(jnp.uint8)


class _Search(NamedTuple):
    """What `find_phrases` knows after some bytes."""

    word: jax.Array  # int32 [B]: state of the table of words, as an offset into it
    phrase: jax.Array  # int32 [B]: state of the table of phrases
    is_blank: jax.Array  # bool [B]: nothing but white space and bullets stands on the line so far
    ends: jax.Array  # int16 [L, B]: the result


def find_phrases(bank: PhraseBank, codes: jax.Array, longest: jax.Array) -> jax.Array:
    """Run the tables of words and of phrases over codes uint8 [L, B], from the left.

    Args:
        bank: the lexicon.
        codes: from `code_bytes`.
        longest: int, bytes of the longest text; none past it are looked at.

    Returns:
        int16 [L, B]: 1 + the state of the phrase table at the last byte of every word and token, 0 elsewhere.
    """
    words, phrase_next = jnp.asarray(bank.words), jnp.asarray(bank.phrases)
    class_count = phrase_next.shape[1]
    phrase_next = phrase_next.reshape(-1)

    def read_byte(index: jax.Array, search: _Search) -> _Search:
        code = codes[index].astype(jnp.int32)
        cell = words[search.word + code]
        # A line end or a bullet is a token (a break) on a blank line only.
        is_break = (code == NEWLINE) | (code == BULLET)
        is_token = (cell >= ENDS_TOKEN) & (search.is_blank | ~is_break)
        word_class = jnp.where(is_token, cell - ENDS_TOKEN, 0)
        next_phrase = phrase_next[search.phrase * class_count + word_class].astype(jnp.int32)
        phrase = jnp.where(is_token, next_phrase, search.phrase)
        stays_blank = search.is_blank & ((code == OTHER) | is_break)
        ends = jnp.where(is_token, phrase + 1, 0).astype(search.ends.dtype)
        return _Search(
            word=jnp.where(cell >= ENDS_TOKEN, 0, cell),
            phrase=phrase,
            is_blank=(code == NEWLINE) | stays_blank,
            ends=jax.lax.dynamic_update_index_in_dim(search.ends, ends, index, 0),
        )

    zero = jnp.zeros(codes.shape[1], jnp.int32)
    start = _Search(zero, zero, zero == 1, jnp.zeros(codes.shape, jnp.int16))
    # Bytes past the longest text of the batch are many where a budget is fixed, as in RL: they are not looked at.
    return jax.lax.fori_loop(0, longest, read_byte, start).ends


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
