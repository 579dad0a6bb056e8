"""The JSON of a chat completion, whole or in pieces, from what the engine tells. No network, no threads."""

import json
from dataclasses import dataclass, field
from typing import Any

from cxr_jax.serve.asks import Done, Finished, Piece
from cxr_jax.serve.openai.reasoning import ReasoningSplitter, Split
from cxr_jax.serve.openai.token_texts import TokenTexts

DONE_LINE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class AnswerStyle:
    """What a client wants to see.

    Attributes:
        completion_id: of the answer.
        created: seconds since 1970.
        model: as the client called it.
        fingerprint: of weights and code.
        tokens: how tokens are written, or None without log-probs.
        is_split: whether reasoning comes in a field of its own.
        shows_reasoning: whether it comes at all.
        includes_usage: whether a stream ends with a chunk of counts.
    """

    completion_id: str
    created: int
    model: str
    fingerprint: str
    tokens: TokenTexts | None = None
    is_split: bool = False
    shows_reasoning: bool = True
    includes_usage: bool = False

    # A new dict each time: what is made from it is added to.
    def head(self, kind: str) -> dict[str, Any]:
        """The fields that every object of the answer begins with."""
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def logprobs(self, token_ids: list[int], values: list[float]) -> dict[str, Any] | None:
        """The log-probs of tokens in OpenAI's form, or None where nobody asked for them."""
        if self.tokens is None:
            return None
        # Only the token that was drawn: other candidates are not kept by the engine.
        content = [
            {**self.tokens.describe(token_id), "logprob": value, "top_logprobs": []}
            for token_id, value in zip(token_ids, values, strict=True)
        ]
        return {"content": content, "refusal": None}


@dataclass
class _Splitting:
    """The text of one completion, divided as the style says."""

    style: AnswerStyle
    splitter: ReasoningSplitter = field(default_factory=ReasoningSplitter)

    def add(self, text: str, *, is_last: bool = False) -> Split:
        """New text as (reasoning, content)."""
        # As the model wrote it: most clients fold the tags themselves.
        if not self.style.is_split and self.style.shows_reasoning:
            return Split("", text)
        split = self.splitter.add(text, is_last=is_last)
        return split if self.style.shows_reasoning else Split("", split.content)


def usage_of(done: Done) -> dict[str, Any]:
    """The counts of tokens in OpenAI's form."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


# ---- Whole -----------------------------------------------------------------------------------------


def whole_answer(
    style: AnswerStyle, finished: list[Finished], done: Done, warnings: list[str]
) -> dict[str, Any]:
    """Make the object `chat.completion`.

    Args:
        style: what the client wants to see.
        finished: all completions, in any order.
        done: the counts.
        warnings: about the films; left out where there are none.
    """
    # Clients take choices by their place in the list, whichever has ended first.
    choices = []
    for event in sorted(finished, key=lambda one: one.index):
        completion = event.completion
        split = _Splitting(style).add(completion.text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": split.content, "refusal": None}
        if style.is_split and style.shows_reasoning:
            # Both names are in use: vLLM renamed it, other servers and clients did not.
            message |= {"reasoning": split.reasoning, "reasoning_content": split.reasoning}
        choices.append(
            {
                "index": event.index,
                "message": message,
                "logprobs": style.logprobs(completion.token_ids, completion.logprobs),
                "finish_reason": completion.finish_reason,
            }
        )
    answer = {**style.head("chat.completion"), "choices": choices, "usage": usage_of(done)}
    # A field that OpenAI does not have: its clients keep it, and show it to whoever looks.
    return {**answer, "warnings": warnings} if warnings else answer


# ---- In pieces -------------------------------------------------------------------------------------


class ChunkWriter:
    """Turns the events of one ask into the lines of a stream, in vLLM's order: a role for each choice, text, the
    reason why it ended, then the counts."""

    def __init__(self, style: AnswerStyle, choice_count: int) -> None:
        """Begin a stream of so many choices."""
        self.style = style
        self._texts = [_Splitting(style) for _ in range(choice_count)]

    def first(self) -> bytes:
        """The chunks that open every choice."""
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(index, role) for index in range(len(self._texts)))

    def piece(self, event: Piece) -> bytes:
        """The chunk of new text; nothing while it is held back."""
        split = self._texts[event.index].add(event.text)
        logprobs = self.style.logprobs(event.token_ids, event.logprobs)
        delta = self._delta(split)
        # Tokens without a text still have log-probs, which belong to a chunk of empty text.
        if not delta and not (logprobs and event.token_ids):
            return b""
        return self._chunk(event.index, delta or {"content": ""}, logprobs=logprobs)

    def finished(self, event: Finished) -> bytes:
        """What was held back, and the reason why the choice has ended."""
        # Half a tag at the very end was text after all.
        delta = self._delta(self._texts[event.index].add("", is_last=True))
        rest = self._chunk(event.index, delta) if delta else b""
        return rest + self._chunk(event.index, {}, reason=event.completion.finish_reason)

    def done(self, event: Done) -> bytes:
        """The end of the stream."""
        # Clients that asked for no counts may not know a chunk without choices.
        if not self.style.includes_usage:
            return DONE_LINE
        head = self.style.head("chat.completion.chunk")
        return line_of({**head, "choices": [], "usage": usage_of(event)}) + DONE_LINE

    def _delta(self, split: Split) -> dict[str, str]:
        delta: dict[str, str] = {}
        # Empty fields are left out: some clients take any content as the end of the reasoning.
        if split.reasoning:
            delta |= {"reasoning": split.reasoning, "reasoning_content": split.reasoning}
        if split.content:
            delta["content"] = split.content
        return delta

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        *,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        chunk: dict[str, Any] = {
            **self.style.head("chat.completion.chunk"),
            "choices": [
                {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            ],
        }
        # With usage asked for, it is null in every chunk but its own.
        if self.style.includes_usage:
            chunk["usage"] = None
        return line_of(chunk)


def line_of(value: dict[str, Any]) -> bytes:
    """One event of a stream. JSON escapes line ends, so that no text can end the event."""
    # ASCII alone: no proxy can cut a character, and U+2028 ends no line.
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
