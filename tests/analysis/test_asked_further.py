"""The measures of follow-ups: of the grammar's own answers they are perfect, of another phantom's they are not."""

import numpy as np
import pytest

from cxr_jax import phantom
from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.data.sources.splits import held_out
from cxr_jax.inference.requests import Completion
from cxr_jax.phantom import follow_ups, report_writer
from experiments.analysis import follow_ups as analysis

N = 12


@pytest.fixture(scope="module")
def world():
    """Batch, reports of a reader who misses nothing."""
    source = PhantomSource("A", "test")
    scenes = source.batch(np.arange(N))["scene"]
    reports = [
        report_writer.write(phantom.scene_row(scenes, row), "A", np.random.default_rng(row))
        for row in range(N)
    ]
    return held_out(source, N), reports


def say(text):
    return Completion(text, [], [], "stop")


def answers_of(reports, question):
    return [
        say(follow_ups.answer(question, report, "A", np.random.default_rng(0)))
        for report in reports
    ]


def test_the_grammar_is_true_and_leaves_nothing_out(world):
    batch, reports = world
    said = {question: answers_of(reports, question) for question in follow_ups.QUESTIONS}
    said["readings"] = [say(report_writer.target(report)) for report in reports]
    for measures in analysis.measure(said, batch).values():
        values = {name: estimate["value"] for name, estimate in measures.items()}
        assert values.pop("claims") > 1
        assert values == {"answered": 1, "false": 0, "found": 1, "as read": 1}


def test_answers_about_another_phantom_are_seen(world):
    batch, reports = world
    others = [*reports[1:], reports[0]]
    said = {question: answers_of(others, question) for question in follow_ups.QUESTIONS}
    said["readings"] = [say(report_writer.target(report)) for report in reports]
    for measures in analysis.measure(said, batch).values():
        assert measures["false"]["value"] > 0.5
        assert measures["found"]["value"] < 0.8 and measures["as read"]["value"] < 0.5


class Asked:
    """A model that notes what it is asked."""

    def __init__(self):
        self.asked = []

    def generate(self, films, prompts, max_new_tokens):
        self.asked.append(prompts)
        return [[say(f"answer {number}")] for number in range(len(films))]


def test_each_question_follows_the_model_s_own_reading():
    model = Asked()
    said = analysis.ask(model, np.zeros((2, 4, 4), np.float32), "What is there?")
    assert [completion.text for completion in said["readings"]] == ["answer 0", "answer 1"]
    assert model.asked[0] == "What is there?" and len(model.asked) == 4
    for question, talks in zip(follow_ups.QUESTIONS, model.asked[1:], strict=True):
        assert [talk[1]["content"] for talk in talks] == ["answer 0", "answer 1"]
        assert all(talk[2] == {"role": "user", "content": question} for talk in talks)
