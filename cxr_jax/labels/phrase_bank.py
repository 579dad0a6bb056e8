"""A lexicon as the arrays that the device reads: from the codes of bytes to words, to phrases, to items.

A code is what a byte is in its context: a letter inside a word, a word's last letter, punctuation, a line end, ..; the
codes are the alphabet of the table of words. An item is what a phrase means, packed into an int32: a mask of labels in
the low 16 bits (a bit a label of `lexicon.LABELS`), and the fields of `Item` above them. docs/report_parser.md says
what the fields do to each other; `labels/report_text.py` does it.
"""

import contextlib
import functools
import os
from typing import NamedTuple

import jax
import numpy as np

from cxr_jax.labels import lexicon as lexicons
from cxr_jax.labels.phrase_tables import (
    LEADING_MARKS,
    MARKS,
    PUNCTUATION,
    QUERY,
    TOKENS,
    Tables,
    WordFlags,
    compile_lexicon,
    equal_states,
)
from cxr_jax.labels.word_tables import LETTERS

# The three states that a mention can have: rows of state arrays. A cue can also drop a mention.
AFFIRMED, DENIED, HEDGED = 0, 1, 2
IGNORED = 3

# ---- The codes of bytes ----------------------------------------------------------------------------------------------

# In this order: letters inside words, letters that end one, tokens, and what may be a token.
LETTER_COUNT = len(LETTERS)
DECIMAL_POINT = LETTER_COUNT - 1  # a letter like the others, where digits stand on both sides
_FIRST_TOKEN = 2 * LETTER_COUNT
COLON, BAR, FULL_STOP = (_FIRST_TOKEN + TOKENS.index(token) for token in ":|.")
OPENING_QUESTION = _FIRST_TOKEN + TOKENS.index(QUERY)
# The marks for yes and no, and so many codes further on the same where they lead.
STROKE_TOKEN = _FIRST_TOKEN + len(TOKENS) - 1
YES, NO = (_FIRST_TOKEN + TOKENS.index(mark) for mark in MARKS)
LEADS = TOKENS.index(LEADING_MARKS) - TOKENS.index(MARKS)
# A full stop that ends nothing behind an abbreviation; a letter that is not ASCII.
SOFT_POINT = _FIRST_TOKEN + len(TOKENS)
FOREIGN_LETTER = SOFT_POINT + 1
# Breaks: always one; a newline that is one on a blank line; one before what starts a line, unless what stands before it
# hangs.
BREAK_SIGN = FOREIGN_LETTER + 1
NEWLINE, NEWLINE_UNLESS_HANGING = range(BREAK_SIGN + 1, BREAK_SIGN + 3)
# A dash and a star are one at the start of a line; so are a stroke and an arrow, which are tokens elsewhere.
DASH, STAR, STROKE, ARROW = range(NEWLINE_UNLESS_HANGING + 1, NEWLINE_UNLESS_HANGING + 5)
# Separators: an opening bracket, behind which a word is dashed; and the rest.
BRACKET = ARROW + 1
OTHER = BRACKET + 1
CODE_COUNT = OTHER + 1
# Set beside the code of a word's last letter: it may be an abbreviation.
CAPITALS = 128
assert CODE_COUNT <= CAPITALS


def _code_bytes() -> tuple[np.ndarray, np.ndarray]:
    """Return each byte's code as if inside a word, int32 [256], and whether it is a letter or digit, bool [256]."""
    codes, is_letter = np.full(256, OTHER, np.int32), np.zeros(256, bool)
    for index, letter in enumerate(LETTERS[:-1]):
        both_cases = [ord(letter), ord(letter.upper())]
        codes[both_cases] = index
        is_letter[both_cases] = True
    for index, token in enumerate(PUNCTUATION):
        codes[ord(token)] = _FIRST_TOKEN + index
    codes[ord("=")] = COLON
    codes[ord("\n")] = NEWLINE
    codes[ord("-")], codes[ord("*")], codes[ord("+")] = DASH, STAR, STAR
    codes[ord("(")] = codes[ord("[")] = BRACKET
    # The first bytes of letters beyond ASCII. 0xC3 is one unless a sign follows; 0xE2 begins signs.
    foreign = [*range(0xC3, 0xE2), *range(0xE3, 0xEE)]
    codes[foreign] = FOREIGN_LETTER
    return codes, is_letter


BYTE_CODES, IS_LETTER = _code_bytes()
# Signs of three bytes, the first of them 0xE2: the last two, and the code of the last.
SIGNS = {
    (0x86, 0x92): ARROW,
    (0x80, 0xA6): FULL_STOP,  # an ellipsis
    **dict.fromkeys([(0x80, 0xA2), (0x97, 0x8F), (0x97, 0xA6), (0x96, 0xAA)], BREAK_SIGN),
    **dict.fromkeys([(0x9C, 0x93), (0x9C, 0x94), (0x98, 0x91), (0x98, 0x92)], YES),
    **dict.fromkeys([(0x9C, 0x97), (0x9C, 0x98), (0x98, 0x90)], NO),
}

# ---- Items -----------------------------------------------------------------------------------------------------------

LABEL_BITS = 15
# Fields of an item, in the order of `Item`, and how many bits each has.
_FIELD_BITS = {
    "mention": 2,
    "subject": 1,
    "before": 1,
    "after": 1,
    "mode": 2,
    "quality": 2,
    "side": 2,
    "heading": 1,
    "clause": 1,
    "sentence": 1,
    "comma": 1,
    "field": 1,
}
_FIELD_SHIFT = {
    name: LABEL_BITS + sum(list(_FIELD_BITS.values())[:index])
    for index, name in enumerate(_FIELD_BITS)
}
# A cue that changes nothing has the mode of what is affirmed.
_MODES = {"negative": DENIED, "uncertain": HEDGED, "ignore": IGNORED, "positive": AFFIRMED}
_QUALITIES = {"normal": 1 + DENIED, "borderline": 1 + HEDGED, "abnormal": 1 + AFFIRMED}
_SIDES = {"right": 2, "left": 1, "both": 3}
_MENTIONS = {"findings": 1, "hedged": 2, "denied": 3}


class Item(NamedTuple):
    """What a phrase does to the reading of its sentence: int32 [B], flags bool [B]."""

    labels: jax.Array  # mask: those that it speaks of
    mention: (
        jax.Array
    )  # 0 none, 1 as its cues say, 2 hedged unless a cue says more, 3 denied whatever they say
    subject: jax.Array  # flag: its state is said by a quality ("the heart .. is normal")
    before: jax.Array  # flag: a cue that stands before the mentions it changes
    after: jax.Array  # flag: a cue that stands after them
    mode: jax.Array  # of a cue: DENIED, HEDGED or IGNORED; AFFIRMED changes nothing
    quality: jax.Array  # 1 + the state that it gives to a subject; 0 none
    side: jax.Array  # 2 right, 1 left, 3 both
    heading: jax.Array  # flag: the side is that of all that follows in the sentence
    clause: jax.Array  # flag: ends the clause to its left
    sentence: jax.Array  # flag: ends the sentence, too
    comma: jax.Array  # flag
    field: jax.Array  # flag of a cue: what stands before it is the name of a field, and is dropped; of one that is no
    # cue "before", only if such a cue follows


def unpack_items(items: jax.Array) -> Item:
    """Unpack the fields of items int32 [B]."""
    fields = {}
    for name, bits in _FIELD_BITS.items():
        value = (items >> _FIELD_SHIFT[name]) & ((1 << bits) - 1)
        fields[name] = value == 1 if bits == 1 else value
    return Item(labels=items & ((1 << LABEL_BITS) - 1), **fields)


def ends_sentence(item: int) -> bool:
    """Tell whether an item ends a sentence. Plain integers, on the host."""
    return bool(item >> _FIELD_SHIFT["sentence"] & 1)


def _pack_item(labels: tuple[int, ...] = (), **fields: int) -> int:
    mask = sum(1 << label for label in labels)
    return mask + sum(value << _FIELD_SHIFT[name] for name, value in fields.items())


def _make_item(meaning: lexicons.Meaning) -> int:
    return _pack_item(meaning.labels, **_fields_of(meaning))


def _fields_of(meaning: lexicons.Meaning) -> dict[str, int]:
    """Return the fields that are not 0; none for a phrase of [nothing], which only hides others."""
    table, key = meaning.table, meaning.key
    if table in _MENTIONS:
        return {"mention": _MENTIONS[table]}
    if table == "denials":  # a mention, and a cue for what stands to its right
        return {"mention": _MENTIONS["findings"], "mode": DENIED, "before": 1}
    if table == "subjects":
        return {"subject": 1}
    if table == "qualities":
        return {"quality": _QUALITIES[key]}
    if table == "cues":
        if key == "field_name":  # it drops the field's name, if a cue follows it
            return {"mode": IGNORED, "after": 1, "field": 1}
        mode, place = key.split("_")
        # A cue "around" is both, and so is that of a field.
        before, after = int(place != "after"), int(place != "before")
        return {
            "mode": _MODES[mode],
            "before": before,
            "after": after,
            "field": int(place == "field"),
        }
    if table in ("values", "values_end"):
        ends_sentence = int(table == "values_end")
        return {"mode": _MODES[key], "after": 1, "clause": 1, "sentence": ends_sentence}
    if table == "questions":  # a cue that is never close: as if a comma stood before it
        return {"mode": HEDGED, "after": 1, "clause": 1, "sentence": 1, "comma": 1}
    if table == "parts":
        return {"mode": AFFIRMED, key: 1}
    if table == "stops":
        kind, _, side = key.partition("_")
        fields = {"clause": 1, "sentence": int(kind == "sentence")}
        return fields | ({"side": _SIDES[side]} if side else {})
    if table == "sides":
        return {"side": _SIDES[key]}
    if table == "headings":
        return {"side": _SIDES[key], "heading": 1, "clause": 1}
    if table == "commas":
        return {"comma": 1}
    return {}


SENTENCE_END = _pack_item(clause=1, sentence=1)

# ---- The arrays ------------------------------------------------------------------------------------------------------

# A cell of `PhraseBank.words` where a word or token ends: this bit, its class, and above that its `WordFlags`.
ENDS_TOKEN = 1 << 30
CLASS_MASK, FLAG_SHIFT = (1 << 15) - 1, 15
# Where the table of words stands behind a dash.
AFTER_DASH = CODE_COUNT
# Low bits of `PhraseBank.found`: an index into the items. Above them: how many tokens the phrase has.
FOUND_ITEM_BITS = 16
FOUND_ITEM_MASK = (1 << FOUND_ITEM_BITS) - 1


class PhraseBank(NamedTuple):
    """A lexicon as arrays: constants of the compiled program. A pytree.

    words int32 [W * codes]: next state * codes, or, at a word's or token's end, ENDS_TOKEN | its class and flags.
    phrases int16 [P, C]: next state, for C classes of words.
    found int32 [P]: of the longest phrase that ends in the state, the index of its item | its tokens << 16.
    items int32 [M]: item 0 is none.
    """

    words: np.ndarray
    phrases: np.ndarray
    found: np.ndarray
    items: np.ndarray


def load_phrase_bank(path: str | None = None, more: str | None = None) -> PhraseBank:
    """Compile `lexicon.load(path, more)`, and keep the result while the files stay as they are.

    Args:
        path: a lexicon to use instead of labels/lexicon.toml.
        more: a file of further phrases, which win over those of the first.

    Raises:
        UserError: for a bad lexicon; one line that names the file and the phrase.
    """
    return _load_version(path, more, *_file_versions(path, more))


def device_phrase_bank(path: str | None = None, more: str | None = None) -> PhraseBank:
    """`load_phrase_bank` as arrays on the device, put there once: for programs that are called from the host."""
    return _put_version(path, more, *_file_versions(path, more))


def _file_versions(*files: str | None) -> list[tuple[int, int] | None]:
    return [_file_version(file) for file in files if file]


def _file_version(path: str) -> tuple[int, int] | None:
    """Return what changes when a file is written again; None for one that is not there: `lexicon.load` says so."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        return status.st_mtime_ns, status.st_size
    return None


@functools.lru_cache(16)
def _load_version(path: str | None, more: str | None, *_versions: object) -> PhraseBank:
    return _make_phrase_bank(compile_lexicon(lexicons.load(path, more)))


@functools.lru_cache(4)
def _put_version(path: str | None, more: str | None, *versions: object) -> PhraseBank:
    return jax.device_put(_load_version(path, more, *versions))


def _make_phrase_bank(tables: Tables) -> PhraseBank:
    word_ends = np.int32(ENDS_TOKEN) | tables.word_flags << FLAG_SHIFT | tables.word_class
    token_ends = np.int32(ENDS_TOKEN) | tables.token_flags << FLAG_SHIFT | tables.token_class
    # A letter inside a word leads on; the same letter at its end says which class the word has. States that no letters
    # can tell apart are one: a smaller table stays nearer to the processor. The two starts stay what they are.
    word_ends = word_ends[tables.word_next]
    is_start = np.arange(len(word_ends))[:, None] == [0, 1]
    part, first = equal_states(tables.word_next, np.concatenate([word_ends, is_start], 1))
    words = np.zeros((len(first), CODE_COUNT), np.int32)
    words[:, :LETTER_COUNT] = part[tables.word_next[first]] * CODE_COUNT
    words[:, LETTER_COUNT:_FIRST_TOKEN] = word_ends[first]
    words[:, _FIRST_TOKEN:SOFT_POINT] = token_ends[:-1]
    words[:, SOFT_POINT] = token_ends[TOKENS.index(".")]
    # No phrase has a foreign letter: its class is that of words that no pattern fits.
    words[:, FOREIGN_LETTER] = np.int32(ENDS_TOKEN) | int(WordFlags.FOREIGN) << FLAG_SHIFT
    # Whether these are a break depends on the line; if not, `find_phrases` passes over them.
    words[:, BREAK_SIGN:BRACKET] = token_ends[-1]
    # What separates leaves the dash behind which a word is dashed; an opening bracket is one.
    words[:, BRACKET] = words[1, OTHER] = AFTER_DASH
    items = np.array([0, *map(_make_item, tables.meanings)], np.int32)
    found = tables.phrase.astype(np.int32) | tables.phrase_words.astype(np.int32) << FOUND_ITEM_BITS
    return PhraseBank(words.reshape(-1), tables.phrase_next, found, items)
