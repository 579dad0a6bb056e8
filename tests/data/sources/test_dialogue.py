"""Rows in the schemas of other tools: one meaning in each, or refused in one line."""

import itertools
import json
import re

import pytest

from cxr_jax.data.json_rows import BadRowError
from cxr_jax.data.prompts import NO_PROMPT
from cxr_jax.data.sources.dialogue import NamedFilm, parse_dialogue

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
    assert dialogue == (ASK, SAY, None, dialogue.films, ())
    [film] = dialogue.films
    assert set(film.names) == {FILM} and film.role is None


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
    "2 places for an image (<image>), and 1": "<image><image>{}",
    "2 places for an image (<image>), and 1 ": "<image>{}<image>",
    "no prompt": "<image>\n",
    "'<img>'": "<img>{}",
    "'</image>'": "<image></image>{}",
    "'<IMAGE>'": "<IMAGE>{}",
    "'<image ..>'": "<image 1>{}",
    "'<img ..>'": "{} <img src=SMITH_JOHN_19500101.png>",
    "'<|image ..>'": "<|image_1|>\n{}",
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
    assert reason.strip() in str(caught.value) and "SMITH" not in str(caught.value)


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
    "the last question has no answer": [U, A, U],
    "two turns of the user": [U, U],
    "two turns of the user ": [U, U, A],
    "two turns of the assistant": [U, A, A],
    "a system turn that is not": [U, S],
    "a system turn that is not the first": [S, U, A, S, U, A],
    "the assistant's turn is empty": [U, A, U, A | {"content": ""}],
    "nothing is asked": [U, A, U | {"content": " "}, A],
    "marked not to train": [U, A | {"weight": 0}, U, A],
    "marked not to train ": [U, A | {"loss": False}],
    "a turn of a tool": [U, A, {"role": "tool", "content": "3"}, A],
    "a turn of a tool ": [U, {"role": "function_call", "content": "{}"}],
    "speaks before it is asked": [A, U],
    "no prompt": [A],
    "no prompt ": [S],
    "no prompt  ": [U | {"content": " "}, A],
    "assistant's turn is empty": [U, A | {"content": None}],
    "in the assistant's turn": [U, A | {"content": "<image>x"}],
    "in the system's turn": [S | {"content": "<image>x"}, U],
    "none of system, user": [U, A | {"role": "critic"}],
    "none of system, user ": [{"content": "x"}],
    "calls tools": [U, A | {"tool_calls": [{"id": 1}]}],
    "not an object": [U, ["x"]],
    "a part of a message is not an object": [U | {"content": [3]}],
    "neither text nor image": [U | {"content": [{"type": "video", "video": "v"}]}],
    "has no text": [U | {"content": [{"type": "text", "text": None}]}],
    "name 2 and 1 images": [U | {"content": [{"image": "a.png"}, {"image": "b.png"}, "x"]}],
    "names several images": [U | {"content": [{"image": "a.png", "path": "b.png"}, "x"]}],
    "has a name, and another": [U | {"content": [{"image": "a.png"}, {"type": "image"}, "x"]}],
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
    if "calls tools" not in reason and "train" not in reason:
        with pytest.raises(BadRowError):
            parse_dialogue({"image": FILM, "conversations": renamed})


BAD_ROWS = {
    "name 1 and 2 images": {"messages": [U], "images": ["a.png", "b.png"], "image": "c.png"},
    "name 2 and 3 images": {"messages": [U], "image": ["a", "b"], "images": ["a", "b", "c"]},
    "1 places for an image (<image>), and 2 images": {
        "messages": [U | {"content": "<image>x"}],
        "images": ["a.png", "b.png"],
    },
    "an image has a role": {"messages": [U], "images": [{"path": "a", "role": "prior"}, "b"]},
    "none of frontal, lateral": {"messages": [U], "images": [{"path": "a", "role": "left"}]},
    "frontal is there 2 times": {
        "messages": [U],
        "images": [{"path": "a", "role": "frontal"}, {"path": "b", "view": "PA"}],
    },
    "its view or when another": {
        "messages": [U],
        "images": [{"path": "a", "role": "prior", "when": "current"}],
    },
    "neither frontal nor lateral": {"messages": [U], "images": [{"path": "a", "view": "LAO"}]},
    'neither "current" nor': {"messages": [U], "images": [{"path": "a", "when": "2001"}]},
    "is not a text": {"messages": [U], "images": [{"path": "a", "when": 3}]},
    "say different things": {"messages": [U], "conversations": llava("y", say=None), "image": FILM},
    "say different things ": {"prompt": "x", "query": "y", "image": FILM},
    "history beside messages": {"messages": [U], "history": [["a", "b"]], "image": FILM},
    "not a list of questions with": {"query": "x", "history": [["a"]], "image": FILM},
    "not a list of questions with their": {"query": "x", "history": "a", "image": FILM},
    "the last question has no answer": {"query": "x", "history": [["a", "b"]], "image": FILM},
    "2 places for an image (<image>), and 1": {
        "messages": [U | {"content": "<image>x"}, A, U | {"content": "y <image>"}, A],
        "image": FILM,
    },
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


# ---- Several turns ---------------------------------------------------------------------------------------------

TALK = [
    ("Find <image>?", "Edema."),
    ("Provide differentials.", "Heart failure."),
    ("Sure?", "Yes."),
]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_every_schema_keeps_all_turns(system):
    turns = [
        (role, text)
        for pair in [(TALK[0][0].replace(" <image>", ""), TALK[0][1]), *TALK[1:]]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    first = [("system", system)] if system else []
    openai = [{"role": role, "content": text} for role, text in [*first, *turns]]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"from": names[role], "value": text} for role, text in [*first, *turns]]
    swift = {
        "history": [
            [ask, say] for (_, ask), (_, say) in zip(turns[:4:2], turns[1:4:2], strict=True)
        ],
        "query": turns[4][1],
        "response": turns[5][1],
        **({"system": system} if system else {}),
    }
    marked = json.loads(json.dumps(openai).replace("Find?", "<image>\\nFind?"))
    for row in (
        {"messages": openai},
        {"messages": marked},
        {"conversations": sharegpt},
        {"messages": openai, "conversations": sharegpt},
        swift,
        {"instruction": swift["query"], "output": swift["response"], **swift},
    ):
        if "instruction" in row:
            row = {key: value for key, value in row.items() if key not in ("query", "response")}
        dialogue = parse_dialogue({**row, "images": [FILM]})
        assert dialogue[:3] == ("Find?", "Edema.", system)
        assert list(dialogue.later) == turns[2:]


def test_a_film_of_a_later_turn_stays_there():
    later = {"role": "user", "content": [{"type": "image", "image": FILM}, "What now?"]}
    dialogue = parse_dialogue({"messages": [U, A, later, A]})
    assert dialogue.prompt == "x" and dialogue.later[0].content == "<image>What now?"
    assert [film.names for film in dialogue.films] == [(FILM,)]
    two = [U | {"content": "Old: <image>"}, A, U | {"content": "New: <image> Larger?"}, A]
    dialogue = parse_dialogue({"messages": two, "images": list(TWO)})
    assert (dialogue.prompt, dialogue.later[0].content) == ("Old: <image>", "New: <image> Larger?")
    assert [film.names for film in dialogue.films] == [(name,) for name in TWO]


# ---- Several films ---------------------------------------------------------------------------------------------

TWO = ("a/b.png", "c.png")


def two_films(ask):
    """Name -> a row that asks `ask` about TWO."""
    rows = {}
    for name, row in schemas(ask).items():
        if name in WITH_TEXT_ONLY:
            films = [{"path": film, "bytes": None} for film in TWO] if "objects" in name else TWO
            rows[name] = {key: value for key, value in row.items() if key != "image"}
            rows[name]["images"] = list(films)
    return rows


@pytest.mark.parametrize(
    "ask, prompt",
    [
        (ASK, "<image><image>" + ASK),
        (f"<image>\n<image>\n{ASK}", "<image><image>" + ASK),
        (f"<image> <image>{ASK} ", "<image><image>" + ASK),
        ("New: <image>\nOld: <image> What?\n", "New: <image>\nOld: <image> What?"),
        ("What? <image><image>", "What? <image><image>"),
        ("<image> or <image>", "<image> or <image>"),
    ],
)
def test_several_films_stand_where_a_row_marks_them_or_before_its_text(ask, prompt):
    for name, row in two_films(ask).items():
        dialogue = parse_dialogue(row)
        assert dialogue[:3] == (prompt, SAY, None), name
        assert dialogue.films == tuple(NamedFilm((film,), None) for film in TWO)
        assert parse_dialogue(row | {"image": TWO[1]}).films == dialogue.films


def test_films_in_the_parts_of_a_turn_are_where_they_stand():
    content = [
        {"type": "text", "text": "New: "},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "."},
        "Old: ",
        {"type": "image_url", "image_url": {"url": "b.png"}},
        "Which?",
    ]
    row = {"messages": messages(content)}
    dialogue = parse_dialogue(row)
    assert dialogue.prompt == "New: <image>.\nOld: <image>Which?"
    assert [film.names for film in dialogue.films] == [("a.png",), ("b.png",)]
    both = parse_dialogue(row | {"images": ["x/a.png", "x/b.png"]})
    assert [film.names for film in both.films] == [("a.png", "x/a.png"), ("b.png", "x/b.png")]


def test_roles_say_which_film_is_which_in_one_order():
    given = [
        {"path": "p.png", "role": "prior"},
        {"path": "f.png", "view": "AP"},
        {"path": "l.png", "view": "LL", "when": "current"},
        {"path": "q.png", "view": "lateral", "when": "Prior"},
    ]
    named = "Current frontal: <image> Current lateral: <image> Prior frontal: <image> Prior lateral: <image>"
    for films in itertools.permutations(given):
        dialogue = parse_dialogue({"messages": messages(ASK), "images": list(films)})
        assert dialogue.prompt == f"{named}\n{ASK}"
        assert [film.names[0] for film in dialogue.films] == ["f.png", "l.png", "p.png", "q.png"]
        assert [film.role for film in dialogue.films] == [
            "frontal",
            "lateral",
            "prior",
            "prior_lateral",
        ]
    alone = parse_dialogue({"messages": messages(ASK), "image": {"path": "f", "role": "frontal"}})
    assert alone.prompt == f"Current frontal: <image>\n{ASK}"
    # A row that has places for them keeps its words.
    ask = "Old <image> and new <image>?"
    marked = parse_dialogue({"messages": messages(ask), "images": given[:2]})
    assert marked.prompt == ask and [film.role for film in marked.films] == ["prior", "frontal"]
