"""The audit of single films: readers that use all of them, and one that does not, are told apart."""

import types

import numpy as np
import pytest

from cxr_jax.data.prompts import ask_of_roles
from cxr_jax.evaluation.film_use import answer_with_films_changed, answer_with_films_swapped
from cxr_jax.metrics.bootstrap import Bootstrap
from cxr_jax.metrics.scores import Reference, image_use_audit
from experiments.analysis import second_image

VIEWS, QUESTION, COUNT = ("frontal", "lateral"), "What is it?", 64


class KnowingReader:
    """Reads from its films, whose pixels are the labels that they show, the roles that it looks at."""

    def __init__(self, *looked_at):
        self.looked_at = looked_at

    def read(self, params, images, texts):
        answer = np.zeros((len(images), 14), bool)
        for row, (films, text) in enumerate(zip(images, texts, strict=True)):
            named, _, question = text.partition("\n")
            assert question == QUESTION
            shown = [role for role in VIEWS if role in named.lower()]
            assert len(films) == len(shown) == named.count("<image>")
            for film, role in zip(films, shown, strict=True):
                if role in self.looked_at:
                    answer[row] |= film[0] > 0.75  # grey shows nothing
        return types.SimpleNamespace(answer=answer, valid=np.ones(len(images), bool))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    shows = rng.random((COUNT, 2, 14)) < 0.2
    return {
        "image": np.broadcast_to(shows[:, :, None], (COUNT, 2, 3, 14)).astype(np.float32),
        "texts": [ask_of_roles(VIEWS, QUESTION)] * COUNT,
        "solution": shows.any(1),
        "known": np.ones((COUNT, 14), bool),
    }


def audit(reader, batch):
    answers = answer_with_films_changed(reader, {}, batch, VIEWS, QUESTION)
    reference = Reference(batch["solution"], batch["known"])
    return image_use_audit(answers, reference, bootstrap=Bootstrap(200))


def test_a_reader_of_both_films_loses_by_each_change_of_each(batch):
    result = audit(KnowingReader(*VIEWS), batch)
    assert result["real"]["jaccard"] == 1
    changes = [f"{how} {role}" for role in VIEWS for how in ("swapped", "blank", "without")]
    assert [*result] == ["real", *changes]
    for name in changes:
        assert result[name]["drop_jaccard"]["lo"] > 0.2, name
    # Grey or left out, a film shows nothing; another patient's shows what is not so, which is worse.
    assert result["without lateral"]["jaccard"] == result["blank lateral"]["jaccard"]
    assert result["swapped lateral"]["jaccard"] < result["blank lateral"]["jaccard"]


def test_a_reader_of_the_frontal_alone_is_told_by_the_lateral(batch):
    result = audit(KnowingReader("frontal"), batch)
    for how in ("swapped", "blank", "without"):
        assert result[f"{how} lateral"]["same_answer"] == 1
        assert result[f"{how} lateral"]["drop_jaccard"]["value"] == 0
    assert result["swapped frontal"]["drop_jaccard"]["lo"] > 0.2


def test_an_evaluation_swaps_each_film_beside_the_first(batch):
    reader = KnowingReader(*VIEWS)
    swapped = answer_with_films_swapped(reader, {}, {**batch, "views": VIEWS})
    every = answer_with_films_changed(reader, {}, batch, VIEWS, QUESTION)
    assert [*swapped] == ["swapped lateral"]
    assert np.array_equal(swapped["swapped lateral"].labels, every["swapped lateral"].labels)
    # One film an example has no second to swap.
    assert not answer_with_films_swapped(reader, {}, batch)


def test_tables_name_every_film_and_interval(batch):
    result = {"scores": audit(KnowingReader("frontal"), batch)}
    result["hidden"] = {"real": {"value": 0.5, "lo": 0.25, "hi": 0.75}}
    table = "\n".join(second_image.lines(result))
    assert "| without lateral | " in table and "| real | 0.500 [0.250, 0.750] |" in table


@pytest.mark.parametrize(
    "flags", (["--views=frontal"], ["--views=lateral,prior"], ["--views=x"], ["-n", "1"])
)
def test_what_cannot_be_audited_is_one_line(flags, capsys):
    assert second_image.main(["phantom", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
