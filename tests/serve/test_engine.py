"""The engine against Model.generate: a completion is the same, whoever sits beside it. A tiny random model."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import tiny_model
from compile_counts import compiled
from generating import CFG, FIND, close, image

import cxr_jax
from cxr_jax.errors import UserError
from cxr_jax.inference import model as inference_model
from cxr_jax.inference.requests import GenerationSettings
from cxr_jax.serve import asks
from cxr_jax.serve.engine import Engine

LONGEST = 48  # new tokens that the long room holds; the usual one holds 16


class Ear:
    """Keeps what it hears, and says when the last event has come."""

    def __init__(self, on_piece=None):
        self.events, self.over, self.on_piece = [], threading.Event(), on_piece

    def __call__(self, event):
        assert not self.over.is_set(), "an event after the last one"
        self.events.append(event)
        if isinstance(event, asks.Piece) and self.on_piece:
            self.on_piece(event)
        if isinstance(event, asks.Done | asks.Failed):
            self.over.set()

    def wait(self):
        assert self.over.wait(120), "nothing more came"
        return self.events[-1]

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    def completions(self):
        """In the order of their numbers; their pieces must add up to them."""
        by_index = {event.index: event.completion for event in self.of(asks.Finished)}
        for index, completion in by_index.items():
            pieces = [piece for piece in self.of(asks.Piece) if piece.index == index]
            assert "".join(piece.text for piece in pieces) == completion.text
            assert sum((piece.token_ids for piece in pieces), []) == completion.token_ids
            assert sum((piece.logprobs for piece in pieces), []) == completion.logprobs
        return [by_index[index] for index in sorted(by_index)]


@pytest.fixture(scope="module")
def model():
    params = tiny_model.draw_params(CFG)
    # Larger embeddings: a peaked distribution, so that a wrong key or position changes tokens.
    params["text"]["embed"]["embedding"] = params["text"]["embed"]["embedding"] * 25
    return inference_model.Model(CFG, params, folder=cxr_jax.asset("phantom"))


def started(model, **options):
    engine = Engine(model, prompt_buckets=(128, 256), new_token_buckets=(16, LONGEST), **options)
    engine.start()
    while not engine.is_ready:
        assert engine.failure is None, engine.failure
        time.sleep(0.02)
    return engine


@pytest.fixture(scope="module")
def engine(model):
    before = set(threading.enumerate())
    engine = started(model, slots=10, queue_limit=64)
    [thread] = [new for new in set(threading.enumerate()) - before if new.name == "engine"]
    yield engine
    engine.stop()
    # Its own: another test's server may have one, too.
    assert not thread.is_alive()


def ask(number=0, text=FIND, messages=None, **choice):
    own = {
        name: choice.pop(name) for name in ("constraint", "stop", "probabilities") if name in choice
    }
    messages = messages or [{"role": "user", "content": text}]
    images = () if number is None else (image(number),)
    settings = GenerationSettings(**({"max_new_tokens": 12} | choice))
    return asks.Ask(images=images, messages=messages, settings=settings, **own)


def expected(model, wanted):
    [completions] = model.generate(
        [list(wanted.images) or None],
        [wanted.messages],
        constraint=wanted.constraint,
        **dataclasses.asdict(wanted.settings),
    )
    return completions


def mixture(rng):
    """An ask of one of the kinds that have a program of their own in `Model.generate`: few, as each compiles there."""
    choice = {"max_new_tokens": int(rng.integers(1, LONGEST)), "seed": int(rng.integers(99))}
    drawn = {"temperature": float(rng.choice([0.3, 1.0, 1.7])), "n": int(rng.integers(1, 4))}
    kinds = ({}, drawn, drawn | {"top_k": 5, "top_p": 0.7}, {"constraint": "answers"})
    kind = kinds[rng.integers(4)]
    if "constraint" in kind:
        return ask(int(rng.integers(4)), **choice | kind | {"max_new_tokens": LONGEST})
    # Longer than the usual room, or with words instead of a film.
    text, film = [
        (FIND, int(rng.integers(4))),
        (FIND + " and" * 45, 1),
        (FIND + " and" * 60, None),
    ][rng.choice(3, p=(0.6, 0.2, 0.2))]
    return ask(film, text, **choice | kind)


def test_mixtures_that_come_and_go_are_what_generate_gives_and_nothing_is_compiled(model, engine):
    rng = np.random.default_rng(0)
    wanted, heard = [mixture(rng) for _ in range(24)], []
    with compiled() as names:
        for index, each in enumerate(wanted):
            ear, leaves = Ear(), index % 6 == 5
            job = engine.submit(each, ear)
            if leaves:
                # At any moment: before it begins, while it grows, or when it is long over.
                threading.Timer(float(rng.random()) * 0.05, job.cancel).start()
            else:
                heard.append((each, ear))
            time.sleep(float(rng.random()) * 0.02)
        for _, ear in heard:
            assert isinstance(ear.wait(), asks.Done)
    assert not names
    for each, ear in heard:
        completions = ear.completions()
        for own, other in zip(completions, expected(model, each), strict=True):
            close(own, other)
            np.testing.assert_allclose(own.logprobs, other.logprobs, atol=1e-5)
        done = ear.events[-1]
        assert done.completion_tokens == sum(len(own.token_ids) for own in completions)
    assert engine.counts()["slots_busy"] == 0


def heard(engine, wanted, **ear_options):
    ear = Ear(**ear_options)
    engine.submit(wanted, ear)
    ear.wait()
    return ear


class Blocked:
    """Keeps the engine's thread busy, so that what is submitted meanwhile is there at one boundary."""

    def __init__(self, engine):
        self.engine, self.begun, self.go_on = engine, threading.Event(), threading.Event()

    def __enter__(self):
        self.future = self.engine.call(lambda: (self.begun.set(), self.go_on.wait(60)))
        assert self.begun.wait(60)

    def __exit__(self, *_):
        self.go_on.set()
        self.future.result(60)


def test_a_follow_up_computes_what_it_adds_and_is_what_generate_gives(model, engine):
    messages, known = [], 0
    # The second conversation is longer than any piece of a prompt, and than the usual room.
    for question, least in ((FIND, 0), ("Where?" + " and" * 50, 80), ("And now?", 150)):
        messages = [*messages, {"role": "user", "content": question}]
        wanted = ask(7, messages=messages, max_new_tokens=20)
        ear = heard(engine, wanted)
        [completion], [other] = ear.completions(), expected(model, wanted)
        close(completion, other)
        done = ear.events[-1]
        assert least <= done.cached_tokens < done.prompt_tokens and done.cached_tokens >= known
        again = heard(engine, wanted).events[-1]
        assert again.cached_tokens == again.prompt_tokens == done.prompt_tokens
        known = done.cached_tokens
        messages.append({"role": "assistant", "content": completion.text})


def test_probabilities_are_those_of_the_first_trace(model, engine):
    """Which branches survive where too many are open is drawn by their mass: its last bit, which differs from
    processor to processor, turns one draw in thousands. So of eight asks one may differ, within its error."""
    differing = []
    for constraint, new in (("answers", LONGEST), (None, 12)):
        for seed in range(4, 8):
            options = dict(temperature=1.0, n=2, seed=seed, max_new_tokens=new)
            ear = heard(engine, ask(1, constraint=constraint, probabilities=True, **options))
            [found] = ear.of(asks.Probabilities)
            first = ear.completions()[0]
            weighed = model.finding_probabilities(image(1), FIND, [first], seed=seed)
            [reference], [exact_mass] = weighed["each"], weighed["exact_mass"]
            if found.by_label != pytest.approx(reference, abs=1e-5):
                assert found.by_label == pytest.approx(reference, abs=1 - exact_mass)
                differing.append(seed)
            assert isinstance(ear.events[-1], asks.Done)
    assert len(differing) <= 1, differing


def test_a_stop_text_ends_a_completion_before_it_and_is_never_told(model, engine):
    [whole] = expected(model, ask(2, max_new_tokens=40))
    for first, last in ((3, 9), (17, 18), (len(whole.text) - 4, len(whole.text))):
        stop = whole.text[first:last]
        place = whole.text.index(stop)
        ear = heard(engine, ask(2, max_new_tokens=40, stop=("nowhere at all", stop)))
        [completion] = ear.completions()
        assert completion.text == whole.text[:place] and completion.finish_reason == "stop"
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
        assert ear.events[-1].completion_tokens == len(completion.token_ids)
    # One that does not come changes nothing.
    [completion] = heard(engine, ask(2, max_new_tokens=40, stop=("nowhere at all",))).completions()
    close(completion, whole)


def test_a_listener_that_fails_harms_nobody_and_a_cancelled_ask_ends_at_once(model, engine):
    def fails(_):
        raise RuntimeError("the reader left")

    before = engine.counts()
    wanted = ask(0, max_new_tokens=LONGEST)
    with Blocked(engine):
        deaf, kept, dropped = Ear(on_piece=fails), Ear(), Ear()
        engine.submit(wanted, deaf)
        engine.submit(wanted, kept)
        # More than fit: some are cancelled while they wait.
        jobs = [engine.submit(ask(1, max_new_tokens=LONGEST), dropped) for _ in range(1)]
        waiting = [Ear() for _ in range(14)]
        jobs += [engine.submit(ask(2, max_new_tokens=LONGEST), ear) for ear in waiting]
    for job in jobs:
        job.cancel()
    assert [ear.wait() for ear in (dropped, *waiting)] == [asks.Failed(asks.CANCELLED)] * 15
    kept.wait()
    close(kept.completions()[0], expected(model, wanted)[0])
    counts = engine.counts()
    assert not deaf.over.is_set() and len(deaf.of(asks.Piece)) == 1
    assert counts["cancelled_total"] - before["cancelled_total"] == 15
    assert counts["listener_failures_total"] - before["listener_failures_total"] == 1
    assert counts["slots_busy"] == counts["waiting"] == 0


def test_many_completions_of_one_ask_leave_a_place_to_who_waits(model, engine):
    many, one = ask(0, n=30, temperature=1.0, max_new_tokens=16), ask(1, max_new_tokens=4)
    order, ears = [], (Ear(), Ear())
    with Blocked(engine):
        for name, wanted, ear in zip(("many", "one"), (many, one), ears, strict=True):

            def listener(event, name=name, ear=ear):
                order.append((name, type(event)))
                ear(event)

            engine.submit(wanted, listener)
    for ear, wanted in zip(ears, (many, one), strict=True):
        ear.wait()
        for own, other in zip(ear.completions(), expected(model, wanted), strict=True):
            close(own, other)
    finished = [index for index, entry in enumerate(order) if entry == ("many", asks.Finished)]
    assert order.index(("one", asks.Done)) < finished[0]


def test_what_cannot_be_answered_is_refused_before_it_waits(engine):
    for bad in (
        ask(max_new_tokens=LONGEST + 1),
        ask(text=FIND + " and" * 300),
        ask(text="  "),
        ask(stop=("",)),
        ask(constraint="poems"),
        ask(constraint="answers", max_new_tokens=3),
        ask(messages=[{"role": "assistant", "content": "No."}]),
        asks.Ask(images=tuple(map(image, range(4))), messages=[{"role": "user", "content": FIND}]),
    ):
        with pytest.raises(UserError):
            engine.submit(bad, Ear())
    assert engine.counts()["waiting"] == 0


def test_a_full_queue_tells_when_to_come_again_and_stop_ends_everybody(model):
    engine = Engine(
        model, slots=10, queue_limit=2, prompt_buckets=(128, 256), new_token_buckets=(16, LONGEST)
    )
    with pytest.raises(asks.NotReadyError):
        engine.submit(ask(), Ear())
    early = engine.call(lambda: 7)
    engine.start()
    assert early.result(120) == 7
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(60)
    ears = [Ear(), Ear()]
    with Blocked(engine):
        for ear in ears:
            engine.submit(ask(max_new_tokens=LONGEST), ear)
        with pytest.raises(asks.QueueFullError) as full:
            engine.submit(ask(), Ear())
        late = engine.call(lambda: 8)
        engine._is_stopping = True
    engine.stop()
    assert full.value.retry_after_s >= 1 and engine.counts()["refused_total"] == 1
    assert [type(ear.wait()) for ear in ears] == [asks.Failed] * 2
    assert late.exception(10) is None or isinstance(late.exception(), asks.StoppedError)
    assert not engine.is_ready and not engine._thread.is_alive()
    for refused in (lambda: engine.submit(ask(), Ear()), lambda: engine.call(print)):
        with pytest.raises(asks.StoppedError):
            refused()


def test_a_turn_that_fails_costs_those_that_were_drawing_alone(model, engine, monkeypatch):
    from cxr_jax.serve.slots import programs

    advance, times = programs.advance, iter([True])

    def fails_once(*arguments, **options):
        if next(times, False):
            raise ValueError("what a film says must not be told")
        return advance(*arguments, **options)

    monkeypatch.setattr(programs, "advance", fails_once)
    first = heard(engine, ask(0)).events[-1]
    assert first == asks.Failed("it failed (ValueError)")
    wanted = ask(0)
    close(heard(engine, wanted).completions()[0], expected(model, wanted)[0])
