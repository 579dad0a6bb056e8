"""Texts of people and of data as token ids: what spells a special token there stays text.

A tokenizer looks for its added tokens (`<|im_end|>`, `<think>`) in any text, whoever wrote it, so a question that
quotes one would end its own turn. Here such a spelling is broken by a mark before the chat template is rendered; after
it, the template's own tokens are looked up, and what stands between them is encoded by the same tokenizer without any
added token: `<`, `|`, `im` .., as `transformers` does with `split_special_tokens=True`. A text without such a spelling
is encoded as ever.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from cxr_jax.errors import UserError
from cxr_jax.models.markers import PLACEHOLDERS
from cxr_jax.models.tokenizer import FORMAT_TAGS, Tokenizer

# Noncharacters of Unicode: no text that is meant to be read holds them.
_MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
# What the model itself writes may hold the tags of its format as the tokens that they are to it; nothing else may.
MODEL_TOKENS = FORMAT_TAGS


class _AddedTokens:
    """The added tokens of a tokenizer, and the tokenizer without them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                "the tokenizer is no fast one: special tokens in a text cannot be split"
            )
        added = backend.get_added_tokens_decoder()
        # Of tokens that begin alike the longest is found, as in the tokenizer itself.
        in_order = sorted(added.items(), key=lambda item: -len(item[1].content))
        self.ids = [token_id for token_id, _ in in_order]
        # Runs of spaces and of line ends are words like others to the tokenizers that have them.
        self.spelled = {
            token.content: token_id for token_id, token in in_order if token.content.strip()[1:]
        }
        self.found = re.compile("|".join(f"({_pattern(token)})" for _, token in in_order) or "(?!)")
        self._backend = backend

    @functools.cached_property
    def plain(self) -> Any:
        """The same words and merges, and no added token. Takes a second for a large vocabulary, once."""
        import tokenizers

        parts = json.loads(self._backend.to_str())
        # What comes after encoding may name an added token, and adds none of the text's.
        parts.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        return tokenizers.Tokenizer.from_str(json.dumps(parts))


def _pattern(token: Any) -> str:
    """Where the tokenizer finds an added token, by its flags."""
    # Literally, and at the borders as the library's flags have it.
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return before + pattern + after


@functools.lru_cache(maxsize=8)
def _added_tokens(tokenizer: Tokenizer) -> _AddedTokens:
    return _AddedTokens(tokenizer)


@functools.lru_cache(maxsize=16)
def _spelling(tokenizer: Tokenizer, allowed: tuple[str, ...]) -> re.Pattern[str]:
    """The first character of each place where a token is spelled, overlapping ones included; group 1 is the token."""
    names = [name for name in _added_tokens(tokenizer).spelled if name not in allowed]
    spelled = "|".join(map(re.escape, names)) or "(?!)"
    return re.compile(f"(?=({spelled})).", re.DOTALL)


def control_tokens(tokenizer: Tokenizer) -> set[str]:
    """Give the texts of the tokens that decoding skips, but for the tags, which are text whatever a tokenizer says."""
    decoder = tokenizer.added_tokens_decoder
    named = {token.content for token in decoder.values() if token.special}
    return (named | set(tokenizer.all_special_tokens)) - set(FORMAT_TAGS)


def spelled_tokens(tokenizer: Tokenizer, text: str, allowed: Sequence[str] = ()) -> list[str]:
    """List the added tokens that a text spells, each once, but for those that it may hold."""
    found = _spelling(tokenizer, tuple(allowed)).finditer(text)
    return list(dict.fromkeys(match.group(1) for match in found))


def refuse_placeholders(text: str, name: str) -> None:
    """Refuse a text that spells the place of an image: whoever wrote it expects one there.

    Args:
        name: what the message calls the text.

    Raises:
        UserError: naming the placeholder.
    """
    # By the text: a tokenizer may not have the token, and the writer meant it all the same.
    for placeholder, kind in PLACEHOLDERS.items():
        if placeholder in text:
            raise UserError(
                f"{name} must not hold placeholders of its own: {placeholder} is {kind} placeholder"
            )


# ---- Marked texts ------------------------------------------------------------------------------------------


def choose_mark(texts: Iterable[str]) -> str:
    """Choose a character that none of the texts holds. Raises UserError if there is none."""
    # One for all texts of a prompt: after the template nobody knows whose text a place is in.
    joined = "".join(texts)
    for mark in _MARKS:
        if mark not in joined:
            return mark
    raise UserError("the text holds all noncharacters of Unicode (U+FDD0 to U+FDEF)")


def break_tokens(tokenizer: Tokenizer, text: str, mark: str, allowed: Sequence[str] = ()) -> str:
    """Put the mark behind the first character of each added token that a text spells, but for those allowed."""
    # Behind the first character: what is left of the spelling is no token, whatever stands before it.
    pattern = _spelling(tokenizer, tuple(allowed))
    return pattern.sub(lambda match: match.group() + mark, text)


def encode_marked(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    """Encode a text in which `break_tokens` has broken what is no token."""
    if mark not in text:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # ---- The template's own tokens, and plain text between them ----
    added = _added_tokens(tokenizer)
    token_ids: list[int] = []
    place = 0

    def add_plain(piece: str) -> None:
        plain_ids = added.plain.encode(piece.replace(mark, ""), add_special_tokens=False).ids
        # A vocabulary may hold a special token as a word, too.
        if not set(plain_ids).isdisjoint(added.spelled.values()):
            raise UserError("the tokenizer cannot write its special tokens as plain text")
        token_ids.extend(plain_ids)

    for match in added.found.finditer(text):
        add_plain(text[place : match.start()])
        assert match.lastindex is not None, "every token is a group"
        token_ids.append(added.ids[match.lastindex - 1])
        place = match.end()
    add_plain(text[place:])
    return token_ids


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], allowed: Sequence[str] = ()
) -> list[list[int]]:
    """Encode texts that no template surrounds.

    Args:
        allowed: added tokens that they may hold as such.
    """
    mark = choose_mark(texts)
    marked = [break_tokens(tokenizer, text, mark, allowed) for text in texts]
    # All at once, as long as none spells a token: the usual case.
    if marked == list(texts):
        return list(tokenizer(marked, add_special_tokens=False)["input_ids"])
    return [encode_marked(tokenizer, text, mark) for text in marked]
