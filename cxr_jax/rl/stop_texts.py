"""Texts that end a completion (`config.rl.stop`): found in token ids, inside the decode loop, however they are cut.

What a completion reads so far moves an automaton over its bytes, which knows the longest beginning of a stop text that
the bytes end with. Compiled for whole tokens, it is a table that the loop looks one number a row up in: exact for every
tokenisation of a text, for texts that begin inside one token and end inside another, and for those that overlap.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels import automaton
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.labels.automaton import Array
from cxr_jax.models.plain_text import control_tokens
from cxr_jax.models.tokenizer import Tokenizer

MOST_BYTES = 255
"""Of all stop texts together: states of the automaton are few, and its table stays small."""


def check_stop_texts(texts: Any) -> None:
    """Refuse stop texts that cannot be found.

    Raises:
        UserError: naming the first that is wrong and why.
    """
    name = "config.rl.stop"
    if not isinstance(texts, (tuple, list)):
        raise UserError(f"{name}={texts!r} must be a tuple of texts, as in ('</answer>',)")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise UserError(f"{name} holds {text!r}: must be texts of one character or more")
        # What no completion decodes to: halves of characters, and the sign for bytes that are none.
        if "\ufffd" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{name} holds {text!a}, which has a character that no token writes")
    if (size := sum(len(text.encode()) for text in texts)) > MOST_BYTES:
        raise UserError(f"{name} holds {size} bytes of text, more than {MOST_BYTES}")


def check_stop_texts_are_written(texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Refuse stop texts with a token that decoding skips: completions show nothing of it.

    Raises:
        UserError: naming the first.
    """
    for text in texts:
        for token in sorted(control_tokens(tokenizer)):
            if token in text:
                raise UserError(
                    f"config.rl.stop holds {text!r}: {token} is a special token, which shows no text; "
                    "the model's own end of turn ends completions as it is"
                )


class StopTexts(NamedTuple):
    """The automaton over token ids, for `sampling.generate`; a pytree of arrays.

    Attributes:
        classes: int32 [V]: tokens that lead everywhere to the same are of one class.
        next: int32 [S, C]: the state after a token; 0 is the first, the last one that of a text which is complete.
    """

    classes: Array
    next: Array

    @classmethod
    def compile(cls, texts: Sequence[str], table: TokenBytes, vocab_size: int) -> "StopTexts":
        """Compile the automaton of some texts.

        Args:
            texts: as `check_stop_texts` lets through, at least one.
            table: the bytes of each token id; ids outside it stand for nothing.
            vocab_size: ids that may be drawn.
        """
        after_byte = _byte_machine([text.encode() for text in texts])
        state_count, token_count = len(after_byte), min(vocab_size, len(table.length))
        data, offset, length = (np.asarray(array) for array in table)
        # Through every token from every state, a byte of all tokens at a time; most tokens are short.
        after = np.repeat(np.arange(state_count, dtype=np.uint8)[None], vocab_size, axis=0)
        for place in range(length[:token_count].max(initial=0)):
            longer = np.flatnonzero(length[:token_count] > place)
            next_bytes = data[offset[longer] + place]
            after[longer] = after_byte[after[longer], next_bytes[:, None]]
        # Tokens are few kinds of behaviour: a dict of them, since sorting so many rows takes seconds.
        numbers: dict[bytes, int] = {}
        classes = [numbers.setdefault(row.tobytes(), len(numbers)) for row in after]
        behaviours = np.frombuffer(b"".join(numbers), np.uint8).reshape(-1, state_count)
        return cls(np.array(classes, np.int32), behaviours.T.astype(np.int32))

    def init(self, rows: int) -> jax.Array:
        """Make the state of `rows` completions before their first token."""
        return jnp.zeros(rows, jnp.int32)

    def advance(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """Take one more token int32 [R] of each row."""
        return jnp.asarray(self.next)[state, jnp.asarray(self.classes)[token]]

    def is_complete(self, state: jax.Array) -> jax.Array:
        """Tell which rows hold a stop text, bool [R]."""
        return state == self.next.shape[0] - 1


def _byte_machine(texts: Sequence[bytes]) -> np.ndarray:
    """uint8 [S, 256]: the state after each byte; state 0 is the first, the last one that of a complete text."""
    # A state is the longest beginning of a text that was read last; None, for good, once one is complete.
    beginnings = {text[:size] for text in texts for size in range(len(text))}

    def step(state: bytes | None, byte: int) -> tuple[bytes | None, int]:
        if state is None:
            return None, 0
        longer = state + bytes([byte])
        if longer.endswith(tuple(texts)):
            return None, 0
        # At the worst the empty one.
        ends = (longer[start:] for start in range(len(longer) + 1))
        return next(end for end in ends if end in beginnings), 0

    start: bytes | None = b""
    machine = automaton.compile_machine(
        start, step, lambda state: int(state is None), told_apart=b"".join(texts)
    )
    # The complete one goes to the end; it was found somewhere among the others.
    complete, last = int(np.argmax(machine.final)), len(machine.final) - 1
    place = np.arange(last + 1)
    place[[complete, last]] = last, complete
    return place[machine.next][place].astype(np.uint8)
