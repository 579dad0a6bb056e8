"""Constrained answers against a plain-Python oracle; finding probabilities against enumeration and counting."""

import functools
import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.inference import answer_probabilities, answer_rules, constrained, sampling
from cxr_jax.labels import answers as labels_answers
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.config import Config, TextConfig, VisionConfig
from cxr_jax.phantom import report_writer
from cxr_jax.weights.pretrained import PHANTOM

NAMES = ("No Finding", "Edema", "Eddy", "Support Devices")
TAGS = (b"<think>", b"</think>", b"<answer>", b"</answer>")
FORMAT = re.compile(r"^<think>.*?</think>\s*<answer>(.*?)</answer>$", re.DOTALL)
STOP, SILENT = 0, 1  # in every tokenizer below; SILENT is a special token without text


# The oracle: every valid answer written out, every ending measured, no automaton


def valid_lists(no_finding):
    """All valid answer lists, as (bytes, number of names)."""
    beside = {"devices": {"Support Devices"}, "alone": set(), "any": set(NAMES)}[no_finding]
    out = []
    for k in range(1, len(NAMES) + 1):
        for chosen in itertools.permutations(NAMES, k):
            if "No Finding" not in chosen or set(chosen) - {"No Finding"} <= beside:
                out.append((", ".join(chosen).encode() + b"</answer>", k))
    return out


class Oracle:
    def __init__(self, pieces, no_finding, force_format, separators, answer_tokens):
        self.pieces, self.force, self.answer_tokens = pieces, force_format, answer_tokens
        self.lists = valid_lists(no_finding)
        self.words = {p for p in pieces if p}
        self.heads = [b"</think>" + s + b"<answer>" for s in separators]
        # Trace text that a token holds together with a closing tag: it can make a cheaper ending.
        self.glued = {p.partition(b"</")[0] for p in pieces if b"</" in p} - {b""}

    @functools.cache  # noqa: B019
    def cost(self, text: bytes) -> float:
        """The fewest tokens that spell the text."""
        if not text:
            return 0
        return 1 + min(
            (self.cost(text[len(w) :]) for w in self.words if text.startswith(w)), default=np.inf
        )

    @functools.cache  # noqa: B019
    def need(self, text: bytes) -> float:
        """The fewest further tokens of a valid completion that starts with text; infinity if none does."""
        if not self.force:
            head, found, rest = text.partition(b"<answer>")
            return self.ending(rest) if found else 0
        if not text.startswith(b"<think>"):
            rest = b"<think>"[len(text) :] if b"<think>".startswith(text) else None
            return np.inf if rest is None else self.answer_tokens + self.closing(rest, b"")
        body = text[7:]
        trace, closed, _ = body.partition(b"</think>")
        if any(tag in trace for tag in TAGS):
            return np.inf
        if not closed:
            return self.answer_tokens + self.closing(b"", trace)
        after = body[len(trace) :]
        for head in self.heads:
            if after.startswith(head):
                return self.ending(after[len(head) :])
        return self.shortest(b"", [h[len(after) :] for h in self.heads if h.startswith(after)])

    def closing(self, prefix, trace):
        begun = max(k for k in range(8) if not k or trace.endswith(b"</think>"[:k]))
        glued = [g for g in self.glued if not any(tag in trace + g for tag in TAGS)]
        plain = self.spelled(prefix, begun)
        return min([plain, *(self.spelled(prefix + g, 0) for g in glued)])

    @functools.cache  # noqa: B019
    def spelled(self, prefix, begun):
        """Tokens of `prefix`, a head of which `begun` bytes are written, one name, the end."""
        return self.shortest(prefix, [h[begun:] for h in self.heads])

    def shortest(self, prefix, heads):
        texts = [prefix + h + t for h in heads for t, k in self.lists if k == 1]
        return 1 + min(map(self.cost, texts), default=np.inf)

    def ending(self, text):
        """Of an answer list begun: at most one name more than `text` has completed."""
        named = sum(text.count(n.encode()) for n in NAMES)
        rests = [t[len(text) :] for t, k in self.lists if t.startswith(text) and k <= named + 1]
        return 1 + min(map(self.cost, rests), default=np.inf)

    def allowed(self, text: bytes, left: int):
        """bool [V]; left counts the token to be chosen."""
        out = np.array([bool(p) and self.need(text + p) <= left - 1 for p in self.pieces])
        out[STOP] = bool(self.complete(text))
        return out

    def complete(self, text: bytes) -> bool:
        if not self.force and b"<answer>" not in text:
            return True  # free text may stop
        return self.need(text) == 1 and text.endswith(b"</answer>")


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


# With a model

V = 1024
PHANTOM_CFG = Config(
    vision=VisionConfig(
        depth=1,
        hidden_size=16,
        num_heads=2,
        intermediate_size=16,
        out_hidden_size=32,
        fullatt_block_indexes=(),
        patch_size=2,
        window_size=8,
    ),
    text=TextConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(1, 1, 2),
        rope_theta=1e4,
    ),
    image_token_id=921,
    video_token_id=922,
    vision_start_token_id=918,
    vision_end_token_id=919,
    pad_token_id=915,
    bos_token_id=915,
    eos_token_id=(917, 915),
    tie_word_embeddings=True,
)


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
    params = qwen.init_params(PHANTOM_CFG, jax.random.key(0))
    params["text"]["embed"]["embedding"] *= (
        20  # peaked and different everywhere: nothing like a list of findings
    )
    n, N = (1000, 40) if temperature else (1, 40)
    ids = np.arange(10, 14, dtype=np.int32)[None]
    out = sampling.generate(
        params,
        PHANTOM_CFG,
        sampling.PromptBatch(ids, [4], qwen.positions(PHANTOM_CFG, ids, None)),
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
    parsed = labels_answers.parse_tokens(out["tokens"], out["lengths"], table, 1024)
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


# The probability of each finding. A small vocabulary, so that all answers can be enumerated.

PIECES = [
    b"",
    b"",
    b"<think>",
    b"</think>",
    b"<answer>",
    b"</answer>",
    b"No Finding",
    b"Edema",
    b"Eddy",
    b"Support Devices",
    b", ",
    b"Ed",
    b"ema",
    b"dy",
    b", Ed",
    b"ma</answer>",
    b"e",
    b"x",
    b"</think><answer>",
    b"</think><answer>Ed",
    b"<answer>Support",
    b" Devices",
]
SMALL = PHANTOM_CFG.text.__class__(
    **{**PHANTOM_CFG.text.__dict__, "vocab_size": 24, "num_hidden_layers": 2}
)
CFG = Config(
    **{
        **PHANTOM_CFG.__dict__,
        "text": SMALL,
        "image_token_id": 22,
        "video_token_id": 23,
        "vision_start_token_id": 22,
        "vision_end_token_id": 23,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": (0,),
    }
)
PROMPTS, LENGTHS = np.array([[17, 16, 13, 17, 9], [12, 17, 8, 0, 0]], np.int32), np.array([5, 3])
TRACES = [
    [2, 17, 16, 17, 3, 4, 7, 5, 0],
    [2, 3, 18, 8],
    [2, 16, 16, 17, 19, 12, 15, 0],
    [2, 13, 17],
]
DEPTH = 18


@pytest.fixture(scope="module")
def small():
    params = qwen.init_params(CFG, jax.random.key(1))
    params["text"]["embed"]["embedding"] *= 12
    c = answer_rules.compile_answers(
        TokenBytes.from_pieces(PIECES),
        24,
        [STOP],
        max_new_tokens=64,
        names=NAMES,
        separators=(b"",),
        suppress_ids=(1, 22, 23),
    )
    return params, c


def padded(rows):
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens_of in zip(tokens, rows, strict=True):
        row[: len(tokens_of)] = tokens_of
    return tokens, np.array([len(r) for r in rows])


def probabilities(small, keys=None, **kw):
    params, c = small
    tokens, lengths = padded(TRACES)
    out = answer_probabilities.finding_probabilities(
        params,
        CFG,
        sampling.PromptBatch(
            PROMPTS, LENGTHS, qwen.positions(CFG, PROMPTS, None, np.arange(5) < LENGTHS[:, None])
        ),
        answer_probabilities.Traces(tokens, lengths),
        c,
        answer_probabilities.ExpansionSettings(**{"answer_tokens": DEPTH, "tolerance": 1e-7, **kw}),
        keys=keys,
    )
    return {k: np.asarray(v) for k, v in out.items()}


def test_the_trace_ends_before_the_list_begins(small):
    _, c = small
    extra = [
        *TRACES,
        [7, 5],
        [2, 17, 3, 17, 4, 7],
        [2, 17, 4, 7],
        [2, 17, 3, 20, 21],
        [2, 17, 18, 6],
    ]
    count, state = c.trace(*map(jnp.asarray, padded(extra)))
    # <answer> itself is left out: a token might hold it with the first letters of the list.
    assert np.asarray(count).tolist() == [5, 2, 4, 3, 0, 3, 2, 3, 2]
    for at, tokens in zip(np.asarray(state.at), extra, strict=True):
        one = constrained.State(jnp.array([at]), jnp.zeros(1, jnp.int32), jnp.array([DEPTH]))
        next_ = {PIECES[i] for i in np.flatnonzero(np.asarray(c.allowed(one))[0])}
        after_think = {b"<answer>", b"<answer>Support"}
        assert next_ in (after_think, {b"</think>", b"</think><answer>", b"</think><answer>Ed"}), (
            tokens
        )
        assert (next_ == after_think) == (3 in tokens)


ROOM, WIDTH = 128, 28  # one shape for all forward passes


def scored(params, rows):
    """Logits [rows, V] after each token sequence."""
    out = []
    for start in range(0, len(rows), ROOM):
        ids, length = padded(rows[start : start + ROOM])
        full = np.zeros((ROOM, WIDTH), np.int32)
        full[: len(ids), : ids.shape[1]] = ids
        got = _last_logits(params, full, np.pad(length, (0, ROOM - len(length)), constant_values=1))
        out.append(np.asarray(got, np.float64)[: len(ids)])
    return np.concatenate(out)


@jax.jit
def _last_logits(params, ids, length):
    mask = jnp.arange(WIDTH)[None] < length[:, None]
    positions = jnp.broadcast_to(jnp.arange(WIDTH), (3, *ids.shape))
    hidden = qwen.hidden_states(params, CFG, ids, mask, positions)
    return qwen.unembed(
        params, CFG, jnp.take_along_axis(hidden, (length - 1)[:, None, None], 1)[:, 0]
    )


def enumerate_answers(params, prefix, lead, rules, depth):
    """{list: probability} by walking every token sequence, each scored by a full forward pass."""
    open_, out = [((), b"", 1.0)], {}
    for left in range(depth, 0, -1):
        logits = scored(params, [[*prefix, *tokens] for tokens, _, _ in open_])
        grown = []
        for (tokens, text, p), row in zip(open_, logits, strict=True):
            ok = [i for i, piece in enumerate(PIECES) if piece and rules(text + piece, left - 1)]
            weight = np.exp(row[ok] - row[ok].max())
            for i, w in zip(ok, weight / weight.sum(), strict=True):
                new = text + PIECES[i]
                if new.endswith(b"</answer>"):
                    out[new[len(lead) :]] = out.get(new[len(lead) :], 0) + p * w
                else:
                    grown.append(((*tokens, i), new, p * w))
        open_ = [x for x in grown if x[2] > 1e-9]
        if not open_:
            break
    return out


def exact(small):
    """float [4, names] by enumeration of all answers to all traces."""
    params, _ = small
    oracle = Oracle(PIECES, "devices", True, (b"",), 0)
    rows = []
    for i, (tokens, count) in enumerate(zip(TRACES, (5, 2, 4, 3), strict=True)):
        prefix = [*PROMPTS[i // 2, : LENGTHS[i // 2]], *tokens[:count]]
        lead = b"<answer>" if 3 in tokens[:count] else b"</think><answer>"
        before = b"<think></think>" if 3 in tokens[:count] else b"<think>"

        def rules(text, left, lead=lead, before=before):
            whole = lead.startswith(text[: len(lead)])
            return whole and oracle.need(before + text) <= left

        answers = enumerate_answers(params, prefix, lead, rules, DEPTH)
        assert abs(sum(answers.values()) - 1) < 1e-6
        named = lambda t: np.array([n in t.decode() for n in NAMES])
        rows.append(sum(p * named(t) for t, p in answers.items()))
    return np.array(rows)


@pytest.fixture(scope="module")
def truth(small):
    return exact(small)


def test_probabilities_equal_the_enumeration_of_all_answers(small, truth):
    got = probabilities(small, width=256)
    np.testing.assert_allclose(got["trace"].reshape(4, -1), truth, atol=2e-5)
    np.testing.assert_allclose(got["exact_mass"], 1, atol=1e-5)
    np.testing.assert_allclose(got["mean"], truth.reshape(2, 2, -1).mean(1), atol=2e-5)
    early = probabilities(small, width=256, tolerance=0.02)
    assert (early["exact_mass"] < got["exact_mass"]).all() and (
        early["exact_mass"] >= 0.98 - 1e-6
    ).all()
    error = np.abs(early["trace"].reshape(4, -1) - truth).max(1)
    assert (error <= 1 - early["exact_mass"].reshape(-1) + 1e-5).all()
    assert (
        truth.std(0).max() > 0.05 and 0.05 < truth.mean() < 0.95
    )  # traces differ, nothing is decided


@pytest.mark.slow
def test_a_narrow_expansion_is_unbiased_and_bounded(small, truth):
    draws = []
    for seed in range(60):
        got = probabilities(small, width=4, keys=sampling.row_keys(seed, 4))
        p = got["trace"].reshape(4, -1)
        assert (p >= 0).all() and (p <= 1).all()
        assert (np.abs(p - truth).max(1) <= 1 - got["exact_mass"].reshape(-1) + 1e-5).all()
        draws.append(p)
    error = np.mean(draws, 0) - truth
    spread = np.std(draws, 0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(error) <= 4.5 * spread + 1e-4).all()
    assert np.max(spread) > 0  # width 4 is really too narrow here


class Started(NamedTuple):
    """The constraint from a given place on: brute force samples answers to one trace through `generate`."""

    rules: constrained.Constraint
    at: jax.Array

    def init(self, rows):
        start = self.rules.init(rows)
        return start._replace(at=jnp.full(rows, self.at), left=jnp.full(rows, DEPTH))

    def allowed(self, state):
        return self.rules.allowed(state)

    def advance(self, state, token):
        return self.rules.advance(state, token)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_probabilities_match_counts_of_sampled_answers(small, temperature):
    params, c = small
    got = probabilities(small, width=256, temperature=temperature)["trace"].reshape(4, -1)
    count, state = c.trace(*map(jnp.asarray, padded(TRACES)))
    K = 1500
    for i in (0, 2):
        prefix, length = padded(
            [[*PROMPTS[i // 2, : LENGTHS[i // 2]], *TRACES[i][: int(count[i])]]]
        )
        prefix = np.pad(prefix, ((0, 0), (0, 10 - length[0])))
        lead = "<think>" + "</think>" * (3 in TRACES[i][: int(count[i])])
        out = sampling.generate(
            params,
            CFG,
            sampling.PromptBatch(prefix, length, qwen.positions(CFG, prefix, None)),
            sampling.SamplingSettings(
                n=K,
                max_new_tokens=DEPTH,
                temperature=temperature,
                stop_ids=(STOP,),
                suppress_ids=(1, 22, 23),
            ),
            keys=sampling.row_keys(9, K),
            constraint=Started(c, state.at[i]),
        )
        texts = [
            lead.encode() + b"".join(PIECES[t] for t in row) for row in np.asarray(out["tokens"])
        ]
        named = np.array([[n in FORMAT.match(t.decode()).group(1) for n in NAMES] for t in texts])
        error = np.sqrt(got[i] * (1 - got[i]) / K)
        assert (np.abs(named.mean(0) - got[i]) <= 4.5 * error + 2e-3).all()


def test_resampling_keeps_mass_and_expectation():
    rng = np.random.default_rng(0)
    w = rng.exponential(size=(3, 40)).astype(np.float32) ** 4
    w[1, 6:] = 0
    w /= w.sum(1, keepdims=True)
    draw = jax.jit(answer_probabilities.resample, static_argnums=1)
    u = np.linspace(0, 1, 1001, dtype=np.float32)[:-1]
    for row in w:
        index, weight, kept = map(np.asarray, draw(np.tile(row, (len(u), 1)), 8, u))
        np.testing.assert_allclose(weight.sum(1), 1, atol=1e-5)
        dense = np.zeros((len(u), 40))
        np.put_along_axis(dense, index, weight, 1)
        np.testing.assert_allclose(dense.mean(0), row, atol=3e-3)
        held = np.where(kept, np.take(row, index), weight)
        np.testing.assert_array_equal(held, weight)
    assert kept.any() and not kept.all()
    index, weight, kept = map(np.asarray, draw(w[1:2], 8, u[:1]))
    np.testing.assert_array_equal(
        np.sort(weight[0])[2:], np.sort(w[1, :6])
    )  # six branches: all kept as they are
    assert kept[0][weight[0] > 0].all()


def test_answer_tokens_must_leave_room_for_an_answer(small):
    with pytest.raises(UserError, match="answer_tokens=2"):
        probabilities(small, answer_tokens=2)
