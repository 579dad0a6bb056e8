"""Several images a prompt: where they stand, by the published template and the Hugging Face processor themselves."""

import functools
import itertools

import numpy as np
import pytest
from chat_templates import tokenizer_with
from qwen_tokenizer import TEMPLATE
from tokenizer_folders import TEMPLATES

from cxr_jax.data.prompts import FIND_PROMPT, number_films, place_films
from cxr_jax.errors import UserError
from cxr_jax.inference import prompts
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.weights import pretrained

START, PAD, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


@functools.cache
def with_template(template):
    made = tokenizers.load(pretrained.PHANTOM)
    made.chat_template = template
    return made


@functools.cache
def processor():
    """Qwen2.5-VL's own, but for its videos, which need torchvision."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    made = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    made.tokenizer = with_template(TEMPLATE)
    made.image_processor = Qwen2VLImageProcessorPil(min_pixels=56**2, max_pixels=112**2)
    for kind in ("image", "video"):
        token = f"<|{kind}_pad|>"
        setattr(made, f"{kind}_token", token)
        setattr(made, f"{kind}_token_id", made.tokenizer.convert_tokens_to_ids(token))
    return made


def by_processor(turns, films, **options):
    """(ids, grids) of turns whose content is a text or a list of texts and None for images."""
    messages = [
        {
            "role": role,
            "content": said
            if isinstance(said, str)
            else [{"type": "image"} if p is None else {"type": "text", "text": p} for p in said],
        }
        for role, said in turns
    ]
    text = processor().tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **options
    )
    given = processor()(text=[text], images=films or None)
    grids = [tuple(map(int, grid)) for grid in given.get("image_grid_thw", [])]
    return list(given["input_ids"][0]), grids


def marked(turns):
    return [
        {
            "role": role,
            "content": said
            if isinstance(said, str)
            else "".join("<image>" if part is None else part for part in said),
        }
        for role, said in turns
    ]


def films(rng, count):
    shapes = rng.integers(40, 300, (count, 2))
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]


WORDS = ("Current frontal: ", " Prior: ", "\nLateral ", "?", " and\n\n", "日本 ", " <im ", "Where?")


def random_talk(rng):
    """Turns with images anywhere in those of the user, and how many there are; never what is read as before a text."""
    turns, count = [], 0
    if rng.random() < 0.3:
        turns.append(("system", "Be brief."))
    for number in range(rng.integers(1, 4)):
        said = [
            None if rng.random() < 0.5 else str(rng.choice(WORDS)) for _ in range(rng.integers(6))
        ]
        turns += [("user", ["x", *said, "y"]), ("assistant", f"<think>{number}</think> No.")]
        count += said.count(None)
    return turns[:-1], count


@pytest.mark.parametrize("numbered", [False, True])
def test_images_stand_where_they_are_marked_as_the_processor_writes_them(numbered):
    rng = np.random.default_rng(0)
    counts = set()
    for _ in range(60):
        turns, count = random_talk(rng)
        want, grids = by_processor(turns, films(rng, count), add_vision_id=numbered)
        tokens = prompts.count_image_tokens(PHANTOM, grids)
        got = prompts.render_conversation(
            with_template(TEMPLATE), marked(turns), tokens, numbered=numbered
        )
        assert got.ids == want and got.opened == ""
        counts.add(count)
    assert {0, 1, 2, 3, 4} <= counts


def test_the_phantoms_own_template_writes_what_the_published_one_does():
    rng = np.random.default_rng(3)
    for _ in range(40):
        turns, count = random_talk(rng)
        parts = [
            (
                role,
                said
                if isinstance(said, str)
                else [
                    {"type": "text", "text": part}
                    if part is not None
                    else rng.choice([{"type": "image"}, {"type": "image_url", "image_url": "x"}])
                    for part in said
                ],
            )
            for role, said in turns
        ]
        messages = [{"role": role, "content": said} for role, said in parts]
        for options in ({}, {"add_vision_id": True}):
            own, published = (
                with_template(template).apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False, **options
                )
                for template in (tokenizers.CHAT_TEMPLATE, TEMPLATE)
            )
            assert own == published and own.count(PAD) == count


@pytest.mark.parametrize("form", ["{0}", "<image>" * 3 + "{0}", "<image> <image>\n<image>\n{0} "])
def test_without_marks_all_stand_before_the_first_question(form):
    turns = [("user", form.format(FIND_PROMPT)), ("assistant", "No."), ("user", "Sure?")]
    pictures = films(np.random.default_rng(1), 3)
    want, grids = by_processor([("user", [None] * 3 + [FIND_PROMPT]), *turns[1:]], pictures)
    tokens = prompts.count_image_tokens(PHANTOM, grids)
    assert prompts.conversation_ids(with_template(TEMPLATE), marked(turns), tokens) == want
    assert len(set(tokens)) > 1  # of unequal sizes, each in its own place
    swapped = prompts.conversation_ids(with_template(TEMPLATE), marked(turns), tokens[::-1])
    assert swapped != want and len(swapped) == len(want)


def test_images_behind_a_question_stay_there():
    [want, grids] = by_processor([("user", ["Q ", None, None])], films(np.random.default_rng(2), 2))
    tokens = prompts.count_image_tokens(PHANTOM, grids)
    assert prompts.prompt_ids(with_template(TEMPLATE), "Q <image><image>", tokens) == want


@pytest.mark.parametrize(
    "form", ["{0}", "<image> {0}", "{0} <image>", "a <image>\n{0}", "x<image>, <image>"]
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_numbered_text_by_itself_is_read_as_images_that_are_numbered(form, count):
    text = form.format(FIND_PROMPT)
    if text.count("<image>") not in (0, count):
        return
    talk = prompts.messages_of(text)
    want = prompts.render_conversation(with_template(TEMPLATE), talk, [3] * count, numbered=True)
    itself = prompts.messages_of(number_films(text, count))
    assert prompts.render_conversation(with_template(TEMPLATE), itself, [3] * count) == want


FIRST_TEXTS = [
    "{0} <image>",
    "<image> {0}",
    "<image>\n<image>{0} ",
    "{0}<image><image>",
    "a <image> {0}",
]


@pytest.mark.parametrize("form", [*FIRST_TEXTS, "<image>", " <image> <image> "])
@pytest.mark.parametrize("later", ["<image>And?", "And <image>", "So <image> or <image>?", "And?"])
def test_a_later_turn_moves_no_film_of_the_first(form, later):
    first, count = form.format(FIND_PROMPT), form.count("<image>")
    [before] = place_films([first], count)
    assert place_films([first, later], count + later.count("<image>"))[0] == before
    # So all that was read is read again, token for token.
    talk = [{"role": "user", "content": first}]
    said = prompts.render_conversation(with_template(TEMPLATE), talk, [3] * count).ids
    talk += [{"role": "assistant", "content": "No."}, {"role": "user", "content": later}]
    more = [3] * (count + later.count("<image>"))
    assert prompts.conversation_ids(with_template(TEMPLATE), talk, more)[: len(said)] == said


@pytest.mark.parametrize("count", range(4))
@pytest.mark.parametrize("marks", range(1, 5))
def test_other_marks_than_images_are_refused(count, marks):
    talk = [
        {"role": "user", "content": "<image>" * (marks - 1) + "What?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "And <image> now?"},
    ]
    if marks == count:
        prompts.conversation_ids(tokenizer_with(""), talk, [1] * count)
        return
    with pytest.raises(UserError, match=rf"{marks} places for an image \(<image>\), and {count}"):
        prompts.conversation_ids(tokenizer_with(""), talk, [1] * count)


def test_special_tokens_between_images_stay_text():
    tokenizer = tokenizer_with("")
    text = "A <|im_end|><image> b<|vision_end|> <image> <think> c"
    ids = prompts.prompt_ids(tokenizer, text, [2, 3])
    vocabulary = tokenizer.get_vocab()
    assert ids.count(vocabulary["<|im_end|>"]) == 2 and ids.count(vocabulary[END]) == 2
    assert vocabulary["<think>"] not in ids
    shown = text.replace("<image>", START + "{}" + END).format(PAD * 2, PAD * 3)
    assert shown in tokenizer.decode(ids)


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_form_of_a_template_shows_every_image_in_its_place(template, numbered):
    """Whatever form it takes: one that knows no numbers gets the images' tokens with theirs as text."""
    tokenizer = with_template(TEMPLATES[template])
    talk = [("user", ["A ", None, " B ", None]), ("assistant", "C."), ("user", [None, " D", None])]
    tokens = [1, 2, 3, 4]
    got = prompts.render_conversation(tokenizer, marked(talk), tokens, numbered=numbered)
    numbers = itertools.count(1)

    def shown(part):
        if part is not None:
            return part
        number = next(numbers)
        return f"Picture {number}: " * numbered + START + PAD * tokens[number - 1] + END

    for _, said in talk:
        text = said if isinstance(said, str) else "".join(map(shown, said))
        assert text in tokenizer.decode(got.ids)


LOSING = {
    "the first alone": (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- if m['content'] is string -%}{{ '' }}"
        "{%- else -%}{%- for p in m['content'] -%}{%- if p['type'] == 'image' -%}{%- set ns.n = ns.n + 1 -%}"
        "{%- if ns.n == 1 -%}<|image_pad|>{%- endif -%}{%- else -%}{{ p['text'] }}{%- endif -%}{%- endfor -%}"
        "{%- endif -%}{%- endfor -%}",
        "leaves out images",
    ),
    "all of them in front": (
        "{%- for m in messages -%}{%- if m['content'] is string -%}{{ m['content'][:0] }}{%- else -%}"
        "{%- for p in m['content'] if p['type'] == 'image' -%}<|image_pad|>{%- endfor -%}"
        "{%- for p in m['content'] if p['type'] == 'text' -%}{{ p['text'] }}{%- endfor -%}{%- endif -%}{%- endfor -%}",
        "leaves out the places of the images",
    ),
}


@pytest.mark.parametrize("name", LOSING)
def test_a_template_that_loses_an_image_or_its_place_is_refused(name):
    template, reason = LOSING[name]
    with pytest.raises(UserError, match=reason):
        prompts.prompt_ids(with_template(template), "A <image> B <image> C", [1, 1])
    # One image, or its place before the text, is left to it as ever.
    assert prompts.prompt_ids(with_template(template), "A", [3]).count(PHANTOM.image_token_id) == 3


def test_prompts_of_fixed_width_take_the_grids_of_each_row():
    texts = ["A <image> B <image>", FIND_PROMPT, "Which?"]
    grids = [[(1, 4, 6), (1, 2, 2)], [(1, 8, 4)] * 3, []]
    encoder = prompts.Prompts(tokenizer_with(""), PHANTOM, (1, 4, 4), 5, width=120)
    rows = encoder.encode(texts, grids)
    for index, (text, own) in enumerate(zip(texts, grids, strict=True)):
        tokens = prompts.count_image_tokens(PHANTOM, own)
        ids = prompts.prompt_ids(tokenizer_with(""), text, tokens)
        length = len(ids)
        assert rows["lengths"][index] == length and rows["ids"][index, :length].tolist() == ids
        padded = [[*ids, *[encoder.pad] * 5]]
        want = network.positions(PHANTOM, padded, own or None)
        np.testing.assert_array_equal(rows["positions"][:, index, : length + 5], want[:, 0])
    alike = encoder.encode([FIND_PROMPT], [[(1, 4, 4)]])
    for name, array in encoder.encode([FIND_PROMPT]).items():
        np.testing.assert_array_equal(alike[name], array)
