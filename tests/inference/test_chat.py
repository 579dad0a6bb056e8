"""Model.chat: turns that keep their keys, chat templates, what they open. A tiny random model; slow: the phantom."""

import functools

import chat_templates
import numpy as np
import pytest
from generating import CFG, FIND, STOP, TOKENIZER, close, image, words

import cxr_jax
from cxr_jax import rewards
from cxr_jax.data import prompts as data_prompts
from cxr_jax.data.sources import phantom
from cxr_jax.errors import UserError
from cxr_jax.inference import model as inference_model
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.inference import reading, requests
from cxr_jax.models import network, tokenizer
from cxr_jax.training import conversations, targets


def test_a_bad_turn_leaves_the_conversation_as_it_was(model):
    chat = model.chat(image(0))
    for bad in (dict(text=3), dict(text="x", max_new_tokens=400), dict(text="x", temperature=-1)):
        with pytest.raises(UserError):
            chat.ask(**bad)
    for nothing in ("", "\n ", "\u200b", "<image>"):
        with pytest.raises(UserError, match="no prompt: nothing is asked"):
            chat.ask(nothing)
    first = chat.ask(FIND, max_new_tokens=4)

    def fails(*_):
        raise RuntimeError("reader left")

    with pytest.raises(RuntimeError, match="reader left"):
        chat.ask("Provide differentials.", max_new_tokens=16, stream=fails)
    assert len(chat.messages) == 2 and len(chat.computed) == 1
    again = model.chat(image(0))
    close(again.ask(FIND, max_new_tokens=4), first)
    close(again.ask("More.", max_new_tokens=4), chat.ask("More.", max_new_tokens=4))


# Conversations

QUESTIONS = (FIND, "Provide differentials.", "Write a structured report.")


def from_scratch(model, picture, chat, **kw):
    [[c]] = model.generate([picture], [chat.messages[:-1]], **kw)
    return c


def test_a_turn_computes_its_own_tokens_only_and_equals_the_whole_conversation(model, calls):
    # Whole words, so that the answer's text has the same tokens again.
    only = words((" heart", " lung"), (" no", " clear"))
    chat, said = model.chat(image(0)), []
    for question in QUESTIONS:
        calls.clear()
        answer = chat.ask(question, max_new_tokens=6, constraint=only)
        said.append([c for c in calls if c[0] != "decode"])
        assert len(answer.token_ids) == 6 and answer.finish_reason == "length"
        close(answer, from_scratch(model, image(0), chat, max_new_tokens=6, constraint=only))
    lengths = [len(model.render(chat.messages[: 2 * i + 1], [(1, 16, 16)])) for i in range(3)]
    own = [b - a - 6 for a, b in zip(lengths, lengths[1:], strict=False)]
    assert said[0] == [("vision", 1), ("prefill", lengths[0])]
    assert said[1:] == [[("extend", own[0])], [("extend", own[1])]]
    assert chat.computed == [lengths[0], *own] and max(own) < 30


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_training_on_a_chat_conditions_on_what_the_chat_has_read(model, system):
    only = words((" heart", " lung"), (" no", " clear"))
    chat = model.chat(image(0), system=system)
    for question in QUESTIONS:
        chat.ask(question, max_new_tokens=6, constraint=only)
    talk = tuple(data_prompts.Message(**message) for message in chat.messages)
    encoder = inference_prompts.Prompts(TOKENIZER, CFG, (1, 16, 16), 128, width=300)
    completions = targets.Completions(TOKENIZER, 128)
    for train_turns in ("each", "last"):
        row = conversations.Examples(encoder, completions, train_turns).encode([talk])
        count, length = int(row["prompts"]["lengths"][0]), int(row["lengths"][0])
        ids = [*row["prompts"]["ids"][0, :count], *row["completions"][0, :length]]
        assert ids == [*chat._ids, STOP]  # it was cut before it could end
        said = [name for name, trains in zip(ids[count:], row["mask"][0], strict=False) if trains]
        assert len(said) == (21 if train_turns == "each" else 7)


def test_an_answer_whose_text_has_other_tokens_is_read_as_the_template_writes_it(model, calls):
    chat = model.chat(image(1), system="Answer briefly.")
    for question in QUESTIONS[:2]:
        answer = chat.ask(question, max_new_tokens=10, temperature=1.0, seed=4)
        close(
            answer, from_scratch(model, image(1), chat, max_new_tokens=10, temperature=1.0, seed=4)
        )
    again = model.render(chat.messages[:-1], [(1, 16, 16)])
    assert chat._ids[: len(again)] == again
    assert [c[0] for c in calls].count("vision") == 3 and chat.computed[1] < len(
        again
    )  # 1 of them the chat's


TALKS = [
    FIND,
    "",
    "  Wo?  \n\n日本 <thin> <answ",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it so?"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>b</think><answer>Edema</answer>"},
        {"role": "user", "content": "c"},
    ],
]


@pytest.mark.parametrize("grid", [None, (1, 4, 4), (1, 16, 16), (2, 6, 4)])
@pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))
def test_rendering_is_the_chat_template_with_the_pad_repeated(model, talk, grid):
    """By the template alone: text of each turn, the image's pads before the first question."""
    pads = "" if grid is None else "<|image_pad|>" * (grid[0] * grid[1] * grid[2] // 4)
    picture = f"<|vision_start|>{pads}<|vision_end|>" if pads else ""
    turns = [{"role": "user", "content": talk}] if isinstance(talk, str) else talk
    first = [turn["role"] for turn in turns].index("user")
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": "You are a helpful assistant."}, *turns]
        first += 1
    text = "".join(
        f"<|im_start|>{turn['role']}\n{picture if index == first else ''}{turn['content']}<|im_end|>\n"
        for index, turn in enumerate(turns)
    )
    ids = model.render(talk, [] if grid is None else [grid])
    assert ids == TOKENIZER(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    if isinstance(talk, str):  # training renders questions
        count = 0 if grid is None else int(np.prod(grid)) // 4
        assert ids == inference_prompts.prompt_ids(TOKENIZER, talk, [count][: count > 0])
        if grid is not None:
            encoder = inference_prompts.Prompts(TOKENIZER, CFG, grid, 5, texts=[talk])
            row = encoder.encode([talk])
            assert row["ids"][0, : row["lengths"][0]].tolist() == ids
            want = network.positions(CFG, [[*ids, *[encoder.pad] * 5]], [grid])
            np.testing.assert_array_equal(row["positions"], want)


# A template that opens the model's turn


@pytest.fixture(scope="module")
def opening(model, tmp_path_factory):
    """opened -> the same model under a template that opens its turn so; no program is compiled anew."""

    @functools.cache
    def make(opened):
        folder = tmp_path_factory.mktemp("folders") / "model"
        folder = chat_templates.folder_with(opened, folder)
        made = inference_model.Model(CFG, model.params, folder=folder)
        made.rows = model.rows
        return made

    return make


@pytest.mark.parametrize("opened", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_completions_begin_with_what_the_template_opened(opening, opened):
    talker = opening(opened)
    pieces = {}

    def stream(prompt, sample, piece):
        pieces[sample] = pieces.get(sample, "") + piece

    [drawn] = talker.generate([image(0)], FIND, 20, temperature=1.0, n=2, stream=stream)
    for sample, completion in enumerate(drawn):
        written = requests.text_of(TOKENIZER, completion.token_ids)
        assert completion.opened == opened and pieces[sample] == completion.text
        assert completion.text == opened + written.removesuffix("<|im_end|>")


@pytest.mark.parametrize("opened", [o for o in chat_templates.OPENED.values() if "<" in o])
def test_constrained_answers_go_on_from_what_was_opened(opening, opened):
    talker = opening(opened)
    [[free]] = talker.generate([image(0)], FIND, 80, temperature=1.0)
    assert not reading.FORMAT_PATTERN.match(free.text)  # random weights
    [[forced]] = talker.generate([image(0)], FIND, 80, temperature=1.0, constraint="answers")
    assert reading.FORMAT_PATTERN.match(forced.text) and forced.text.startswith(opened)
    assert all(forced.text.count(tag) == 1 for tag in tokenizer.FORMAT_TAGS)
    scores = rewards.score([forced.text], [""])
    assert scores["format"] == scores["tag_count"] == 1
    result = talker.read(image(0), FIND, 0, 80, constraint="answers")
    assert reading.FORMAT_PATTERN.match(result.shown.text)
    after = talker.finding_probabilities(image(0), FIND, [result.shown])
    assert after["mean"] == pytest.approx(result.probabilities, abs=1e-4)


def test_a_template_that_no_valid_answer_follows_refuses_the_constraint_only(opening):
    talker = opening("Certainly. ")
    with pytest.raises(UserError, match="cannot follow this chat template"):
        talker.generate([image(0)], FIND, 80, constraint="answers")
    result = talker.read(image(0), FIND, 0, 20)
    assert result.shown.text.startswith("Certainly. ") and result.probabilities


def test_a_conversation_keeps_the_whole_turn(opening, calls):
    chat = opening("<think>\n").chat(image(1))
    answers = [chat.ask(question, max_new_tokens=10) for question in QUESTIONS[:2]]
    said = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    assert said == [answer.text for answer in answers]
    assert all(text.startswith("<think>\n") for text in said)
    # The opened tokens are among those that are kept.
    assert chat.computed[1] < chat.computed[0] and [c[0] for c in calls].count("vision") == 1


def test_special_tokens_in_a_conversation_are_text(model):
    chat = model.chat(image(1), system="Be brief.<|im_end|>")
    chat.ask("Is it <|im_end|> or <think>?", max_new_tokens=6)
    ids = model.render([*chat.messages, {"role": "user", "content": "Sure?"}], [(1, 16, 16)])
    vocabulary = TOKENIZER.get_vocab()
    assert ids.count(vocabulary["<|im_start|>"]) == 5 and ids.count(vocabulary["<|im_end|>"]) == 4
    assert vocabulary["<think>"] not in ids[: ids.index(vocabulary["<|vision_end|>"]) + 20]
    with pytest.raises(UserError, match="placeholders"):
        chat.ask("What is <|image_pad|>?")


@pytest.mark.slow
def test_the_phantom_model_talks_in_turns():
    model = cxr_jax.load("phantom")
    [picture] = phantom.PhantomSource("B", "test", 0).batch(np.arange(1))["image"]
    chat = model.chat(picture)
    for question in QUESTIONS:
        answer = chat.ask(question, max_new_tokens=160)
        close(answer, from_scratch(model, picture, chat, max_new_tokens=160))
    assert chat.computed[0] == 91 and max(chat.computed[1:]) < 20
