"""The two readers of a completion, as step functions over UTF-8 bytes: tags with format, and the answer list.

They follow Python's `str` semantics on the decoded text. Three facts make bytes enough: the tags and the
label names are ASCII; UTF-8 lead bytes are never continuation bytes, so a multi-byte character is found
wherever its bytes stand, whatever broken bytes come before it; and "<" opens a tag but never occurs inside
one, so two tags cannot overlap.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cxr_jax.labels.automaton import Machine, compile_machine

THINK, END_THINK, ANSWER, END_ANSWER = TAGS = (b"<think>", b"</think>", b"<answer>", b"</answer>")

# What both str.strip() and the `\s` of `re` take for white space (the two sets are the same 29 characters).
WHITESPACE = frozenset(
    chr(code).encode()
    for code in (
        *range(0x09, 0x0E),
        *range(0x1C, 0x21),
        *(0x85, 0xA0, 0x1680),
        *range(0x2000, 0x200B),
        *(0x2028, 0x2029, 0x202F, 0x205F, 0x3000),
    )
)
# Beyond A-Z, the only character whose lower() is one ASCII letter: KELVIN SIGN.
# (U+0130 lowers to "i" and a combining dot: two characters, never part of an ASCII name.)
FOLDS = {"\u212a".encode(): b"k"}


def _prefixes(words: Iterable[bytes]) -> frozenset[bytes]:
    """All beginnings of the words but the empty one and the whole word."""
    return frozenset(word[:length] for word in words for length in range(1, len(word)))


_PARTIAL_SPACE = _prefixes(WHITESPACE)
_PARTIAL_CHAR = _prefixes([*WHITESPACE, *FOLDS])
_TAG_PREFIXES = _prefixes(TAGS) | {b""}

# ---- Tags and format -------------------------------------------------------------------------------------------------

# Where in the format a text is: head (inside the opening tag), think, join (between the two elements), body, end (right
# after </answer>), newline (after one more line end), dead (no more to be saved).
Phase = str | tuple[str, bytes]  # a join has the first bytes of what may be a white-space character


class _TagStep(NamedTuple):
    """What a byte does to the tag being read."""

    seen: bytes  # the tag prefix before the byte
    byte: bytes
    prefix: bytes  # the longest tag prefix that ends at the byte
    tag: bytes | None  # the tag that the byte completes

    @property
    def grows(self) -> bool:
        """Whether the byte continues the prefix, rather than starting a new one or none."""
        return self.prefix == self.seen + self.byte


def _read_tag(seen: bytes, byte: bytes) -> _TagStep:
    longer = seen + byte
    if longer in TAGS:
        return _TagStep(seen, byte, b"", longer)
    if longer in _TAG_PREFIXES:
        return _TagStep(seen, byte, longer, None)
    return _TagStep(seen, byte, b"<" if byte == b"<" else b"", None)


def _next_phase(phase: Phase, step: _TagStep) -> Phase:
    """Read one byte of ^<think>.*?</think>\\s*<answer>.*?</answer>$ (DOTALL).

    The earliest join leaves the most room for the rest, so one phase is enough: no set of phases is kept.
    """
    if phase == "head":
        if step.tag == THINK:
            return "think"
        return "head" if step.grows and THINK.startswith(step.prefix) else "dead"
    if phase == "think":
        return ("join", b"") if step.tag == END_THINK else "think"
    if isinstance(phase, tuple):
        return _leave_join(phase[1], step)
    if phase == "dead":
        return "dead"
    if step.tag == END_ANSWER:
        return "end"
    return "newline" if phase == "end" and step.byte == b"\n" else "body"


def _leave_join(partial: bytes, step: _TagStep) -> Phase:
    """Read one byte after </think>: white space, then <answer>. Anything else is thought again."""
    if step.tag is not None:
        # No other tag can be complete here: its second letter has led back to thought.
        return "body"
    if step.seen:
        return ("join", b"") if step.grows and ANSWER.startswith(step.prefix) else "think"
    char = partial + step.byte
    if char in WHITESPACE or char == b"<":
        return "join", b""
    return ("join", char) if char in _PARTIAL_SPACE else "think"


def tag_machine() -> Machine:
    """Compile the reader of tags and of the format.

    Events 1..4: this byte completes TAGS[event - 1]. Final value 1: the whole text has the format.
    """

    def step(state: tuple[Phase, bytes], value: int) -> tuple[tuple[Phase, bytes], int]:
        phase, seen = state
        tag_step = _read_tag(seen, bytes([value]))
        event = TAGS.index(tag_step.tag) + 1 if tag_step.tag else 0
        return (_next_phase(phase, tag_step), tag_step.prefix), event

    def final(state: tuple[Phase, bytes]) -> int:
        return int(state[0] in ("end", "newline"))

    start: tuple[Phase, bytes] = ("head", b"")
    return compile_machine(start, step, final)


# ---- The answer list -------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """What is known of the list item being read."""

    prefix: bytes | None = b""  # the folded text after leading space, while some name starts so
    label: int = -1  # the name read so far, if only white space followed it
    partial: bytes = b""  # first bytes of a character that may be white space or fold to a letter

    @property
    def is_empty(self) -> bool:
        """Whether nothing but white space has been read."""
        return self.prefix == b"" and not self.partial


UNKNOWN_ITEM = Item(prefix=None)  # no name starts so


class _Names(NamedTuple):
    """The names of an answer machine, as an item is compared with them."""

    folded: tuple[bytes, ...]  # in lower case
    starts: frozenset[bytes]  # all their beginnings, the whole names included

    # Events: name i is i + 1; then these.
    @property
    def unknown(self) -> int:
        """The event of an item that is no name."""
        return len(self.folded) + 1

    @property
    def empty(self) -> int:
        """The event of an empty item; also what is added where the byte closes the element."""
        return len(self.folded) + 2

    def outcome(self, item: Item) -> int:
        """The event of an item that ends here."""
        if item.is_empty:
            return self.empty
        return item.label + 1 if item.label >= 0 and not item.partial else self.unknown


def _read_item(names: _Names, item: Item, byte: bytes) -> Item:
    """Read one byte of strip().lower(), compared with every name at once. Commas and tags are the caller's."""
    char = item.partial + byte
    if char in _PARTIAL_CHAR:
        return item._replace(partial=char)
    is_space = char in WHITESPACE
    if is_space and item.prefix == b"":
        return Item()  # leading space
    folded = char.lower() if len(char) == 1 else FOLDS.get(char)
    prefix = None
    if item.prefix is not None and folded is not None and item.prefix + folded in names.starts:
        prefix = item.prefix + folded
    if prefix in names.folded:
        return Item(prefix, names.folded.index(prefix))
    label = item.label if is_space else -1  # trailing space leaves the name as it is
    return Item(prefix, label) if prefix is not None or label >= 0 else UNKNOWN_ITEM


# (phase, prefix of a tag read so far, item). Inside the element, at "<" the item so far is put by as its outcome, in
# case a closing tag follows: then the third entry is an event, not an item.
_AnswerState = tuple[str, bytes, Any]


def answer_machine(names: Sequence[str]) -> Machine:
    """Compile the reader of the first <answer>(.*?)</answer> as a list split at commas.

    With n names, at the byte that ends an item the event is: i + 1 for name i, n + 1 for an item that is no name, n + 2
    for an empty one; plus n + 2 when the byte also closes the element. Final value 1: it was closed. Items of an
    element that is never closed are reported too: the caller drops them.
    """
    folded = tuple(name.lower().encode("ascii") for name in names)
    known = _Names(folded, _prefixes(folded) | frozenset(folded))

    def step(state: _AnswerState, value: int) -> tuple[_AnswerState, int]:
        phase, seen, _ = state
        byte = bytes([value])
        if phase == "done":
            return state, 0
        if phase == "inside":
            return step_inside(state, byte)
        if seen + byte == ANSWER:
            return ("inside", b"", Item()), 0
        return ("before", _keep_prefix(seen + byte, ANSWER), None), 0

    def step_inside(state: _AnswerState, byte: bytes) -> tuple[_AnswerState, int]:
        _, seen, item = state
        held = item if seen else known.outcome(item)
        if seen + byte == END_ANSWER:
            return ("done", b"", None), held + known.empty
        # A comma or a "<" after a broken tag ends an item that has a "<" in it, and so is no name.
        held_or_unknown = known.unknown if seen else held
        if byte == b",":
            return ("inside", b"", Item()), held_or_unknown
        prefix = _keep_prefix(seen + byte, END_ANSWER)
        if prefix == b"<":
            return ("inside", prefix, held_or_unknown), 0
        if prefix:
            return ("inside", prefix, held), 0
        return ("inside", b"", UNKNOWN_ITEM if seen else _read_item(known, item, byte)), 0

    def final(state: _AnswerState) -> int:
        return int(state[0] == "done")

    texts = [ANSWER, END_ANSWER, b",", *folded, *map(bytes.upper, folded), *WHITESPACE, *FOLDS]
    return compile_machine(("before", b"", None), step, final, told_apart=b"".join(texts))


def _keep_prefix(read: bytes, tag: bytes) -> bytes:
    """The longest prefix of `tag` that ends here ("<" stands only at its start)."""
    if tag.startswith(read):
        return read
    return b"<" if read.endswith(b"<") else b""
