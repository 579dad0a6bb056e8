"""Chat templates: which one a folder has, and the form of messages that it reads.

Folders keep their template in one of four files, of which a tokenizer reads two and the processor of a vision model the
others. Templates differ in what a message's content may be, too: those of vision models take a list of parts, those of
text models a text, and either may write nonsense, and no error, for the other form. So a template is tried with words
that can be found again, and the form is used in which it gives all of them back.
"""

import functools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_jax.errors import UserError, shown
from cxr_jax.models.markers import markers_of

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

# Files of the processor alone, in its order: the first that has a template wins.
_PROCESSOR_FILES = ("processor_config.json", "chat_template.json")
# A prompt like most.
_QUESTION = ({"role": "user", "content": (None, "?")},)
_LOG = logging.getLogger(__name__)

Messages = Sequence[dict[str, Any]]
# What is said in a turn: a text, or the parts of one, between which None stands for an image.
Content = str | Sequence[str | None]


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
    in_form(tokenizer, _QUESTION)


def _prompt_of(tokenizer: Tokenizer, template: Any) -> str | None:
    """The prompt that a template makes of a question about an image; None if it makes none."""
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        return render(tokenizer, in_form(tokenizer, _QUESTION))
    except UserError:
        return None
    finally:
        tokenizer.chat_template = kept


# ---- The form of messages ------------------------------------------------------------------------------------

# Whose turns are lists of parts: those with images alone, or without any the first question; those of users; of all; ..
# Last: nobody's, for templates that know no images.
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


def in_form(tokenizer: Tokenizer, messages: Messages) -> list[dict[str, Any]]:
    """Write messages in the form that the chat template reads.

    Args:
        messages: {"role", "content": `Content`}, at least one of them a user's.

    Raises:
        UserError: if there is no form in which the template gives back every text, and each image once, in its place.
    """
    layout = tuple(
        (message["role"], tuple(part is None for part in _parts(message["content"])))
        for message in messages
    )
    # As text: a tokenizer that gets another template is tried anew, and a file may hold anything in its place.
    in_parts = _form(tokenizer, str(tokenizer.chat_template), layout)
    return _written(messages, in_parts, markers_of(tokenizer).whole_placeholder, {})


def _parts(content: Content) -> Sequence[str | None]:
    return (content,) if isinstance(content, str) else content


Layout = tuple[
    tuple[str, tuple[bool, ...]], ...
]  # of each turn the role, and which parts are images


# A few conversations of each of a few tokenizers; trying takes longer than rendering.
@functools.lru_cache(maxsize=128)
def _form(tokenizer: Tokenizer, template: str, layout: Layout) -> tuple[str, ...]:
    """Whose turns are lists of parts for a template, by trying.

    Args:
        template: that of the tokenizer, since what is remembered holds for it alone.

    Raises:
        UserError: see `in_form`.
    """
    probe, markers = _probe(layout), markers_of(tokenizer)
    problems = []
    for in_parts in _FORMS:
        try:
            written = _written(probe, in_parts, markers.whole_placeholder, {_STRAY: _STRAY})
            rendered = render(tokenizer, written)
        except UserError as error:
            problems.append(str(error))
            continue
        lost = _lost(rendered, probe, markers.placeholder)
        if not lost:
            return in_parts
        problems.append(f"the chat template leaves out {lost}")
    # Of all forms, the one that went farthest says most.
    raise UserError(
        max(problems, key=lambda problem: ("leaves out" in problem) + (_TURN in problem))
    )


_TURN = "'s turn"


def _probe(layout: Layout) -> list[dict[str, Any]]:
    """Messages of a layout, of words that no template has of its own, each another."""
    count = sum(len(kinds) for _, kinds in layout)
    words = (f"word{index}of{count}" for index in range(count))
    return [
        {
            "role": role,
            "content": tuple(
                None if is_image else word for is_image, word in zip(kinds, words, strict=False)
            ),
        }
        for role, kinds in layout
    ]


def _lost(rendered: str, probe: Messages, placeholder: str) -> str:
    """What a template has not written, as words for a message; empty if all is there."""
    expected = [placeholder if part is None else part for turn in probe for part in turn["content"]]
    image_count = expected.count(placeholder)
    if rendered.count(placeholder) != image_count:
        return "the image" if image_count < 2 else "images"
    if _STRAY in rendered:
        return "the words of a message, and prints its parts"
    # Each word is another, so that a turn which stands twice does not hide one that is left out.
    for turn in probe:
        if any(part is not None and part not in rendered for part in turn["content"]):
            return f"the text of the {turn['role']}{_TURN}"
    # Where one image stands beside its question is the template's affair; of several, and amid a text, ours.
    is_plain = image_count < 2 and not any(None in turn["content"][1:] for turn in probe)
    # By first occurrence: a template may repeat a text elsewhere.
    found = re.findall("|".join(map(re.escape, set(expected))), rendered)
    return "" if is_plain or _holds_in_order(found, expected) else "the places of the images"


def _holds_in_order(found: list[str], expected: list[str]) -> bool:
    remaining = iter(found)
    return all(item in remaining for item in expected)


def _written(
    messages: Messages, in_parts: Sequence[str], whole_placeholder: str, extra: dict[str, str]
) -> list[dict[str, Any]]:
    """Messages of which some are lists of parts; an image is a part of its turn, or a placeholder in the text.

    Args:
        whole_placeholder: what a template of the model's own writes for an image, for those that know no images.
    """
    # Of texts and of parts alike, as messages come both ways.
    contents = [_parts(message["content"]) for message in messages]
    roles = [message["role"] for message in messages]
    # Without an image the first question is what a template was made for, in whatever form.
    shows_image = [None in parts for parts in contents]
    if not any(shows_image):
        shows_image[roles.index("user")] = True
    written = []
    for role, parts, is_question in zip(roles, contents, shows_image, strict=True):
        content: Any = [
            {"type": "image", **extra} if part is None else {"type": "text", "text": part, **extra}
            for part in parts
        ]
        if not (is_question and "question" in in_parts or role in in_parts):
            content = "".join(whole_placeholder if part is None else part for part in parts)
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
