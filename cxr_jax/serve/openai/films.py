"""Films of a request: data URLs to pictures that a reader may look at, by the readers that all doors use."""

import base64
import binascii
import hashlib
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from cxr_jax.data import images
from cxr_jax.data.prompts import IMAGE_MARK, asks_nothing, sort_roles
from cxr_jax.data.radiograph import DICOM_MAGIC, JPEG_MAGIC, PNG_MAGIC, Image
from cxr_jax.errors import UserError
from cxr_jax.inference.reading import Film, ask_of, check_usable, study_of
from cxr_jax.serve.limits import Limits
from cxr_jax.serve.openai.fields import ChatRequest, ImagePart
from cxr_jax.serve.refusals import RefusedError

# Of a data URL; parameters such as charset have no meaning for these types.
_DATA_URL = re.compile(r"data:(image/png|image/jpeg|image/jpg|application/dicom);base64,", re.ASCII)
_URL_SHOWN = "data:image/png, data:image/jpeg or data:application/dicom in base64"
# What the command line's messages name and an API has under other names.
_FLAG_REMARK = re.compile(r" \((--[a-z_]+)(?:=warn)? reads it all the same\)$")


class PlacedFilm(NamedTuple):
    """A film of the conversation, still as a text: where it stands in the request, and its data URL."""

    param: str
    url: str


class Conversation(NamedTuple):
    """The turns as `Model.generate` takes them, and the films in the order of their places."""

    messages: list[dict[str, str]]
    films: list[PlacedFilm]


# ---- Where films and texts stand -------------------------------------------------------------------


def conversation_of(
    request: ChatRequest, limits: Limits, *, several: bool, why_not_several: str
) -> Conversation:
    """Take the films out of the messages, with marks of their places left in the texts.

    Args:
        request: as it was read.
        limits: of films and texts.
        several: whether the model reads several films together.
        why_not_several: the reason, if it does not.

    Raises:
        RefusedError: 400 for films where none may stand, too many, and texts that are too long or ask nothing.
    """
    films: list[PlacedFilm] = []
    messages: list[dict[str, str]] = []
    characters = 0
    for message_number, message in enumerate(request.messages):
        parts: list[str | None] = []
        # A place in the list for every part, so that films keep their order among the words.
        for part_number, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                place = f"messages[{message_number}].content[{part_number}].image_url"
                _check_place(place, message.role, [turn["role"] for turn in messages])
                films.append(PlacedFilm(f"{place}.url", part.image_url.url))
                parts.append(None)
            else:
                parts.append(part.text)
        text = _marked(parts)
        characters += len(text)
        # The tokenizer takes a time that grows with the text, on a thread that others share.
        if characters > limits.prompt_characters:
            raise RefusedError(
                400,
                f"messages: more than {limits.prompt_characters:,} characters of text",
                "messages",
                code="context_length_exceeded",
            )
        messages.append({"role": message.role, "content": text})
    if asks_nothing(messages[-1]["content"]):
        raise RefusedError(400, "messages: the last one asks nothing", "messages")
    _check_count(films, limits, several=several, why_not_several=why_not_several)
    return Conversation(messages, films)


def _check_place(place: str, role: str, roles_before: Sequence[str]) -> None:
    if role != "user":
        raise RefusedError(400, f"{place}: a film may stand in a user's message only", place)
    # A film that comes later would move what was read before it; no model here was trained on that.
    if "user" in roles_before:
        raise RefusedError(400, f"{place}: films may stand in the first user's message only", place)


def _check_count(
    films: Sequence[PlacedFilm], limits: Limits, *, several: bool, why_not_several: str
) -> None:
    if len(films) > 1 and not several:
        place = films[1].param
        raise RefusedError(400, f"{place}: a second film is not read: {why_not_several}", place)
    if len(films) > limits.images:
        place = films[limits.images].param
        raise RefusedError(400, f"{place}: at most {limits.images} films", place)


def _marked(parts: Sequence[str | None]) -> str:
    """A turn's text; its films are marked where they do not stand before all text, as they do without marks."""
    # Without a mark where none is needed, so that the prompt is the one that people write elsewhere.
    film_count = parts.count(None)
    if all(part is None for part in parts[:film_count]):
        return "".join(part for part in parts if part is not None)
    return "".join(IMAGE_MARK if part is None else part for part in parts)


# ---- From a data URL to pixels ---------------------------------------------------------------------


def read_films(films: Sequence[PlacedFilm], request: ChatRequest, limits: Limits) -> list[Film]:
    """Decode and judge the films; takes up to seconds, so it is called in a thread.

    Raises:
        RefusedError: 400 with the field and the reason.
    """
    # All before any is judged: what a film is to the others says what it is held to be.
    loaded = [_read(film, limits) for film in films]
    roles = request.image_roles
    if roles is not None and len(roles) != len(films):
        raise RefusedError(
            400, f"image_roles: {len(roles)} roles, {len(films)} films", "image_roles"
        )
    read: list[Film] = []
    # Roles say that a film is the lateral or the prior one; without them every film is held to be frontal.
    if roles is None:
        read = [Film(film.param, image) for film, image in zip(films, loaded, strict=True)]
    elif films:
        try:
            read = study_of([film.param for film in films], loaded, _known(roles), in_order=False)
        except UserError as error:
            raise RefusedError(400, f"image_roles: {error}", "image_roles") from None
    for film in read:
        _judge(film, read_anyway=bool(request.read_anyway))
    return read


def question_about(films: Sequence[Film], messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Write into the first user's turn which film is which, where roles were given."""
    # Films stand in the first one only, see `_check_place`.
    message_number = next(
        message_number
        for message_number, message in enumerate(messages)
        if message["role"] == "user"
    )
    asked = {
        **messages[message_number],
        "content": ask_of(films, messages[message_number]["content"]),
    }
    return [*messages[:message_number], asked, *messages[message_number + 1 :]]


def _known(roles: Sequence[str]) -> list[str]:
    sort_roles(roles)  # raises UserError for names that are none
    if "frontal" not in roles:
        raise UserError("frontal must be among them: it is the film that is asked about")
    return list(roles)


def _read(film: PlacedFilm, limits: Limits) -> Image:
    file_bytes = _decoded(film, limits)
    try:
        with warnings.catch_warnings():
            # Libraries warn with values of headers.
            warnings.simplefilter("ignore")
            image = images.image_from_bytes(film.param, file_bytes)
    except UserError as error:
        raise RefusedError(400, str(error), film.param, code="invalid_image") from None
    # Documents name a film by its bytes.
    image.meta["sha256"] = hashlib.sha256(file_bytes).hexdigest()
    return image


def _decoded(film: PlacedFilm, limits: Limits) -> bytes:
    """The bytes of a data URL. Nothing is fetched: any other URL is refused before it is looked at."""
    header = _DATA_URL.match(film.url)
    if header is None:
        raise RefusedError(
            400,
            f"{film.param}: no URL is fetched: give {_URL_SHOWN}",
            film.param,
            code="invalid_image_url",
        )
    # By the length of the text, before its bytes take memory a second time.
    encoded = film.url[header.end() :]
    if len(encoded) > (limits.image_bytes + 2) // 3 * 4:
        raise RefusedError(
            400,
            f"{film.param}: above the limit of {limits.image_bytes // 2**20} MiB",
            film.param,
            code="image_too_large",
        )
    try:
        file_bytes = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(
            400, f"{film.param}: damaged base64", film.param, code="invalid_image_url"
        ) from None
    _check_kind(film.param, header.group(1), file_bytes)
    return file_bytes


def _check_kind(param: str, said_kind: str, file_bytes: bytes) -> None:
    """Refuse a file that is of another kind than its URL says: what a client believes it sends, it did not."""
    is_picture = {
        "image/png": file_bytes.startswith(PNG_MAGIC),
        "image/jpeg": file_bytes.startswith(JPEG_MAGIC),
        "image/jpg": file_bytes.startswith(JPEG_MAGIC),
        # Old ones have no preamble; the reader knows them.
        "application/dicom": file_bytes[128:132] == DICOM_MAGIC
        or not file_bytes.startswith((PNG_MAGIC, JPEG_MAGIC)),
    }
    if not is_picture[said_kind]:
        raise RefusedError(400, f"{param}: the data is no {said_kind}", param, code="invalid_image")


def _judge(film: Film, *, read_anyway: bool) -> None:
    """Refuse what is no chest film fit to be read, with the reason in words."""
    try:
        check_usable(film.path, film.image, read_anyway)
    except UserError as error:
        # The message is made for the command line: of its flags only one has a counterpart here.
        reason = _FLAG_REMARK.sub(" (read_anyway: true reads it all the same)", str(error))
        raise RefusedError(400, reason, str(film.path), code="unusable_image") from None
