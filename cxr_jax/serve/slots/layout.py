"""How many completions decode side by side, and how long each may be: sizes that are fixed before the first request.

Every size is a program of its own, compiled before the server is ready. So there are few: rooms for usual requests, of
as many rows as `Model.generate` decodes together, so that not a bit of a completion differs from it, and one room for
long prompts and long answers, to which a completion moves that outgrows its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cxr_jax.errors import UserError
from cxr_jax.inference.generation import bucket
from cxr_jax.inference.requests import ReadyModel
from cxr_jax.models.network.config import Config

# Most bytes that the keys of all rows may take, where nobody says how many rows there are.
_KEYS_AT_MOST = 2**31
# Completions at once, where nobody says how many and there is room for them.
_SLOTS = 64
# Tokens of the words around one image: the frame of the chat template, and a question of a line or two.
_WORDS = 96
# Tokens of a usual answer: phantom traces have 80 to 160, those of the 3B up to 500.
_USUAL_ANSWER, _USUAL_ANSWER_LARGE = 192, 512


TOKENS_A_TURN = 8
"""Tokens between two boundaries, at which rows come and go: as often as a stream shows what is new."""


class Size(NamedTuple):
    """How large a room is."""

    rows: int
    prompt_slots: int  # S, of the longest prompt
    own_slots: int  # N, of the tokens drawn


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of an engine.

    Attributes:
        usual: of a room of usual requests.
        rooms: how many of these there are; those that are empty cost nothing.
        long: of the room for what does not fit there.
        prompt_buckets: lengths at which a prompt's beginning, images included, is computed in one piece.
        chunk: tokens of each further piece.
    """

    usual: Size
    rooms: int
    long: Size
    prompt_buckets: tuple[int, ...]
    chunk: int = 64

    @property
    def slots(self) -> int:
        """Most completions at once."""
        return self.rooms * self.usual.rows + self.long.rows

    def bucket_of(self, length: int) -> int:
        """Find the length at which the first `length` tokens of a prompt are computed; at most the largest."""
        # Few lengths, so the least that fits may be longer than what `Model.generate` takes; no matter.
        fitting = [bucket_size for bucket_size in self.prompt_buckets if bucket_size >= length]
        return min(fitting, default=self.prompt_buckets[-1])


def bytes_a_token(model_config: Config, itemsize: int) -> int:
    """Count the bytes of the keys and values of one token."""
    text = model_config.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize


def layout_of(
    model: ReadyModel,
    image_tokens: int,
    *,
    slots: int | None = None,
    prompt_buckets: Sequence[int] | None = None,
    new_token_buckets: Sequence[int] | None = None,
) -> Layout:
    """Choose the sizes for a model.

    Args:
        image_tokens: of one image.
        slots: usual completions at once, rounded up to whole rooms; None: as many as fit 2 GiB, at most 64.
        prompt_buckets: (usual, longest) tokens of a prompt; None: by the model.
        new_token_buckets: (usual, longest) tokens of an answer; None: by the model.

    Raises:
        UserError: for sizes that mean nothing.
    """
    # What a model asks for follows from what one of its tokens takes.
    token_bytes = bytes_a_token(model.config, model.dtype.itemsize)
    is_small = token_bytes < 2**13
    usual_answer = _USUAL_ANSWER if is_small else _USUAL_ANSWER_LARGE
    one_film = bucket(image_tokens + _WORDS)
    usual_prompt, longest_prompt = _pair(
        "prompt_buckets", prompt_buckets, (one_film, max(1024, 2 * one_film))
    )
    usual_new, longest_new = _pair("new_token_buckets", new_token_buckets, (usual_answer, 512))
    # A row keeps all its slots, whether they are filled or not.
    row_bytes = token_bytes * (usual_prompt + usual_new)
    if slots is None:
        slots = max(1, min(_SLOTS, _KEYS_AT_MOST // row_bytes))
    if slots < 1:
        raise UserError(f"slots={slots}: at least one completion has to fit")

    # ---- A beginning is computed with one image, a usual one, or one of several images ----
    one_image = bucket(image_tokens + _WORDS // 3)
    beginnings = {one_image, usual_prompt, bucket(longest_prompt // 2)}
    # As many rows as in `Model.generate`: with 24 or 64 a turn costs half as much a row, and rounds otherwise, which
    # made another token of one in 7,000.
    return Layout(
        usual=Size(model.rows, usual_prompt, usual_new),
        rooms=math.ceil(slots / model.rows),
        long=Size(model.rows, longest_prompt, longest_new),
        prompt_buckets=tuple(sorted(size for size in beginnings if size <= longest_prompt)),
    )


def _pair(name: str, given: Sequence[int] | None, default: tuple[int, int]) -> tuple[int, int]:
    """(usual, longest), both multiples of the tokens of a turn."""
    # In whatever order they were given.
    sizes = sorted(given or default)
    if len(sizes) not in (1, 2) or sizes[0] < 1:
        raise UserError(f"{name}={list(sizes)}: give a usual size and the largest, both above 0")
    usual, longest = (
        TOKENS_A_TURN * math.ceil(size / TOKENS_A_TURN) for size in (sizes[0], sizes[-1])
    )
    return usual, max(usual, longest)
