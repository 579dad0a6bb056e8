"""Qwen2.5's own tokenizer through all that reads token ids: prompts, rewards, the rules of answers, exports.

Skipped where the package that ships its ranks is not installed; tests/helpers/qwen_tokenizer.py makes the folder.
"""

import dataclasses
import functools
import json
import unicodedata

import fuzz_texts
import fuzz_tokenizers as fuzz
import jax
import ml_dtypes
import numpy as np
import pytest
import qwen_tokenizer
import regex
from answer_oracle import FORMAT
from oracle import fuzz_rewards
from qwen_tokenizer import ADDED, BASE, ROWS, SPECIAL

from cxr_jax.inference import answer_rules, prompts
from cxr_jax.labels import answers
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.network.config import Config
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.weights import hf_folder

PIECES = regex.compile(qwen_tokenizer.PATTERN)
subject = functools.partial(fuzz.load, "published")


def ids_of(text):
    return subject().tokenizer(text, add_special_tokens=False)["input_ids"]


# As the published tokenizers of Qwen2 and Qwen2.5 give them, in several public test suites and model cards.
SYSTEM = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
USER, ASSISTANT = [151644, 872, 198], [151645, 198, 151644, 77091, 198]
SUM = [3838, 374, 220, 17, 10, 17, 30]
KNOWN = {
    "Hello, world!": [9707, 11, 1879, 0],
    "The quick brown fox.": [785, 3974, 13876, 38835, 13],
    "Describe this image in detail.": [74785, 419, 2168, 304, 7716, 13],
    "You should think step-by-step.": [2610, 1265, 1744, 3019, 14319, 29208, 13],
    "How many r in strawberry.": [4340, 1657, 435, 304, 72600, 13],
    "您好, 请从 1 数到 10000000.": [111308, 11, 220, 14880, 45181, 220, 16, 47685, 26939, 220, 16]
    + [15] * 7
    + [13],
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n": SYSTEM,
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n": USER + SUM + ASSISTANT,
}


@pytest.mark.parametrize("text", KNOWN)
def test_ids_of_published_texts(text):
    assert ids_of(text) == KNOWN[text]


def test_words_and_added_tokens_have_their_published_ids():
    tokenizer, ranks = subject().tokenizer, qwen_tokenizer.ranks()
    assert sorted(ranks.values()) == list(range(BASE)) and len(tokenizer) == 151_665
    merges = qwen_tokenizer.merges(ranks)
    assert len(merges) == 151_387 and all(len(pair) == 2 for pair in merges)
    added = tokenizer.convert_tokens_to_ids([*SPECIAL, *ADDED])
    assert added == list(range(BASE, 151_665))
    named = dict(zip(SPECIAL, added, strict=False))
    assert (named["<|im_end|>"], named["<|image_pad|>"]) == (151_645, 151_655)
    special = tokenizers.special_ids(tokenizer, ROWS)
    assert special["stop"] == (151_645, 151_643) and special["pad"] == 151_643
    # All that stands for pixels, turns and places, and the rows of the embedding that no token has.
    assert {*range(151_646, 151_657), *range(151_665, ROWS)} <= set(special["suppress"])
    published = Config(PHANTOM.vision, PHANTOM.text)  # its defaults are the published ids
    ids = tokenizers.config_ids(tokenizer)
    assert ids == {name: getattr(published, name) for name in ids}


def like_tiktoken(text):
    """The ids by the ranks alone, in plain Python: no vocabulary, no merges, no library of tokenizers."""
    ranks = qwen_tokenizer.ranks()
    pieces = [piece.encode() for piece in PIECES.findall(unicodedata.normalize("NFC", text))]
    return [ranks[part] for p in pieces for part in qwen_tokenizer.merged(p, ranks, BASE)]


def random_texts(count):
    rng = fuzz.Rng("published")
    for _ in range(count):
        text = fuzz_texts.text(rng)
        kind = rng.random()
        if kind < 0.4:
            text = fuzz.mutated_text(rng, text, fuzz_texts.near_miss(rng))
        elif (
            kind < 0.6
        ):  # any characters at all, combining ones and surrogates' neighbours among them
            text = "".join(fuzz._char(rng) for _ in range(rng.integers(40)))
        elif kind < 0.7:
            text = "".join(
                rng.pick(" \n\t\r'sST1a\u0301e\u3000.,-") for _ in range(rng.integers(30))
            )
        if not any(token in text for token in (*SPECIAL, *ADDED)):
            yield text


def test_random_texts_are_cut_as_by_the_ranks_alone():
    texts = list(random_texts(3000))
    assert len(texts) > 2500
    for text, ids in zip(texts, fuzz.canonical(subject(), texts), strict=True):
        assert ids == like_tiktoken(text), repr(text)
        spelt = unicodedata.normalize("NFC", text)
        assert subject().tokenizer.decode(ids) == spelt


def test_a_prompt_by_the_chat_template():
    tokenizer = subject().tokenizer
    image = [151652, *[151655] * 5, 151653]
    given = prompts.prompt_ids(tokenizer, "What is 2+2?", image_tokens=[5])
    assert given == SYSTEM + USER + image + SUM + ASSISTANT
    assert prompts.prompt_ids(tokenizer, "What is 2+2?") == SYSTEM + USER + SUM + ASSISTANT
    # What spells a special token in a question is text; the tags of the format are no tokens here.
    asked = prompts.prompt_ids(tokenizer, "Is <|im_end|> or <tool_call> seen?")
    assert asked.count(151_645) == 2 and 151_657 not in asked
    assert tokenizer.decode(asked[len(SYSTEM + USER) : -5]) == "Is <|im_end|> or <tool_call> seen?"
    own = prompts.conversation_ids(
        tokenizer,
        [
            {"role": "user", "content": "What is 2+2?"},
            {"role": "assistant", "content": "<think>a</think><answer>Edema</answer>"},
            {"role": "user", "content": "What is 2+2?"},
        ],
        [5],
    )
    turn = ids_of("assistant\n<think>a</think><answer>Edema</answer>")
    assert own[len(SYSTEM + USER + image + SUM) + 3 :][: len(turn)] == turn


def test_rewards_from_its_ids_are_those_of_the_texts():
    """Texts as it cuts them, cut at random, broken, with odd ids: the reward terms equal plain Python's."""
    counts = fuzz_rewards.Counts()
    differ, examples = fuzz_rewards.run(subject(), 3000, counts=counts)
    assert not differ, examples
    made = counts.summary()["percent"]
    assert made["format"] > 15 and made["answer with labels"] > 15 and made["an odd id"] > 10


@functools.cache
def rules():
    special = tokenizers.special_ids(subject().tokenizer, ROWS)
    return answer_rules.compile_answers(
        subject().table,
        ROWS,
        special["stop"],
        max_new_tokens=60,
        answer_tokens=40,
        suppress_ids=special["suppress"],
    )


allowed = jax.jit(lambda rules, state: rules.allowed(state))
advance = jax.jit(lambda rules, state, token: rules.advance(state, token))


def random_answer(rng):
    names = [name for name in CHEXPERT_14 if name != "No Finding"]
    chosen = dict.fromkeys(rng.pick(names) for _ in range(1 + rng.integers(4)))
    words = "".join(
        rng.pick(("clear ", "lungs, ", "\n", "80%", "肺")) for _ in range(rng.integers(9))
    )
    space = rng.pick(("", "\n", "\n\n"))
    return f"<think>{words}</think>{space}<answer>{', '.join(chosen)}</answer>"


def test_the_rules_of_answers_take_every_cut_of_a_valid_answer():
    rng, over = fuzz.Rng(3), len(rules().next) - 2
    whole = rules().within(400)
    for _ in range(12):
        text = random_answer(rng)
        for ids in (ids_of(text), fuzz.split(rng, subject(), text.encode())):
            state = whole.init(1)
            for token in [*ids, 151_645]:
                state = advance(whole, state, np.array([token], np.int32))
            assert int(state.at[0]) == over, text


def test_random_walks_by_the_rules_are_answers():
    """Any token that is allowed, to the end: the text is valid for the rewards' parser and for a regular expression."""
    rng, rows = np.random.default_rng(0), 16
    state, tokens = rules().init(rows), []
    for _ in range(60):
        choices = np.asarray(allowed(rules(), state))
        assert choices.any(1).all()
        tokens.append([rng.choice(np.flatnonzero(row)) for row in choices])
        state = advance(rules(), state, np.array(tokens[-1], np.int32))
    written = np.array(tokens, np.int32).T
    stops = (151_645, 151_643)
    lengths = np.isin(written, stops).argmax(1)
    parse = jax.jit(answers.parse_tokens, static_argnums=3)
    parsed = parse(written, lengths, subject().table, 1024)
    assert np.asarray(parsed["format"]).all() and not np.asarray(parsed["n_unknown"]).any()
    for row, length, labels in zip(written, lengths, np.asarray(parsed["answer"]), strict=True):
        assert length > 0 and row[length] in stops
        listed = FORMAT.match(subject().tokenizer.decode(row[:length])).group(1)
        assert sorted(listed.split(", ")) == sorted(np.array(CHEXPERT_14)[labels])


def test_a_model_with_its_vocabulary_is_exported_and_read_back(tmp_path):
    tokenizer = subject().tokenizer
    text = dataclasses.replace(PHANTOM.text, vocab_size=ROWS, num_hidden_layers=1)
    vision = dataclasses.replace(PHANTOM.vision, depth=1, fullatt_block_indexes=(0,))
    ids = tokenizers.config_ids(tokenizer)
    config = dataclasses.replace(PHANTOM, vision=vision, text=text, **ids)
    shapes = jax.eval_shape(lambda: network.init_params(config, None))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32).astype(ml_dtypes.bfloat16), shapes
    )
    hf_folder.save(tmp_path / "hf", config, params, tokenizer=tokenizer)
    read_config, read = hf_folder.load(tmp_path / "hf")
    assert read_config == config
    assert all(map(np.array_equal, jax.tree.leaves(read), jax.tree.leaves(params)))
    again = tokenizers.load(str(tmp_path / "hf"))
    assert again.get_vocab() == tokenizer.get_vocab()
    texts = list(random_texts(300)) + list(KNOWN)
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    asked = prompts.prompt_ids(again, "What is 2+2?", image_tokens=[5])
    assert asked == prompts.prompt_ids(tokenizer, "What is 2+2?", image_tokens=[5])
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["eos_token_id"] == [151_645, 151_643] and settings["image_token_id"] == 151_655
