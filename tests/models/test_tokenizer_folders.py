"""Tokenizers and chat templates as folders keep them: read as by transformers, or one line that says why not."""

import functools
import itertools
import json
import shutil

import pytest
from tokenizer_folders import (
    IMAGE,
    MERGES,
    PHANTOM,
    TEMPLATES,
    VOCAB,
    framed,
    pair_folder,
    template_folder,
    write_json,
)

from cxr_jax.errors import UserError
from cxr_jax.inference import prompts
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.models import chat_template
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.config import PHANTOM as CONFIG
from cxr_jax.training import checks

TEXTS = [
    "Find abnormalities and support devices.",
    "it's 12.5 cm, e\u0301 and é; naïve\n\n  two  spaces 日本 🫁",
    "<think>Clear.</think><answer>No Finding</answer>",
    f"<|im_start|>user\n{IMAGE}What?<|im_end|>\n",
]


@functools.cache
def embedded():
    return tokenizers.load(str(PHANTOM))


def encoded(tokenizer):
    return tokenizer(TEXTS, add_special_tokens=False)["input_ids"]


def check_dry(folder):
    """What a dry run asks of the folder's tokenizer and template."""
    checks.check_model(str(folder), 112, {"Which?": "the prompt"}, 64)


def assert_refused_in_a_line(folder, change, message):
    """Whatever the change has damaged, a dry run says so by the folder's name, in one line."""
    shutil.copy(PHANTOM / "model.safetensors", folder)
    change(folder)
    with pytest.raises(UserError, match=message) as refusal:
        check_dry(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


# ---- vocab.json and merges.txt -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "Qwen2TokenizerFast"])
@pytest.mark.parametrize("kept_in", ["added_tokens_decoder", "added_tokens.json"])
def test_vocab_and_merges_are_a_tokenizer(tmp_path, kept_in, tokenizer_class):
    from transformers import AutoTokenizer

    folder = pair_folder(tmp_path / "model", kept_in=kept_in, tokenizer_class=tokenizer_class)
    shutil.copy(PHANTOM / "model.safetensors", folder)
    mine = tokenizers.load(str(folder))
    assert encoded(mine) == encoded(embedded()) == encoded(AutoTokenizer.from_pretrained(folder))
    assert mine.get_vocab() == embedded().get_vocab()
    assert tokenizers.special_ids(mine, 1024) == tokenizers.special_ids(embedded(), 1024)
    ours, theirs = (TokenBytes.from_tokenizer(each) for each in (mine, embedded()))
    assert all(
        (a == b).all() if hasattr(a, "all") else a == b for a, b in zip(ours, theirs, strict=True)
    )
    assert prompts.prompt_ids(mine, "Which?", [9]) == prompts.prompt_ids(embedded(), "Which?", [9])
    check_dry(folder)
    # An export has a tokenizer.json, and the same tokens.
    mine.save_pretrained(str(tmp_path / "export"))
    assert (tmp_path / "export" / "tokenizer.json").is_file()
    assert encoded(AutoTokenizer.from_pretrained(tmp_path / "export")) == encoded(embedded())


def test_vocab_and_merges_with_line_ends_of_windows(tmp_path):
    folder = pair_folder(tmp_path / "model")
    text = (folder / "merges.txt").read_bytes()
    (folder / "merges.txt").write_bytes(text.replace(b"\n", b"\r\n"))
    assert encoded(tokenizers.load(str(folder))) == encoded(embedded())


INCOMPLETE = {
    "nothing": (
        lambda f: [(f / n).unlink() for n in ("vocab.json", "merges.txt")],
        "nor vocab.json with merges.txt",
    ),
    "no merges": (lambda f: (f / "merges.txt").unlink(), "vocab.json without merges.txt"),
    "no vocab": (lambda f: (f / "vocab.json").unlink(), "merges.txt without vocab.json"),
    "empty merges": (
        lambda f: (f / "merges.txt").write_text(""),
        "cut short: it makes 0 of its 659 words",
    ),
    "merges cut at a line": (
        lambda f: (f / "merges.txt").write_text("\n".join(MERGES[:400])),
        "cut short: it makes 400 of its 659 words",
    ),
    "merges of another tokenizer": (
        lambda f: (f / "merges.txt").write_text("\n".join(m[::-1] for m in MERGES)),
        "does not belong to vocab.json",
    ),
    "vocab of other words": (
        lambda f: write_json(f / "vocab.json", {w + "x": i for w, i in VOCAB.items()}),
        "does not belong to vocab.json",
    ),
    "damaged vocab": (
        lambda f: (f / "vocab.json").write_text("{"),
        "vocab.json or merges.txt is damaged",
    ),
    "no special tokens": (
        lambda f: write_json(f / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}),
        "lacks the special tokens .*added_tokens.json",
    ),
    "a class that needs tokenizer.json": (
        lambda f: write_json(
            f / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
        ),
        "does not load from vocab.json and merges.txt as a PreTrainedTokenizerFast",
    ),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_incomplete_tokenizer_files_are_named(tmp_path, name):
    assert_refused_in_a_line(pair_folder(tmp_path / "model"), *INCOMPLETE[name])


# ---- Where a template stands ---------------------------------------------------------------------------------

OTHER = TEMPLATES["parts or texts"].replace("assistant\\n", "assistant\\nother ")
TEMPLATE = TEMPLATES["parts or texts"]
NAMED = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": TEMPLATE}]


def _in_tokenizer_config(folder, template):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, "chat_template": template})


def _in_additional(folder, template):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER)
    (folder / "chat_template.jinja").write_text(template)


PLACES = {
    "chat_template.json": lambda f, t: write_json(f / "chat_template.json", {"chat_template": t}),
    "processor_config.json": lambda f, t: write_json(
        f / "processor_config.json", {"processor_class": "X", "chat_template": t}
    ),
    "chat_template.jinja": lambda f, t: (f / "chat_template.jinja").write_text(t),
    "tokenizer_config.json": _in_tokenizer_config,
    "named, in tokenizer_config.json": lambda f, _: _in_tokenizer_config(f, NAMED),
    "named, in chat_template.json": lambda f, _: write_json(
        f / "chat_template.json", {"chat_template": {n["name"]: n["template"] for n in NAMED}}
    ),
    "named, in a folder of their own": _in_additional,
}


@pytest.mark.parametrize("place", PLACES)
def test_template_is_found_where_folders_keep_it(tmp_path, place):
    folder = template_folder(tmp_path / "model")
    shutil.copy(PHANTOM / "model.safetensors", folder)
    PLACES[place](folder, TEMPLATE)
    tokenizer = tokenizers.load(str(folder))
    ids = prompts.prompt_ids(tokenizer, "Which?", [1])
    want = framed([{"role": "user", "content": "Which?"}], has_image=True)
    assert tokenizer.decode(ids) == want
    check_dry(folder)
    # What is exported is used again.
    tokenizer.save_pretrained(str(tmp_path / "export"))
    assert prompts.prompt_ids(tokenizers.load(str(tmp_path / "export")), "Which?", [1]) == ids


@pytest.mark.parametrize("pair", itertools.permutations(list(PLACES)[:4], 2))
def test_of_two_templates_that_of_the_processor_is_used_and_told(tmp_path, caplog, pair):
    """As transformers' processor has it; a difference from the tokenizer's own is one line."""
    from transformers import AutoTokenizer, ProcessorMixin

    folder = template_folder(tmp_path / "model")
    PLACES[pair[0]](folder, TEMPLATE)
    PLACES[pair[1]](folder, OTHER)
    used = [tokenizers.load(str(folder)).chat_template for _ in range(2)][1]
    processor = ProcessorMixin.get_processor_dict(str(folder))[0].get("chat_template")
    own = AutoTokenizer.from_pretrained(folder).chat_template
    assert used == (processor or own)
    told = [
        record.getMessage() for record in caplog.records if "chat template" in record.getMessage()
    ]
    assert len(told) == (own is not None and own != used)
    # The same template twice is no news.
    caplog.clear()
    PLACES[pair[1]](folder, TEMPLATE)
    tokenizers.load(str(folder))
    assert not caplog.records


NO_TEMPLATE = {
    "none": (lambda f: None, "no chat template: none of chat_template.jinja, chat_template.json"),
    "null": (lambda f: PLACES["chat_template.json"](f, None), "no chat template"),
    "empty": (lambda f: PLACES["chat_template.json"](f, ""), "no chat template"),
    "damaged": (
        lambda f: (f / "chat_template.json").write_text("{%"),
        "chat_template.json: not valid JSON",
    ),
    "a list": (
        lambda f: PLACES["chat_template.json"](f, [1]),
        "chat_template.json: chat_template is a list",
    ),
    "a number": (lambda f: PLACES["chat_template.json"](f, 7), "the chat template is no text"),
    "none is the default": (
        lambda f: _in_tokenizer_config(
            f, [{"name": "rag", "template": OTHER}, {"name": "tool", "template": OTHER}]
        ),
        "has the chat templates rag, tool, and none is named 'default'",
    ),
    "no Jinja": (
        lambda f: PLACES["chat_template.json"](f, "{% for %}"),
        "does not work .*TemplateSyntaxError",
    ),
    "nothing of the messages": (
        lambda f: PLACES["chat_template.json"](f, "x"),
        "leaves out the image",
    ),
    "refuses all": (
        lambda f: PLACES["chat_template.jinja"](f, "{{ raise_exception('Only tools') }}"),
        "Only tools",
    ),
    "images alone": (
        lambda f: PLACES["chat_template.jinja"](f, IMAGE),
        "leaves out the text of the user's turn",
    ),
}


@pytest.mark.parametrize("name", NO_TEMPLATE)
def test_template_that_cannot_be_used_is_one_line(tmp_path, name):
    assert_refused_in_a_line(template_folder(tmp_path / "model"), *NO_TEMPLATE[name])


# ---- Which form of messages a template takes -------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is there?"}
ANSWER = {"role": "assistant", "content": "Edema."}
AGAIN = {"role": "user", "content": "Where, and why 'type'?"}
CONVERSATIONS = {
    "question": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "history": [QUESTION, ANSWER, AGAIN],
    "system and history": [SYSTEM, QUESTION, ANSWER, AGAIN],
}


@pytest.mark.parametrize("image_tokens", [0, 5])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_turn_reaches_the_model_in_whatever_form_the_template_takes(
    template, conversation, image_tokens
):
    tokenizer, messages = _with_template(TEMPLATES[template]), CONVERSATIONS[conversation]
    ids = prompts.conversation_ids(tokenizer, messages, [image_tokens][: image_tokens > 0])
    want = framed(messages, image_tokens > 0).replace("<|image_pad|>", "<|image_pad|>" * 5)
    assert tokenizer.decode(ids) == want
    assert ids == tokenizer(want, add_special_tokens=False)["input_ids"]
    assert ids.count(CONFIG.image_token_id) == image_tokens


@functools.cache
def _with_template(template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PHANTOM)
    tokenizer.chat_template = template
    return tokenizer


LEFT_OUT = {
    "system refused": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        [SYSTEM, QUESTION],
        "System role not supported",
    ),
    "system dropped": (
        "{% set messages = messages[1:] if messages[0]['role'] == 'system' else messages %}",
        [SYSTEM, QUESTION],
        "leaves out the text of the system's turn",
    ),
    "all but the last dropped": (
        "{% set messages = messages[-1:] %}",
        [QUESTION, ANSWER, AGAIN],
        "leaves out the (image|text of the user's turn)",
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", LEFT_OUT)
def test_turn_that_a_template_leaves_out_is_refused(name, template):
    before, messages, message = LEFT_OUT[name]
    tokenizer = _with_template(before + TEMPLATES[template])
    with pytest.raises(UserError, match=message):
        prompts.conversation_ids(tokenizer, messages, [5])
    # A question alone is asked as ever.
    prompts.conversation_ids(tokenizer, [QUESTION], [5])


def test_published_forms_are_left_as_they_were():
    """The embedded template, and those of the published models, get the question in parts and all else as texts."""
    messages = CONVERSATIONS["system and history"]
    shown = [m | {"content": (None, m["content"])} if m is QUESTION else m for m in messages]
    given = chat_template.in_form(embedded(), shown)
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION["content"]}]
    assert given == [SYSTEM, {"role": "user", "content": parts}, ANSWER, AGAIN]


def test_a_template_is_tried_once_for_the_same_roles_and_anew_when_it_changes(monkeypatch):
    tokenizer = tokenizers.load(str(PHANTOM))
    calls = []
    render = chat_template.render
    monkeypatch.setattr(
        chat_template, "render", lambda *args, **kw: calls.append(args) or render(*args, **kw)
    )

    def count(messages, image_tokens):
        calls.clear()
        ids = prompts.conversation_ids(tokenizer, messages, [image_tokens][: image_tokens > 0])
        return len(calls), tokenizer.decode(ids)

    for image_tokens in (0, 2):
        for messages in CONVERSATIONS.values():
            first, text = count(messages, image_tokens)
            again = [message | {"content": message["content"] + "!"} for message in messages]
            fewer, other_text = count(again, image_tokens)
            # With the head of the model's turn and without it. A question about a film was tried when it was loaded.
            assert fewer == 2 and (first > 2 or (messages, image_tokens) == ([QUESTION], 2))
            assert count(messages, image_tokens) == (2, text)
            assert other_text != text and other_text.count("!<|im_end|>") == len(messages)
    # The form is that of the template that the tokenizer has now, tried before or not.
    own, before = tokenizer.chat_template, count([QUESTION], 2)
    framed_text = framed([QUESTION], True).replace("<|image_pad|>", "<|image_pad|>" * 2)
    for template in (*TEMPLATES.values(), *TEMPLATES.values()):
        tokenizer.chat_template = template
        assert count([QUESTION], 2)[1] == framed_text
    tokenizer.chat_template = own
    assert count([QUESTION], 2) == before
