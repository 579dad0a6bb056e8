"""Sources by name: a text and a dict say the same, and what means nothing is refused in one line."""

import pytest

from cxr_jax.config import source_specs
from cxr_jax.errors import UserError

NIH = {"source": "nih", "root": "/data/my nih", "split": "test"}


@pytest.mark.parametrize(
    "text",
    [
        "nih_test: nih '/data/my nih' split=test; b: phantom hospital=B",
        "nih_test:nih root='/data/my nih' split=test;b:phantom hospital=B;",
        "nih_test: source=nih split=test root='/data/my nih' ; b: source=phantom hospital=B",
    ],
)
def test_a_text_says_what_a_dict_says(text):
    wanted = {"nih_test": NIH, "b": {"source": "phantom", "hospital": "B"}}
    assert source_specs.parse(text, "eval") == wanted
    assert source_specs.parse(wanted, "eval") == wanted


def test_sources_that_train_have_weights_and_a_name_of_their_own_if_none_is_given():
    found = source_specs.parse(
        "nih /d weight=2; phantom reader_miss=0; m: files /a:b.jsonl image_root=/x", "train"
    )
    assert found == {
        "nih": {"source": "nih", "root": "/d", "weight": 2.0},
        "phantom": {"source": "phantom", "reader_miss": 0, "weight": 1.0},
        "m": {"source": "files", "manifest": "/a:b.jsonl", "image_root": "/x", "weight": 1.0},
    }
    assert source_specs.parse("nih /a:b.csv", "eval") == {
        "nih": {"source": "nih", "root": "/a:b.csv"}
    }
    assert source_specs.parse("", "eval") == source_specs.parse({}, "eval") == {}


@pytest.mark.parametrize(
    "value, message",
    [
        ("x: nihh /d", "source='nihh' is not one of phantom"),
        ("nih /d; nih /e", "'nih' stands there twice"),
        ("a: nih /d split=test split=train", "says 'split' twice"),
        ("a: nih /d /e", "'/e' is no KEY=VALUE"),
        ("a: nih '/d", "No closing quotation"),
        ("a: nih /d hospital=A", "has no key 'hospital'; a source nih may say"),
        ("a: phantom root=/d", "has no key 'root'; a source phantom may say"),
        ("a: phantom hospital=C", "hospital='C' is not one of A, B"),
        ("a: phantom reader_miss=2", "reader_miss=2 must be a finite number"),
        ("a: phantom reader_miss=much", "reader_miss='much' must be a finite number"),
        ("a: nih /d weight=2", "only sources that train have a weight"),
        ({"a/b": NIH}, "'a/b' is no name"),
        ({1: NIH}, "1 is no name"),
        ({"a": 3}, "config.data.eval.a=3 must be a source"),
        (3, "config.data.eval=3 must be sources by name"),
        ({"a": {"source": ["nih"]}}, "is not one of"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(value, message):
    with pytest.raises(UserError) as refusal:
        source_specs.parse(value, "eval")
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "x", "1e99"])
def test_weights_are_positive_numbers(weight):
    with pytest.raises(UserError, match="positive number"):
        source_specs.parse(f"nih /d weight={weight}", "train")
