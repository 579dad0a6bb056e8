"""SFT of the phantom model: Qwen2.5-VL structure, 2.5 M parameters, from random weights."""

from ml_collections import ConfigDict

from cxr_jax.errors import UserError


def get_config(preset: str = "phantom") -> ConfigDict:
    if preset != "phantom":
        raise UserError(f"experiments/sft.py has no preset {preset!r}; it has: phantom")
    c = ConfigDict()
    c.task = "sft"
    c.model = "random:phantom"
    c.seed = 0
    c.batch_size = 16
    c.steps = 4500
    c.locate_steps = 1200
    c.locate_weight = 0.3
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
    return c
