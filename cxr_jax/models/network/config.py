"""What a vision-language model computes: sizes, and the choices between kinds of arithmetic, each a field of its own.

No name of a model stands here: a family reads its `config.json` into these fields, and writes it from them
(`models/registry.py`). The defaults are those of Qwen2.5-VL. The dataclasses are frozen and hashable, so a config can
be a static argument of `jax.jit`.
"""

from dataclasses import dataclass, field, replace
from typing import Self


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Sizes in features, `patch_size` and `window_size` in pixels."""

    depth: int  # blocks
    hidden_size: int
    num_heads: int
    intermediate_size: int  # inside the MLP
    out_hidden_size: int  # of the tokens that it gives: the decoder's width
    fullatt_block_indexes: (
        tuple[int, ...] | None
    )  # the others attend within windows; None: all attend to all
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2  # frames of a patch; a still image is two equal ones
    spatial_merge_size: int = 2  # patches a side that become one token
    window_size: int = 112
    tokens_per_second: int = 2  # of videos: kept for the file, not computed
    rope_theta: float = 10000.0

    # ---- Which arithmetic ----
    norm: str = "rms"  # or "layer": LayerNorm with a bias
    norm_eps: float = 1e-6
    mlp: str = "swiglu"  # or "gelu": two layers with the tanh form of GELU
    patch_bias: bool = False
    rotary: bool = True  # 2-D rotary positions
    position_table: int = 0  # rows of learned positions, a square, row by row; 0: none
    interpolates_table: bool = (
        False  # bilinear over the image's grid, corners on corners; else row i is patch i's
    )
    split_qkv: bool = False  # three projections q, k, v instead of one
    final_norm: bool = False  # after the last block
    merger: str = "mlp"  # or "mean": the mean of the patches, normed, times one matrix without bias
    tap_blocks: tuple[
        int, ...
    ] = ()  # blocks whose outputs are merged, too, and added in the decoder (DeepStack)

    # ---- How it is computed ----
    attention: str = "auto"  # a name of `attention.KINDS`: the same numbers, but for rounding
    wide_gradients: bool = False  # those of weights are summed over rows and devices in float32

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that one language-model token stands for."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels * frames * height * width (1176 by default)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def tapped(self) -> tuple[int, ...]:
        """The tapped blocks that there are, in their order: what they give is added in this order."""
        return tuple(sorted({block for block in self.tap_blocks if block < self.depth}))

    @property
    def has_windows(self) -> bool:
        """Whether any block attends within windows."""
        return not all(map(self.is_full, range(self.depth)))

    def is_full(self, block: int) -> bool:
        """Tell whether a block attends to the whole image."""
        return self.fullatt_block_indexes is None or block in self.fullatt_block_indexes


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `mrope_section` counts rotary frequencies for time, height and width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # of queries
    num_key_value_heads: int  # each serves several query heads
    mrope_section: tuple[
        int, ...
    ]  # sums to half of the head size; (): one axis, the place in the text
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    # ---- Which arithmetic ----
    head_size: int | None = None  # features of one head; None: hidden_size / num_attention_heads
    qkv_bias: bool = True
    output_bias: bool = False  # of the attention's last projection
    qk_norm: bool = False  # RMS over each head of queries and keys, before the rotation
    norm: str = "scale"  # or "one_plus": times 1 + weight, all in float32
    post_norms: bool = False  # norms after attention and MLP, too, before they are added
    activation: str = "silu"  # or "gelu_tanh"
    query_scale: float | None = None  # of the scores; None: head size ** -0.5
    scales_embedding: bool = False  # token embeddings times sqrt(hidden_size); image tokens are not
    mrope_interleaved: bool = False  # frequencies take turns between the axes, instead of bands
    rope_factor: float = 1.0  # frequencies of full layers are divided by it
    sliding_layers: tuple[int, ...] = ()  # layers that see the last `sliding_window` tokens alone
    sliding_window: int = 0
    sliding_rope_theta: float = 1e4
    image_sees_itself: bool = (
        False  # tokens of one image attend to each other both ways, in prompts
    )

    # ---- How it is computed ----
    attention: str = "auto"  # a name of `attention.KINDS`: the same numbers, but for rounding
    wide_gradients: bool = False  # those of weights are summed over rows and devices in float32

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def position_axes(self) -> int:
        """Numbers of a position: time, height and width, or the place in the text alone."""
        return 3 if self.mrope_section else 1

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """1 for each layer that sees a window, 0 for one that sees all."""
        return tuple(int(layer in self.sliding_layers) for layer in range(self.num_hidden_layers))


@dataclass(frozen=True)
class Config:
    """A whole model. Token ids are those of its tokenizer; `eos_token_id` holds every stop id."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 151655
    video_token_id: int | None = 151656  # None: a family without videos
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    pad_token_id: int = 151643
    bos_token_id: int = 151643
    eos_token_id: tuple[int, ...] = field(default=(151645, 151643))
    tie_word_embeddings: bool = False
    model_type: str = "qwen2_5_vl"  # the family, see `registry`

    def with_attention(self, kind: str) -> Self:
        """Say how attention is computed, by a name of `attention.KINDS`: a part of what programs are compiled for."""
        return replace(
            self,
            vision=replace(self.vision, attention=kind),
            text=replace(self.text, attention=kind),
        )

    def with_wide_gradients(self, is_wide: bool) -> Self:
        """Say whether gradients of weights are summed over rows and devices in float32, whatever computes them."""
        return replace(
            self,
            vision=replace(self.vision, wide_gradients=is_wide),
            text=replace(self.text, wide_gradients=is_wide),
        )

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for pixels: they may never be sampled, those that have a row of the head."""
        ids = {
            self.image_token_id,
            self.video_token_id,
            self.vision_start_token_id,
            self.vision_end_token_id,
        }
        rows = self.text.vocab_size
        return tuple(sorted(token for token in ids if token is not None and token < rows))
