"""The audit of single films: readers that use all of them, and one that does not, are told apart."""

import types

import numpy as np
import pytest

from cxr_jax.data.prompts import ask_of_roles
from cxr_jax.evaluation.film_use import OtherImages, answer_with_films_changed
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


def other_answers(reader, images, texts, real, views=(), size=2):
    """Of a set that comes in parts."""

    def images_at(places):
        chosen = [images[place] for place in places]
        return chosen if isinstance(images, list) else np.stack(chosen)

    others = OtherImages(reader, {}, texts, images_at, views)
    for start in range(0, len(texts), size):
        others.add(np.arange(len(texts))[start : start + size], images[start : start + size])
    return others.joined(real)


class EchoReader:
    """Answers by the number in its question and those that its films show."""

    def __init__(self):
        self.rows_read = 0

    def read(self, params, images, texts):
        self.rows_read += len(texts)
        answer = np.zeros((len(texts), 14), bool)
        for row, (films, text) in enumerate(zip(images, texts, strict=True)):
            assert len(films) == text.count("<image>") or "<image>" not in text
            answer[row, int(text[-1])] = True
            for film in films:
                answer[row, int(np.ravel(film)[0])] = True
        return types.SimpleNamespace(answer=answer, valid=np.ones(len(texts), bool))


def test_questions_stay_where_other_films_are_seen():
    """Films of several sizes and numbers: a film shows 5 + its row, grey shows 128 // 14."""
    counts = [1, 2, 1, 2, 1, 3]
    texts = ["<image> " * count + f"Question {row % 2}" for row, count in enumerate(counts)]
    images = [
        tuple(np.full((28, 28 + 28 * place), 5 + row, np.uint8) for place in range(count))
        for row, count in enumerate(counts)
    ]
    reader = EchoReader()
    real = reader.read({}, images, texts)
    grey = [tuple(np.full_like(film, 9) for film in films) for films in images]
    reader.read, plain = (
        (lambda params, shown, asked: plain(params, clipped(shown), asked)),
        reader.read,
    )

    def clipped(shown):
        is_grey = all(film.flat[0] == 128 for films in shown for film in films)
        return grey if is_grey else shown

    answers = other_answers(reader, images, texts, real, size=len(texts))
    for row, other in enumerate([4, 3, 0, 1, 2, 5]):
        assert set(np.flatnonzero(answers["swapped"].labels[row])) == {row % 2, 5 + other}
        assert set(np.flatnonzero(answers["blank"].labels[row])) == {row % 2, 9}


def test_one_question_of_squares_costs_one_grey_reading():
    images = np.arange(4, dtype=np.float32)[:, None, None] + np.zeros((4, 2, 2), np.float32)
    reader = EchoReader()
    texts = ["Question 7"] * 4
    real = reader.read({}, images, texts)
    answers = other_answers(reader, images, texts, real)
    assert reader.rows_read == 5
    assert [set(np.flatnonzero(row)) for row in answers["swapped"].labels] == [
        {7, 3},
        {7, 0},
        {7, 1},
        {7, 2},
    ]


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
    real = reader.read({}, batch["image"], batch["texts"])
    answers = other_answers(reader, batch["image"], batch["texts"], real, VIEWS, size=24)
    swapped = {name: found for name, found in answers.items() if name.startswith("swapped ")}
    every = answer_with_films_changed(reader, {}, batch, VIEWS, QUESTION)
    assert [*swapped] == ["swapped lateral"]
    assert np.array_equal(swapped["swapped lateral"].labels, every["swapped lateral"].labels)
    # One film an example has no second to swap.
    alone = other_answers(reader, batch["image"], batch["texts"], real, VIEWS[:1])
    assert [*alone] == ["blank", "swapped"]


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
