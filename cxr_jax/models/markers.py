"""The texts of special tokens, of every kind of tokenizer that a family has; their ids come from the tokenizer."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any


@dataclass(frozen=True, kw_only=True)
class Markers:
    """What a tokenizer's special tokens are called.

    Attributes:
        image: stands once for each token of an image.
        video: stands for those of a video; None: there is none.
        before_media, after_media: beside the tokens of an image.
        placeholder: what a chat template writes once for an image, and the processor turns into its tokens.
        whole_placeholder: what stands for an image in a text that no template has written.
        around: what the processor writes before and behind the tokens of an image, in place of `placeholder`.
        start_of_turn, end_of_turn: of a message.
        start_of_text: before a document.
        end_of_text: behind it; ends an answer, too.
        padding: fills rows.
        never: beginnings of tokens that an answer never holds.
        spells_bytes: whether what is no piece is spelled in tokens of one byte, "<0x0A>".
    """

    image: str
    video: str | None
    before_media: str
    after_media: str
    placeholder: str
    whole_placeholder: str
    around: tuple[str, str]
    start_of_turn: str
    end_of_turn: str
    start_of_text: str
    end_of_text: str
    padding: str
    never: tuple[str, ...]
    spells_bytes: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        """What prompts are made of, and what ends an answer."""
        media = (self.before_media, self.after_media, self.image)
        return (self.start_of_turn, self.end_of_turn, *media)

    @property
    def stops(self) -> tuple[str, str]:
        """What ends an answer."""
        return self.end_of_turn, self.end_of_text

    def image_text(self, count: int) -> str:
        """Write an image of so many tokens, as the processor does in place of `placeholder`."""
        before, behind = self.around
        return before + self.image * count + behind


CHATML = Markers(
    image="<|image_pad|>",
    video="<|video_pad|>",
    before_media="<|vision_start|>",
    after_media="<|vision_end|>",
    placeholder="<|image_pad|>",
    whole_placeholder="<|vision_start|><|image_pad|><|vision_end|>",
    around=("", ""),
    start_of_turn="<|im_start|>",
    end_of_turn="<|im_end|>",
    start_of_text="<|endoftext|>",
    end_of_text="<|endoftext|>",
    padding="<|endoftext|>",
    never=("<|vision", "<|image", "<|video", "<|im_start", "<|object", "<|box", "<|quad"),
)
"""Qwen's."""

GEMMA = Markers(
    image="<image_soft_token>",
    video=None,
    before_media="<start_of_image>",
    after_media="<end_of_image>",
    placeholder="<start_of_image>",
    whole_placeholder="<start_of_image>",
    # The line ends are the processor's.
    around=("\n\n<start_of_image>", "<end_of_image>\n\n"),
    start_of_turn="<start_of_turn>",
    end_of_turn="<end_of_turn>",
    start_of_text="<bos>",
    end_of_text="<eos>",
    padding="<pad>",
    never=(
        *("<image_soft_token>", "<start_of_image>", "<end_of_image>", "<start_of_turn>"),
        *("<bos>", "<pad>", "<mask>", "<unk>", "<unused", "[multimodal]"),
    ),
    spells_bytes=True,
)
"""Gemma 3's."""

_KNOWN = (CHATML, GEMMA)

PLACEHOLDERS = {
    CHATML.image: "an image",
    GEMMA.image: "an image",
    GEMMA.placeholder: "an image",
    "<|video_pad|>": "a video",
}
"""Texts that stand for media, whatever the tokenizer, and what each is of."""


# Of a few tokenizers, each asked for every text.
@functools.lru_cache(maxsize=32)
def markers_of(tokenizer: Tokenizer) -> Markers:
    """Find the markers that a tokenizer has: those of which most are tokens, of equals the first."""
    vocabulary = tokenizer.get_vocab()

    def count(markers: Markers) -> int:
        return sum(token in vocabulary for token in markers.needed)

    return max(_KNOWN, key=count)
