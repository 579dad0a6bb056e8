"""The rules of valid answers as tables over token ids: from bytes to a `Constraint`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.inference.constrained import Constraint
from cxr_jax.labels.answer_machines import ANSWER, END_ANSWER, END_THINK, TAGS, THINK
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.labels.taxonomy import CHEXPERT_14

# What may stand between </think> and <answer>.
SEPARATORS = (b"", b"\n", b"\n\n")
# What may stand beside No Finding.
NO_FINDING = {"devices": ("Support Devices",), "alone": (), "any": None}

Phase = tuple[str, bytes]
"""A state of the byte machine: where the text is, and the bytes of what has begun there.

head (inside the opening tag), free (bytes: a tag begun), lead (bytes of </think>..<answer> so far),
item (bytes of a name), end (bytes after a name: of ", " or </answer>), done.
"""


def compile_answers(
    table: TokenBytes,
    vocab_size: int,
    stop_ids: Sequence[int],
    *,
    max_new_tokens: int,
    names: Sequence[str] = CHEXPERT_14,
    no_finding: str = "devices",
    force_format: bool = True,
    separators: Sequence[bytes] = SEPARATORS,
    answer_tokens: int | None = None,
    suppress_ids: Sequence[int] = (),
) -> Constraint:
    """Compile the rules of one tokenizer for `sampling.generate`. Seconds for a vocabulary of 150,000.

    A completion ends within max_new_tokens because a token is allowed only if, after it, the name begun (or one
    name, if none is complete) can be completed and the answer ended in the tokens left.

    Args:
        table: the bytes of each token id. Tokens without bytes are ruled out, but for the stop at the end.
        vocab_size: columns of the logits.
        stop_ids: end a completion.
        names: the list may hold these, each once, in any order, at least one, joined by ", ".
        no_finding: what may stand beside "No Finding": "devices" (Support Devices, as the phantom readers write),
            "alone" (nothing), "any" (everything).
        force_format: the text is <think>, free text without a tag, </think>, a separator, <answer>, the list,
            </answer>, stop. False: free text, which may also stop; once it holds <answer>, the list, </answer>, stop.
        answer_tokens: with force_format, the trace has to close while so many tokens beyond the shortest possible
            ending are left for the answer. None: as many as the list of all names takes.
        suppress_ids: are never sampled.

    Raises:
        UserError: for an unknown no_finding, for names that start one another, and as `Constraint.within`.
    """
    # ---- The rules as a machine over bytes ----
    if no_finding not in NO_FINDING:
        raise UserError(f"no_finding={no_finding!r}: use one of {', '.join(NO_FINDING)}")
    grammar = _grammar([name.encode() for name in names], separators, force_format)
    conflicts = _conflicts(list(names), no_finding)
    machine = _byte_machine(grammar)

    # ---- Over tokens, with their ends ----
    pieces = _pieces(table, vocab_size, {*stop_ids, *suppress_ids})
    tables = _token_tables(pieces, machine, conflicts)
    tables = _with_stops(tables, machine, [token for token in stop_ids if token < vocab_size])
    need = _shortest(tables, len(names), machine.over)

    # ---- What they say of every state ----
    if answer_tokens is None:
        answer_tokens = _spelling(b", ".join(grammar.names) + END_ANSWER, set(pieces))
    begun = machine.is_in("item", "end", "done")
    begun[[machine.over, machine.dead]] = True
    settled = np.isinf(need[:, :-1]).all(1) & begun
    settled[machine.dead] = False
    bars = np.zeros_like(tables.hits)
    for index, mask in enumerate(conflicts):
        bars |= np.where(tables.hits >> index & 1 == 1, mask, 0)
    return Constraint(
        classes=np.asarray(tables.classes, np.int32),
        next=np.asarray(tables.after, np.int32),
        hits=np.asarray(tables.hits, np.int32),
        bars=np.asarray(bars, np.int32),
        fits=np.asarray(_fits(need, machine, answer_tokens), np.int32),
        conflicts=np.asarray(conflicts, np.int32),
        options=_options(tables, machine),
        locked=machine.locked(),
        begun=begun,
        settled=settled,
        budget=np.int32(0),
    ).within(max_new_tokens)


def _conflicts(names: list[str], no_finding: str) -> np.ndarray:
    """int32 [n]: bits of the names that cannot follow or precede each name: itself, and No Finding's enemies."""
    masks = 1 << np.arange(len(names))
    beside = NO_FINDING[no_finding]
    if beside is not None and "No Finding" in names:
        none = names.index("No Finding")
        for index, name in enumerate(names):
            if index != none and name not in beside:
                masks[index] |= 1 << none
                masks[none] |= 1 << index
    return masks.astype(np.int32)


# ---- Bytes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Grammar:
    """names: what the list may hold; leads: what opens the list (from </think> on, if the format is forced)."""

    names: tuple[bytes, ...]
    leads: tuple[bytes, ...]
    force_format: bool

    def step(self, state: Phase, byte: bytes) -> tuple[Phase | None, int | None]:
        """One byte: (state, or None for a dead end; the name completed, or None)."""
        phase, seen = state
        longer = seen + byte
        if phase == "item" and longer in self.names:
            return ("end", b""), self.names.index(longer)
        steps = {
            "head": self._head,
            "free": self._free,
            "lead": self._lead,
            "item": self._item,
            "end": self._end,
        }
        return (steps[phase](longer) if phase in steps else None), None

    def _head(self, longer: bytes) -> Phase | None:
        if longer == THINK:
            return "free", b""
        return ("head", longer) if THINK.startswith(longer) else None

    def _free(self, longer: bytes) -> Phase | None:
        tags = TAGS if self.force_format else (ANSWER,)
        if longer in tags:
            # Of the tags only the one that leads on may come.
            if not self.force_format:
                return "item", b""
            return ("lead", longer) if longer == END_THINK else None
        if any(tag.startswith(longer) for tag in tags):
            return "free", longer
        return "free", b"<" if longer.endswith(b"<") else b""

    def _lead(self, longer: bytes) -> Phase | None:
        if longer in self.leads:
            return "item", b""
        return ("lead", longer) if any(lead.startswith(longer) for lead in self.leads) else None

    def _item(self, longer: bytes) -> Phase | None:
        return ("item", longer) if any(name.startswith(longer) for name in self.names) else None

    def _end(self, longer: bytes) -> Phase | None:
        if longer == b", ":
            return "item", b""
        if longer == END_ANSWER:
            return "done", b""
        return (
            ("end", longer)
            if any(text.startswith(longer) for text in (b", ", END_ANSWER))
            else None
        )

    def lock(self, state: Phase) -> Phase:
        """The state at the same place from which the answer must begin at once."""
        phase, seen = state
        if phase not in ("head", "free"):
            return state
        tag = END_THINK if self.force_format else ANSWER
        return "lead", seen if phase == "free" and tag.startswith(seen) else b""


def _grammar(names: list[bytes], separators: Sequence[bytes], force_format: bool) -> _Grammar:
    for index, name in enumerate(names):
        if any(name.startswith(other) for place, other in enumerate(names) if place != index):
            raise UserError("constrained answers need names of which none starts another")
    leads = (ANSWER,)
    if force_format:
        leads = tuple(END_THINK + separator + ANSWER for separator in separators)
    return _Grammar(names=tuple(names), leads=leads, force_format=force_format)


class _ByteMachine(NamedTuple):
    """The grammar over single bytes, S states."""

    grammar: _Grammar
    states: list[Phase]
    number: dict[Phase, int]
    after: np.ndarray  # int [S, 256]: the next state, -1 for a dead end
    event: np.ndarray  # int [S, 256]: the name completed, or -1

    # The two states that the finished tables have beyond these.
    @property
    def over(self) -> int:
        return len(self.states)

    @property
    def dead(self) -> int:
        return len(self.states) + 1

    def is_in(self, *phases: str) -> np.ndarray:
        """bool [S + 2]: the states of these phases; over and dead are in none."""
        return np.array([phase in phases for phase, _ in self.states] + [False] * 2)

    def locked(self) -> np.ndarray:
        """int32 [S + 2]: see `_Grammar.lock`."""
        locked = [self.number[self.grammar.lock(state)] for state in self.states]
        return np.array([*locked, self.over, self.dead], np.int32)


def _byte_machine(grammar: _Grammar) -> _ByteMachine:
    states: list[Phase] = [("head" if grammar.force_format else "free", b""), ("lead", b"")]
    number = {state: index for index, state in enumerate(states)}
    # Every byte that the rules do not name does what 0 does.
    used = sorted({*b"".join([*TAGS, *grammar.leads, *grammar.names]), *b", \0"})
    column = np.array([used.index(byte) if byte in used else 0 for byte in range(256)])
    after, event = [], []
    for state in states:  # grows while we walk it
        steps = [grammar.step(state, bytes([byte])) for byte in used]
        for target, _ in steps:
            if target is not None and target not in number:
                number[target] = len(states)
                states.append(target)
        after.append([-1 if target is None else number[target] for target, _ in steps])
        event.append([-1 if name is None else name for _, name in steps])
    return _ByteMachine(
        grammar, states, number, np.array(after)[:, column], np.array(event)[:, column]
    )


# ---- Tokens ------------------------------------------------------------------------------------------------


class _TokenTables(NamedTuple):
    """The rules over tokens, C classes of tokens that behave alike."""

    classes: np.ndarray  # int32 [V]
    after: np.ndarray  # int [S, C]: the next state
    hits: np.ndarray  # int [S, C]: names completed, as bits


def _pieces(table: TokenBytes, vocab_size: int, without: set[int]) -> list[bytes]:
    """The bytes of each token id; none for ids outside the table and for those in `without`."""
    text = np.asarray(table.data).tobytes()
    offsets, lengths = np.asarray(table.offset).tolist(), np.asarray(table.length).tolist()
    pieces = [
        b"" if token in without else text[offset : offset + length]
        for token, (offset, length) in enumerate(zip(offsets, lengths, strict=True))
    ]
    return (pieces + [b""] * vocab_size)[:vocab_size]


def _token_tables(
    pieces: list[bytes], machine: _ByteMachine, conflicts: np.ndarray
) -> _TokenTables:
    """From every state through every piece; the class of a piece without bytes is -1."""
    # Bytes that no state tells apart are written alike first: most tokens then are one of few strings.
    _, first, same = np.unique(machine.after, axis=1, return_index=True, return_inverse=True)
    alike = first[same.reshape(-1)].astype(np.uint8).tobytes()
    plain = [piece.translate(alike) for piece in pieces]
    distinct = sorted({piece for piece in plain if piece}, key=len)

    # The last row is the dead end, -1.
    dead_end = np.full((1, 256), -1)
    after_byte = np.concatenate([machine.after, dead_end])
    event = np.concatenate([machine.event, dead_end])
    masks = np.append(conflicts, 0)

    # Words that lead everywhere to the same are one class; in turns, because a turn takes S * 1024 numbers.
    known: dict[bytes, int] = {}
    class_of = {b"": -1}
    columns = []
    for start in range(0, len(distinct), 1024):
        words = distinct[start : start + 1024]
        after, hits = _walk(words, after_byte, event, masks)
        behaviours = np.concatenate([after, hits]).T.copy()
        for index, (word, behaviour) in enumerate(zip(words, behaviours, strict=True)):
            behaviour = behaviour.tobytes()
            if behaviour not in known:
                known[behaviour] = len(known)
                columns.append((after[:, index].copy(), hits[:, index].copy()))
            class_of[word] = known[behaviour]
    after, hits = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
    classes = np.array([class_of[piece] for piece in plain], np.int32)
    return _TokenTables(classes, np.where(after < 0, machine.dead, after), hits)


def _walk(
    words: list[bytes], after_byte: np.ndarray, event: np.ndarray, masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """From every state through every word: (state after, names completed), int32 [S, words]; -1 is dead."""
    states = np.arange(len(after_byte) - 1, dtype=np.int32)
    after = np.repeat(states[:, None], len(words), 1)
    hits, bars = np.zeros_like(after), np.zeros_like(after)
    for place in range(len(words[-1])):
        going = np.array([len(word) > place for word in words])
        byte = np.array([word[place] for word in words if len(word) > place])
        name = event[after[:, going], byte]
        bit = np.where(name >= 0, 1 << np.maximum(name, 0), 0)
        # A token that names twice, or names a contradiction, is a dead end.
        is_allowed = bars[:, going] & bit == 0
        after[:, going] = np.where(is_allowed, after_byte[after[:, going], byte], -1)
        hits[:, going] |= bit
        bars[:, going] |= masks[name]
    return after, np.where(after < 0, 0, hits)


def _with_stops(tables: _TokenTables, machine: _ByteMachine, stop_ids: list[int]) -> _TokenTables:
    """The tables with the states over and dead, a class of stop tokens, and one of tokens that never come."""
    stop = tables.after.shape[1]
    classes = tables.classes.copy()
    classes[classes < 0] = stop + 1
    classes[stop_ids] = stop
    after = np.pad(tables.after, ((0, 2), (0, 2)), constant_values=machine.dead)
    hits = np.pad(tables.hits, ((0, 2), (0, 2)), constant_values=0)
    after[machine.number["done", b""], stop] = machine.over
    after[machine.over] = machine.over  # rows that have stopped are filled with anything
    if not machine.grammar.force_format:
        after[machine.is_in("free"), stop] = machine.over
    return _TokenTables(classes, after, hits)


def _shortest(tables: _TokenTables, names: int, over: int) -> np.ndarray:
    """float [S, n + 1]: the fewest tokens from a state to the end through exactly name i; column n: no name."""
    need = np.full((len(tables.after), names + 1), np.inf)
    need[over, names] = 0
    names_nothing = tables.hits == 0
    completes = [tables.hits == 1 << index for index in range(names)]
    while True:
        rest = need[tables.after[:, :]]  # [S, C, n + 1]
        new = np.where(names_nothing[:, :, None], rest, np.inf).min(1)
        for index, hit in enumerate(completes):
            through = np.where(hit, rest[:, :, names], np.inf).min(1)
            new[:, index] = np.minimum(new[:, index], through)
        new = np.minimum(need, 1 + new)
        if (new == need).all():
            return need
        need = new


def _spelling(text: bytes, pieces: set[bytes]) -> int:
    """The fewest tokens that spell `text`; its length if they cannot."""
    best = [0] + [len(text)] * len(text)
    for end in range(1, len(text) + 1):
        options = [best[start] + 1 for start in range(end) if text[start:end] in pieces]
        best[end] = min(options, default=len(text))
    return best[-1]


def _fits(need: np.ndarray, machine: _ByteMachine, answer_tokens: int) -> np.ndarray:
    """int [S, M]: see `Constraint`. The trace keeps answer_tokens back for the answer."""
    force_format = machine.grammar.force_format
    need = need.copy()
    need[machine.is_in("head", "free")] += answer_tokens if force_format else 0
    finite = need[np.isfinite(need)]
    enough = np.arange(int(finite.max(initial=0)) + 1)
    names = need.shape[1] - 1
    fits = ((need[:, None] <= enough[None, :, None]) << np.arange(names + 1)).sum(-1)
    if not force_format:
        fits[machine.is_in("free")] = 1 << names  # free text owes nothing
    return fits


def _options(tables: _TokenTables, machine: _ByteMachine) -> np.ndarray:
    """int32 [S, F]: the tokens that do not lead to a dead end from a state of the answer, -1 beyond."""
    answering = machine.is_in("lead", "item", "end", "done")
    rows = [
        np.flatnonzero(after[tables.classes] != machine.dead) if is_answering else []
        for after, is_answering in zip(tables.after, answering, strict=True)
    ]
    options = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, tokens in zip(options, rows, strict=True):
        row[: len(tokens)] = tokens
    return options
