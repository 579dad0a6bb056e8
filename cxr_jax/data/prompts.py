"""What a reader is asked, and how a text marks the place of the film that it asks about."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from cxr_jax.errors import UserError

FIND_PROMPT = "Find abnormalities and support devices."


class Message(NamedTuple):
    """A turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Conversation = tuple[Message, ...]
Prompt = str | Conversation  # a question by itself, or a conversation that ends with one


def as_prompt(messages: Conversation) -> Prompt:
    """Give a conversation as a prompt: of a question by itself the text, so that both are one prompt."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return messages


IMAGE_MARK = "<image>"
NO_PROMPT = "no prompt: nothing is asked (the text is empty or blank)"
# What other tools write in its place: <img src=x.png>, <image 1>, <|image_1|>, [IMG]; and marks of what is not read.
_FOREIGN_MARK = (
    r"(?:</?(?:images?|img|pictures?|videos?|audios?)(?:[ _-]?\d{1,4})?(?:\s+[\w-]{1,20}=[^<>\n]{1,200})?\s{0,4}/?>"
    r"|<\|(?:image|img|picture|video|audio)(?:_\d{1,4})?\|>|<(?:image_?placeholder|start_of_image|imagehere|img_context)>"
    r"|\[/?(?:img|image)(?:[ _-]?\d{1,4})?\])"
)
# Where a mark takes the place of a film: at the beginning or the end, or alone on a line. Elsewhere it is a word that
# somebody writes about.
_IN_PLACE_OF_A_FILM = re.compile(
    rf"\A\s*{_FOREIGN_MARK}|{_FOREIGN_MARK}(?=\s*\Z)|^[^\S\n]*{_FOREIGN_MARK}(?=[^\S\n]*$)",
    re.IGNORECASE | re.MULTILINE,
)


def asks_nothing(text: str) -> bool:
    """Whether nothing can be seen in a question: white space, control characters and the like, the place of a film."""
    return all(
        unicodedata.category(letter) in ("Zs", "Zl", "Zp", "Cc", "Cf")
        for letter in text.replace(IMAGE_MARK, "")
    )


def cut_at_marks(text: str) -> list[str | None]:
    """Cut a text where it marks the place of a film: its parts as they are, None for each mark, nothing empty.

    Raises:
        UserError: for the mark of another tool where a film's could stand; amid a text it is text.
    """
    first, *others = text.split(IMAGE_MARK)
    parts: list[str | None] = [first]
    for other in others:
        parts += [None, other]
    for part in parts:
        mark = _IN_PLACE_OF_A_FILM.search(part or "")
        if mark:
            raise UserError(
                f"the text holds {mark.group().strip()[:40]!a}: a film's place is marked {IMAGE_MARK}"
            )
    return [part for part in parts if part != ""]


def place_films(texts: Sequence[str], film_count: int) -> list[list[str | None]]:
    """Cut the user's texts of a conversation where its films stand: the parts of each, None for each film.

    Films stand where the texts mark them; without marks all of them before the first text. A text is kept as it is,
    white space too, but where marks say no more than that: films that are marked at the beginning of the first text,
    and one film at its end (as LLaVA's rows are read), stand before it as without marks.

    Args:
        texts: of the user's turns, at least one.

    Raises:
        UserError: for other marks than films, the mark of another tool in the place of a film.
    """
    parts_of_texts = [cut_at_marks(text) for text in texts]
    mark_count = sum(parts.count(None) for parts in parts_of_texts)
    if mark_count not in (0, film_count):
        raise UserError(
            f"a prompt has {mark_count} places for an image ({IMAGE_MARK}), and {film_count} images"
        )
    placed = [list(parts) or [""] for parts in parts_of_texts]
    first = [part for part in parts_of_texts[0] if part is None or part.strip()]
    films: list[str | None] = [None] * film_count
    if not mark_count:
        placed[0] = [*films, texts[0]]
    elif first[:film_count] == films and None not in first[film_count:]:
        placed[0] = [*films, "".join(filter(None, first)).strip()]
    elif film_count == 1 and first[-1:] == films:
        placed[0] = [*films, "".join(filter(None, first)).strip()]
    return placed


def check_prompt(text: str) -> str:
    """Return a question about a film that a flag holds.

    Raises:
        UserError: naming the flag, for one that asks nothing, and as `place_films` does.
    """
    try:
        if asks_nothing(text):
            raise UserError(NO_PROMPT)
        place_films([text], film_count=1)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None
    return text
