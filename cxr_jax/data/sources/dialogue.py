"""What is asked and answered in a row, in whichever of the usual schemas it is written.

A row is a question about one film, or several, and, to imitate, its answer; more questions and answers may follow, and
a system turn may stand before them. What says anything else (turns of tools, say) is refused, because a part of it
would be lost without a word. docs/inputs.md lists the schemas.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from cxr_jax.data import prompts
from cxr_jax.data.json_rows import BadRowError, is_absent, is_null
from cxr_jax.data.prompts import (
    IMAGE_MARK,
    NO_PROMPT,
    Conversation,
    Message,
    asks_nothing,
    cut_at_marks,
)
from cxr_jax.data.sources import views
from cxr_jax.errors import UserError

# Keys of turns: ShareGPT and LLaVA write from / value, OpenAI, ms-swift and TRL role / content.
TURN_LISTS = ("messages", "conversations", "conversation")
# One question and its answer as plain keys: (question, what follows it in the question, answer).
PLAIN_KEYS = (
    ("prompt", None, "completion"),  # TRL
    ("query", None, "response"),  # ms-swift
    ("instruction", "input", "output"),  # Alpaca, as LLaMA-Factory reads it
    ("problem", None, None),  # open-r1
    ("question", None, None),
)
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
# Who speaks where a model calls functions.
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation")
# What tools write beside an answer that is not to train.
_TRAINS = ("weight", "loss", "train")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_TEXT_TYPES = ("text", "input_text", "output_text")


class Dialogue(NamedTuple):
    """What is said in a row.

    Attributes:
        prompt: the user's first text, as `prompts.mark_films` writes it; as it stands where films come later.
        target: the assistant's first text, or None.
        system: the text of a system turn, or None.
        films: in the order of their places.
        later: the turns that follow, with marks of the films that stand there.
    """

    prompt: str
    target: str | None
    system: str | None
    films: tuple["NamedFilm", ...]
    later: Conversation = ()


class NamedFilm(NamedTuple):
    """A film of a row.

    Attributes:
        names: one for each place in the row that names it.
        role: of `prompts.ROLES`, or None.
    """

    names: tuple[str, ...]
    role: str | None


class _Picture(NamedTuple):
    """The place of a film in a turn, its name and its role where the turn has them."""

    name: str | None = None
    role: str | None = None


class _Turn(NamedTuple):
    role: str
    parts: tuple[str | _Picture, ...]  # as they follow each other, no text beside another

    @property
    def text(self) -> str:
        return "".join(
            IMAGE_MARK if isinstance(part, _Picture) else part for part in self.parts
        ).strip()

    @property
    def pictures(self) -> list[_Picture]:
        return [part for part in self.parts if isinstance(part, _Picture)]


def parse_dialogue(record: dict[str, Any]) -> Dialogue:
    """Read the dialogue of a row.

    Raises:
        BadRowError: with the reason why it is none, or says what is not read.
    """
    turns = _find_turns(record)
    system, questions, answers = _split_turns(turns)
    if any(asks_nothing(question.text) for question in questions):
        raise BadRowError(NO_PROMPT)
    if not all(answer.text for answer in answers):
        raise BadRowError("the assistant's turn is empty")
    for turn in (*([system] if system else []), *answers):
        if turn.pictures:
            raise BadRowError(f"a picture's place ({IMAGE_MARK}) in the {turn.role}'s turn")
    films = _find_films([picture for turn in questions for picture in turn.pictures], record)
    texts, films = _ask(questions, films)
    dialogue = Dialogue(
        prompt=texts[0],
        target=answers[0].text if answers else None,
        system=system.text or None if system is not None else None,
        films=films,
        later=tuple(
            Message(role, text)
            for pair in zip(texts[1:], answers[1:], strict=True)
            for role, text in zip(("user", "assistant"), (pair[0], pair[1].text), strict=True)
        ),
    )
    for text in (dialogue.target, dialogue.system, *texts, *(turn.text for turn in answers)):
        check_text(text)
    return dialogue


def check_text(text: str | None) -> None:
    """Refuse a text that UTF-8 cannot hold: half of a pair that JSON spells as two escapes. Raises BadRowError."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise BadRowError("a text holds half a character (a lone surrogate)") from None


# ---- The schemas -----------------------------------------------------------------------------------


def _find_turns(record: dict[str, Any]) -> list[_Turn]:
    """The turns of a row, by the first schema that it has; two schemas must say the same."""
    readings = {
        name: _read_turns(record[name]) for name in TURN_LISTS if not is_absent(record.get(name))
    }
    if not readings:
        readings = _read_plain_keys(record)
    if not readings:
        raise BadRowError(
            f"{NO_PROMPT}: neither messages nor conversations, nor prompt, query or instruction"
        )
    first, *others = readings
    for other in others:
        if _stripped(readings[other]) != _stripped(readings[first]):
            raise BadRowError(f"{first} and {other} say different things")
    turns = readings[first]

    # Beside the turns there may be what came before them.
    if not is_absent(record.get("history")):
        if first in TURN_LISTS:
            raise BadRowError(f"history beside {first}: which turns come first?")
        turns = [*_read_history(record["history"]), *turns]
    if not is_absent(record.get("system")):
        if not isinstance(record["system"], str):
            raise BadRowError("system is not a text")
        system = _Turn("system", _parse_text(record["system"]))
        if turns[0].role != "system":
            turns = [system, *turns]
        elif _stripped(turns[:1]) != _stripped([system]):
            raise BadRowError(f"system and the system turn of {first} say different things")
    for name in ("videos", "audios", "video", "audio"):
        if not is_absent(record.get(name)):
            raise BadRowError(f"{name}: only films are read")
    return turns


def _stripped(turns: Sequence[_Turn]) -> list[_Turn]:
    """Turns without the white space beside images and ends, in which schemas may differ."""
    return [
        _Turn(
            role,
            tuple(
                part
                for part in (part.strip() if isinstance(part, str) else part for part in parts)
                if part != ""
            ),
        )
        for role, parts in turns
    ]


def _read_plain_keys(record: dict[str, Any]) -> dict[str, list[_Turn]]:
    readings = {}
    for question_key, more_key, answer_key in PLAIN_KEYS:
        if is_absent(record.get(question_key)):
            continue
        turns = _as_turns(record[question_key], "user", question_key)
        if more_key is not None and not is_absent(record.get(more_key)):
            more = _as_turns(record[more_key], "user", more_key)
            turns = [_Turn("user", _joined((*turns[0].parts, *more[0].parts)))]
        if answer_key is not None and not is_absent(record.get(answer_key)):
            turns = turns + _as_turns(record[answer_key], "assistant", answer_key)
        readings[question_key] = turns
    return readings


def _read_history(value: Any) -> list[_Turn]:
    """Earlier questions with their answers, as ms-swift and LLaMA-Factory write them: a list of pairs of texts."""
    turns = []
    for pair in value if isinstance(value, list) else [value]:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise BadRowError("history is not a list of questions with their answers")
        turns += [_Turn("user", _parse_text(pair[0])), _Turn("assistant", _parse_text(pair[1]))]
    return turns


def _as_turns(value: Any, role: str, key: str) -> list[_Turn]:
    """What a plain key holds: a text, or, as in TRL, messages."""
    if isinstance(value, str):
        return [_Turn(role, _parse_text(value))]
    if not isinstance(value, list):
        raise BadRowError(f"{key} is neither a text nor messages")
    return _read_turns(value)


# ---- Turns -----------------------------------------------------------------------------------------


def _read_turns(value: Any) -> list[_Turn]:
    if not isinstance(value, list):
        raise BadRowError("the turns are not a list")
    return [_read_turn(turn) for turn in value]


def _read_turn(turn: Any) -> _Turn:
    if not isinstance(turn, dict):
        raise BadRowError("a turn is not an object")
    role = turn.get("role", turn.get("from"))
    name = role.strip().lower() if isinstance(role, str) else ""
    if name in _TOOL_ROLES:
        raise BadRowError("a turn of a tool: only what users and the model say is read")
    known = _ROLES.get(name)
    if known is None:
        raise BadRowError("the role of a turn is none of system, user (human), assistant (gpt)")
    if not is_null(turn.get("tool_calls")) and turn["tool_calls"] != []:
        raise BadRowError("a turn calls tools")
    if known == "assistant" and any(turn.get(key) in (0, False) for key in _TRAINS if key in turn):
        raise BadRowError(f"an answer is marked not to train ({', '.join(_TRAINS)}): all are read")
    content = turn.get("content", turn.get("value"))
    return _Turn(known, _parse_content(content))


def _parse_content(content: Any) -> tuple[str | _Picture, ...]:
    """Parts of a message: of a text, or of a list of {type: text | image, ...}."""
    if is_null(content):
        return ()
    if isinstance(content, str):
        return _parse_text(content)
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise BadRowError("what a turn says is neither a text nor a list of parts")
    parts: list[str | _Picture] = []
    for part in content:
        if isinstance(part, str):
            parts += _parse_text(part)
            continue
        if not isinstance(part, dict):
            raise BadRowError("a part of a message is not an object")
        parts += _parse_part(part)
    return _joined(parts)


def _joined(parts: Sequence[str | _Picture]) -> tuple[str | _Picture, ...]:
    """Parts of which no text stands beside another: those that did are lines of one."""
    joined: list[str | _Picture] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            texts = [text for text in (last.rstrip(), part.lstrip()) if text.strip()]
            joined[-1] = "\n".join(texts) or last
        else:
            joined.append(part)
    return tuple(joined)


def _parse_part(part: dict[str, Any]) -> tuple[str | _Picture, ...]:
    # Joined data sets give every part every key, most of them null.
    given = {key: value for key, value in part.items() if not is_null(value)}
    kind = given.get("type")
    if kind in _TEXT_TYPES or (kind is None and "text" in given):
        if not isinstance(given.get("text"), str):
            raise BadRowError("a text part of a message has no text")
        return _parse_text(given["text"])
    if kind in _IMAGE_TYPES or (kind is None and {"image", "image_url"} & given.keys()):
        keys = ("image", "image_url", "path", "url")
        names = [name for key in keys if key in given for name in names_in(given[key])]
        if len(set(names)) > 1:
            raise BadRowError("a part of a message names several images")
        return (_Picture(names[0] if names else None, _role_of(part)),)
    raise BadRowError("a part of a message is neither text nor image")


def _parse_text(text: str) -> tuple[str | _Picture, ...]:
    """A text, cut where it marks the place of a film."""
    try:
        parts = cut_at_marks(text)
    except UserError as error:
        raise BadRowError(str(error)) from None
    return tuple(_Picture() if part is None else part for part in parts)


def _split_turns(turns: Sequence[_Turn]) -> tuple[_Turn | None, list[_Turn], list[_Turn]]:
    """A system turn or none, the user's turns, the assistant's: as many, or none of one question."""
    rest = list(turns)
    system = rest.pop(0) if rest and rest[0].role == "system" else None
    roles = [turn.role for turn in rest]
    if not roles or "user" not in roles:
        raise BadRowError("no prompt (a user or human turn with text)")
    if roles[0] == "assistant":
        raise BadRowError("the assistant speaks before it is asked")
    if "system" in roles:
        raise BadRowError("a system turn that is not the first")
    for role, next_role in itertools.pairwise(roles):
        if role == next_role:
            raise BadRowError(f"two turns of the {role} follow each other")
    questions, answers = rest[::2], rest[1::2]
    if len(questions) > max(1, len(answers)):
        raise BadRowError("the last question has no answer")
    return system, questions, answers


def _ask(
    questions: Sequence[_Turn], films: tuple[NamedFilm, ...]
) -> tuple[list[str], tuple[NamedFilm, ...]]:
    """The questions, and the films in their order: the first says which is which, unless they have their places."""
    first, *later = questions
    texts = [turn.text for turn in questions]
    roles = [film.role for film in films if film.role is not None]
    try:
        in_order = prompts.sort_roles(roles) if roles else []
        if any(turn.pictures for turn in later):
            # In the words of the row: a mark that is left out would move its film to the first question.
            prompts.place_films(texts, len(films))
            return texts, films
        # A text that has places speaks of the films itself.
        if roles and not first.pictures:
            films = tuple(sorted(films, key=lambda film: in_order.index(film.role or "")))
            return [prompts.ask_of_roles(in_order, first.text), *texts[1:]], films
        return [prompts.mark_films(first.text, len(films)), *texts[1:]], films
    except UserError as error:
        raise BadRowError(str(error)) from None


# ---- Names of films --------------------------------------------------------------------------------


def names_in(value: Any) -> list[str]:
    """List the names of films that a value of a row holds: a name, {path: ..} as data sets write it, or a list.

    Raises:
        BadRowError: for anything else, a film as bytes included.
    """
    if is_null(value):
        return []
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, list):
        return [name for item in value for name in names_in(item)]
    if isinstance(value, dict):
        for key in ("path", "image", "url", "file_name"):
            if not is_null(value.get(key)) and not isinstance(value[key], dict):
                return names_in(value[key])
        if not is_null(value.get("bytes")):
            raise BadRowError(
                "the image is in the row itself: write it to a file, and its name here"
            )
    raise BadRowError("no image: what should name it is no name")


def _find_films(in_turn: list[_Picture], record: dict[str, Any]) -> tuple[NamedFilm, ...]:
    """The films of a row, named in the users' turns, beside the dialogue (`image`, `images`), or in both."""
    lists = [[picture.name for picture in in_turn if picture.name is not None]]
    if lists[0] and len(lists[0]) < len(in_turn):
        raise BadRowError("an image of the turn has a name, and another has none")
    # The roles that go with each list, if they stand there.
    roles_of_lists = [[picture.role for picture in in_turn]]
    for key in ("image", "images"):
        items = _items(record.get(key))
        lists.append([name for item in items for name in names_in(item)])
        roles_of_lists.append([_role_of(item) for item in items])
    _, one, several = lists
    # `image` may name the one of `images` that rows are known by.
    if len(one) == 1 and len(several) > 1 and one[0] in several:
        lists[1] = []
    lists = [names for names in lists if names]
    if len({len(names) for names in lists}) > 1:
        counts = " and ".join(str(len(names)) for names in lists)
        raise BadRowError(f"the keys of the row name {counts} images")
    # Each film by the names that the lists have at its place.
    films = list(zip(*lists, strict=True))
    roles = next((roles for roles in roles_of_lists if any(roles)), [None] * len(films))
    if any(roles) and (None in roles or len(roles) != len(films)):
        raise BadRowError("an image has a role, and another has none")
    return tuple(NamedFilm(names, role) for names, role in zip(films, roles, strict=True))


def _items(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [item for element in value for item in _items(element)]
    return [] if is_absent(value) else [value]


def _role_of(item: Any) -> str | None:
    """The role that an object names, or the one of its view and when (both may be left out)."""
    if not isinstance(item, dict):
        return None
    said = {key: item[key] for key in ("role", "view", "when") if not is_absent(item.get(key))}
    if not all(isinstance(word, str) for word in said.values()):
        raise BadRowError("the role, view or when of an image is not a text")
    if not said:
        return None
    role = said.get("role", "").strip().lower()
    if role and role not in prompts.ROLES:
        raise BadRowError(f"the role of an image is none of {', '.join(prompts.ROLES)}")
    view = views.view_of_text(said["view"]) if "view" in said else None
    # What is not said follows from the role; without one a film is a current frontal.
    when = said.get("when", prompts.ROLES[role].when if role else "current").strip().lower()
    if when not in ("current", "prior"):
        raise BadRowError('the when of an image is neither "current" nor "prior"')
    if "view" in said and view not in (views.FRONTAL, views.LATERAL):
        raise BadRowError("the view of an image is neither frontal nor lateral")
    seen = prompts.Role(view or (prompts.ROLES[role].view if role else views.FRONTAL), when)
    if role and prompts.ROLES[role] != seen:
        raise BadRowError(f"the role of an image is {role}, its view or when another")
    return next(name for name, meant in prompts.ROLES.items() if meant == seen)
