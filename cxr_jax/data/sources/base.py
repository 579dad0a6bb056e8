"""What a source of images with their truth is, and which of its examples a step takes.

A batch is a dict, B examples in the order of the indices that were asked for. Every source fills:

    image       float32 [B, S, S]    gray in 0..1, bright = dense; S is the source's `size`. Or instead:
    images      B tuples of uint8 [h, w]  levels of each example's films in reading order, in their own aspect ratio,
                                     resized as the model's processor does (`resize.NativeSize`)
    solution    bool [B, 14]         which labels are positive (CheXpert order, like everything of 14 here)
    known       bool [B, 14]         whether the truth of a label is known
    hedged      bool [B, 14]         the label may be there or not: text may hedge it, and one that is not known,
                                     either, counts neither way. One that is neither known nor hedged is blank: nobody
                                     said anything of it, and to name it costs `taxonomy.BLANK_PRICE` of a false one
    sides       bool [B, 14, 2]      the finding is on the patient's right, on the left; neither where that is unknown

Only phantoms have these, too:

    labels      int8 [B, 14]         1 positive, 0 negative, -1 uncertain
    regions     float32 [B, 12, 8, 8]  where each finding is drawn (`phantom.regions`)
    scene       dict of arrays [B, ..]  what was drawn (`phantom.sample_scenes`)

Phantom studies of n films (`config.data.views`) have images [B, n, S, S] and regions [B, 12, n * 8, 8] in the order of
the views, and these:

    located     float32 [B, 12]      the largest severity of each finding in any of the films
    hidden, change, prior            what was drawn (`phantom.studies`)

Only files have these, lists of length B:

    targets     the assistant's text of each row, None where the manifest has none
    prompts     the prompt of each row: a text, or a conversation (system turn, earlier turns) that ends with a question
    ids         the id of each row
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from cxr_jax.data.prompts import Conversation, Prompt

ENDLESS = 2**31 - 1  # the length of a source that answers any index
Batch = dict[str, Any]  # the keys stand at the top of this file
Indices = Sequence[int] | np.ndarray  # of examples


class About(TypedDict):
    """What there is to say of examples without their images."""

    prompts: list[Prompt]
    ids: list[str]


class Source(Protocol):
    """Images with their truth, by index.

    A row of `batch` depends on its index alone, bit for bit, and not on the rows beside it: each of several processes
    asks for its own indices, and together they hold the batch that one process would have made.

    Attributes:
        name: shown to people.
        size: pixels a side of every image.
        prompt: the prompt of the first example.
        lexicon: a TOML file of phrases that its reports use beyond labels/lexicon.toml, or None.
    """

    name: str
    size: int
    prompt: str
    lexicon: str | None

    def __len__(self) -> int:
        """Count the examples; ENDLESS where any index has one."""
        ...

    def prompts(self) -> tuple[Prompt, ...]:
        """List every prompt that batches can hold, each once."""
        ...

    def readable(self, indices: Indices) -> list[int]:
        """List those of `indices` that `batch` can give; it puts others in the place of the rest."""
        ...

    def batch(self, indices: Indices) -> Batch:
        """Make the examples of `indices`, with the keys that stand at the top of this file."""
        ...

    def about(self, indices: Indices) -> About:
        """List prompts and ids, one each of every index, without making the images. No patient data."""
        ...

    def solutions(self, indices: Indices) -> np.ndarray:
        """Give the `solution` of `batch`, bool [B, 14], without making the images."""
        ...

    def masks(self, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
        """Give `known` and `hedged` of `batch`, bool [B, 14] each, without making the images."""
        ...

    def conversations(self, batch: Batch, indices: Indices) -> list[Conversation]:
        """Give the conversations that SFT imitates, one a row of `batch(indices)`; the last turn is the model's."""
        ...


def epoch_of(rows_taken: int, length: int) -> dict[str, float]:
    """Say how often a source has been walked, as a metric; {} of one without an end."""
    return {} if length >= ENDLESS else {"epoch": rows_taken / length}


def indices_of(step: int, batch_size: int, length: int, seed: int = 0) -> np.ndarray:
    """Choose the examples of a step; a finite source is walked in a fresh seeded order each epoch.

    Args:
        length: of the source; ENDLESS is walked in order.

    Returns:
        int [batch_size], a function of the arguments alone: a resumed run takes what the stopped one would have.
    """
    positions = step * batch_size + np.arange(batch_size)
    if length >= ENDLESS:
        return positions
    # A batch may end one epoch and begin the next, each in an order of its own.
    orders = {
        int(epoch): np.random.default_rng([int(epoch), 11, seed]).permutation(length)
        for epoch in np.unique(positions // length)
    }
    return np.array([orders[int(place // length)][place % length] for place in positions])
