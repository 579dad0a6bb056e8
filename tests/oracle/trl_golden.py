"""Advantages, losses and gradients of TRL's own GRPOTrainer, as fixtures for tests/rl/test_trl.py.

    .venv-trl022/bin/python tests/oracle/trl_golden.py     # writes tests/golden_trl/trl_0.22.2.npz
    .venv-trl/bin/python tests/oracle/trl_golden.py        # writes tests/golden_trl/trl_1.16.0.npz

The environments: requirements-trl022.txt and requirements-trl.txt beside this file. Each case builds a GRPOTrainer on
a tiny random text model from the case's GRPOConfig and runs TRL's `_generate_and_score_completions` and `compute_loss`.
Of TRL only what would sample is replaced: the completions and the per-token log-probabilities are given, so that the
gradient with respect to them can be taken. No formula is written down here.
"""

import json
import logging
import pathlib
import tempfile
import warnings

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = pathlib.Path(__file__).parents[1] / "golden_trl"
CURRENT = int(trl.__version__.split(".")[0]) >= 1
GROUP, PAD, EOS, WORD = 4, 0, 1, 2
WEIGHTS = (1.0, 0.5)  # of the two reward functions
METRICS = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
    "kl",
)
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


def cases() -> list[dict]:
    """GRPOConfig arguments. Ours: `parts` micro-batches of one optimizer step, `vllm` (log-probs of a sampler)."""
    old = dict(num_iterations=2)  # makes TRL use log-probabilities from the time of the rollout
    out = []
    for loss in LOSSES:
        of = dict(loss_type=loss)
        out += [
            of,
            of | old,
            of | dict(mask_truncated_completions=True),
            of | old | dict(importance_sampling_level="sequence"),
            of | old | dict(epsilon_high=0.4),
            of | old | dict(delta=1.3),
            of | old | dict(beta=0.3),
            of
            | old
            | dict(beta=0.3, importance_sampling_level="sequence", mask_truncated_completions=True),
            of | dict(parts=2, num_iterations=4, mask_truncated_completions=True),
        ]
    dapo = dict(loss_type="dapo") | old
    out += [{}, dict(mask_truncated_completions=True)]  # TRL's defaults
    out += [dapo | dict(scale_rewards=s) for s in ("batch", "none")]
    out += [
        dapo
        | dict(epsilon=0.1, epsilon_high=0.4, delta=1.3, beta=0.1, mask_truncated_completions=True)
    ]
    out += [
        dict(
            loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4
        )
        | old
    ]
    if CURRENT:
        cispo = dict(loss_type="cispo", epsilon_high=1.2) | old
        out += [cispo, cispo | dict(importance_sampling_level="sequence"), cispo | dict(beta=0.3)]
        out += [
            cispo | dict(mask_truncated_completions=True),
            dict(loss_type="cispo", epsilon_high=5.0),
        ]
        out += [dapo | dict(multi_objective_aggregation="normalize_then_sum")]
        sampler = lambda mode, **bounds: (
            dict(vllm=True, vllm_importance_sampling_mode=mode)
            | {f"vllm_importance_sampling_clip_{k}": v for k, v in bounds.items()}
        )
        truncate, band = (
            sampler("token_truncate", max=1.2),
            sampler("token_mask", max=1.25, min=0.8),
        )
        out += [
            dapo | truncate,
            dapo | band,
            dict(loss_type="grpo", beta=0.3) | old | band,
            cispo | truncate,
        ]
    return out


def batch(seed: int, *, finishes: float = 0.7) -> dict:
    """Ragged and truncated completions, log-probabilities of four policies, rewards of two functions."""
    rng = np.random.default_rng(seed)
    rows, length = 3 * GROUP, 9
    lengths = rng.integers(1, length + 1, rows)
    lengths[:2] = length
    finished = rng.random(rows) < finishes
    finished[:2] = False, finishes > 0
    lengths[~finished] = length  # what has no end runs into the limit
    logp = rng.normal(-1.2, 0.6, (rows, length))
    near = lambda scale: (logp + rng.normal(0, scale, logp.shape)).astype(np.float32)
    rewards = np.round(rng.normal(0, 1, (rows, 2)), 1)
    rewards[GROUP : 2 * GROUP] = 0.3  # a group without variance
    return {
        "lengths": lengths,
        "finished": finished,
        "logp": logp.astype(np.float32),
        "old_logp": near(0.25),
        "ref_logp": near(0.3),
        "sampler_logp": near(0.3),
        "rewards": rewards.astype(np.float32),
    }


def batches() -> list[dict]:
    """The last one has no completion that ends."""
    return [batch(0), batch(1), batch(2, finishes=0.0)]


def save_model(folder) -> None:
    words = {"<pad>": PAD, "<eos>": EOS, "word": WORD}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_trainer(folder, data, options):
    """A GRPOTrainer that is given its completions and its log-probabilities."""
    options, rows = dict(options), len(data["lengths"])
    parts, vllm = options.pop("parts", 1), options.pop("vllm", False)
    if CURRENT:  # without a switch here, 1.16 weights the KL term by the ratio
        options.setdefault("use_bias_correction_kl", False)
    config = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows // parts,
        gradient_accumulation_steps=parts,
        num_generations=GROUP,
        max_completion_length=data["logp"].shape[1],
        reward_weights=list(WEIGHTS),
        **options,
    )
    reward = lambda i: lambda completions, **_: data["rewards"][:, i].tolist()
    functions = [reward(0), reward(1)]
    for i, function in enumerate(functions):
        function.__name__ = f"reward_{i}"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    trainer = trl.GRPOTrainer(
        model=str(folder),
        reward_funcs=functions,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "word"}] * rows),
    )
    trainer.current_gradient_accumulation_steps = parts
    trainer.model.train()

    place = np.arange(data["logp"].shape[1])[None]
    last = data["lengths"][:, None] - 1
    ids = np.where(
        place > last, PAD, np.where((place == last) & data["finished"][:, None], EOS, WORD)
    )
    generated = torch.tensor(ids)
    trainer.model.generate = lambda input_ids, **_: torch.cat([input_ids, generated], dim=1)

    def logps(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if torch.is_grad_enabled():
            value = trainer.given
        else:
            value = torch.tensor(data["ref_logp" if model is trainer.ref_model else "old_logp"])
        assert value.shape[1] == logits_to_keep
        return (value, torch.zeros_like(value), None)[: 3 if CURRENT else 2]

    trainer._get_per_token_logps_and_entropies = logps
    if vllm:
        sampled = [
            row[:n].tolist() for row, n in zip(data["sampler_logp"], data["lengths"], strict=True)
        ]
        rows_of_ids = [row[:n].tolist() for row, n in zip(ids, data["lengths"], strict=True)]
        trainer._generate_single_turn = lambda *_: (rows_of_ids, sampled)
        trainer.use_vllm = True
    return trainer


def run(folder, data, options) -> dict:
    """advantages [R], loss of the whole step, its gradient [R, N] by the log-probabilities, and TRL's metrics."""
    trainer = make_trainer(folder, data, options)
    rows, parts = len(data["lengths"]), options.get("parts", 1)
    inputs = trainer._generate_and_score_completions([{"prompt": "word"}] * rows)
    for values in trainer._metrics["train"].values():
        values.clear()
    logp = torch.tensor(data["logp"], requires_grad=True)
    loss = 0.0
    for part in np.array_split(np.arange(rows), parts):
        trainer.given = logp[part[0] : part[-1] + 1]
        own = {
            k: v[part[0] : part[-1] + 1] if isinstance(v, torch.Tensor) and v.ndim else v
            for k, v in inputs.items()
        }
        loss = loss + trainer.compute_loss(trainer.model, own)
    loss.backward()
    out = {"advantages": inputs["advantages"], "loss": loss.detach(), "grad": logp.grad}
    logged = trainer._metrics["train"] if parts == 1 else {}
    out |= {
        name: torch.tensor(logged[name][0] if logged.get(name) else torch.nan) for name in METRICS
    }
    return {k: np.asarray(v, np.float32) for k, v in out.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    arrays = {}
    meta = {
        "trl": trl.__version__,
        "group": GROUP,
        "weights": WEIGHTS,
        "metrics": METRICS,
        "cases": cases(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_model(folder)
        for i, data in enumerate(batches()):
            results = [run(folder, data, options) for options in cases()]
            arrays |= {f"{i}/{k}": v for k, v in data.items()}
            arrays |= {f"{i}/trl/{k}": np.stack([r[k] for r in results]) for k in results[0]}
    path = OUT / f"trl_{trl.__version__}.npz"
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)
    print(
        f"{path.name}: {len(batches())} batches, {len(cases())} cases, {path.stat().st_size / 1024:.0f} KB"
    )


if __name__ == "__main__":
    main()
