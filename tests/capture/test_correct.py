"""What must be looked at, what is proposed, what was changed, and how wrong a transcript is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_jax.capture import correct, sounds
from cxr_jax.capture.transcribe import Word
from cxr_jax.errors import UserError


def reasons_of(text, heard=()):
    return {mark.text: mark.reasons for mark in correct.find_marks(text, heard)}


def test_sides_negations_and_numbers_are_marked_in_typed_text():
    text = "No effusion on the right, left-sided rib 4 fracture; R\u2019t isn\u2019t seen (two), bilateral RUL/LLL."
    assert reasons_of(text) == {
        "No": ("negation",),
        "right,": ("side",),
        "left-sided": ("side",),
        "4": ("number",),
        "isn\u2019t": ("negation",),
        "(two),": ("number",),
        "bilateral": ("side",),
        "RUL/LLL.": ("side",),
    }
    assert reasons_of("The heart is enlarged.") == {}


def test_marks_name_their_place():
    text = "Tube\n 4 cm above"
    [mark] = correct.find_marks(text)
    assert (mark.word, text[mark.start : mark.end]) == (1, "4")


def test_doubt_goes_with_the_word_and_not_with_its_place(heard):
    text = "Know new motor axe. Left effusion."
    assert reasons_of(text, heard) == {
        "Know": ("sounds like",),
        "new": ("confidence",),
        "motor": ("confidence",),
        "axe.": ("confidence",),
        "Left": ("side",),
    }
    # What a person wrote in its place has no doubt; a side is looked at all the same.
    assert reasons_of("No pneumothorax. Left effusion.", heard) == {
        "No": ("negation",),
        "Left": ("side",),
    }


def test_what_nobody_looked_at(heard):
    marks = correct.find_marks("No pneumothorax. Left effusion.", heard)
    assert [mark.text for mark in correct.unseen(marks, {0})] == ["Left"]
    assert correct.unseen(marks, {0, 2}) == []


def test_proposals_are_words_of_radiology_and_change_nothing(heard):
    text = "Know new motor axe. Left effusion."
    proposals = [(p.first, p.last, p.text) for p in correct.find_proposals(text, heard)]
    assert (0, 0, "no") in proposals and (1, 3, "pneumothorax") in proposals
    # Words that the model is sure of are nobody's business.
    assert not [p for p in proposals if p[0] > 3]


@pytest.mark.parametrize(
    "slip, word",
    [
        ("glunting", "blunting"),
        ("new motor axe", "pneumothorax"),
        ("a fusion", "effusion"),
        ("adelectasis", "atelectasis"),
        ("carena", "carina"),
        ("costa phrenic", "costophrenic"),
        ("new monya", "pneumonia"),
        ("cardio megaly", "cardiomegaly"),
        ("indotracheal", "endotracheal"),
    ],
)
def test_slips_of_speech_models(slip, word):
    assert sounds.propose(slip.split())[0][0] == word


def test_what_is_a_word_needs_no_proposal():
    for word in ("opacity", "seen", "the", "of", "tube"):
        assert sounds.propose([word]) == []
    assert not {"atelecatsis", "with", "seen"} & set(sounds.medical_words())


def test_edit_distance():
    for one, other, distance in (
        ("", "abc", 3),
        ("abc", "acb", 1),
        ("kitten", "sitting", 3),
        ("a", "a", 0),
    ):
        assert sounds.edit_distance(one, other) == sounds.edit_distance(other, one) == distance


def test_operations_are_by_words():
    before, after = "No effusion seen. Heart big.", "No left effusion. Heart normal."
    operations = correct.find_operations(before, after)
    assert [(o["op"], o["before"], o["after"]) for o in operations] == [
        ("replace", " effusion seen.", " left effusion."),
        ("replace", " big.", " normal."),
    ]
    assert correct.find_operations("a b", "a b c") == [
        {"op": "insert", "at": 3, "before": "", "after": " c"}
    ]
    assert correct.find_operations("a b c", "a c")[0]["op"] == "delete"
    assert correct.changed_words(operations) == 3
    with pytest.raises(UserError, match="another text"):
        correct.apply_operations("Something else", operations)


_TEXTS = st.text(alphabet="ab \n.", max_size=60)


@given(_TEXTS, _TEXTS)
def test_operations_make_the_later_text(before, after):
    operations = correct.find_operations(before, after)
    assert correct.apply_operations(before, operations) == after
    assert bool(operations) == (before != after)


def test_texts_that_nobody_writes_cost_no_minutes():
    before, after = "a " * 9_000, "b a " * 4_500
    operations = correct.find_operations(before, after)
    assert correct.apply_operations(before, operations) == after
    correct.find_marks(after[:20_000], [Word("a", 0, 1, 0.1)] * 9_000)


@pytest.mark.parametrize("text", [None, 3, "x" * 20_001, "\ud800", "a\0b", "\x1b[2J"])
def test_texts_that_cannot_be_kept(text):
    with pytest.raises(UserError):
        correct.check_text(text)
    assert correct.check_text("Tab\tand\nline \u2265 3 cm") == "Tab\tand\nline \u2265 3 cm"


def test_error_rates():
    said = "No pneumothorax is seen. Small left pleural effusion."
    assert correct.error_rates(said, said.lower().replace(".", "")) == (0, 0)
    # One of four words of radiology is lost, and one of eight words.
    assert correct.error_rates(said, "No numb is seen. Small left pleural effusion.") == (
        1 / 8,
        1 / 4,
    )
    # What was not said and was written counts, too.
    assert correct.error_rates(said, said + " Edema.") == (1 / 8, 1 / 4)
    with pytest.raises(ValueError, match="nothing of radiology"):
        correct.error_rates("hello there", "hello")
