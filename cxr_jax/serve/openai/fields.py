"""The fields of a chat completion: which are read, which are refused, and within what bounds.

pydantic reads the types; what it refuses is told in OpenAI's form, with the field as `param`. A name that is known and
asks for something that is not done here is refused, never skipped: a client that asked for JSON and got prose would
parse garbage. Names that nobody here knows are skipped, and listed in the header X-Ignored-Fields.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
)

from cxr_jax.serve.limits import Limits
from cxr_jax.serve.openai.json_bodies import field_name
from cxr_jax.serve.refusals import RefusedError

# ---- What is refused, and the values that ask for nothing ------------------------------------------

# Name -> values beside null that are as if it were not there.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning": (),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "stop_token_ids": ([],),
    "store": (False,),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
# Read, and without any effect on the answer: who is asking, and how it is billed elsewhere.
_WITHOUT_EFFECT = frozenset(
    ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata")
)
_MOST_IGNORED_NAMES = 20  # that are listed

# ---- What is read ----------------------------------------------------------------------------------


def _as_parts(content: Any) -> Any:
    """A text alone is a list of one part: so there is one form, and one place that an error can name."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class TextPart(_Part):
    """A piece of text of a message."""

    type: Literal["text"]
    text: StrictStr


class ImageUrl(_Part):
    """Where a film is: in the request itself, as a data URL."""

    url: StrictStr


class ImagePart(_Part):
    """A film of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Part):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        BeforeValidator(_as_parts),
    ]


class StreamOptions(_Part):
    """What a stream has beside the text."""

    include_usage: StrictBool | None = None


class JsonSchema(_Part):
    """A schema by its name and its content."""

    name: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None
    description: StrictStr | None = None


class ResponseFormat(_Part):
    """The form of the answer."""

    type: Literal["text", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(BaseModel):
    """A chat completion as it is asked for; bounds that depend on the server are checked by `read_request`."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1)] | None = None
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] | None = None
    n: Annotated[int, Field(strict=True, ge=1)] | None = None
    stop: Annotated[list[StrictStr] | None, BeforeValidator(_as_list)] = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    logprobs: StrictBool | None = None
    response_format: ResponseFormat | None = None
    include_reasoning: StrictBool | None = None
    reasoning_format: Literal["tags", "split"] | None = None
    read_anyway: StrictBool | None = None
    image_roles: list[StrictStr] | None = None

    def new_tokens(self, default: int) -> int:
        """`max_completion_tokens`, or its old name."""
        return self.max_completion_tokens or self.max_tokens or default


# ---- From a parsed body ----------------------------------------------------------------------------


def read_request(body: dict[str, Any], limits: Limits) -> tuple[ChatRequest, list[str]]:
    """Read the fields of a body.

    Returns:
        The request, and the names that were skipped, fit for a header.

    Raises:
        RefusedError: 400, which names the field.
    """
    # Before types: a tool that is misspelt is refused for being a tool.
    _refuse_unsupported(body)
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise _as_refusal(error) from None
    _check_bounds(request, limits)
    # Each once, in the order in which they came.
    names = dict.fromkeys(field_name(name) for name in _ignored_names(request))
    return request, list(names)[:_MOST_IGNORED_NAMES]


def _refuse_unsupported(body: dict[str, Any]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        # Null is what clients send for a field that nobody has set.
        value = body.get(name)
        # By type as well: to Python 0 is False, and 1 True.
        is_harmless = any(
            value == other and isinstance(value, bool) == isinstance(other, bool)
            for other in harmless
        )
        if value is not None and not is_harmless:
            raise RefusedError(400, f"{name} is not supported", name, code="unsupported_parameter")


def _as_refusal(error: ValidationError) -> RefusedError:
    """Tell the first thing that pydantic refused, without the value, which it would quote."""
    # One at a time, as OpenAI does; the rest may follow from it.
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param, was_index = "", False
    for place in first["loc"]:
        # Behind the number of a part pydantic names its kind, which is no field.
        is_field = isinstance(place, str) and not (was_index and place in ("text", "image_url"))
        if isinstance(place, int):
            param += f"[{place}]"
        elif is_field:
            param += f".{place}" if param else place
        was_index = isinstance(place, int)
    message = first["msg"]
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        message = "a part must have the type text or image_url"
    return RefusedError(400, f"{param or 'the body'}: {message}", param or None)


def _check_bounds(request: ChatRequest, limits: Limits) -> None:
    """Hold what has been read to the server's limits, and fields to each other."""
    for name, problem in _problems(request, limits):
        raise RefusedError(400, f"{name}: {problem}", name)


def _problems(request: ChatRequest, limits: Limits) -> Iterator[tuple[str, str]]:
    # ---- How long and how many ----
    both = (request.max_completion_tokens, request.max_tokens)
    if None not in both and both[0] != both[1]:
        yield "max_tokens", "differs from max_completion_tokens, which is its new name: give one"
    if request.new_tokens(1) > limits.new_tokens:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        yield name, f"at most {limits.new_tokens}"
    if (request.n or 1) > limits.completions:
        yield "n", f"at most {limits.completions}"
    # vLLM takes 0 for all, others for greedy: nobody can mean both.
    if request.top_k == 0:
        yield "top_k", "at least 1, or -1 for all tokens"
    # ---- What ends a completion ----
    if len(request.stop or ()) > limits.stop_texts:
        yield "stop", f"at most {limits.stop_texts} texts"
    if not all(0 < len(text) <= 200 for text in request.stop or ()):
        yield "stop", "each text must have from 1 to 200 characters"
    # ---- Fields that mean something only beside others ----
    if request.stream_options is not None and not request.stream:
        yield "stream_options", "only with stream=true"
    if request.logprobs and request.include_reasoning is False:
        yield "logprobs", "would show the tokens of the reasoning that include_reasoning hides"
    # ---- The conversation as a whole ----
    if len(request.messages) > limits.messages:
        yield "messages", f"at most {limits.messages} messages"
    if request.messages[-1].role != "user":
        yield "messages", "the last one must be a user's"


def _ignored_names(request: ChatRequest) -> Iterator[str]:
    """Every name that nothing has read, with its place."""
    # At the top; names with an agreed meaning that changes nothing are not worth a line.
    yield from (name for name in request.model_extra or {} if not _is_known(name))
    for message_number, message in enumerate(request.messages):
        yield from (f"messages[{message_number}].{name}" for name in message.model_extra or {})
        # Of a part, and of what it holds: `detail` of an image changes nothing here.
        for part_number, part in enumerate(message.content):
            place = f"messages[{message_number}].content[{part_number}]"
            yield from (f"{place}.{name}" for name in part.model_extra or {})
            if isinstance(part, ImagePart):
                yield from (
                    f"{place}.image_url.{name}" for name in part.image_url.model_extra or {}
                )
    if request.stream_options is not None:
        yield from (f"stream_options.{name}" for name in request.stream_options.model_extra or {})


def _is_known(name: str) -> bool:
    return name in _UNSUPPORTED or name in _WITHOUT_EFFECT
