"""Configs of GRPO: phantom (default), files, the published recipes, and an algorithm. Results: experiments/rl.py."""

from ml_collections import ConfigDict

from cxr_jax import rewards
from cxr_jax.config import schema
from cxr_jax.errors import UserError
from cxr_jax.rl.algorithms import ALGORITHMS

# Data and scale; the algorithm is named beside them (`ALGORITHMS`).
_PUBLISHED = ("nv_reason_3b", "nv_reason_qwen3_4b")
PRESETS = ("phantom", "files", *_PUBLISHED)


def get_config(presets: str = "phantom") -> ConfigDict:
    """Build the config of an RL run.

    Args:
        presets: phantom; files (real radiographs, the embedded model); nv_reason_3b (the published recipe);
            nv_reason_qwen3_4b (the same for Qwen3-VL 4B). And, after a comma or alone, an algorithm of
            cxr_jax/rl/algorithms.py: "dapo", "nv_reason_3b,gspo".

    Raises:
        UserError: for a name that is neither, or a second one of a kind.
    """
    preset, algorithm = _chosen(presets.split(","))
    # The published recipe reads files, too.
    source = "files"
    if preset == "phantom":
        source = preset
    config = schema.defaults("rl", source)
    # Before the presets, which may change single keys of it.
    config.rl.update(ALGORITHMS[algorithm or "corrected"])
    config.rl.reward_weights = ConfigDict(rewards.weights(rewards.CHECKED))
    # A few small steps: a first look at real films, and no result.
    if preset == "files":
        config.steps = 5
        config.rl.update(prompts_per_step=4, oversample=1)
        config.eval.update(every=5, n=64, n_final=1000)
    if preset in _PUBLISHED:
        _published_recipe(config, algorithm)
    if preset == "nv_reason_qwen3_4b":
        # Of squares, which max_pixels=0 asks for: whole tokens of 32 pixels.
        config.data.size = 480
    return config


def _chosen(preset_names: list[str]) -> tuple[str, str | None]:
    """The data preset and, if one is named, the algorithm."""
    # Names may come in any order, and either kind may be left out.
    preset = next(
        (preset_name for preset_name in preset_names if preset_name in PRESETS), "phantom"
    )
    algorithm = next(
        (preset_name for preset_name in preset_names if preset_name in ALGORITHMS), None
    )
    if unknown := [
        preset_name for preset_name in preset_names if preset_name not in (*PRESETS, *ALGORITHMS)
    ]:
        known_names = ", ".join([*PRESETS, *ALGORITHMS])
        raise UserError(f"experiments/rl.py has no preset {unknown[0]!r}; it has: {known_names}")
    # Each kind at most once, or the second would be dropped in silence.
    if surplus := [
        preset_name for preset_name in preset_names if preset_name not in (preset, algorithm)
    ]:
        raise UserError(
            f"experiments/rl.py takes one data preset and one algorithm; {surplus[0]!r} is a second one"
        )
    return preset, algorithm


def _published_recipe(preset: ConfigDict, algorithm: str | None) -> None:
    """configs/grpo_config.yaml of the published code: 64 prompts x 16, lr 1e-6 with a 5 % floor, clip 0.2."""
    # No model and no data: they cannot travel with the code, so a flag must name them.
    preset.update(
        model="", seed=123, remat="full", dtype="bfloat16", max_completion=1800, steps=128
    )
    # Films in their own aspect ratio, as the published code's processor resizes them.
    preset.data.update(size=476, min_pixels=128**2, max_pixels=476**2, seed=123)
    # FSDP: each device holds a part of the weights and of the optimizer (docs/scale.md).
    preset.mesh.update(data=1, fsdp=-1)
    # sample_micro_batches stays 0: one turn on 8 devices or more, whose 128 completions keep 8 GiB of keys at most;
    # in the 8 turns of a learner that needs micro_batches=8, weights are read 6 to 8 times as often (docs/scale.md).
    preset.rl.update(prompts_per_step=64, oversample=1, group_size=16, min_length=400)
    if algorithm is None:  # what the published code ran: TRL 0.22, a loss averaged by sequence
        preset.rl.update(ALGORITHMS["trl_0_22"])
        preset.rl.update(aggregation="sequence", mask_truncated=True)
    preset.rl.reward_weights = ConfigDict(rewards.weights(rewards.PUBLISHED))
    # b2 is the default of torch's AdamW; phantom runs, which are short, forget faster.
    preset.optim.update(lr=1e-6, final_fraction=0.05, b2=0.999)
