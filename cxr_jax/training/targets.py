"""Target texts as token ids: what SFT imitates."""

import numpy as np

from cxr_jax.errors import UserError


class Completions:
    """Target texts to fixed-shape ids, ending in the end-of-turn token: what SFT trains on."""

    def __init__(self, tokenizer, max_completion: int):
        self.tokenizer, self.max_completion = tokenizer, max_completion
        self.stop = tokenizer.get_vocab()["<|im_end|>"]
        self.pad = tokenizer.get_vocab()["<|endoftext|>"]

    def encode(self, texts: list[str]) -> dict:
        """completions int32 [B, C], mask bool [B, C]. UserError for a text longer than C."""
        ids = np.full((len(texts), self.max_completion), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for i, row in enumerate(self.tokenizer(texts, add_special_tokens=False)["input_ids"]):
            row = [*row, self.stop]
            if len(row) > self.max_completion:
                raise UserError(
                    f"a target text has {len(row)} tokens, more than config.max_completion={self.max_completion}"
                )
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return {"completions": ids, "mask": mask}
