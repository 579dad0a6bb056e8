"""Configs of SFT: phantom (default), follow_ups, continued, files, nv_reason_3b; of Qwen3-VL. Results:
experiments/sft.py."""

from ml_collections import ConfigDict

from cxr_jax.config import schema
from cxr_jax.errors import UserError

# From nothing, without and with conversations; from the embedded model, on phantoms and on films; and as published.
# Then of Qwen3-VL.
PRESETS = (
    *("phantom", "follow_ups", "continued", "files", "nv_reason_3b"),
    *("qwen3_vl_phantom", "nv_reason_qwen3_4b"),
)
_PUBLISHED = ("nv_reason_3b", "nv_reason_qwen3_4b")


def get_config(preset: str = "phantom") -> ConfigDict:
    """Build the config of an SFT run.

    Args:
        preset: phantom (from random weights); follow_ups (the same, and half of the phantoms are asked for more than a
            reading); continued (more SFT of the embedded model); files (the same on the rows of a manifest, in squares
            of 224); nv_reason_3b (the published recipe; needs a model folder and sft.jsonl rows); qwen3_vl_phantom
            (Qwen3-VL of the embedded model's size, from random weights); nv_reason_qwen3_4b (the published recipe for
            Qwen3-VL 4B).

    Raises:
        UserError: for any other name.
    """
    if preset not in PRESETS:
        raise UserError(
            f"experiments/sft.py has no preset {preset!r}; it has: {', '.join(PRESETS)}"
        )
    # The published recipe is the one that reads files.
    config = schema.defaults("sft", "files" if preset in ("files", *_PUBLISHED) else "phantom")
    if preset == "follow_ups":
        # Room for three turns, see phantom/follow_ups.py; readings are those of the phantom preset.
        config.update(max_completion=480)
        config.data.follow_ups = 0.5
    if preset in ("continued", "files"):
        # What more SFT gives in the minutes of one RL run: the fair companion of experiments/rl.py.
        config.update(model="phantom", steps=480, locate_steps=0, locate_weight=0.0)
        config.data.seed = 1
        config.optim.update(lr=3e-4, warmup_steps=20)
        config.eval.every = 120
    if preset == "qwen3_vl_phantom":
        config.model = "random:qwen3-vl-phantom"
    if preset in _PUBLISHED:
        # configs/sft_config.yaml of the published code: lr 2e-5 cosine, warm-up 3 %, batch 64, clip 0.3, 2 epochs.
        config.update(
            model="", seed=123, batch_size=64, steps=0, epochs=2.0, remat="full", dtype="bfloat16"
        )
        config.update(locate_steps=0, locate_weight=0.0, max_completion=1800)
        # FSDP: each device holds a part of the weights and of the optimizer (docs/scale.md).
        config.mesh.update(data=1, fsdp=-1)
        # Films in their own aspect ratio, as the published code's processor resizes them.
        config.data.update(size=476, min_pixels=128**2, max_pixels=476**2, seed=123)
        config.optim.update(
            lr=2e-5, warmup_steps=0, warmup_ratio=0.03, final_fraction=0.0, b2=0.999
        )
        config.optim.update(weight_decay=0.0, clip_norm=0.3)
    if preset == "nv_reason_qwen3_4b":
        # Of squares, which max_pixels=0 asks for: whole tokens of 32 pixels.
        config.data.size = 480
    return config
