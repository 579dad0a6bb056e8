"""The phantom tokenizer: Qwen2.5's special tokens and chat frame, tags of one id, and nothing lost on the way."""

import dataclasses
import functools
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_jax.errors import UserError
from cxr_jax.inference import prompts
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.training import targets
from cxr_jax.weights import pretrained


@functools.cache
def embedded():
    return tokenizers.load(pretrained.PHANTOM)


@pytest.fixture
def tokenizer():
    return embedded()


TARGET = "<think>Frontal view. The heart is enlarged.</think><answer>Cardiomegaly, Pleural Effusion</answer>"


def test_special_tokens_are_one_id_each_and_fit_the_model(tokenizer):
    vocab = tokenizer.get_vocab()
    assert max(vocab.values()) < PHANTOM.text.vocab_size
    for token in (*tokenizers.SPECIAL_TOKENS, *tokenizers.FORMAT_TAGS):
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [vocab[token]]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_special_ids(tokenizer):
    vocab, special = tokenizer.get_vocab(), tokenizers.special_ids(tokenizer)
    assert special["stop"] == (vocab["<|im_end|>"], vocab["<|endoftext|>"])
    assert special["pad"] == vocab["<|endoftext|>"]
    names = {tokenizer.convert_ids_to_tokens(i) for i in special["suppress"]}
    assert names == set(tokenizers.SPECIAL_TOKENS) - {"<|im_end|>", "<|endoftext|>"}
    full = tokenizers.special_ids(tokenizer, PHANTOM.text.vocab_size)["suppress"]
    assert set(full) - set(special["suppress"]) == set(range(PHANTOM.text.vocab_size)) - set(
        vocab.values()
    )


def test_config_ids(tokenizer):
    vocab, ids = tokenizer.get_vocab(), tokenizers.config_ids(tokenizer)
    assert dataclasses.replace(PHANTOM, **ids) == PHANTOM
    assert (
        ids["image_token_id"] == vocab["<|image_pad|>"]
        and ids["pad_token_id"] == vocab["<|endoftext|>"]
    )
    assert ids["eos_token_id"] == (vocab["<|im_end|>"], vocab["<|endoftext|>"])


def test_tags_stay_in_the_text_and_special_tokens_do_not(tokenizer):
    ids = tokenizer(TARGET + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TARGET
    assert [ids.count(tokenizer.get_vocab()[t]) for t in tokenizers.FORMAT_TAGS] == [1, 1, 1, 1]


def test_chat_frame_is_that_of_qwen2_5(tokenizer):
    ids = prompts.prompt_ids(tokenizer, "Find abnormalities and support devices.", [3])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "Find abnormalities and support devices.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "vision" not in tokenizer.decode(prompts.prompt_ids(tokenizer, "Hello"))


def test_chat_frame_with_a_system_turn_and_history(tokenizer):
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Edema."},
        {"role": "user", "content": "Where?"},
    )
    assert tokenizer.decode(prompts.conversation_ids(tokenizer, messages, [1])) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nEdema.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "\n\n\ttab\r\n",
        "it's 12.5 cm (3/4)",
        "naïve café — “quoted”",
        "日本語のテキスト",
        "العربية",
        "🫁👩🏽‍⚕️ X",
        "\u200b\ufeff\u00a0",
        "\x00\x07\x7f",
        "<think><think></answer>",
        "<|im_",
        "a" * 500,
        "\U0010ffff",
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@given(st.text(max_size=40))
def test_round_trip_of_any_text(text):
    """Up to composition: the tokenizer normalises to NFC, as Qwen's does."""
    tokenizer = embedded()
    text = unicodedata.normalize("NFC", text.encode("utf-8", "ignore").decode())
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_completions(tokenizer):
    made = targets.Completions(tokenizer, 64).encode([TARGET, "No."])
    ids, mask = made["completions"], made["mask"]
    assert ids.shape == mask.shape == (2, 64) and ids.dtype == np.int32
    for row, m, text in zip(ids, mask, [TARGET, "No."], strict=True):
        n = m.sum()
        assert m[:n].all() and row[n - 1] == tokenizer.get_vocab()["<|im_end|>"]
        assert (
            tokenizer.decode(row[: n - 1]) == text
            and (row[n:] == tokenizer.get_vocab()["<|endoftext|>"]).all()
        )
    with pytest.raises(UserError, match="more than config.max_completion=10"):
        targets.Completions(tokenizer, 10).encode([TARGET])


def test_training_is_reproducible_and_small(tmp_path):
    corpus = [TARGET, "Find abnormalities and support devices."] * 20
    for name in "ab":
        assert tokenizers.train(corpus, str(tmp_path / name), vocab_size=300) <= 300
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    made = tokenizers.load(str(tmp_path / "a"))
    assert made.get_vocab()["<think>"] >= 256 and made.chat_template == embedded().chat_template


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        tokenizers.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="does not load"):
        tokenizers.load(str(tmp_path))
