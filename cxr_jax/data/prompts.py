"""What a reader is asked, and how a text marks the place of the film that it asks about."""

import re
import unicodedata

from cxr_jax.errors import UserError

FIND_PROMPT = "Find abnormalities and support devices."

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
    """Cut a text where it marks the place of a film: its parts without white space around them, None for each mark.

    Raises:
        UserError: for the mark of another tool where a film's could stand; amid a text it is text.
    """
    first, *others = text.split(IMAGE_MARK)
    parts: list[str | None] = [first.strip()]
    for other in others:
        parts += [None, other.strip()]
    for part in parts:
        mark = _IN_PLACE_OF_A_FILM.search(part or "")
        if mark:
            raise UserError(
                f"the text holds {mark.group().strip()[:40]!a}: a film's place is marked {IMAGE_MARK}"
            )
    return [part for part in parts if part != ""]


def without_mark(text: str, has_film: bool) -> str:
    """Give a prompt without the mark of its film's place, which may stand before the text or after it.

    The film always stands first: LLaVA's rows are read so, too. A text without a mark stays as it is.

    Raises:
        UserError: for more marks than films, a mark in the middle of the text, the mark of another tool in the place of
            a film.
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


def check_prompt(text: str) -> str:
    """Return a question about a film that a flag holds.

    Raises:
        UserError: naming the flag, for one that asks nothing, and as `without_mark` does.
    """
    try:
        if asks_nothing(text):
            raise UserError(NO_PROMPT)
        without_mark(text, has_film=True)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None
    return text
