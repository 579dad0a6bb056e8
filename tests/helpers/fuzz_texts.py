"""Near-miss completions for differential tests: random strings put together from the pieces that matter."""

import numpy as np
from oracle_rewards import NAMES, TAGS

SPACES = [
    chr(c) for c in (*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))
]
SPACES += ["\u2028", "\u2029", "\u202f", "\u205f", "\u3000"]
NOT_SPACES = [
    "\u200b",
    "\u200c",
    "\u2060",
    "\ufeff",
    "\u180e",
    "\x00",
    "\x1b",
    "\x7f",
    "\x86",
    "\u2010",
    "\u00ad",
]
LOOKALIKES = [
    "K",
    "\u212a",
    "k",
    "\u0130",
    "i\u0307",
    "\u0131",
    "\u017f",
    "\uff25",
    "\u0415dema",
    "ede\u0301ma",
]
LOOKALIKES += [
    "pneumon\u0130a",
    "\u017fupport devices",
    "no f\u0131nding",
    "lung\u00a0opacity",
    "lung  lesion",
]
BROKEN_TAGS = [
    "<",
    ">",
    "</",
    "<<",
    "<answer",
    "</answer",
    "answer>",
    "<Answer>",
    "</ANSWER>",
    "< answer>",
]
BROKEN_TAGS += [
    "</ answer>",
    "<answer/>",
    "<think",
    "</think",
    "think>",
    "<THINK>",
    "<ans<answer>",
    "</ans</answer>",
]
BROKEN_TAGS += [
    "<thi</think>",
    "<<answer>",
    "</think ",
    "<answer\u200b>",
    "&lt;answer&gt;",
    "<answer>>",
    "<//answer>",
]
OTHER = [
    "\U0001f600",
    "\u80ba",
    "\u00e9",
    "\ufffd",
    "x",
    "foo bar",
    ".",
    ";",
    "\uff0c",
    "\u060c",
    "none",
    "\ud7ff",
]
BROKEN_BYTES = [
    b"\xe2",
    b"\xe2\x80",
    b"\xe3\x80",
    b"\xc2",
    b"\xe1\x9a",
    b"\xf0\x9f",
    b"\x80",
    b"\xa0",
    b"\xff",
]
BROKEN_BYTES += [
    b"\xc0\xa0",
    b"\xe0\x80\xa0",
    b"\xed\xa0\x80",
    b"\xe2\x84",
    b"\xaa",
    b"\xf4\x90\x80\x80",
    b"\x85",
]


def _pick(rng, pool):
    return pool[rng.integers(len(pool))]


def _name(rng) -> str:
    name = _pick(rng, NAMES)
    kind = rng.integers(8)
    if kind < 2:
        return name
    if kind < 4:
        return name.title()
    if kind == 4:
        return "".join(c.upper() if rng.random() < 0.5 else c for c in name)
    at = int(rng.integers(len(name) + 1))
    if kind == 5:
        return name[:at] + _pick(rng, SPACES + NOT_SPACES + LOOKALIKES) + name[at:]
    if kind == 6:
        return name[:at]
    return name[:at] + name[at + 1 :]


def _padding(rng) -> str:
    return "".join(
        _pick(rng, SPACES if rng.random() < 0.85 else NOT_SPACES) for _ in range(rng.integers(3))
    )


def _list(rng) -> str:
    """Items with padding; now and then empty, junk or cut by a tag."""
    items = []
    for _ in range(rng.integers(6)):
        kind = rng.random()
        middle = _name(rng) if kind < 0.8 else "" if kind < 0.88 else _piece(rng)
        items.append(_padding(rng) + middle + _padding(rng))
    return ",".join(items)


def _piece(rng) -> str:
    kind = rng.integers(10)
    if kind < 3:
        return _pick(rng, TAGS)
    pools = (BROKEN_TAGS, SPACES, NOT_SPACES + OTHER, LOOKALIKES, [",", ",,", ", ", "\n", "\r\n"])
    return _pick(rng, pools[kind - 3]) if kind < 8 else _name(rng)


def soup(rng) -> str:
    """Pieces in any order."""
    return "".join(_piece(rng) for _ in range(rng.integers(14)))


def near_miss(rng) -> str:
    """A well-formed completion with a few edits: pieces put in, doubled or cut out."""
    parts = ["<think>", soup(rng) if rng.random() < 0.3 else "Clear lungs, no edema.", "</think>"]
    parts += [_padding(rng) if rng.random() < 0.5 else "", "<answer>", _list(rng), "</answer>"]
    parts += ["\n"] if rng.random() < 0.2 else []
    for _ in range(rng.integers(3)):
        at = int(rng.integers(len(parts) + 1))
        kind = rng.random()
        if kind < 0.6:
            parts.insert(at, _piece(rng))
        elif kind < 0.8:
            parts.insert(at, _pick(rng, parts))
        elif len(parts) > 1:
            parts.pop(min(at, len(parts) - 1))
    text = "".join(parts)
    if rng.random() < 0.1:  # one character less or changed
        at = int(rng.integers(max(1, len(text))))
        text = text[:at] + _pick(rng, ["", "<", ">", ",", " ", "\u2003"]) + text[at + 1 :]
    return text


def text(rng) -> str:
    return soup(rng) if rng.random() < 0.3 else near_miss(rng)


def solution(rng) -> str:
    return _list(rng) if rng.random() < 0.5 else ", ".join(np.array(NAMES)[rng.random(14) < 0.2])


def raw_bytes(rng) -> bytes:
    """A text's bytes with broken UTF-8 put in, or bytes cut out."""
    data = text(rng).encode()
    for _ in range(1 + rng.integers(4)):
        at = int(rng.integers(len(data) + 1))
        if rng.random() < 0.7:
            data = data[:at] + _pick(rng, BROKEN_BYTES) + data[at:]
        else:
            data = data[:at] + data[at + 1 :]
    return data
