"""Gemma's kind of tokenizer in all that reads or writes tokens: prompts as its processor's, answers, rules, rewards."""

import functools

import gemma_tokenizer
import jax
import numpy as np
import oracle_rewards
import pytest
from PIL import Image

from cxr_jax.errors import UserError
from cxr_jax.inference import answer_rules, prompts
from cxr_jax.labels import CHEXPERT_14, answers
from cxr_jax.models import plain_text
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.gemma3.config import GEMMA_PHANTOM
from cxr_jax.models.markers import GEMMA, markers_of
from cxr_jax.training import targets

TOKENS = 64  # of an image


@functools.cache
def tokenizer():
    return tokenizers.load(str(gemma_tokenizer.folder()))


@functools.cache
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(gemma_tokenizer.folder())


def theirs(messages, image_count=0):
    """Ids of transformers' processor for messages in its form, and which are of images."""
    text = processor().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    film = Image.fromarray(np.zeros((90, 130), np.uint8))
    images = {"images": [film] * image_count} if image_count else {}
    made = processor()(text=text, add_special_tokens=False, **images)
    return list(made["input_ids"][0])


def in_parts(role, *parts):
    content = [{"type": "text", "text": part} if part else {"type": "image"} for part in parts]
    return {"role": role, "content": content}


def test_the_markers_are_its_tokens():
    vocabulary = tokenizer().get_vocab()
    assert markers_of(tokenizer()) is GEMMA and set(GEMMA.needed) <= vocabulary.keys()
    ids = tokenizers.config_ids(tokenizer())
    assert ids["image_token_id"] == processor().tokenizer.image_token_id
    assert ids["vision_start_token_id"] == processor().tokenizer.boi_token_id
    assert ids["vision_end_token_id"] == processor().tokenizer.eoi_token_id
    assert (ids["pad_token_id"], ids["eos_token_id"], ids["bos_token_id"]) == (0, (6, 1), 2)
    assert ids["video_token_id"] is None
    special = tokenizers.special_ids(tokenizer(), len(vocabulary) + 3)
    assert special["stop"] == (6, 1) and special["pad"] == 0
    beyond = set(range(len(vocabulary), len(vocabulary) + 3))
    never = {vocabulary[t] for t in (*gemma_tokenizer.MEDIA, "<start_of_turn>", "<bos>", "<unk>")}
    # Characters that are tokens are not spelled in bytes; others are.
    never |= {vocabulary["<0x3C>"], vocabulary["<0x0A>"]}
    assert not {vocabulary["<0xC3>"], vocabulary["<0x11>"]} & set(special["suppress"])
    assert never | beyond <= set(special["suppress"]) and not {1, 6} & set(special["suppress"])


CONVERSATIONS = {
    "one question": ("What?",),
    "trimmed": ("  What is\n\nnew? \n",),
    "three turns": ("Find it.", "Edema.", "Where?"),
    "runs of spaces": ("a  b   c\n\n\n\nd \u2581e",),
}


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_those_of_the_processor(name, images, system):
    turns = CONVERSATIONS[name]
    roles = ["user", "assistant"] * len(turns)
    ours = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    theirs_messages = [in_parts(role, text) for role, text in zip(roles, turns, strict=False)]
    theirs_messages[0] = in_parts("user", *([""] * images), turns[0])
    if system:
        ours = [{"role": "system", "content": system}, *ours]
        theirs_messages = [in_parts("system", system), *theirs_messages]
    rendered = prompts.render_conversation(tokenizer(), ours, [TOKENS] * images)
    assert rendered.ids == theirs(theirs_messages, images)
    assert rendered.opened == "" and rendered.ids.count(2) == 1
    image_id = GEMMA_PHANTOM.image_token_id  # of another tokenizer: not among these
    assert image_id not in rendered.ids
    assert rendered.ids.count(processor().tokenizer.image_token_id) == images * TOKENS


def test_two_images_stand_where_the_text_has_them():
    ours = [{"role": "user", "content": "First <image> then <image> What is new?"}]
    rendered = prompts.render_conversation(tokenizer(), ours, [TOKENS, TOKENS])
    messages = [in_parts("user", "First", "", "then", "", "What is new?")]
    assert rendered.ids == theirs(messages, 2)


def test_special_tokens_that_people_write_are_words():
    vocabulary = tokenizer().get_vocab()
    said = "Is it <end_of_turn> or <bos>?\n\nSo."
    ids = prompts.prompt_ids(tokenizer(), said, [TOKENS])
    plain = prompts.prompt_ids(tokenizer(), "Is it", [TOKENS])
    for name in ("<end_of_turn>", "<bos>", "<start_of_image>"):
        assert ids.count(vocabulary[name]) == plain.count(vocabulary[name])
    assert said in tokenizer().decode(ids)
    # Line ends are added tokens of such tokenizers, and no spelling of one.
    assert plain_text.spelled_tokens(tokenizer(), "a\n\nb  c") == []


@pytest.mark.parametrize("text", ["a <start_of_image> b", "a <image_soft_token> b"])
def test_placeholders_of_images_are_refused(text):
    with pytest.raises(UserError, match="must not hold placeholders of its own"):
        prompts.prompt_ids(tokenizer(), text)


def test_turns_that_do_not_alternate_are_refused_in_a_line():
    turns = [{"role": "user", "content": text} for text in ("a", "b")]
    with pytest.raises(UserError, match="does not work for turns of user") as refusal:
        prompts.render_conversation(tokenizer(), turns)
    assert "\n" not in str(refusal.value)


def test_targets_end_in_the_turn_and_fill_with_padding():
    target = "<think>The heart is enlarged.</think><answer>Cardiomegaly</answer>"
    made = targets.Completions(tokenizer(), 64).encode([target])
    [row], [mask] = made["completions"], made["mask"]
    length = mask.sum()
    assert tokenizer().decode(row[: length - 1]) == target and mask[:length].all()
    assert row[length - 1] == 6 and (row[length:] == 0).all()


def test_bytes_of_tokens_are_what_decoding_gives():
    table = answers.TokenBytes.from_tokenizer(tokenizer())
    rng, vocabulary = np.random.default_rng(0), tokenizer().get_vocab()
    words = [token_id for token, token_id in vocabulary.items() if not token.startswith("<0x")]
    texts = ["h\u00e9 \U0001fac1\n\n<table>", "<think>a</think>\n<answer>No Finding</answer>"]
    rows = [rng.choice(words, 30).tolist() for _ in range(50)]
    rows += [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    spell = jax.jit(answers.tokens_to_bytes, static_argnums=3)
    for row in rows:
        tokens = np.array([row + [0] * (64 - len(row))])
        data, lengths = spell(tokens, np.array([len(row)]), table, 512)
        text = bytes(np.asarray(data)[0, : int(lengths[0])]).decode()
        assert text == tokenizer().decode(row, skip_special_tokens=True)
    # Bytes that are not a whole character are kept as they are.
    half = np.array([[vocabulary["<0xC3>"], vocabulary["<0x41>"]]])
    data, _ = spell(half, np.array([2]), table, 2)
    assert bytes(np.asarray(data)[0]) == b"\xc3A"


@pytest.mark.parametrize("damage", ["none", "strip", "order"])
def test_decoders_that_are_not_read_are_refused(damage):
    from tokenizers import decoders

    made = gemma_tokenizer.build()
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if damage == "none":
        made.decoder = None
    else:
        parts = [*parts, decoders.Strip(" ", 1, 0)] if damage == "strip" else parts[::-1]
        made.decoder = decoders.Sequence(parts)
    with pytest.raises(UserError, match="rewards cannot be read from its ids"):
        answers.TokenBytes.from_tokenizer(made)


def test_tags_are_several_tokens_and_answers_are_read_from_them():
    assert all(len(tokenizer()(tag)["input_ids"]) > 2 for tag in tokenizers.FORMAT_TAGS)
    table = answers.TokenBytes.from_tokenizer(tokenizer())
    rng, texts = np.random.default_rng(1), []
    for _ in range(40):
        names = rng.choice(CHEXPERT_14, rng.integers(0, 4), replace=False)
        answer = f"<answer>{', '.join(names)}</answer>"
        texts.append(str(rng.choice(["<think>a</think>\n", "<think>b", ""])) + answer)
    rows = [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    parse = jax.jit(answers.parse_tokens, static_argnums=3)
    tokens = np.array([row + [0] * (width - len(row)) for row in rows])
    parsed = parse(tokens, np.array(list(map(len, rows))), table, 8 * width)
    for index, text in enumerate(texts):
        assert bool(parsed["format"][index]) == bool(answers.FORMAT_PATTERN.match(text)), text
        named = {CHEXPERT_14[i].lower() for i in np.flatnonzero(parsed["answer"][index])}
        assert named == oracle_rewards.answer(text), text


def test_rules_of_answers_allow_valid_ones_alone():
    """Walks at random through what the rules allow: each ends in time, and in the format."""
    table = answers.TokenBytes.from_tokenizer(tokenizer())
    rows = len(tokenizer().get_vocab()) + 5
    special = tokenizers.special_ids(tokenizer(), rows)
    constraint = answer_rules.compile_answers(
        table,
        rows,
        special["stop"],
        max_new_tokens=60,
        answer_tokens=30,
        suppress_ids=special["suppress"],
    )
    allowed, advance = jax.jit(type(constraint).allowed), jax.jit(type(constraint).advance)
    rng, walks = np.random.default_rng(0), 64
    state, written = constraint.init(walks), [[] for _ in range(walks)]
    for _ in range(60):
        choices = np.asarray(allowed(constraint, state))
        tokens = np.array([rng.choice(np.flatnonzero(row)) for row in choices], np.int32)
        state = advance(constraint, state, tokens)
        for row, token in zip(written, tokens, strict=True):
            row.append(int(token))
    named = set()
    for row in written:
        end = next(i for i, token in enumerate(row) if token in special["stop"])
        text = tokenizer().decode(row[:end])
        assert oracle_rewards.format_ok(text) and not oracle_rewards.n_unknown(text), text
        named |= oracle_rewards.answer(text)
    assert len(named) > 7
