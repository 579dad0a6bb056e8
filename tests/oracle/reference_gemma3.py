"""What transformers computes for random Gemma 3 cases, for `reference.py --family gemma3`."""

import copy
import json

import cases_gemma3 as cases
import numpy as np
import reference
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

GENERATE_EVERY = 5


def build(case: cases.Case) -> Gemma3ForConditionalGeneration:
    config = Gemma3Config.from_dict(copy.deepcopy(case.config))
    model = Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="sdpa" if case.sdpa else "eager", dtype=torch.float32
    ).eval()
    return reference.filled(model, case)


class Runner:
    """Forward passes on a case's images, whose features are computed once."""

    def __init__(self, model, case: cases.Case):
        self.model, self.image_id, self.features = model, case.image_id, None
        if len(case.grids):
            found = model.model.get_image_features(
                torch.from_numpy(case.images()), return_dict=True
            )
            self.features = found.pooler_output  # [n, tokens, D]

    def positions(self, ids, mask):
        return np.where(mask, np.cumsum(mask, 1) - 1, 0)[None]

    def logits(self, ids, mask, positions=None) -> np.ndarray:
        """float32 [B, T, V]; the model works out positions itself."""
        ids, kw = torch.from_numpy(ids), {}
        if self.features is not None:
            made = BaseModelOutputWithPooling(pooler_output=self.features)
            kw = {"mm_encoder_outputs": {"image": made}}
        return self.model(
            input_ids=ids,
            attention_mask=torch.from_numpy(mask),
            token_type_ids=(ids == self.image_id).long(),
            use_cache=False,
            **kw,
        ).logits.numpy()


def generate(model, case: cases.Case, tokens) -> bool:
    """Whether `generate`, prompt by prompt and with its cache, gives the tokens of the full passes.

    Not asked of windows of one token: of those its cache keeps none (seeds 10 and 15 differ from its own full passes).
    """
    if case.text["sliding_window"] == 1:
        return True
    images, at = torch.from_numpy(case.images()), 0
    model.generation_config = GenerationConfig(
        eos_token_id=case.text["eos_token_id"], pad_token_id=case.text["pad_token_id"]
    )
    for row, n, want in zip(case.input_ids, case.lengths, tokens, strict=True):
        count = int((row[:n] == case.image_id).sum()) // case.config["mm_tokens_per_image"]
        ids = torch.from_numpy(row[None, :n])
        kw = {"pixel_values": images[at : at + count]} if count else {}
        at += count
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=(ids == case.image_id).long(),
            max_new_tokens=cases.NEW_TOKENS,
            do_sample=False,
            suppress_tokens=case.media_ids,
            **kw,
        )[0, n:].tolist()
        if out != want[want >= 0].tolist():
            return False
    return True


def compute(seed: int) -> dict[str, np.ndarray]:
    """As `reference.compute`."""
    case = cases.draw(seed)
    model = build(case)
    run = Runner(model, case)
    mask = np.ones_like(case.input_ids) if case.attention_mask is None else case.attention_mask
    positions = run.positions(case.input_ids, mask)
    filler = next(i for i in range(case.text["vocab_size"]) if i not in case.media_ids)
    room = ((0, 0), (0, cases.NEW_TOKENS))
    ids, grown = np.pad(case.input_ids, room, constant_values=filler), np.pad(mask, room)
    tokens, scores = reference.greedy(run, case, ids, grown, np.pad(positions, ((0, 0), *room)))
    out = {
        "positions": positions,
        "tokens": tokens,
        "scores": scores,
        "input_ids": ids,
        "attention_mask": grown,
        "grown_positions": run.positions(ids, grown),
        "logits": run.logits(ids, grown),
        "config": np.array(json.dumps(model.config.to_dict())),
    }
    if run.features is not None:
        out["features"] = run.features.numpy().reshape(-1, run.features.shape[-1])
    if seed % GENERATE_EVERY == 0:
        out["generate_agrees"] = np.array(generate(model, case, tokens))
    return out
