"""Reward terms: equal to plain Python strings on every text, from text bytes and from token ids."""

import os

import fuzz_texts
import jax
import jax.numpy as jnp
import numpy as np
import oracle_rewards as oracle
import pytest
from chat_templates import OPENED, tokenizer_with
from compile_counts import compiled
from completions import good
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_jax import rewards
from cxr_jax.errors import UserError
from cxr_jax.labels import CHEXPERT_14, answers

N_FUZZ = int(
    os.environ.get("CXR_JAX_FUZZ", "24000")
)  # texts; those of token ids are in test_fuzz_rewards.py
TERMS = ("accuracy", "format", "tag_count", "accuracy_hard", "overshort", "invented")
BATCH, WIDTH = 512, 640


def expected(texts, solutions, lengths):
    rows = [oracle.score(*row) for row in zip(texts, solutions, lengths, strict=True)]
    return {term: np.array([row[term] for row in rows], np.float32) for term in TERMS}


def assert_same(got, texts, solutions, lengths):
    want = expected(texts, solutions, lengths)
    for term in TERMS:
        wrong = np.flatnonzero(np.asarray(got[term]) != want[term])
        shown = [(texts[i], solutions[i], got[term][i], want[term][i]) for i in wrong[:3]]
        assert not len(wrong), f"{term}: {len(wrong)} differences, such as {shown}"


@jax.jit
def _terms_of_bytes(stream, sizes, solution, lengths):
    return rewards.reward_terms(answers.parse_bytes(stream, sizes), solution, lengths)


def check_bytes(coded, solutions, lengths):
    """One call of fixed shape, so that the whole fuzz run compiles once."""
    stream = np.zeros((BATCH, WIDTH), np.uint8)
    sizes = np.zeros(BATCH, np.int32)
    for i, data in enumerate(coded):
        stream[i, : len(data)] = np.frombuffer(data, np.uint8)
        sizes[i] = len(data)
    stream[np.arange(WIDTH) >= sizes[:, None]] = ord(">")  # what lies past the end must not count
    got = jax.device_get(_terms_of_bytes(stream, sizes, rewards.solution_mask(solutions), lengths))
    assert_same(got, [d.decode("utf-8", "replace") for d in coded], solutions, lengths)


# --- differential fuzzing ----------------------------------------


def test_fuzz_bytes():
    """Half valid text, half with broken UTF-8."""
    rng = np.random.default_rng(int(os.environ.get("CXR_JAX_FUZZ_SEED", "1")))
    for _ in range(0, N_FUZZ, BATCH):
        coded = []
        while len(coded) < BATCH:
            data = (
                fuzz_texts.text(rng).encode() if rng.random() < 0.5 else fuzz_texts.raw_bytes(rng)
            )
            if len(data) <= WIDTH:
                coded.append(data)
        check_bytes(
            coded,
            [fuzz_texts.solution(rng) for _ in coded],
            rng.integers(0, 900, BATCH).astype(np.int32),
        )


_PIECES = [
    *oracle.TAGS,
    *oracle.NAMES,
    *fuzz_texts.SPACES,
    *fuzz_texts.LOOKALIKES,
    *fuzz_texts.BROKEN_TAGS,
    ",",
    "\n",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.sampled_from(_PIECES), st.text(max_size=3)), max_size=16),
    st.integers(0, 1000),
)
def test_hypothesis_finds_no_difference(pieces, length):
    """The same comparison, where a failing text is shrunk to its core."""
    text = "".join(pieces)
    got = rewards.score([text, good(text)], ["edema, lung opacity"] * 2, [length] * 2)
    assert_same(got, [text, good(text)], ["edema, lung opacity"] * 2, [length] * 2)


# --- the definition, case by case ----------------------------------------


@pytest.mark.parametrize(
    "text, solution, accuracy, form, tags",
    [
        (good("Edema, Lung Opacity"), "lung opacity,edema", 1.0, 1.0, 1.0),
        (good("Edema"), "Edema, Pneumonia", 0.5, 1.0, 1.0),
        (good(""), "", 1.0, 1.0, 1.0),
        (good(" , ,"), "unknown name", 1.0, 1.0, 1.0),
        ("no element", "", 0.0, 0.0, 0.0),
        ("<answer>edema", "edema", 0.0, 0.0, 0.25),
        ("</answer><answer>edema", "edema", 0.0, 0.0, 0.5),
        (good("EDEMA\u3000") + "\n", "edema", 1.0, 1.0, 1.0),
        (good("edema") + "\n\n", "edema", 1.0, 0.0, 1.0),
        (good("edema") + " ", "edema", 1.0, 0.0, 1.0),
        (" " + good("edema"), "edema", 1.0, 0.0, 1.0),
        ("<think></think>\x1c\u2029<answer>edema</answer>", "edema", 1.0, 1.0, 1.0),
        ("<think></think>\u200b<answer>edema</answer>", "edema", 1.0, 0.0, 1.0),
        (good("edema") + good("fracture"), "edema", 1.0, 1.0, 0.0),
        ("<think><answer>fracture</answer></think><answer>edema</answer>", "edema", 0.0, 1.0, 0.5),
        ("<answer><answer>edema,fracture</answer>", "edema,fracture", 0.5, 0.0, 0.25),
        (good("edema</answer,fracture"), "fracture", 1.0, 1.0, 1.0),
        (good("edema<"), "edema", 0.0, 1.0, 1.0),
    ],
)
def test_cases(text, solution, accuracy, form, tags):
    got = rewards.score([text], [solution], [400])
    assert (got["accuracy"][0], got["format"][0], got["tag_count"][0]) == (accuracy, form, tags)
    assert got["accuracy_hard"][0] == accuracy * form * (tags == 1)
    assert_same(got, [text], [solution], [400])


def test_overshort():
    got = rewards.score(["x"] * 5, [""] * 5, [0, 1, 200, 399, 5000])["overshort"]
    np.testing.assert_array_equal(got, np.array([-1, -399 / 400, -0.5, -1 / 400, 0], np.float32))
    assert rewards.score(["x"], [""], [50], min_length=100)["overshort"][0] == -0.5
    assert "overshort" not in rewards.score(["x"], [""])


def test_score_is_float32_and_keeps_order():
    texts = [good("edema") + "x" * (i * 37 % 900) for i in range(700)] + [good("edema")]
    got = rewards.score(texts, ["edema"] * len(texts))
    assert all(v.dtype == np.float32 and v.shape == (701,) for v in got.values())
    assert_same(rewards.score(texts, ["edema"] * 701, [3] * 701), texts, ["edema"] * 701, [3] * 701)
    assert rewards.score([], [])["accuracy"].shape == (0,)


def test_bad_arguments():
    with pytest.raises(UserError, match="1 texts, 2 solutions"):
        rewards.score(["a"], ["b", "c"])
    with pytest.raises(UserError, match="min_length"):
        rewards.score(["a"], ["b"], [1], min_length=0)
    terms = {"accuracy": jnp.ones(2), "format": jnp.ones(2)}
    with pytest.raises(UserError, match="'acuracy'.*accuracy, format"):
        rewards.combine(terms, {"acuracy": 1.0})
    np.testing.assert_allclose(rewards.combine(terms, {"accuracy": 1.0, "format": 0.5}), [1.5, 1.5])


def test_solutions_as_lists_of_names():
    want = rewards.solution_mask(["Edema, No Finding", "Edema"])
    for lists in ([["Edema", "No Finding"], ["Edema"]], [("edema", "no finding"), "Edema"]):
        np.testing.assert_array_equal(rewards.solution_mask(lists), want)
    for bad in (None, 3, ["Edema", None], float("nan"), {"Edema": 1}):
        with pytest.raises(UserError, match="solution 2 is neither"):
            rewards.solution_mask(["Edema", bad])


def test_solution_masks():
    mask = rewards.solution_mask([" Edema,\tNO FINDING ,junk,", ""])
    assert [CHEXPERT_14[i] for i in np.flatnonzero(mask[0])] == [
        "No Finding",
        "Edema",
    ] and not mask[1].any()
    np.testing.assert_array_equal(rewards.solution_mask(["edema, no finding"]), mask[:1])


# --- what a chat template has opened -----------------------------------------


def test_what_the_prompt_opened_counts_as_if_it_had_been_written():
    """Token ids, any beginning of any text as the prompt's: one program, and the oracle on the whole text."""
    tokenizer = tokenizer_with("")
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    table = answers.TokenBytes.from_tokenizer(tokenizer)
    rng = np.random.default_rng(3)
    opened_width, token_width, rows = 40, 260, 256

    @jax.jit
    def terms_of(opened, tokens, lengths, solution):
        width = (opened_width + token_width) * rewards.BYTES_PER_TOKEN
        parsed = answers.parse_tokens(tokens, lengths, table, width, opened)
        return rewards.reward_terms(parsed, solution, lengths)

    with compiled() as names:
        for _ in range(4):
            texts, lengths, solutions = [], [], []
            opened = np.full((rows, opened_width), -1, np.int32)
            tokens = np.zeros((rows, token_width), np.int32)
            while len(texts) < rows:
                text = fuzz_texts.near_miss(rng)
                front = str(rng.choice([*OPENED.values(), "</think>\n", "<think>a <answer>"]))
                if rng.random() < 0.5:
                    front, text = text[: (cut := rng.integers(0, 40))], text[cut:]
                before, after = ids(front), ids(text)
                if len(before) > opened_width or len(after) > token_width:
                    continue
                row = len(texts)
                opened[row, opened_width - len(before) :] = before
                tokens[row, : len(after)] = after
                texts.append(tokenizer.decode(before) + tokenizer.decode(after))
                lengths.append(len(after))
                solutions.append(fuzz_texts.solution(rng))
            mask = rewards.solution_mask(solutions)
            got = terms_of(opened, tokens, np.array(lengths, np.int32), mask)
            assert_same(jax.device_get(got), texts, solutions, lengths)
    assert names.count("terms_of") == 1  # the opened text is data, and makes no program


@pytest.mark.parametrize("opened", OPENED.values(), ids=OPENED)
def test_texts_are_scored_behind_what_was_opened(opened):
    written = ["Wet.</think><answer>Edema</answer>", "<answer>Edema</answer>", good("Edema"), ""]
    got = rewards.score(written, ["Edema"] * 4, [400] * 4, opened=opened)
    assert_same(got, [opened + text for text in written], ["Edema"] * 4, [400] * 4)


# --- exploits of the reference reward ----------------------------------------


def test_junk_names_are_free_in_accuracy_but_counted():
    got = rewards.score([good("Edema, Pleural_Thickening, cardio, ,")], ["Edema"])
    assert got["accuracy_hard"][0] == 1.0 and got["invented"][0] == 2.0


def test_no_finding_beside_a_finding_is_flagged():
    got = rewards.score(
        [good("No Finding, Edema"), good("No Finding, Support Devices")], ["Edema"] * 2
    )
    np.testing.assert_array_equal(got["no_finding_conflict"], [1.0, 0.0])


def test_padding_to_the_floor_pays():
    """Length alone moves overshort and nothing else: why it has an alarm."""
    short, long = (rewards.score([good("Edema", "a " * n)], ["Edema"], [n]) for n in (10, 400))
    assert short["overshort"][0] < long["overshort"][0] == 0.0
    assert short["accuracy_hard"][0] == long["accuracy_hard"][0]
