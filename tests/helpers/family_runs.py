"""SFT and RL with adapters of a tiny model of a family, as a user would run them: two steps, one step."""

import json

import fast_compile
from forked import calls

EVALUATION = ("--config.eval.n=4", "--config.eval.n_final=4", "--config.eval.batch_size=4")


def train(root, sft, rl) -> None:
    """Run SFT from root/base into root/sft, and RL from that into root/rl.

    Args:
        sft, rl: what the family's own flags are, the config of SFT first.
    """
    of_sft = [
        *(sft[0], f"--workdir={root}/sft", f"--config.model={root}/base"),
        *("--config.steps=2", "--config.locate_steps=1", "--config.batch_size=2"),
        *(*sft[1:], *EVALUATION),
    ]
    of_rl = [
        *("--config=rl", f"--workdir={root}/rl", f"--config.model={root}/sft"),
        *("--config.steps=1", "--config.rl.prompts_per_step=2", "--config.rl.oversample=1"),
        *("--config.rl.group_size=2", "--config.max_completion=24", "--config.lora.rank=2"),
        *(*rl, *EVALUATION),
    ]
    for code, out, err in calls([of_sft, of_rl], timeout=600, env=fast_compile.environment()):
        assert code == 0, out + err


def check_tables(root) -> None:
    """Hold that both runs have ended with what is shown to people."""
    for task in ("sft", "rl"):
        lines = (root / task / "metrics.jsonl").read_text().splitlines()
        assert any(json.loads(line)["kind"] != "train" for line in lines)
        assert (root / task / "report.html").exists()


def adapters_add_up(root, config):
    """Hold that the exported model of RL is that of SFT and the adapters; give the adapters and their settings."""
    import jax
    import numpy as np

    from cxr_jax.weights import hf_folder, peft_folder

    adapters, lora = peft_folder.load(root / "rl" / "adapter", config)
    _, params = hf_folder.load(root / "sft" / "hf", np.float32)
    _, merged = hf_folder.load(root / "rl" / "hf", np.float32)
    peft_folder.merge(params, adapters, lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, merged)
    return adapters, lora
