"""Phrases compiled to two tables: one that reads words letter by letter, one that finds phrases word by word.

Words: the automaton of `labels/word_tables.py`. Words that the lexicon never tells apart share a word class. Phrases:
the subset construction of Aho-Corasick with word classes as the alphabet; a state knows the longest phrase that ends
at it. Nothing here runs on a device.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.lexicon import BREAK, Lexicon, Meaning, clash_error
from cxr_jax.labels.word_tables import MAX_STATES, WordState, collect_vocabulary, compile_words

# Punctuation that is a token of its own; a question mark that opens a word; marks for yes and no, and those that lead.
PUNCTUATION, QUERY, MARKS, LEADING_MARKS = ".?!;:,/|", "\u00bf", "+-", "^~"
STROKE = "\u2013"
TOKENS = PUNCTUATION + QUERY + MARKS + LEADING_MARKS + STROKE
_HANGING_TOKENS, _SEPARATORS = ",/:", ":|?" + STROKE
MAX_CELLS = 1 << 27  # of the phrase table

_SENTENCE_END = Meaning("stops", "sentence")
_Phrases = dict[tuple[str, ...], Meaning]


class Tables(NamedTuple):
    """A compiled lexicon.

    Attributes:
        word_next: int16 [W, 37], next state of a word (0: start, 1: start behind a dash).
        word_class: int16 [W], the class of a word that ends in the state.
        word_flags: int32 [W], `WordFlags` of a word that ends in the state, as bits.
        token_class: int16 [15], the classes of TOKENS and BREAK.
        token_flags: int32 [15], likewise.
        phrase_next: int16 [P, C], next state after a word of the class.
        phrase: int16 [P], 1 + index into `meanings` of the longest phrase that ends in the state; 0 for none.
        phrase_words: int16 [P], how many tokens it has.
        meanings: what the phrases mean.
    """

    word_next: np.ndarray
    word_class: np.ndarray
    word_flags: np.ndarray
    token_class: np.ndarray
    token_flags: np.ndarray
    phrase_next: np.ndarray
    phrase: np.ndarray
    phrase_words: np.ndarray
    meanings: tuple[Meaning, ...]


class WordFlags(enum.IntFlag):
    """What is to be known of a word beyond the phrases that it is in."""

    HANGING = 1
    ABBREVIATED = 2
    ENGLISH = 4
    FOREIGN = 8
    UNKNOWN = 16  # no pattern of the lexicon fits
    SEPARATOR = 32  # a token between a field's name and its value


def compile_lexicon(lexicon: Lexicon) -> Tables:
    """Compile a lexicon to tables.

    Raises:
        UserError: for a clash that only shows when phrases meet (two that fit the same words equally well), or a
            lexicon that is too large.
    """
    # Words: every set of patterns (words, stems, classes) that some word fits is a word class; class 0 fits none.
    vocabulary = collect_vocabulary(lexicon)
    word_next, word_states = compile_words(lexicon.name, vocabulary)
    # A class is a set of patterns, numbered as it is met.
    classes: dict[frozenset[str], int] = {frozenset(): 0}
    word_class = np.zeros(len(word_states), np.int16)
    word_flags = np.zeros(len(word_states), np.int32)
    for index, state in enumerate(word_states):
        word = vocabulary.reading(state)
        patterns = vocabulary.patterns(word, state)
        word_class[index] = classes.setdefault(patterns, len(classes))
        word_flags[index] = _word_flags(lexicon, state, word)
    token_class = np.zeros(len(TOKENS) + 1, np.int16)
    for index, token in enumerate(TOKENS + BREAK):
        if token in vocabulary.words or token == BREAK:
            token_class[index] = classes.setdefault(frozenset({token}), len(classes))
    token_flags = [
        WordFlags.HANGING * (token in _HANGING_TOKENS)
        | WordFlags.SEPARATOR * (token in _SEPARATORS)
        for token in TOKENS
    ]

    # Phrases: a break ends a sentence, whatever the lexicon says.
    meanings = tuple(dict.fromkeys([*lexicon.phrases.values(), _SENTENCE_END]))
    phrases = {**lexicon.phrases, (BREAK,): _SENTENCE_END}
    table = _compile_phrases(lexicon.name, phrases, list(classes), meanings)
    table = _merge_states(table)

    # Classes that no phrase tells apart are one.
    phrase_next, same_class = _equal_columns(table.next)
    return Tables(
        word_next=word_next,
        word_class=same_class[word_class],
        word_flags=word_flags,
        token_class=same_class[token_class],
        token_flags=np.array([*token_flags, 0], np.int32),
        phrase_next=phrase_next,
        phrase=table.phrase,
        phrase_words=table.words,
        meanings=meanings,
    )


def _word_flags(lexicon: Lexicon, state: WordState, word: str | None) -> int:
    """The flags of a word as it is written, and, of its language, as it is read."""
    is_known = word is not None or bool(state.stems)
    flags = WordFlags(0) if is_known else WordFlags.UNKNOWN
    for flag, looked_up in (
        (WordFlags.HANGING, state.word),
        (WordFlags.ABBREVIATED, state.word),
        (WordFlags.ENGLISH, word),
        (WordFlags.FOREIGN, word),
    ):
        if looked_up in lexicon.words[str(flag.name).lower()]:
            flags |= flag
    return int(flags)


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
    """A dashed word beats a word, which beats one of several, which beats a stem; a longer stem beats a shorter one."""
    if pattern[-1] == "*":
        return len(pattern)
    if pattern[0] == "<":
        return 900
    return 1_100 if pattern[0] == "-" and len(pattern) > 1 else 1_000


def _equal_columns(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct columns of a table [S, C] of numbers from 0, sorted; and which of them each column is, int16 [C]."""
    # Bytes, the high one first, sort as the numbers do, and much sooner than numpy's rows of fields.
    columns = [column.tobytes() for column in table.T.astype(">i2")]
    first: dict[bytes, int] = {}
    for index, column in enumerate(columns):
        first.setdefault(column, index)
    number_of = {column: number for number, column in enumerate(sorted(first))}
    which = np.array([number_of[column] for column in columns], np.int16)
    return table[:, [first[column] for column in number_of]], which


def equal_states(following: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moore's partition refinement: the states of an automaton that nothing that follows can tell apart are one.

    Parts are told apart by 64-bit sums of random multiples; the result is checked, so a collision would be an error.

    Args:
        following: [S, C], the next states.
        outcomes: [S, K], what else tells states apart.

    Returns:
        int64 [S], the part of each state, numbered by their first states; and those, int64 [parts].
    """
    random = np.random.default_rng(0)
    multiples = random.integers(1, 2**63, following.shape[1] + 1, dtype=np.uint64)
    numbers = random.integers(1, 2**63, len(following), dtype=np.uint64)  # one a part
    # Most cells are those of the first state's row: a sum differs from that row's by the few others, however many
    # columns there are.
    usual = following[0]
    rows, columns = np.nonzero(following != usual)
    targets = following[rows, columns]
    # The first parts: states with one outcome. Then states whose next states are in different parts are parted, too.
    weights = random.integers(1, 2**63, outcomes.shape[1], dtype=np.uint64)
    sums = np.einsum("so,o->s", outcomes.astype(np.uint64), weights)
    part = np.unique(sums, return_inverse=True)[1].reshape(-1)
    while True:
        own = numbers[part]
        sums = own * multiples[0]
        np.add.at(sums, rows, (own[targets] - own[usual[columns]]) * multiples[1:][columns])
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
    # Every state goes where the first of its part goes, and says what that says.
    is_other = part[targets] != part[usual[columns]]
    rows, columns, targets = rows[is_other], columns[is_other], targets[is_other]
    counts, twin = np.bincount(rows, minlength=len(part)), first[part]
    starts = np.cumsum(counts) - counts
    cells = np.arange(len(rows)) - starts[rows] + starts[twin[rows]]
    assert (counts == counts[twin]).all()
    assert (columns[cells] == columns).all() and (part[targets[cells]] == part[targets]).all()
    assert (outcomes[twin] == outcomes).all()
    return part, first


def _merge_states(table: _PhraseTable) -> _PhraseTable:
    """The same automaton with fewer states."""
    part, first = equal_states(table.next, np.stack([table.phrase, table.words], 1))
    return _PhraseTable(
        part[table.next[first]].astype(np.int16), table.phrase[first], table.words[first]
    )
