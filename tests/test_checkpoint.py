"""checkpoint.py: what goes in comes out bit for bit; what is damaged is passed over, and said so."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from cxr_jax.checkpoint import Checkpoints

# Orbax leaves its other reads of a damaged checkpoint to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"a": {"w": jax.random.normal(keys[0], (64, 32))}, "b": jax.random.normal(keys[1], (5,))}
    params["h"] = jax.random.normal(keys[2], (7,)).astype(ml_dtypes.bfloat16)
    opt_state = optax.adamw(1e-3).init(params)
    return {"params": params, "opt_state": opt_state, "step": jnp.int32(seed), "skipped": jnp.int32(0)}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


@pytest.fixture
def folder(tmp_path):
    """A workdir with checkpoints of steps 1, 2 and 3, of which two are kept."""
    c = Checkpoints(str(tmp_path))
    for step in (1, 2, 3):
        c.save(step, state(step), {"best": {"score": 0.1 * step, "step": step}})
    c.close()
    return tmp_path


def damage(root, how):
    files = [f for f in root.rglob("*") if f.is_file()]
    biggest = max(files, key=lambda f: f.stat().st_size)
    if how == "truncated":
        biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
    elif how == "flipped bit":
        data = bytearray(biggest.read_bytes())
        data[len(data) // 2] ^= 1
        biggest.write_bytes(data)
    elif how == "missing meta":
        next(f for f in files if f.parent.name == "meta" and "metadata" in f.name).unlink()
    elif how == "empty":
        for f in files:
            f.write_bytes(b"")


def test_round_trip(folder):
    c = Checkpoints(str(folder))
    assert sorted(c.last.all_steps()) == [2, 3]
    got, meta, step = c.restore(state())
    assert step == 3 and same(got, state(3)) and meta == {"best": {"score": 0.1 * 3, "step": 3}}  # floats exactly
    jax.jit(lambda s: s, donate_argnums=0)(got)  # its arrays are its own
    c.save(3, state(9), {})  # saved already: left alone
    assert same(c.restore(state())[0], state(3))
    c.close()


def test_nothing_to_restore(tmp_path):
    c = Checkpoints(str(tmp_path))
    assert c.restore(state()) is None and c.restore_best(state()["params"]) is None
    c.close()


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "missing meta", "empty"])
def test_a_damaged_checkpoint_is_passed_over(folder, how, capsys):
    damage(folder / "checkpoints" / "last" / "3", how)
    c = Checkpoints(str(folder))
    got, meta, step = c.restore(state())
    assert step == 2 and same(got, state(2)) and meta["best"]["step"] == 2
    said = capsys.readouterr().out
    assert "last/3 does not load" in said and "trying the one of step 2" in said
    assert (folder / "checkpoints" / "damaged_last_3").is_dir()
    c.save(3, state(3), {})  # the run comes past its step again
    c.close()
    c = Checkpoints(str(folder))
    assert c.restore(state())[2] == 3
    c.close()


def test_all_damaged(folder, capsys):
    for step in "23":
        damage(folder / "checkpoints" / "last" / step, "truncated")
    c = Checkpoints(str(folder))
    assert c.restore(state()) is None
    assert "there is none before it" in capsys.readouterr().out
    c.close()


def test_a_save_that_was_killed_is_not_there(folder):
    half = folder / "checkpoints" / "last" / "4.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_bytes(b"half")
    c = Checkpoints(str(folder))
    assert c.restore(state())[2] == 3
    c.close()


def test_another_shape_does_not_load(folder, capsys):
    c = Checkpoints(str(folder))
    like = state() | {"params": {"a": {"w": jnp.ones((2, 2))}}}
    assert c.restore(like) is None and "does not load" in capsys.readouterr().out
    c.close()


def test_the_best_is_kept(tmp_path):
    c = Checkpoints(str(tmp_path))
    for step in (0, 5):
        c.save_best(step, state(step)["params"], {"score": 0.1, "step": step})
    params, meta, step = c.restore_best(state()["params"])
    assert (step, meta["step"]) == (5, 5) and same(params, state(5)["params"])
    assert list(c.best.all_steps()) == [5]
    # A run that was killed and resumed from step 3 finds step 4 good; step 5 was of its former life.
    c.save_best(4, state(4)["params"], {"score": 0.2, "step": 4})
    c.close()
    c = Checkpoints(str(tmp_path))
    params, meta, step = c.restore_best(state()["params"])
    assert step == 4 and meta["score"] == 0.2 and same(params, state(4)["params"])
    c.save_best(4, state(8)["params"], {"score": 0.3, "step": 4})  # replaced, not skipped
    assert same(c.restore_best(state()["params"])[0], state(8)["params"])
    c.close()
