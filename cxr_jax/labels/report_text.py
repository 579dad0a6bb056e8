"""The jitted parser of free text: 14 findings x {affirmed, denied, hedged, not mentioned}, with sides.

docs/report_parser.md is the meaning, exactly; `labels/lexicon.toml` the words. Three passes, tables and bit masks
vectorised over the batch: which byte ends a word (from its neighbours); forward over the bytes, words and phrases;
backward over the tokens, what the phrases say. A mask has one bit a label of `lexicon.LABELS`; a pair of masks,
right << 16 | left, holds the sides.
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.labels import lexicon as lx
from cxr_jax.labels import phrase_tables as ph
from cxr_jax.labels.taxonomy import (
    CHEXPERT_14,
    INDEX,
    NEGATIVE,
    NOT_MENTIONED,
    PARENTS,
    PATHOLOGY,
    POSITIVE,
    UNCERTAIN,
)
from cxr_jax.labels.text_batches import map_texts

N = len(CHEXPERT_14)
POS, NEG, UNC = 0, 1, 2  # the three states a mention can have: rows of state arrays
IGNORE = 3
_ALL = (1 << len(lx.LABELS)) - 1
_SIDED = _ALL & ~sum(1 << lx.LABELS.index(name) for name in lx.SIDELESS)
_RIGHT, _LEFT = 1 << 16, 1  # multiply a mask by one of them, or their sum, to make a pair

# Codes of bytes in context, the alphabet of the word table: a letter inside a word, a word's last letter, tokens, rest.
_LETTERS = len(ph.LETTERS)
_TOKEN = 2 * _LETTERS
_NEWLINE = _TOKEN + len(ph.TOKENS)
_BULLET, _OTHER, _N_CODES = _NEWLINE + 1, _NEWLINE + 2, _NEWLINE + 3

# What an item (a phrase found) is: bits above its 16 bits of labels.
_FIELDS = dict(
    mention=2,
    subject=1,
    before=1,
    after=1,
    mode=2,
    quality=2,
    side=2,
    heading=1,
    clause=1,
    sentence=1,
    comma=1,
)
_SHIFT = {name: 16 + sum(list(_FIELDS.values())[:i]) for i, name in enumerate(_FIELDS)}
_MODE = {"negative": NEG, "uncertain": UNC, "ignore": IGNORE}
_QUALITY = {"normal": 1 + NEG, "borderline": 1 + UNC, "abnormal": 1 + POS}
_SIDE = {"right": 2, "left": 1, "both": 3}
_MENTION = {"findings": 1, "denials": 1, "hedged": 2, "denied": 3}


class Bank(NamedTuple):
    """A lexicon as arrays: constants of the compiled program. A pytree.

    words int32 [W * codes]: next state * codes, or, at a word's or token's end, 1 << 30 | its class. phrases int16
    [P, C]: next state. found int32 [P]: items index | tokens of the phrase << 16. items int32 [M].
    """

    words: np.ndarray
    phrases: np.ndarray
    found: np.ndarray
    items: np.ndarray


def bank(path: str | None = None, more: str | None = None) -> Bank:
    """The compiled `lexicon.load(path, more)`, kept while the files stay as they are. Raises UserError."""
    return _bank(path, more, *(_version(p) for p in (path, more) if p))


def _version(path: str):
    with contextlib.suppress(OSError, ValueError):
        stat = os.stat(path)
        return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(16)
def _bank(path, more, *_versions) -> Bank:
    return make_bank(ph.compile_lexicon(lx.load(path, more)))


def make_bank(t: ph.Tables) -> Bank:
    ends = np.int32(1 << 30)
    words = np.zeros((len(t.word_next), _N_CODES), np.int32)
    words[:, :_LETTERS] = t.word_next.astype(np.int32) * _N_CODES
    words[:, _LETTERS:_TOKEN] = t.word_class[t.word_next].astype(np.int32) | ends
    words[:, _TOKEN:_NEWLINE] = t.token_class[:-1].astype(np.int32) | ends
    words[:, _NEWLINE : _BULLET + 1] = (
        np.int32(t.token_class[-1]) | ends
    )  # if the line is blank so far; else nothing
    items = np.array([0, *map(_item, t.meanings)], np.int32)
    found = t.phrase.astype(np.int32) | t.phrase_words.astype(np.int32) << 16
    return Bank(words.reshape(-1), t.phrase_next, found, items)


def _item(m: lx.Meaning) -> int:
    fields = dict.fromkeys(_FIELDS, 0)
    if m.table in _MENTION:
        fields["mention"] = _MENTION[m.table]
        if m.table == "denials":
            fields |= {"mode": NEG, "before": 1}
    elif m.table == "subjects":
        fields["subject"] = 1
    elif m.table == "qualities":
        fields["quality"] = _QUALITY[m.key]
    elif m.table == "cues":
        mode, where = m.key.split("_")
        fields |= {
            "mode": _MODE[mode],
            "before": int(where != "after"),
            "after": int(where != "before"),
        }
    elif m.table == "stops":
        kind, _, side = m.key.partition("_")
        fields |= {
            "clause": 1,
            "sentence": int(kind == "sentence"),
            "side": _SIDE[side] if side else 0,
        }
    elif m.table in ("sides", "headings"):
        fields |= {
            "side": _SIDE[m.key],
            "heading": int(m.table == "headings"),
            "clause": int(m.table == "headings"),
        }
    elif m.table == "commas":
        fields["comma"] = 1
    return sum(1 << i for i in m.labels) | sum(v << _SHIFT[k] for k, v in fields.items())


def _codes() -> tuple[np.ndarray, np.ndarray]:
    """The code of each byte [256] as if inside a word, and whether it is a letter or digit."""
    code, letter = np.full(256, _OTHER, np.int32), np.zeros(256, bool)
    for i, c in enumerate(ph.LETTERS[:-1]):
        code[[ord(c), ord(c.upper())]] = i
        letter[[ord(c), ord(c.upper())]] = True
    for i, c in enumerate(ph.TOKENS):
        code[ord(c)] = _TOKEN + i
    code[ord("\n")] = _NEWLINE
    code[[ord("-"), ord("*")]] = _BULLET
    return code, letter


_CODE, _IS_LETTER = _codes()


def _in_context(data: jax.Array, inside: jax.Array) -> jax.Array:
    """Codes uint8 [L, B] of bytes uint8 [L, B]: decimal points are letters, a word's last letter has its own code."""
    data = jnp.where(inside, data, 0)
    pad = jnp.zeros((1, data.shape[1]), bool)
    digit = (data >= ord("0")) & (data <= ord("9"))
    before, after = jnp.concatenate([pad, digit[:-1]]), jnp.concatenate([digit[1:], pad])
    point = (data == ord(".")) & before & after
    letter = jnp.asarray(_IS_LETTER)[data] | point
    last = letter & ~jnp.concatenate([letter[1:], pad])
    code = jnp.where(point, _LETTERS - 1, jnp.asarray(_CODE)[data])
    return (code + jnp.where(last, _LETTERS, 0)).astype(jnp.uint8)


_IS_TOKEN = 1 << 30


def _find_phrases(bank: Bank, codes: jax.Array, longest: jax.Array) -> jax.Array:
    """int16 [L, B]: at the last byte of every word and token 1 + the state of the phrase table, elsewhere 0."""
    words, nexts = jnp.asarray(bank.words), jnp.asarray(bank.phrases)
    n_classes = nexts.shape[1]
    nexts = nexts.reshape(-1)

    def step(i, carry):
        word, phrase, blank, out = carry
        code = codes[i].astype(jnp.int32)
        cell = words[word + code]
        line = (code == _NEWLINE) | (code == _BULLET)
        token = (cell >= _IS_TOKEN) & (blank | ~line)
        row = nexts[phrase * n_classes + jnp.where(token, cell - _IS_TOKEN, 0)].astype(jnp.int32)
        phrase = jnp.where(token, row, phrase)
        blank = (code == _NEWLINE) | (blank & ((code == _OTHER) | line))
        word = jnp.where(cell >= _IS_TOKEN, 0, cell)
        ends = jnp.where(token, phrase + 1, 0).astype(out.dtype)
        out = jax.lax.dynamic_update_index_in_dim(out, ends, i, 0)
        return word, phrase, blank, out

    zero = jnp.zeros(codes.shape[1], jnp.int32)
    # Bytes past the longest text of the batch are many where a budget is fixed, as in RL: they are not looked at.
    return jax.lax.fori_loop(
        0, longest, step, (zero, zero, zero == 1, jnp.zeros(codes.shape, jnp.int16))
    )[3]


def _cut_from_the_right(bank: Bank, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The items of ends int16 [L, B] from the last to the first, int16 [L, B] closed up, and the most that a text has.

    First what is no token is left out, at once; then tokens are passed over one by one, as phrases hide them.
    """
    found = jnp.asarray(bank.found)
    rows = jnp.arange(ends.shape[1])
    number = jnp.cumsum((ends != 0)[::-1].astype(jnp.int32), axis=0)[
        ::-1
    ]  # of tokens, from the right, from 1
    place = jnp.where(ends != 0, number - 1, ends.shape[0])
    tokens = jnp.zeros_like(ends).at[place, rows[None]].set(ends, mode="drop")

    def step(i, carry):
        hidden, count, out = carry
        phrase = jnp.where(tokens[i] > 0, found[tokens[i].astype(jnp.int32) - 1], 0)
        words = phrase >> 16
        take = (hidden == 0) & (words > 0)
        item = (phrase & 0xFFFF).astype(out.dtype)
        out = out.at[jnp.where(take, count, out.shape[0]), rows].set(item, mode="drop")
        return jnp.where(take, words - 1, jnp.maximum(hidden - 1, 0)), count + take, out

    zero = jnp.zeros(rows.shape, jnp.int32)
    loop = (zero, zero, jnp.zeros(ends.shape, jnp.int16))
    _, count, out = jax.lax.fori_loop(0, jnp.max(number[0]), step, loop)
    return out, jnp.max(count)


def to_mask(bits) -> jax.Array:
    """int32 [..] of bool [.., n]: bit i is entry i."""
    return jnp.sum(jnp.where(bits, jnp.int32(1) << jnp.arange(bits.shape[-1]), 0), axis=-1)


def to_bits(mask, n: int = N) -> jax.Array:
    """bool [.., n] of a mask int [..]."""
    return (mask[..., None] >> jnp.arange(n)) & 1 == 1


class Truth(NamedTuple):
    """What is so, to hold claims against: masks int32 [B] over the 14 labels. present: for certain; hedged: perhaps.
    sides: pairs; a label that has no side, or whose side is not known, has neither."""

    present: jax.Array
    hedged: jax.Array
    sides: jax.Array

    @classmethod
    def of(cls, present, hedged, sides) -> "Truth":
        """From bool present and hedged [B, 14], sides [B, 14, 2]: is it known to be on the right, and on the left?"""
        right, left = to_mask(sides[..., 0]), to_mask(sides[..., 1])
        return cls(to_mask(present), to_mask(hedged), right << 16 | left)


class _Reader(NamedTuple):
    """The registers of the backward pass, int32 [.., B]."""

    after: jax.Array  # mode of the nearest cue to the right; 0 none; + 4 if a comma ends it
    close: jax.Array  # no comma since
    side: jax.Array  # the current side: 2 right, 1 left
    taken: jax.Array  # a mention has taken it
    quality: jax.Array  # the current quality: 1 + state
    subjects: jax.Array  # open subjects
    # [5]: mentions since the last cue without a side: affirmed, denied, hedged unless a cue on the left says otherwise;
    # denied, hedged for good
    open: jax.Array
    sided: jax.Array  # [5]: pairs, likewise
    s_open: jax.Array  # [3]: mentions of the sentence by state, without a side
    s_sided: jax.Array
    s_subjects: jax.Array
    any: jax.Array  # [3]: labels of the report by state
    d_sided: jax.Array
    claims: jax.Array  # sentences that claim something
    wrong: jax.Array  # sentences that claim something that is not so


def _read(bank: Bank, ends: jax.Array, truth: Truth | None) -> _Reader:
    """The backward pass over ends int16 [L, B]."""
    meaning = jnp.asarray(bank.items)
    batch = ends.shape[1]
    items, most = _cut_from_the_right(bank, ends)

    def step(i, r: _Reader):
        return _say(r, meaning[items[i].astype(jnp.int32)], truth)

    zeros = {f: jnp.zeros((batch,), jnp.int32) for f in _Reader._fields}
    for name, n in dict(
        open=5, sided=5, s_open=3, s_sided=3, s_subjects=3, any=3, d_sided=3
    ).items():
        zeros[name] = jnp.zeros((n, batch), jnp.int32)
    r = jax.lax.fori_loop(0, most, step, _Reader(**zeros))
    end = jnp.int32(1 << _SHIFT["clause"] | 1 << _SHIFT["sentence"])
    return _say(r, jnp.broadcast_to(end, (batch,)), truth)


def _say(r: _Reader, item, truth) -> _Reader:
    """One item, [B], read from right to left."""
    labels = item & 0xFFFF
    field = lambda name: (item >> _SHIFT[name]) & ((1 << _FIELDS[name]) - 1)
    flag = lambda name: field(name) == 1
    none = jnp.zeros_like(item)
    on = lambda condition, value: jnp.where(condition, value, none)
    clause, before, heading, comma = flag("clause"), flag("before"), flag("heading"), flag("comma")
    mode, side, mention = field("mode"), field("side"), field("mention")

    # Sides go to what has none on their right; else they wait for what comes on their left.
    pair = lambda mask, s: mask * ((s >> 1) * _RIGHT + (s & 1) * _LEFT)
    here = (side > 0) & ~heading
    gives = here & jnp.any(r.open & _SIDED != 0, axis=0)
    sided = r.sided | pair(on(gives, r.open & _SIDED), side)
    open_ = jnp.where(gives, r.open & ~_SIDED, r.open)
    current = jnp.where(here, on(~gives, side), r.side)
    clause &= gives | ~here

    # A cue on the left, or the end of the clause, settles what the mentions to its right are.
    denies, hedges = before & (mode == NEG), before & (mode == UNC)
    flush = clause | before

    def settled(x):
        free = x[POS] | x[NEG] | x[UNC]
        pos = on(clause, x[POS])
        neg = on(clause, x[NEG]) | on(denies, free) | on(flush, x[3])
        unc = on(clause, x[UNC]) | on(hedges, free) | on(flush, x[4])
        return jnp.stack([pos, neg, unc])

    s_open, s_sided = r.s_open | settled(open_), r.s_sided | settled(sided)
    open_, sided = on(~flush, open_), on(~flush, sided)
    kept = on(~(flush | (comma & (r.after > IGNORE))), r.after)
    after = jnp.where(flag("after"), mode + 4 * field("before"), kept)
    close = jnp.where(flag("after"), 1, on(~comma, r.close))
    current = on(~(flush | (comma & (r.taken == 1))), current)
    taken = on(~here & (current > 0), r.taken)
    s_sided |= pair(on(heading, s_open & _SIDED), side)
    s_open = jnp.where(heading, s_open & ~_SIDED, s_open)

    # A mention.
    cue = after & 3
    fixed = jnp.where(mention == 3, NEG, on((close == 1) | (cue == IGNORE), cue))
    own = jnp.where(cue > 0, cue, jnp.where(mention == 2, UNC, POS))
    row = jnp.where(fixed == 0, own, jnp.where(fixed == IGNORE, -1, fixed + 2))
    rows = jnp.where((jnp.arange(5)[:, None] == row) & (mention > 0), labels, 0)
    open_ |= jnp.where(current == 0, rows, rows & ~_SIDED)
    sided |= pair(rows & _SIDED, current)
    taken = jnp.where((mention > 0) & (row >= 0) & (labels & _SIDED > 0) & (current > 0), 1, taken)

    # Subjects and qualities.
    quality, subject = field("quality"), flag("subject")
    waiting = on(~clause, r.subjects)
    says = on(~clause, r.quality)
    claimed = on(quality > 0, waiting) | on(subject & (says > 0), labels)
    state = jnp.where(quality > 0, quality, says) - 1
    s_subjects = r.s_subjects | jnp.where(jnp.arange(3)[:, None] == state, claimed, 0)
    subjects = on(quality == 0, waiting) | on(subject & (says == 0), labels)
    says = jnp.where(quality > 0, on(waiting == 0, quality), says)

    # The end of a sentence: into the report.
    end = flag("sentence")
    said = s_open | s_subjects | ((s_sided >> 16 | s_sided) & _ALL)
    claims, wrong = r.claims, r.wrong
    if truth is not None:
        claims += end & jnp.any(said != 0, axis=0)
        wrong += end & _is_wrong(said, s_open | s_subjects, s_sided, truth)
    return _Reader(
        after=after,
        close=close,
        side=current,
        taken=taken,
        quality=says,
        subjects=subjects,
        open=open_,
        sided=sided,
        s_open=on(~end, s_open),
        s_sided=on(~end, s_sided),
        s_subjects=on(~end, s_subjects),
        any=r.any | on(end, said),
        d_sided=r.d_sided | on(end, s_sided),
        claims=claims,
        wrong=wrong,
    )


def _is_wrong(said, plain, sided, truth: Truth):
    """Does a sentence affirm or hedge what is not there, or on the wrong side, or deny what is there?"""
    maybe = truth.present | truth.hedged
    both = truth.present | truth.present << 16
    known = (truth.sides >> 16 | truth.sides) & _ALL  # labels whose side is known
    wrong = (said[POS] | said[UNC]) & ~maybe
    wrong |= (sided[POS] | sided[UNC]) & ~truth.sides & (known | known << 16)
    wrong |= plain[NEG] & truth.present
    wrong |= sided[NEG] & both & truth.sides
    labels = (1 << N) - 2  # not No Finding, which is wrong where any finding is present
    sick = truth.present & sum(1 << i for i in range(N) if PATHOLOGY[i])
    return ((wrong & (labels | labels << 16)) != 0) | ((said[POS] & 1 == 1) & (sick != 0))


def read_bytes(
    stream: jax.Array, lengths: jax.Array, bank: Bank, truth: Truth | None = None
) -> dict[str, jax.Array]:
    """Read stream uint8 [B, L], of which the first lengths int [B] bytes count. Pure; works under jit and vmap.

    Returns state int8 [B, 14] (1 affirmed, 0 denied, -1 hedged, -2 not mentioned), right and left bool [B, 14] (the
    sides of the mentions that won), other int8 [B] (the state of any abnormality that is none of the 14) and, with a
    truth, claims and wrong int32 [B]: sentences that claim something, and those that claim what is not so (affirm or
    hedge what is not there, or on a side where it is not; deny what is there; call a film normal that is not).
    """
    width = stream.shape[1]
    inside = jnp.arange(width)[:, None] < lengths[None, :]
    longest = jnp.minimum(jnp.max(lengths), width)
    ends = _find_phrases(bank, _in_context(stream.T, inside), longest)
    r = _read(bank, ends, truth)
    bits = lambda mask: to_bits(mask, N + 1)
    pos, neg, unc = (bits(m) for m in r.any)
    state = jnp.where(
        pos, POSITIVE, jnp.where(unc, UNCERTAIN, jnp.where(neg, NEGATIVE, NOT_MENTIONED))
    )
    sides = [[bits(m >> shift) for m in r.d_sided] for shift in (16, 0)]
    won = [jnp.where(pos, s[POS], jnp.where(unc, s[UNC], s[NEG])) for s in sides]
    anything = jnp.any(state != NOT_MENTIONED, axis=1)
    sound = anything & ~jnp.any((pos | unc) & np.array([*PATHOLOGY, True]), axis=1)
    state = state.at[:, INDEX["No Finding"]].set(jnp.where(sound, POSITIVE, NOT_MENTIONED))
    out = {"state": state[:, :N].astype(jnp.int8), "right": won[0][:, :N], "left": won[1][:, :N]}
    out["other"] = state[:, N].astype(jnp.int8)
    return out if truth is None else out | {"claims": r.claims, "wrong": r.wrong}


_jitted = jax.jit(read_bytes)


def read_reports(
    texts: Sequence[str], lexicon: str | None = None, parents: bool = False
) -> dict[str, np.ndarray]:
    """Read free text: state int8 [N, 14] (1 affirmed, 0 denied, -1 hedged, -2 not mentioned), right and left bool
    [N, 14] (the sides of the mentions that won), other int8 [N] (the state of any abnormality that is none of the 14).

    lexicon: a file to use instead of labels/lexicon.toml. parents: a child affirmed or hedged counts for its parent.
    Raises UserError for a bad lexicon.
    """
    constants = jax.device_put(bank(lexicon))
    out = map_texts(lambda stream, lengths: _jitted(stream, lengths, constants), texts)
    return out | {"state": with_parents(out["state"])} if parents else out


def parse_reports(texts: Sequence[str], parents: bool = False) -> np.ndarray:
    """int8 [N, 14] of `read_reports`: 1 positive, 0 negative, -1 uncertain, -2 not mentioned."""
    return read_reports(texts, parents=parents)["state"]


def with_parents(state: np.ndarray) -> np.ndarray:
    """states int8 [N, 14] with each parent label at least as affirmed as its children are."""
    state = state.copy()
    weight = np.array([NOT_MENTIONED, NEGATIVE, UNCERTAIN, POSITIVE])
    rank = lambda x: np.argmax(x[..., None] == weight, axis=-1)
    for parent, children in PARENTS.items():
        family = rank(state[:, [INDEX[parent], *(INDEX[c] for c in children)]])
        family[:, 1:] = np.where(family[:, 1:] >= 2, family[:, 1:], 0)
        state[:, INDEX[parent]] = weight[family.max(1)]
    return state
