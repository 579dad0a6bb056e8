"""Answers that are valid whatever the model.

`compile_answers` turns byte rules into tables over token ids, once per tokenizer: a `Constraint` for
`sampling.generate`. The rules are about text: every tokenisation of a valid text is allowed, also with tokens
that reach over a border ("><", ", E"), and nothing else. `answer_tree` weighs all answers after a trace, under the
same rules.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.answer_machines import ANSWER, END_ANSWER, END_THINK, TAGS, THINK
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.labels.taxonomy import CHEXPERT_14

SEPARATORS = (b"", b"\n", b"\n\n")  # what may stand between </think> and <answer>
NO_FINDING = {
    "devices": ("Support Devices",),
    "alone": (),
    "any": None,
}  # what may stand beside No Finding
_AMPLE = 2**30


class State(NamedTuple):
    """Where each row is: row of the tables int32 [R], findings named so far as bits int32 [R], tokens left [R]."""

    at: jax.Array
    named: jax.Array
    left: jax.Array


class Constraint(NamedTuple):
    """The compiled rules; a pytree of arrays. S states (the last two: over, dead), C classes of tokens that
    behave alike, n names.

    classes int32 [V]. next, hits, bars int32 [S, C]: the state after a token, the names that it completes, as
    bits, and the names that these rule out. fits int32 [S, M]: the names that can still be completed, and the
    answer ended, within m tokens; bit n: it can end without a further name. conflicts int32 [n]: the names that
    each name rules out, itself among them. options int32 [S, F]: the tokens allowed at all in a state of the
    answer, -1 beyond. locked int32 [S]: the same place, but the answer must begin now. begun, settled bool [S]:
    the list has begun; no further name can follow. budget int32: tokens of a whole completion.
    """

    classes: jax.Array
    next: jax.Array
    hits: jax.Array
    bars: jax.Array
    fits: jax.Array
    conflicts: jax.Array
    options: jax.Array
    locked: jax.Array
    begun: jax.Array
    settled: jax.Array
    budget: jax.Array

    def within(self, max_new_tokens: int) -> "Constraint":
        """The same rules for completions of at most max_new_tokens, the stop token included.

        Raises UserError if no valid completion is that short.
        """
        ends = np.flatnonzero(np.asarray(self.fits)[0])
        if not len(ends) or max_new_tokens < ends[0]:
            least = f"they need {ends[0]}" if len(ends) else "the tokenizer cannot spell them"
            raise UserError(
                f"constrained answers do not fit max_new_tokens={max_new_tokens}: {least}"
            )
        return self._replace(budget=np.int32(max_new_tokens))

    def init(self, rows: int) -> State:
        """The state of `rows` completions before their first token."""
        zero = jnp.zeros(rows, jnp.int32)
        return State(zero, zero, jnp.broadcast_to(jnp.asarray(self.budget), rows))

    def allowed(self, state: State) -> jax.Array:
        """bool [R, V]: the tokens after which a valid completion is still possible in the tokens left."""
        every = jnp.arange(self.next.shape[1])[None]
        return self._moves(state, every)[2][:, self.classes]

    def advance(self, state: State, token) -> State:
        """The state after token int [R]. A token that is not allowed leads to the dead state, for good."""
        after, named, ok = (
            x[:, 0] for x in self._moves(state, jnp.asarray(self.classes)[token][:, None])
        )
        return State(jnp.where(ok, after, self.next.shape[0] - 1), named, state.left - 1)

    def _moves(self, state: State, classes):
        """Token classes int [R or 1, K] -> (state after, names after, allowed), each [R, K]."""
        row = state.at[:, None]
        after, hits, bars = (
            jnp.asarray(x)[row, classes] for x in (self.next, self.hits, self.bars)
        )
        ruled_out = _any_of(state.named, jnp.asarray(self.conflicts))[:, None]
        left = jnp.clip(state.left - 1, 0, self.fits.shape[1] - 1)[:, None]
        ends = jnp.asarray(self.fits)[after, left] & ~(ruled_out | bars)
        return after, state.named[:, None] | hits, (hits & ruled_out == 0) & (ends != 0)

    def trace(self, tokens, lengths):
        """Where the answer list begins: (count int32 [R], State [R]) of the tokens before that.

        tokens int [R, N], of which the first lengths [R] count. The count leaves out the token in which the list
        begins, however much of the tags it holds: its choice may give the answer away. Of tokens that break the
        rules, those before are the trace. The state demands that the answer begins at once.
        """

        def step(carry, x):
            state, count, open_ = carry
            token, t = x
            new = self.advance(state, token)
            open_ &= (t < lengths) & ~jnp.asarray(self.begun)[new.at]
            state = jax.tree.map(
                lambda a, b: jnp.where(open_, a, b), new._replace(left=state.left), state
            )
            return (state, count + open_, open_), None

        rows, width = tokens.shape
        start = self.init(rows)._replace(left=jnp.full(rows, _AMPLE, jnp.int32))
        carry = start, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool)
        (state, count, _), _ = jax.lax.scan(step, carry, (tokens.T, jnp.arange(width)))
        return count, state._replace(at=jnp.asarray(self.locked)[state.at])


def _any_of(bits, masks):
    """int32 [R]: the union of masks[i] over the bits i that are set."""
    chosen = jnp.where(bits[:, None] >> jnp.arange(len(masks)) & 1 == 1, masks, 0)
    return jax.lax.reduce(chosen, jnp.int32(0), jax.lax.bitwise_or, (1,))


# From byte rules to tables


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
    """The rules of one tokenizer for `sampling.generate`. Seconds for a vocabulary of 150,000.

    table: the bytes of each token id; vocab_size: columns of the logits; stop_ids end a completion;
    suppress_ids are never sampled. Tokens without bytes are ruled out, but for the stop at the end.
    names: the list may hold these, each once, in any order, at least one, joined by ", ".
    no_finding: what may stand beside "No Finding": "devices" (Support Devices, as the phantom readers write),
    "alone" (nothing), "any" (everything).
    force_format: the text is <think>, free text without a tag, </think>, a separator, <answer>, the list,
    </answer>, stop. False: free text, which may also stop; once it holds <answer>, the list, </answer>, stop.
    answer_tokens: with force_format, the trace has to close while so many tokens beyond the shortest possible
    ending are left for the answer. None: as many as the list of all names takes.
    A completion ends within max_new_tokens because a token is allowed only if, after it, the name begun (or one
    name, if none is complete) can be completed and the answer ended in the tokens left.
    Raises UserError for an unknown no_finding, for names that start one another, and as `Constraint.within`.
    """
    if no_finding not in NO_FINDING:
        raise UserError(f"no_finding={no_finding!r}: use one of {', '.join(NO_FINDING)}")
    coded = [name.encode() for name in names]
    if any(a.startswith(b) for i, a in enumerate(coded) for j, b in enumerate(coded) if i != j):
        raise UserError("constrained answers need names of which none starts another")
    conflicts = _conflicts(list(names), no_finding)
    leads = [END_THINK + s + ANSWER for s in separators] if force_format else [ANSWER]
    states, delta, event = _byte_machine(coded, leads, force_format)
    pieces = _pieces(table, vocab_size, {*stop_ids, *suppress_ids})

    number = {state: i for i, state in enumerate(states)}
    dead = len(states)  # in the order of the finished tables: all states, over, dead
    over, dead = dead, dead + 1
    free = np.array([phase == "free" for phase, _ in states] + [False] * 2)
    classes, after, hits = _token_classes(pieces, delta, event, conflicts, dead)
    stop = after.shape[1]  # one more class, for the stop tokens, and one for tokens that never come
    classes[classes < 0] = stop + 1
    classes[[i for i in stop_ids if i < vocab_size]] = stop
    grow = lambda x, fill: np.pad(x, ((0, 2), (0, 2)), constant_values=fill)
    after, hits = grow(after, dead), grow(hits, 0)
    after[number["done", b""], stop] = over
    after[over] = over  # rows that have stopped are filled with anything
    if not force_format:
        after[free, stop] = over
    need = _shortest(after, hits, len(names), over)

    locked = np.array(
        [number[_lock(state, force_format)] for state in states] + [over, dead], np.int32
    )
    begun = np.array([phase in ("item", "end", "done") for phase, _ in states] + [True] * 2)
    settled = np.isinf(need[:, :-1]).all(1) & begun
    settled[dead] = False
    if answer_tokens is None:
        answer_tokens = _spelling(b", ".join(coded) + END_ANSWER, set(pieces))
    in_trace = np.array([phase in ("head", "free") for phase, _ in states] + [False] * 2)
    need[in_trace] += answer_tokens if force_format else 0
    finite = need[np.isfinite(need)]
    enough = np.arange(int(finite.max(initial=0)) + 1)
    fits = ((need[:, None] <= enough[None, :, None]) << np.arange(len(names) + 1)).sum(-1)
    if not force_format:
        fits[free] = 1 << len(names)  # free text owes nothing

    answering = ~in_trace
    answering[[over, dead]] = False
    rows = [
        np.flatnonzero(a[classes] != dead) if ok else []
        for a, ok in zip(after, answering, strict=True)
    ]
    options = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, tokens in zip(options, rows, strict=True):
        row[: len(tokens)] = tokens
    bars = np.zeros_like(hits)
    for i, mask in enumerate(conflicts):
        bars |= np.where(hits >> i & 1 == 1, mask, 0)
    int32 = lambda x: np.asarray(x, np.int32)
    built = Constraint(
        int32(classes),
        int32(after),
        int32(hits),
        int32(bars),
        int32(fits),
        int32(conflicts),
        options,
        locked,
        begun,
        settled,
        np.int32(0),
    )
    return built.within(max_new_tokens)


def _conflicts(names: list[str], no_finding: str) -> np.ndarray:
    """int32 [n]: bits of the names that cannot follow or precede each name: itself, and No Finding's enemies."""
    masks = 1 << np.arange(len(names))
    beside = NO_FINDING[no_finding]
    if beside is not None and "No Finding" in names:
        none = names.index("No Finding")
        for i, name in enumerate(names):
            if i != none and name not in beside:
                masks[i] |= 1 << none
                masks[none] |= 1 << i
    return masks.astype(np.int32)


def _step(names, leads, force_format: bool, state, byte: bytes):
    """One byte: (state, name completed or None). A state is (phase, bytes); None is a dead end.

    Phases: head (inside the opening tag), free (bytes: a tag begun), lead (bytes of </think>..<answer> so far),
    item (bytes of a name), end (bytes after a name: of ", " or </answer>), done.
    """
    phase, seen = state
    longer = seen + byte
    if phase == "head":
        return ("free", b"") if longer == THINK else ("head", longer) if THINK.startswith(
            longer
        ) else None, None
    if phase == "free":
        tags = TAGS if force_format else (ANSWER,)
        if longer in tags:
            opened = (
                ("item", b"")
                if not force_format
                else ("lead", longer)
                if longer == END_THINK
                else None
            )
            return opened, None
        begun = any(tag.startswith(longer) for tag in tags)
        return ("free", longer if begun else b"<" if byte == b"<" else b""), None
    if phase == "lead":
        if longer in leads:
            return ("item", b""), None
        return ("lead", longer) if any(lead.startswith(longer) for lead in leads) else None, None
    if phase == "item":
        if longer in names:
            return ("end", b""), names.index(longer)
        return ("item", longer) if any(name.startswith(longer) for name in names) else None, None
    if phase == "end":
        ends = {b", ": ("item", b""), END_ANSWER: ("done", b"")}
        if longer in ends:
            return ends[longer], None
        return ("end", longer) if any(text.startswith(longer) for text in ends) else None, None
    return None, None


def _lock(state, force_format: bool):
    """The state at the same place from which the answer must begin at once."""
    phase, seen = state
    if phase not in ("head", "free"):
        return state
    tag = END_THINK if force_format else ANSWER
    return "lead", seen if phase == "free" and tag.startswith(seen) else b""


def _byte_machine(names, leads, force_format):
    """(states, next int [S, 256] with -1 for a dead end, event int [S, 256]: the name completed, or -1)."""
    states = [("head" if force_format else "free", b""), ("lead", b"")]
    number = {state: i for i, state in enumerate(states)}
    used = sorted(
        {*b"".join([*TAGS, *leads, *names]), *b", \0"}
    )  # every other byte does what 0 does
    column = np.array([used.index(b) if b in used else 0 for b in range(256)])
    delta, event = [], []
    for state in states:  # grows while we walk it
        steps = [_step(names, leads, force_format, state, bytes([b])) for b in used]
        for target, _ in steps:
            if target is not None and target not in number:
                number[target] = len(states)
                states.append(target)
        delta.append([-1 if target is None else number[target] for target, _ in steps])
        event.append([-1 if name is None else name for _, name in steps])
    return states, np.array(delta)[:, column], np.array(event)[:, column]


def _pieces(table: TokenBytes, vocab_size: int, without: set[int]) -> list[bytes]:
    """The bytes of each token id; none for ids outside the table and for those in `without`."""
    data = np.asarray(table.data).tobytes()
    spans = zip(np.asarray(table.offset).tolist(), np.asarray(table.length).tolist(), strict=True)
    pieces = [b"" if i in without else data[a : a + k] for i, (a, k) in enumerate(spans)]
    return (pieces + [b""] * vocab_size)[:vocab_size]


def _token_classes(pieces, delta, event, conflicts, dead: int):
    """(class of each piece int32 [V], -1 without bytes; state after int [S, C], names completed int [S, C])."""
    # Bytes that no state tells apart are written alike first: most tokens then are one of few strings.
    _, first, same = np.unique(delta, axis=1, return_index=True, return_inverse=True)
    alike = first[same.reshape(-1)].astype(np.uint8).tobytes()
    plain = [p.translate(alike) for p in pieces]
    distinct = sorted({p for p in plain if p}, key=len)
    table = np.concatenate([delta, np.full((1, 256), -1)])  # the last row is the dead end, -1
    event = np.concatenate([event, np.full((1, 256), -1)])
    mask = np.append(conflicts, 0)
    known, class_of, columns = {}, {b"": -1}, []
    for start in range(0, len(distinct), 1024):
        words = distinct[start : start + 1024]
        after, hits = _walk(words, table, event, mask)
        for i, (word, key) in enumerate(
            zip(words, np.concatenate([after, hits]).T.copy(), strict=True)
        ):
            key = key.tobytes()
            if key not in known:
                known[key] = len(known)
                columns.append((after[:, i].copy(), hits[:, i].copy()))
            class_of[word] = known[key]
    after, hits = (np.stack(x, axis=1) for x in zip(*columns, strict=True))
    return np.array([class_of[p] for p in plain], np.int32), np.where(after < 0, dead, after), hits


def _walk(words, table, event, mask):
    """From every state through every word: (state after, names completed), int32 [S, words]; -1 is dead."""
    after = np.repeat(np.arange(len(table) - 1, dtype=np.int32)[:, None], len(words), 1)
    hits, bars = np.zeros_like(after), np.zeros_like(after)
    for k in range(len(words[-1])):
        at = np.array([len(w) > k for w in words])
        byte = np.array([w[k] for w in words if len(w) > k])
        name = event[after[:, at], byte]
        bit = np.where(name >= 0, 1 << np.maximum(name, 0), 0)
        ok = (
            bars[:, at] & bit == 0
        )  # a token that names twice, or names a contradiction, is a dead end
        after[:, at] = np.where(ok, table[after[:, at], byte], -1)
        hits[:, at] |= bit
        bars[:, at] |= mask[name]
    return after, np.where(after < 0, 0, hits)


def _shortest(after, hits, n: int, over: int) -> np.ndarray:
    """float [S, n + 1]: the fewest tokens from a state to the end through exactly name i; column n: no name."""
    need = np.full((len(after), n + 1), np.inf)
    need[over, n] = 0
    quiet = hits == 0
    completes = [hits == 1 << i for i in range(n)]
    while True:
        rest = need[after[:, :]]  # [S, C, n + 1]
        new = np.where(quiet[:, :, None], rest, np.inf).min(1)
        for i, hit in enumerate(completes):
            new[:, i] = np.minimum(new[:, i], np.where(hit, rest[:, :, n], np.inf).min(1))
        new = np.minimum(need, 1 + new)
        if (new == need).all():
            return need
        need = new


def _spelling(text: bytes, pieces: set[bytes]) -> int:
    """The fewest tokens that spell `text`; its length if they cannot."""
    best = [0] + [len(text)] * len(text)
    for end in range(1, len(text) + 1):
        best[end] = min(
            [best[a] + 1 for a in range(end) if text[a:end] in pieces], default=len(text)
        )
    return best[-1]
