"""Plain text: spelled special tokens by transformers' own splitting, and the same ids as ever for all other texts."""

import chat_templates
import numpy as np
import pytest
from chat_templates import split, tokenizer_with
from hypothesis import given
from hypothesis import strategies as st

from cxr_jax.errors import UserError
from cxr_jax.models import plain_text
from cxr_jax.models import tokenizer as tokenizers

TOKENIZER = tokenizer_with("")
ADDED = sorted(token.content for token in TOKENIZER.added_tokens_decoder.values())
MARK = "\ufdd0"


@given(st.lists(st.sampled_from([*ADDED, "<", "|>", "ab", " ", "\n", "é", "日"]), max_size=8))
def test_texts_of_people_are_split_as_transformers_splits_them(parts):
    text = "".join(parts)
    assert plain_text.encode_texts(TOKENIZER, [text]) == [split(text)]


@given(st.text(max_size=30), st.integers(0, 40))
def test_the_two_ways_to_encode_agree_where_nothing_is_spelled(text, place):
    text = text.encode("utf-8", "ignore").decode().replace(MARK, "")
    framed = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>"
    # A mark anywhere but in a token of the frame takes the other way.
    marked = framed[: 17 + min(place, len(text))] + MARK + framed[17 + min(place, len(text)) :]
    assert (
        plain_text.encode_marked(TOKENIZER, marked, MARK)
        == (TOKENIZER(framed, add_special_tokens=False)["input_ids"])
    )


def test_what_a_text_spells_is_told_overlaps_included():
    spelled = plain_text.spelled_tokens
    assert spelled(TOKENIZER, "no <think token|>") == []
    assert spelled(TOKENIZER, "<think><<|im_end|></think><think>") == [
        "<think>",
        "<|im_end|>",
        "</think>",
    ]
    assert spelled(TOKENIZER, "<think><|im_end|>", tokenizers.FORMAT_TAGS) == ["<|im_end|>"]


def test_a_mark_is_none_of_the_characters_of_the_texts():
    assert plain_text.choose_mark(["a", MARK]) == "\ufdd1"
    with pytest.raises(UserError, match="noncharacters"):
        plain_text.choose_mark([chr(code) for code in range(0xFDD0, 0xFDF0)])


def test_a_tokenizer_that_cannot_split_is_refused_in_one_line():
    class Slow:
        all_special_tokens = ()

    with pytest.raises(UserError, match="no fast one") as refusal:
        plain_text.encode_texts(Slow(), ["<|im_end|>"])
    assert "\n" not in str(refusal.value)


def test_a_completion_for_people_begins_with_what_was_opened():
    ids = TOKENIZER("Wet.</think><|im_end|>", add_special_tokens=False)["input_ids"]
    opened = TOKENIZER("<think>\n", add_special_tokens=False)["input_ids"]
    tokens, padded = np.array([*ids, 0, 0]), np.array([-1, *opened])
    show = tokenizers.completion_text
    assert show(TOKENIZER, tokens, len(ids), padded) == "<think>\nWet.</think>"
    assert show(TOKENIZER, tokens, len(ids)) == "Wet.</think>"


def test_tags_are_no_control_tokens_even_where_a_tokenizer_calls_them_special():
    control = plain_text.control_tokens(chat_templates.splitting_tokenizer())
    assert control == set(tokenizers.SPECIAL_TOKENS)
