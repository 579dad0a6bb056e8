"""The jitted parser of free text: 14 findings x {affirmed, denied, hedged, not mentioned}, with sides.

docs/report_parser.md is the meaning, exactly; `labels/lexicon.toml` the words. Three passes, tables and bit masks
vectorised over the batch: what each byte is (from its neighbours, `labels/byte_codes.py`); forward over the bytes,
words and phrases (`labels/phrase_search.py`); backward over the tokens, what the phrases say, which is here. A mask has
one bit a label of `lexicon.LABELS`; a pair of masks, right << 16 | left, holds the sides.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.labels import lexicon as lexicons
from cxr_jax.labels.automaton import Array
from cxr_jax.labels.byte_codes import code_bytes
from cxr_jax.labels.phrase_bank import (
    AFFIRMED,
    DENIED,
    HEDGED,
    IGNORED,
    SENTENCE_END,
    Item,
    PhraseBank,
    load_phrase_bank,
    unpack_items,
)
from cxr_jax.labels.phrase_search import Evidence, find_phrases, take_phrases
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

LABEL_COUNT = len(CHEXPERT_14)
_ALL = (1 << len(lexicons.LABELS)) - 1
_SIDED = _ALL & ~sum(1 << lexicons.LABELS.index(name) for name in lexicons.SIDELESS)
_PATHOLOGY = sum(1 << index for index in range(LABEL_COUNT) if PATHOLOGY[index])
_NO_FINDING = 1 << INDEX["No Finding"]
_DEVICES = 1 << INDEX["Support Devices"]
_FINDINGS = ((1 << LABEL_COUNT) - 1) & ~_NO_FINDING

# A pair of masks is right << 16 | left: multiply a mask by one of these, or by their sum, to make one.
_PAIR_BITS = 16
_RIGHT, _LEFT = 1 << _PAIR_BITS, 1

# ---- Masks -----------------------------------------------------------------------------------------------------------


def to_mask(bits: Array) -> jax.Array:
    """Pack bool [.., n] into int32 [..]: bit i is entry i."""
    return jnp.sum(jnp.where(bits, jnp.int32(1) << jnp.arange(bits.shape[-1]), 0), axis=-1)


def to_bits(mask: jax.Array, count: int = LABEL_COUNT) -> jax.Array:
    """Unpack the low bits of masks int [..] into bool [.., count]."""
    return (mask[..., None] >> jnp.arange(count)) & 1 == 1


def _to_pair(mask: jax.Array, side: jax.Array) -> jax.Array:
    """Put a mask on the sides of a code: 2 right, 1 left, 3 both."""
    return mask * ((side >> 1) * _RIGHT + (side & 1) * _LEFT)


def _either_side(pair: jax.Array) -> jax.Array:
    """The mask of the labels that have a side."""
    return (pair >> _PAIR_BITS | pair) & _ALL


def _keep_where(condition: jax.Array, values: jax.Array) -> jax.Array:
    """The values where the condition holds, 0 elsewhere."""
    return jnp.where(condition, values, jnp.zeros_like(values))


# ---- What is so ------------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """What is so, to hold claims against: masks int32 [B] over the 14 labels.

    present: for certain; hedged: perhaps. sides: pairs; a label that has no side, or whose side is not known, has
    neither. blank: those of the hedged that are so only because nobody said anything of them; None: there are none.
    """

    present: jax.Array
    hedged: jax.Array
    sides: jax.Array
    blank: jax.Array | None = None

    @classmethod
    def from_arrays(
        cls, present: Array, hedged: Array, sides: Array, known: Array | None = None
    ) -> "Truth":
        """Pack a truth from arrays.

        Args:
            present: bool [B, 14].
            hedged: bool [B, 14].
            sides: bool [B, 14, 2]: is it known to be on the right, and on the left?
            known: bool [B, 14]: what is neither known nor hedged is blank; None: all is known.
        """
        right, left = to_mask(sides[..., 0]), to_mask(sides[..., 1])
        pairs = right << _PAIR_BITS | left
        if known is None:
            return cls(to_mask(present), to_mask(hedged), pairs)
        blank = ~known & ~hedged
        return cls(to_mask(present), to_mask(hedged | blank), pairs, to_mask(blank))


def _is_wrong(
    said: jax.Array, without_side: jax.Array, with_side: jax.Array, truth: Truth
) -> jax.Array:
    """Tell which sentences affirm or hedge what is not there, or on the wrong side, or deny what is there.

    Args:
        said: masks int32 [3, B] by state: all that the sentence claims.
        without_side: masks likewise, of what it claims without a side.
        with_side: pairs likewise, of what it claims with one.
        truth: what is so.
    """
    possible = truth.present | truth.hedged
    side_known = _either_side(truth.sides)
    # Affirmed or hedged, but not there at all; or on a side where it is known not to be.
    wrong = (said[AFFIRMED] | said[HEDGED]) & ~possible
    elsewhere = (with_side[AFFIRMED] | with_side[HEDGED]) & ~truth.sides
    wrong |= elsewhere & (side_known | side_known << _PAIR_BITS)
    # Denied, but there; on a side, if the side is said.
    wrong |= without_side[DENIED] & truth.present
    wrong |= with_side[DENIED] & (truth.present | truth.present << _PAIR_BITS) & truth.sides
    # No Finding is none of these: it is wrong where any finding is present.
    is_false = wrong & (_FINDINGS | _FINDINGS << _PAIR_BITS) != 0
    calls_normal = said[AFFIRMED] & _NO_FINDING != 0
    return is_false | (calls_normal & (truth.present & _PATHOLOGY != 0))


# ---- The backward pass -----------------------------------------------------------------------------------------------

# Rows of unsettled mentions: the three states that a cue on the left can still change, then those that none can.
_FOR_GOOD = 3  # from a state to the row of those that keep it
_UNSETTLED_ROWS = 6
_MODE_MASK = 3
_UNTIL_COMMA = 4  # added to the mode of a cue that a comma ends
_OF_FIELD = 8  # and of one that drops the name of a field, which a device is not
_AFFIRMS = 16  # instead of a mode


class _Registers(NamedTuple):
    """What the backward pass remembers, int32 [.., B]."""

    # What stands to the right of the next mention.
    cue: jax.Array  # mode of the nearest cue; 0 none; + _UNTIL_COMMA, + _OF_FIELD
    cue_is_close: jax.Array  # no comma since
    field_labels: (
        jax.Array
    )  # of a cue of a field's name: what the value speaks of; no other name is dropped
    under_cue: jax.Array  # mask of what a cue settled, if it is the phrase read last
    side: jax.Array  # the current side: 2 right, 1 left
    side_is_taken: jax.Array  # a mention has taken it
    quality: jax.Array  # the current quality: 1 + state
    # What waits for something on its left.
    subjects: jax.Array  # mask of subjects without a quality
    unsettled: jax.Array  # masks [6] of mentions since the last cue, without a side
    unsettled_sided: jax.Array  # pairs [6], likewise
    # What the sentence says so far, by state.
    sentence: jax.Array  # masks [3] of mentions without a side
    sentence_sided: jax.Array  # pairs [3]
    sentence_subjects: jax.Array  # masks [3]
    # What the report says so far.
    report: jax.Array  # masks [3], by state
    report_sided: jax.Array  # pairs [3]
    claims: jax.Array  # sentences that claim something
    wrong: jax.Array  # sentences that claim something that is not so


# How many rows a register has, where it has more than one.
_REGISTER_ROWS = dict.fromkeys(("unsettled", "unsettled_sided"), _UNSETTLED_ROWS) | dict.fromkeys(
    ("sentence", "sentence_sided", "sentence_subjects", "report", "report_sided"), 3
)


def _read_phrases(bank: PhraseBank, ends: jax.Array, truth: Truth | None) -> _Registers:
    """Run the backward pass over ends int16 [L, B], from `find_phrases`."""
    items_by_index = jnp.asarray(bank.items)
    batch_size = ends.shape[1]
    indices, most = take_phrases(bank, ends)

    def read_next(index: jax.Array, registers: _Registers) -> _Registers:
        items = items_by_index[indices[index].astype(jnp.int32)]
        return _read_item(registers, items, truth)

    zeros = {}
    for name in _Registers._fields:
        rows = _REGISTER_ROWS.get(name)
        zeros[name] = jnp.zeros((batch_size,) if rows is None else (rows, batch_size), jnp.int32)
    registers = jax.lax.fori_loop(0, most, read_next, _Registers(**zeros))
    # The start of the text ends its first sentence.
    return _read_item(registers, jnp.full(batch_size, SENTENCE_END, jnp.int32), truth)


def _read_item(registers: _Registers, items: jax.Array, truth: Truth | None) -> _Registers:
    """Read one item of each text, [B], from right to left. The order of the steps is that of docs/report_parser.md."""
    item = unpack_items(items)
    registers, item = _give_side(registers, item)
    settled_by_cue = _settled_by_cue(registers, item)
    registers = _settle(registers, item)
    registers = _carry_on(registers, item, settled_by_cue)
    registers = _apply_heading(registers, item)
    registers = _add_mention(registers, item)
    registers = _judge_subjects(registers, item)
    return _end_sentence(registers, item, truth)


def _give_side(registers: _Registers, item: Item) -> tuple[_Registers, Item]:
    """Give a side to the mentions on its right that have none; without any, it waits for what comes on its left.

    Returns the item, too: a stop with a side is a stop only where it gives its side away.
    """
    is_side = (item.side > 0) & ~item.heading
    gives = is_side & jnp.any(registers.unsettled & _SIDED != 0, axis=0)
    given = _keep_where(gives, registers.unsettled & _SIDED)
    registers = registers._replace(
        unsettled=jnp.where(gives, registers.unsettled & ~_SIDED, registers.unsettled),
        unsettled_sided=registers.unsettled_sided | _to_pair(given, item.side),
        side=jnp.where(is_side, _keep_where(~gives, item.side), registers.side),
        side_is_taken=_keep_where(~is_side, registers.side_is_taken),
    )
    return registers, item._replace(clause=item.clause & (gives | ~is_side))


def _settle(registers: _Registers, item: Item) -> _Registers:
    """Settle what the mentions on the right are: by a cue on their left, or by the end of the clause."""
    denies = item.before & (item.mode == DENIED)
    hedges = item.before & (item.mode == HEDGED)
    # "Tip of the": the device is there, whatever is said of its tip. No cue for any other mention.
    places = item.before & (item.mode == AFFIRMED)
    settles = item.clause | (item.before & ~places)
    devices = _DEVICES * (_RIGHT + _LEFT)

    def by_state(unsettled: jax.Array) -> jax.Array:
        """Masks or pairs [6, B] -> those that are settled now, [3, B]. A cue "ignore" drops what it could change."""
        changeable = unsettled[AFFIRMED] | unsettled[DENIED] | unsettled[HEDGED]
        settled = _keep_where(item.clause, unsettled[:_FOR_GOOD])
        settled |= _keep_where(settles, unsettled[_FOR_GOOD:])
        affirmed, denied, hedged = settled
        denied |= _keep_where(denies, changeable)
        hedged |= _keep_where(hedges, changeable)
        return jnp.stack([affirmed, denied, hedged])

    def still_unsettled(unsettled: jax.Array) -> jax.Array:
        placed = functools.reduce(operator.or_, unsettled) & devices
        row = jnp.arange(_UNSETTLED_ROWS)[:, None]
        moved = (unsettled & ~devices) | jnp.where(row == AFFIRMED + _FOR_GOOD, placed, 0)
        return _keep_where(~settles, jnp.where(places, moved, unsettled))

    return registers._replace(
        sentence=registers.sentence | by_state(registers.unsettled),
        sentence_sided=registers.sentence_sided | by_state(registers.unsettled_sided),
        unsettled=still_unsettled(registers.unsettled),
        unsettled_sided=still_unsettled(registers.unsettled_sided),
    )


def _settled_by_cue(registers: _Registers, item: Item) -> jax.Array:
    """The mask of the mentions that a cue on their left, and nothing else, settles."""
    waiting = functools.reduce(
        operator.or_, [*registers.unsettled, *map(_either_side, registers.unsettled_sided)]
    )
    is_cue = item.before & (item.mode != AFFIRMED) & (item.mention == 0)
    return _keep_where(is_cue, waiting)


def _carry_on(registers: _Registers, item: Item, settled_by_cue: jax.Array) -> _Registers:
    """Update the cue and the side that mentions further to the left will see on their right."""
    is_stop = item.clause | (item.before & (item.mode != AFFIRMED))
    ends_cue = is_stop | (item.comma & (registers.cue & _UNTIL_COMMA != 0))
    kept_cue = _keep_where(~ends_cue, registers.cue)
    # A cue "around" reaches no further than a comma; one of a field drops what it follows.
    new_cue = item.mode + _UNTIL_COMMA * item.before
    new_cue = jnp.where(item.clause & (item.mode == AFFIRMED), _AFFIRMS, new_cue)
    new_cue = jnp.where(item.field, IGNORED + _UNTIL_COMMA + _OF_FIELD, new_cue)
    # "Effusion: no effusion": the colon makes a name of what stands before it.
    is_name = item.field & ~item.before
    is_after = item.after & (~is_name | (registers.under_cue != 0))
    field_labels = jnp.where(item.field, _ALL, registers.field_labels)
    field_labels = jnp.where(is_name, registers.under_cue, field_labels)
    field_labels = jnp.where(is_after, field_labels, registers.field_labels)
    ends_side = is_stop | (item.comma & (registers.side_is_taken == 1))
    side = _keep_where(~ends_side, registers.side)
    return registers._replace(
        cue=jnp.where(is_after, new_cue, kept_cue),
        cue_is_close=jnp.where(item.comma, 0, jnp.where(is_after, 1, registers.cue_is_close)),
        field_labels=field_labels,
        under_cue=settled_by_cue,
        side=side,
        side_is_taken=_keep_where(side > 0, registers.side_is_taken),
    )


def _apply_heading(registers: _Registers, item: Item) -> _Registers:
    """Put what the sentence says on the right of a heading, and has no side yet, on the side of the heading."""
    placed = _keep_where(item.heading, registers.sentence & _SIDED)
    return registers._replace(
        sentence_sided=registers.sentence_sided | _to_pair(placed, item.side),
        sentence=jnp.where(item.heading, registers.sentence & ~_SIDED, registers.sentence),
    )


def _add_mention(registers: _Registers, item: Item) -> _Registers:
    """Add a mention to the unsettled ones, in the row that the cue to its right asks for."""
    is_mention = item.mention > 0
    cue = registers.cue & _MODE_MASK
    of_field = registers.cue & _OF_FIELD != 0
    # A name that the value does not speak of says something itself; so does a device.
    is_dropped = (item.labels & registers.field_labels != 0) & (
        (item.labels != _DEVICES) | (registers.field_labels != _ALL)
    )
    cue = _keep_where(~of_field | is_dropped, cue)
    # A cue that is close, or that drops the mention, has the last word; else a cue on the left can still change it.
    last_word = _keep_where((registers.cue_is_close == 1) | (cue == IGNORED), cue)
    last_word = jnp.where(item.mention == 3, DENIED, last_word)
    unless_cue = jnp.where(item.mention == 2, HEDGED, AFFIRMED)
    for_now = jnp.where(cue > 0, cue, unless_cue)
    for_good = jnp.where(last_word == IGNORED, -1, last_word + _FOR_GOOD)
    row = jnp.where(last_word == 0, for_now, for_good)
    is_affirmed = (registers.cue == _AFFIRMS) & (registers.cue_is_close == 1) & (item.mention < 3)
    row = jnp.where(is_affirmed, unless_cue + _FOR_GOOD, row)
    added = (jnp.arange(_UNSETTLED_ROWS)[:, None] == row) & is_mention
    added = jnp.where(added, item.labels, 0)
    # The current side goes to the labels that can have one.
    without_side = jnp.where(registers.side == 0, added, added & ~_SIDED)
    takes_side = is_mention & (row >= 0) & (item.labels & _SIDED > 0) & (registers.side > 0)
    return registers._replace(
        unsettled=registers.unsettled | without_side,
        unsettled_sided=registers.unsettled_sided | _to_pair(added & _SIDED, registers.side),
        side_is_taken=jnp.where(takes_side, 1, registers.side_is_taken),
        # A field has one name.
        cue=_keep_where(~(is_mention & of_field), registers.cue),
    )


def _judge_subjects(registers: _Registers, item: Item) -> _Registers:
    """Join subjects with qualities: each waits for the other, whichever comes first, within the clause."""
    waiting = _keep_where(~item.clause, registers.subjects)
    quality = _keep_where(~item.clause, registers.quality)
    is_quality = item.quality > 0
    judged = _keep_where(is_quality, waiting)
    judged |= _keep_where(item.subject & (quality > 0), item.labels)
    state = jnp.where(is_quality, item.quality, quality) - 1
    unjudged = _keep_where(~is_quality, waiting)
    unjudged |= _keep_where(item.subject & (quality == 0), item.labels)
    # A quality that finds no subject on its right waits for those on its left.
    quality = jnp.where(is_quality, _keep_where(waiting == 0, item.quality), quality)
    judged_by_state = jnp.where(jnp.arange(3)[:, None] == state, judged, 0)
    return registers._replace(
        sentence_subjects=registers.sentence_subjects | judged_by_state,
        subjects=unjudged,
        quality=quality,
    )


def _end_sentence(registers: _Registers, item: Item, truth: Truth | None) -> _Registers:
    """Move what the sentence says into the report, and hold it against the truth, at the end of a sentence."""
    ends = item.sentence
    without_side = registers.sentence | registers.sentence_subjects
    with_side = registers.sentence_sided
    said = without_side | _either_side(with_side)
    if truth is not None:
        is_claim = jnp.any(said != 0, axis=0)
        is_wrong = _is_wrong(said, without_side, with_side, truth)
        registers = registers._replace(
            claims=registers.claims + (ends & is_claim), wrong=registers.wrong + (ends & is_wrong)
        )
    return registers._replace(
        report=registers.report | _keep_where(ends, said),
        report_sided=registers.report_sided | _keep_where(ends, with_side),
        sentence=_keep_where(~ends, registers.sentence),
        sentence_sided=_keep_where(~ends, registers.sentence_sided),
        sentence_subjects=_keep_where(~ends, registers.sentence_subjects),
    )


# ---- The readers -----------------------------------------------------------------------------------------------------


def read_bytes(
    stream: Array, lengths: Array, bank: PhraseBank, truth: Truth | None = None
) -> dict[str, Any]:
    """Read reports in bytes. Pure; works under jit and vmap.

    Args:
        stream: uint8 [B, L], UTF-8.
        lengths: int [B]: the first bytes of each row, which count.
        bank: the words.
        truth: what is so, to count false claims.

    Returns:
        state int8 [B, 14]: 1 affirmed, 0 denied, -1 hedged, -2 not mentioned.
        right, left bool [B, 14]: the sides of the mentions that won.
        other int8 [B]: the state of any abnormality that is none of the 14.
        foreign bool [B]: the text is in another language; of it only denials are read.
        unread int32 [B]: words that look like findings and are not known.
        With a truth, claims and wrong int32 [B]: sentences that claim something, and those that claim what is not so
        (affirm or hedge what is not there, or on a side where it is not; deny what is there; call a film normal that is
        not).
    """
    width = stream.shape[1]
    inside = jnp.arange(width)[:, None] < lengths[None, :]
    longest = jnp.minimum(jnp.max(lengths), width)
    ends, evidence = find_phrases(bank, code_bytes(stream.T, inside), longest)
    return read_ends(ends, evidence, bank, truth)


def read_ends(
    ends: jax.Array, evidence: Evidence, bank: PhraseBank, truth: Truth | None = None
) -> dict[str, Any]:
    """Read reports, or parts of them that no phrase reaches out of, from what `find_phrases` makes of them.

    Args:
        ends: int16 [L + 1, B]; 0 outside of the part.
        evidence: what their words tell.
        bank: the words.
        truth: as for `read_bytes`.

    Returns:
        What `read_bytes` returns.
    """
    registers = _read_phrases(bank, ends, truth)
    # In another language only what known words deny is kept.
    is_foreign = evidence.foreign > jnp.maximum(evidence.english, 3)
    registers = registers._replace(
        report=_only_denied_where(is_foreign, registers.report),
        report_sided=_only_denied_where(is_foreign, registers.report_sided),
        claims=_keep_where(~is_foreign, registers.claims),
        wrong=_keep_where(~is_foreign, registers.wrong),
    )

    outputs = _report_outputs(registers, evidence, is_foreign)
    if truth is None:
        return outputs
    return outputs | {"claims": registers.claims, "wrong": registers.wrong}


def _report_outputs(
    registers: _Registers, evidence: Evidence, is_foreign: jax.Array
) -> dict[str, jax.Array]:
    """Section 6: what the report says of each label."""
    # Of several mentions of a label the strongest wins, with its sides.
    affirmed, denied, hedged = (_label_bits(mask) for mask in registers.report)
    unaffirmed = jnp.where(hedged, UNCERTAIN, jnp.where(denied, NEGATIVE, NOT_MENTIONED))
    state = jnp.where(affirmed, POSITIVE, unaffirmed)
    right, left = (
        _winning_bits(registers.report_sided >> shift, affirmed, hedged)
        for shift in (_PAIR_BITS, 0)
    )

    # No Finding has a rule of its own: the report says something, nothing that is a finding, and nothing unread.
    says_something = jnp.any(state != NOT_MENTIONED, axis=1)
    is_sick = jnp.any((affirmed | hedged) & np.array([*PATHOLOGY, True]), axis=1)
    is_normal = says_something & ~is_sick & (evidence.unread == 0) & ~is_foreign
    normal = jnp.where(is_normal, POSITIVE, NOT_MENTIONED)
    state = state.at[:, INDEX["No Finding"]].set(normal)
    return {
        "state": state[:, :LABEL_COUNT].astype(jnp.int8),
        "right": right[:, :LABEL_COUNT],
        "left": left[:, :LABEL_COUNT],
        "other": state[:, LABEL_COUNT].astype(jnp.int8),
        "foreign": is_foreign,
        "unread": evidence.unread,
    }


def _only_denied_where(condition: jax.Array, by_state: jax.Array) -> jax.Array:
    """Masks or pairs [3, B] by state: where the condition holds, those of what is affirmed or hedged are 0."""
    is_kept = ~condition | (jnp.arange(3)[:, None] == DENIED)
    return _keep_where(is_kept, by_state)


def _label_bits(mask: jax.Array) -> jax.Array:
    """bool [B, 15]: the 14 labels, and the abnormalities that are none of them."""
    return to_bits(mask, LABEL_COUNT + 1)


def _winning_bits(masks: jax.Array, affirmed: jax.Array, hedged: jax.Array) -> jax.Array:
    """bool [B, 15]: of masks [3, B] by state, the bits of the state that wins for each label."""
    by_state = [_label_bits(mask) for mask in masks]
    unaffirmed = jnp.where(hedged, by_state[HEDGED], by_state[DENIED])
    return jnp.where(affirmed, by_state[AFFIRMED], unaffirmed)


_read_bytes_jitted = jax.jit(read_bytes)


def read_reports(
    texts: Sequence[str], lexicon: str | None = None, parents: bool = False
) -> dict[str, np.ndarray]:
    """Read free text.

    Args:
        texts: N reports, of any length.
        lexicon: a file to use instead of labels/lexicon.toml.
        parents: a child affirmed or hedged counts for its parent.

    Returns:
        state int8 [N, 14]: 1 affirmed, 0 denied, -1 hedged, -2 not mentioned.
        right, left bool [N, 14]: the sides of the mentions that won.
        other int8 [N]: the state of any abnormality that is none of the 14.
        foreign bool [N]: the text is in another language; of it only denials are read.
        unread int32 [N]: words that look like findings and are not known.

    Raises:
        UserError: for a bad lexicon, or for what is no list of texts.
    """
    bank = jax.device_put(load_phrase_bank(lexicon))
    reading = map_texts(lambda stream, lengths: _read_bytes_jitted(stream, lengths, bank), texts)
    if parents:
        reading["state"] = with_parents(reading["state"])
    return reading


def parse_reports(texts: Sequence[str], parents: bool = False) -> np.ndarray:
    """Read free text: int8 [N, 14] of `read_reports`, 1 positive, 0 negative, -1 uncertain, -2 not mentioned."""
    return read_reports(texts, parents=parents)["state"]


def with_parents(states: np.ndarray) -> np.ndarray:
    """Make each parent label at least as affirmed as its children are.

    Args:
        states: int8 [N, 14]; not changed.

    Returns:
        A copy. What a child denies says nothing of its parent.
    """
    states = states.copy()
    by_strength = np.array([NOT_MENTIONED, NEGATIVE, UNCERTAIN, POSITIVE])
    for parent, children in PARENTS.items():
        family = states[:, [INDEX[parent], *(INDEX[child] for child in children)]]
        strength = np.argmax(family[..., None] == by_strength, axis=-1)
        strength[:, 1:] = np.where(strength[:, 1:] >= 2, strength[:, 1:], 0)
        states[:, INDEX[parent]] = by_strength[strength.max(1)]
    return states
