"""Phrases compiled to two tables: one that reads words letter by letter, one that finds phrases word by word.

Words: an automaton over the 37 symbols a word has (a-z, 0-9 and the point of a decimal), whose state says which of the
lexicon's words, stems and classes the letters so far could be. Words that the lexicon never tells apart share a word
class. Phrases: the subset construction of Aho-Corasick with word classes as the alphabet; a state knows the
longest phrase that ends at it. Nothing here runs on a device.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.lexicon import Lexicon, Meaning, clash_error

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789."  # "." is a decimal point inside a number
TOKENS = ".?!;:,/"  # punctuation that is a token of its own
BREAK = "\n"  # a blank line or a bullet
MAX_STATES = 32_767
MAX_CELLS = 1 << 27  # of the phrase table

_SENTENCE_END = Meaning("stops", "sentence")
_Phrases = dict[tuple[str, ...], Meaning]


class Tables(NamedTuple):
    """A compiled lexicon.

    Attributes:
        word_next: int16 [W, 37], next state of a word (0: start).
        word_class: int16 [W], the class of a word that ends in the state.
        token_class: int16 [8], the classes of TOKENS and BREAK.
        phrase_next: int16 [P, C], next state after a word of the class.
        phrase: int16 [P], 1 + index into `meanings` of the longest phrase that ends in the state; 0 for none.
        phrase_words: int16 [P], how many tokens it has.
        meanings: what the phrases mean.
    """

    word_next: np.ndarray
    word_class: np.ndarray
    token_class: np.ndarray
    phrase_next: np.ndarray
    phrase: np.ndarray
    phrase_words: np.ndarray
    meanings: tuple[Meaning, ...]


def compile_lexicon(lexicon: Lexicon) -> Tables:
    """Compile a lexicon to tables.

    Raises:
        UserError: for a clash that only shows when phrases meet (two that fit the same words equally well), or a
            lexicon that is too large.
    """
    # Words: every set of patterns (words, stems, classes) that some word fits is a word class; class 0 fits none.
    vocabulary = _collect_vocabulary(lexicon)
    word_next, word_states = _compile_words(lexicon.name, vocabulary)
    # A class is a set of patterns, numbered as it is met.
    classes: dict[frozenset[str], int] = {frozenset(): 0}
    word_class = np.zeros(len(word_states), np.int16)
    for state, word_state in enumerate(word_states):
        patterns = vocabulary.patterns(word_state)
        word_class[state] = classes.setdefault(patterns, len(classes))
    token_class = np.zeros(len(TOKENS) + 1, np.int16)
    for index, token in enumerate(TOKENS + BREAK):
        if token in vocabulary.words or token == BREAK:
            token_class[index] = classes.setdefault(frozenset({token}), len(classes))

    # Phrases: a break ends a sentence, whatever the lexicon says.
    meanings = tuple(dict.fromkeys([*lexicon.phrases.values(), _SENTENCE_END]))
    phrases = {**lexicon.phrases, (BREAK,): _SENTENCE_END}
    table = _compile_phrases(lexicon.name, phrases, list(classes), meanings)
    table = _merge_states(table)

    # Classes that no phrase tells apart are one.
    phrase_next, same_class = np.unique(table.next, axis=1, return_inverse=True)
    same_class = same_class.reshape(-1).astype(np.int16)
    return Tables(
        word_next=word_next,
        word_class=same_class[word_class],
        token_class=same_class[token_class],
        phrase_next=phrase_next,
        phrase=table.phrase,
        phrase_words=table.words,
        meanings=meanings,
    )


# ---- Words -----------------------------------------------------------------------------------------------------------


class _WordState(NamedTuple):
    """What the letters of a word so far could be."""

    word: str | None  # the letters, or None where no word of the lexicon starts with them
    stems: frozenset[str]  # the stems among their beginnings


class _Vocabulary(NamedTuple):
    words: set[str]  # plain words, those of classes included
    stems: set[str]
    classes_of: dict[str, set[str]]  # word -> the classes it is in ("<name>")

    def patterns(self, state: _WordState) -> frozenset[str]:
        """All patterns that a word fits which ends in the state."""
        patterns = {f"{stem}*" for stem in state.stems}
        if state.word in self.words:
            patterns |= {state.word, *self.classes_of.get(state.word, ())}
        return frozenset(patterns)


def _collect_vocabulary(lexicon: Lexicon) -> _Vocabulary:
    vocabulary = _Vocabulary(set(), set(), {})
    for pattern in {pattern for phrase in lexicon.phrases for pattern in phrase}:
        if pattern[0] == "<":
            for word in lexicon.classes[pattern[1:-1]]:
                vocabulary.words.add(word)
                vocabulary.classes_of.setdefault(word, set()).add(pattern)
        elif pattern[-1] == "*":
            vocabulary.stems.add(pattern[:-1])
        else:
            vocabulary.words.add(pattern)
    return vocabulary


def _compile_words(name: str, vocabulary: _Vocabulary) -> tuple[np.ndarray, list[_WordState]]:
    """Next states int16 [W, 37], and what each state has read."""
    known = vocabulary.words | vocabulary.stems
    prefixes = {word[:length] for word in known for length in range(len(word) + 1)}
    start = _WordState("", frozenset())
    number_of, states, rows = {start: 0}, [start], []
    for word, stems in states:  # grows while we walk it
        row = []
        for letter in LETTERS:
            longer = None if word is None or word + letter not in prefixes else word + letter
            state = _WordState(longer, stems | {longer} if longer in vocabulary.stems else stems)
            if state not in number_of:
                number_of[state] = len(states)
                states.append(state)
            row.append(number_of[state])
        rows.append(row)
    if len(states) > MAX_STATES:
        raise UserError(
            f"{name}: the lexicon is too large: its words take more than {MAX_STATES} states"
        )
    return np.array(rows, np.int16), states


# ---- Phrases ---------------------------------------------------------------------------------------------------------


class _PhraseEnd(NamedTuple):
    """A phrase that ends in a node of the trie. Of several, the largest (width, specificity) wins."""

    width: int  # how many words it has
    specificity: tuple[int, ...]  # of its words, from the last on
    meaning: Meaning
    words: tuple[str, ...]

    @property
    def rank(self) -> tuple[int, tuple[int, ...]]:
        """What decides between phrases that end at one word."""
        return self.width, self.specificity


class _Trie(NamedTuple):
    """Phrases as a trie over patterns; node 0 is the root."""

    children: list[dict[str, int]]
    ends: dict[int, _PhraseEnd]  # by node


class _PhraseTable(NamedTuple):
    next: np.ndarray  # int16 [P, C]
    phrase: np.ndarray  # int16 [P], as in `Tables`
    words: np.ndarray  # int16 [P], `Tables.phrase_words`


def _build_trie(phrases: _Phrases) -> _Trie:
    trie = _Trie([{}], {})
    for words, meaning in phrases.items():
        node = 0
        for word in words:
            if word not in trie.children[node]:
                trie.children[node][word] = len(trie.children)
                trie.children.append({})
            node = trie.children[node][word]
        specificity = tuple(_specificity(word) for word in reversed(words))
        trie.ends[node] = _PhraseEnd(len(words), specificity, meaning, words)
    return trie


def _compile_phrases(
    name: str, phrases: _Phrases, classes: list[frozenset[str]], meanings: tuple[Meaning, ...]
) -> _PhraseTable:
    """The subset construction over the trie, with word classes as the alphabet."""
    trie = _build_trie(phrases)
    classes_of_pattern: dict[str, list[int]] = {}
    for number, patterns in enumerate(classes):
        for pattern in patterns:
            classes_of_pattern.setdefault(pattern, []).append(number)

    def reach(nodes: Iterable[int]) -> dict[int, set[int]]:
        """Class -> the nodes that a word of it leads to, and the root."""
        targets: dict[int, set[int]] = {}
        for node in nodes:
            for pattern, child in trie.children[node].items():
                for word_class in classes_of_pattern.get(pattern, ()):
                    targets.setdefault(word_class, {0}).add(child)
        return targets

    start = frozenset({0})  # every state has the root in it: a phrase may start anywhere
    number_of, states = {start: 0}, [start]
    rows: list[np.ndarray] = []
    from_root = reach(start)
    for state in states:  # grows while we walk it
        # Where nothing but the root goes on, a state does what the start does.
        row = np.zeros(len(classes), np.int16) if state == start else rows[0].copy()
        targets = from_root if state == start else reach(state - start)
        for word_class, nodes in targets.items():
            # A phrase may start at this very word: what the root goes on to is in every target.
            target = frozenset(nodes | from_root.get(word_class, set()))
            if target not in number_of:
                number_of[target] = len(states)
                states.append(target)
            row[word_class] = number_of[target]
        rows.append(row)
        if len(states) > MAX_STATES or len(states) * len(classes) > MAX_CELLS:
            raise UserError(
                f"{name}: the lexicon is too large: its phrases take more than {len(states)} states"
            )

    phrase, width = np.zeros(len(states), np.int16), np.zeros(len(states), np.int16)
    for index, state in enumerate(states):
        winner = _choose_phrase(name, [trie.ends[node] for node in state if node in trie.ends])
        if winner is not None:
            width[index], phrase[index] = winner.width, 1 + meanings.index(winner.meaning)
    return _PhraseTable(np.stack(rows), phrase, width)


def _choose_phrase(name: str, ended: Sequence[_PhraseEnd]) -> _PhraseEnd | None:
    """The phrase that counts of those that end at one word. UserError where two are as good, and differ in meaning."""
    ranked = sorted(ended, key=lambda end: end.rank, reverse=True)
    if not ranked:
        return None
    best = ranked[0]
    if len(ranked) > 1 and best.rank == ranked[1].rank and best.meaning != ranked[1].meaning:
        raise clash_error(name, best.words, best.meaning, ranked[1].meaning)
    return best


def _specificity(pattern: str) -> int:
    """A word beats one of several (a class or a group), which beats a stem; a longer stem beats a shorter one."""
    if pattern[-1] == "*":
        return len(pattern)
    return 900 if pattern[0] == "<" else 1_000


def _merge_states(table: _PhraseTable) -> _PhraseTable:
    """The same automaton without states that nothing that follows can tell apart (Moore's partition refinement).

    Parts are told apart by 64-bit sums of random multiples; the result is checked, so a collision would be an error.
    """
    multiples = np.random.default_rng(0).integers(
        1, 2**63, table.next.shape[1] + 1, dtype=np.uint64
    )
    # The first parts: states that find the same. Then states whose next states are in different parts are parted, too.
    outcome = table.phrase.astype(np.int64) << 16 | table.words
    part = np.unique(outcome, return_inverse=True)[1].reshape(-1)
    while True:
        sums = (part[table.next].astype(np.uint64) * multiples[1:]).sum(axis=1)
        sums += part.astype(np.uint64) * multiples[0]
        _, first, finer = np.unique(sums, return_index=True, return_inverse=True)
        finer = finer.reshape(-1)
        if len(first) == part.max() + 1:
            break
        part = finer

    # Number the parts by their first states, so that the start stays state 0.
    order = np.argsort(first, kind="stable")
    number = np.empty(len(first), np.int64)
    number[order] = np.arange(len(first))
    part, first = number[finer], first[order]
    merged = part[table.next[first]].astype(np.int16)
    assert (merged[part] == part[table.next]).all()
    assert (table.phrase[first][part] == table.phrase).all()
    return _PhraseTable(merged, table.phrase[first], table.words[first])
