"""The byte automata: their alphabet facts, the parser's outputs, and token tables."""

import re
import sys

import jax
import numpy as np
import pytest
from completions import good, small_tokenizer

import cxr_jax.labels
from cxr_jax.errors import UserError
from cxr_jax.labels import CHEXPERT_14, answer_machines, answers, automaton
from cxr_jax.rl import stop_texts

parse_bytes = jax.jit(answers.parse_bytes)
ALL_CHARS = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]


def rows(texts):
    coded = [t.encode() if isinstance(t, str) else t for t in texts]
    stream = np.zeros((len(coded), max(map(len, coded))), np.uint8)
    for row, data in zip(stream, coded, strict=True):
        row[: len(data)] = np.frombuffer(data, np.uint8)
    return stream, np.array([len(d) for d in coded], np.int32)


def test_whitespace_is_pythons():
    """Over all code points: what strip() strips, what \\s matches, and our set are one."""
    stripped = {c.encode() for c in ALL_CHARS if not c.strip()}
    matched = {c.encode() for c in re.findall(r"\s", "".join(ALL_CHARS))}
    assert stripped == matched == answer_machines.WHITESPACE


def test_folds_are_pythons():
    """Over all code points: lower() makes ASCII of one character only, and never a comma, tag or space."""
    folds = {
        c.encode(): c.lower().encode() for c in ALL_CHARS if not c.isascii() and c.lower().isascii()
    }
    assert folds == answer_machines.FOLDS
    assert not [
        c for c in ALL_CHARS if c.lower() != c and any(x in ",<>" or x.isspace() for x in c.lower())
    ]


def test_kelvin_sign_folds_in_names_that_have_a_k():
    """None of the 14 has a k, but the machine must be right for any list of names."""
    machine = answer_machines.answer_machine(["kerley", "kink"])
    texts = [
        "Kerley",
        "\u212aerley",
        "KIN\u212a",
        "kin\u212a ",
        "\u212a",
        "kin\u0130k",
        "erley",
        b"\xe2\x84kink",
    ]
    coded = [
        b"<answer>" + (t if isinstance(t, bytes) else t.encode()) + b"</answer>" for t in texts
    ]
    (events,), _ = automaton.run(automaton.join_machines([machine]), *rows(coded))
    said = [
        int(e[e > 0][0]) - 4 for e in np.asarray(events).T
    ]  # the closing byte's event: outcome + n + 2
    assert said == [1, 1, 2, 2, 3, 3, 3, 3]


def test_a_machine_that_tries_fewer_bytes_is_the_same():
    """Whoever says which bytes it tells apart must forget none."""
    compile_machine, compiled = automaton.compile_machine, []

    def keep(start, step, final, told_apart=b""):
        compiled.append(
            [compile_machine(start, step, final), compile_machine(start, step, final, told_apart)]
        )
        return compiled[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_machines, "compile_machine", keep)
        answer_machines.answer_machine(["Edema", "Kink", "No Finding"])
        patch.setattr(automaton, "compile_machine", keep)
        stop_texts._byte_machine([b"</answer>", "né".encode()])
    assert len(compiled) == 2
    for whole, fewer in compiled:
        assert all(map(np.array_equal, vars(whole).values(), vars(fewer).values()))


def test_machine_limits():
    with pytest.raises(ValueError, match="more than"):
        automaton.compile_machine(b"", lambda s, byte: (s + bytes([byte]), 0))


def test_parse_answers():
    got = cxr_jax.labels.parse_answers(
        [good("Edema, pleural OTHER "), "no answer: edema", good("")]
    )
    assert got.dtype == np.bool_ and got.shape == (3, 14)
    assert [CHEXPERT_14[i] for i in np.flatnonzero(got[0])] == ["Edema", "Pleural Other"]
    assert not got[1:].any()
    assert cxr_jax.labels.parse_answers([]).shape == (0, 14)
    assert cxr_jax.labels.parse_answers(["<answer>\ud800,edema</answer>"])[0, 5]


def test_every_name_alone():
    got = cxr_jax.labels.parse_answers([good(name) for name in CHEXPERT_14])
    np.testing.assert_array_equal(got, np.eye(14, dtype=bool))


def test_outputs():
    got = jax.device_get(
        parse_bytes(*rows([good("No Finding, x, y, ,Edema"), "<answer>x,y", "<think>" * 3]))
    )
    np.testing.assert_array_equal(got["n_unknown"], [2, 0, 0])
    np.testing.assert_array_equal(got["has_answer"], [True, False, False])
    np.testing.assert_array_equal(got["no_finding_conflict"], [True, False, False])
    np.testing.assert_array_equal(got["tag_counts"], [[1, 1, 1, 1], [0, 0, 1, 0], [3, 0, 0, 0]])
    assert got["tag_counts"].dtype == got["n_unknown"].dtype == np.int32


def test_only_the_first_length_bytes_count():
    stream, lengths = rows([good("edema") + "</answer>", good("edema")])
    lengths[0] -= len("</answer>")
    got = jax.device_get(parse_bytes(stream, lengths))
    assert got["format"].all() and (got["tag_counts"] == 1).all() and not got["overflow"].any()
    assert parse_bytes(stream[:, :20], lengths)["overflow"].all()


def test_vmap_and_long_text():
    stream, lengths = rows([good("edema", "long " * 3000), good("edema,fracture")])
    flat = parse_bytes(stream, lengths)
    mapped = jax.jit(jax.vmap(answers.parse_bytes))(stream[:, None], lengths[:, None])
    for key in flat:
        np.testing.assert_array_equal(flat[key], mapped[key][:, 0])
    assert flat["format"].all()


# --- tokens ----------------------------------------


def test_token_table_spells_every_id():
    tokenizer = small_tokenizer()
    table = answers.TokenBytes.from_tokenizer(tokenizer)
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    assert special
    for i in range(tokenizer.get_vocab_size()):
        data = bytes(table.data[table.offset[i] : table.offset[i] + table.length[i]])
        assert data.decode("utf-8", "replace") == tokenizer.decode([i], skip_special_tokens=True)
        assert (data == b"") == (i in special)


def test_tokens_to_bytes_budget_and_unknown_ids():
    table = answers.TokenBytes.from_pieces([b"", b"ab", b"\xe2", b"<answer>"])
    tokens = np.array([[1, 0, 3, -1, 2, 99, 1], [0, 0, 0, 0, 0, 0, 0]])
    spell = jax.jit(answers.tokens_to_bytes, static_argnums=3)
    data, count = spell(tokens, np.array([6, 7]), table, 16)
    assert bytes(np.asarray(data[0, :11])) == b"ab<answer>\xe2" and list(count) == [11, 0]
    got = jax.jit(answers.parse_tokens, static_argnums=3)(tokens, np.array([6, 7]), table, 10)
    assert list(got["overflow"]) == [True, False] and list(got["tag_counts"][0]) == [0, 0, 1, 0]


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(UserError, match="byte-level"):
        answers.TokenBytes.from_tokenizer(tokenizer)
