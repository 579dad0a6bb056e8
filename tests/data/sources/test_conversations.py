"""Rows of several turns: what is imitated, what is asked, which rows say the same."""

import json

import numpy as np
import pytest
from PIL import Image

from cxr_jax.data.prompts import Message, as_text, count_films
from cxr_jax.data.sources import manifest
from cxr_jax.data.sources.rows import describe_repeats
from cxr_jax.data.studies.gather import gather
from cxr_jax.errors import UserError

FIND, TRACE = "Find abnormalities.", "<think>Wet.</think><answer>Edema</answer>"
TALK = (
    Message("user", FIND),
    Message("assistant", TRACE),
    Message("user", "Provide differentials."),
    Message("assistant", "Heart failure."),
)
SYSTEM = Message("system", "Be brief.")


@pytest.fixture
def load(tmp_path):
    for name in "ab":
        pixels = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")

    def make(*talks, repeats="keep", **more):
        path = tmp_path / "rows.jsonl"
        rows = [
            {
                "id": f"r{number}",
                "images": ["a.png"],
                "solution": "Edema",
                "messages": [turn._asdict() for turn in talk],
                **more,
            }
            for number, talk in enumerate(talks)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return manifest.load_rows(path, tmp_path, repeats)

    return make


def test_a_source_gives_whole_conversations_and_asks_their_first_question(load):
    rows = load(TALK, (SYSTEM, *TALK), TALK[:2])
    source = manifest.FilesSource(rows, size=28)
    indices = np.array([2, 1, 0])
    batch = source.batch(indices)
    assert source.conversations(batch, indices) == [TALK[:2], (SYSTEM, *TALK), TALK]
    asked = [FIND, (SYSTEM, TALK[0]), FIND]
    assert source.about(indices)["prompts"] == batch["prompts"] == asked
    assert set(source.prompts()) == set(asked)
    assert as_text(asked[1]) == f"system: Be brief.\n{FIND}"


def test_what_is_asked_of_a_film_in_a_later_turn_is_that_turn_with_its_history(load):
    talk = (
        Message("user", "Hello"),
        Message("assistant", "Yes?"),
        Message("user", "<image>Find."),
        TALK[1],
    )
    [row] = load((SYSTEM, *talk))
    assert row.conversation == (SYSTEM, *talk) and row.asked == (SYSTEM, *talk[:3])
    # Beside it no other film can be put.
    with pytest.raises(UserError, match="marks the place of its film"):
        gather([row], ("frontal", "lateral"))


NEXT = Message("user", "<image>And of this one?")


@pytest.mark.parametrize("system", [(), (SYSTEM,)])
@pytest.mark.parametrize(
    "before, kept, films",
    [
        # A film in the second turn, after an answer of the row's own about what it did not see.
        (TALK[:2], (), 1),
        ((Message("user", FIND), Message("assistant", "<Answer>Edema")), (), 1),
        # Small talk before any film says nothing of it.
        ((Message("user", "Hello"), Message("assistant", "Yes?")), True, 1),
        ((Message("user", "Hello"), Message("assistant", "Yes?"), *TALK[:2]), 2, 1),
        # What was said of the first film, in a list or in words, and whatever came after it.
        ((Message("user", f"<image>{FIND}"), TALK[1]), (), 2),
        ((Message("user", f"{FIND} <image>"), Message("assistant", "There is edema.")), (), 2),
        ((Message("user", f"<image>{FIND}"), TALK[1], *TALK[2:]), (), 2),
    ],
)
def test_what_is_scored_does_not_tell_its_truth(load, before, kept, films, system):
    talk = (*system, *before, NEXT, Message("assistant", "<answer>Edema</answer>"))
    [row] = load(talk, images=["a.png", "b.png"][:films])
    assert row.conversation == talk  # to be trained on whole
    kept = before if kept is True else before[: kept or 0]
    last = Message("user", "<image>" * (films - 1) + NEXT.content)
    assert row.asked == ((*system, *kept, last) if system or kept else last.content)
    assert "edema" not in as_text(row.asked).lower() and count_films(row.asked) == films


def test_rows_that_differ_in_what_is_left_out_of_the_prompt_are_no_repeats(load):
    ends = (NEXT, TALK[1])
    talks = [(Message("user", f"<image>{ask}"), TALK[1], *ends) for ask in ("One?", "Two?")]
    rows = load(*talks, talks[0], repeats="once", images=["a.png", "b.png"])
    assert [row.times for row in rows] == [2, 1]


def test_rows_that_differ_in_a_later_turn_or_the_system_turn_are_no_repeats(load):
    other = (*TALK[:3], Message("assistant", "Renal failure."))
    rows = load(TALK, other, (SYSTEM, *TALK), TALK, repeats="once")
    assert len(rows) == 3 and [row.times for row in rows] == [2, 1, 1]
    assert describe_repeats(rows).startswith("repeats: 1 of 4 rows")


def test_a_row_that_ends_in_a_question_is_refused_with_its_line(load):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the last question has no answer"):
        load(TALK, TALK[:3])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: a turn of a tool"):
        load((*TALK[:2], Message("tool", "3")))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: two turns of the user follow each other"):
        load((TALK[0], *TALK))
