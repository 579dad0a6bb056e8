"""Texts that end a completion: on the device as decoding and searching after every token finds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.rl import checks
from cxr_jax.rl.stop_texts import StopTexts
from experiments import rl as experiment

ROWS, TOKENS = 200, 24
SETS = [
    ("</answer>",),
    ("aab", "abab", "b"),  # one inside another
    ("abab", "bc", "ca"),  # that overlap
    ("é", "日本", "a\n"),  # that begin and end inside characters of several bytes
    ("<|x|>", "a" * 9),
]


def vocabulary_of(rng, texts):
    """Byte strings of tokens: parts of the texts, also with something before and behind, and some that are empty."""
    around = [b"", b"a", b"<", "é".encode(), b"\xe6\x97"]
    pieces = {b""}
    for text in map(str.encode, texts):
        for start in range(len(text)):
            part = text[start : start + rng.integers(1, 5)]
            pieces |= {
                text[start : start + 1],
                part,
                rng.choice(around) + part,
                part + rng.choice(around),
            }
    return [b"", *sorted(pieces)]


def random_rows(rng, texts, pieces):
    """Rows of tokens [ROWS, TOKENS]: any tokens, ids that no piece has, and texts cut somehow into pieces."""
    rows = []
    for _ in range(ROWS):
        row = []
        while len(row) < TOKENS:
            row.append(rng.integers(len(pieces) + 2))
            if rng.random() < 0.1:
                text = str(rng.choice(texts)).encode()[: rng.integers(1, 12)]
                while text:
                    fitting = [
                        number
                        for number, piece in enumerate(pieces)
                        if piece and text.startswith(piece)
                    ]
                    row.append(rng.choice(fitting))
                    text = text[len(pieces[row[-1]]) :]
        rows.append(row[:TOKENS])
    return np.array(rows, np.int32)


def first_end(pieces, tokens, texts):
    """After how many tokens the decoded text first holds one of the texts; None: never."""
    for count in range(1, len(tokens) + 1):
        data = b"".join(pieces[token] for token in tokens[:count] if token < len(pieces))
        if any(text in data.decode(errors="replace") for text in texts):
            return count
    return None


@pytest.mark.parametrize("texts", SETS, ids=ascii)
def test_as_decoding_and_searching_finds_them(texts):
    rng = np.random.default_rng(0)
    pieces = vocabulary_of(rng, texts)
    tokens = random_rows(rng, texts, pieces)
    stop = StopTexts.compile(texts, TokenBytes.from_pieces(pieces), len(pieces) + 2)

    def advance(state, token):
        state = stop.advance(state, token)
        return state, stop.is_complete(state)

    _, complete = jax.jit(lambda tokens: jax.lax.scan(advance, stop.init(ROWS), tokens.T))(tokens)
    lengths = []
    for row, of_row in zip(tokens, np.asarray(complete).T, strict=True):
        end = first_end(pieces, row, texts)
        lengths.append(end or 0)
        assert of_row.tolist() == [
            end is not None and count >= end for count in range(1, TOKENS + 1)
        ]
    # Some sooner, some later.
    assert ROWS // 8 < np.count_nonzero(lengths) and len(set(lengths)) > 4


def test_a_vocabulary_may_be_larger_or_smaller_than_its_table():
    table = TokenBytes.from_pieces([b"a", b"b", b"ab"])
    for vocab_size in (2, 3, 5):
        stop = StopTexts.compile(("ab",), table, vocab_size)
        assert stop.classes.shape == (vocab_size,)
        state = stop.advance(stop.advance(stop.init(1), jnp.array([0])), jnp.array([1]))
        assert stop.is_complete(state).all()


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("",), "config.rl.stop holds '': must be texts of one character or more"),
        (("a", 7), "holds 7: must be texts"),
        ((b"a",), "holds b'a': must be texts"),
        (3, "config.rl.stop=3 must be a tuple of texts"),
        ("</answer>", "config.rl.stop='</answer>' must be a tuple of texts"),
        (("a\ufffd",), "holds 'a\\ufffd', which has a character that no token writes"),
        (("\udc41",), "holds '\\udc41', which has a character that no token writes"),
        (("a", "b<|im_end|>"), "holds 'b<|im_end|>': <|im_end|> is a special token"),
        (("é" * 100, "a" * 56), "holds 256 bytes of text, more than 255"),
    ],
    ids=str,
)
def test_bad_ones_are_refused_in_one_line(texts, said):
    config = experiment.get_config()
    with config.ignore_type():
        config.rl.stop = texts
    with pytest.raises(UserError) as refusal:
        checks.check(config)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
