"""Rows in the schemas of other tools: one meaning in each, or refused in one line."""

import itertools
import json
import re

import pytest

from cxr_jax.data.json_rows import BadRowError
from cxr_jax.data.prompts import NO_PROMPT
from cxr_jax.data.sources.dialogue import parse_dialogue

ASK, SAY, FILM = (
    "Find abnormalities.",
    "<think>Clear.</think><answer>No Finding</answer>",
    "a/b.png",
)
NAN = float("nan")


def messages(ask, say=SAY, system=None, keys=("role", "content"), names=("user", "assistant")):
    turns = [(names[0], ask), *([(names[1], say)] if say is not None else [])]
    if system is not None:
        turns.insert(0, ("system", system))
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


def llava(ask, **more):
    return messages(ask, keys=("from", "value"), names=("human", "gpt"), **more)


def schemas(ask=ASK, film=FILM):
    """Name -> a row that asks `ask` about `film` and answers SAY."""
    text = {"type": "text", "text": ask}
    return {
        "LLaVA": {"image": film, "conversations": llava(ask)},
        "LLaVA with a list": {"image": [film], "conversations": llava(ask)},
        "ShareGPT": {"images": [film], "conversations": llava(ask)},
        "ShareGPT with roles": {"images": [film], "conversations": messages(ask)},
        "ms-swift": {"messages": messages(ask), "images": [film]},
        "ms-swift, objects": {"messages": messages(ask), "images": [{"path": film, "bytes": None}]},
        "ms-swift, flat": {"query": ask, "response": SAY, "images": [film], "history": []},
        "LLaMA-Factory": {"instruction": ask, "input": "", "output": SAY, "images": [film]},
        "TRL, flat": {"prompt": ask, "completion": SAY, "image": film},
        "TRL": {
            "prompt": messages([{"type": "image"}, text], None),
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": SAY}]}],
            "images": [film],
        },
        "OpenAI": {"messages": messages([{"type": "image_url", "image_url": {"url": film}}, text])},
        "OpenAI, text first": {
            "messages": messages([text, {"type": "image_url", "image_url": film}])
        },
        "OpenAI, responses": {
            "messages": messages(
                [{"type": "input_image", "image_url": film}, {"type": "input_text", "text": ask}]
            )
        },
        "NV-Reason": {
            "image": film,
            "messages": messages([{"type": "image", "image": film}, text]),
        },
        "Qwen": {"messages": messages([{"type": "image", "path": film, "url": None}, text])},
        "joined tables": {
            "image": film,
            "messages": messages(ask),
            "conversations": None,
            "images": None,
            "system": NAN,
            "videos": [],
            "history": None,
        },
    }


@pytest.mark.parametrize("name", schemas())
def test_every_schema_says_the_same(name):
    dialogue = parse_dialogue(schemas()[name])
    assert dialogue == (ASK, SAY, None, dialogue.images)
    assert set(dialogue.images) == {FILM}


WITH_TEXT_ONLY = [
    name for name, row in schemas().items() if '"type": "image' not in json.dumps(row)
]
WITH_TEXT_ONLY = [
    name for name in WITH_TEXT_ONLY if "input_image" not in json.dumps(schemas()[name])
]


@pytest.mark.parametrize("name", WITH_TEXT_ONLY)
@pytest.mark.parametrize(
    "form", ["<image>{}", "<image>\n{}", " <image> \n {}", "{}\n<image>", "{} <image>"]
)
def test_the_mark_of_a_film_is_no_text_in_any_schema(name, form):
    row = schemas(form.format(ASK))[name]
    assert parse_dialogue(row)[:2] == (ASK, SAY)


REFUSED_MARKS = {
    "places for one": "<image><image>{}",
    "places for one ": "<image>{}<image>",
    "middle of the text": "In <image> there is what? {}",
    "no prompt": "<image>\n",
    "'<img>'": "<img>{}",
    "'</image>'": "<image></image>{}",
    "'<IMAGE>'": "<IMAGE>{}",
    "'<image 1>'": "<image 1>{}",
    "'<img src=1>'": "{} <img src=1>",
    "'<|image_1|>'": "<|image_1|>\n{}",
    "'<IMG>'": "Look.\n<IMG>\n{}",
    "'<img>'  ": "<image>\n{}\n<img>",
    "'<video>'": "<video>{}",
    "'[IMG]'": "[IMG] {}",
}


@pytest.mark.parametrize("name, reason", itertools.product(WITH_TEXT_ONLY, REFUSED_MARKS))
def test_marks_that_do_not_fit_one_film_before_the_text_are_refused_in_any_schema(name, reason):
    row = schemas(REFUSED_MARKS[reason].replace("{}", ASK if "{}" in REFUSED_MARKS[reason] else ""))
    with pytest.raises(BadRowError) as caught:
        parse_dialogue(row[name])
    assert reason.strip() in str(caught.value)


@pytest.mark.parametrize(
    "mark",
    ["[IMG]", "<IMAGE>", "<picture frame>", "<img src=1>", "<images>", "<|image|>", "</img>"],
)
def test_what_others_write_for_a_film_is_text_amid_a_text(mark):
    for ask in (
        f"Does {mark} show a film?",
        f"Two lines.\nThe second has a {mark} in it.\nA third.",
    ):
        say = SAY.replace("Clear", f"A {mark} is there")
        for name in WITH_TEXT_ONLY:
            row = json.loads(json.dumps(schemas(f"<image>\n{ask}")[name]).replace(SAY, say))
            assert parse_dialogue(row)[:2] == (ask, say)


BLANK = ["", " ", "\n\t\r\n", "\u00a0\u2003", "\ufeff\u200b", "<image>", " <image>\n"]


@pytest.mark.parametrize("ask", BLANK)
def test_rows_that_ask_nothing_are_refused_in_the_same_words(ask):
    for name in WITH_TEXT_ONLY:
        with pytest.raises(BadRowError, match=re.escape(NO_PROMPT)):
            parse_dialogue(schemas(ask)[name])


@pytest.mark.parametrize("make", [messages, llava])
def test_a_system_turn_is_kept_apart(make):
    key = "messages" if make is messages else "conversations"
    row = {"image": FILM, key: make(ASK, system="Be brief.")}
    assert parse_dialogue(row).system == "Be brief."
    assert parse_dialogue(row | {"system": "Be brief."}).system == "Be brief."
    assert (
        parse_dialogue({"image": FILM, key: make(ASK), "system": "Be brief."}).system == "Be brief."
    )
    with pytest.raises(BadRowError, match="different things"):
        parse_dialogue(row | {"system": "Be long."})


U, A, S = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
BAD_TURNS = {
    "3 turns": [U, A, U],
    "4 turns": [U, A, U, A],
    "2 turns": [U, U],
    "2 turns ": [U, S],
    "speaks before it is asked": [A, U],
    "no prompt": [A],
    "no prompt ": [S],
    "no prompt  ": [U | {"content": " "}, A],
    "assistant's turn is empty": [U, A | {"content": None}],
    "in the assistant's turn": [U, A | {"content": "<image>x"}],
    "in the system's turn": [S | {"content": "<image>x"}, U],
    "none of system, user": [U, A | {"role": "tool"}],
    "none of system, user ": [{"content": "x"}],
    "calls tools": [U, A | {"tool_calls": [{"id": 1}]}],
    "not an object": [U, ["x"]],
    "a part of a message is not an object": [U | {"content": [3]}],
    "neither text nor image": [U | {"content": [{"type": "video", "video": "v"}]}],
    "has no text": [U | {"content": [{"type": "text", "text": None}]}],
    "several images": [U | {"content": [{"image": "a.png"}, {"image": "b.png"}, "x"]}],
    "middle of the text": [U | {"content": ["x", {"type": "image"}, "y"]}],
    "half a character": [U | {"content": "\ud83d"}],
}


@pytest.mark.parametrize("reason", BAD_TURNS)
def test_turns_that_are_more_or_less_than_one_question_are_refused(reason):
    with pytest.raises(BadRowError) as caught:
        parse_dialogue({"image": FILM, "messages": BAD_TURNS[reason]})
    assert reason.strip() in str(caught.value)
    renamed = [
        {"from": turn.get("role"), "value": turn.get("content")} if isinstance(turn, dict) else turn
        for turn in BAD_TURNS[reason]
    ]
    if "tool" not in reason:
        with pytest.raises(BadRowError):
            parse_dialogue({"image": FILM, "conversations": renamed})


BAD_ROWS = {
    "several images": {"messages": [U], "images": ["a.png", "b.png"]},
    "several images ": {"messages": [U], "image": ["a.png", "a.png"]},
    "say different things": {"messages": [U], "conversations": llava("y", say=None), "image": FILM},
    "say different things ": {"prompt": "x", "query": "y", "image": FILM},
    "earlier turns": {"query": "x", "history": [["a", "b"]], "image": FILM},
    "only films": {"messages": [U], "image": FILM, "videos": ["v.mp4"]},
    "in the row itself": {"messages": [U], "image": {"bytes": "iVBOR", "path": None}},
    "no name": {"messages": [U], "image": 7},
    "neither messages nor": {"image": FILM, "messages": [], "prompt": ""},
    "not a list": {"image": FILM, "messages": "x"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_rows_that_say_two_things_or_none_are_refused(reason):
    with pytest.raises(BadRowError) as caught:
        parse_dialogue(BAD_ROWS[reason])
    assert reason.strip() in str(caught.value)
