"""Greedy reading of many images in fixed shapes."""

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax import rewards
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.inference import sampling
from cxr_jax.labels import answers, report_text
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.patches import patchify
from cxr_jax.rewards.terms import BYTES_PER_TOKEN, TRACE_TERMS
from cxr_jax.runtime import processes, sharding
from cxr_jax.runtime.layout import ONE_DEVICE


class Reader:
    """Greedy reading in fixed shapes: one compiled program for any number of images.

    `lexicon`: words of the traces beyond labels/lexicon.toml. `poll` is called before each batch; what it raises ends
    the reading. `layout`: over which devices the rows of a batch are divided, evenly: batch_size is rounded up.
    """

    def __init__(
        self,
        model_config,
        tokenizer,
        prompts: inference_prompts.Prompts,
        batch_size: int,
        dtype=jnp.float32,
        lexicon=None,
        poll=lambda: None,
        layout=ONE_DEVICE,
    ):
        self.tokenizer, self.prompts, self.poll, self.layout = tokenizer, prompts, poll, layout
        self.batch_size = -(-batch_size // layout.shards) * layout.shards
        special = tokenizers.special_ids(tokenizer, model_config.text.vocab_size)
        table = answers.TokenBytes.from_tokenizer(tokenizer)
        c = prompts.max_completion

        @jax.jit
        def read(params, batch):
            params = sharding.gathered(params, dtype)
            features = qwen.vision(
                params, model_config, patchify(batch["image"]), prompts.grid, dtype=dtype
            )
            out = sampling.sample_completions(
                params,
                model_config,
                features,
                batch["prompts"],
                special,
                n=1,
                max_new_tokens=c,
                temperature=0.0,
            )
            parsed = answers.parse_tokens(out["tokens"], out["lengths"], table, c * BYTES_PER_TOKEN)
            return out["tokens"], out["lengths"], parsed["answer"], parsed["format"]

        bank = load_phrase_bank(None, lexicon)

        @jax.jit
        def trace(tokens, lengths, data):
            truth = report_text.Truth.from_arrays(
                data["solution"] & ~data["hedged"], data["hedged"], data["sides"]
            )
            parsed = rewards.read_tokens(tokens, lengths, table, c * BYTES_PER_TOKEN, bank, truth)
            terms = rewards.reward_terms(parsed, data["solution"])
            return {name: terms[name] for name in TRACE_TERMS}

        self._read, self._trace = layout.on(read), trace

    def read(self, params, images, texts) -> dict:
        """images [N, S, S], prompt texts [N] -> tokens [N, C], lengths [N], pred bool [N, 14], valid bool [N]."""
        n, b, parts = len(images), self.batch_size, []
        for start in range(0, n, b):
            self.poll()
            rows = np.minimum(
                start + self.layout.rows_of(b), n - 1
            )  # the last batch is filled with repeats
            batch = {
                "image": np.asarray(images)[rows],
                "prompts": self.prompts.encode([texts[i] for i in rows]),
            }
            got = processes.gather_to_host(self._read(params, self.layout.batch(batch)))
            parts.append([x[: n - start] for x in got])
        tokens, lengths, pred, valid = (np.concatenate(x) for x in zip(*parts, strict=True))
        return {
            "tokens": tokens,
            "lengths": lengths,
            "pred": pred.astype(bool),
            "valid": valid.astype(bool),
        }

    def trace(self, read: dict, data: dict) -> dict:
        """How the traces of `read` agree with the answers and with what is so: TRACE_TERMS -> float32 [N]."""
        n, b, parts = len(read["tokens"]), self.batch_size, []
        for start in range(0, n, b):
            self.poll()
            rows = np.minimum(np.arange(start, start + b), n - 1)
            truth = {k: data[k][rows] for k in ("solution", "hedged", "sides")}
            got = self._trace(read["tokens"][rows], read["lengths"][rows], truth)
            parts.append({k: np.asarray(v)[: n - start] for k, v in got.items()})
        return {k: np.concatenate([p[k] for p in parts]) for k in TRACE_TERMS}

    def texts(self, read: dict, rows) -> list[str]:
        """Decoded completions of the given rows."""
        return [
            self.tokenizer.decode(read["tokens"][i][: read["lengths"][i]], skip_special_tokens=True)
            for i in rows
        ]
