"""compaction.py: completions do not change when finished rows leave and the cache grows; work does."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from places import ROOT
from tiny_model import CFG, STOP, N, T, V

from cxr_jax.inference import compaction, sampling
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.rl.stop_texts import StopTexts


def test_stage_ends():
    assert compaction.stage_ends(95) == [95] and compaction.stage_ends(1) == [1]
    for most in (96, 128, 208, 1800):
        ends = compaction.stage_ends(most)
        assert ends == sorted(set(ends)) and ends[-1] == most and len(ends) <= 4
        assert all(t % compaction.GRAIN == 0 for t in ends[:-1])


def test_sizes():
    assert compaction.sizes(256) == [256, 128, 64, 32]
    assert compaction.sizes(20) == [20, 10]  # no fewer than 8
    assert compaction.sizes(6) == [6]
    assert compaction.sizes(48, shards=8) == [48, 24]  # each device an equal share
    assert compaction.sizes(12, shards=4) == [12]


def test_a_deep_model_has_a_loop_for_fewer_sizes():
    rows = functools.partial(compaction.stage_rows, 128, 1)
    assert [rows(stage, 8) for stage in range(4)] == [[128], *[[128, 64, 32, 16]] * 3]
    deep = [rows(stage, 36) for stage in range(4)]
    assert deep == [[128], [128, 64], [128, 64, 32], [128, 64, 16]]
    # Sizes that are not there are left out, and devices still get equal shares.
    assert [compaction.stage_rows(48, 8, stage, 36) for stage in (1, 2, 3)] == [[48, 24]] * 3
    assert compaction.stage_rows(6, 1, 3, 36) == [6]


@pytest.fixture
def small(monkeypatch):
    """Stages of 4 to 16 tokens and batches down to 2 rows, so that a short loop goes through all of them."""
    for name, value in {"GRAIN": 4, "SHORTEST": 8, "LEAST_ROWS": 2}.items():
        monkeypatch.setattr(compaction, name, value)
    forget()
    yield
    forget()


def forget():
    """Drop the sampler's programs, which hold the stages of the module's numbers; all others stay."""
    sampling._generate.clear_cache()


def sample(prompts, n, constraint=None, endings=None, **options):
    rng = np.random.default_rng(1)
    ids = rng.integers(7, 20, (prompts, T)).astype(np.int32)
    lengths = rng.integers(2, T + 1, prompts).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (3, prompts, T))
    params = tiny_model.draw_params(CFG)
    params["text"]["embed"]["embedding"] *= 25.0
    out = sampling.generate(
        params,
        CFG,
        sampling.PromptBatch(ids, lengths, positions),
        sampling.SamplingSettings(n=n, max_new_tokens=N, **{"stop_ids": STOP, **options}),
        keys=sampling.row_keys(0, prompts * n),
        constraint=constraint,
        endings=endings,
    )
    return {k: np.asarray(v) for k, v in out.items()}


class Alternating:
    """A constraint with a state: even and odd tokens take turns, each row from a parity of its own."""

    def init(self, rows):
        return {"parity": jnp.arange(rows) % 2}

    def allowed(self, state):
        return (jnp.arange(V)[None] % 2 == state["parity"][:, None]) | (jnp.arange(V) == 2)

    def advance(self, state, token):
        return {"parity": 1 - token % 2}


jax.tree_util.register_static(Alternating)
# Endings with a state: a letter a token, and two or three tokens an ending.
LETTERS = TokenBytes.from_pieces([b"%c" % (ord("a") + token % 4) for token in range(V)])
ENDINGS = StopTexts.compile(("aa", "bbbb", "cd"), LETTERS, V)


@pytest.mark.parametrize(
    "prompts, n, options",
    [
        (4, 4, {}),  # more rows than prompts are left at first, fewer later
        (16, 1, {"temperature": 0.9, "endings": ENDINGS, "stop_ids": (1, 2, 3)}),
        (3, 4, {"constraint": Alternating(), "stop_ids": (1, 3)}),
    ],
)
def test_completions_are_those_of_one_loop(prompts, n, options, small, monkeypatch):
    assert len(compaction.stage_ends(N)) == 4
    taken = []
    real = compaction.run

    def spy(loop, *args):  # called when a program is traced
        @functools.wraps(loop)
        def counted(rows, state, until, place):
            taken.append((len(rows.start), state.own_keys[0][0].shape[2], place is None))
            return loop(rows, state, until, place)

        return real(counted, *args)

    monkeypatch.setattr(compaction, "run", spy)
    got = sample(prompts, n, **options)
    rows = prompts * n
    assert {r for r, *_ in taken} == set(compaction.sizes(rows)) and {
        room for _, room, _ in taken
    } == {8, 12, 16, 24}
    assert all(alone for r, _, alone in taken if r <= prompts)
    monkeypatch.setattr(compaction, "SHORTEST", 10**6)
    taken.clear()
    forget()
    want = sample(prompts, n, **options)
    assert {room for _, room, _ in taken} == {N}  # one loop, traced anew
    if "endings" in options:  # and some by a text
        last = np.take_along_axis(want["tokens"], want["lengths"][:, None] - 1, 1)[:, 0]
        assert (want["finished"] & ~np.isin(last, options["stop_ids"])).any()
    # Many rows end in every stage, and some never.
    assert (
        np.ptp(want["lengths"]) > 12
        and not want["finished"].all()
        and want["finished"].mean() > 0.4
    )
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(got[name], want[name])
    np.testing.assert_allclose(got["logprobs"], want["logprobs"], atol=1e-5)


def test_over_devices():
    """In a process of its own, with four fake devices: the same samples and the same gradients."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "sharded_rl.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/helpers'}"},
    )
    assert done.returncode == 0, done.stderr
