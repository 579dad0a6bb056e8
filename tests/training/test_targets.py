"""Targets: what is left to write behind what a template opened, and special tokens that a row spells."""

import re

import pytest
from chat_templates import OPENED, split, tokenizer_with

from cxr_jax.errors import UserError
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.training import targets

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
    ids = targets.Completions(tokenizer_with(opened), 64).token_ids([target], [opened])[0]
    assert tokenizer_with(opened).decode(ids) == left


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
