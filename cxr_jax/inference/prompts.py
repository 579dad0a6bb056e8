"""Prompts as token ids: one renderer for serving and training, and prompts in fixed shapes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cxr_jax.data import prompts as data_prompts
from cxr_jax.errors import UserError
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.models.qwen2_5_vl.config import Config
from cxr_jax.models.tokenizer import IMAGE_PAD, Tokenizer

ROLES = ("system", "user", "assistant")


def messages_of(prompt: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn a prompt into messages.

    Args:
        prompt: a text, or a conversation [{"role", "content"}, ...] that ends with a user's turn.

    Raises:
        UserError: if it is neither.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    # Before anything is read from it: a request of a server may hold any JSON.
    if not isinstance(prompt, (list, tuple)) or not all(map(_is_message, prompt)):
        raise UserError(
            'a prompt must be a text, or messages {"role": system|user|assistant, "content": text}'
        )
    # The model's turn comes next, so the last word must be the user's.
    if not prompt or prompt[-1]["role"] != "user":
        raise UserError("a conversation must end with a user's message")
    # Only these two keys: a template may give others a meaning.
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
    )


def conversation_ids(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], image_tokens: int
) -> list[int]:
    """Render messages up to the assistant's next turn: the one renderer of training and serving.

    Args:
        messages: {"role", "content": text}, at least one of them a user's.
        image_tokens: of the image, which stands before the first user's text; 0 without an image.

    Returns:
        Token ids. The template writes one image pad; it is repeated here, as the Qwen processor does.
    """
    first_user = next(index for index, message in enumerate(messages) if message["role"] == "user")
    # In parts, the form in which a template knows where an image stands.
    question = {"type": "text", "text": messages[first_user]["content"]}
    rendered = list(messages)
    rendered[first_user] = {
        "role": "user",
        "content": [{"type": "image"}, question] if image_tokens else [question],
    }
    # One pad for each image token; the tokenizer turns each into one id.
    text: Any = tokenizer.apply_chat_template(rendered, add_generation_prompt=True, tokenize=False)
    text = text.replace(IMAGE_PAD, IMAGE_PAD * image_tokens)
    # The template has written the special tokens already.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(tokenizer: Tokenizer, text: str, image_tokens: int) -> list[int]:
    """Render one question about one image (if image_tokens > 0), as training does: `text` is ours, and not checked."""
    return conversation_ids(tokenizer, messages_of(text), image_tokens)


def render_prompt(
    tokenizer: Tokenizer,
    model_config: Config,
    prompt: str | Sequence[dict[str, Any]],
    grid: tuple[int, int, int] | None,
) -> list[int]:
    """Render a user's prompt, a text or a conversation, as serving does.

    Args:
        prompt: see `messages_of`.
        grid: (t, h, w) of the image in patches, or None without an image.

    Raises:
        UserError: for a malformed conversation, or a prompt that holds image or video placeholders of its own.
    """
    image_tokens = 0
    if grid is not None:
        # What the merger makes of the patches.
        image_tokens = int(np.prod(grid)) // model_config.vision.merge_unit
    ids = conversation_ids(tokenizer, messages_of(prompt), image_tokens)
    # A text that spells a placeholder would shift the image's own tokens.
    if ids.count(model_config.image_token_id) != image_tokens or model_config.video_token_id in ids:
        raise UserError("a prompt must not hold image or video placeholders of its own")
    return ids


class Prompts:
    """Encodes prompt texts (one image each) to right-padded ids of one static width.

    Attributes:
        width: tokens of every row: the given one, or those of the longest of `texts`.
        pad: the id of padding, end of text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_config: Config,
        grid: tuple[int, int, int],
        max_completion: int,
        width: int | None = None,
        texts: Sequence[str] = (data_prompts.FIND_PROMPT,),
    ) -> None:
        """Fix the shapes.

        Args:
            grid: (t, h, w) in patches of every image.
            max_completion: tokens C that may follow a prompt directly; positions are computed for them, too.
        """
        self.tokenizer = tokenizer
        self.config = model_config
        self.grid = grid
        self.max_completion = max_completion
        self.image_tokens = int(np.prod(grid)) // model_config.vision.merge_unit
        self.pad = tokenizer.get_vocab()["<|endoftext|>"]
        # Few prompts are used again and again: text -> (its ids, positions int32 [3, T + C]).
        self._known: dict[str, tuple[list[int], np.ndarray]] = {}
        # Wide enough for each of the texts: so all of them share one program.
        self.width = width or max(len(self._ids_and_positions(text)[0]) for text in texts)

    def _ids_and_positions(self, text: str) -> tuple[list[int], np.ndarray]:
        if text not in self._known:
            ids = prompt_ids(self.tokenizer, text, self.image_tokens)
            # The completion's positions follow the prompt's, whatever its tokens will be.
            row = np.asarray([*ids, *[self.pad] * self.max_completion], np.int32)[None]
            self._known[text] = ids, qwen.positions(self.config, row, [self.grid])[:, 0]
        return self._known[text]

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encode B texts.

        Returns:
            ids int32 [B, T], lengths int32 [B], positions int32 [3, B, T + C]: M-RoPE positions of the prompt and
            of any C completion tokens that follow it directly, computed once and used by prefill, decode and
            training alike.

        Raises:
            UserError: for a prompt longer than `width`.
        """
        count, width = len(texts), self.width
        # Padded on the right with text that nobody attends to.
        ids = np.full((count, width), self.pad, np.int32)
        # Any position does for padding, as nobody attends to it.
        positions = np.ones((3, count, width + self.max_completion), np.int32)
        lengths = np.zeros(count, np.int32)
        for index, text in enumerate(texts):
            prompt, places = self._ids_and_positions(text)
            # A text that was not among `texts`, or a width that was given, may not fit.
            if len(prompt) > width:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens does not fit config.prompt_width={width}"
                )
            ids[index, : len(prompt)] = prompt
            lengths[index] = len(prompt)
            positions[:, index, : places.shape[1]] = places
        return {"ids": ids, "lengths": lengths, "positions": positions}
