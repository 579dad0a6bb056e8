"""The two readers of a completion, as step functions over UTF-8 bytes: tags with format, and the answer list.

They follow Python's `str` semantics on the decoded text. Three facts make bytes enough: the tags and the
label names are ASCII; UTF-8 lead bytes are never continuation bytes, so a multi-byte character is found
wherever its bytes stand, whatever broken bytes come before it; and "<" opens a tag but never occurs inside
one, so two tags cannot overlap.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cxr_jax.labels.automaton import Machine, compile_machine

THINK, END_THINK, ANSWER, END_ANSWER = TAGS = (b"<think>", b"</think>", b"<answer>", b"</answer>")

# What both str.strip() and the `\s` of `re` take for white space (the two sets are the same 29 characters).
WHITESPACE = frozenset(
    chr(c).encode()
    for c in (*range(0x09, 0x0E), *range(0x1C, 0x21), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))
    + (0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
)
# Beyond A-Z, the only character whose lower() is one ASCII letter: KELVIN SIGN.
# (U+0130 lowers to "i" and a combining dot: two characters, never part of an ASCII name.)
FOLDS = {"\u212a".encode(): b"k"}


def _prefixes(words) -> frozenset[bytes]:
    return frozenset(w[:i] for w in words for i in range(1, len(w)))


_PARTIAL_SPACE = _prefixes(WHITESPACE)
_PARTIAL_CHAR = _prefixes([*WHITESPACE, *FOLDS])
_TAG_PREFIXES = _prefixes(TAGS) | {b""}


def _tag_step(seen: bytes, byte: bytes) -> tuple[bytes, bytes | None]:
    """The longest tag prefix that ends at this byte, and the tag that this byte completes, if any."""
    longer = seen + byte
    if longer in TAGS:
        return b"", longer
    if longer in _TAG_PREFIXES:
        return longer, None
    return (b"<" if byte == b"<" else b""), None


def _format_step(phase, seen: bytes, byte: bytes, now: bytes, tag: bytes | None):
    """One byte of ^<think>.*?</think>\\s*<answer>.*?</answer>$ (DOTALL). `seen`, `now`: tag prefix before,
    after.

    Phases: head (inside the opening tag), dead, think, (join, broken-off white-space bytes), body, end,
    newline. The earliest join leaves the most room for the rest, so one phase is enough.
    """
    if phase == "head":
        if tag == THINK:
            return "think"
        return "head" if now == seen + byte and THINK.startswith(now) else "dead"
    if phase == "think":
        return ("join", b"") if tag == END_THINK else "think"
    if phase[0] == "join":
        return _join_step(phase[1], seen, byte, now, tag)
    if phase == "dead":
        return "dead"
    if tag == END_ANSWER:
        return "end"
    return "newline" if phase == "end" and byte == b"\n" else "body"


def _join_step(partial: bytes, seen: bytes, byte: bytes, now: bytes, tag: bytes | None):
    """After </think>: white space, then <answer>. Anything else is thought again."""
    if tag is not None:
        return (
            "body"  # no other tag can be complete here: its second letter has led back to thought
        )
    if seen:
        return ("join", b"") if now == seen + byte and ANSWER.startswith(now) else "think"
    char = partial + byte
    if char in WHITESPACE or char == b"<":
        return "join", b""
    return ("join", char) if char in _PARTIAL_SPACE else "think"


def tag_machine() -> Machine:
    """Events 1..4: this byte completes TAGS[event - 1]. Final value 1: the whole text has the format."""

    def step(state, value):
        phase, seen = state
        byte = bytes([value])
        now, tag = _tag_step(seen, byte)
        after = _format_step(phase, seen, byte, now, tag)
        return (after, now), TAGS.index(tag) + 1 if tag else 0

    return compile_machine(("head", b""), step, lambda state: int(state[0] in ("end", "newline")))


class Item(NamedTuple):
    """What is known of the list item being read."""

    prefix: bytes | None = b""  # the folded text after leading space, while some name starts so
    label: int = -1  # the name read so far, if only white space followed it
    partial: bytes = b""  # first bytes of a character that may be white space or fold to a letter

    @property
    def empty(self) -> bool:
        return self.prefix == b"" and not self.partial


DEAD = Item(prefix=None)


def _item_step(names: tuple[bytes, ...], starts: frozenset[bytes], item: Item, byte: bytes) -> Item:
    """One byte of strip().lower() compared with every name at once. Commas and tags are the caller's."""
    char = item.partial + byte
    if char in _PARTIAL_CHAR:
        return item._replace(partial=char)
    space = char in WHITESPACE
    if space and item.prefix == b"":
        return Item()
    folded = char.lower() if len(char) == 1 else FOLDS.get(char)
    longer = item.prefix + folded if item.prefix is not None and folded is not None else None
    prefix = longer if longer in starts else None
    if prefix in names:
        return Item(prefix, names.index(prefix))
    label = item.label if space else -1
    return Item(prefix, label) if prefix is not None or label >= 0 else DEAD


def answer_machine(names: Sequence[str]) -> Machine:
    """Reads the first <answer>(.*?)</answer> as a list split at commas.

    With n names, at the byte that ends an item the event is: i + 1 for name i, n + 1 for an item that is no
    name, n + 2 for an empty one; plus n + 2 when the byte also closes the element. Final value 1: it was
    closed. Items of an element that is never closed are reported too: the caller drops them.
    """
    folded = tuple(name.lower().encode("ascii") for name in names)
    starts = _prefixes(folded) | frozenset(folded)
    unknown, empty = len(names) + 1, len(names) + 2

    def outcome(item: Item) -> int:
        if item.empty:
            return empty
        return item.label + 1 if item.label >= 0 and not item.partial else unknown

    def step(state, value):
        phase, seen, item = state
        byte = bytes([value])
        if phase == "done":
            return state, 0
        now = seen + byte
        if phase == "before":
            if now == ANSWER:
                return ("inside", b"", Item()), 0
            return ("before", _keep(now, ANSWER, byte), None), 0
        # Inside: at "<" the item so far is put by as its outcome, in case a closing tag follows.
        held = item if seen else outcome(item)
        if now == END_ANSWER:
            return ("done", b"", None), held + empty
        if byte == b",":
            return ("inside", b"", Item()), unknown if seen else held
        now = _keep(now, END_ANSWER, byte)
        if now == b"<":
            return ("inside", now, unknown if seen else held), 0
        if now:
            return ("inside", now, held), 0
        return ("inside", b"", DEAD if seen else _item_step(folded, starts, item, byte)), 0

    return compile_machine(("before", b"", None), step, lambda state: int(state[0] == "done"))


def _keep(now: bytes, tag: bytes, byte: bytes) -> bytes:
    """The longest prefix of `tag` that ends here ("<" stands only at its start)."""
    return now if tag.startswith(now) else b"<" if byte == b"<" else b""
