"""What transformers computes for random cases, one npz a seed. Runs in the oracle's own environment (torch).

    .venv-oracle/bin/python tests/oracle/reference.py OUT --seeds 0:200 [--family qwen3_vl]

A file appears whole or not at all, in the order of the seeds, so a reader may follow along.
"""

import argparse
import copy
import importlib
import os
import pathlib
import time

import cases
import numpy as np
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

GENERATE_EVERY = 10  # for one case in so many, `generate` with its cache must give the same tokens


# What transformers calls the classes of a family.
ARCHITECTURES = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "gemma3": "Gemma3"}


def build(case: cases.Case) -> PreTrainedModel:
    """transformers' model of a case."""
    if case.family == "gemma3":
        return importlib.import_module("reference_gemma3").build(case)
    name = ARCHITECTURES[case.family]
    config = getattr(transformers, f"{name}Config").from_dict(copy.deepcopy(case.config))
    # float32 from the start: buffers made in another type would stay rounded.
    model = (
        getattr(transformers, f"{name}ForConditionalGeneration")
        ._from_config(
            config, attn_implementation="sdpa" if case.sdpa else "eager", dtype=torch.float32
        )
        .eval()
    )
    return filled(model, case)


def filled(model: PreTrainedModel, case: cases.Case) -> PreTrainedModel:
    """The model with the case's weights."""
    given = {case.module_key(k): torch.from_numpy(w) for k, w in cases.weights(case).items()}
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    assert not missing or model.lm_head.weight is model.model.language_model.embed_tokens.weight
    return model


def runner(model: PreTrainedModel, case: cases.Case):
    """What runs the model on the case: `positions`, `logits` and `features`."""
    if case.family == "gemma3":  # other arguments, other positions
        return importlib.import_module("reference_gemma3").Runner(model, case)
    return Runner(model, case)


class Runner:
    """Forward passes on a case's images, whose features are computed once."""

    def __init__(self, model, case: cases.Case):
        self.model, self.image_id = model, case.config["image_token_id"]
        self.grids = torch.from_numpy(case.grids) if len(case.grids) else None
        self.features, self.taps = None, ()
        if self.grids is not None:
            found = model.model.get_image_features(
                torch.from_numpy(case.pixel_values), self.grids, return_dict=True
            )
            self.features = torch.cat(tuple(found.pooler_output))
            # DeepStack: features of blocks further down, in the order of the blocks.
            self.taps = [torch.cat(tuple(tap)) for tap in getattr(found, "deepstack_features", ())]

    def positions(self, ids, mask):
        ids = torch.from_numpy(ids)
        return self.model.model.get_rope_index(
            ids,
            (ids == self.image_id).int(),
            image_grid_thw=self.grids,
            attention_mask=torch.from_numpy(mask),
        )[0].numpy()

    def logits(self, ids, mask, positions=None) -> np.ndarray:
        """float32 [B, T, V]; the model works out positions itself unless they are given."""
        ids, kw = torch.from_numpy(ids), {}
        if self.grids is not None:
            made = BaseModelOutputWithPooling(pooler_output=(self.features,))
            if self.model.config.model_type == "qwen3_vl":
                taps = [(tap,) for tap in self.taps]
                made = BaseModelOutputWithDeepstackFeatures(
                    pooler_output=(self.features,), deepstack_features=taps
                )
            kw = {
                "image_grid_thw": self.grids,
                "mm_token_type_ids": (ids == self.image_id).int(),
                "mm_encoder_outputs": {"image": made},
            }
        if positions is not None:
            kw["position_ids"] = torch.from_numpy(positions)
        self.model.model.rope_deltas = None  # a stale one would change positions
        return self.model(
            input_ids=ids, attention_mask=torch.from_numpy(mask), use_cache=False, **kw
        ).logits.numpy()


def greedy(run: Runner, case: cases.Case, ids, mask, positions):
    """(tokens int [B, N], -1 after a stop; logits float32 [B, N, V] they were taken from), without a cache.

    ids, mask and positions have room for N tokens a row, and are filled. A new token's position is one past the
    largest so far, as in `generate`.
    """
    B, N, lengths = len(ids), cases.NEW_TOKENS, case.lengths
    stops = np.atleast_1d(case.text["eos_token_id"])
    tokens, scores, done = np.full((B, N), -1), [], np.zeros(B, bool)
    start = positions.max((0, 2)) + 1
    for j in range(N):
        logits = run.logits(ids, mask, positions)[np.arange(B), lengths + j - 1]
        logits[:, case.media_ids] = -np.inf
        scores.append(logits)
        for b in np.flatnonzero(~done):
            tokens[b, j] = ids[b, lengths[b] + j] = logits[b].argmax()
            mask[b, lengths[b] + j] = 1
            positions[:, b, lengths[b] + j] = start[b] + j
            done[b] = tokens[b, j] in stops
        if done.all():
            break
    scores += [np.zeros_like(scores[0])] * (N - len(scores))
    return tokens, np.stack(scores, 1)


def generate(model, case: cases.Case, tokens, positions) -> bool:
    """Whether `generate`, prompt by prompt and with its cache, agrees.

    Asked only of prompts whose last token has the largest position, as every real one has (it ends in text): where
    the largest lies inside an image, `generate` does not give the tokens of the full passes (seeds 130 and 140).
    """
    at, ends, image_id = 0, np.cumsum(case.grids.prod(1)), case.config["image_token_id"]
    model.generation_config = GenerationConfig(
        eos_token_id=case.text["eos_token_id"], pad_token_id=0
    )
    size = case.config["vision_config"]["spatial_merge_size"] ** 2
    for i, (row, n, want) in enumerate(zip(case.input_ids, case.lengths, tokens, strict=True)):
        ids, kw, need, first = (
            torch.from_numpy(row[None, :n]),
            {},
            int((row[:n] == image_id).sum()) * size,
            at,
        )
        while need:
            need -= int(case.grids[at].prod())
            at += 1
        if at > first:
            pixels = case.pixel_values[ends[first] - case.grids[first].prod() : ends[at - 1]]
            kw = {
                "pixel_values": torch.from_numpy(pixels),
                "image_grid_thw": torch.from_numpy(case.grids[first:at]),
                "mm_token_type_ids": (ids == image_id).int(),
            }
        if (positions[:, i, n - 1] < positions[:, i, :n].max()).any():
            continue
        model.model.rope_deltas = None
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=cases.NEW_TOKENS,
            do_sample=False,
            suppress_tokens=case.media_ids,
            **kw,
        )[0, n:].tolist()
        if out != want[want >= 0].tolist():
            return False
    return True


def compute(seed: int, family: str) -> dict[str, np.ndarray]:
    """Arrays for one seed: the prompts' positions; greedy tokens and the scores they were taken from; and for the
    prompts with these tokens appended: input_ids, attention_mask, grown_positions, logits. Image features, taps."""
    if family == "gemma3":
        return importlib.import_module("reference_gemma3").compute(seed)
    case = cases.draw(seed, family)
    model = build(case)
    run = Runner(model, case)
    mask = np.ones_like(case.input_ids) if case.attention_mask is None else case.attention_mask
    positions = run.positions(case.input_ids, mask)
    # Padding must not be an image placeholder: the reference counts those even where they are masked.
    filler = next(i for i in range(case.text["vocab_size"]) if i not in case.media_ids)
    room = ((0, 0), (0, cases.NEW_TOKENS))
    ids, grown = np.pad(case.input_ids, room, constant_values=filler), np.pad(mask, room)
    tokens, scores = greedy(run, case, ids, grown, np.pad(positions, ((0, 0), *room)))
    out = {
        "positions": positions,
        "tokens": tokens,
        "scores": scores,
        "input_ids": ids,
        "attention_mask": grown,
        "grown_positions": run.positions(ids, grown),
        "logits": run.logits(ids, grown),
        "config": np.array(model.config.to_json_string(use_diff=False)),
    }
    if run.features is not None:
        out["features"] = run.features.numpy()
        out |= {f"tap{number}": tap.numpy() for number, tap in enumerate(run.taps)}
    if seed % GENERATE_EVERY == 0:
        out["generate_agrees"] = np.array(generate(model, case, tokens, positions))
    return out


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=pathlib.Path)
    p.add_argument("--seeds", required=True, help="FIRST:LAST of each family")
    p.add_argument(
        "--family", default="qwen2_5_vl", help=f"one or more of {', '.join(ARCHITECTURES)}"
    )
    p.add_argument(
        "--ahead", type=int, help="wait while the reader has left so many files; without: no limit"
    )
    args = p.parse_args()
    torch.set_num_threads(1)
    parent = os.getppid()
    args.out.mkdir(parents=True, exist_ok=True)
    for family, seed in cases.named(args.family, args.seeds):
        while args.ahead and len(list(args.out.glob("[!.]*.npz"))) >= args.ahead:
            time.sleep(0.05)
            if os.getppid() != parent:  # the reader was killed
                return
        part = args.out / f".{seed}.npz"
        np.savez(part, **compute(seed, family))
        os.replace(part, args.out / f"{family}-{seed}.npz")


if __name__ == "__main__":
    main()
