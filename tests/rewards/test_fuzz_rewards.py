"""Reward terms from token ids equal plain Python on the decoded text, for three tokenizers.

tests/oracle/fuzz_rewards.py compares millions of strings in the same way.
"""

import fuzz_tokenizers as fuzz
import pytest
from oracle import fuzz_rewards

STRINGS = 8000  # of each tokenizer

# Of a hundred strings, at least so many: a run in which next to nothing has an answer would prove little.
AT_LEAST = {
    "empty text": 1,
    "odd ids only": 1,
    "an odd id": 10,
    "not ASCII": 50,
    "invalid UTF-8": 10,
}
AT_LEAST |= {
    "line end at the end": 3,
    "format": 15,
    "answer": 30,
    "answer with labels": 15,
    "cut off": 0.1,
}
AT_LEAST |= {
    "accuracy between": 5,
    "accuracy 1 with labels": 3,
    "accuracy_hard > 0": 5,
    "overshort between": 30,
}
AT_LEAST |= {"overshort -1": 0.3, "tag_count 0": 10, "tag_count 0.5": 10, "tag_count 1": 10}


@pytest.mark.parametrize("name", fuzz_rewards.TOKENIZERS)
def test_no_string_differs(name):
    counts = fuzz_rewards.Counts()
    differ, examples = fuzz_rewards.run(fuzz.load(name), STRINGS, counts=counts)
    assert not differ, examples
    summary = counts.summary()
    assert summary["strings"] == STRINGS and summary["longest"] > fuzz_rewards.rewards.MIN_LENGTH
    assert summary["made as"].keys() >= {"edge", "canonical", "split", "bytes", "ids"}
    assert not {
        k: summary["percent"][k] for k, least in AT_LEAST.items() if summary["percent"][k] < least
    }


def test_a_wrong_table_is_found_and_the_string_cut_down():
    """What the comparison is worth: a token that spells one wrong byte."""
    subject = fuzz.load("phantom")
    comma = subject.ids[b","][0]
    data = subject.table.data.copy()
    data[subject.table.offset[comma]] = ord(";")
    differ, examples = fuzz_rewards.run(
        subject._replace(table=subject.table._replace(data=data)), 1024, most=1
    )
    assert differ > 50
    assert len(examples[0]["ids"]) < 25 and comma in examples[0]["ids"]
    assert examples[0]["device and Python differ"].keys() & {"accuracy", "invented"}


def test_the_made_up_tokenizer_is_built_like_qwen2_5():
    subject = fuzz.load("qwen")
    tokenizer, pieces = subject.tokenizer, subject.pieces
    assert (
        len(tokenizer) == len(pieces) == 151_665
        and len(set(pieces[: fuzz.QWEN_BASE])) == fuzz.QWEN_BASE
    )
    names = ["<|endoftext|>", "<|im_end|>", "<|video_pad|>", "<tool_call>", "<|file_sep|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [151_643, 151_645, 151_656, 151_657, 151_664]
    assert tokenizer.decode(range(151_643, 151_936), skip_special_tokens=True) == "".join(
        fuzz.QWEN_ADDED
    )
    assert pieces[: fuzz.QWEN_BASE] == fuzz.qwen_merges()[0]
    text = "<think>\u80ba: clear.</think>\n<answer>Lung Opacity</answer><|im_end|>"
    ids = fuzz.canonical(subject, [text])[0]
    assert (
        len(ids) < len(text) // 2
        and tokenizer.decode(ids, skip_special_tokens=True) + "<|im_end|>" == text
    )
    # Pieces that cross the borders of tags, or cut characters, are what makes ids harder than text.
    assert sum(b">" in p[:-1] or b"<" in p[1:] for p in pieces) > 10_000
    assert sum(0x80 <= p[0] < 0xC0 for p in pieces if p) > 10_000


def test_random_cuts_spell_the_same_bytes():
    rng = fuzz.Rng(0)
    for name in fuzz_rewards.TOKENIZERS:
        subject = fuzz.load(name)
        for data in [text.encode() for text in fuzz.EDGES] + fuzz.BROKEN_EDGES:
            ids = fuzz.split(rng, subject, data)
            assert fuzz_rewards.spelt(subject, ids) == data
            assert subject.tokenizer.decode(ids, skip_special_tokens=True) == data.decode(
                "utf-8", "replace"
            )
