"""Prompts as token ids: one renderer for serving and training, and prompts in fixed shapes.

A chat template may open the model's turn itself (`<think>` and a line end, or an empty `<think>` element). What it has
said there is part of what the model says: every `RenderedPrompt` tells it as `opened`, and every reader of a completion
(rewards, scores, constraint, texts for people) begins with it.
"""

import functools
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_jax.data import prompts as data_prompts
from cxr_jax.data.prompts import Conversation, Message, Prompt
from cxr_jax.errors import UserError
from cxr_jax.models import chat_template, network, plain_text
from cxr_jax.models.image_batches import Images, SquareImages
from cxr_jax.models.markers import markers_of
from cxr_jax.models.network.config import Config
from cxr_jax.models.tokenizer import FORMAT_TAGS, Tokenizer

ROLES = ("system", "user", "assistant")
Grid = tuple[int, int, int]  # of an image in patches: frames, height, width
Grids = Sequence[Sequence[Grid]]  # of the images of each of several prompts
# The word by which templates name whose turn begins, if they write one in plain text.
_SPEAKER = re.compile(r"^\s*(assistant|model|ai|bot)[ \t]*(:|\n|$)", re.IGNORECASE)


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model reads it.

    Attributes:
        ids: its token ids, up to where the model goes on.
        opened: the text at their end that belongs to the model's own turn: what the chat template says for it. Empty
            with most templates.
    """

    ids: list[int]
    opened: str


def messages_of(prompt: str | Sequence[dict[str, Any] | Message]) -> list[dict[str, Any]]:
    """Turn a prompt into messages.

    Args:
        prompt: a text, or a conversation [{"role", "content"}, ...] that ends with a user's turn.

    Raises:
        UserError: if it is neither.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, tuple):
        prompt = [turn._asdict() if isinstance(turn, Message) else turn for turn in prompt]
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


def render_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    image_tokens: Sequence[int] = (),
    *,
    numbered: bool = False,
) -> RenderedPrompt:
    """Render messages up to the assistant's next turn: the one renderer of training and serving.

    Images stand where the user's texts mark their places, without marks before the first of them
    (`data.prompts.place_films`). Special tokens that a message spells are encoded as text; of an assistant's message,
    the tags of the answer format are the tokens that they are to the model (`plain_text`).

    Args:
        messages: {"role", "content": text}, at least one of them a user's.
        image_tokens: of each image, in the order of their places in the conversation.
        numbered: whether "Picture n: " stands before each image, as the published template's add_vision_id has it.

    Returns:
        The prompt. The template writes a placeholder for each image, which becomes its tokens here as in the processor.

    Raises:
        UserError: for a message that holds placeholders of images, for other marks of images than there are, and for
            turns that the template refuses or leaves out.
    """
    placed = _placed(messages, len(image_tokens), numbered)
    texts = [part for message in placed for part in message["content"] if part is not None]
    for text in texts:
        plain_text.refuse_placeholders(text, "a prompt")
    mark = plain_text.choose_mark(texts)
    # In the form that this template reads, with the spellings broken before it sees them.
    marked = [_marked(tokenizer, message, mark) for message in placed]
    rendered = chat_template.in_form(tokenizer, marked)
    text = chat_template.render(tokenizer, rendered)
    # One placeholder for each image; the tokenizer turns each of its tokens into one id.
    markers = markers_of(tokenizer)
    # The order of pads is that of the places, which the template keeps (`in_form`).
    first, *others = text.split(markers.placeholder)
    if len(others) != len(image_tokens):
        raise UserError("the chat template writes placeholders of images that are not there")
    images = map(markers.image_text, image_tokens)
    with_images = first + "".join(itertools.chain(*zip(images, others, strict=True)))
    # The template has written the special tokens already.
    ids = plain_text.encode_marked(tokenizer, with_images, mark)
    return RenderedPrompt(ids, _opened(tokenizer, marked, text, mark))


def _placed(
    messages: Sequence[dict[str, Any]], image_count: int, numbered: bool
) -> list[dict[str, Any]]:
    """The messages with their content in parts, see `chat_template.Content`."""
    of_users = [message["content"] for message in messages if message["role"] == "user"]
    parts_of_users = iter(data_prompts.place_films(of_users, image_count))
    numbers = itertools.count(1)
    # Counted over the whole chat, as the published template counts.
    placed = []
    for message in messages:
        is_user = message["role"] == "user"
        parts = next(parts_of_users) if is_user else [message["content"]]
        if numbered:
            # As text, and not by the template's own option: others than the published one have none.
            pairs = (
                (data_prompts.PICTURE_NUMBER.format(next(numbers)), None)
                if part is None
                else (part,)
                for part in parts
            )
            parts = list(itertools.chain(*pairs))
        placed.append({"role": message["role"], "content": parts})
    return placed


def _marked(tokenizer: Tokenizer, message: dict[str, Any], mark: str) -> dict[str, Any]:
    allowed = plain_text.MODEL_TOKENS if message["role"] == "assistant" else ()
    parts = [
        part if part is None else plain_text.break_tokens(tokenizer, part, mark, allowed)
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _opened(tokenizer: Tokenizer, messages: list[dict[str, Any]], text: str, mark: str) -> str:
    """What the end of a rendered prompt says in the model's turn.

    Args:
        text: the messages with the generation prompt.
        mark: a character that people's texts did not hold.
    """
    # What the generation prompt adds, without the frame that decoding would skip.
    before = _turns(tokenizer, messages)
    opened = _words_of_turn(tokenizer, text, before)
    if not opened:
        return ""
    # A frame in plain words stands in front of every turn of the model; a tag is no frame.
    spoken = _turns(tokenizer, [*messages, {"role": "assistant", "content": mark}])
    # The last mark: people's texts may have been marked, too.
    frame = _words_of_turn(tokenizer, spoken.rpartition(mark)[0], before)
    shared = len(os.path.commonprefix([opened, frame]))
    tags = [opened.find(tag) for tag in FORMAT_TAGS if tag in opened]
    return opened[min([shared, *tags]) :].lstrip()


def _turns(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    """The messages without a generation prompt; nothing where the template does not take them so."""
    try:
        rendered = chat_template.in_form(tokenizer, messages)
        return chat_template.render(tokenizer, rendered, add_generation_prompt=False)
    except UserError:
        return ""


def _words_of_turn(tokenizer: Tokenizer, text: str, text_before: str) -> str:
    """The last turn of a rendered text from its first word on: without tokens of the frame and the speaker's name.

    Args:
        text: with the turn.
        text_before: without.
    """
    # A template that knows no generation prompt, or always writes it, has the turn at its end.
    has_more = len(text) > len(text_before) and text.startswith(text_before)
    turn = text[len(text_before) :] if has_more else text
    # Whatever stands before the last token of the frame is the frame's.
    for token in plain_text.control_tokens(tokenizer):
        turn = turn.rpartition(token)[2]
    # White space in front is the frame's, not the model's.
    return _SPEAKER.sub("", turn, count=1).lstrip()


def conversation_ids(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], image_tokens: Sequence[int] = ()
) -> list[int]:
    """Give the ids of `render_conversation`."""
    return render_conversation(tokenizer, messages, image_tokens).ids


def prompt_ids(tokenizer: Tokenizer, text: str, image_tokens: Sequence[int] = ()) -> list[int]:
    """Render one question about images (or none), as training does."""
    return conversation_ids(tokenizer, messages_of(text), image_tokens)


def count_image_tokens(model_config: Config, grids: Sequence[Grid]) -> list[int]:
    """Count what the merger makes of the patches of each image."""
    return [math.prod(grid) // model_config.vision.merge_unit for grid in grids]


def render_prompt(
    tokenizer: Tokenizer,
    model_config: Config,
    prompt: str | Sequence[dict[str, Any] | Message],
    grids: Sequence[Grid] = (),
    *,
    numbered: bool = False,
) -> RenderedPrompt:
    """Render a user's prompt, a text or a conversation, as serving does.

    Args:
        prompt: see `messages_of`.
        grids: (t, h, w) of each image in patches.
        numbered: as for `render_conversation`.

    Raises:
        UserError: for a malformed conversation, or a prompt that holds image or video placeholders of its own.
    """
    image_tokens = count_image_tokens(model_config, grids)
    messages = messages_of(prompt)
    rendered = render_conversation(tokenizer, messages, image_tokens, numbered=numbered)
    # A template that writes a placeholder of its own would shift the images' tokens.
    ids = rendered.ids
    is_right = ids.count(model_config.image_token_id) == sum(image_tokens)
    if not is_right or model_config.video_token_id in ids:
        raise UserError("a prompt must not hold image or video placeholders of its own")
    return rendered


def render_question(
    tokenizer: Tokenizer,
    model_config: Config,
    prompt: str | Sequence[dict[str, Any]],
    grids: Sequence[Grid] = (),
    *,
    numbered: bool = False,
) -> RenderedPrompt:
    """Render a prompt that is answered: as `render_prompt`, and every turn of the user asks something.

    Raises:
        UserError: for one that does not, and as `render_prompt` does.
    """
    for message in messages_of(prompt):
        if message["role"] == "user" and data_prompts.asks_nothing(message["content"]):
            raise UserError(data_prompts.NO_PROMPT)
    return render_prompt(tokenizer, model_config, prompt, grids, numbered=numbered)


def least_grids(prompt: Prompt | Conversation, images: Images) -> list[Grid]:
    """Give the grids of the films of a run's prompt, of one token each."""
    merge_size = images.model_config.vision.spatial_merge_size
    return [(1, merge_size, merge_size)] * data_prompts.count_films(prompt)


def most_tokens(length: int, prompt: Prompt | Conversation, images: Images) -> int:
    """Count the tokens that a run's prompt has at most, from its length with `least_grids`.

    An image token is a token of the prompt, whatever image it is of.
    """
    # The least films have one token each: they give way to as many as there can be.
    film_count = data_prompts.count_films(prompt)
    return length - film_count + images.tokens_at_most(film_count)


class Prompts:
    """Encodes prompts with their images to right-padded ids of one static width.

    Attributes:
        images: how the images of a batch travel.
        width: tokens of every row: the given one, or those of the longest of `texts`.
        opened_width: tokens of the longest text that the template opens the model's turn with; 0 without one.
        pad: the id of padding, end of text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_config: Config,
        grid: Grid | None,
        max_completion: int,
        width: int | None = None,
        texts: Sequence[Prompt] = (data_prompts.FIND_PROMPT,),
        images: Images | None = None,
    ) -> None:
        """Fix the shapes.

        Args:
            grid: (t, h, w) in patches of every image, where `encode` is not told otherwise; None: it always is.
            max_completion: tokens C that may follow a prompt directly; positions are computed for them, too.
            images: how the images of a batch of prompts travel; None: one each, of the grid, which must be given.
        """
        self.tokenizer = tokenizer
        self.config = model_config
        self.grid = grid
        self.max_completion = max_completion
        self.pad = tokenizer.get_vocab()[markers_of(tokenizer).padding]
        if images is None:
            assert grid is not None
            images = SquareImages(model_config=model_config, grid=grid)
        self.images = images
        # Few prompts are used again and again; conversations come once each.
        self._remembered = functools.lru_cache(maxsize=1024)(self._render)
        # Wide enough for each of the texts: so all of them share one program.
        self.width = width or max(self._width(text) for text in texts)
        known = [self.known(text, least_grids(text, self.images)) for text in texts]
        self.opened_width = max(len(prompt.opened_ids) for prompt in known)

    @classmethod
    def for_images(
        cls,
        tokenizer: Tokenizer,
        model_config: Config,
        images: Images,
        max_completion: int,
        width: int | None = None,
        texts: Sequence[Prompt] = (data_prompts.FIND_PROMPT,),
    ) -> "Prompts":
        """Fix the shapes for the prompts of a run, from how its images travel."""
        # Others have sizes of their own, which are told with each batch.
        grid = images.grid if isinstance(images, SquareImages) else None
        return cls(tokenizer, model_config, grid, max_completion, width, texts, images)

    def _width(self, text: Prompt) -> int:
        """The tokens of a prompt at most."""
        ids = self.known(text, least_grids(text, self.images)).ids
        return most_tokens(len(ids), text, self.images)

    def known(self, text: Prompt, grids: Sequence[Grid] | None = None) -> "KnownPrompt":
        """Render a prompt, and remember it.

        Args:
            grids: see `encode`.
        """
        return self._remembered(text, tuple(self.same_grids(text) if grids is None else grids))

    def same_grids(self, text: Prompt | Conversation) -> list[Grid]:
        """Give the grids of a text's images where all have the one that was given."""
        film_count = data_prompts.count_films(text)
        # Of a made-up size the prompt would have other tokens than its films.
        if self.grid is None and film_count:
            raise ValueError("images of sizes of their own: give the grids of each text")
        return [self.grid] * film_count if self.grid is not None else []

    def _render(self, text: Prompt, grids: tuple[Grid, ...]) -> "KnownPrompt":
        image_tokens = count_image_tokens(self.config, grids)
        rendered = render_conversation(self.tokenizer, messages_of(text), image_tokens)
        # The completion's positions follow the prompt's, whatever its tokens will be.
        row = np.asarray([*rendered.ids, *[self.pad] * self.max_completion], np.int32)[None]
        return KnownPrompt(
            ids=rendered.ids,
            opened=rendered.opened,
            positions=network.positions(self.config, row, grids or None)[:, 0],
            # Encoded by itself: in the prompt its first token may reach into the frame.
            opened_ids=self.tokenizer(rendered.opened, add_special_tokens=False)["input_ids"],
        )

    def _prompts(self, texts: Sequence[Prompt], grids: Grids | None) -> list["KnownPrompt"]:
        each = [None] * len(texts) if grids is None else grids
        return [self.known(text, own) for text, own in zip(texts, each, strict=True)]

    def opened_ids(self, texts: Sequence[Prompt], grids: Grids | None = None) -> np.ndarray | None:
        """Give the tokens of `opened`.

        Returns:
            int32 [B, K] with -1, which is no token, in front of shorter ones; None if no prompt opens anything.

        Raises:
            UserError: for one longer than those of the texts that the widths were made for.
        """
        rows = np.full((len(texts), self.opened_width), -1, np.int32)
        for row, prompt in zip(rows, self._prompts(texts, grids), strict=True):
            ids = prompt.opened_ids
            if len(ids) > self.opened_width:
                raise UserError(
                    f"the chat template opens the answer to a prompt with {len(ids)} tokens, to others with "
                    f"{self.opened_width} at most"
                )
            row[self.opened_width - len(ids) :] = ids
        return rows if self.opened_width else None

    def encode(self, texts: Sequence[Prompt], grids: Grids | None = None) -> dict[str, np.ndarray]:
        """Encode B prompts.

        Args:
            grids: of the images of each text; None: of as many as it marks, one without marks, of the given grid.

        Returns:
            ids int32 [B, T], lengths int32 [B], positions int32 [axes, B, T + C]: positions of the prompt and
            of any C completion tokens that follow it directly, computed once and used by prefill, decode and
            training alike. With a template that opens the model's turn "opened", too, see `opened_ids`.

        Raises:
            UserError: for a prompt longer than `width`.
        """
        count, width = len(texts), self.width
        # Padded on the right with text that nobody attends to.
        ids = np.full((count, width), self.pad, np.int32)
        # Any position does for padding, as nobody attends to it.
        axes = self.config.text.position_axes
        positions = np.ones((axes, count, width + self.max_completion), np.int32)
        lengths = np.zeros(count, np.int32)
        for index, prompt in enumerate(self._prompts(texts, grids)):
            # A text that was not among `texts`, or a width that was given, may not fit.
            if len(prompt.ids) > width:
                raise UserError(
                    f"a prompt of {len(prompt.ids)} tokens does not fit config.prompt_width={width}"
                )
            ids[index, : len(prompt.ids)] = prompt.ids
            lengths[index] = len(prompt.ids)
            positions[:, index, : prompt.positions.shape[1]] = prompt.positions
        encoded = {"ids": ids, "lengths": lengths, "positions": positions}
        opened = self.opened_ids(texts, grids)
        # Left out where there is nothing: most programs never hear of it.
        return encoded if opened is None else {**encoded, "opened": opened}


@dataclass(frozen=True)
class KnownPrompt(RenderedPrompt):
    """A rendered prompt, with positions int32 [axes, T + C] and the tokens of what the template opens."""

    positions: np.ndarray
    opened_ids: list[int]
