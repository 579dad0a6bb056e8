"""The rules of valid answers as tables over token ids: from bytes to a `Constraint`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    conflicts = _conflicts(list(names), no_finding)
    grammar = _grammar([name.encode() for name in names], separators, force_format)
    machine = _byte_machine(grammar)

    # ---- Over tokens, with their ends ----
    pieces = _pieces(table, vocab_size, {*stop_ids, *suppress_ids})
    tables = _token_tables(pieces, machine, conflicts)
    tables = _with_stops(tables, machine, [token for token in stop_ids if token < vocab_size])
    fewest = _shortest(tables, len(names), machine.over)

    if answer_tokens is None:
        answer_tokens = _spelling(b", ".join(grammar.names) + END_ANSWER, set(pieces))
    return Constraint(
        classes=np.asarray(tables.classes, np.int32),
        next=np.asarray(tables.after, np.int32),
        hits=np.asarray(tables.hits, np.int32),
        bars=np.asarray(_bars(tables, conflicts), np.int32),
        fits=np.asarray(_fits(fewest, machine, answer_tokens), np.int32),
        conflicts=np.asarray(conflicts, np.int32),
        options=_options(tables, machine),
        locked=machine.locked(),
        begun=machine.begun(),
        settled=_settled(fewest, machine),
        after_byte=machine.after_byte(),
    ).within(max_new_tokens)


def _conflicts(names: list[str], no_finding: str) -> np.ndarray:
    """int32 [n]: bits of the names that cannot follow or precede each name: itself, and No Finding's enemies."""
    if no_finding not in NO_FINDING:
        raise UserError(f"no_finding={no_finding!r}: use one of {', '.join(NO_FINDING)}")
    masks = 1 << np.arange(len(names))  # no name twice
    allowed_beside = NO_FINDING[no_finding]
    if allowed_beside is not None and "No Finding" in names:
        no_finding_index = names.index("No Finding")
        for index, name in enumerate(names):
            if index != no_finding_index and name not in allowed_beside:
                masks[index] |= 1 << no_finding_index
                masks[no_finding_index] |= 1 << index
    return masks.astype(np.int32)


# ---- Bytes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Grammar:
    """names: what the list may hold; leads: what opens the list (from </think> on, if the format is forced)."""

    names: tuple[bytes, ...]  # none starts another
    leads: tuple[bytes, ...]
    force_format: bool

    def step(self, state: Phase, byte: bytes) -> tuple[Phase | None, int | None]:
        """One byte: (state, or None for a dead end; the name completed, or None)."""
        phase, seen = state
        longer = seen + byte
        # A name that is complete is an event, and the only one that the tables count.
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
        # Nothing may come before the opening tag.
        if longer == THINK:
            return "free", b""
        return _stay("head", longer, (THINK,))

    def _free(self, longer: bytes) -> Phase | None:
        tags = TAGS if self.force_format else (ANSWER,)
        if longer in tags and not self.force_format:
            return "item", b""
        if longer in tags:
            # Of the tags only the one that leads on may come.
            return _stay("lead", longer, (END_THINK,))
        if any(tag.startswith(longer) for tag in tags):
            return "free", longer
        # What had begun is text after all; this byte may begin a tag anew.
        return "free", b"<" if longer.endswith(b"<") else b""

    def _lead(self, longer: bytes) -> Phase | None:
        if longer in self.leads:
            return "item", b""
        return _stay("lead", longer, self.leads)

    def _item(self, longer: bytes) -> Phase | None:
        # That it ends the name, `step` has seen.
        return _stay("item", longer, self.names)

    def _end(self, longer: bytes) -> Phase | None:
        if longer == b", ":
            return "item", b""
        if longer == END_ANSWER:
            return "done", b""
        return _stay("end", longer, (b", ", END_ANSWER))

    def lock(self, state: Phase) -> Phase:
        """The state at the same place from which the answer must begin at once."""
        phase, seen = state
        if phase not in ("head", "free"):
            return state
        # A tag that has begun in free text counts, if it is the one that leads on.
        tag = END_THINK if self.force_format else ANSWER
        has_begun = phase == "free" and tag.startswith(seen)
        return "lead", seen if has_begun else b""


def _stay(phase: str, longer: bytes, texts: Sequence[bytes]) -> Phase | None:
    """The phase with its bytes, as long as they begin one of the texts; else a dead end."""
    if any(text.startswith(longer) for text in texts):
        return phase, longer
    return None


def _grammar(names: list[bytes], separators: Sequence[bytes], force_format: bool) -> _Grammar:
    # Else a name could end inside another, and the list would have two readings.
    for index, name in enumerate(names):
        if any(name.startswith(other) for place, other in enumerate(names) if place != index):
            raise UserError("constrained answers need names of which none starts another")
    # Without the format forced, a list may begin anywhere in free text.
    leads: tuple[bytes, ...] = (ANSWER,)
    if force_format:
        leads = tuple(END_THINK + separator + ANSWER for separator in separators)
    return _Grammar(names=tuple(names), leads=leads, force_format=force_format)


class _ByteMachine(NamedTuple):
    """The grammar over single bytes, S states."""

    grammar: _Grammar
    states: list[Phase]
    number: dict[Phase, int]  # of each state
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

    def begun(self) -> np.ndarray:
        """bool [S + 2]: the list has begun, or it is too late for one."""
        begun = self.is_in("item", "end", "done")
        begun[[self.over, self.dead]] = True
        return begun

    def after_byte(self) -> np.ndarray:
        """int32 [S + 2, 256]: the state after each byte; what is over or dead stays dead."""
        after = np.pad(self.after, ((0, 2), (0, 0)), constant_values=-1)
        return np.where(after < 0, self.dead, after).astype(np.int32)

    def locked(self) -> np.ndarray:
        """int32 [S + 2]: see `_Grammar.lock`."""
        locked = [self.number[self.grammar.lock(state)] for state in self.states]
        return np.array([*locked, self.over, self.dead], np.int32)


def _byte_machine(grammar: _Grammar) -> _ByteMachine:
    # The beginning is state 0; ("lead", b"") is where `lock` may lead without a byte.
    states: list[Phase] = [("head" if grammar.force_format else "free", b""), ("lead", b"")]
    state_numbers = {state: index for index, state in enumerate(states)}
    # Every byte that the rules do not name does what 0 does.
    used_bytes = sorted({*b"".join([*TAGS, *grammar.leads, *grammar.names]), *b", \0"})
    byte_columns = np.array(
        [used_bytes.index(byte) if byte in used_bytes else 0 for byte in range(256)]
    )
    after, completed_names = [], []
    for state in states:  # grows while we walk it
        steps = [grammar.step(state, bytes([byte])) for byte in used_bytes]
        # New states are walked in their turn.
        for target, _ in steps:
            if target is not None and target not in state_numbers:
                state_numbers[target] = len(states)
                states.append(target)
        after.append([-1 if target is None else state_numbers[target] for target, _ in steps])
        completed_names.append([-1 if name is None else name for _, name in steps])
    return _ByteMachine(
        grammar,
        states,
        state_numbers,
        np.array(after)[:, byte_columns],
        np.array(completed_names)[:, byte_columns],
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
    # The embedding may have more rows than the tokenizer has ids, or fewer.
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
    _, first_alike, alike_class = np.unique(
        machine.after, axis=1, return_index=True, return_inverse=True
    )
    alike = first_alike[alike_class.reshape(-1)].astype(np.uint8).tobytes()
    plain = [piece.translate(alike) for piece in pieces]
    distinct = sorted({piece for piece in plain if piece}, key=len)

    # The last row is the dead end, -1.
    dead_end = np.full((1, 256), -1)
    after_byte = np.concatenate([machine.after, dead_end])
    event = np.concatenate([machine.event, dead_end])
    conflict_masks = np.append(conflicts, 0)

    # Words that lead everywhere to the same are one class; in turns, because a turn takes S * 1024 numbers.
    known: dict[bytes, int] = {}
    class_of = {b"": -1}
    columns = []
    for start in range(0, len(distinct), 1024):
        words = distinct[start : start + 1024]
        after, completed = _walk(words, after_byte, event, conflict_masks)
        behaviours = np.concatenate([after, completed]).T.copy()
        for word_number, (word, behaviour) in enumerate(zip(words, behaviours, strict=True)):
            behaviour = behaviour.tobytes()
            if behaviour not in known:
                known[behaviour] = len(known)
                columns.append((after[:, word_number].copy(), completed[:, word_number].copy()))
            class_of[word] = known[behaviour]
    after, completed = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
    classes = np.array([class_of[piece] for piece in plain], np.int32)
    # Dead ends get a state of their own, so that tables can be read without a test.
    return _TokenTables(classes, np.where(after < 0, machine.dead, after), completed)


def _walk(
    words: list[bytes], after_byte: np.ndarray, event: np.ndarray, masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """From every state through every word: (state after, names completed), int32 [S, words]; -1 is dead."""
    states = np.arange(len(after_byte) - 1, dtype=np.int32)
    after = np.repeat(states[:, None], len(words), 1)
    completed, barred = np.zeros_like(after), np.zeros_like(after)
    # A byte of all words at a time; the longest word is the last.
    for place in range(len(words[-1])):
        goes_on = np.array([len(word) > place for word in words])
        next_bytes = np.array([word[place] for word in words if len(word) > place])
        completed_name = event[after[:, goes_on], next_bytes]
        name_bits = np.where(completed_name >= 0, 1 << np.maximum(completed_name, 0), 0)
        # A token that names twice, or names a contradiction, is a dead end.
        is_allowed = barred[:, goes_on] & name_bits == 0
        after[:, goes_on] = np.where(is_allowed, after_byte[after[:, goes_on], next_bytes], -1)
        completed[:, goes_on] |= name_bits
        barred[:, goes_on] |= masks[completed_name]
    return after, np.where(after < 0, 0, completed)


def _with_stops(tables: _TokenTables, machine: _ByteMachine, stop_ids: list[int]) -> _TokenTables:
    """The tables with the states over and dead, a class of stop tokens, and one of tokens that never come."""
    stop_class = tables.after.shape[1]  # the class of stop tokens; the one after it never comes
    classes = tables.classes.copy()
    classes[classes < 0] = stop_class + 1
    classes[stop_ids] = stop_class
    # By default, the new classes and states lead nowhere.
    after = np.pad(tables.after, ((0, 2), (0, 2)), constant_values=machine.dead)
    completed = np.pad(tables.hits, ((0, 2), (0, 2)), constant_values=0)
    # A completion stops after its answer, or free text anywhere.
    after[machine.number["done", b""], stop_class] = machine.over
    after[machine.over] = machine.over  # rows that have stopped are filled with anything
    if not machine.grammar.force_format:
        after[machine.is_in("free"), stop_class] = machine.over
    return _TokenTables(classes, after, completed)


def _shortest(tables: _TokenTables, name_count: int, over: int) -> np.ndarray:
    """float [S, n + 1]: the fewest tokens from a state to the end through exactly name i; column n: no name."""
    fewest = np.full((len(tables.after), name_count + 1), np.inf)
    fewest[over, name_count] = 0
    names_nothing = tables.hits == 0
    completes = [tables.hits == 1 << index for index in range(name_count)]
    # One more token a turn, until nothing gets shorter.
    while True:
        remaining = fewest[tables.after[:, :]]  # [S, C, n + 1]
        shorter = np.where(names_nothing[:, :, None], remaining, np.inf).min(1)
        for index, completes_name in enumerate(completes):
            through = np.where(completes_name, remaining[:, :, name_count], np.inf).min(1)
            shorter[:, index] = np.minimum(shorter[:, index], through)
        shorter = np.minimum(fewest, 1 + shorter)
        if (shorter == fewest).all():
            return fewest
        fewest = shorter


def _spelling(text: bytes, pieces: set[bytes]) -> int:
    """The fewest tokens that spell `text`; its length if they cannot."""
    fewest_tokens = [0] + [len(text)] * len(text)  # for each beginning of the text
    for end in range(1, len(text) + 1):
        token_counts = [
            fewest_tokens[start] + 1 for start in range(end) if text[start:end] in pieces
        ]
        fewest_tokens[end] = min(token_counts, default=len(text))
    return fewest_tokens[-1]


def _settled(fewest: np.ndarray, machine: _ByteMachine) -> np.ndarray:
    """bool [S]: the list has begun, and no further name can follow."""
    # A name that no number of tokens can still reach is out.
    settled = np.isinf(fewest[:, :-1]).all(1) & machine.begun()
    settled[machine.dead] = False  # what is dead gives no answer
    return settled


def _fits(fewest: np.ndarray, machine: _ByteMachine, answer_tokens: int) -> np.ndarray:
    """int [S, M]: see `Constraint`. The trace keeps answer_tokens back for the answer."""
    force_format = machine.grammar.force_format
    fewest = fewest.copy()
    if force_format:
        fewest[machine.is_in("head", "free")] += answer_tokens
    # As many columns as the longest need: beyond, everything fits that fits at all.
    finite = fewest[np.isfinite(fewest)]
    enough = np.arange(int(finite.max(initial=0)) + 1)
    name_count = fewest.shape[1] - 1
    # All names as the bits of one number, to be cut down by a mask.
    fitting_names = ((fewest[:, None] <= enough[None, :, None]) << np.arange(name_count + 1)).sum(
        -1
    )
    if not force_format:
        fitting_names[machine.is_in("free")] = 1 << name_count  # free text owes nothing
    return fitting_names


def _bars(tables: _TokenTables, conflicts: np.ndarray) -> np.ndarray:
    """int [S, C]: the names that the names a token completes rule out, as bits."""
    bars = np.zeros_like(tables.hits)
    for name, ruled_out in enumerate(conflicts):
        bars |= np.where(tables.hits >> name & 1 == 1, ruled_out, 0)
    return bars


def _options(tables: _TokenTables, machine: _ByteMachine) -> np.ndarray:
    """int32 [S, F]: the tokens that do not lead to a dead end from a state of the answer, -1 beyond."""
    answering = machine.is_in("lead", "item", "end", "done")
    token_rows: list[Any] = [
        np.flatnonzero(after[tables.classes] != machine.dead) if is_answering else []
        for after, is_answering in zip(tables.after, answering, strict=True)
    ]
    options = np.full((len(token_rows), max(map(len, token_rows))), -1, np.int32)
    for row, allowed_tokens in zip(options, token_rows, strict=True):
        row[: len(allowed_tokens)] = allowed_tokens
    return options
