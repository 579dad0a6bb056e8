"""Chat templates: which one a folder has, and the form of messages that it reads.

Folders keep their template in one of four files, of which a tokenizer reads two and the processor of a vision model the
others. Templates differ in what a message's content may be, too: those of vision models take a list of parts, those of
text models a text, and either may write nonsense, and no error, for the other form. So a template is tried with words
that can be found again, and the form is used in which it gives all of them back.
"""

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_jax.errors import UserError, shown

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

IMAGE_PAD = "<|image_pad|>"
# What a template of the model's own writes for an image, for those that know no images.
_IMAGE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
# Files of the processor alone, in its order: the first that has a template wins.
_PROCESSOR_FILES = ("processor_config.json", "chat_template.json")
# A prompt like most.
_QUESTION = ({"role": "user", "content": "?"},)
_LOG = logging.getLogger(__name__)

Messages = Sequence[dict[str, Any]]


# ---- The template of a folder --------------------------------------------------------------------------------


def choose(folder: Path, tokenizer: Tokenizer) -> None:
    """Give a tokenizer the chat template that transformers' processor takes from its folder.

    processor_config.json and chat_template.json go before what the tokenizer has read itself: chat_template.jinja and
    tokenizer_config.json. Warns where the two write another prompt.

    Raises:
        UserError: if there is none, none named "default" of several, or none that renders a question about an image.
    """
    # What the tokenizer has found by itself, in the two files that it knows.
    own = tokenizer.chat_template
    for name in _PROCESSOR_FILES:
        template = _template_in(folder / name)
        if template is not None:
            tokenizer.chat_template = template
            own_prompt = None if own is None else _prompt_of(tokenizer, own)
            if own_prompt not in (None, _prompt_of(tokenizer, template)):
                _warn_once(
                    f"{folder}: {name} has another chat template than the tokenizer; it is used"
                )
            break
    _check(tokenizer)


@functools.cache
def _warn_once(message: str) -> None:
    # A run opens its tokenizer for every check.
    _LOG.warning(message)


def _template_in(path: Path) -> Any:
    """The value of "chat_template" in a JSON file, named ones as a dict; None if there is none."""
    if not path.is_file():
        return None
    try:
        template = json.loads(path.read_bytes())["chat_template"]
    except KeyError:
        return None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path.name}: not valid JSON, or no JSON object") from error
    # Named templates are a list in files of before transformers 5, and a dict in memory.
    if isinstance(template, list):
        try:
            return {str(named["name"]): named["template"] for named in template}
        except (KeyError, TypeError):
            raise UserError(f"{path.name}: chat_template is a list of other things") from None
    return template


def _check(tokenizer: Tokenizer) -> None:
    template: Any = tokenizer.chat_template
    if not template:
        raise UserError(
            "no chat template: none of chat_template.jinja, chat_template.json, processor_config.json and "
            "tokenizer_config.json has one"
        )
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(map(shown, template))
        raise UserError(f"has the chat templates {names}, and none is named 'default'")
    # Which of several is meant nobody can know, unless one is named so.
    used = template["default"] if isinstance(template, dict) else template
    if not isinstance(used, str):
        raise UserError("the chat template is no text")
    in_form(tokenizer, _QUESTION, has_image=True)


def _prompt_of(tokenizer: Tokenizer, template: Any) -> str | None:
    """The prompt that a template makes of a question about an image; None if it makes none."""
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        return render(tokenizer, in_form(tokenizer, _QUESTION, has_image=True))
    except UserError:
        return None
    finally:
        tokenizer.chat_template = kept


# ---- The form of messages ------------------------------------------------------------------------------------

# Whose turns are lists of parts: that of the question about the image alone; of users; of all; .. Last: nobody's, for
# templates that know no images.
_FORMS = (
    ("question",),
    ("question", "user"),
    ("question", "user", "system", "assistant"),
    ("question", "user", "system"),
    ("question", "user", "assistant"),
    (),
)
# A key of parts that templates do not know: it shows where one prints a part instead of reading it.
_STRAY = "stray0key"


def in_form(tokenizer: Tokenizer, messages: Messages, *, has_image: bool) -> list[dict[str, Any]]:
    """Write messages in the form that the chat template reads.

    Args:
        messages: {"role", "content": text}, at least one of them a user's.
        has_image: whether an image stands before the first user's text.

    Raises:
        UserError: if there is no form in which the template gives back every text, and the image once.
    """
    roles = tuple(message["role"] for message in messages)
    # As text: a tokenizer that gets another template is tried anew, and a file may hold anything in its place.
    template = str(tokenizer.chat_template)
    return _written(messages, _form(tokenizer, template, roles, has_image), has_image, {})


# A few conversations of each of a few tokenizers; trying takes longer than rendering.
@functools.lru_cache(maxsize=32)
def _form(
    tokenizer: Tokenizer, template: str, roles: tuple[str, ...], has_image: bool
) -> tuple[str, ...]:
    """Whose turns are lists of parts for a template, by trying.

    Args:
        template: that of the tokenizer, since what is remembered holds for it alone.

    Raises:
        UserError: see `in_form`.
    """
    # Words that no template has of its own.
    probe = [
        {"role": role, "content": f"word{index}of{len(roles)}"} for index, role in enumerate(roles)
    ]
    problems = []
    for in_parts in _FORMS:
        try:
            rendered = render(tokenizer, _written(probe, in_parts, has_image, {_STRAY: _STRAY}))
        except UserError as error:
            problems.append(str(error))
            continue
        lost = _lost(rendered, probe, has_image)
        if not lost:
            return in_parts
        problems.append(f"the chat template leaves out {lost}")
    # Of all forms, the one that went farthest says most.
    raise UserError(
        max(problems, key=lambda problem: ("leaves out" in problem) + (_TURN in problem))
    )


_TURN = "'s turn"


def _lost(rendered: str, probe: Messages, has_image: bool) -> str:
    """What a template has not written, as words for a message; empty if all is there."""
    if rendered.count(IMAGE_PAD) != int(has_image):
        return "the image"
    if _STRAY in rendered:
        return "the words of a message, and prints its parts"
    # Each word is another, so that a turn which stands twice does not hide one that is left out.
    roles = [message["role"] for message in probe if message["content"] not in rendered]
    return f"the text of the {roles[0]}{_TURN}" if roles else ""


def _written(
    messages: Messages, in_parts: Sequence[str], has_image: bool, extra: dict[str, str]
) -> list[dict[str, Any]]:
    """Messages of which some are lists of parts; the image is a part of the question, or its tokens in the text."""
    roles = [message["role"] for message in messages]
    # The image stands before the first question, in whatever form.
    question = roles.index("user")
    written = []
    for index, (role, message) in enumerate(zip(roles, messages, strict=True)):
        text = message["content"]
        shows_image = has_image and index == question
        content: Any = _IMAGE + text if shows_image else text
        if (index == question and "question" in in_parts) or role in in_parts:
            image = [{"type": "image", **extra}] if shows_image else []
            content = [*image, {"type": "text", "text": text, **extra}]
        written.append({"role": role, "content": content})
    return written


def render(tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool = True) -> str:
    """Render messages that are in the template's form.

    Raises:
        UserError: for messages that the template refuses.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )
        )
    except Exception as error:  # noqa: BLE001 - jinja2 and templates themselves raise many kinds
        raise UserError(
            f"the chat template does not work for turns of {', '.join(_roles(messages))}: "
            f"{type(error).__name__} ({shown(error)})"
        ) from error


def _roles(messages: Messages) -> list[str]:
    return list(dict.fromkeys(message["role"] for message in messages))
