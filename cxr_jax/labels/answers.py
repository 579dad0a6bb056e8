"""The jitted parser of completions: from UTF-8 bytes or token ids to the answer, the format and the tags.

Everything here runs on the device, inside jit, and equals Python's `str` semantics on the decoded text
(errors="replace") for every string.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels import answer_machines, automaton
from cxr_jax.labels.answer_machines import ANSWER, TAGS
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, PATHOLOGY
from cxr_jax.labels.text_batches import map_texts

Parsed = dict[str, jax.Array]

_N = len(CHEXPERT_14)
_UNKNOWN, _CLOSE = _N + 1, _N + 2


@functools.cache
def _bank() -> automaton.Bank:
    return automaton.join(
        [answer_machines.tag_machine(), answer_machines.answer_machine(CHEXPERT_14)]
    )


def parse_bytes(stream: jax.Array, lengths: jax.Array) -> Parsed:
    """Parse stream uint8 [B, L] (UTF-8, valid or not), of which the first lengths int [B] bytes count.

    Returns
      answer bool [B, 14]: labels in the first <answer> element; all False without one.
      has_answer bool [B]; format bool [B]: the whole text is <think>..</think>, space, <answer>..</answer>.
      tag_counts int32 [B, 4]: occurrences of <think>, </think>, <answer>, </answer>.
      n_unknown int32 [B]: items of the answer that are no label (empty items are not counted).
      no_finding_conflict bool [B]: No Finding together with a finding (Support Devices is none).
      trace_length int32 [B]: bytes before the first <answer> tag; all of them without one.
      overflow bool [B]: lengths > L, so the end of the text was not seen.
    """
    width = stream.shape[1]
    events, final = automaton.run(_bank(), stream, jnp.minimum(lengths, width))
    tags, items = events
    counts = jnp.stack([jnp.sum(tags == i + 1, axis=0, dtype=jnp.int32) for i in range(4)], axis=-1)
    has_answer = final[1] == 1
    opens = tags == TAGS.index(ANSWER) + 1
    before_answer = jnp.argmax(opens, axis=0) + 1 - len(ANSWER)
    trace_length = jnp.where(opens.any(axis=0), before_answer, jnp.minimum(lengths, width))
    items = jnp.where(items > _CLOSE, items - _CLOSE, items)
    bits = jnp.where((items >= 1) & (items <= _N), 1 << jnp.clip(items - 1, 0, _N), 0)
    found = jax.lax.reduce(bits, jnp.int32(0), jax.lax.bitwise_or, (0,))
    answer = ((found[:, None] >> jnp.arange(_N)) & 1 == 1) & has_answer[:, None]
    return {
        "answer": answer,
        "has_answer": has_answer,
        "format": final[0] == 1,
        "tag_counts": counts,
        "n_unknown": jnp.where(has_answer, jnp.sum(items == _UNKNOWN, axis=0, dtype=jnp.int32), 0),
        "no_finding_conflict": answer[:, INDEX["No Finding"]]
        & jnp.any(answer & np.array(PATHOLOGY), axis=-1),
        "trace_length": trace_length.astype(jnp.int32),
        "overflow": lengths > width,
    }


class TokenBytes(NamedTuple):
    """The bytes each token id decodes to: id t stands for data[offset[t] : offset[t] + length[t]]. A pytree.

    data uint8 [total], offset and length int32 [V].
    """

    data: np.ndarray | jax.Array
    offset: np.ndarray | jax.Array
    length: np.ndarray | jax.Array

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "TokenBytes":
        """The table of a byte-level BPE tokenizer, as decode(ids, skip_special_tokens=True) reads it.

        Takes a `tokenizers.Tokenizer` or a fast Hugging Face tokenizer. Special tokens stand for nothing,
        other added tokens for their text. Raises UserError for a tokenizer whose decoder is not byte-level, or that
        cannot write the four tags.
        """
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if type(getattr(backend, "decoder", None)).__name__ != "ByteLevel":
            raise UserError(
                "the tokenizer's decoder is not byte-level: rewards cannot be read from its ids"
            )
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        vocab = backend.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, i in vocab.items():
            if i not in special:
                pieces[i] = _token_bytes(token)
        for tag in TAGS:  # one that is a special token, or out of the alphabet, would never be read
            ids = backend.encode(tag.decode(), add_special_tokens=False).ids
            if b"".join(pieces[i] for i in ids) != tag:
                raise UserError(
                    f"the tokenizer cannot write {tag.decode()} as plain text: rewards need it"
                )
        return cls.from_pieces(pieces)

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes]) -> "TokenBytes":
        """The table of a plain list of byte strings."""
        length = np.array([len(p) for p in pieces], np.int32)
        offset = np.cumsum(length, dtype=np.int32) - length
        return cls(np.frombuffer(b"".join(pieces) + b"\0", np.uint8), offset, length)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the rest for 256, 257, ..."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(moved)}


def _token_bytes(token: str) -> bytes:
    """A token with any character outside the alphabet stands for its own UTF-8 bytes, as in the decoder."""
    table = _byte_of_char()
    if all(c in table for c in token):
        return bytes(table[c] for c in token)
    return token.encode()


def tokens_to_bytes(
    tokens, lengths, table: TokenBytes, max_bytes: int
) -> tuple[jax.Array, jax.Array]:
    """Spell out tokens int [B, N], of which the first lengths [B] count: uint8 [B, max_bytes], byte counts
    [B].

    The count may exceed max_bytes: the rest is cut off. Ids outside the table stand for nothing, as in
    decode.
    """
    data, offset, length = (jnp.asarray(x) for x in table)
    known = (
        (tokens >= 0)
        & (tokens < length.shape[0])
        & (jnp.arange(tokens.shape[1]) < lengths[:, None])
    )
    ids = jnp.where(known, tokens, 0)
    sizes = jnp.where(known, length[ids], 0)
    ends = jnp.cumsum(sizes, axis=1)
    # Which token a place belongs to: how many tokens have ended there. Counted from marks at the ends, not searched.
    marks = jnp.zeros((tokens.shape[0], max_bytes), jnp.int32)
    marks = marks.at[jnp.arange(tokens.shape[0])[:, None], ends].add(1, mode="drop")
    owner = jnp.minimum(jnp.cumsum(marks, axis=1), tokens.shape[1] - 1)
    shift = offset[ids] - (ends - sizes)  # from a place in the text to a place in `data`
    source = jnp.take_along_axis(shift, owner, axis=1) + jnp.arange(max_bytes)
    return data[jnp.clip(source, 0, data.shape[0] - 1)], ends[:, -1]


def parse_tokens(tokens, lengths, table: TokenBytes, max_bytes: int) -> Parsed:
    """`parse_bytes` of the decoded tokens int [B, N], of which the first lengths [B] count.

    max_bytes is static. A text that is longer is read up to there and marked in "overflow".
    """
    return parse_bytes(*tokens_to_bytes(tokens, lengths, table, max_bytes))


_parse = jax.jit(parse_bytes)


def parse_texts(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """`parse_bytes` of Python strings, as numpy arrays with one row a text, in order."""
    return map_texts(_parse, texts)


def parse_answers(texts: Sequence[str]) -> np.ndarray:
    """bool [N, 14]: the labels in each text's first <answer> element; all False where there is none."""
    return parse_texts(texts)["answer"]
