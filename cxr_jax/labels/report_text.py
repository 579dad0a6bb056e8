"""The jitted parser of free text: 14 findings x {affirmed, denied, hedged, not mentioned}, with sides.

docs/report_parser.md is the meaning, exactly; `labels/lexicon.toml` the words. Three passes, tables and bit masks
vectorised over the batch: what each byte is (from its neighbours, `labels/byte_codes.py`); over the bytes, words and
phrases (`labels/phrase_search.py`); over the phrases, what they say (`labels/phrase_reading.py`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.labels.automaton import Array
from cxr_jax.labels.byte_codes import code_bytes
from cxr_jax.labels.phrase_bank import AFFIRMED, DENIED, HEDGED, PhraseBank, device_phrase_bank
from cxr_jax.labels.phrase_reading import (
    LABEL_COUNT,
    Claims,
    Truth,
    read_phrases,
    split_pair,
    to_bits,
)
from cxr_jax.labels.phrase_search import Evidence, find_phrases
from cxr_jax.labels.taxonomy import (
    INDEX,
    NEGATIVE,
    NOT_MENTIONED,
    PARENTS,
    PATHOLOGY,
    POSITIVE,
    UNCERTAIN,
)
from cxr_jax.labels.text_batches import map_texts

_NO_FINDING = 1 << INDEX["No Finding"]
# Those of the 14 labels that are a finding, and the abnormalities that are none of them.
_FINDINGS = sum(1 << index for index, is_finding in enumerate([*PATHOLOGY, True]) if is_finding)


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
    claims = read_phrases(bank, ends, truth)
    # In another language only what known words deny is kept.
    is_foreign = evidence.foreign > jnp.maximum(evidence.english, 3)
    outputs = _report_outputs(claims, evidence, is_foreign)
    if truth is None:
        return outputs
    return outputs | {
        "claims": jnp.where(is_foreign, 0, claims.claims),
        "wrong": jnp.where(is_foreign, 0, claims.wrong),
    }


def _report_outputs(
    claims: Claims, evidence: Evidence, is_foreign: jax.Array
) -> dict[str, jax.Array]:
    """Section 6: what the report says of each label."""
    kept = jnp.where(is_foreign, 0, -1)
    affirmed, hedged = claims.report[AFFIRMED] & kept, claims.report[HEDGED] & kept
    # Of several mentions of a label the strongest wins, with its sides.
    hedged &= ~affirmed
    denied = claims.report[DENIED] & ~(affirmed | hedged)
    right, left = (
        (sided[AFFIRMED] & affirmed) | (sided[HEDGED] & hedged) | (sided[DENIED] & denied)
        for sided in split_pair(claims.with_side)
    )

    # No Finding has a rule of its own: the report says something, nothing that is a finding, and nothing unread.
    says_something = affirmed | hedged | denied != 0
    is_sick = (affirmed | hedged) & _FINDINGS != 0
    is_normal = says_something & ~is_sick & (evidence.unread == 0) & ~is_foreign
    affirmed = (affirmed & ~_NO_FINDING) | jnp.where(is_normal, _NO_FINDING, 0)
    hedged, denied = hedged & ~_NO_FINDING, denied & ~_NO_FINDING

    # From masks to states, at last: int8 of all labels, side by side.
    state = jnp.full((len(affirmed), LABEL_COUNT + 1), NOT_MENTIONED, jnp.int8)
    for mask, strength in ((affirmed, POSITIVE), (hedged, UNCERTAIN), (denied, NEGATIVE)):
        state += to_bits(mask, LABEL_COUNT + 1).astype(jnp.int8) * (strength - NOT_MENTIONED)
    return {
        "state": state[:, :LABEL_COUNT],
        "right": to_bits(right),
        "left": to_bits(left),
        "other": state[:, LABEL_COUNT],
        "foreign": is_foreign,
        "unread": evidence.unread,
    }


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
    bank = device_phrase_bank(lexicon)
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
