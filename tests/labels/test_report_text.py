"""The reader of reports on the device against the plain Python one of oracle_reports.py, and rules one by one.

The texts are random: put together from the lexicon's own phrases and from what is hard to read between them.
"""

import os
import random

import jax
import numpy as np
import pytest
from fuzz_reports import (
    BATCH,
    LONGEST,
    PROGRAM,
    SMALL,
    WIDTH,
    Pair,
    built_in,
    draw_small,
    draw_truth,
    expected,
    masks,
    packed,
)
from oracle_reports import AFFIRMED, CHILDREN, DENIED, HEDGED, UNMENTIONED

from cxr_jax.errors import UserError
from cxr_jax.labels import CHEXPERT_14, parse_reports, read_reports, report_text
from cxr_jax.labels.answers import TokenBytes, tokens_to_bytes

N_FUZZ = int(os.environ.get("CXR_JAX_FUZZ_REPORTS", "7680"))
SEED = int(os.environ.get("CXR_JAX_FUZZ_SEED", "1"))


@pytest.fixture(scope="module")
def full() -> Pair:
    return built_in()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Pair:
    path = tmp_path_factory.mktemp("lexicon") / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return Pair(path)


def sample(pair: Pair, seed: int, n: int = BATCH, longest: int = LONGEST) -> list[bytes]:
    rng = random.Random(seed)
    return [b"".join(pair.texts.draw(rng))[:longest] for _ in range(n)]


def test_random_texts_read_as_the_oracle_reads_them(full):
    full.compare(lambda rng: b"".join(full.texts.draw(rng)), N_FUZZ, SEED)


def test_random_texts_of_a_small_lexicon_read_as_the_oracle_reads_them(small):
    small.compare(draw_small, 2 * N_FUZZ, SEED + 1)


def test_random_texts_say_something(full):
    texts = sample(full, 3)
    said = [expected(full.reader, t, draw_truth(random.Random(i))) for i, t in enumerate(texts)]
    states = np.array([x[0] for x in said])
    assert {len(t) > 300 for t in texts} == {len(t) < 30 for t in texts} == {True, False}
    assert all((states == s).sum() > 50 for s in (AFFIRMED, DENIED, HEDGED))
    for field in (1, 2):
        assert np.array([x[field] for x in said]).sum() > 50
    assert {x[3] for x in said} == {AFFIRMED, DENIED, HEDGED, UNMENTIONED}
    assert sum(0 < x[5] < x[4] for x in said) > 25


# What must not matter


def read(bank, texts, rows=BATCH, width=WIDTH):
    return jax.device_get(PROGRAM(*packed(texts, rows, width), bank))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], key)


def test_how_bytes_are_split_into_tokens_does_not_matter(full):
    rng, texts = random.Random(4), sample(full, 4)
    pieces, rows = {b"": 0}, []
    for text in texts:
        row, at = [], 0
        while at < len(text):
            size = rng.choice([0, 1, 1, 2, 3, 5, 9, 30])
            row.append(pieces.setdefault(text[at : at + size], len(pieces)))
            at += size
        rows.append(row)
    tokens = np.full(
        (BATCH, max(map(len, rows)) + 3), 1, np.int32
    )  # text after the row's tokens does not count
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = np.array([*map(len, rows)], np.int32)
    spelled = tokens_to_bytes(tokens, lengths, TokenBytes.from_pieces(list(pieces)), WIDTH)
    assert_same(jax.device_get(PROGRAM(*spelled, full.bank)), read(full.bank, texts))


def test_rows_and_padding_do_not_matter(full):
    texts = sample(full, 5)
    want, (stream, lengths) = read(full.bank, texts), packed(texts)
    order = np.random.default_rng(5).permutation(BATCH)
    assert_same(read(full.bank, [texts[i] for i in order]), {k: v[order] for k, v in want.items()})
    alone = read(full.bank, texts[7:8])
    assert_same({k: v[0] for k, v in alone.items()}, {k: v[7] for k, v in want.items()})
    after = np.frombuffer(b" edema. no left 1.5\n\n", np.uint8)
    noise = np.stack([np.resize(np.roll(after, i), WIDTH) for i in range(BATCH)])
    stream = np.where(np.arange(WIDTH) < lengths[:, None], stream, noise)
    assert_same(jax.device_get(PROGRAM(stream, lengths, full.bank)), want)


def test_a_length_beyond_the_buffer_reads_the_buffer(full):
    stream, lengths = packed([b"no edema", b"edema"], 2, 64)
    stream[:, -6:] = np.frombuffer(b" chf. ", np.uint8)
    assert_same(
        *(
            jax.device_get(PROGRAM(stream, np.array(n, np.int32), full.bank))
            for n in ([99, 64], [64, 64])
        )
    )


def test_vmap_and_eager_are_as_jit(full):
    texts = sample(full, 6, 4, 96)
    stream, lengths = packed(texts, 4, 96)
    truth = masks([draw_truth(random.Random(i)) for i in range(4)])
    want = jax.device_get(PROGRAM(stream, lengths, full.bank, truth))
    assert_same(jax.device_get(report_text.read_bytes(stream, lengths, full.bank, truth)), want)
    rows = jax.vmap(lambda s, n, t: report_text.read_bytes(s, n, full.bank, t), in_axes=(0, 0, 0))
    shaped = (stream[:, None], lengths[:, None], jax.tree.map(lambda x: x[:, None], truth))
    assert_same({k: v[:, 0] for k, v in jax.device_get(jax.jit(rows)(*shaped)).items()}, want)


# Lists of texts


def test_texts_of_any_length_come_back_in_order(full):
    texts = [t.decode("utf-8", "replace") for t in sample(full, 7, 30)]
    texts += [" ".join(texts), "", "\ud800 edema \udfff", *texts[:3]]
    for parents in (False, True):
        got, want = (
            read_reports(texts, parents=parents),
            [full.reader.read(t, parents) for t in texts],
        )
        for field in ("state", "right", "left"):
            np.testing.assert_array_equal(got[field], [w[field] for w in want], field)
    np.testing.assert_array_equal(parse_reports(texts, parents=True), got["state"])


def test_no_texts_and_empty_texts():
    got = read_reports([])
    assert {k: v.shape for k, v in got.items()} == {
        "state": (0, 14),
        "right": (0, 14),
        "left": (0, 14),
        "other": (0,),
        "foreign": (0,),
        "unread": (0,),
    }
    assert parse_reports([], parents=True).shape == (0, 14)
    got = read_reports(["", " \n\n - \n", "."], parents=True)
    assert (got["state"] == UNMENTIONED).all() and (got["other"] == UNMENTIONED).all()
    assert not got["right"].any() and not got["left"].any()


def test_parents_count_what_is_affirmed_or_hedged_of_their_children():
    states = (AFFIRMED, HEDGED, DENIED, UNMENTIONED)
    for parent, children in CHILDREN.items():
        for child in children:
            at, of = CHEXPERT_14.index(parent), CHEXPERT_14.index(child)
            table = np.full((16, 14), UNMENTIONED, np.int8)
            table[:, at], table[:, of] = np.repeat(states, 4), np.tile(states, 4)
            #       child: affirmed, hedged, denied, not mentioned
            want = [[AFFIRMED] * 4, [AFFIRMED, HEDGED, HEDGED, HEDGED]]
            want += [[AFFIRMED, HEDGED, own, own] for own in (DENIED, UNMENTIONED)]
            expect = table.copy()
            expect[:, at] = np.ravel(want)
            np.testing.assert_array_equal(
                report_text.with_parents(table), expect, f"{parent}, {child}"
            )
    got = read_reports(["possible left edema. no right opacity", "cardiomegaly"], parents=True)
    opacity, wide = (
        CHEXPERT_14.index("Lung Opacity"),
        CHEXPERT_14.index("Enlarged Cardiomediastinum"),
    )
    assert got["state"][0, opacity] == HEDGED and got["state"][1, wide] == AFFIRMED
    assert got["right"][0, opacity] and not got["left"][0, opacity]  # sides stay as they are


# Rules of the page, one by one, with a lexicon that has one word a kind

RULES = {  # text: what is said of its labels but No Finding: state, and sides as letters
    "f1": {"Edema": "1"},
    "see-saw. saw see": {"Edema": "1"},
    "see\n\nsaw": {},
    "see\n- saw": {},
    "see\nsaw": {"Edema": "1"},
    "F1X": {},
    # the longest phrase that ends last, then the more specific one
    "no f1": {},
    "not f1 ua": {"Edema": "0"},
    "see saw f2": {},
    "red light": {"Pneumonia": "1"},
    "green light": {"Consolidation": "1"},
    "red lamp": {"Pneumonia": "1"},
    "blue lamp": {"Consolidation": "1"},
    "red stop": {"Consolidation": "1"},
    "green stop": {"Pneumonia": "1"},
    "ab": {"Consolidation": "1"},
    "abcz": {"Pneumonia": "1"},
    # cues
    "nb f1 x": {"Edema": "0", "Atelectasis": "0"},
    "nb f1 ua": {"Edema": "-1"},
    "nb f1, ua": {"Edema": "0"},
    "f1, ua": {"Edema": "-1"},
    "nb f1, ia": {},
    "f1 nb f2 na": {"Edema": "1", "Fracture": "0"},
    "f1 ur f2": {"Edema": "-1", "Fracture": "-1"},
    "f1, ur f2": {"Edema": "1", "Fracture": "-1"},
    "nb f1 ; f2": {"Edema": "0", "Fracture": "1"},
    "ib f1 h": {},
    "h": {"Pleural Effusion": "-1"},
    "h na": {"Pleural Effusion": "0"},
    "ub x": {"Atelectasis": "0"},
    "d2 f1": {"Pneumonia": "1", "Edema": "0"},
    "nb d2 f1": {"Pneumonia": "0", "Edema": "0"},
    # subjects and qualities
    "s1": {},
    "f1 bad": {"Edema": "1"},
    "s1 s2 good": {"Cardiomegaly": "0", "Enlarged Cardiomediastinum": "0"},
    "so s1": {"Cardiomegaly": "-1"},
    "bad s1 good": {"Cardiomegaly": "0"},
    "s1 ; bad": {},
    # sides
    "r f1": {"Edema": "1r"},
    "f1 l": {"Edema": "1l"},
    "r f1 l": {"Edema": "1l"},
    "f1, r f2": {"Edema": "1", "Fracture": "1r"},
    "f1 f2 l": {"Edema": "1l", "Fracture": "1l"},
    "f1, f2 l": {"Edema": "1", "Fracture": "1l"},
    "r f1 nb f2": {"Edema": "1r", "Fracture": "0"},
    "x, f1 r ia": {"Atelectasis": "0r"},
    "f1, tube b ir": {"Edema": "1rl"},
    "f1, word r tube ir": {"Edema": "1r"},
    "r x ia": {"Atelectasis": "0r"},
    "r f1 ib f2": {"Edema": "1r"},
    "l: f1 ; r f2": {"Edema": "1l", "Fracture": "1r"},
    "l: f1. f2": {"Edema": "1l", "Fracture": "1"},
    "l: f1 r: f2": {"Edema": "1l", "Fracture": "1r"},
    "l: s1 bad": {"Cardiomegaly": "1"},
    "b nb f1": {"Edema": "0"},
    "r f1, l f2": {"Edema": "1r", "Fracture": "1l"},
    "nb f1, l f2": {"Edema": "0", "Fracture": "1l"},
    "f1, r ua": {"Edema": "-1r"},
    "f1 r. nb f1 l": {"Edema": "1r"},
    "f1 r. f1 l": {"Edema": "1rl"},
}


def test_rules(small):
    got = read_reports(list(RULES), lexicon=small.path)
    for i, (text, want) in enumerate(RULES.items()):
        said = {}
        for j, label in enumerate(CHEXPERT_14[1:], 1):
            if got["state"][i, j] != UNMENTIONED:
                sides = "r" * int(got["right"][i, j]) + "l" * int(got["left"][i, j])
                said[label] = f"{got['state'][i, j]}{sides}"
        assert said == want, text


def test_no_finding_rule(small):
    yes = [
        "fine",
        "nb fine",
        "ub r fine",
        "tube",
        "ub tube",
        "nb f1",
        "x",
        "s1 good",
        "d1 f1",
        "nb f2",
    ]
    no = [
        "",
        "word",
        "s1",
        "ib fine",
        "fine ia",
        "f1",
        "ub f1. fine",
        "nb f1. h",
        "tube. f2",
        "s1 so",
        "d1. f1",
    ]
    got = read_reports(yes + no, lexicon=small.path)
    assert got["state"][:, 0].tolist() == [1] * len(yes) + [-2] * len(no)
    assert not got["right"][:, 0].any()


# Lexicons that are refused

BAD = {
    "table": "[finding]\nEdema = ['a']",
    "label": "[findings]\nEdemas = ['a']",
    "no_14th": "[findings]\n'Edema, Nothing' = ['a']",
    "key": "[cues]\nnegative_befor = ['a']",
    "quality": "[qualities]\nNormal = ['a']",
    "stop": "[stops]\nclause_up = ['a']",
    "class": "[findings]\nEdema = ['<of> a']",
    "class_in_group": "[findings]\nEdema = ['(a|<of>) b']",
    "class_word": "[classes]\nof = ['a*']\n[findings]\nEdema = ['<of> a']",
    "nested": "[findings]\nEdema = ['(a|(b|c)) d']",
    "open": "[findings]\nEdema = ['(a|b d']",
    "closed": "[findings]\nEdema = ['a|b) d']",
    "bar": "[findings]\nEdema = ['a|b']",
    "empty": "[findings]\nEdema = ['']",
    "may_be_empty": "[findings]\nEdema = ['(a|)']",
    "upper": "[findings]\nEdema = ['A']",
    "hyphen": "[findings]\nEdema = ['air-space']",
    "star": "[findings]\nEdema = ['*']",
    "no_list": "[findings]\nEdema = 'a'",
    "no_text": "[findings]\nEdema = [1]",
    "no_table": "findings = ['a']",
    "no_phrases": "[findings]",
    "nothing": "",
    "not_toml": "[findings\n",
    "not_utf8": b"[findings]\nEdema = ['\xff']",
    "clash": "[findings]\nEdema = ['a b']\nFracture = ['a b']",
    "clash_of_tables": "[sides]\nleft = ['a']\n[stops]\nclause_left = ['a']",
    "clash_of_stems": "[findings]\nEdema = ['a* (b|)']\nFracture = ['a* b']",
    "clash_of_classes": "[classes]\np = ['a', 'b']\nq = ['b', 'c']\n[findings]\nEdema = ['<p>']\nFracture = ['<q>']",
    "clash_of_groups": "[findings]\nEdema = ['(a|b) x']\nFracture = ['(b|c) x']",
}


@pytest.mark.parametrize("name", [*BAD, "missing", "folder"])
def test_a_bad_lexicon_is_refused_in_one_line_that_names_the_file(name, tmp_path):
    path = tmp_path / f"{name}.toml"
    if name == "folder":
        path.mkdir()
    elif name in BAD:
        content = BAD[name]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_reports(["a b"], lexicon=str(path))
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1
    if name.startswith("clash"):
        assert "clash" in str(error.value)


def test_what_is_no_clash(tmp_path):
    path = tmp_path / "fine.toml"
    path.write_text(
        "[classes]\np = ['a', 'b']\n[findings]\nEdema = ['<p> x', 'a x', 'ab* x']\n"
        "Fracture = ['b x', 'a* x', '(a|b) y']\n[nothing]\nphrases = ['<p> y z', 'a x x']\n",
        encoding="utf-8",
    )
    got = read_reports(
        ["a x", "b x", "az x", "abz x", "a y", "a y z", "a x x", "b x x"], lexicon=str(path)
    )
    edema, fracture = (got["state"][:, CHEXPERT_14.index(label)] for label in ("Edema", "Fracture"))
    assert edema.tolist() == [1, -2, -2, 1, -2, -2, -2, -2]
    assert fracture.tolist() == [-2, 1, 1, -2, 1, -2, -2, 1]
