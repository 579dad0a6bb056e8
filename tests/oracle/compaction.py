"""Completions sampled in a batch of 128, from which finished ones leave, against the same ones sampled alone.

    PYTHONPATH=. python tests/oracle/compaction.py --completions 1000

The embedded model on phantoms at temperature 1, prompts of a rollout with 8 samples each. A completion that differs is
traced to its first differing token: both candidates' scores (logit / temperature + noise) are shown as the batch and
the single row have them; a tie is a gap between the two candidates that is smaller than what rounding moved them by.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.config.sections import RunConfig
from cxr_jax.data.sources import phantom
from cxr_jax.inference import compaction, sampling
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
from cxr_jax.rl import batches, rollout
from cxr_jax.weights import pretrained
from experiments import rl as experiment

PROMPTS, GROUP = 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--completions", type=int, default=1000)
    args = parser.parse_args()
    config = experiment.get_config()
    config.rl.update(dict(prompts_per_step=PROMPTS, oversample=1, group_size=GROUP))
    m = pretrained.load_starting_model(config.model, config.seed)
    model_config, params = m.config, jax.tree.map(jnp.asarray, m.params)
    source = phantom.PhantomSource("A", "train", 11)
    grid = PROCESSOR.grid(source.size, source.size)
    prompts = inference_prompts.Prompts(m.tokenizer, model_config, grid, config.max_completion)
    special = tokenizers.special_ids(m.tokenizer, model_config.text.vocab_size)
    make = batches.make_batch_fn(RunConfig.from_config(config), source, prompts)
    see = jax.jit(
        lambda image: network.vision(params, model_config, PROCESSOR.patchify(image), grid)
    )

    def sample(features, encoded, keys, n):
        out = sampling.sample_completions(
            params,
            model_config,
            features,
            encoded,
            special,
            n=n,
            max_new_tokens=config.max_completion,
            temperature=1.0,
            keys=keys,
        )
        return {k: np.asarray(v) for k, v in out.items()}

    began, done, tokens, different, shrunk = time.time(), 0, 0, [], 0
    largest = 0.0
    for step in range(-(-args.completions // (PROMPTS * GROUP))):
        batch = make(step)
        features, keys = see(batch["image"]), rollout.sampling_keys(0, step, PROMPTS, GROUP)
        together = sample(features, batch["prompts"], keys, GROUP)
        ends = compaction.stage_ends(config.max_completion)
        shrunk += sum(
            int((together["lengths"] > end).sum()) <= PROMPTS * GROUP // 2 for end in ends[:-1]
        )
        for r in range(min(PROMPTS * GROUP, args.completions - done)):
            p = r // GROUP
            one = {
                k: v[:, p : p + 1] if k == "positions" else v[p : p + 1]
                for k, v in batch["prompts"].items()
            }
            alone = sample(network.Seen(features.tokens[p : p + 1]), one, keys[r : r + 1], 1)
            n = int(together["lengths"][r])
            tokens += n
            same = together["tokens"][r] == alone["tokens"][0]
            if same.all():
                largest = max(
                    largest, np.abs(together["logprobs"][r, :n] - alone["logprobs"][0, :n]).max()
                )
            else:
                different.append(
                    trace(
                        params,
                        model_config,
                        network.Seen(features.tokens[p : p + 1]),
                        one,
                        keys[r],
                        together,
                        alone,
                        r,
                        special,
                    )
                )
                print(f"step {step}, row {r}: " + different[-1], flush=True)
        done = min(args.completions, done + PROMPTS * GROUP)
    print(
        f"{done} completions, {tokens} tokens, in batches of {PROMPTS * GROUP}; finished rows left {shrunk} times; "
        f"{len(different)} differ; largest log-prob difference of equal ones {largest:.1e}; "
        f"{time.time() - began:.0f} s"
    )


def trace(params, model_config, features, prompts, key, together, alone, r, special) -> str:
    """What decided at the first token that differs."""
    t = int(np.argmin(together["tokens"][r] == alone["tokens"][0]))
    a, b = int(together["tokens"][r, t]), int(alone["tokens"][0, t])
    # The distribution at t from scratch: prompt and the t tokens that both agree on, in one pass.
    length, width = int(prompts["lengths"][0]), prompts["ids"].shape[1]
    ids = np.full((1, width + t), model_config.pad_token_id, np.int32)
    ids[0, : length + t] = [*prompts["ids"][0, :length], *alone["tokens"][0, :t]]
    mask = np.arange(width + t)[None] < length + t
    hidden = network.hidden_states(
        params, model_config, ids, mask, prompts["positions"][:, :, : width + t], features=features
    )
    logits = np.array(network.unembed(params, model_config, hidden[:, length + t - 1])[0])
    logits[list(special["suppress"])] = -1e30
    noise = jax.random.gumbel(jax.random.fold_in(key, t), logits.shape)
    scores = logits + np.asarray(noise)
    moved = (
        max(abs(float(together["logprobs"][r, s] - alone["logprobs"][0, s])) for s in range(t))
        if t
        else 0.0
    )
    return (
        f"token {t}: {a} in the batch, {b} alone; scores {scores[a]:.7f} and {scores[b]:.7f}, apart by "
        f"{abs(scores[a] - scores[b]):.1e}; rounding had moved log-probs before by up to {moved:.1e}"
    )


if __name__ == "__main__":
    main()
