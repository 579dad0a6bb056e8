"""The text of one growing completion: cut at its limit and at stop texts, and told piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from cxr_jax.inference.requests import Completion, text_of
from cxr_jax.models.tokenizer import Tokenizer


class GrowingDecode:
    """The text of tokens that become more: what is settled is not decoded again.

    A byte-level tokenizer decodes the bytes of its tokens, one after the other; so behind a whole character, what comes
    adds its own text and changes nothing. Other tokenizers are asked for the whole text each time.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin with no token."""
        self.tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._adds_up = type(decoder).__name__ == "ByteLevel"
        self._settled_count, self._settled_text = 0, ""

    def of(self, token_ids: Sequence[int], count: int) -> str:
        """Give the text of the first `count` tokens, never fewer than before; the earlier ones must be the same."""
        text = self._settled_text + text_of(
            self.tokenizer, list(token_ids[self._settled_count : count])
        )
        # At its end a character may be split, or bytes may be none: these wait for what follows.
        if self._adds_up and not text.endswith("\ufffd"):
            self._settled_count, self._settled_text = count, text
        return text


class RowText:
    """What one row has drawn, and what of it has been told.

    With stop texts, what may be the beginning of one is held back, text and tokens, until it is known.

    Attributes:
        finish_reason: "stop", "length", or None while it grows.
    """

    def __init__(
        self, tokenizer: Tokenizer, opened: str, stop: Sequence[str], max_new_tokens: int
    ) -> None:
        """Begin with no token; the first piece begins with `opened`."""
        self.opened = opened
        self.stop = tuple(stop)
        self.max_new_tokens = max_new_tokens
        self.finish_reason: str | None = None
        # All that counts so far; a stop token is the last of them, and has no text.
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = opened
        self._decoded = GrowingDecode(tokenizer)
        self._told_text, self._told_tokens = 0, 0
        # Where the text of each token begins and ends, and all of it so far; known only where stop texts ask for it.
        self._whole = opened
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(
        self, token_ids: Sequence[int], logprobs: Sequence[float], has_stopped: bool
    ) -> tuple[str, list[int], list[float]]:
        """Take what a turn has drawn, and return what is to be told of it: (text, tokens, log-probs).

        Args:
            has_stopped: whether the last token is a stop token.
        """
        # The device counts in turns, and may have drawn beyond the limit.
        left = self.max_new_tokens - len(self.token_ids)
        is_stop = has_stopped and len(token_ids) <= left
        # What is beyond was drawn for nobody.
        self.token_ids += list(token_ids[:left])
        self.logprobs += list(logprobs[:left])
        # The stop token counts as a token, and shows no text.
        if is_stop:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = "length"
        self._grow(len(self.token_ids) - is_stop)
        return self._untold()

    def completion(self) -> Completion:
        """Give the whole, as `Model.generate` does."""
        assert self.finish_reason is not None, "it has not ended"
        return Completion(self.text, self.token_ids, self.logprobs, self.finish_reason, self.opened)

    # ---- Text ----------------------------------------------------------------------------------------------

    def _grow(self, count: int) -> None:
        """Read the text of the first `count` tokens, and cut it where a stop text ends."""
        # One decoding a token: only who has stop texts pays for it.
        for token_count in range(len(self._ends), count) if self.stop else ():
            # Each token of a character that is split has all of it: from its place to behind it.
            self._starts.append(len(self._whole.rstrip("\ufffd")))
            self._whole = self.opened + self._decoded.of(self.token_ids, token_count + 1)
            self._ends.append(len(self._whole))
        text = self.opened + self._decoded.of(self.token_ids, count)
        # A character that is split over tokens is held back until it is whole (as `GrowingText` has it).
        if self.finish_reason is None:
            text = text.rstrip("\ufffd")
        self.text = self._cut(text) if self.stop else text

    def _cut(self, text: str) -> str:
        # Not in what the template has opened: the model has not said that.
        matches = [
            (place + len(stop), place)
            for stop in self.stop
            if (place := text.find(stop, len(self.opened))) >= 0
        ]
        if not matches:
            return text
        # The one that is complete first, as if letters came one by one: turns of tokens must not show.
        _, place = min(matches)
        # A token counts if any of its text does.
        kept = sum(start < place for start in self._starts)
        self.token_ids, self.logprobs = self.token_ids[:kept], self.logprobs[:kept]
        self.finish_reason = "stop"
        return text[:place]

    # ---- Telling -------------------------------------------------------------------------------------------

    def _untold(self) -> tuple[str, list[int], list[float]]:
        text_end, token_end = len(self.text), len(self.token_ids)
        if self.stop and self.finish_reason is None:
            text_end -= self._held_back()
            token_end = sum(end <= text_end for end in self._ends)
        text = self.text[self._told_text : text_end]
        # Text and tokens may be told at different turns; both add up to the whole.
        new = slice(self._told_tokens, token_end)
        self._told_text = max(self._told_text, text_end)
        self._told_tokens = max(self._told_tokens, token_end)
        return text, self.token_ids[new], self.logprobs[new]

    def _held_back(self) -> int:
        """Count the letters at the end that a stop text may begin with."""
        # As in `_cut`: what the template has opened cannot begin a stop text.
        written = self.text[len(self.opened) :]
        return max(
            (
                size
                for stop in self.stop
                for size in range(1, min(len(stop), len(written) + 1))
                if written.endswith(stop[:size])
            ),
            default=0,
        )
