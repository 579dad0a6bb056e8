"""What a reader is asked, and how a text marks the place of the film that it asks about."""

import re

from cxr_jax.errors import UserError

FIND_PROMPT = "Find abnormalities and support devices."

IMAGE_MARK = "<image>"
# What other tools write in its place, and marks of what is not read.
_FOREIGN_MARK = re.compile(
    r"</?(?:images?|img|pictures?|videos?|audios?)\b[^<>\n]{0,40}>|\[/?(?:IMG|IMAGE)\]",
    re.IGNORECASE,
)


def cut_at_marks(text: str) -> list[str | None]:
    """Cut a text where it marks the place of a film: its parts without white space around them, None for each mark.

    Raises:
        UserError: for the mark of another tool.
    """
    for mark in _FOREIGN_MARK.findall(text):
        if mark != IMAGE_MARK:
            raise UserError(f"the text holds {mark[:40]!a}: a film's place is marked {IMAGE_MARK}")
    first, *others = text.split(IMAGE_MARK)
    parts: list[str | None] = [first.strip()]
    for other in others:
        parts += [None, other.strip()]
    return [part for part in parts if part != ""]


def without_mark(text: str, has_film: bool) -> str:
    """Give a prompt without the mark of its film's place, which may stand before the text or after it.

    The film always stands first: LLaVA's rows are read so, too. A text without a mark stays as it is.

    Raises:
        UserError: for more marks than films, a mark in the middle of the text, the mark of another tool.
    """
    parts = cut_at_marks(text)
    marks = parts.count(None)
    if not marks:
        return text
    if marks > has_film:
        raise UserError(
            f"a prompt has {marks} places for an image ({IMAGE_MARK}), and {int(has_film)} images"
        )
    if None in parts[1:-1]:
        raise UserError(f"the place of the image ({IMAGE_MARK}) is in the middle of the text")
    return "".join(part for part in parts if part is not None)
