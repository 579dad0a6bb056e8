"""The engine against Model.generate: a completion is the same, whoever sits beside it. A tiny random model."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from compile_counts import compiled
from generating import CFG, FIND, close, image

import cxr_jax
from cxr_jax.inference import model as inference_model
from cxr_jax.inference.requests import GenerationSettings
from cxr_jax.models import network
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
    params = network.init_params(CFG, jax.random.key(0))
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
    engine = started(model, slots=10, queue_limit=64)
    yield engine
    engine.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


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
    """An ask of any kind that has a program of its own in `Model.generate`."""
    choice = {"max_new_tokens": int(rng.integers(1, LONGEST)), "seed": int(rng.integers(99))}
    if rng.random() < 0.7:
        choice |= {"temperature": float(rng.choice([0.3, 1.0, 1.7])), "n": int(rng.integers(1, 4))}
        choice |= {"top_k": 5} if rng.random() < 0.3 else {}
        choice |= {"top_p": 0.7} if rng.random() < 0.3 else {}
    if rng.random() < 0.3:
        choice |= {"constraint": "answers", "max_new_tokens": LONGEST}
    text = FIND + " and" * int(rng.choice([0, 3, 60]))
    return ask(None if rng.random() < 0.2 else int(rng.integers(4)), text, **choice)


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
