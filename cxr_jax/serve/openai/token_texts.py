"""How single tokens are written in log-probs: their bytes, which may be part of a character, and a text."""

from typing import Any

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.inference.requests import text_of
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.models.tokenizer import Tokenizer


class TokenTexts:
    """The texts of a tokenizer's tokens, made once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the table of bytes, as far as this kind of tokenizer has one."""
        self._tokenizer = tokenizer
        self._known: dict[int, dict[str, Any]] = {}
        try:
            table = TokenBytes.from_tokenizer(tokenizer)
        except UserError:  # of another kind: its tokens are decoded one by one
            self._bytes: np.ndarray | None = None
            return
        self._bytes = np.asarray(table.data)
        self._offsets, self._lengths = np.asarray(table.offset), np.asarray(table.length)

    def describe(self, token_id: int) -> dict[str, Any]:
        """{"token", "bytes"} of one token; a token without bytes, such as the one that ends a turn, has null."""
        # Few tokens are ever drawn, and those again and again.
        if token_id not in self._known:
            self._known[token_id] = self._describe(token_id)
        return self._known[token_id]

    def _describe(self, token_id: int) -> dict[str, Any]:
        if self._bytes is not None and token_id < len(self._lengths) and self._lengths[token_id]:
            first = self._offsets[token_id]
            token_bytes = self._bytes[first : first + self._lengths[token_id]].tobytes()
            return {"token": token_bytes.decode("utf-8", "replace"), "bytes": list(token_bytes)}
        # Such tokens stand for nothing in a text; their own name tells what they are.
        text = text_of(self._tokenizer, [token_id])
        return {"token": text, "bytes": None if self._bytes is not None else list(text.encode())}
