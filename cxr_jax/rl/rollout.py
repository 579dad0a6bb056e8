"""The rollout of a GRPO step, one jitted program: images -> completions -> reward terms -> advantages.

Per prompt the image is encoded once and the prompt prefilled once; its G completions share the prompt's keys and leave
the batch as they finish (`inference.compaction`). Rewards are parsed from token ids on the device (`rewards`).

Groups whose completions all earned the same reward have no advantage and teach nothing. `config.rl.oversample` draws
that many times `prompts_per_step` prompts, and the learner, which is dearer a prompt, takes the groups that vary first:
DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) in one pass of static shapes instead of a loop.

On more devices than prompts, a batch has every prompt several times, row by row, and each row is given its share of the
group: the prompt is computed once a device, and completions are the same (`training.checks.group_shares`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cxr_jax import rewards
from cxr_jax.config.sections import RolloutConfig
from cxr_jax.inference import sampling
from cxr_jax.labels import phrase_reading
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.labels.phrase_bank import PhraseBank
from cxr_jax.metrics.model_flops import Tokens
from cxr_jax.models.image_batches import Images
from cxr_jax.models.network.config import Config
from cxr_jax.rewards.own import OwnReward
from cxr_jax.rl import losses
from cxr_jax.rl.stop_texts import StopTexts
from cxr_jax.runtime import sharding
from cxr_jax.runtime.trees import Tree
from cxr_jax.training import micro_batches
from cxr_jax.training.losses import masked_mean
from cxr_jax.training.trainable import Trainable

OWN_REWARDS_SEE = ("solution", "known", "hedged", "sides", "columns")
"""Of a batch, what rewards of the user's are given."""

ZERO_STD = 1e-6  # a group's rewards that spread less are the same

# Kept keys of a turn are at most this part of a device's memory, or so many bytes where it is not known. While they
# grow from stage to stage they are there nearly twice; weights, in two forms, and the optimizer need the rest.
KEYS_SHARE, UNKNOWN_ROOM = 4, 10 * 2**30


def sampling_keys(seed: int, step: int | jax.Array, prompts: int, group: int) -> jax.Array:
    """Fold keys [P * G] from (seed, step, prompt, sample): a completion depends on nothing else that is sampled."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)

    def fold(prompt: jax.Array, sample: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(step_key, prompt), sample)

    prompt, sample = jnp.meshgrid(jnp.arange(prompts), jnp.arange(group), indexing="ij")
    return jax.vmap(fold)(prompt.reshape(-1), sample.reshape(-1))


def with_turns(
    rollout: RolloutConfig,
    model_config: Config,
    *,
    prompt_width: int,
    max_completion: int,
    dtype: DTypeLike,
    shards: int,
    shares: int,
    device_memory: int | None,
) -> RolloutConfig:
    """Choose `sample_micro_batches` where it is 0: the fewest turns whose kept keys fit on a device.

    At every token a turn reads all weights, for one row as for a hundred, so turns cost nearly their number.

    Args:
        prompt_width: tokens of the longest prompt.
        dtype: of the computation, and so of the keys.
        shards: devices that divide the rows.
        shares: rows of each prompt, which divide its group.
        device_memory: bytes; None: not known.
    """
    if rollout.sample_micro_batches:
        return rollout
    text = model_config.text
    head_bytes = text.head_dim * jnp.dtype(dtype).itemsize
    slot_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head_bytes
    # Of a prompt and of its completions, all at their longest.
    group_bytes = (prompt_width + rollout.group_size // shares * max_completion) * slot_bytes
    room = UNKNOWN_ROOM if device_memory is None else device_memory // KEYS_SHARE
    prompts = rollout.prompts_per_step * rollout.oversample * shares // shards
    fitting = [
        turns
        for turns in range(1, prompts)
        if prompts % turns == 0 and prompts // turns * group_bytes <= room
    ]
    return dataclasses.replace(rollout, sample_micro_batches=(fitting or [prompts])[0])


def make_rollout(
    rollout: RolloutConfig,
    model_config: Config,
    images: Images,
    special: Mapping[str, Any],
    table: TokenBytes,
    trainable: Trainable,
    bank: PhraseBank,
    *,
    seed: int,
    max_completion: int,
    own: Sequence[OwnReward] = (),
) -> Callable[..., Tree]:
    """Build the jitted function (train, frozen, batch, step) -> samples.

    Args:
        images: how image tokens come from a batch.
        special: of `tokenizer.special_ids`.
        table: the bytes of every token.
        bank: the words of the trace.
        seed: of the run; folded into every key.
        max_completion: tokens that a completion may have, C.
        own: rewards of the user's. With one of texts among them, samples lack what `make_weigh` adds.

    Returns:
        The function. Its samples, all [P, G, ..] with P = prompts_per_step * oversample: "tokens", "mask",
        "train_mask" and "sampler_log_probs" [P, G, C]; "lengths", "finished", "reward", "advantages" and the reward
        terms [P, G]; "answer" bool [P, G, 14]. But "kept": int [prompts_per_step], the groups to learn from.
    """
    stop_texts = None
    if rollout.stop:
        stop_texts = StopTexts.compile(rollout.stop, table, model_config.text.vocab_size)
    programs = _Rollout(
        rollout=rollout,
        model_config=model_config,
        images=images,
        special=special,
        table=table,
        trainable=trainable,
        bank=bank,
        seed=seed,
        max_completion=max_completion,
        own=tuple(own),
        stop_texts=stop_texts,
    )
    return jax.jit(programs.sample)


def token_choice_of(rollout: RolloutConfig) -> dict[str, Any]:
    """Give the fields of `sampling.SamplingSettings` by which tokens are chosen; {} where all may be drawn.

    Then log-probs are of what a token was drawn from, so that a `sampler_correction` weighs it by what was cut off.
    """
    choice = {
        "top_k": rollout.top_k or None,
        "top_p": rollout.top_p if rollout.top_p < 1 else None,
        "min_p": rollout.min_p or None,
        "repetition_penalty": rollout.repetition_penalty
        if rollout.repetition_penalty != 1
        else None,
    }
    choice = {name: value for name, value in choice.items() if value is not None}
    return {**choice, "logs_kept": True} if choice else {}


def one_row_each(tree: Tree, prompts: int) -> Tree:
    """Take one row of each prompt of arrays that have as many rows of every prompt, rows on axis 0."""
    return jax.tree.map(lambda leaf: leaf[:: len(leaf) // prompts], tree)


def make_weigh(rollout: RolloutConfig) -> Callable[[Mapping[str, jax.Array]], Tree]:
    """Build the jitted function {term: [P, G]} -> what samples of a rollout lack while rewards of texts are missing."""
    return jax.jit(functools.partial(weigh, rollout))


@dataclass(frozen=True, kw_only=True)
class _Rollout:
    """What the pieces of the program share; each method is one of them, traced inside jit."""

    rollout: RolloutConfig
    model_config: Config
    images: Images
    special: Mapping[str, Any]
    table: TokenBytes
    trainable: Trainable
    bank: PhraseBank
    seed: int
    max_completion: int
    own: tuple[OwnReward, ...] = ()
    stop_texts: StopTexts | None = None

    def complete(self, params: Tree, part: Tree) -> Tree:
        """Completions of some rows, [p, G, ..]: the image encoded and the prompt read once a row."""
        features = self.images.features(params, part, dtype=self.trainable.dtype)
        # The group, or a row's share of it, has what is computed up to here in common, and the prompt's keys.
        G = part["keys"].shape[1]
        completions = sampling.sample_completions(
            params,
            self.model_config,
            features,
            part["prompts"],
            self.special,
            n=G,
            max_new_tokens=self.max_completion,
            temperature=self.rollout.temperature,
            keys=part["keys"].reshape(-1),
            endings=self.stop_texts,
            **token_choice_of(self.rollout),
        )
        return jax.tree.map(lambda leaf: leaf.reshape(-1, G, *leaf.shape[1:]), completions)

    def score(self, batch: Tree, completions: Tree) -> tuple[Tree, dict[str, jax.Array]]:
        """What rows [P * G, ..] of completions say, and every reward term [P * G]."""
        G = len(completions["lengths"]) // len(batch["solution"])
        C = self.max_completion
        solution, known, hedged = (
            jnp.repeat(batch[name], G, axis=0) for name in ("solution", "known", "hedged")
        )
        # What the chat template has said already is part of what is judged.
        opened = batch["prompts"].get("opened")
        opened_width = 0 if opened is None else opened.shape[1]
        parsed = rewards.read_tokens(
            completions["tokens"],
            completions["lengths"],
            self.table,
            (C + opened_width) * rewards.BYTES_PER_TOKEN,
            self.bank,
            phrase_reading.Truth.from_arrays(
                solution & ~hedged, hedged, jnp.repeat(batch["sides"], G, axis=0), known
            ),
            None if opened is None else jnp.repeat(opened, G, axis=0),
        )
        terms = rewards.reward_terms(
            parsed,
            solution,
            completions["lengths"],
            known=known,
            hedged=hedged,
            min_length=self.rollout.min_length,
            max_length=int(self.rollout.overlong_from * C),
            limit=C,
        )
        return parsed, terms

    def own_terms(self, batch: Tree, completions: Tree) -> dict[str, jax.Array]:
        """The user's rewards of token ids, [P, G] each."""
        on_tokens = [reward for reward in self.own if not reward.on_texts]
        lengths = completions["lengths"].reshape(-1, self.rollout.group_size)
        tokens = completions["tokens"].reshape(*lengths.shape, -1)
        shown = {name: batch[name] for name in OWN_REWARDS_SEE if name in batch}
        shown = one_row_each(shown, len(lengths))
        return {reward.name: reward.of_tokens(tokens, lengths, shown) for reward in on_tokens}

    def sample(self, train: Tree, frozen: Tree, batch: Tree, step: int | jax.Array) -> Tree:
        """The whole step: completions, their rewards, advantages, and the groups to learn from."""
        P = self.rollout.prompts_per_step * self.rollout.oversample
        G, C = self.rollout.group_size, self.max_completion

        # ---- Completions, the prompts of a turn at a time ----
        trainable = self.trainable
        params = sharding.gather_weights(trainable.merge(train, frozen)["model"], trainable.dtype)
        # A row a prompt, or several, each with a share of the group.
        keys = sampling_keys(self.seed, step, P, G).reshape(len(batch["solution"]), -1)
        images = {name: batch[name] for name in self.images.names}
        inputs = {**images, "prompts": batch["prompts"], "keys": keys}
        parts = micro_batches.cut(inputs, self.rollout.sample_micro_batches or 1)
        completions = micro_batches.map_in_turns(lambda part: self.complete(params, part), parts)
        completions = jax.tree.map(lambda leaf: leaf.reshape(P * G, *leaf.shape[2:]), completions)

        # ---- Rewards ----
        parsed, terms = self.score(batch, completions)
        terms = {name: term.reshape(P, G) for name, term in terms.items()}
        terms |= self.own_terms(batch, completions)

        # ---- Tokens of the completions; a truncated one may be kept out of the loss ----
        mask = jnp.arange(C)[None] < completions["lengths"][:, None]
        train_mask = mask
        if self.rollout.mask_truncated:
            train_mask = mask & completions["finished"][:, None]
        samples = {
            "tokens": completions["tokens"].reshape(P, G, C),
            "mask": mask.reshape(P, G, C),
            "train_mask": train_mask.reshape(P, G, C),
            "sampler_log_probs": completions["logprobs"].reshape(P, G, C),
            "lengths": completions["lengths"].reshape(P, G),
            "finished": completions["finished"].reshape(P, G),
            "terms": terms,
            "answer": parsed["answer"].reshape(P, G, -1),
        }
        # Rewards of texts come from the host, between this program and the next.
        if any(reward.on_texts for reward in self.own):
            return samples
        return {**samples, **weigh(self.rollout, terms)}


def weigh(rollout: RolloutConfig, terms: Mapping[str, jax.Array]) -> Tree:
    """Sum the terms [P, G] of completions: "reward", "advantages" and "kept" of a rollout's samples."""
    # Weights are a run's; terms without one are logged alone.
    reward = rewards.combine(terms, dict(rollout.reward_weights))
    return {"reward": reward, **advantages(rollout, terms, reward)}


def advantages(
    rollout: RolloutConfig, terms: Mapping[str, jax.Array], reward: jax.Array
) -> dict[str, jax.Array]:
    """Compute the advantages of all groups, and choose those to learn from.

    What is taken over the batch is taken over the groups that are kept.

    Args:
        terms: reward terms, P * G numbers each; GDPO takes each weighted one.
        reward: [P, G], their sum; GRPO takes that.

    Returns:
        "advantages" [P, G] and "kept" int [prompts_per_step].
    """
    if rollout.advantage == "grpo":
        over = functools.partial(losses.group_advantages, reward, scale=rollout.scale_rewards)
    else:
        weights = {name: weight for name, weight in rollout.reward_weights.items() if weight}
        weighed = {name: terms[name].reshape(reward.shape) for name in weights}
        over = functools.partial(losses.gdpo_advantages, weighed, weights)

    # Which groups vary does not depend on what they are scaled by.
    kept = groups_to_learn(over(), rollout.prompts_per_step)
    return {"advantages": over(batch=kept), "kept": kept}


def groups_to_learn(advantages: jax.Array, count: int) -> jax.Array:
    """Choose the first groups of advantages [P, G] that vary, in order, filled up with groups that do not.

    Returns:
        int [count].
    """
    return jnp.argsort(~losses.varies(advantages), stable=True)[:count]


@jax.jit
def rollout_metrics(samples: Tree) -> dict[str, jax.Array]:
    """Summarise one rollout by TRL's metric names."""
    # Of each group; as in TRL, with Bessel's correction.
    std = jnp.std(samples["reward"], axis=1, ddof=1)
    lengths, answers = samples["lengths"].astype(jnp.float32), samples["answer"]
    metrics = {
        "reward": samples["reward"].mean(),
        "reward_std": samples["reward"].std(ddof=1),
        "groups/reward_std": std.mean(),
        "frac_reward_zero_std": (std < ZERO_STD).mean(),
        "groups/learned": losses.varies(samples["advantages"])[samples["kept"]].sum(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - samples["finished"].mean(),
        "completions/mean_terminated_length": masked_mean(lengths, samples["finished"]),
        **_terminated_lengths(lengths, samples["finished"]),
        "answers/labels_per_answer": answers.sum(-1).mean(),
        "answers/modal_share": rewards.modal_share(answers.reshape(-1, answers.shape[-1])),
    }
    for name, term in samples["terms"].items():
        metrics |= {f"rewards/{name}/mean": term.mean(), f"rewards/{name}/std": term.std(ddof=1)}
    return metrics


@functools.partial(jax.jit, static_argnames=("image_token_id", "flat_groups_count"))
def tokens_of_step(
    samples: Tree, batch: Tree, *, image_token_id: int, flat_groups_count: bool
) -> dict[str, Tokens]:
    """Count the tokens that a step's model has to read: each prompt once, each completion to its end.

    Args:
        flat_groups_count: whether groups that do not vary have a gradient.

    Returns:
        "sampled", and "learned": those of the groups that are kept and have a gradient.
    """
    prompts = {name: batch["prompts"][name] for name in ("ids", "lengths")}
    prompts = one_row_each(prompts, len(samples["lengths"]))
    width = prompts["ids"].shape[1]
    is_image = (prompts["ids"] == image_token_id) & (
        jnp.arange(width) < prompts["lengths"][:, None]
    )
    written, images = samples["lengths"].sum(1), is_image.sum(1)
    counts = Tokens(prompts["lengths"] + written, written, images)
    kept = jnp.zeros(len(written), bool).at[samples["kept"]].set(True)
    learned = kept & (losses.varies(samples["advantages"]) | flat_groups_count)
    return {
        "sampled": Tokens(*(count.sum() for count in counts)),
        "learned": Tokens(*(jnp.sum(count * learned) for count in counts)),
    }


def _terminated_lengths(lengths: jax.Array, finished: jax.Array) -> dict[str, jax.Array]:
    """The shortest and the longest of the completions that came to their end; 0 where none did, as in TRL."""
    shortest = jnp.where(finished, lengths, jnp.inf).min()
    return {
        "completions/min_terminated_length": jnp.where(finished.any(), shortest, 0.0),
        "completions/max_terminated_length": jnp.where(finished, lengths, 0.0).max(),
    }
