"""A model config that compiles in seconds: one layer of 16, 24 tokens."""

from cxr_jax.models.network.config import Config, TextConfig, VisionConfig

V, T, N, STOP = 24, 6, 24, tuple(range(1, 7))
CFG = Config(
    vision=VisionConfig(
        depth=1,
        hidden_size=16,
        num_heads=2,
        intermediate_size=16,
        out_hidden_size=16,
        fullatt_block_indexes=(),
        patch_size=2,
        window_size=8,
    ),
    text=TextConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        mrope_section=(2, 1, 1),
        rope_theta=1e4,
    ),
    image_token_id=20,
    video_token_id=21,
    vision_start_token_id=22,
    vision_end_token_id=23,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=(1,),
    tie_word_embeddings=True,
)
