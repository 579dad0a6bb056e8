"""What a reader asks for and gets: checked settings, rendered prompts, completions, readings."""

import hashlib
import math
import numbers
import operator
import os
import zlib
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.errors import UserError
from cxr_jax.inference.constrained import Constraint
from cxr_jax.models import network
from cxr_jax.models.network.config import Config
from cxr_jax.models.tokenizer import Tokenizer
from cxr_jax.runtime.trees import Tree

# ---- What comes and goes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """One generated answer.

    Attributes:
        text: the model's turn: what the chat template opened it with, if anything, and what the model wrote.
        token_ids: what the model wrote, the stop token included, which the text does not show.
        logprobs: of these tokens.
        finish_reason: "stop" or "length".
        opened: what the text begins with that the model did not write.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    opened: str = ""


@dataclass(frozen=True)
class Reading:
    """One image read.

    Attributes:
        shown: the greedy completion.
        samples: those drawn beside it.
        probabilities: the mean over the samples' traces (without samples: over the greedy one) of the probability
            that the answer names each of the 14 labels, or None.
    """

    shown: Completion
    samples: list[Completion]
    probabilities: dict[str, float] | None


@dataclass(frozen=True)
class GenerationSettings:
    """How to draw, as a user says it; see `Model.generate`.

    Raises:
        UserError: for values that mean nothing.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    n: int = 1
    seed: int = 0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Check every field, and turn numbers of numpy into Python's."""
        self._set("max_new_tokens", _whole_number("max_new_tokens", self.max_new_tokens, 1))
        self._set("n", _whole_number("n", self.n, 1))
        # Random keys know no more bits.
        self._set("seed", _whole_number("seed", self.seed, 0, 2**32 - 1))
        self._set("temperature", _finite_number("temperature", self.temperature))
        # Beyond these, float32 logits over the temperature overflow, or ruled-out tokens come back.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise UserError(
                f"temperature must be 0 (greedy) or from 1e-6 to 1e6, got {self.temperature}"
            )
        if self.top_p is not None:
            self._set("top_p", _finite_number("top_p", self.top_p))
            if not 0 < self.top_p <= 1:
                raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None:
            self._set("top_k", _whole_number("top_k", self.top_k, 1))

    def _set(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)  # the way around "frozen", while it is made


def _whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    try:
        # `index` takes whole numbers of every kind, and no float, not even 1.0.
        number = operator.index(value)
    except TypeError:
        number = None
    # True is 1 to Python, and no count.
    is_bool = isinstance(value, (bool, np.bool_))
    if number is None or is_bool or number < least or (most and number > most):
        upper = f" and at most {most}" if most else ""
        raise UserError(f"{name} must be a whole number of at least {least}{upper}, got {value!r}")
    return number


def _finite_number(name: str, value: Any) -> float:
    # NaN and infinity are floats, too, and no setting.
    is_number = isinstance(value, (numbers.Real, np.number)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it: patches [P, patch_dim] and their grid (t, h, w)."""

    patches: np.ndarray
    grid: tuple[int, int, int]

    def key(self) -> Hashable:
        """Name the image by its content."""
        # By the patches, which are what the model sees: one picture may come from two files.
        return self.grid, hashlib.sha256(self.patches.tobytes()).digest()


@dataclass(frozen=True)
class Request:
    """One rendered prompt: token ids, its images in the order of their places, and what the template opened the
    model's turn with."""

    ids: list[int]
    pictures: tuple[Picture, ...] = ()
    opened: str = ""

    def mark(self) -> int:
        """Make a number of the content: equal prompts draw equal noise, wherever they stand."""
        checksum = 0
        for picture in self.pictures:
            # Over float32, whatever type the caller's array has.
            patches = np.ascontiguousarray(picture.patches, np.float32)
            checksum = zlib.crc32(patches.tobytes(), checksum)
        # Four bytes, as much as a fold into a random key takes.
        return zlib.crc32(np.asarray(self.ids, np.int32).tobytes(), checksum)

    def positions(self, model_config: Config) -> np.ndarray:
        """Compute positions int32 [axes, 1, T]."""
        # None and not empty: text alone has no images to match.
        grids = [picture.grid for picture in self.pictures] or None
        return network.positions(model_config, np.array([self.ids]), grids)


class ReadyModel(Protocol):
    """What generation, conversations and readings need of a `Model`, where each member is explained."""

    config: Config
    params: Tree
    dtype: np.dtype
    folder: Path | None
    rows: int
    number_images: bool

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model's folder."""

    @property
    def special(self) -> dict[str, tuple[int, ...]]:
        """Ids that end an answer, and ids that are never drawn."""

    @property
    def answers(self) -> Constraint:
        """The rules of valid answers."""

    def constraint(self, constraint: Any, max_new_tokens: int, opened: str = "") -> Any:
        """Turn "answers" into rules."""

    def note(self, kind: str, shape: Hashable) -> None:
        """Count a program."""

    def image_features(
        self, pixel_values: ArrayLike | None, image_grid_thw: Any
    ) -> list[network.Seen]:
        """Compute image tokens."""

    def pictures(self, images: Any) -> tuple[Picture, ...]:
        """Turn an image, several or None into what the model takes."""

    def read(
        self,
        image: Any,
        prompt: Any,
        samples: int = 8,
        max_new_tokens: int = 512,
        seed: int = 0,
        *,
        constraint: Any = None,
        probabilities: bool = True,
    ) -> Reading:
        """Read one image."""


# ---- Checks of arguments -----------------------------------------------------------------------------------


def check_room(
    model_config: Config, length: int, max_new_tokens: int, prompt_name: str = "the prompt"
) -> None:
    """Refuse a prompt of `length` tokens that, with its answer, exceeds the model's positions.

    Raises:
        UserError: which names the prompt by `prompt_name`.
    """
    # Beyond its positions a model was never trained.
    most = model_config.text.max_position_embeddings
    if length + max_new_tokens > most:
        raise UserError(
            f"{prompt_name} has {length} tokens: with max_new_tokens={max_new_tokens} that is more than the "
            f"{most} positions of the model"
        )


def check_constraint(constraint: Any) -> None:
    """Refuse what is neither None, "answers" nor rules that `sampling` takes. Raises UserError."""
    if constraint is None or hasattr(constraint, "allowed"):
        return
    if not (isinstance(constraint, str) and constraint == "answers"):
        raise UserError(f'constraint={constraint!r}: use "answers"')


def pair_up(images: Any, prompts: Any) -> tuple[list, list]:
    """Turn images and prompts (or one prompt for all) into two lists of one length >= 1.

    Raises:
        UserError: if that cannot be.
    """
    try:
        # A path or one picture is iterable, too, and surely a mistake.
        if isinstance(images, (str, bytes, os.PathLike)) or getattr(images, "ndim", 3) == 2:
            raise TypeError
        images = list(images)
    except TypeError:
        raise UserError(
            "images must be a list, one for each prompt (None where there is none)"
        ) from None
    # One question about many images is the usual case.
    if isinstance(prompts, str):
        prompts = [prompts] * len(images)
    elif isinstance(prompts, (list, tuple)):
        prompts = list(prompts)
    else:
        raise UserError("prompts must be a text or a list of texts or conversations")
    if not images or not prompts:
        raise UserError("nothing to read: images and prompts must not be empty")
    if len(prompts) != len(images):
        raise UserError(f"{len(images)} images but {len(prompts)} prompts")
    return images, prompts


def check_completions(completions: Any) -> None:
    """Refuse anything but a list of completions, at least one. Raises UserError."""
    if not isinstance(completions, (list, tuple)) or not all(
        isinstance(completion, Completion) for completion in completions
    ):
        raise UserError("finding_probabilities needs a list of completions, as generate gives them")
    if not completions:
        raise UserError("finding_probabilities needs at least one completion")


def check_ids(ids: np.ndarray, mask: np.ndarray, model_config: Config) -> None:
    """Refuse ids and a mask that are no right-padded batch [B, T] of the model's tokens. Raises UserError."""
    # Shapes first: all other checks rely on them.
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise UserError(
            f"input_ids {list(ids.shape)} and mask {list(mask.shape)} must both be [B, T]"
        )
    if not ids.size or ids.dtype.kind not in "iu":
        raise UserError(
            f"input_ids must be whole numbers, at least one, not {ids.dtype} {list(ids.shape)}"
        )
    # An id beyond the table would read another token's embedding, clipped, without a word. That of images is not read,
    # and some models have it there.
    words = ids[ids != model_config.image_token_id]
    if words.size and (words.min() < 0 or words.max() >= model_config.text.vocab_size):
        raise UserError(f"input_ids must lie in 0..{model_config.text.vocab_size - 1}")
    # Its embedding would be read as a word: nothing here makes features of frames.
    video_id = model_config.video_token_id
    if video_id is not None and (ids[mask] == video_id).any():
        raise UserError(f"input_ids hold video_token_id {video_id}: videos are not read")
    # A mask that rises again has a hole, which positions and caches do not know.
    if (np.diff(mask.astype(np.int8), axis=1) > 0).any():
        raise UserError("attention_mask must be right padding: ones, then zeros")


# ---- Texts -------------------------------------------------------------------------------------------------


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode token ids as they are, special tokens included."""
    text: Any = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


class GrowingText:
    """The text of one growing completion. A character split over tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, opened: str = "") -> None:
        """Begin with no text shown; the first piece begins with `opened`."""
        self.tokenizer = tokenizer
        self.opened = opened
        self.shown = ""

    def add(self, ids: list[int], last: bool) -> str:
        """Return the text that `ids`, all tokens so far, add to what was given before."""
        text = self.opened + text_of(self.tokenizer, ids)
        # An unfinished character decodes to replacement characters; one that the model meant comes out later.
        text = text if last else text.rstrip("\ufffd")
        # What was held back before is part of the text now.
        piece, self.shown = text[len(self.shown) :], text
        return piece
