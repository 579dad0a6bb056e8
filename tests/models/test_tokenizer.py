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
from cxr_jax.models import tokenizer
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.training import targets
from cxr_jax.weights import pretrained


@functools.cache
def embedded():
    return tokenizer.load(pretrained.PHANTOM)


@pytest.fixture
def tok():
    return embedded()


TARGET = "<think>Frontal view. The heart is enlarged.</think><answer>Cardiomegaly, Pleural Effusion</answer>"


def test_special_tokens_are_one_id_each_and_fit_the_model(tok):
    vocab = tok.get_vocab()
    assert max(vocab.values()) < PHANTOM.text.vocab_size
    for token in (*tokenizer.SPECIAL_TOKENS, *tokenizer.FORMAT_TAGS):
        assert tok(token, add_special_tokens=False)["input_ids"] == [vocab[token]]
    assert tok.eos_token == "<|im_end|>" and tok.pad_token == "<|endoftext|>"


def test_special_ids(tok):
    vocab, special = tok.get_vocab(), tokenizer.special_ids(tok)
    assert special["stop"] == (vocab["<|im_end|>"], vocab["<|endoftext|>"])
    assert special["pad"] == vocab["<|endoftext|>"]
    names = {tok.convert_ids_to_tokens(i) for i in special["suppress"]}
    assert names == set(tokenizer.SPECIAL_TOKENS) - {"<|im_end|>", "<|endoftext|>"}
    full = tokenizer.special_ids(tok, PHANTOM.text.vocab_size)["suppress"]
    assert set(full) - set(special["suppress"]) == set(range(PHANTOM.text.vocab_size)) - set(
        vocab.values()
    )


def test_config_ids(tok):
    vocab, ids = tok.get_vocab(), tokenizer.config_ids(tok)
    assert dataclasses.replace(PHANTOM, **ids) == PHANTOM
    assert (
        ids["image_token_id"] == vocab["<|image_pad|>"]
        and ids["pad_token_id"] == vocab["<|endoftext|>"]
    )
    assert ids["eos_token_id"] == (vocab["<|im_end|>"], vocab["<|endoftext|>"])


def test_tags_stay_in_the_text_and_special_tokens_do_not(tok):
    ids = tok(TARGET + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert tok.decode(ids, skip_special_tokens=True) == TARGET
    assert [ids.count(tok.get_vocab()[t]) for t in tokenizer.FORMAT_TAGS] == [1, 1, 1, 1]


def test_chat_frame_is_that_of_qwen2_5(tok):
    ids = prompts.prompt_ids(tok, "Find abnormalities and support devices.", 3)
    assert tok.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "Find abnormalities and support devices.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "vision" not in tok.decode(prompts.prompt_ids(tok, "Hello", 0))


def test_chat_frame_with_a_system_turn_and_history(tok):
    history = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Edema."},
    )
    assert tok.decode(prompts.prompt_ids(tok, "Where?", 0, history=history)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|vision_end|>What?<|im_end|>\n"
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
def test_round_trip(tok, text):
    assert tok.decode(tok(text, add_special_tokens=False)["input_ids"]) == text


@given(st.text(max_size=40))
def test_round_trip_of_any_text(text):
    """Up to composition: the tokenizer normalises to NFC, as Qwen's does."""
    tok = embedded()
    text = unicodedata.normalize("NFC", text.encode("utf-8", "ignore").decode())
    assert tok.decode(tok(text, add_special_tokens=False)["input_ids"]) == text


def test_completions(tok):
    made = targets.Completions(tok, 64).encode([TARGET, "No."])
    ids, mask = made["completions"], made["mask"]
    assert ids.shape == mask.shape == (2, 64) and ids.dtype == np.int32
    for row, m, text in zip(ids, mask, [TARGET, "No."], strict=True):
        n = m.sum()
        assert m[:n].all() and row[n - 1] == tok.get_vocab()["<|im_end|>"]
        assert (
            tok.decode(row[: n - 1]) == text and (row[n:] == tok.get_vocab()["<|endoftext|>"]).all()
        )
    with pytest.raises(UserError, match="more than config.max_completion=10"):
        targets.Completions(tok, 10).encode([TARGET])


def test_training_is_reproducible_and_small(tmp_path):
    corpus = [TARGET, "Find abnormalities and support devices."] * 20
    for name in "ab":
        assert tokenizer.train(corpus, str(tmp_path / name), vocab_size=300) <= 300
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    made = tokenizer.load(str(tmp_path / "a"))
    assert made.get_vocab()["<think>"] >= 256 and made.chat_template == embedded().chat_template


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="does not load"):
        tokenizer.load(str(tmp_path))
