"""Targets: what is left to write behind what a template opened, and special tokens that a row spells."""

import dataclasses
import re

import numpy as np
import pytest
from chat_templates import OPENED, split, tokenizer_with

from cxr_jax.config.sections import RunConfig
from cxr_jax.data.prompts import Message
from cxr_jax.errors import UserError
from cxr_jax.inference import prompts
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.presets import rl as presets_rl
from cxr_jax.presets import sft as presets_sft
from cxr_jax.rl import batches as rl_batches
from cxr_jax.sft import loop as sft_loop
from cxr_jax.training import conversations, targets

FULL = "<think>\nWet lungs.</think>\n<answer>Edema</answer>"
EMPTY = OPENED["empty_think"]


@pytest.mark.parametrize(
    ("opened", "target", "left"),
    [
        ("", FULL, FULL),
        ("<think>\n", FULL, FULL[8:]),
        ("<think>\n", FULL.replace("\n", ""), "Wet lungs.</think><answer>Edema</answer>"),
        ("<think>\n", " \n" + FULL, FULL[8:]),
        ("<think>\n", "<think>\n\n  Wet.</think>", "\n  Wet.</think>"),
        ("<think>", FULL, FULL[7:]),
        ("<think>", "<think> Wet.</think>", " Wet.</think>"),
        ("<think>\n", FULL[8:], FULL[8:]),  # it goes on already
        (EMPTY, "<think></think><answer>Edema</answer>", "<answer>Edema</answer>"),
        (EMPTY, "<think>\n\n</think>\n<answer>Edema</answer>", "<answer>Edema</answer>"),
        (EMPTY, "<answer>Edema</answer>", "<answer>Edema</answer>"),
        (EMPTY, "No acute finding.", "No acute finding."),
        ("Certainly. ", "Certainly. Wet.", "Wet."),
        ("Certainly. ", FULL, FULL),
        ("<think>\nLet me", "<think> Let me see.</think>", " see.</think>"),
    ],
)
def test_a_target_does_not_repeat_what_the_template_opened(opened, target, left):
    assert targets.continuation(target, opened) == left
    made = targets.Completions(tokenizer_with(opened), 64).encode([target], [opened])
    ids = made["completions"][0, : made["lengths"][0] - 1]
    assert tokenizer_with(opened).decode(ids) == left and made["mask"].sum() == len(ids) + 1


@pytest.mark.parametrize(
    ("opened", "target"),
    [
        (EMPTY, FULL),  # a second trace
        (EMPTY, "Wet.</think><answer>Edema</answer>"),
        ("<think>\n", "<answer>Edema</answer>"),  # a trace that never ends
        ("<think>\n", "No acute finding."),
        ("<think>\n", "So: " + FULL),
        ("<think>\n", "Wet.</think></think>"),
    ],
)
def test_a_target_that_does_not_go_on_from_what_was_opened_is_refused(opened, target):
    with pytest.raises(UserError, match="does not go on from") as refusal:
        targets.Completions(tokenizer_with(opened), 64).encode([target], [opened])
    assert "\n" not in str(refusal.value)


def test_tags_of_a_target_are_tokens_and_special_tokens_that_it_spells_are_text():
    tokenizer = tokenizer_with("")
    vocabulary = tokenizer.get_vocab()
    completions = targets.Completions(tokenizer, 96)
    for token in set(tokenizers.SPECIAL_TOKENS) - {"<|image_pad|>", "<|video_pad|>"}:
        text = f"<think>Wet {token} lungs.</think><answer>Edema</answer>{token}"
        made = completions.encode([FULL, text])
        row = made["completions"][1][made["mask"][1]].tolist()
        assert tokenizer.decode(row[:-1]) == text and row[-1] == vocabulary["<|im_end|>"]
        assert [row.count(vocabulary[tag]) for tag in tokenizers.FORMAT_TAGS] == [1, 1, 1, 1]
        special = {vocabulary[name] for name in tokenizers.SPECIAL_TOKENS}
        assert special.isdisjoint(row[:-1])
        assert row[-1 - len(split(token)) : -1] == split(token)
        # The row beside it is what it was.
        first = made["completions"][0][made["mask"][0]].tolist()
        assert first[:-1] == tokenizer(FULL, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("place", ["<|image_pad|>", "<|video_pad|>"])
def test_a_target_with_the_place_of_an_image_is_refused(place):
    with pytest.raises(UserError, match=re.escape(place)):
        targets.Completions(tokenizer_with(""), 64).encode([f"Wet {place}."])


class Rows:
    """A source of two rows, without images."""

    name, size = "rows", 8

    def __len__(self):
        return 2

    def batch(self, indices):
        truth = np.zeros((len(indices), 14), bool)
        batch = dict.fromkeys(("solution", "known", "hedged"), truth)
        return batch | {"image": np.zeros((len(indices), 8, 8)), "sides": np.zeros(1)}

    def about(self, indices):
        return {"prompts": ["What?"] * len(indices), "ids": ["a"] * len(indices)}

    def conversations(self, batch, indices):
        return [(Message("user", "What?"), Message("assistant", FULL))] * len(indices)


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_batches_of_sft_and_replay_leave_out_what_was_opened(opened):
    tokenizer = tokenizer_with(opened)
    encoder = prompts.Prompts(tokenizer, PHANTOM, (1, 4, 4), 64, texts=["What?"])
    completions = targets.Completions(tokenizer, 64)
    examples = conversations.Examples(encoder, completions, "each")
    sft = RunConfig.from_config(presets_sft.get_config())
    sft = dataclasses.replace(sft, batch_size=2, locate_steps=0, locate_weight=0.0)
    config = presets_rl.get_config()
    config.rl.update({"prompts_per_step": 2, "replay_weight": 0.1, "replay_batch": 2})
    rl = RunConfig.from_config(config)
    for batch in (
        sft_loop.make_batch_fn(sft, Rows(), examples)(0),
        rl_batches.make_batch_fn(rl, Rows(), encoder, examples)(0)["replay"],
    ):
        for row, mask in zip(batch["completions"], batch["mask"], strict=True):
            assert opened + tokenizer.decode(row[mask][:-1]) == FULL
        assert ("opened" in batch["prompts"]) == bool(opened)
