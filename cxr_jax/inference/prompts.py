"""Prompts as token ids: one renderer for serving and training, and prompts in fixed shapes."""

import numpy as np

from cxr_jax.data import prompts as data_prompts
from cxr_jax.errors import UserError
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.models.tokenizer import IMAGE_PAD

ROLES = ("system", "user", "assistant")


def messages_of(prompt) -> list[dict]:
    """A prompt text, or a conversation [{"role", "content"}, ...] that ends with a user's turn, as messages."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    known = isinstance(prompt, (list, tuple)) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
        for m in prompt
    )
    if not known:
        raise UserError(
            'a prompt must be a text, or messages {"role": system|user|assistant, "content": text}'
        )
    if not prompt or prompt[-1]["role"] != "user":
        raise UserError("a conversation must end with a user's message")
    return [{"role": m["role"], "content": m["content"]} for m in prompt]


def render_prompt(tokenizer, model_config, prompt, grid) -> list[int]:
    """Token ids up to the assistant's next turn; the image (if any) stands before the first user's text."""
    from cxr_jax.models.tokenizer import IMAGE_PAD

    messages, n = (
        messages_of(prompt),
        0 if grid is None else int(np.prod(grid)) // model_config.vision.merge_unit,
    )
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    image = [{"type": "image"}] if n else []
    messages[first]["content"] = [*image, {"type": "text", "text": messages[first]["content"]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text.replace(IMAGE_PAD, IMAGE_PAD * n), add_special_tokens=False)["input_ids"]
    if ids.count(model_config.image_token_id) != n or model_config.video_token_id in ids:
        raise UserError("a prompt must not hold image or video placeholders of its own")
    return list(ids)


def prompt_ids(tokenizer, text: str, n_image_tokens: int, *, history: tuple = ()) -> list[int]:
    """Ids of one chat prompt: the image (if n_image_tokens > 0), then `text`, up to the assistant's turn.

    The template writes one image pad; it is repeated here, as the Qwen processor does.
    """
    content = ([{"type": "image"}] if n_image_tokens else []) + [{"type": "text", "text": text}]
    messages = [*history, {"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    rendered = rendered.replace(IMAGE_PAD, IMAGE_PAD * n_image_tokens)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


class Prompts:
    """Encodes prompt texts (one image each) to right-padded ids of one static width.

    `encode(texts)` -> dict(ids int32 [B, T], lengths int32 [B], positions int32 [3, B, T + C]): M-RoPE positions of
    the prompt and of any C completion tokens that follow it directly, computed once and used by prefill, decode and
    training alike. Raises UserError for a prompt longer than `width`.
    """

    def __init__(
        self,
        tokenizer,
        model_config,
        grid: tuple,
        max_completion: int,
        width: int | None = None,
        texts=(data_prompts.FIND_PROMPT,),
    ):
        self.tokenizer, self.config, self.grid, self.max_completion = (
            tokenizer,
            model_config,
            grid,
            max_completion,
        )
        self.n_image = int(np.prod(grid)) // model_config.vision.spatial_merge_size**2
        self.pad = tokenizer.get_vocab()["<|endoftext|>"]
        self._cache = {}
        self.width = width or max(len(self._one(t)[0]) for t in texts)

    def _one(self, text):
        if text not in self._cache:
            ids = prompt_ids(self.tokenizer, text, self.n_image)
            row = np.asarray([*ids, *[self.pad] * self.max_completion], np.int32)[None]
            self._cache[text] = ids, qwen.positions(self.config, row, [self.grid])[:, 0]
        return self._cache[text]

    def encode(self, texts: list[str]) -> dict:
        n, t = len(texts), self.width
        ids = np.full((n, t), self.pad, np.int32)
        positions = np.ones((3, n, t + self.max_completion), np.int32)
        lengths = np.zeros(n, np.int32)
        for i, text in enumerate(texts):
            row, pos = self._one(text)
            if len(row) > t:
                raise UserError(
                    f"a prompt of {len(row)} tokens does not fit config.prompt_width={t}"
                )
            ids[i, : len(row)], lengths[i] = row, len(row)
            positions[:, i, : pos.shape[1]] = pos
        return {"ids": ids, "lengths": lengths, "positions": positions}
