"""SFT of the phantom model: Qwen2.5-VL structure, 2.7 M parameters, from random weights.

HEADER
"""

from ml_collections import ConfigDict

from cxr_jax.errors import UserError


def get_config(preset: str = "phantom") -> ConfigDict:
    """Presets: phantom; continued (more SFT of the embedded model); nv_reason_3b (the published recipe; needs a
    model folder and sft.jsonl rows)."""
    c = ConfigDict()
    c.task = "sft"
    c.model = "random:phantom"
    c.seed = 0
    c.batch_size = 16
    c.steps = 4500
    c.locate_steps = 1200  # located-label warm-up of the vision tower
    c.locate_weight = 0.3  # its weight beside the cross-entropy afterwards
    c.max_completion = 208
    c.remat = "none"
    c.log_every = 20
    c.save_every = 250

    c.data = ConfigDict(dict(source="phantom", hospital="A", ood_hospital="B", seed=0))
    c.optim = ConfigDict(
        dict(
            lr=1.5e-3, warmup_steps=200, final_fraction=0.05,
            b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.05, clip_norm=1.0, frozen=(),
        )
    )  # fmt: skip
    c.eval = ConfigDict(
        dict(every=750, n=256, n_final=2000, batch_size=64, select_by="jaccard", bootstrap=1000, cases=24)
    )
    if preset == "continued":
        # What more SFT gives in the minutes of one RL run: the fair companion of experiments/rl.py.
        c.model, c.steps, c.locate_steps, c.locate_weight = "phantom", 400, 0, 0.0
        c.data.seed = 1
        c.optim.update(dict(lr=3e-4, warmup_steps=20))
        c.eval.update(dict(every=100))
    elif preset == "nv_reason_3b":
        # configs/sft_config.yaml of the published code: lr 2e-5 cosine, warm-up 3 %, batch 64, clip 0.3, 2 epochs.
        c.model, c.batch_size, c.steps, c.remat = "", 64, 3000, "full"
        c.locate_steps, c.locate_weight, c.max_completion = 0, 0.0, 1800
        c.data = ConfigDict(dict(source="files", manifest="", image_root="", size=476, seed=123))
        c.seed = 123
        c.optim.update(dict(lr=2e-5, warmup_steps=90, final_fraction=0.0, b2=0.999, weight_decay=0.0, clip_norm=0.3))
    elif preset != "phantom":
        raise UserError(f"experiments/sft.py has no preset {preset!r}; it has: phantom, continued, nv_reason_3b")
    return c
