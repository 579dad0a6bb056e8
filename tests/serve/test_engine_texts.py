"""Stop texts: the same cut, however tokens come in turns, and no letter of one is told."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from generating import TOKENIZER

from cxr_jax.inference.requests import text_of
from cxr_jax.serve.slots.texts import GrowingDecode, RowText

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


class Tokens:
    """A tokenizer that counts how many tokens it is asked for; "ByteLevel" says what its decoder does."""

    def __init__(self, decoder):
        self.asked = 0
        kind = type(decoder, (), {})
        self.backend_tokenizer = SimpleNamespace(decoder=kind())

    def decode(self, ids, **_):
        self.asked += len(ids)
        return TOKENIZER.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_what_is_settled_is_not_decoded_again_and_the_text_is_that_of_the_whole():
    # All bytes, so that characters are split, broken, and never begun; tags and marks between them.
    rng = np.random.default_rng(1)
    for turn in range(40):
        ids = rng.integers(0, len(TOKENIZER), 60).tolist() if turn % 2 else [*IDS, *IDS]
        cuts = sorted({*rng.choice(range(1, len(ids)), 12).tolist(), len(ids)})
        for decoder in ("ByteLevel", "Sequence"):
            tokens = Tokens(decoder)
            growing = GrowingDecode(tokens)
            for cut in cuts:
                assert growing.of(ids, cut) == text_of(TOKENIZER, ids[:cut])
            if decoder == "ByteLevel" and ids[0] == IDS[0]:
                assert tokens.asked < 2 * len(ids)
    assert type(TOKENIZER.backend_tokenizer.decoder).__name__ == "ByteLevel"


def test_the_limit_cuts_what_the_device_has_drawn_beyond_it():
    row, _ = grown((), [8, 16], most=10)
    assert row.finish_reason == "length" and row.token_ids == IDS[:10]
    assert row.completion().text == text_of(TOKENIZER, IDS[:10])
