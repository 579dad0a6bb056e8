"""What the phrases of texts say: the third pass of the parser (docs/report_parser.md, sections 3 to 5), on the device.

Backward over the items of the phrases taken, since cues, sides and qualities wait for what stands on their left: what
each item sees on its right says what it does. Then forward: a mention becomes what the items on its left make of it. A
mask has one bit a label of `lexicon.LABELS`; a pair of masks, right << 16 | left, holds the sides.
"""

import functools
import itertools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.labels import lexicon as lexicons
from cxr_jax.labels.automaton import Array
from cxr_jax.labels.phrase_bank import (
    AFFIRMED,
    DENIED,
    HEDGED,
    IGNORED,
    LABEL_BITS,
    Item,
    PhraseBank,
    unpack_items,
)
from cxr_jax.labels.phrase_search import take_phrases
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, PATHOLOGY

LABEL_COUNT = len(CHEXPERT_14)
_STATES = np.arange(3, dtype=np.int32)[:, None]  # rows of arrays by state
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


def split_pair(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The masks of what is on the right, and on the left."""
    return pair >> _PAIR_BITS & _ALL, pair & _ALL


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


# ---- What an item does -----------------------------------------------------------------------------------------------

_MODE_MASK = 3
_UNTIL_COMMA = 4  # added to the mode of a cue that a comma ends
_OF_FIELD = 8  # and of one that drops the name of a field, which a device is not
_AFFIRMS = 16  # instead of a mode


class _Registers(NamedTuple):
    """What the items on the right leave for those on their left, int32 [B]."""

    cue: jax.Array  # mode of the nearest cue; 0 none; + _UNTIL_COMMA, + _OF_FIELD
    cue_is_close: jax.Array  # no comma since
    side: jax.Array  # the current side: 2 right, 1 left
    side_is_taken: jax.Array  # a mention has taken it
    quality: jax.Array  # the current quality: 1 + state
    # mask: of a cue of a field's name, what the value speaks of; no other name is dropped
    field_labels: jax.Array
    under_cue: jax.Array  # mask of what a cue settled, if it is the phrase read last
    # What waits for something on its left, masks.
    unsided: jax.Array  # mentions since the last cue, without a side
    sided: jax.Array  # likewise, with one
    subjects: jax.Array  # subjects without a quality


class _Effect(NamedTuple):
    """What an item does to the mentions on its right, and what it adds to what the sentence says; int32 [B]."""

    given_side: jax.Array  # 2 right, 1 left, 3 both: to mentions that have none
    settles: jax.Array  # by the end of a clause or by a cue
    cue: jax.Array  # the state of those that can change; 0 none, IGNORED: it drops them
    places: jax.Array  # it affirms devices
    heading: jax.Array  # the side that it gives to the whole sentence
    ends_sentence: jax.Array
    state: jax.Array  # of the mention added
    is_final: jax.Array  # no cue on its left changes that
    side: jax.Array  # its side
    labels: jax.Array  # its mask; 0 where none is added
    judged: jax.Array  # mask of subjects that have found their quality
    judgement: jax.Array  # their state


# What a loop carries from item to item stands side by side in few arrays: each array is a program of its own, which
# computes again what it shares with others. Array -> its fields, and their bits.
_Layout = tuple[dict[str, int], ...]
_REGISTER_LAYOUT: _Layout = (
    {"cue": 5, "cue_is_close": 1, "side": 2, "side_is_taken": 1, "quality": 2, "subjects": 15},
    {"field_labels": LABEL_BITS, "under_cue": LABEL_BITS},
    {"unsided": LABEL_BITS, "sided": LABEL_BITS},
)
_EFFECT_LAYOUT: _Layout = (
    {
        **{"given_side": 2, "settles": 1, "cue": 2, "places": 1, "heading": 2},
        **{"ends_sentence": 1, "state": 2, "is_final": 1, "side": 2, "judgement": 2},
    },
    {"labels": LABEL_BITS, "judged": LABEL_BITS},
)


def _pack(layout: _Layout, fields: dict[str, jax.Array]) -> list[jax.Array]:
    packed = []
    for array in layout:
        shifts = itertools.accumulate(array.values(), initial=0)
        parts = [
            fields[name].astype(jnp.int32) << shift
            for name, shift in zip(array, shifts, strict=False)
        ]
        packed.append(functools.reduce(operator.or_, parts))
    return packed


def _unpack(layout: _Layout, packed: list[jax.Array]) -> dict[str, jax.Array]:
    fields = {}
    for array, bits_of in zip(packed, layout, strict=True):
        shift = 0
        for name, bits in bits_of.items():
            fields[name] = (array >> shift) & ((1 << bits) - 1)
            shift += bits
    return fields


def _read_item(registers: _Registers, item: Item) -> tuple[_Registers, _Effect]:
    """Read one item of each text, from right to left. The order of the steps is that of docs/report_parser.md."""
    # A side goes to the mentions on its right that have none; without any, it waits for what comes on its left. A stop
    # with a side is a stop only where it gives its side away.
    is_side = (item.side > 0) & ~item.heading
    gives_side = is_side & (registers.unsided & _SIDED != 0)
    item = item._replace(clause=item.clause & (gives_side | ~is_side))
    given = _keep_where(gives_side, registers.unsided & _SIDED)
    registers = registers._replace(
        unsided=registers.unsided & ~given,
        sided=registers.sided | given,
        side=jnp.where(is_side, _keep_where(~gives_side, item.side), registers.side),
        side_is_taken=_keep_where(~is_side, registers.side_is_taken),
    )
    # "Tip of the": the device is there, whatever is said of its tip. No cue for any other mention.
    places = item.before & (item.mode == AFFIRMED)
    is_cue = item.before & ~places
    settles = item.clause | is_cue
    waiting = registers.unsided | registers.sided
    settled_by_cue = _keep_where(is_cue & (item.mention == 0), waiting)
    registers = registers._replace(
        unsided=_keep_where(~settles, registers.unsided),
        sided=_keep_where(~settles, registers.sided),
    )
    registers = _carry_on(registers, item, settled_by_cue)
    registers, effect = _add_mention(registers, item)
    registers, judgement, judged = _judge_subjects(registers, item)
    return registers, effect._replace(
        given_side=_keep_where(gives_side, item.side),
        settles=settles,
        cue=_keep_where(is_cue, item.mode),
        places=places,
        heading=_keep_where(item.heading, item.side),
        judgement=judgement,
        judged=judged,
        ends_sentence=item.sentence,
    )


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


def _add_mention(registers: _Registers, item: Item) -> tuple[_Registers, _Effect]:
    """Give a mention its state, as far as the cue to its right says it, and the current side."""
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
    state = jnp.where(last_word > 0, last_word, jnp.where(cue > 0, cue, unless_cue))
    is_affirmed = (registers.cue == _AFFIRMS) & (registers.cue_is_close == 1) & (item.mention < 3)
    state = jnp.where(is_affirmed, unless_cue, state)
    is_added = is_mention & (state != IGNORED)
    added = _keep_where(is_added, item.labels)
    # The current side goes to the labels that can have one.
    sided = _keep_where(registers.side > 0, added & _SIDED)
    zero = jnp.zeros_like(state)
    effect = _Effect(*[zero] * len(_Effect._fields))._replace(
        state=state, is_final=(last_word > 0) | is_affirmed, side=registers.side, labels=added
    )
    registers = registers._replace(
        unsided=registers.unsided | (added & ~sided),
        sided=registers.sided | sided,
        side_is_taken=jnp.where(sided > 0, 1, registers.side_is_taken),
        # A field has one name.
        cue=_keep_where(~(is_mention & of_field), registers.cue),
    )
    return registers, effect


def _judge_subjects(registers: _Registers, item: Item) -> tuple[_Registers, jax.Array, jax.Array]:
    """Join subjects with qualities: each waits for the other, whichever comes first, within the clause.

    Returns the state of the subjects judged, and their mask, too.
    """
    waiting = _keep_where(~item.clause, registers.subjects)
    quality = _keep_where(~item.clause, registers.quality)
    is_quality = item.quality > 0
    judged = _keep_where(is_quality, waiting)
    judged |= _keep_where(item.subject & (quality > 0), item.labels)
    state = jnp.where(is_quality, item.quality, jnp.maximum(quality, 1)) - 1
    unjudged = _keep_where(~is_quality, waiting)
    unjudged |= _keep_where(item.subject & (quality == 0), item.labels)
    # A quality that finds no subject on its right waits for those on its left.
    quality = jnp.where(is_quality, _keep_where(waiting == 0, item.quality), quality)
    return registers._replace(subjects=unjudged, quality=quality), state, judged


# ---- What mentions meet on their left --------------------------------------------------------------------------------


class _Fate(NamedTuple):
    """What becomes of a mention that stands here, int32 [B]: what it meets first on its left."""

    given_side: jax.Array  # before it is settled
    cue: jax.Array  # as in `_Effect`: what settles it; 0: the end of a clause does
    places: jax.Array  # before it is settled
    heading: jax.Array  # in the rest of the sentence


_FATE_LAYOUT: _Layout = ({"given_side": 2, "cue": 2, "places": 1, "heading": 2},)


class _Said(NamedTuple):
    """What is said, by state: masks int32 [3, B], and pairs, of the labels with a side."""

    labels: jax.Array  # with a side or without
    without_side: jax.Array
    with_side: jax.Array


class Claims(NamedTuple):
    """What a report says.

    report: masks int32 [3, B], by state. with_side: pairs likewise. claims, wrong int32 [B]: its sentences that claim
    something, and those that claim what is not so.
    """

    report: jax.Array
    with_side: jax.Array
    claims: jax.Array
    wrong: jax.Array


def _say(effect: _Effect, fate: _Fate) -> _Said:
    """What an item's mention and the subjects that it judges come to say."""
    # The tip of a device is no device: that is there.
    devices = _keep_where(fate.places == 1, effect.labels & _DEVICES)
    labels = effect.labels & ~devices
    is_changed = (effect.is_final == 0) & (fate.cue > 0)
    state = jnp.where(is_changed, fate.cue, effect.state)
    by_state = _keep_where(state == _STATES, labels) | _keep_where(_STATES == AFFIRMED, devices)

    later_side = jnp.where(fate.given_side > 0, fate.given_side, fate.heading)
    side = jnp.where(effect.side > 0, effect.side, later_side)
    sided = _keep_where(side > 0, by_state & _SIDED)
    subjects = _keep_where(effect.judgement == _STATES, effect.judged)
    return _Said(
        labels=by_state | subjects,
        without_side=(by_state & ~sided) | subjects,
        with_side=_to_pair(sided, side),
    )


def _meet(effect: _Effect, fate: _Fate) -> _Fate:
    """What mentions on the right of an item meet: the item, and then what those on its left do."""
    settles = effect.settles == 1
    later_heading = _keep_where(effect.ends_sentence == 0, fate.heading)
    given_side = _keep_where(~settles, fate.given_side)
    return _Fate(
        given_side=jnp.where(effect.given_side > 0, effect.given_side, given_side),
        cue=jnp.where(settles, effect.cue, fate.cue),
        places=effect.places | _keep_where(~settles, fate.places),
        heading=jnp.where(effect.heading > 0, effect.heading, later_heading),
    )


# ---- The passes ------------------------------------------------------------------------------------------------------


def read_phrases(bank: PhraseBank, ends: jax.Array, truth: Truth | None) -> Claims:
    """Read the phrases of texts.

    Args:
        bank: the words.
        ends: int16 [L, B], from `find_phrases`.
        truth: what is so; None: no sentence is held against it, and claims and wrong are 0.
    """
    indices, most = take_phrases(bank, ends)
    effects = _read_backward(jnp.asarray(bank.items), indices, most)
    return _read_forward(effects, most, truth)


def _read_backward(items: jax.Array, indices: jax.Array, most: jax.Array) -> list[jax.Array]:
    """Find what each item does, `_EFFECT_LAYOUT` int32 [L, B]; indices int16 [L, B] of `take_phrases`."""
    Carried = tuple[list[jax.Array], list[jax.Array]]

    def read_next(index: jax.Array, carried: Carried) -> Carried:
        packed, effects = carried
        registers = _Registers(**_unpack(_REGISTER_LAYOUT, packed))
        item = unpack_items(items[indices[index].astype(jnp.int32)])
        registers, effect = _read_item(registers, item)
        parts = _pack(_EFFECT_LAYOUT, effect._asdict())
        effects = [
            jax.lax.dynamic_update_index_in_dim(column, part, index, 0)
            for column, part in zip(effects, parts, strict=True)
        ]
        return _pack(_REGISTER_LAYOUT, registers._asdict()), effects

    zero = jnp.zeros(indices.shape[1], jnp.int32)
    effects = [jnp.zeros(indices.shape, jnp.int32) for _ in _EFFECT_LAYOUT]
    return jax.lax.fori_loop(0, most, read_next, ([zero] * len(_REGISTER_LAYOUT), effects))[1]


def _read_forward(effects: list[jax.Array], most: jax.Array, truth: Truth | None) -> Claims:
    """Carry out what the items do, from the left, where nothing changes a mention any more."""
    Carried = tuple[list[jax.Array], _Said, Claims]

    def read_next(step: jax.Array, carried: Carried) -> Carried:
        packed, sentence, claims = carried
        index = most - 1 - step
        effect = _Effect(**_unpack(_EFFECT_LAYOUT, [column[index] for column in effects]))
        fate = _Fate(**_unpack(_FATE_LAYOUT, packed))
        said = _say(effect, fate)
        if truth is not None:
            ended = effect.ends_sentence == 1
            claims = _judge(claims, sentence, ended, truth)
            sentence = _Said(*(_keep_where(~ended, rows) for rows in sentence))
            sentence = _Said(*(rows | more for rows, more in zip(sentence, said, strict=True)))
        claims = claims._replace(
            report=claims.report | said.labels, with_side=claims.with_side | said.with_side
        )
        return _pack(_FATE_LAYOUT, _meet(effect, fate)._asdict()), sentence, claims

    batch_size = effects[0].shape[1]
    zero, rows = jnp.zeros(batch_size, jnp.int32), jnp.zeros((3, batch_size), jnp.int32)
    # The start of the text ends a clause and a sentence.
    start = ([zero] * len(_FATE_LAYOUT), _Said(rows, rows, rows), Claims(rows, rows, zero, zero))
    _, sentence, claims = jax.lax.fori_loop(0, most, read_next, start)
    return claims if truth is None else _judge(claims, sentence, zero == 0, truth)


def _judge(claims: Claims, sentence: _Said, ended: jax.Array, truth: Truth) -> Claims:
    """Hold a sentence against the truth where it has ended."""
    is_claim = functools.reduce(operator.or_, sentence.labels) != 0
    is_wrong = _is_wrong(sentence.labels, sentence.without_side, sentence.with_side, truth)
    return claims._replace(
        claims=claims.claims + (ended & is_claim), wrong=claims.wrong + (ended & is_wrong)
    )
