"""What a reader is asked, and how a text marks the place of the film that it asks about."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cxr_jax.errors import UserError

FIND_PROMPT = "Find abnormalities and support devices."
NEW_PROMPT = "Which findings are new since the prior film?"


class Message(NamedTuple):
    """A turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Conversation = tuple[Message, ...]
Prompt = str | Conversation  # a question by itself, or a conversation that ends with one


def as_text(prompt: Prompt) -> str:
    """Write a prompt for people: of a conversation every turn with who speaks, but for the question at its end."""
    if isinstance(prompt, str):
        return prompt
    *before, question = prompt
    return "\n".join([*(f"{turn.role}: {turn.content}" for turn in before), question.content])


def as_prompt(messages: Conversation) -> Prompt:
    """Give a conversation as a prompt: of a question by itself the text, so that both are one prompt."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return messages


IMAGE_MARK = "<image>"
PICTURE_NUMBER = "Picture {}: "  # as the published template's add_vision_id writes it
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
_MARK_THAT_SAYS_MORE = re.compile(
    r"\A((?:</?|<\||\[/?)[a-z]++(?:_[a-z]++)*+)(?!.\Z).*(.)\Z", re.IGNORECASE | re.DOTALL
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
            # Without what it says of its film, which may name a patient: <img src=x.png> is <img ..>.
            name = _MARK_THAT_SAYS_MORE.sub(r"\1 ..\2", mark.group().strip())
            raise UserError(f"the text holds {name!a}: a film's place is marked {IMAGE_MARK}")
    return [part for part in parts if part != ""]


def place_films(texts: Sequence[str], film_count: int) -> list[list[str | None]]:
    """Cut the user's texts of a conversation where its films stand: the parts of each, None for each film.

    Films stand where the texts mark them; without marks all of them before the first text. A text is kept as it is,
    white space too, but where marks say no more than that: films that are marked at the beginning of the first text,
    and its only film at its end (as LLaVA's rows are read), stand before it as without marks. Where they stand follows
    from the text that marks them alone: a later turn moves nothing that was read before it.

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
    # A turn always has a text, if an empty one.
    placed = [list(parts) or [""] for parts in parts_of_texts]
    # White space says nothing about places.
    first = [part for part in parts_of_texts[0] if part is None or part.strip()]
    films: list[str | None] = [None] * first.count(None)
    if not mark_count:
        placed[0] = [*[None] * film_count, texts[0]]
    # Marks that say what none would say, too.
    elif films and films in (first[: len(films)], first[-1:]):
        placed[0] = [*films, "".join(filter(None, first)).strip()]
    return placed


def mark_films(text: str, film_count: int) -> str:
    """Write a question so that its marks tell how many films it has, and where: see `place_films`.

    The model reads the text as before. One film that stands before the text has no mark: prompts of one film are as
    people write them.

    Raises:
        UserError: as `place_films` does.
    """
    [parts] = place_films([text], film_count)
    # Prompts of before had no marks, and are to stay the same texts.
    is_usual = film_count == 1 and parts[0] is None
    return "".join(IMAGE_MARK if part is None else part for part in parts[is_usual:])


def number_films(text: str, film_count: int) -> str:
    """Write a question with "Picture n: " before each of its films: read as the text is where images are numbered.

    Raises:
        UserError: as `place_films` does.
    """
    [parts] = place_films([text], film_count)
    numbers = itertools.count(1)
    return "".join(
        PICTURE_NUMBER.format(next(numbers)) + IMAGE_MARK if part is None else part
        for part in parts
    )


def count_films(prompt: Prompt) -> int:
    """Count the films that texts of `mark_films` ask about: those that they mark, or one."""
    if isinstance(prompt, str):
        return prompt.count(IMAGE_MARK) or 1
    return sum(turn.content.count(IMAGE_MARK) for turn in prompt if turn.role == "user") or 1


def most_films(prompts: Iterable[Prompt]) -> int:
    """Count the films of the prompt that asks about most of them."""
    return max(map(count_films, prompts), default=1)


# ---- What a film is to the question ----------------------------------------------------------------


class Role(NamedTuple):
    """What a film is to the one that is asked about.

    Attributes:
        view: "frontal" or "lateral".
        when: "current", of the study that is asked about, or "prior".
    """

    view: str
    when: str


# In the order in which a prompt names them; no other place says how.
ROLES = {
    "frontal": Role("frontal", "current"),
    "lateral": Role("lateral", "current"),
    "prior": Role("frontal", "prior"),
    "prior_lateral": Role("lateral", "prior"),
}


def ask_of_roles(roles: Sequence[str], text: str) -> str:
    """Write a question about films that have roles: which film is which, then the question.

    Args:
        roles: of `ROLES`, as `sort_roles` has them.
        text: as people write it, without marks of films.
    """
    # The wording follows from the table, so that no role can be called otherwise elsewhere.
    named = (f"{ROLES[role].when} {ROLES[role].view}: {IMAGE_MARK}" for role in roles)
    return " ".join(name.capitalize() for name in named) + "\n" + text.strip()


def sort_roles(roles: Iterable[str]) -> list[str]:
    """Bring roles into the order of `ROLES`.

    Raises:
        UserError: for a name that is none, one that comes twice, or none at all.
    """
    given = list(roles)
    for role in given:
        if role not in ROLES:
            raise UserError(f"{role[:40]!a} is none of {', '.join(ROLES)}")
        if given.count(role) > 1:
            raise UserError(f"{role} is there {given.count(role)} times")
    if not given:
        raise UserError(f"names none of {', '.join(ROLES)}")
    return sorted(given, key=list(ROLES).index)


def split_roles(text: str) -> list[str]:
    """Read the roles that a flag or a config key names, "frontal,lateral,prior", in the order given.

    Raises:
        UserError: as `sort_roles` does.
    """
    roles = [role.strip() for role in text.split(",") if role.strip()]
    sort_roles(roles)
    return roles


# ---- Flags -----------------------------------------------------------------------------------------


def check_prompt(text: str, film_count: int = 1) -> str:
    """Return a question about films that a flag holds.

    Raises:
        UserError: naming the flag, for one that asks nothing, and as `place_films` does.
    """
    try:
        if asks_nothing(text):
            raise UserError(NO_PROMPT)
        place_films([text], film_count)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None
    return text
