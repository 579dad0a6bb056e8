"""The jitted parser of completions: from UTF-8 bytes or token ids to the answer, the format and the tags.

It runs on the device, inside jit, and equals Python's `str` semantics on the decoded text (errors="replace") for every
string; the patterns of the reference reward stand below, for strings on the host.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels import answer_machines, automaton
from cxr_jax.labels.answer_machines import ANSWER, TAGS
from cxr_jax.labels.automaton import Array
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, PATHOLOGY, find_label
from cxr_jax.labels.text_batches import map_texts

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

# What a text says, by name: see `parse_bytes`. Arrays, and under "trace" a table of them.
Parsed = dict[str, Any]

_LABEL_COUNT = len(CHEXPERT_14)
# Events of the answer machine: label i is i + 1, then these; _CLOSE is added where the element ends.
_UNKNOWN, _CLOSE = _LABEL_COUNT + 1, _LABEL_COUNT + 2


@functools.cache
def _machines() -> automaton.JoinedMachines:
    return automaton.join_machines(
        [answer_machines.tag_machine(), answer_machines.answer_machine(CHEXPERT_14)]
    )


def parse_bytes(stream: Array, lengths: Array) -> Parsed:
    """Parse completions in bytes.

    Args:
        stream: uint8 [B, L], UTF-8, valid or not.
        lengths: int [B]: the first bytes of each row, which count.

    Returns:
        answer bool [B, 14]: labels in the first <answer> element; all False without one.
        has_answer bool [B]; format bool [B]: the whole text is <think>..</think>, space, <answer>..</answer>.
        tag_counts int32 [B, 4]: occurrences of <think>, </think>, <answer>, </answer>.
        n_unknown int32 [B]: items of the answer that are no label (empty items are not counted).
        no_finding_conflict bool [B]: No Finding together with a finding (Support Devices is none).
        trace_length int32 [B]: bytes before the first <answer> tag; all of them without one.
        overflow bool [B]: lengths > L, so the end of the text was not seen.
    """
    width = stream.shape[1]
    inside = jnp.minimum(lengths, width)
    (tags, items), (has_format, is_closed) = automaton.run(_machines(), stream, inside)
    has_answer = is_closed == 1

    # Tags: how often each occurs, and where the trace ends.
    tag_counts = [
        jnp.sum(tags == number, axis=0, dtype=jnp.int32) for number in range(1, len(TAGS) + 1)
    ]
    opens_answer = tags == TAGS.index(ANSWER) + 1
    before_answer = jnp.argmax(opens_answer, axis=0) + 1 - len(ANSWER)
    trace_length = jnp.where(opens_answer.any(axis=0), before_answer, inside)

    # Items: a bit a label, and a count of what is no label. Without a closed element they count for nothing.
    items = jnp.where(items > _CLOSE, items - _CLOSE, items)
    is_label = (items >= 1) & (items <= _LABEL_COUNT)
    label_bits = jnp.where(is_label, 1 << jnp.clip(items - 1, 0, _LABEL_COUNT), 0)
    # A label may be named more than once: an or, not a sum.
    named = jax.lax.reduce(label_bits, jnp.int32(0), jax.lax.bitwise_or, (0,))
    answer = ((named[:, None] >> jnp.arange(_LABEL_COUNT)) & 1 == 1) & has_answer[:, None]
    unknown_count = jnp.sum(items == _UNKNOWN, axis=0, dtype=jnp.int32)
    has_finding = jnp.any(answer & np.array(PATHOLOGY), axis=-1)
    return {
        "answer": answer,
        "has_answer": has_answer,
        "format": has_format == 1,
        "tag_counts": jnp.stack(tag_counts, axis=-1),
        "n_unknown": jnp.where(has_answer, unknown_count, 0),
        "no_finding_conflict": answer[:, INDEX["No Finding"]] & has_finding,
        "trace_length": trace_length.astype(jnp.int32),
        "overflow": lengths > width,
    }


class TokenBytes(NamedTuple):
    """The bytes that each token id decodes to. A pytree.

    Id t stands for data[offset[t] : offset[t] + length[t]]; data uint8 [total], offset and length int32 [V].
    """

    data: Array
    offset: Array
    length: Array

    @classmethod
    def from_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase | tokenizers.Tokenizer"
    ) -> "TokenBytes":
        """Make the table of a BPE tokenizer, byte-level or of sentence pieces, as decode(ids, skip_special_tokens=True)
        reads it.

        Args:
            tokenizer: a fast Hugging Face tokenizer, or one of `tokenizers`. Its special tokens stand for nothing,
                other added tokens for their text.

        Raises:
            UserError: for a tokenizer whose decoder is neither, or that cannot write the four tags.
        """
        backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        bytes_of_token = _reading_of(getattr(backend, "decoder", None))
        added = backend.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        vocab = backend.get_vocab(with_added_tokens=True)
        # Ids that no token has stand for nothing.
        pieces = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            if token_id not in special:
                pieces[token_id] = bytes_of_token(token)
        # A tag that is a special token, or out of the alphabet, would never be read.
        for tag in TAGS:
            token_ids = backend.encode(tag.decode(), add_special_tokens=False).ids
            if b"".join(pieces[token_id] for token_id in token_ids) != tag:
                raise UserError(
                    f"the tokenizer cannot write {tag.decode()} as plain text: rewards need it"
                )
        return cls.from_pieces(pieces)

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes]) -> "TokenBytes":
        """Make the table of a plain list of byte strings."""
        length = np.array([len(piece) for piece in pieces], np.int32)
        offset = np.cumsum(length, dtype=np.int32) - length
        # One byte more than there are, so that an empty table can be read, too.
        return cls(np.frombuffer(b"".join(pieces) + b"\0", np.uint8), offset, length)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the rest for 256, 257, ..."""
    # The printable characters of Latin-1 but the soft hyphen.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(moved)}


def _reading_of(decoder: Any) -> Callable[[str], bytes]:
    """The function from a token to its bytes that a decoder of `tokenizers` applies. Raises UserError if none is."""
    parts = {} if decoder is None else json.loads(decoder.__getstate__())
    if parts.get("type") == "ByteLevel":
        return _bytes_of_byte_level
    if parts == _SENTENCE_PIECES:
        return _bytes_of_piece
    raise UserError(
        "the tokenizer's decoder is neither byte-level nor one of sentence pieces with bytes: rewards cannot be read "
        "from its ids"
    )


# Of SentencePiece models as Gemma's: a mark stands for a space, and what is no piece is spelled in bytes.
_SPACE_MARK = "\u2581"
_SENTENCE_PIECES = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _bytes_of_piece(token: str) -> bytes:
    if byte := _BYTE_PIECE.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace(_SPACE_MARK, " ").encode()


def _bytes_of_byte_level(token: str) -> bytes:
    """A token with any character outside the alphabet stands for its own UTF-8 bytes, as in the decoder."""
    table = _byte_of_char()
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode()


def tokens_to_bytes(
    tokens: Array, lengths: Array, table: TokenBytes, max_bytes: int, opened: Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Spell out tokens on the device, behind what the prompt has opened the text with.

    Args:
        tokens: int [B, N]. Ids outside the table stand for nothing, as in decode.
        lengths: int [B]: the first tokens of each row, which count.
        table: the bytes of each id.
        max_bytes: static; what a text has beyond is cut off.
        opened: int [B, K], the tokens in front, -1 for none; they are data, so one program serves all prompts.

    Returns:
        uint8 [B, max_bytes], and byte counts int32 [B], which may exceed max_bytes.
    """
    data, offset, length = (jnp.asarray(array) for array in table)
    # What was opened lies at the end of its columns, so the two are one run of tokens.
    if opened is not None:
        tokens, lengths = jnp.concatenate([opened, tokens], axis=1), lengths + opened.shape[1]
    batch_size, width = tokens.shape
    # Ids outside the table, and tokens past the end of their row, spell nothing.
    is_known = (tokens >= 0) & (tokens < length.shape[0])
    is_known &= jnp.arange(width) < lengths[:, None]
    token_ids = jnp.where(is_known, tokens, 0)
    sizes = jnp.where(is_known, length[token_ids], 0)
    ends = jnp.cumsum(sizes, axis=1)
    # Which token a place belongs to: how many tokens have ended there. Counted from marks at the ends, not searched.
    marks = jnp.zeros((batch_size, max_bytes), jnp.int32)
    marks = marks.at[jnp.arange(batch_size)[:, None], ends].add(1, mode="drop")
    owner = jnp.minimum(jnp.cumsum(marks, axis=1), width - 1)
    shift = offset[token_ids] - (ends - sizes)  # from a place in the text to a place in `data`
    source = jnp.take_along_axis(shift, owner, axis=1) + jnp.arange(max_bytes)
    # Places past the end of a text hold some byte; the count says that they do not matter.
    return data[jnp.clip(source, 0, data.shape[0] - 1)], ends[:, -1]


def parse_tokens(
    tokens: Array, lengths: Array, table: TokenBytes, max_bytes: int, opened: Array | None = None
) -> Parsed:
    """Parse the decoded tokens with `parse_bytes`; arguments as in `tokens_to_bytes`.

    A text that is longer than max_bytes is read up to there and marked in "overflow".
    """
    return parse_bytes(*tokens_to_bytes(tokens, lengths, table, max_bytes, opened))


_parse_bytes_jitted = jax.jit(parse_bytes)


def parse_texts(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Parse Python strings with `parse_bytes`: numpy arrays with one row a text, in order."""
    return map_texts(_parse_bytes_jitted, texts)


def parse_answers(texts: Sequence[str]) -> np.ndarray:
    """Parse the answers of texts.

    Returns:
        bool [N, 14]: the labels in each text's first <answer> element; all False where there is none.
    """
    return parse_texts(texts)["answer"]


# ---- On the host -----------------------------------------------------------------------------------------------------

# The format that the reference reward asks for. Groups: what stands in <think>, what stands in <answer>.
FORMAT_PATTERN = re.compile(r"^<think>(.*?)</think>\s*<answer>(.*?)</answer>$", re.DOTALL)
# The answer, wherever it stands; the first one counts. Group: what stands in <answer>.
ANSWER_PATTERN = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def extract_trace(text: str) -> str:
    """Return what stands before the first <answer>: the trace that rewards read."""
    return text.split("<answer>", 1)[0]


# ---- One completion on the host: its parts, and what is wrong with them ---------------------------------------------


class AnswerItems(NamedTuple):
    """What stands in an answer list: labels of the 14, in the order written and each once, and other names."""

    labels: list[str]
    others: list[str]


def split_answer(text: str) -> AnswerItems | None:
    """Split the first <answer> of a completion; None without one.

    The semantics of the accuracy reward: split at commas, strip, compare in lower case.
    """
    answer = ANSWER_PATTERN.search(text)
    if not answer:
        return None
    items = [item.strip() for item in answer.group(1).split(",")]
    labels = [label for label in map(find_label, items) if label is not None]
    # Empty items, such as after a last comma, are no names.
    others = [item for item in items if item and find_label(item) is None]
    # Each once, in the order in which the model wrote them.
    return AnswerItems(list(dict.fromkeys(labels)), others)


def reasoning_of(text: str) -> str:
    """Return the text of the first <think> element, as far as it goes; without the tag, what precedes <answer>."""
    before, tag, after = text.partition("<think>")
    # Without an opening tag the model has begun to think at once, which is reasoning all the same.
    body = after if tag else before
    # It ends with its tag, or where the answer begins without one.
    return re.split(r"</think>|<answer>", body, maxsplit=1)[0].strip()


def answer_warnings(text: str, finish_reason: str) -> list[str]:
    """Say what is wrong with a completion, in plain words.

    Args:
        text: of the completion.
        finish_reason: "stop" or "length".
    """
    notes = []
    # First, since it explains what may be missing further on.
    if finish_reason == "length":
        notes.append("the answer was cut at the length limit")
    answer = split_answer(text)
    if answer is None:
        return [*notes, "the model gave no answer list"]
    if answer.others:
        notes.append(
            f"{len(answer.others)} names in the answer are none of the 14 labels and were dropped"
        )
    # Devices are no disease: they may stand beside No Finding, as in the label set.
    if "No Finding" in answer.labels and set(answer.labels) - {"No Finding", "Support Devices"}:
        notes.append("the answer contradicts itself: No Finding beside a finding")
    return notes
