"""Stop texts: the same cut, however tokens come in turns, and no letter of one is told."""

import itertools

import numpy as np
import pytest
from generating import TOKENIZER

from cxr_jax.inference.requests import text_of
from cxr_jax.serve.slots.texts import RowText

TEXT = "<think>Lungs: clear. No effusion, no effusion. Bones: é ü 中 intact.</think><answer>No Finding</answer>"
IDS = TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
STOPS = ("effusion, no e", " No", "ü", "中 i", "</think>", "g", "zz", "<answer>N", "éé")


def first_complete(text, stop):
    """The oracle: letter by letter, the first time that a stop text is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(each) for each in stop if text[:end].endswith(each)]
        if starts:
            return min(starts)
    return None


def grown(stop, cuts, opened="", most=10**6):
    row, told = RowText(TOKENIZER, opened, stop, most), []
    for start, end in itertools.pairwise([0, *cuts, len(IDS)]):
        told.append(row.add(IDS[start:end], [-1.0] * (end - start), end == len(IDS)))
        # A beginning of a stop text that was told could not be taken back.
        so_far = "".join(text for text, _, _ in told)
        assert not any(each in so_far for each in stop)
        if row.finish_reason:
            break
    return row, told


@pytest.mark.parametrize("opened", ("", "<think>\n"))
def test_the_cut_does_not_depend_on_the_turns(opened):
    rng = np.random.default_rng(0)
    whole = text_of(TOKENIZER, IDS[:-1])
    for stop in [(), *itertools.combinations(STOPS, 1), *itertools.combinations(STOPS, 2)]:
        place, kept = first_complete(whole, stop), set()
        for _ in range(4):
            cuts = sorted(rng.choice(range(1, len(IDS)), rng.integers(1, 12), replace=False))
            row, told = grown(stop, cuts, opened)
            text = "".join(text for text, _, _ in told)
            assert text == row.text == opened + (whole if place is None else whole[:place])
            assert row.finish_reason == "stop"
            tokens = sum((list(ids) for _, ids, _ in told), [])
            assert tokens == row.token_ids == row.completion().token_ids
            assert len(row.logprobs) == len(tokens)
            kept.add(tuple(tokens))
        assert len(kept) == 1


def test_the_limit_cuts_what_the_device_has_drawn_beyond_it():
    row, _ = grown((), [8, 16], most=10)
    assert row.finish_reason == "length" and row.token_ids == IDS[:10]
    assert row.completion().text == text_of(TOKENIZER, IDS[:10])
