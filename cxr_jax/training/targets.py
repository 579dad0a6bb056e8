"""Target texts as token ids: what SFT imitates, and RL replays."""

import re
from collections.abc import Sequence

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.models import plain_text
from cxr_jax.models.markers import markers_of
from cxr_jax.models.tokenizer import Tokenizer


def continuation(target: str, opened: str) -> str:
    """Give what is left to write of a target where the chat template has opened the model's turn.

    What the template has said is left out of the front of the target, whatever white space stands there; a target that
    already goes on from it stays as it is.

    Args:
        target: the whole of what the model should say, or what follows on `opened`.
        opened: see `RenderedPrompt`.

    Raises:
        UserError: if the two do not go together (a trace behind a closed trace, or none in an open one), or if the
            target spells the place of an image.
    """
    plain_text.refuse_placeholders(target, "a target text")
    # Exactly so: nothing is to be decided about white space.
    if target.startswith(opened):
        return target[len(opened) :]
    pattern = r"\s*" + r"\s*".join(map(re.escape, opened.split()))
    # Behind it white space is the template's to say, if it says any.
    if repeated := re.match(pattern + (r"\s*" if opened[-1].isspace() else ""), target):
        return target[repeated.end() :]
    # A target that goes on by itself: is its trace where the template has left off?
    has_trace = "<think>" in opened
    is_open = has_trace and "</think>" not in opened
    closes = target.count("</think>")
    if has_trace and ("<think>" in target or closes != int(is_open)):
        raise UserError(
            f"the target text does not go on from {opened!r}, with which the chat template opens the answer"
        )
    return target


class Completions:
    """Encodes target texts as ids of one fixed shape, each ending in the end-of-turn token."""

    def __init__(self, tokenizer: Tokenizer, max_completion: int) -> None:
        """Look up the tokens that end and fill a row.

        Args:
            max_completion: tokens of a row, C.
        """
        self.tokenizer, self.max_completion = tokenizer, max_completion
        vocabulary, markers = tokenizer.get_vocab(), markers_of(tokenizer)
        self.stop = vocabulary[markers.end_of_turn]
        self.pad = vocabulary[markers.padding]

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts that the model is to write, without their end; see `encode`."""
        return plain_text.encode_texts(self.tokenizer, texts, plain_text.MODEL_TOKENS)

    def encode(self, texts: Sequence[str], opened: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Encode one text a row.

        The tags of the answer format are the tokens that they are to the model; other special tokens that a text
        spells stay text (`plain_text`).

        Args:
            opened: what the prompt of each has opened (`RenderedPrompt.opened`), which its target does not repeat.

        Returns:
            As `fill`.

        Raises:
            UserError: for a text longer than C, one that spells the place of an image, or see `continuation`.
        """
        pairs = zip(texts, opened or [""] * len(texts), strict=True)
        to_write = [continuation(text, row_opened) for text, row_opened in pairs]
        rows = [[*text_ids, self.stop] for text_ids in self.token_ids(to_write)]
        return self.fill(rows, [[True] * len(row) for row in rows])

    def fill(
        self, rows: Sequence[list[int]], trained: Sequence[list[bool]]
    ) -> dict[str, np.ndarray]:
        """Bring rows of tokens into one shape.

        Args:
            rows: what follows each prompt.
            trained: of each token, whether it is the model's to say.

        Returns:
            "completions" int32 [B, C], "lengths" int32 [B], the tokens of each row, and "mask" bool [B, C], those that
            train.

        Raises:
            UserError: for a row longer than C.
        """
        completions = np.full((len(rows), self.max_completion), self.pad, np.int32)
        mask = np.zeros(completions.shape, bool)
        lengths = np.array([len(row) for row in rows], np.int32)
        for index, (row, row_trained) in enumerate(zip(rows, trained, strict=True)):
            if len(row) > self.max_completion:
                raise UserError(
                    f"a target text has {len(row)} tokens, more than config.max_completion={self.max_completion}"
                )
            completions[index, : len(row)] = row
            mask[index, : len(row)] = row_trained
        return {"completions": completions, "lengths": lengths, "mask": mask}
