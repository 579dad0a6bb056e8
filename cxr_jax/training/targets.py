"""Target texts as token ids: what SFT imitates, and RL replays."""

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.models.tokenizer import Tokenizer


class Completions:
    """Encodes target texts as ids of one fixed shape, each ending in the end-of-turn token."""

    def __init__(self, tokenizer: Tokenizer, max_completion: int) -> None:
        """Look up the tokens that end and fill a row.

        Args:
            max_completion: tokens of a row, C.
        """
        self.tokenizer, self.max_completion = tokenizer, max_completion
        vocabulary = tokenizer.get_vocab()
        self.stop = vocabulary["<|im_end|>"]
        self.pad = vocabulary["<|endoftext|>"]

    def encode(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Encode one text a row.

        Returns:
            "completions" int32 [B, C] and "mask" bool [B, C].

        Raises:
            UserError: for a text longer than C.
        """
        completions = np.full((len(texts), self.max_completion), self.pad, np.int32)
        mask = np.zeros(completions.shape, bool)
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for index, text_ids in enumerate(encoded):
            length = len(text_ids) + 1
            if length > self.max_completion:
                raise UserError(
                    f"a target text has {length} tokens, more than config.max_completion={self.max_completion}"
                )
            completions[index, :length] = [*text_ids, self.stop]
            mask[index, :length] = True
        return {"completions": completions, "mask": mask}
