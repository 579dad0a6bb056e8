"""Constrained answers against a plain-Python oracle, and by an untrained model."""

import functools
import re

import jax
import numpy as np
import pytest
import tiny_model
from answer_oracle import FORMAT, NAMES, PHANTOM_CFG, SILENT, STOP, TAGS, Oracle, V, valid_lists

from cxr_jax.errors import UserError
from cxr_jax.inference import answer_rules, sampling
from cxr_jax.labels import answers as labels_answers
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.phantom import report_writer
from cxr_jax.weights.pretrained import PHANTOM


def random_pieces(rng, extra: int):
    """A tokenizer: all bytes in use, and substrings of valid texts that reach over every kind of border."""
    texts = [b"<think>x y</think>\n<answer>" + t for t, _ in valid_lists("any")]
    texts += [b"<think>a</think><answer>" + t for t, _ in valid_lists("any")]
    cut = lambda t: t[(i := rng.integers(0, len(t) - 2)) : i + rng.integers(2, 24)]
    words = {cut(texts[rng.integers(len(texts))]) for _ in range(extra)}
    # One token with more than one name's letters would make a longer list the cheaper ending.
    words = {w for w in words if not re.search(rb"[A-Za-z].*, ?.*[A-Za-z]|[a-z], ?[A-Z]", w)}
    letters = {bytes([b]) for b in b"".join(texts)} | {b"?", b"\xc3"}
    return [b"", b"", *sorted(words | letters)]


def compiled(pieces, max_new_tokens, **kw):
    kw = {"names": NAMES, **kw}
    table = TokenBytes.from_pieces(pieces)
    return answer_rules.compile_answers(
        table, len(pieces) + 1, [STOP], max_new_tokens=max_new_tokens, **kw
    )


@functools.cache
def jitted():
    return jax.jit(lambda c, s: c.allowed(s)), jax.jit(lambda c, s, t: c.advance(s, t))


CASES = [
    dict(seed=0, extra=60, left=40, no_finding="devices", force_format=True, separators=(b"",)),
    dict(
        seed=1, extra=120, left=24, no_finding="alone", force_format=True, separators=(b"", b"\n")
    ),
    dict(seed=2, extra=120, left=30, no_finding="any", force_format=True, separators=(b"\n", b"")),
    dict(seed=3, extra=100, left=30, no_finding="devices", force_format=False, separators=(b"",)),
    dict(seed=4, extra=200, left=16, no_finding="devices", force_format=True, separators=(b"",)),
    dict(seed=5, extra=0, left=80, no_finding="any", force_format=True, separators=(b"",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c["seed"]))
def test_a_token_is_allowed_exactly_when_a_valid_completion_fits(case):
    rng = np.random.default_rng(case["seed"])
    pieces = random_pieces(rng, case["extra"])
    rules = {k: case[k] for k in ("no_finding", "force_format", "separators")}
    answer_tokens = 5
    oracle = Oracle(pieces, answer_tokens=answer_tokens if rules["force_format"] else 0, **rules)
    c = compiled(pieces, case["left"], answer_tokens=answer_tokens, **rules)
    allowed, advance = jitted()
    endings, walks = set(), 6
    state = c.init(walks)
    texts, stopped = [b""] * walks, np.zeros(walks, bool)
    for step in range(case["left"]):
        got = np.asarray(allowed(c, state))
        choice = np.zeros(walks, np.int32)
        for w in np.flatnonzero(~stopped):
            want = oracle.allowed(texts[w], case["left"] - step)
            wrong = np.flatnonzero(got[w, :-1] != want)
            assert not len(wrong), (texts[w], case["left"] - step, [pieces[i] for i in wrong])
            assert not got[w, -1] and not got[w, SILENT]  # ids without text
            options = np.flatnonzero(want)
            # Half of the steps take a token that leads on, so that walks reach the answer and its end.
            good = [
                i for i in options if b"<" in pieces[i] or b">" in pieces[i] or b"E" in pieces[i]
            ]
            choice[w] = rng.choice(good if good and rng.random() < 0.5 else options)
            stopped[w] = choice[w] == STOP
            texts[w] += pieces[choice[w]]
        state = advance(c, state, choice)
        if stopped.all():
            break
    assert stopped.all() or not rules["force_format"]
    valid = {t for t, _ in oracle.lists}
    for text in texts:
        head, opened, answer = text.partition(b"<answer>")
        assert not opened or answer in valid
        if rules["force_format"]:
            assert FORMAT.match(text.decode(errors="replace")) and all(
                text.count(tag) == 1 for tag in TAGS
            )
        endings.add(answer)
    assert len(endings) > 1


@pytest.mark.parametrize("extra", [80, 400])
def test_tokens_with_several_names_never_lead_astray(extra):
    """Any substrings as tokens, several names or two tags in one: what is allowed ends validly and in time."""
    rng = np.random.default_rng(extra)
    texts = [b"<think>x</think><answer>" + t for t, _ in valid_lists("devices")]
    cut = lambda t: t[(i := rng.integers(0, len(t) - 2)) : i + rng.integers(2, 60)]
    words = {cut(texts[rng.integers(len(texts))]) for _ in range(extra)} | {
        b", Edema, Edema",
        b"Edema, No",
    }
    pieces = [b"", b"", *sorted(words | {bytes([b]) for b in b"".join(texts)})]
    c = compiled(pieces, 60)
    allowed, advance = jitted()
    state, walks = c.init(64), 64
    tokens = []
    for _ in range(60):
        ok = np.asarray(allowed(c, state))
        assert ok.any(1).all()
        tokens.append([rng.choice(np.flatnonzero(row)) for row in ok])
        state = advance(c, state, np.array(tokens[-1], np.int32))
    valid = {t for t, _ in valid_lists("devices")}
    for w in range(walks):
        row = [t[w] for t in tokens]
        row = row[: row.index(STOP)]
        text = b"".join(pieces[i] for i in row)
        assert FORMAT.match(text.decode()) and text.partition(b"<answer>")[2] in valid


def test_every_tokenisation_of_a_valid_text_is_allowed():
    rng = np.random.default_rng(7)
    pieces = random_pieces(rng, 300)
    c = compiled(pieces, 300)
    allowed, advance = jitted()
    for text in (
        b"<think>x y \xc3?</think><answer>Eddy, Edema, Support Devices</answer>",
        b"<think></think>\n\n<answer>Support Devices, No Finding</answer>",
    ):
        for _ in range(5):
            state, rest = c.init(1), text
            while rest:
                fitting = [i for i, p in enumerate(pieces) if p and rest.startswith(p)]
                assert np.asarray(allowed(c, state))[0, fitting].all()
                token = rng.choice(fitting)
                state, rest = (
                    advance(c, state, np.array([token], np.int32)),
                    rest[len(pieces[token]) :],
                )
            assert np.flatnonzero(np.asarray(allowed(c, state))[0]).tolist() == [STOP]


OPENED = [
    b"<think>",
    b"<think>\n",
    b"<think>x y",
    b"<thi",
    b"<think></think>",
    b"<think>x</think>\n",
]


@pytest.mark.parametrize("opened", OPENED)
def test_rules_go_on_where_the_prompt_ends(opened):
    """Every token, on random walks from what a chat template has said, by the oracle on the whole text."""
    rng = np.random.default_rng(len(opened))
    texts = [b"<think>\nx y</think>\n<answer>" + t for t, _ in valid_lists("devices")]
    pieces = random_pieces(rng, 120)
    pieces = [*pieces, *({bytes([b]) for b in b"".join(texts)} - set(pieces))]
    oracle = Oracle(pieces, "devices", True, (b"", b"\n"), 5)
    whole = compiled(pieces, 99, answer_tokens=5, separators=(b"", b"\n"))
    least = int(oracle.need(opened))
    with pytest.raises(UserError, match="do not fit"):
        whole.after(opened.decode()).within(least - 1)
    allowed, advance = jitted()
    for left in (least, least + 9):
        c = whole.after(opened.decode()).within(left)
        state, written = c.init(4), [opened] * 4
        stopped = np.zeros(4, bool)
        for step in range(left):
            got, choice = np.asarray(allowed(c, state)), np.zeros(4, np.int32)
            for w in np.flatnonzero(~stopped):
                np.testing.assert_array_equal(
                    got[w, :-1], oracle.allowed(written[w], left - step), err_msg=str(written[w])
                )
                choice[w] = rng.choice(np.flatnonzero(got[w]))
                stopped[w] = choice[w] == STOP
                written[w] += pieces[choice[w]]
            state = advance(c, state, choice)
        assert stopped.all()
        assert all(FORMAT.match(text.decode(errors="replace")) for text in written)


def test_rules_after_texts_that_no_oracle_writes(phantom):
    *_, rules = phantom
    begun = rules.after("<think>\n\n</think>\n\n\n <answer>")
    assert np.asarray(rules.begun)[begun.start] and rules.after("").start == 0
    # White space that the format takes and the rules do not write: the list begins next.
    assert rules.after("<think></think> \n\t").start == rules.after("<think></think>").start
    for dead in ("Certainly. ", "</think>", "<think></think>So", "<think></think><answer>Edema"):
        with pytest.raises(UserError, match="cannot follow this chat template"):
            rules.after(dead)
        assert rules.after_if_valid(dead).start == 0


def test_bad_settings_are_refused():
    pieces = random_pieces(np.random.default_rng(0), 50)
    with pytest.raises(UserError, match="do not fit max_new_tokens=5"):
        compiled(pieces, 5)
    with pytest.raises(UserError, match="no_finding"):
        compiled(pieces, 99, no_finding="never")
    with pytest.raises(UserError, match="none starts another"):
        compiled(pieces, 99, names=("Edema", "Edema Other"))
    with pytest.raises(UserError, match="cannot spell"):
        compiled([p for p in pieces if b">" not in p], 99)


@pytest.fixture(scope="module")
def phantom():
    """(tokenizer, byte table, special ids, compiled rules)."""
    tokenizer = tokenizers.load(PHANTOM)
    table, special = TokenBytes.from_tokenizer(tokenizer), tokenizers.special_ids(tokenizer, V)
    c = answer_rules.compile_answers(
        table,
        V,
        special["stop"],
        max_new_tokens=40,
        answer_tokens=24,
        suppress_ids=special["suppress"],
    )
    return tokenizer, table, special, c


@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_an_untrained_model_writes_only_valid_answers(phantom, temperature):
    """1,000 of 1,000 samples, within 40 tokens, read by the rewards' own parser and by a regular expression."""
    tokenizer, table, special, c = phantom
    params = tiny_model.draw_params(PHANTOM_CFG)
    params["text"]["embed"]["embedding"] *= (
        20  # peaked and different everywhere: nothing like a list of findings
    )
    n, N = (1000, 40) if temperature else (1, 40)
    ids = np.arange(10, 14, dtype=np.int32)[None]
    out = sampling.generate(
        params,
        PHANTOM_CFG,
        sampling.PromptBatch(ids, [4], network.positions(PHANTOM_CFG, ids, None)),
        sampling.SamplingSettings(
            n=n,
            max_new_tokens=N,
            temperature=temperature,
            stop_ids=special["stop"],
            suppress_ids=special["suppress"],
        ),
        keys=sampling.row_keys(0, n),
        constraint=c,
    )
    assert np.asarray(out["finished"]).all()
    parsed = jax.jit(labels_answers.parse_tokens, static_argnums=3)(
        out["tokens"], out["lengths"], table, 1024
    )
    parsed = {k: np.asarray(v) for k, v in parsed.items()}
    assert not parsed["overflow"].any()
    assert (
        parsed["format"].all()
        and (parsed["tag_counts"] == 1).all()
        and parsed["answer"].any(1).all()
    )
    assert not parsed["n_unknown"].any() and not parsed["no_finding_conflict"].any()
    lengths = np.asarray(out["lengths"])
    for row, length, labels in zip(
        np.asarray(out["tokens"]), lengths, parsed["answer"], strict=True
    ):
        items = (
            FORMAT.match(tokenizer.decode(row[: length - 1], skip_special_tokens=False))
            .group(1)
            .split(", ")
        )
        assert sorted(items) == sorted(np.array(CHEXPERT_14)[labels])
    if n > 1:
        assert parsed["answer"].any(0).all()  # every finding is named by some sample


def test_answers_of_the_phantom_readers_are_allowed(phantom):
    tokenizer, _, special, c = phantom
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(32):
        found = (rng.random(12) < rng.choice([0, 0.4])) * rng.random(12)
        scene = {
            "severity": found,
            "side": rng.integers(0, 3, 12),
            "zone": rng.integers(0, 3, 12),
            "device": rng.random(5) < 0.3,
            "quality": rng.integers(0, 2, 3),
        }
        texts.append(report_writer.target(report_writer.write(scene, "B", rng)))
    _, advance = jitted()
    for text in [t for t in texts if "No Finding" in t][:4] + texts[:4]:
        state = c.within(600).init(1)
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], special["stop"][0]]:
            state = advance(c, state, np.array([token], np.int32))
        assert int(state.at[0]) == len(c.next) - 2, text  # "over"
