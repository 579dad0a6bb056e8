"""Conversations as rows: the template's own ids, a loss on answers alone, what a chat conditions on."""

import dataclasses
import types

import fuzz_tokenizers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model
from chat_templates import OPENED, tokenizer_with
from generating import CFG, TOKENIZER

import cxr_jax
from cxr_jax.config.sections import RunConfig
from cxr_jax.data.prompts import FIND_PROMPT, Message, as_prompt
from cxr_jax.data.sources import phantom
from cxr_jax.errors import UserError
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.inference.model import Model
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.presets import sft as presets_sft
from cxr_jax.training import checks, conversations, log_probs, targets
from cxr_jax.weights import pretrained

GRID, IMAGE_TOKENS, C = (1, 4, 4), 4, 96
SYSTEM = "You are a helpful assistant."  # what the template says by itself
WORDS = "No fracture. Edema, mild; <think> wide\n\nheart  é 日本 </think><answer>No Finding</answer> 3.5 ?".split(
    " "
)
TALK = (
    Message("user", FIND_PROMPT),
    Message("assistant", "<think>Wet.</think><answer>Edema</answer>"),
    Message("user", "Provide differentials."),
    Message("assistant", "Heart failure."),
    Message("user", "Sure?"),
    Message("assistant", "Yes."),
)


def examples(tokenizer=TOKENIZER, train_turns="each", room=C, width=400):
    config = dataclasses.replace(CFG, **tokenizers.config_ids(tokenizer))
    prompts = inference_prompts.Prompts(tokenizer, config, GRID, room, width=width)
    return conversations.Examples(prompts, targets.Completions(tokenizer, room), train_turns)


def row_of(made, index=0):
    """(ids of prompt and completion together, whether each token trains)."""
    count = made["prompts"]["lengths"][index]
    following = made["completions"][index, : made["lengths"][index]]
    ids = [*made["prompts"]["ids"][index, :count], *following]
    mask = made["mask"][index]
    assert not mask[made["lengths"][index] :].any()
    return [int(i) for i in ids], [False] * int(count) + mask[: len(following)].tolist()


def random_talk(rng):
    def say(role, count):
        text = " ".join(rng.choice(WORDS, count)).strip()
        # Tags are tokens in answers alone.
        if role != "assistant":
            text = text.replace("<", "(").replace(">", ")")
        return Message(role, text or "x")

    system = [say("system", 3)] if rng.random() < 0.4 else []
    turns = int(rng.integers(1, 5))
    pairs = [
        say(role, int(rng.integers(1, 9))) for _ in range(turns) for role in ("user", "assistant")
    ]
    return (*system, *pairs)


def as_template_writes(talk):
    """The whole conversation by hand, and the characters that are the assistant's to say."""
    picture = f"<|vision_start|>{'<|image_pad|>' * IMAGE_TOKENS}<|vision_end|>"
    text, spoken = "", []
    if talk[0].role != "system":
        talk = (Message("system", SYSTEM), *talk)
    for number, (role, content) in enumerate(talk):
        text += f"<|im_start|>{role}\n" + (picture if number == 1 else "")
        begin = len(text)
        text += content + "<|im_end|>"
        if role == "assistant":
            spoken.append((begin, len(text)))
        text += "\n"
    return text[:-1], spoken


@pytest.mark.parametrize("kind", ["phantom", "published"])
def test_random_conversations_are_the_templates_ids_and_train_where_the_assistant_speaks(kind):
    """Of the phantom's tokenizer, and of Qwen2.5's own where its words are at hand."""
    tokenizer = TOKENIZER if kind == "phantom" else fuzz_tokenizers.load(kind).tokenizer
    rng = np.random.default_rng(0)
    talks = [random_talk(rng) for _ in range(100)]
    for train_turns in ("each", "last"):
        made = examples(tokenizer, train_turns, room=300).encode(talks)
        for index, talk in enumerate(talks):
            text, spoken = as_template_writes(talk)
            wanted = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spoken = spoken if train_turns == "each" else spoken[-1:]
            trained = [
                any(begin <= start and end <= stop for begin, stop in spoken)
                for start, end in wanted["offset_mapping"]
            ]
            ids, mask = row_of(made, index)
            assert ids == wanted["input_ids"] and mask == trained
            # The first token after the prompt is the first that trains.
            assert mask.index(True) == made["prompts"]["lengths"][index]


def test_one_question_and_its_answer_are_the_row_of_before():
    made = examples().encode([TALK[:2], TALK[2:4]])
    before = targets.Completions(TOKENIZER, C).encode([TALK[1].content, TALK[3].content])
    prompts = examples().prompts.encode([FIND_PROMPT, TALK[2].content])
    for name, values in before.items():
        np.testing.assert_array_equal(made[name], values)
    for name, values in prompts.items():
        np.testing.assert_array_equal(made["prompts"][name], values)


def test_special_tokens_that_turns_spell_are_text():
    odd = "Is it <|im_end|> or </think>?"
    talk = (*TALK[:2], Message("user", odd), Message("assistant", "No <|im_end|>."))
    ids, mask = row_of(examples().encode([talk]))
    vocabulary = TOKENIZER.get_vocab()
    stop, closed = vocabulary["<|im_end|>"], vocabulary["</think>"]
    assert ids.count(stop) == 5 and ids[-1] == stop  # system's and the four turns'
    assert ids.count(closed) == 1
    assert [m for i, m in zip(ids, mask, strict=True) if i == stop] == [False, False, True] + [
        False,
        True,
    ]


# ---- Templates that open turns, or write earlier ones otherwise --------------------------------------------


@pytest.mark.parametrize("opened", OPENED.values(), ids=OPENED)
def test_what_a_template_opens_is_context_and_history(opened):
    """A chat keeps what was opened as part of the answer, and its next turn is read with that."""
    tokenizer = tokenizer_with(opened)
    full = "<think>Wet.</think><answer>Edema</answer>"
    if opened.startswith("<think>\n\n"):
        full = "<answer>Edema</answer>"
    if opened.startswith("<think>\nLet"):
        full = opened + " Wet.</think>"
    if opened == "Certainly. ":
        full = "Certainly. Wet."
    told = [targets.continuation(text, opened) for text in (full, full)]
    talk = tuple(
        Message(role, text)
        for question in ("A?", "B?")
        for role, text in (("user", question), ("assistant", full))
    )
    made = examples(tokenizer).encode([talk])
    ids, mask = row_of(made)
    trained = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(trained) == "".join(f"{text}<|im_end|>" for text in told)
    # What the chat of a model that answers just so has on the device.
    history = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": opened + told[0]},
        {"role": "user", "content": "B?"},
    ]
    context = inference_prompts.conversation_ids(tokenizer, history, [IMAGE_TOKENS])
    answer = tokenizer(told[1] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert ids == context + answer


def forgetful():
    """As Qwen3's thinking models: traces of earlier turns are left out."""
    made = tokenizers.load(pretrained.PHANTOM)
    made.chat_template = (
        "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{%- if message['content'] is string -%}{{ message['content'].split('</think>')[-1] }}"
        "{%- else -%}{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
        "<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )
    return made


def test_a_template_that_rewrites_earlier_answers_trains_the_last_one_alone():
    tokenizer = forgetful()
    with pytest.raises(UserError, match="train_turns=last") as refusal:
        examples(tokenizer).encode([TALK[:4]])
    assert "\n" not in str(refusal.value)
    ids, mask = row_of(examples(tokenizer, "last").encode([TALK[:4]]))
    text = tokenizer.decode(ids)
    assert "Wet" not in text and "<answer>Edema</answer><|im_end|>" in text
    context = inference_prompts.conversation_ids(
        tokenizer, inference_prompts.messages_of(TALK[:3]), [IMAGE_TOKENS]
    )
    assert ids[: len(context)] == context and not any(mask[: len(context)])
    assert tokenizer.decode(ids[len(context) :]) == "Heart failure.<|im_end|>"
    # Without a trace there is nothing to rewrite.
    plain = (TALK[0], Message("assistant", "Edema."), *TALK[2:4])
    assert sum(row_of(examples(tokenizer).encode([plain]))[1]) > 4


def test_a_history_that_does_not_go_on_from_what_is_opened_is_refused():
    talk = (Message("user", "A?"), Message("assistant", "No trace."), *TALK[2:4])
    for train_turns in ("each", "last"):
        with pytest.raises(UserError, match="does not go on from"):
            examples(tokenizer_with("<think>\n"), train_turns).encode([talk])


def test_images_stand_where_turns_mark_them():
    """Two films, the second with the second question: as a chat of that history has them, or not at all."""
    grids, tokens = [(1, 4, 4), (1, 4, 6)], [4, 6]
    first = Message("user", "Current: <image> Find abnormalities.")
    second = Message("user", "Prior: <image> Compare.")
    talk = (first, TALK[1], second, TALK[3])
    with pytest.raises(UserError, match="an image stands in a later turn.*train_turns=last"):
        examples().encode([talk], [grids])
    made = examples(train_turns="last").encode([talk, talk[:2]], [grids, grids[:1]])
    context = inference_prompts.conversation_ids(
        TOKENIZER, inference_prompts.messages_of(talk[:3]), tokens
    )
    assert row_of(made)[0][: len(context)] == context
    count = int(made["prompts"]["lengths"][0])
    wanted = network.positions(CFG, [[*context, *[9] * C]], grids)[:, 0]
    np.testing.assert_array_equal(made["prompts"]["positions"][:, 0, : count + C], wanted)
    # In the first turn, or without marks, both stand before every answer.
    both = Message("user", "Current: <image> Prior: <image> Compare.")
    for question in (both, Message("user", "Compare.")):
        ids, mask = row_of(examples().encode([(question, *TALK[1:4])], [grids]))
        assert ids.count(CFG.image_token_id) == 10 and sum(mask) > 12
        assert not any(mask[: len(ids) - ids[::-1].index(CFG.image_token_id)])


def test_what_is_too_long_is_refused():
    with pytest.raises(UserError, match="more than config.max_completion=20"):
        examples(room=20).encode([TALK])
    assert examples(train_turns="last", room=20).encode([TALK])["lengths"][0] == 4
    with pytest.raises(UserError, match="does not fit"):
        examples(train_turns="last", width=30).encode([TALK])


def test_conversations_of_phantoms_fit_what_a_run_makes_room_for():
    """The preset's checks pass, and batches of either kind hold what they must."""
    config = presets_sft.get_config("follow_ups")
    config.data.follow_ups = 1.0
    config.update(batch_size=64, locate_steps=0, locate_weight=0.0)
    settings = RunConfig.from_config(config)
    source = phantom.PhantomSource("A", "train", 0, 0.75, follow_ups=1.0)
    checks.check_targets_fit(settings, source)
    indices = np.arange(5000, 5064)
    talks = source.conversations(source.facts(indices), indices)
    room, grid = settings.max_completion, (1, 16, 16)
    texts = source.prompts()
    own = inference_prompts.Prompts(TOKENIZER, CFG, grid, room, texts=texts)
    width = checks.history_width(source, TOKENIZER, own.images)
    wide = inference_prompts.Prompts(TOKENIZER, CFG, grid, room, width=width)
    completions = targets.Completions(TOKENIZER, room)
    each = conversations.Examples(own, completions, "each").encode(talks)
    last = conversations.Examples(wide, completions, "last").encode(talks)
    for index, talk in enumerate(talks):
        ids, mask = row_of(each, index)
        assert row_of(last, index)[0] == ids
        said = TOKENIZER.decode([i for i, m in zip(ids, mask, strict=True) if m])
        assert said == "".join(turn.content + "<|im_end|>" for turn in talk[1::2])
    with pytest.raises(UserError, match="max_completion=200 is too small"):
        checks.check_targets_fit(dataclasses.replace(settings, max_completion=200), source)


# ---- Gradients ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    params = tiny_model.draw_params(CFG)
    params["text"]["embed"]["embedding"] *= 5.0
    shape = 1, IMAGE_TOKENS, CFG.text.hidden_size
    features = network.Seen(jax.random.normal(jax.random.key(1), shape))

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            return log_probs.completion_loss(params, CFG, features, batch, jnp.float32(1))[0]

        return jax.value_and_grad(loss)(params)

    return types.SimpleNamespace(gradient=lambda batch: gradient(params, batch))


def together(*results):
    return jax.tree.map(lambda *leaves: sum(leaves), *results)


def assert_same(got, want):
    got, want = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]) for x in (got, want)
    )
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want) > 0


def test_a_row_of_several_answers_has_the_gradients_of_its_answers(world):
    """Each answer alone, behind its history: as rows of one answer had them before."""
    each, last = examples(width=150), examples(train_turns="last", width=150)
    whole = world.gradient(each.encode([TALK]))
    apart = [world.gradient(last.encode([TALK[:end]])) for end in (2, 4, 6)]
    assert_same(whole, together(*apart))
    assert min(float(value) for value, _ in apart) > 1


def test_the_last_answer_is_a_row_of_one_answer(world):
    last = examples(train_turns="last", width=150).encode([TALK])
    alone = targets.Completions(TOKENIZER, C).encode([TALK[-1].content])
    prompts = inference_prompts.Prompts(TOKENIZER, CFG, GRID, C, width=150)
    by_hand = {**alone, "prompts": prompts.encode([as_prompt(TALK[:-1])])}
    assert_same(world.gradient(last), world.gradient(by_hand))


def test_what_stands_behind_the_end_of_a_row_does_not_matter(world):
    made = examples(width=150).encode([TALK[:4]])
    filled = np.where(np.arange(C) < made["lengths"][:, None], made["completions"], 77)
    assert_same(world.gradient({**made, "completions": filled}), world.gradient(made))
    # A word of a question is no target, and is read.
    place = int(np.flatnonzero(~made["mask"][0, : made["lengths"][0]])[4])
    other = made["completions"].copy()
    other[0, place] += 1
    changed = world.gradient({**made, "completions": other})[0]
    assert changed != world.gradient(made)[0]


# ---- Trained so, a chat answers ----------------------------------------------------------------------------


def test_a_chat_of_what_was_trained_answers_each_question_by_what_was_said_before():
    """A tiny model learns two conversations by heart, in which one question has two answers."""
    find, ask = FIND_PROMPT, "Provide differentials."
    talks = [
        [
            (find, "<think>Wet.</think><answer>Edema</answer>"),
            (ask, "Heart failure."),
            ("Sure?", "Yes."),
        ],
        [
            ("Examine the chest X-ray.", "No finding."),
            (ask, "There are none."),
            ("Sure?", "Quite."),
        ],
    ]
    rows = [
        tuple(
            Message(role, text)
            for turn in talk
            for role, text in zip(("user", "assistant"), turn, strict=True)
        )
        for talk in talks
    ]
    params = tiny_model.draw_params(CFG, 2)
    model = Model(CFG, params, folder=str(cxr_jax.asset("phantom")))
    image = np.random.default_rng(0).random((224, 224), np.float32)
    patches, grid = model.prepare(image)
    [features] = model.image_features(patches, [grid])
    features = jax.tree.map(lambda tokens: jnp.stack([jnp.asarray(tokens)] * len(rows)), features)

    prompts = inference_prompts.Prompts(
        TOKENIZER, CFG, grid, C, texts=[row[0].content for row in rows]
    )
    batch = conversations.Examples(prompts, targets.Completions(TOKENIZER, C), "each").encode(rows)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(text, state):
        def loss(text):
            merged = {**params, "text": text}
            total = batch["mask"].sum()
            return log_probs.completion_loss(merged, CFG, features, batch, total)[0]

        value, gradient = jax.value_and_grad(loss)(text)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(text, updates), state, value

    text, state = params["text"], optimizer.init(params["text"])
    for _ in range(150):
        text, state, value = train(text, state)
    assert value < 0.05
    learned = Model(CFG, {**params, "text": text}, folder=str(cxr_jax.asset("phantom")))
    for talk in talks:
        chat = learned.chat(image)
        said = [chat.ask(question, max_new_tokens=32).text for question, _ in talk]
        assert said == [answer for _, answer in talk]
