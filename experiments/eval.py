"""Evaluation of one model on phantoms of hospitals A and B, or on the held-out rows of a manifest (:files).

    python -m cxr_jax.main --config=experiments/eval.py --workdir=runs/eval --config.model=runs/rl_phantom

About a minute for 2 x 2,000 phantoms on 2 cores.
"""

from ml_collections import ConfigDict

from cxr_jax.errors import UserError


def get_config(preset: str = "phantom") -> ConfigDict:
    c = ConfigDict()
    c.task = "evaluate"
    c.model = "phantom"
    c.seed = 0
    c.max_completion = 208
    c.dtype = "float32"  # of the computation
    c.mesh = ConfigDict(
        dict(data=-1, fsdp=1, tensor=1)
    )  # devices along each axis; -1: what remains of them
    c.grace_seconds = 90.0  # from SIGTERM on, within which a step should end
    c.step_timeout = (
        1800.0  # a turn of any loop that takes longer ends the run with a stack dump; 0: any time
    )
    c.data = ConfigDict(dict(source="phantom", hospital="A", ood_hospital="B", seed=0))
    c.eval = ConfigDict(dict(n_final=2000, batch_size=64, bootstrap=1000, cases=24))
    if preset == "files":
        c.data = ConfigDict(dict(source="files", manifest="", image_root="", size=224, seed=0))
        c.data.update(dict(cache_mib=512, threads=0))
    elif preset != "phantom":
        raise UserError(f"experiments/eval.py has no preset {preset!r}; it has: phantom, files")
    return c
