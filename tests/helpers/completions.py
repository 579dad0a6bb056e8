"""Completions in the answer format, and a small tokenizer that is as odd as tokenizers get."""

import functools

import fuzz_texts
import numpy as np


def good(answer, think="clear"):
    return f"<think>{think}</think><answer>{answer}</answer>"


@functools.cache
def small_tokenizer():
    """A byte-level BPE whose merges cross tags and split characters; two tags are added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=sorted(alphabet),
        special_tokens=["<|im_end|>", "<|image_pad|>"],
        show_progress=False,
    )
    tok.train_from_iterator([fuzz_texts.near_miss(rng) for _ in range(400)], trainer)
    # Added tokens that decode in unusual ways: a tag, text outside the byte alphabet, and a letter inside it.
    tok.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t in ("<think>", "</answer>", "edema \u3000", "\u0120x")
        ]
    )
    return tok
