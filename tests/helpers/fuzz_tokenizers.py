"""Tokenizers for differential tests of rewards from token ids, and rows of ids that are hard to read.

"phantom": the embedded one. "small": 700 merges whose borders cross tags, and added tokens that decode oddly.
"qwen": Qwen2.5's in size, class, special and added tokens; its merges are made up to be hard, and need no package.
"published": Qwen2.5's own, where the package that has it is installed; "published3": Qwen3's.
"""

import functools
import random
from typing import NamedTuple

import fuzz_texts
import numpy as np
import oracle_rewards as oracle
import qwen_tokenizer
from qwen_tokenizer import ADDED as QWEN_ADDED
from qwen_tokenizer import ALPHABET, spelt
from qwen_tokenizer import BASE as QWEN_BASE
from qwen_tokenizer import ROWS as QWEN_ROWS
from transformers import Qwen2Tokenizer

from cxr_jax.labels.answers import TokenBytes
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.weights import pretrained

_BYTES = {c: b for b, c in ALPHABET.items()}


class Rng:
    """The two methods of numpy's Generator that `fuzz_texts` calls, several times faster for single numbers."""

    def __init__(self, seed):
        self._next = random.Random(seed).random

    def random(self, n: int | None = None):
        return self._next() if n is None else np.array([self._next() for _ in range(n)])

    def integers(self, low: int, high: int | None = None) -> int:
        return int(self._next() * low) if high is None else low + int(self._next() * (high - low))

    def pick(self, pool):
        return pool[int(self._next() * len(pool))]


class Subject(NamedTuple):
    """A tokenizer under test. tokenizer: of transformers; pieces: the bytes of each id (none for special tokens)."""

    name: str
    tokenizer: object
    table: TokenBytes
    pieces: list[bytes]
    ids: dict[bytes, list[int]]  # the ids that spell a byte string
    longest: int  # bytes of the longest piece, 24 at most
    odd: list[int]  # special and added tokens, ids that have no text, and a negative id


def _subject(name: str, tokenizer, rows: int) -> Subject:
    """rows: of the model's embedding, so that ids between the tokenizer's last and these can be drawn."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    added = backend.get_added_tokens_decoder()
    vocab = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i not in added or not added[i].special:
            pieces[i] = _meant(token)
    ids = {}
    for i, piece in enumerate(pieces):
        if piece:
            ids.setdefault(piece, []).append(i)
    beyond = [len(pieces), rows - 1, rows, rows + 64, 2**31 - 1, -1]
    table = TokenBytes.from_tokenizer(tokenizer)
    return Subject(
        name, tokenizer, table, pieces, ids, min(24, max(map(len, ids))), [*sorted(added), *beyond]
    )


@functools.cache
def load(name: str) -> Subject:
    """The subject "phantom", "small", "qwen", "published" or "published3"."""
    if name == "phantom":
        return _subject(name, tokenizers.load(pretrained.PHANTOM), 1024)
    if name == "small":
        from completions import small_tokenizer

        return _subject(name, small_tokenizer(), 768)
    if name == "published":
        return _subject(name, tokenizers.load(str(qwen_tokenizer.folder())), QWEN_ROWS)
    if name == "published3":
        return _subject(name, tokenizers.load(str(qwen_tokenizer.folder("qwen3"))), QWEN_ROWS)
    if name != "qwen":
        raise ValueError(f"no tokenizer {name!r}")
    return _subject(name, qwen(), QWEN_ROWS)


def qwen() -> Qwen2Tokenizer:
    """151,643 byte-level entries and the added tokens of Qwen2.5 under their ids. The same on every machine."""
    from tokenizers import AddedToken

    pieces, merges = qwen_merges()
    words = [spelt(p) for p in pieces]
    vocab = {s: i for i, s in enumerate(words)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[(spelt(a), spelt(b)) for a, b in merges])
    added = [AddedToken(t, special=True, normalized=False) for t in qwen_tokenizer.SPECIAL]
    tokenizer.add_tokens(
        added + [AddedToken(t, special=False, normalized=False) for t in QWEN_ADDED]
    )
    return tokenizer


def _meant(token: str) -> bytes:
    """The bytes that a token stands for; those of its characters if one of them is outside the alphabet."""
    return bytes(map(_BYTES.get, token)) if _BYTES.keys() >= set(token) else token.encode()


def qwen_merges() -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """The base entries in order of id, and a merge of two earlier entries for each but the 256 bytes.

    First the words of the format and of the labels, then stretches of hard texts, which cross the borders of
    tags and cut characters, then pairs of bytes, then earlier entries joined at random.
    """
    rng = Rng("qwen")
    pieces = [bytes([b]) for b in ALPHABET]
    known, merges = set(pieces), []

    def learn(piece: bytes) -> None:
        if piece in known or len(known) >= QWEN_BASE:
            return
        cut = 1 + rng.integers(len(piece) - 1)
        halves = piece[:cut], piece[cut:]
        for half in halves:
            learn(half)
        if piece not in known and len(known) < QWEN_BASE:
            known.add(piece)
            pieces.append(piece)
            merges.append(halves)

    words = {w: None for name in oracle.NAMES for w in (*name.split(), name)}
    for word in ("think", "answer", "</", "><", ">\n", ">\n\n", ", ", *words):
        for variant in (word, f" {word}", word.title(), f" {word.title()}", word.upper()):
            learn(variant.encode())
    for n in (2, 4, 8, 16, 32, 64, 128):
        for blank in (b" ", b"\n", b"\t", b"\r\n"):
            learn(blank * (n // len(blank)))
    while len(known) < 60_000:
        data = (
            fuzz_texts.near_miss(rng).encode() if rng.random() < 0.8 else fuzz_texts.raw_bytes(rng)
        )
        at = rng.integers(len(data) + 1)
        if stretch := data[at : at + 2 + rng.integers(12)]:
            learn(stretch)
    while len(known) < 90_000:
        learn(bytes([rng.integers(256), rng.integers(256)]))
    while len(known) < QWEN_BASE:
        joined = rng.pick(pieces) + rng.pick(pieces)
        if len(joined) <= 24:
            learn(joined)
    return pieces, merges


# --- rows of ids ----------------------------------------

_WHITE = [*fuzz_texts.SPACES, *fuzz_texts.NOT_SPACES]
_GOOD = "<think>a</think><answer>{}</answer>"
EDGES = ["", " ", "\n", "<", ",", "x", *oracle.TAGS, "".join(oracle.TAGS), "".join(oracle.TAGS) * 2]
EDGES += [
    _GOOD.format(x)
    for x in ("", ",", " , ,", "Edema,,edema", "\u00a0edema\u3000", "no finding, edema")
]
EDGES += [
    _GOOD.format(f"edema{x},fracture")
    for x in ("<", "</answer", "<answer>", "</think>", "\n", "</Answer>")
]
EDGES += [
    _GOOD.format("edema") + x
    for x in ("\n", "\n\n", "\r\n", "\r", "\n ", " \n", "\u2028", "\x85", "<", "x")
]
EDGES += [x + _GOOD.format("edema") for x in ("\n", " ", "\ufeff", "<think>", "<", "x")]
EDGES += [_GOOD.format("edema") + x + _GOOD.format("fracture") for x in ("", "\n", "x")]
EDGES += [f"<think>a</think>{x}<answer>{x}Edema{x}</answer>" for x in _WHITE]
EDGES += [
    _GOOD.format(f"{x}, bra{x}ed, li\u212a{x}e")
    for x in ("", "\u212a", "\u0130", "\u017f", "\u0131")
]
EDGES += [
    _GOOD.format(x) for x in ("edema \u3000", "edema\u0120x", "fracture,\u0120x")
]  # the added tokens of "small"
EDGES += [
    _GOOD.format(x)
    for x in (*oracle.NAMES, *(n.upper() for n in oracle.NAMES), ",".join(oracle.NAMES))
]
EDGES += [
    _GOOD.format("edema").replace(t, new)
    for t in oracle.TAGS
    for new in ("", t * 2, t.upper(), t[:-1])
]
BROKEN_EDGES = [
    _GOOD.format("@edema@, fracture").encode().replace(b"@", x) for x in fuzz_texts.BROKEN_BYTES
]
BROKEN_EDGES += [_GOOD.encode().replace(b"><", b">" + x + b"<") for x in fuzz_texts.BROKEN_BYTES]


def _char(rng) -> str:
    code = rng.integers(rng.pick((0x80, 0x100, 0x3001, 0xD800, 0x110000)))
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def mutated_text(rng, text: str, other: str) -> str:
    """One to four edits anywhere: cut, doubled, moved, or foreign characters, other case, parts of another text."""
    for _ in range(1 + rng.integers(4)):
        at, n, to = (
            rng.integers(len(text) + 1),
            1 + int(rng.random() ** 3 * 24),
            rng.integers(len(text) + 1),
        )
        part, kind = text[at : at + n], rng.integers(7)
        if kind == 0:
            text = text[:at] + text[at + n :]
        elif kind == 1:
            text = text[:to] + part + text[to:]
        elif kind == 2:
            rest = text[:at] + text[at + n :]
            text = rest[:to] + part + rest[to:]
        elif kind == 3:
            text = text[:at] + _char(rng) + text[at + rng.integers(2) :]
        elif kind == 4:
            text = text[:at] + part.swapcase() + text[at + n :]
        elif kind == 5:
            start = rng.integers(len(other) + 1)
            text = text[:at] + other[start : start + n] + text[at + rng.integers(n + 1) :]
        else:
            text = text[: len(text) - n] if rng.random() < 0.5 else text[n:]
    return text


def mutated_bytes(rng, data: bytes) -> bytes:
    """One to three bytes changed, put in or cut out."""
    for _ in range(1 + rng.integers(3)):
        at, kind = rng.integers(len(data) + 1), rng.integers(3)
        new = bytes([rng.integers(256)]) if kind else b""
        data = data[:at] + new + data[at + (kind != 1) :]
    return data


def mutated_ids(rng, subject: Subject, ids: list[int]) -> list[int]:
    """One to three ids put in, cut out, doubled, replaced or swapped."""
    for _ in range(1 + rng.integers(3)):
        at, kind = rng.integers(len(ids) + 1), rng.integers(6)
        new = rng.pick(subject.odd) if rng.random() < 0.4 else rng.integers(len(subject.pieces))
        if kind < 3:
            ids = [*ids[:at], new, *ids[at + (kind == 2) :]]
        elif kind == 3:
            ids = ids[:at] + ids[at + 1 :]
        elif kind == 4:
            ids = ids[:at] + ids[at : at + 1 + rng.integers(4)] + ids[at:]
        else:
            ids = ids[:at] + ids[at : at + 2][::-1] + ids[at + 2 :]
    return ids


def split(rng, subject: Subject, data: bytes) -> list[int]:
    """The bytes as tokens, cut at random: almost never the tokens that the tokenizer would choose."""
    most = rng.pick((1, 2, 4, 8, subject.longest))
    out, at, known = [], 0, subject.ids
    while at < len(data):
        n = min(1 + rng.integers(most), len(data) - at)
        while (ids := known.get(data[at : at + n])) is None:
            n -= 1
        out.append(ids[0] if len(ids) == 1 else rng.pick(ids))
        at += n
    return out


def long_text(rng, size: int) -> str:
    """A text with up to `size` more characters of thought; one in two without anything that could be a tag."""
    words = (
        fuzz_texts.soup
        if rng.random() < 0.5
        else lambda rng: rng.pick(("edema, ", "clear ", "\n", "\u80ba"))
    )
    filler, goal = "", rng.integers(size)
    while len(filler) < goal:
        filler += words(rng)
    return fuzz_texts.text(rng).replace("<think>", "<think>" + filler, 1)


def rows(rng, subject: Subject, n: int, size: int = 0) -> tuple[list[list[int]], list[str]]:
    """n rows of ids, and how each was made: canonical, split, bytes, ids, with "+ids" where ids were edited.

    size: if positive, thoughts of up to that many characters are put in.
    """
    made, texts, how, last = [], [], [], ""
    for _ in range(n):
        text = long_text(rng, size) if size else fuzz_texts.text(rng)
        if rng.random() < 0.4:
            text, last = mutated_text(rng, text, last), text
        kind = rng.random()
        if kind < 0.45:
            made.append(None)
            texts.append(text)
            how.append("canonical")
        elif kind < 0.97:
            broken = rng.random()
            data = text.encode()
            if broken < 0.3:
                data = (
                    fuzz_texts.raw_bytes(rng)
                    if broken < 0.1 and not size
                    else mutated_bytes(rng, data)
                )
            made.append(split(rng, subject, data))
            how.append("split" if broken >= 0.3 else "bytes")
        else:
            pool = subject.odd if rng.random() < 0.3 else range(len(subject.pieces))
            made.append([rng.pick(pool) for _ in range(rng.integers(12))])
            how.append("ids")
    coded = iter(canonical(subject, texts))
    made = [next(coded) if ids is None else ids for ids in made]
    for i, ids in enumerate(made):
        if how[i] != "ids" and rng.random() < 0.35:
            made[i], how[i] = mutated_ids(rng, subject, ids), how[i] + "+ids"
    return made, how


def canonical(subject: Subject, texts: list[str]) -> list[list[int]]:
    """The ids that the tokenizer gives."""
    if not texts:
        return []
    backend = getattr(subject.tokenizer, "backend_tokenizer", subject.tokenizer)
    return [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]


def edge_rows(rng, subject: Subject) -> tuple[list[list[int]], list[str]]:
    """Every edge case as the tokenizer cuts it, byte by byte, and cut at random; and rows of odd ids only."""
    data = [t.encode() for t in EDGES] + BROKEN_EDGES
    made = canonical(subject, EDGES)
    made += [[subject.ids[bytes([b])][0] for b in d] for d in data]
    made += [split(rng, subject, d) for d in data for _ in range(2)]
    made += [[], *([i] for i in subject.odd), *([i] * 3 for i in subject.odd), list(subject.odd)]
    # Ids without text inside a tag and between two tags do not part them.
    tags = [subject.ids[bytes([b])][0] for b in _GOOD.format("edema").encode()]
    made += [[x for i in tags for x in (i, odd)] for odd in subject.odd]
    return made, ["edge"] * len(made)
