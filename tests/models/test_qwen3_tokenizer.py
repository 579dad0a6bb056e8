"""Qwen3-VL's tokenizer and template: no system turn of its own, tags of the thought as tokens, models that think first.

Skipped where the package that ships Qwen's ranks is not installed; tests/helpers/qwen_tokenizer.py makes the folders.
"""

import functools

import jax
import numpy as np
import pytest
import qwen_tokenizer
from fuzz_tokenizers import load
from oracle import fuzz_rewards
from qwen_tokenizer import ROWS

from cxr_jax.inference import prompts
from cxr_jax.labels import answers
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen3_vl.config import QWEN3_VL_4B
from cxr_jax.training.targets import continuation

USER, ASSISTANT = [151644, 872, 198], [151645, 198, 151644, 77091, 198]
SYSTEM = [151644, 8948, 198]
SUM = [3838, 374, 220, 17, 10, 17, 30]  # What is 2+2?
THINK, THINK_END = 151_667, 151_668


@functools.cache
def tokenizer(kind="qwen3"):
    return tokenizers.load(str(qwen_tokenizer.folder(kind)))


def test_ids_are_the_configs_and_what_is_never_written():
    ids = tokenizers.config_ids(tokenizer())
    assert len(tokenizer()) == 151_669
    assert ids == {name: getattr(QWEN3_VL_4B, name) for name in ids}
    special = tokenizers.special_ids(tokenizer(), ROWS)
    assert special["stop"] == (151_645, 151_643) and special["pad"] == 151_643
    suppressed = set(special["suppress"])
    assert {*range(151_646, 151_657), *range(151_669, ROWS)} <= suppressed
    # The thought's tags are text like any other.
    assert not suppressed & {THINK, THINK_END}
    assert not {THINK, THINK_END} & set(tokenizer().all_special_ids)


def test_a_prompt_has_no_system_turn_but_the_given_one():
    image = [151652, *[151655] * 4, 151653]
    assert prompts.prompt_ids(tokenizer(), "What is 2+2?") == USER + SUM + ASSISTANT
    assert prompts.prompt_ids(tokenizer(), "What is 2+2?", [4]) == USER + image + SUM + ASSISTANT
    turns = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "What is 2+2?"}]
    given = prompts.conversation_ids(tokenizer(), turns, [4])
    assert given == [*SYSTEM, 13048, 151645, 198, *USER, *image, *SUM, *ASSISTANT]


def test_pictures_are_numbered_as_by_the_templates_own_option():
    turns = [{"role": "user", "content": "<image><image>What is 2+2?"}]
    ours = prompts.render_conversation(tokenizer(), turns, [1, 1], numbered=True)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is 2+2?"}]
    theirs = tokenizer().apply_chat_template(
        [{"role": "user", "content": parts}],
        add_vision_id=True,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert tokenizer().decode(ours.ids) == theirs and "Picture 2: " in theirs


def test_a_thinking_models_turn_begins_in_the_prompt():
    thinking = tokenizer("qwen3-thinking")
    rendered = prompts.render_conversation(
        thinking, [{"role": "user", "content": "What is 2+2?"}], [4]
    )
    assert rendered.opened == "<think>\n"
    assert rendered.ids[-2:] == [THINK, 198]
    # What is trained on goes on from there, and what is scored begins there.
    target = "<think>\nClear lungs.\n</think>\n<answer>No Finding</answer>"
    assert rendered.opened + continuation(target, rendered.opened) == target
    own = thinking(continuation(target, rendered.opened), add_special_tokens=False)["input_ids"]
    tokens = np.array([[*own, 151_645]], np.int32)
    opened = np.array([[THINK, 198]], np.int32)
    table = answers.TokenBytes.from_tokenizer(thinking)
    lengths = np.array([len(own)])
    parse = jax.jit(answers.parse_tokens, static_argnums=3)
    assert np.asarray(parse(tokens, lengths, table, 1024, opened)["format"]).all()
    assert not np.asarray(parse(tokens, lengths, table, 1024)["format"]).any()
    assert tokenizers.completion_text(thinking, tokens[0], len(own), opened[0]) == target


def test_an_assistants_turn_is_verbatim_and_its_tags_are_tokens():
    turns = [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "<think>a</think><answer>Edema</answer>"},
        {"role": "user", "content": "Is <think> or </think> or <|im_end|> text?"},
    ]
    ids = prompts.conversation_ids(tokenizer(), turns, [4])
    # In a question they are text.
    assert (ids.count(THINK), ids.count(THINK_END)) == (1, 1)
    assert ids.count(151_645) == 3
    text = tokenizer().decode(ids)
    assert turns[1]["content"] in text and turns[2]["content"] in text


@pytest.mark.parametrize("text", ["<think>a</think>", " <think>\n\n</think>\n<answer>Edema"])
def test_tags_of_the_thought_are_single_tokens(text):
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert (ids.count(THINK), ids.count(THINK_END)) == (1, 1)
    assert tokenizer().decode(ids) == text


def test_rewards_from_its_ids_are_those_of_the_texts():
    counts = fuzz_rewards.Counts()
    differ, examples = fuzz_rewards.run(load("published3"), 1000, counts=counts)
    assert not differ, examples
    made = counts.summary()["percent"]
    assert made["format"] > 15 and made["answer with labels"] > 15
