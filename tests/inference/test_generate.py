"""Model.generate: checked arguments, streaming, few programs, readings, and completions that do not depend on their
company. A tiny random model with the phantom tokenizer; slow: the phantom."""

import dataclasses
import os

import company
import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_counts import compiled
from generating import CFG, FIND, STOP, TOKENIZER, V, Words, image

import cxr_jax
from cxr_jax.errors import UserError
from cxr_jax.inference import generation, image_inputs, requests, sampling, trace_readings
from cxr_jax.inference import model as inference_model
from cxr_jax.labels.answers import split_answer
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.models import network

# Arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(temperature="1"), "temperature"),
        (dict(temperature=1e-30), "temperature"),
        (dict(temperature=True), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(top_p=float("nan")), "top_p"),
        (dict(top_k=0), "top_k"),
        (dict(top_k=1.5), "top_k"),
        (dict(n=0), "n must"),
        (dict(n=True), "n must"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=8.0), "max_new_tokens"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**32), "seed"),
        (dict(max_new_tokens=330), "400 positions"),
        (dict(prompts="no finding " * 400), "400 positions"),
        (dict(images=[]), "empty"),
        (dict(prompts=[]), "empty"),
        (dict(prompts=["a", "b"]), "1 images but 2 prompts"),
        (dict(images="scan.png"), "list"),
        (dict(images=np.zeros((28, 28))), "list"),
        (dict(images=None), "list"),
        (dict(prompts=None), "prompts must"),
        (dict(prompts=[7]), "a prompt must be a text"),
        (dict(prompts=[[]]), "must end with a user"),
        (dict(prompts=""), "no prompt: nothing is asked"),
        (dict(prompts=[" \n\u200b"]), "no prompt: nothing is asked"),
        (dict(prompts="<image>\n"), "no prompt: nothing is asked"),
        (dict(prompts=[[{"role": "user", "content": "\t"}]]), "no prompt: nothing is asked"),
        (
            dict(prompts=[[{"role": "user", "content": text} for text in ("", "x")]]),
            "no prompt: nothing is asked",
        ),
        (dict(prompts=[[{"role": "robot", "content": "x"}]]), "role"),
        (dict(prompts=[[{"role": "assistant", "content": "x"}]]), "must end with a user"),
        (dict(prompts="<|image_pad|>"), "placeholders"),
        (dict(prompts="<|video_pad|>"), "placeholders"),
        (dict(constraint="anything"), "constraint='anything'"),
        (dict(constraint="answers"), "max_new_tokens=4: they need"),
        (dict(images=[np.full((28, 28), np.nan)]), "0..1"),
        (dict(images=["/no/such/file.png"]), "no/such"),
    ],
)
def test_bad_arguments_are_one_clear_line_before_anything_is_computed(
    model, calls, change, message
):
    call = dict(images=[image(0)], prompts=FIND, max_new_tokens=4) | change
    with pytest.raises(UserError, match=message) as error:
        model.generate(**call)
    assert "\n" not in str(error.value) and not calls


# Sampling


def test_buckets_are_few_and_hold_what_they_must():
    sizes = sorted({generation.bucket(n) for n in range(1, 2000)})
    assert sizes == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(generation.bucket(n) >= n for n in range(1, 2000)) and all(
        generation.bucket(s) == s for s in sizes
    )


def test_one_vision_pass_an_image_and_one_prefill_a_prompt(model, calls):
    got = model.generate(
        [image(0), image(0), None],
        [FIND, "Examine the chest X-ray.", "Hello"],
        n=3,
        max_new_tokens=4,
        temperature=1.0,
    )
    assert [len(g) for g in got] == [3, 3, 3] and len({tuple(c.token_ids) for c in got[0]}) > 1
    kinds = [kind for kind, _ in calls]
    assert kinds.count("vision") == 1 and kinds.count("prefill") == 3
    # One call for each length bucket and 4 rows: the two prompts with an image have 6 rows.
    assert [c for c in calls if c[0] == "decode"] == [("decode", 4)] * 3


def test_logprobs_are_those_of_a_full_forward(model):
    [[c]] = model.generate([image(1)], [FIND], max_new_tokens=12, temperature=0.7, seed=3)
    patches, grid = model.prepare(image(1))
    ids = model.render(FIND, [grid])
    logits = model.logits([ids + c.token_ids], patches, [grid])[0, len(ids) - 1 : -1].copy()
    logits[:, list(model.special["suppress"])] = -np.inf
    want = np.asarray(jax.nn.log_softmax(logits / 0.7))[np.arange(len(c.token_ids)), c.token_ids]
    np.testing.assert_allclose(c.logprobs, want, atol=1e-4)


def test_media_tokens_and_ids_without_text_are_never_drawn(model):
    assert len(TOKENIZER) < V and {*CFG.media_token_ids, *range(len(TOKENIZER), V)} <= set(
        model.special["suppress"]
    )
    [got] = model.generate([image(0)], FIND, n=16, max_new_tokens=60, temperature=1e6)
    drawn = np.concatenate([c.token_ids for c in got])
    assert len(drawn) > 500 and not np.isin(drawn, model.special["suppress"]).any()


def test_top_k_one_and_a_tiny_top_p_are_greedy(model):
    [[greedy]] = model.generate([image(0)], FIND, max_new_tokens=8)
    for cut in (dict(top_k=1), dict(top_p=1e-6), dict(top_k=10**9, top_p=1e-6)):
        [[c]] = model.generate([image(0)], FIND, max_new_tokens=8, temperature=1.0, **cut)
        assert c.token_ids == greedy.token_ids
    assert greedy == model.generate([image(0)], [FIND], 8, 0.0, 1, 0)[0][0]


def test_a_stop_token_ends_the_text_and_a_constraint_is_obeyed(model):
    only = Words(
        jnp.zeros(V, bool).at[jnp.array([300, 301, 302])].set(True),
        jnp.zeros(V, bool).at[STOP].set(True),
    )
    [got] = model.generate(
        [image(0)], FIND, n=3, max_new_tokens=9, temperature=1.0, constraint=only
    )
    for c in got:
        assert (
            c.finish_reason == "stop"
            and c.token_ids[0] in (300, 301, 302)
            and c.token_ids[1:] == [STOP]
        )
        assert c.text == TOKENIZER.decode(c.token_ids[:1]) and c.logprobs[1] == 0
    [[cut]] = model.generate([image(0)], FIND, max_new_tokens=1, constraint=only)
    assert cut.finish_reason == "length" and len(cut.token_ids) == 1 and cut.text


# Company and programs


def test_a_completion_does_not_depend_on_its_company(model):
    prompts = [
        FIND,
        "Examine the chest X-ray.",
        "Hello",
        FIND + " Look at the bones." * 9,
        "Name the devices.",
    ]
    images = [image(0), image(1), None, image(2), image(0)]
    together = model.generate(images, prompts, max_new_tokens=20, temperature=1.0, n=2, seed=5)
    for i in (0, 2, 3):
        [alone] = model.generate(
            images[i : i + 1], prompts[i : i + 1], max_new_tokens=20, temperature=1.0, seed=5
        )
        assert alone[0].token_ids == together[i][0].token_ids
        np.testing.assert_allclose(alone[0].logprobs, together[i][0].logprobs, atol=1e-6)
    backward = model.generate(
        images[::-1], prompts[::-1], max_new_tokens=20, temperature=1.0, n=2, seed=5
    )
    assert [[c.token_ids for c in row] for row in backward[::-1]] == [
        [c.token_ids for c in r] for r in together
    ]


def test_few_programs_are_compiled(model):
    """One prefill for each length bucket, one decode for each (bucket, room, kind of choice), no more."""
    kinds = ("prefill", "begin", "decode")
    model.generate([image(0)] * 2, FIND, max_new_tokens=3, temperature=0.5)
    counted = model.programs()["decode"]
    with compiled() as names:
        for i, (text, tokens) in enumerate(
            [("Hello", 5), ("How large is the heart?", 60), (FIND, 64), ("Where?", 1)]
        ):
            model.generate([image(i)], text, max_new_tokens=tokens, temperature=0.3 + i, seed=i)
            model.generate(
                [image(i)],
                [text],
                max_new_tokens=tokens,
                temperature=1.0,
                n=2 * i + 1,
                stream=lambda *_: None,
            )
    assert not set(kinds) & set(names)
    with compiled() as names:
        # More room than any other test of this model takes: its programs may be there from another file.
        model.generate([image(0)], FIND, max_new_tokens=129, temperature=1.0)
    assert [names.count(kind) for kind in kinds] == [0, 1, 1]
    with compiled() as names:
        model.generate([image(0)], FIND, max_new_tokens=9, temperature=1.0, top_p=0.5, top_k=3)
    assert [names.count(kind) for kind in kinds[:2]] == [0, 0]
    drawn = names.count("decode")  # none where another test had it first
    with compiled() as names:
        for i in (1, 2, 3):  # any top_p and top_k
            model.generate(
                [image(0)], FIND, max_new_tokens=9, temperature=1.0, top_p=0.2 * i, top_k=10 * i
            )
    assert not set(kinds) & set(names)
    assert drawn <= model.programs()["decode"] - counted - 1 <= 1


def test_buckets_bound_the_vision_programs(model, monkeypatch):
    """200 sizes from max_pixels on: at most 9 programs with grids="bucket", counted by jit and by `Model.programs`."""
    rng = np.random.default_rng(0)
    pictures = [np.zeros(rng.integers(400, 1200, 2), np.float32) for _ in range(200)]
    found = {}
    for grids in image_inputs.GRIDS:
        made = inference_model.Model(CFG, {}, grids=grids)
        made.pixel_limits = (3136, 400 * 400)
        blind = lambda params, model_config, pixels, grid, dtype: network.Seen(
            jnp.zeros((1, np.prod(grid) // 4, 32))
        )
        monkeypatch.setattr(
            inference_model, "encode_images", jax.jit(blind, static_argnums=(1, 3, 4))
        )
        with compiled() as names:
            for picture in pictures:
                patches, grid = made.prepare(picture)
                made.image_features(patches, [grid])
        found[grids] = made.programs()["vision"]
        assert names.count("<lambda>") == found[grids]
    assert found["bucket"] <= 9 and found["exact"] > 20
    with pytest.raises(UserError, match="grids='some'"):
        inference_model.Model(CFG, {}, grids="some")
    fixed = inference_model.Model(
        CFG, {}, folder=cxr_jax.asset("phantom"), grids="bucket"
    )  # one size: buckets change nothing
    np.testing.assert_array_equal(fixed.prepare(pictures[0])[0], model.prepare(pictures[0])[0])


# Readings

JITS = {"encode_images", "prefill", "begin", "decode", "_expand"}


def test_a_reading_is_one_vision_pass_one_prefill_and_no_new_program(model, calls):
    for i in range(3):
        calls.clear()
        with compiled() as names:
            read = model.read(image(i), FIND, samples=3, max_new_tokens=20 + 10 * i, seed=i)
        assert [kind for kind, _ in calls] == ["vision", "prefill", "decode", "decode"]
        assert i == 0 or not JITS & set(names)
    assert model.programs()["probabilities"] == 1
    [[shown]] = model.generate([image(2)], FIND, max_new_tokens=40, seed=2)
    [samples] = model.generate([image(2)], FIND, max_new_tokens=40, temperature=1.0, n=3, seed=2)
    assert (read.shown, read.samples) == (shown, samples)
    assert list(read.probabilities) == list(CHEXPERT_14) and all(
        0 <= p <= 1 for p in read.probabilities.values()
    )
    assert sum(read.probabilities.values()) >= 1  # an answer names a label
    assert model.read(image(2), FIND, 1, 40, probabilities=False).probabilities is None


def test_probabilities_after_drawn_keys_and_after_a_full_pass_agree(model):
    """Traces of an untrained model that must keep to the format."""
    patches, grid = model.prepare(image(0))
    prefix = generation.prefix_of(
        model, requests.Request(model.render(FIND, [grid]), (requests.Picture(patches, grid),))
    )
    layers, settings = (
        sampling.decode_layers(model.params, model.config),
        requests.GenerationSettings(64, 1.0, 3),
    )
    rules = model.constraint("answers", 64)
    got, own = generation.decode(
        model, layers, [(prefix, j) for j in range(3)], settings, None, rules
    )
    assert all("</think>" in c.text and c.finish_reason == "stop" for c in got)
    kept = trace_readings.after(model, layers, prefix, got, model.answers, 0, own)
    traces = kept["trace"][0]
    assert len({len(c.token_ids) for c in got}) > 1 and np.ptp(traces, axis=0).max() > 0.01
    full = model.finding_probabilities(image(0), FIND, got)
    np.testing.assert_allclose([list(p.values()) for p in full["each"]], traces, atol=2e-4)
    np.testing.assert_allclose(list(full["mean"].values()), traces.mean(0), atol=2e-4)
    np.testing.assert_allclose(full["exact_mass"], kept["exact_mass"][0], atol=2e-4)
    with compiled() as names:
        for i in (1, 2):  # other images and lengths
            cut = [
                dataclasses.replace(c, token_ids=c.token_ids[: 9 * i + j])
                for j, c in enumerate(got)
            ]
            other = model.finding_probabilities(image(i), FIND, cut)
            assert other["mean"] != full["mean"]
    assert "_expand" not in names
    for bad, line in (
        ([], "at least one"),
        (got[0], "a list of completions"),
        (["text"], "a list of completions"),
    ):
        with pytest.raises(UserError, match=line):
            model.finding_probabilities(image(0), FIND, bad)
    for bad in (5, True, b"answers", "answer"):
        with pytest.raises(UserError, match='use "answers"'):
            model.generate([image(0)], FIND, constraint=bad)


def test_answers_are_valid_on_demand(model):
    [got] = model.generate([image(0)], FIND, 64, 1.0, n=3, constraint="answers")
    answers = [
        split_answer(c.text)
        for c in [*got, model.chat(image(0)).ask(FIND, 64, constraint="answers")]
    ]
    assert all(labels and not others for labels, others in answers)


# Streaming


def test_streamed_pieces_add_up_to_the_same_completions(model, calls):
    """Random weights write broken UTF-8 by the dozen."""
    kw = dict(max_new_tokens=30, temperature=1.5, n=2, seed=1)
    plain = model.generate([image(0), None], [FIND, "Hello"], **kw)
    assert len([c for c in calls if c[0] == "decode"]) == 2
    calls.clear()
    pieces = {}
    streamed = model.generate(
        [image(0), None],
        [FIND, "Hello"],
        stream=lambda b, j, text: pieces.setdefault((b, j), []).append(text),
        **kw,
    )
    assert streamed == plain
    for b in range(2):
        for j in range(2):
            assert "".join(pieces[b, j]) == plain[b][j].text and len(pieces[b, j]) > 1
    assert [c for c in calls if c[0] == "decode"][:4] == [
        ("decode", until) for until in (8, 16, 24, 30)
    ]
    assert any("\ufffd" in c.text for row in plain for c in row)


def test_characters_split_over_tokens_come_out_whole(model):
    text = "Größe 漢字 😀👩‍⚕️ – é"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    growing, pieces = requests.GrowingText(TOKENIZER), []
    for k in range(1, len(ids) + 1):
        pieces.append(growing.add(ids[:k], last=k == len(ids)))
    assert "".join(pieces) == text and "" in pieces and not any("\ufffd" in p for p in pieces)
    cut = requests.GrowingText(TOKENIZER)  # an answer that ends inside a character
    assert cut.add(ids[:3], False) + cut.add(ids[:3], True) == TOKENIZER.decode(ids[:3])


# The phantom


@pytest.mark.slow
def test_alone_and_in_a_batch_of_16_the_same_tokens():
    """Compiled as users' programs are, in a process of its own."""
    [(code, out, err)] = forked.calls(
        [[]], 600, module=company.__file__, env=os.environ | {"XLA_FLAGS": ""}
    )
    assert (code, out.splitlines()[-1]) == (0, "80 completions, 0 with other bits"), out + err


def test_long_prompts_decode_in_fewer_rows_at_once():
    """Each row of a decode program holds its prompt's keys: usual prompts in all rows, full-size films in two."""
    assert [generation.rows_for(8, slots) for slots in (64, 512, 4096)] == [8, 8, 8]
    assert [generation.rows_for(8, slots) for slots in (6144, 8192, 12288, 10**6)] == [5, 4, 2, 1]
    assert generation.rows_for(16, 12288) == 5


def test_a_reading_in_turns_of_few_rows_is_the_reading(model, monkeypatch):
    """As many rows as a long prompt leaves change no token."""
    arguments = dict(samples=3, max_new_tokens=8, seed=3, probabilities=False)
    want = model.read(image(1), FIND, **arguments)
    monkeypatch.setattr(generation, "_LONG_PROMPT", 32)
    got = model.read(image(1), FIND, **arguments)
    assert got.shown.token_ids == want.shown.token_ids
    assert [one.token_ids for one in got.samples] == [one.token_ids for one in want.samples]
