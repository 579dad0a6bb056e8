"""Phrases compiled to two tables: one that reads words letter by letter, one that finds phrases word by word.

Words: an automaton over the 37 symbols a word has (a-z, 0-9 and the point of a decimal), whose state says which of the
lexicon's words, stems and classes the letters so far could be. Words that the lexicon never tells apart share a word
class. Phrases: the subset construction of Aho-Corasick with word classes as the alphabet; a state knows the
longest phrase that ends at it. Nothing here runs on a device.
"""

from typing import NamedTuple

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels import lexicon as lx

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789."  # "." is a decimal point inside a number
TOKENS = ".?!;:,/"  # punctuation that is a token of its own
BREAK = "\n"  # a blank line or a bullet
MAX_STATES = 32_767
MAX_CELLS = 1 << 27  # of the phrase table


class Tables(NamedTuple):
    """word_next int16 [W, 37]: next state of a word (0: start). word_class int16 [W]: its class, if it ends there.
    token_class int16 [8]: the classes of TOKENS and BREAK.

    phrase_next int16 [P, C]; phrase int16 [P]: 1 + index into `meanings` of the longest phrase that ends in the state,
    0 for none; phrase_words int16 [P]: how many tokens it has.
    """

    word_next: np.ndarray
    word_class: np.ndarray
    token_class: np.ndarray
    phrase_next: np.ndarray
    phrase: np.ndarray
    phrase_words: np.ndarray
    meanings: tuple[lx.Meaning, ...]


def compile_lexicon(lexicon: lx.Lexicon) -> Tables:
    """Raises UserError for a clash that only shows when phrases meet: two that fit the same words equally well."""
    words, stems, member = _vocabulary(lexicon)
    word_next, ends = _word_table(lexicon.name, words, stems)
    classes: dict[frozenset[str], int] = {frozenset(): 0}
    word_class = np.zeros(len(ends), np.int16)
    for state, (word, held) in enumerate(ends):
        patterns = {f"{s}*" for s in held} | (
            {word, *member.get(word, ())} if word in words else set()
        )
        word_class[state] = classes.setdefault(frozenset(patterns), len(classes))
    token_class = np.zeros(len(TOKENS) + 1, np.int16)
    for i, token in enumerate(TOKENS + BREAK):
        if token in words or token == BREAK:
            token_class[i] = classes.setdefault(frozenset({token}), len(classes))
    meanings = tuple(dict.fromkeys([*lexicon.phrases.values(), lx.Meaning("stops", "sentence")]))
    phrases = {**lexicon.phrases, (BREAK,): lx.Meaning("stops", "sentence")}
    table, phrase, phrase_words = _phrase_table(lexicon.name, phrases, list(classes), meanings)
    table, phrase, phrase_words = _without_twins(table, phrase, phrase_words)
    table, same = np.unique(
        table, axis=1, return_inverse=True
    )  # classes that no phrase tells apart
    same = same.reshape(-1).astype(np.int16)
    return Tables(
        word_next, same[word_class], same[token_class], table, phrase, phrase_words, meanings
    )


def _vocabulary(lexicon):
    """The plain words, the stems, and for each word the classes it is in ("<name>")."""
    words, stems, member = set(), set(), {}
    for pattern in {p for phrase in lexicon.phrases for p in phrase}:
        if pattern[0] == "<":
            for word in lexicon.classes[pattern[1:-1]]:
                words.add(word)
                member.setdefault(word, set()).add(pattern)
        elif pattern[-1] == "*":
            stems.add(pattern[:-1])
        else:
            words.add(pattern)
    return words, stems, member


def _word_table(name, words, stems):
    """Next states int16 [W, 37], and what each state has read: (the letters, or None off the trie; stems of them)."""
    prefixes = {w[:i] for w in words | stems for i in range(len(w) + 1)}
    number, ends, rows = {("", frozenset()): 0}, [("", frozenset())], []
    for word, held in ends:  # grows while we walk it
        row = []
        for letter in LETTERS:
            longer = None if word is None or word + letter not in prefixes else word + letter
            state = (longer, held | {longer} if longer in stems else held)
            if state not in number:
                number[state] = len(ends)
                ends.append(state)
            row.append(number[state])
        rows.append(row)
    if len(ends) > MAX_STATES:
        raise UserError(
            f"{name}: the lexicon is too large: its words take more than {MAX_STATES} states"
        )
    return np.array(rows, np.int16), ends


def _phrase_table(name, phrases, classes, meanings):
    children: list[dict[str, int]] = [{}]  # a trie over patterns
    at_end: dict[int, tuple] = {}  # node -> (words, specificity from the last word on, meaning)
    for words, meaning in phrases.items():
        node = 0
        for word in words:
            if word not in children[node]:
                children[node][word] = len(children)
                children.append({})
            node = children[node][word]
        at_end[node] = (len(words), tuple(_specific(w) for w in reversed(words)), meaning, words)
    containing: dict[str, list[int]] = {}
    for number, patterns in enumerate(classes):
        for pattern in patterns:
            containing.setdefault(pattern, []).append(number)
    start = frozenset({0})  # every state has the root in it: a phrase may start anywhere
    number, states, rows = {start: 0}, [start], []

    def reached(nodes) -> dict[int, set[int]]:
        targets: dict[int, set[int]] = {}
        for node in nodes:
            for pattern, child in children[node].items():
                for c in containing.get(pattern, ()):
                    targets.setdefault(c, {0}).add(child)
        return targets

    from_root = reached(start)
    for state in states:  # grows while we walk it
        row = np.zeros(len(classes), np.int16) if state == start else rows[0].copy()
        targets = from_root if state == start else reached(state - start)
        for c, nodes in targets.items():
            target = frozenset(nodes | from_root.get(c, set()))
            if target not in number:
                number[target] = len(states)
                states.append(target)
            row[c] = number[target]
        rows.append(row)
        if len(states) > MAX_STATES or len(states) * len(classes) > MAX_CELLS:
            raise UserError(
                f"{name}: the lexicon is too large: its phrases take more than {len(states)} states"
            )
    phrase, phrase_words = np.zeros(len(states), np.int16), np.zeros(len(states), np.int16)
    for i, state in enumerate(states):
        ended = sorted((at_end[n] for n in state if n in at_end), key=lambda e: e[:2], reverse=True)
        if len(ended) > 1 and ended[0][:2] == ended[1][:2] and ended[0][2] != ended[1][2]:
            raise lx.clash(name, ended[0][3], ended[0][2], ended[1][2])
        if ended:
            phrase_words[i], phrase[i] = ended[0][0], 1 + meanings.index(ended[0][2])
    return np.stack(rows), phrase, phrase_words


def _without_twins(table, phrase, words):
    """The same automaton without states that nothing that follows can tell apart (Moore's partition refinement).

    Parts are told apart by 64-bit sums of random multiples; the result is checked, so a collision would be an error.
    """
    weights = np.random.default_rng(0).integers(1, 2**63, table.shape[1] + 1, dtype=np.uint64)
    part = np.unique(phrase.astype(np.int64) << 16 | words, return_inverse=True)[1].reshape(-1)
    while True:
        sums = (part[table].astype(np.uint64) * weights[1:]).sum(axis=1) + part.astype(
            np.uint64
        ) * weights[0]
        _, first, finer = np.unique(sums, return_index=True, return_inverse=True)
        finer = finer.reshape(-1)
        if len(first) == part.max() + 1:
            break
        part = finer
    order = np.argsort(first, kind="stable")  # the start stays state 0
    number = np.empty(len(first), np.int64)
    number[order] = np.arange(len(first))
    part, first = number[finer], first[order]
    small = part[table[first]].astype(np.int16)
    assert (small[part] == part[table]).all() and (phrase[first][part] == phrase).all()
    return small, phrase[first], words[first]


def _specific(pattern: str) -> int:
    """A word beats one of several (a class or a group), which beats a stem; a longer stem beats a shorter one."""
    return len(pattern) if pattern[-1] == "*" else 900 if pattern[0] == "<" else 1_000
