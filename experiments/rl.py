"""GRPO on phantoms of hospital A from the embedded SFT model, evaluated on A and out of distribution on B.

    bash launch/local.sh                      # = --config=experiments/rl.py --workdir=runs/rl_phantom

RLHEADER
"""

from ml_collections import ConfigDict

from cxr_jax.errors import UserError

PRESETS = ("phantom", "files", "nv_reason_3b")


def get_config(preset: str = "phantom") -> ConfigDict:
    """Presets: phantom; files (real radiographs, the embedded model); nv_reason_3b (the published recipe)."""
    if preset not in PRESETS:
        raise UserError(f"experiments/rl.py has no preset {preset!r}; it has: {', '.join(PRESETS)}")
    c = ConfigDict()
    c.task = "rl"
    c.model = "phantom"
    c.seed = 0
    c.steps = 80
    c.max_completion = 208
    c.remat = "none"
    c.save_every = 20

    c.data = ConfigDict(dict(source="phantom", hospital="A", ood_hospital="B", seed=1))
    c.rl = ConfigDict(
        dict(
            prompts_per_step=16, group_size=8, temperature=1.0, loss_type="dapo", scale_rewards="group",
            epsilon=0.2, epsilon_high=0.2, mask_truncated=True, min_length=60,
            reward_weights=ConfigDict(dict(accuracy_hard=1.0, overshort=1.0)),
        )
    )  # fmt: skip
    c.optim = ConfigDict(
        dict(
            lr=1e-4, warmup_steps=5, final_fraction=0.1,
            b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=0.2, frozen=(),
        )
    )  # fmt: skip
    c.eval = ConfigDict(
        dict(every=20, n=256, n_final=512, batch_size=64, select_by="jaccard", bootstrap=1000, cases=24)
    )
    if preset == "files":
        c.data = ConfigDict(dict(source="files", manifest="", image_root="", size=224, seed=1))
        c.steps = 5
        c.rl.prompts_per_step = 4
        c.eval.update(dict(every=5, n=64, n_final=1000))
    if preset == "nv_reason_3b":
        # configs/grpo_config.yaml of the published code: 64 prompts x 16, lr 1e-6 with a 5 % floor, clip 0.2.
        c.model, c.seed, c.remat, c.max_completion, c.steps = "", 123, "full", 1800, 128
        c.data = ConfigDict(dict(source="files", manifest="", image_root="", size=476, seed=123))
        c.rl.update(dict(prompts_per_step=64, group_size=16, loss_type="grpo", min_length=400))
        c.optim.update(dict(lr=1e-6, final_fraction=0.05, b2=0.999))
    return c
