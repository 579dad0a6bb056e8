"""The rollout of a GRPO step, one jitted program: images -> completions -> reward terms -> advantages.

Per prompt the image is encoded once and the prompt prefilled once; its G completions share the prompt's keys and leave
the batch as they finish (`stages`). Rewards are parsed from token ids on the device (`rewards`).

Groups whose completions all earned the same reward have no advantage and teach nothing. `config.rl.oversample` draws
that many times `prompts_per_step` prompts, and the learner, which is dearer a prompt, takes the groups that vary first:
DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) in one pass of static shapes instead of a loop.
"""

import jax
import jax.numpy as jnp

from cxr_jax import rewards
from cxr_jax.config.sections import RolloutConfig
from cxr_jax.inference import sampling
from cxr_jax.labels import report_text
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.models.qwen2_5_vl.patches import patchify
from cxr_jax.rl import losses
from cxr_jax.runtime import sharding
from cxr_jax.training import losses as training_losses
from cxr_jax.training import micro_batches

ZERO_STD = 1e-6  # a group's rewards that spread less are the same


def sampling_keys(seed: int, step, prompts: int, group: int):
    """Keys [P * G] folded from (seed, step, prompt, sample): a completion depends on nothing else that is sampled."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    fold = lambda p, g: jax.random.fold_in(jax.random.fold_in(base, p), g)
    p, g = jnp.meshgrid(jnp.arange(prompts), jnp.arange(group), indexing="ij")
    return jax.vmap(fold)(p.reshape(-1), g.reshape(-1))


def make_rollout(
    rollout: RolloutConfig,
    model_config,
    grid,
    special,
    table,
    trainable,
    bank,
    *,
    seed: int,
    max_completion: int,
):
    """Jitted (train, fixed, batch, step) -> dict of tokens, mask, sampler log-probs, reward terms, advantages, kept.

    table: `answers.TokenBytes`; bank: `phrase_bank.PhraseBank`, the words of the trace.

    All leaves are [P, G, ..], P = prompts_per_step * oversample, but kept: int [prompts_per_step], the groups to learn
    from.
    """
    weights = dict(rollout.reward_weights)

    @jax.jit
    def sample(train, frozen, batch, step):
        params = sharding.gather_weights(trainable.merge(train, frozen)["model"], trainable.dtype)
        p, g = batch["image"].shape[0], rollout.group_size

        def complete(part):
            features = qwen.vision(
                params, model_config, patchify(part["image"]), grid, dtype=trainable.dtype
            )
            out = sampling.sample_completions(
                params,
                model_config,
                features,
                part["prompts"],
                special,
                n=g,
                max_new_tokens=max_completion,
                temperature=rollout.temperature,
                keys=part["keys"].reshape(-1),
            )
            return jax.tree.map(lambda x: x.reshape(-1, g, *x.shape[1:]), out)  # a row is a group

        keys = sampling_keys(seed, step, p, g).reshape(p, g)
        parts = micro_batches.cut(
            {"image": batch["image"], "prompts": batch["prompts"], "keys": keys},
            rollout.micro_batches,
        )
        out = micro_batches.in_turns(complete, parts)
        out = jax.tree.map(lambda x: x.reshape(p * g, *x.shape[2:]), out)
        of_each = lambda key: jnp.repeat(batch[key], g, axis=0)
        solution, known, hedged = of_each("solution"), of_each("known"), of_each("hedged")
        parsed = rewards.read_tokens(
            out["tokens"],
            out["lengths"],
            table,
            max_completion * rewards.BYTES_PER_TOKEN,
            bank,
            report_text.Truth.from_arrays(solution & ~hedged, hedged, of_each("sides")),
        )
        terms = rewards.reward_terms(
            parsed,
            solution,
            out["lengths"],
            known=known,
            min_length=rollout.min_length,
            max_length=int(rollout.overlong_from * max_completion),
            limit=max_completion,
        )
        reward = rewards.combine(terms, weights).reshape(p, g)
        mask = jnp.arange(max_completion)[None] < out["lengths"][:, None]
        if rollout.mask_truncated:
            train_mask = mask & out["finished"][:, None]
        else:
            train_mask = mask
        shape = (p, g, max_completion)
        return {
            "tokens": out["tokens"].reshape(shape),
            "mask": mask.reshape(shape),
            "train_mask": train_mask.reshape(shape),
            "sampler_logp": out["logprobs"].reshape(shape),
            "lengths": out["lengths"].reshape(p, g),
            "finished": out["finished"].reshape(p, g),
            "terms": {k: v.reshape(p, g) for k, v in terms.items()},
            "answer": parsed["answer"].reshape(p, g, -1),
            "reward": reward,
            **advantages(rollout, terms, reward),
        }

    return sample


def advantages(rollout: RolloutConfig, terms: dict, reward) -> dict:
    """{"advantages" [P, G], "kept" [prompts_per_step]} by config.rl: of the summed reward [P, G], or of each weighted
    term [P * G] (GDPO). What is taken over the batch is taken over the groups that are kept."""
    if rollout.advantage == "grpo":
        of = lambda batch: losses.group_advantages(reward, scale=rollout.scale_rewards, batch=batch)
    else:
        weights = {name: weight for name, weight in rollout.reward_weights.items() if weight}
        weighed = {name: terms[name].reshape(reward.shape) for name in weights}
        of = lambda batch: losses.gdpo_advantages(weighed, weights, batch=batch)
    kept = groups_to_learn(of(slice(None)), rollout.prompts_per_step)
    return {"advantages": of(kept), "kept": kept}


def varies(advantages):
    """bool [P]: the groups of advantages [P, G] that teach something; a flat group's are exactly 0."""
    return jnp.any(advantages != 0, axis=1)


def groups_to_learn(advantages, n: int):
    """int [n]: the first n groups of advantages [P, G] that vary, in order, filled up with groups that do not."""
    return jnp.argsort(~varies(advantages), stable=True)[:n]


@jax.jit
def rollout_metrics(ro) -> dict:
    """TRL's metric names from one rollout."""
    std = jnp.std(ro["reward"], axis=1, ddof=1)
    lengths = ro["lengths"].astype(jnp.float32)
    out = {
        "reward": ro["reward"].mean(),
        "reward_std": std.mean(),
        "frac_reward_zero_std": (std < ZERO_STD).mean(),
        "groups/learned": varies(ro["advantages"])[ro["kept"]].sum(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - ro["finished"].mean(),
        "completions/mean_terminated_length": training_losses.masked_mean(lengths, ro["finished"]),
        "answers/labels_per_answer": ro["answer"].sum(-1).mean(),
        "answers/modal_share": rewards.modal_share(
            ro["answer"].reshape(-1, ro["answer"].shape[-1])
        ),
    }
    for name, value in ro["terms"].items():
        out |= {f"rewards/{name}/mean": value.mean(), f"rewards/{name}/std": value.std(ddof=1)}
    return out
