"""The words of a lexicon as an automaton that reads letter by letter; section 2 of docs/report_parser.md.

Its alphabet are the 37 symbols a word has (a-z, 0-9 and the point of a decimal). A state says which of the lexicon's
words, stems and classes the letters so far could be, whether a dash stands before them, and which of the words that are
read with a slip (`[words] near`) they still could be. Nothing here runs on a device.
"""

from typing import NamedTuple

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.lexicon import Lexicon

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789."  # "." is a decimal point inside a number
MAX_STATES = 32_767


# ---- What the letters so far could be --------------------------------------------------------------------------------


class _Slip(NamedTuple):
    """A place in a near word that the letters so far could have come to.

    Attributes:
        number: of the word in `[words] near`.
        place: how many of its letters are behind.
        slips: 0 or 1.
        exchanged: the letter at `place` + 1 has been read; the one at `place` has to come next.
    """

    number: int
    place: int
    slips: int = 0
    exchanged: bool = False


class WordState(NamedTuple):
    """What the letters of a word so far could be."""

    word: str | None  # the letters, or None where no word of the lexicon starts with them
    stems: frozenset[str]  # the stems among their beginnings
    is_dashed: bool  # kept only as long as it can matter
    near: frozenset[_Slip]


class Vocabulary(NamedTuple):
    """The patterns of a lexicon, sorted by kind."""

    words: set[str]  # plain words, those of classes and of [words] included
    dashed: set[str]  # words that have a pattern "-word"
    stems: set[str]
    classes_of: dict[str, set[str]]  # word -> the classes it is in ("<name>")
    near: tuple[str, ...]  # words that are read with a slip

    def reading(self, state: WordState) -> str | None:
        """The word that letters are read as; None for one that is not written out in the lexicon."""
        if state.word in self.words:
            return state.word
        # A word that any pattern fits is itself; else it is the first near word that the letters have come through.
        if not state.stems:
            reached = [
                slip.number
                for slip in state.near
                if slip.place == len(self.near[slip.number]) and not slip.exchanged
            ]
            if reached:
                return self.near[min(reached)]
        return None

    def patterns(self, word: str | None, state: WordState) -> frozenset[str]:
        """All patterns that a word fits which ends in the state and is read as `word`."""
        stems = state.stems
        if word is not None and word != state.word:
            stems = frozenset(stem for stem in self.stems if word.startswith(stem))
        patterns = {f"{stem}*" for stem in stems}
        if word is not None:
            patterns |= {word, *self.classes_of.get(word, ())}
            if state.is_dashed and word in self.dashed:
                patterns.add(f"-{word}")
        return frozenset(patterns)


def collect_vocabulary(lexicon: Lexicon) -> Vocabulary:
    """Sort the patterns of a lexicon by kind."""
    vocabulary = Vocabulary(set(), set(), set(), {}, lexicon.words["near"])
    for words in lexicon.words.values():
        vocabulary.words.update(words)
    for pattern in {pattern for phrase in lexicon.phrases for pattern in phrase}:
        if pattern[0] == "<":
            for word in lexicon.classes[pattern[1:-1]]:
                vocabulary.words.add(word)
                vocabulary.classes_of.setdefault(word, set()).add(pattern)
        elif pattern[-1] == "*":
            vocabulary.stems.add(pattern[:-1])
        elif pattern[0] == "-" and len(pattern) > 1:
            vocabulary.words.add(pattern[1:])
            vocabulary.dashed.add(pattern[1:])
        else:
            vocabulary.words.add(pattern)
    return vocabulary


# ---- The automaton ---------------------------------------------------------------------------------------------------


def compile_words(name: str, vocabulary: Vocabulary) -> tuple[np.ndarray, list[WordState]]:
    """Build the automaton.

    Returns:
        Next states int16 [W, 37], and what each state has read; 0 is the start, 1 the start behind a dash.

    Raises:
        UserError: for more words than there are numbers for states.
    """
    prefixes = _prefixes(vocabulary.words | vocabulary.stems)
    # A dash is remembered only as long as some "-word" could still come.
    dashed_prefixes = _prefixes(vocabulary.dashed)
    near_may_be_dashed = bool(vocabulary.dashed.intersection(vocabulary.near))
    start_near = _with_left_out(
        frozenset(_Slip(number, 0) for number in range(len(vocabulary.near))), vocabulary.near
    )
    start = WordState("", frozenset(), False, start_near)
    behind_dash = start._replace(is_dashed=True)
    number_of, states, rows = {start: 0, behind_dash: 1}, [start, behind_dash], []
    slips: dict[tuple[frozenset[_Slip], str], frozenset[_Slip]] = {}
    for state in states:  # grows while we walk it
        row = []
        for letter in LETTERS:
            # The words and stems that begin with these letters.
            word = None
            if state.word is not None and state.word + letter in prefixes:
                word = state.word + letter
            stems = state.stems | {word} if word in vocabulary.stems else state.stems
            near: frozenset[_Slip] = frozenset()
            # A stem that fits leaves nothing to slips; a word with a digit in it is never near.
            if state.near and not stems and letter.isalpha():
                key = (state.near, letter)
                if key not in slips:
                    slips[key] = _read_letter(*key, vocabulary.near)
                near = slips[key]
            is_dashed = state.is_dashed and (
                word in dashed_prefixes or (near_may_be_dashed and bool(near))
            )
            following = WordState(word, stems, is_dashed, near)
            if following not in number_of:
                number_of[following] = len(states)
                states.append(following)
            row.append(number_of[following])
        rows.append(row)
        if len(states) > MAX_STATES:
            raise UserError(
                f"{name}: the lexicon is too large: its words take more than {MAX_STATES} states"
            )
    return np.array(rows, np.int16), states


def _prefixes(words: set[str]) -> set[str]:
    return {word[:length] for word in words for length in range(len(word) + 1)}


def _read_letter(slips: frozenset[_Slip], letter: str, words: tuple[str, ...]) -> frozenset[_Slip]:
    """Where the letter leads from each place: the letter itself, or one slip."""
    following = set()
    for slip in slips:
        rest = words[slip.number][slip.place :]
        # Of two letters in the wrong order the second was read: only the first can follow.
        if slip.exchanged:
            if rest[0] == letter:
                following.add(_Slip(slip.number, slip.place + 2, 1))
            continue
        if rest and rest[0] == letter:
            following.add(slip._replace(place=slip.place + 1))
        if slip.slips == 0:
            following.add(slip._replace(slips=1))  # put in
            if rest:
                following.add(_Slip(slip.number, slip.place + 1, 1))  # in the place of another
            if len(rest) > 1 and rest[1] == letter:
                following.add(_Slip(slip.number, slip.place, 1, exchanged=True))
    return _with_left_out(frozenset(following), words)


def _with_left_out(slips: frozenset[_Slip], words: tuple[str, ...]) -> frozenset[_Slip]:
    """With the places that are reached where the next letter is left out."""
    left_out = {
        _Slip(slip.number, slip.place + 1, 1)
        for slip in slips
        if slip.slips == 0 and slip.place < len(words[slip.number])
    }
    return slips | left_out
