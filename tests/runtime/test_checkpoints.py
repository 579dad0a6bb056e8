"""checkpoints.py: what goes in comes out bit for bit, on any mesh; what is damaged is passed over, and said so."""

import contextlib
import gc
import json
import os
import re
import resource
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from oracle import checkpoint_mesh as mesh

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.runtime import array_hash, checkpoint_folder, checkpoints
from cxr_jax.runtime.checkpoints import Checkpoints, SaveFailedError
from cxr_jax.runtime.layout import ONE_DEVICE

# Orbax leaves its other reads of a damaged checkpoint to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "a": {"w": jax.random.normal(keys[0], (64, 32))},
        "b": jax.random.normal(keys[1], (5,)),
    }
    params["h"] = jax.random.normal(keys[2], (7,)).astype(ml_dtypes.bfloat16)
    opt_state = optax.adamw(1e-3).init(params)
    return {
        "params": params,
        "opt_state": opt_state,
        "step": jnp.int32(seed),
        "skipped": jnp.int32(0),
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs
    )


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
    elif how == "cut off":
        for f in files:
            if f.parent.name == "d":  # where the arrays are
                f.write_bytes(f.read_bytes()[:20])
    elif how == "changed contents":  # still JSON
        file = root / "contents" / "metadata"
        file.write_text(file.read_text().replace("[64, 32]", "[64, 33]"))
    elif how == "missing meta":
        next(f for f in files if f.parent.name == "meta" and "metadata" in f.name).unlink()
    elif how == "empty":
        for f in files:
            f.write_bytes(b"")


def test_round_trip(folder):
    c = Checkpoints(str(folder))
    assert sorted(c.last.all_steps()) == [2, 3]
    got, meta, step = c.restore(state())
    assert (
        step == 3 and same(got, state(3)) and meta == {"best": {"score": 0.1 * 3, "step": 3}}
    )  # floats exactly
    jax.jit(lambda s: s, donate_argnums=0)(got)  # its arrays are its own
    c.save(3, state(9), {})  # saved already: left alone
    assert same(c.restore(state())[0], state(3))
    assert same(
        shaped := c.restore(ONE_DEVICE.like(state()))[0], state(3)
    )  # as free to go elsewhere as a fresh state
    assert not any(x.committed for x in jax.tree.leaves(shaped))
    c.close()


def test_nothing_to_restore(tmp_path):
    c = Checkpoints(str(tmp_path))
    assert c.restore(state()) is None and c.restore_best(state()["params"]) is None
    c.close()


@pytest.mark.parametrize(
    "how", ["truncated", "flipped bit", "changed contents", "missing meta", "empty"]
)
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


OTHERS = {
    "shape": (
        lambda s: s["params"]["a"].update(w=jnp.ones((2, 2))),
        "params/a/w: found float32 [64, 32], expected float32 [2, 2]",
    ),
    "type": (
        lambda s: s["params"].update(h=jnp.ones((7,))),
        "params/h: found bfloat16 [7], expected float32 [7]",
    ),
    "more": (
        lambda s: s["params"].update(c=jnp.ones(3)),
        "params/c: found nothing, expected float32 [3]",
    ),
    "less": (lambda s: s.pop("skipped"), "skipped: found int32 [], expected nothing"),
}


@pytest.mark.parametrize("how", OTHERS)
def test_a_checkpoint_of_another_model_is_refused(folder, how):
    change, says = OTHERS[how]
    c, like = Checkpoints(str(folder)), state()
    change(like)
    with pytest.raises(UserError, match=re.escape(says)):
        c.restore(like)
    assert c.restore(state())[2] == 3  # it is no damage: it stays where it is
    c.close()


def test_the_best_is_kept(tmp_path):
    c = Checkpoints(str(tmp_path))
    for step in (0, 5):
        c.save_best(step, state(step)["params"], {"score": 0.1, "step": step})
    params, meta, step = c.restore_best(state()["params"])
    assert (step, meta["step"]) == (5, 5) and same(params, state(5)["params"])
    c.wait()
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


KINDS = {
    "float32": np.random.default_rng(0).standard_normal((6, 4, 5)).astype(np.float32),
    "bfloat16": np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16),
    "nan": np.array([np.nan, -np.nan, np.inf, -0.0, 0.0, 1e-45], np.float32),
    "bool": np.array([True, False, True]),
    "keys": np.array([[0, 2**32 - 1], [7, 2**31]], np.uint32),
    "int8": np.arange(-3, 3, dtype=np.int8),
    "scalar": np.float32(3.5),
    "none": np.zeros((0, 3), np.float32),
}


def test_the_hash_is_the_same_on_the_device_and_in_numpy(monkeypatch):
    kinds = {k: x for k, x in KINDS.items() if x.size}
    hashes = array_hash.hash_arrays({k: jnp.asarray(x) for k, x in kinds.items()})
    assert hashes == {k: array_hash.hash_host_array(x) for k, x in kinds.items()}
    assert len(set(hashes.values())) == len(kinds) and all(
        re.fullmatch("[0-9a-f]{16}", h) for h in hashes.values()
    )
    monkeypatch.setattr(array_hash, "_CHUNK", 7)
    assert hashes == {k: array_hash.hash_host_array(x) for k, x in kinds.items()}
    with jax.enable_x64(True):
        wide = {"f": np.linspace(0, 1, 12).reshape(3, 4), "i": np.arange(-3, 3) * 2**40}
        assert array_hash.hash_arrays({k: jnp.asarray(x) for k, x in wide.items()}) == {
            k: array_hash.hash_host_array(x) for k, x in wide.items()
        }


def test_the_hash_sees_every_bit_and_every_place():
    x = KINDS["float32"]
    variants = [
        x,
        x[::-1],
        x[:, ::-1],
        np.roll(x, 1),
        x.transpose(0, 2, 1),
        np.zeros_like(x),
        np.zeros_like(x)[1:],
    ]
    for bit in range(32):
        flipped = x.copy()
        flipped.view(np.uint32).reshape(-1)[77] ^= 1 << bit
        variants.append(flipped)
    assert len({array_hash.hash_host_array(v) for v in variants}) == len(variants)
    assert array_hash.hash_host_array(KINDS["nan"][3:4]) != array_hash.hash_host_array(
        KINDS["nan"][4:5]
    )  # -0.0 and 0.0


def test_every_kind_of_leaf(tmp_path):
    tree = {"host": dict(KINDS), "device": [jnp.asarray(x) for x in KINDS.values()]}
    c = Checkpoints(str(tmp_path), about={"git_sha": "abc", "config": {"lr": 0.1}})
    c.save(7, tree, {"tuple": (1, 2), "nan": float("nan")})
    got, meta, _ = c.restore(jax.tree.map(jnp.asarray, tree))
    assert meta["tuple"] == [1, 2] and np.isnan(meta["nan"])
    c.close()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and np.asarray(a).tobytes() == np.asarray(
            b
        ).tobytes()
    contents = json.loads((tmp_path / "checkpoints/last/7/contents/metadata").read_text())
    assert contents["about"] == {"git_sha": "abc", "config": {"lr": 0.1}}
    assert contents["arrays"]["host/keys"] == [
        "uint32",
        [2, 2],
        array_hash.hash_host_array(KINDS["keys"]),
    ]


@pytest.fixture
def held(monkeypatch):
    """Saves are not through before this event is set."""
    event, check = threading.Event(), checkpoint_folder.find_problem
    monkeypatch.setattr(
        checkpoint_folder, "find_problem", lambda folder: event.wait(60) and check(folder)
    )
    yield event
    event.set()


def test_a_donated_step_may_follow_a_save_at_once(tmp_path, held):
    step = jax.jit(
        lambda s: jax.tree.map(lambda x: (x * 0 - 1).astype(x.dtype), s), donate_argnums=0
    )
    make = jax.jit(lambda: {"large": jnp.arange(4_000_000, dtype=jnp.float32), "n": jnp.int32(5)})
    c, now = Checkpoints(str(tmp_path)), make()
    c.save(1, now, {})
    for _ in range(3):
        now = jax.block_until_ready(step(now))
    c.poll()
    assert c.last_save is None  # it came back before it was through
    held.set()
    c.wait()
    facts = c.last_save
    assert (facts["name"], facts["step"], facts["bytes"]) == ("last", 1, 16_000_004)
    assert 0 < facts["blocked_seconds"] < facts["seconds"]
    assert same(c.restore(now)[0], make())
    c.close()


def test_what_did_not_read_back_is_set_aside(folder, monkeypatch, capsys):
    check = checkpoint_folder.find_problem

    def damaged(path):
        damage(Path(path), "cut off")
        return check(path)

    c = Checkpoints(str(folder), keep=1)
    monkeypatch.setattr(checkpoint_folder, "find_problem", damaged)
    c.save(4, state(4), {})
    c.wait()
    assert "last/4 was written, but it does not read back" in capsys.readouterr().out
    assert (folder / "checkpoints" / "damaged_last_4").is_dir()
    monkeypatch.setattr(checkpoint_folder, "find_problem", check)
    assert c.restore(state())[2] == 3
    c.save(5, state(5), {})
    c.close()
    assert os.listdir(folder / "checkpoints" / "last") == ["5"]  # and now keep=1 holds


def test_the_check_comes_past_every_array(tmp_path, monkeypatch):
    c = Checkpoints(str(tmp_path))
    c.save(0, {"a": jnp.ones(3), "b": {"c": jnp.zeros(2), "d": jnp.int32(1)}}, {})
    c.close()
    seen, of_host = set(), array_hash.hash_host_array
    monkeypatch.setattr(array_hash, "hash_host_array", lambda x: seen.add(x.shape) or of_host(x))
    path = tmp_path / "checkpoints" / "last"
    for step in range(12):
        os.rename(next(path.glob("[0-9]*")), path / str(step))
        assert checkpoint_folder.find_problem(str(path / str(step))) is None
    assert seen == {(3,), (2,), ()}


@contextlib.contextmanager
def full_disk():
    """Files of this process end at 64 KiB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Many arrays: once one of them cannot be written, Orbax lets go of the others while they are on their way.
BIG = {
    f"{i}": np.random.default_rng(i).standard_normal(50_000).astype(np.float32) for i in range(30)
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["poll", "wait", "save", "save_best", "restore", "close"])
def test_a_failed_save_is_heard_of(tmp_path, where, capfd, caplog):
    gc.freeze()  # what other tests have traced, which takes seconds to look through
    c = Checkpoints(str(tmp_path))
    c.save(1, {k: x + 1 for k, x in BIG.items()}, {})
    c.wait()

    def next_call():
        if where == "poll":
            while True:
                c.poll()
        args = {"save": (3, BIG, {}), "save_best": (3, BIG, {}), "restore": (BIG,)}.get(where, ())
        getattr(c, where)(*args)

    with full_disk():
        c.save(2, BIG, {})
        with pytest.raises(SaveFailedError) as e:
            next_call()
    says = "the checkpoint of step 2 could not be saved: File too large; those before it are not touched"
    assert isinstance(e.value, RunFailedError) and isinstance(e.value, RuntimeError)
    assert str(e.value) == f"{tmp_path}/checkpoints/last: {says}"
    gc.collect()  # of tasks, which say what nobody has asked them
    assert capfd.readouterr().err == "" and not caplog.records  # no traceback of a thread
    assert os.listdir(tmp_path / "checkpoints" / "last") == ["1"]  # nor half a checkpoint
    if where != "close":  # and the next one, with space again, is as good as any
        assert c.restore(BIG)[2] == 1
        c.save(2, BIG, {})
        assert c.restore(BIG)[2] == 2
    c.close()


def test_a_folder_that_cannot_be_written_is_found_out_at_once(folder, monkeypatch):
    def refuse(*_):
        raise OSError(30, os.strerror(30))

    c = Checkpoints(str(folder))
    monkeypatch.setattr(checkpoints, "open", refuse, raising=False)
    with pytest.raises(
        SaveFailedError,
        match="checkpoints/best: .* step 4 could not be saved: Read-only file system;",
    ):
        c.save_best(4, state(4), {})
    assert c.restore(state())[2] == 3
    c.close()


def test_the_best_outlives_a_kill_at_any_moment(tmp_path, monkeypatch):
    """Copies of the folder, before and after everything that a save moves or removes: in each is a best that loads."""
    copies = []

    def watched(do):
        def act(*args, **options):
            for then in (lambda: do(*args, **options), lambda: None):
                copies.append(tmp_path / f"copy{len(copies)}")
                shutil.copytree(tmp_path / "run", copies[-1])
                then()

        return act

    c = Checkpoints(str(tmp_path / "run"))
    c.save_best(3, state(3), {"score": 3})
    c.wait()
    monkeypatch.setattr(checkpoints.os, "replace", watched(os.replace))
    monkeypatch.setattr(checkpoints.shutil, "rmtree", watched(shutil.rmtree))
    for step, score in (
        (5, 5),
        (5, 6),
        (4, 7),
    ):  # a new best; the same step once more; one of a run that was resumed
        c.save_best(step, state(score), {"score": score})
        c.wait()
        assert list(c.best.all_steps()) == [step]
    c.close()
    monkeypatch.undo()
    assert len(copies) >= 10
    found = set()
    for copy in copies:
        c = Checkpoints(str(copy))
        got, meta, _ = c.restore_best(state())
        assert same(got, state(meta["score"]))
        found.add(meta["score"])
        c.close()
        assert not [
            p for p in os.listdir(copy / "checkpoints") if p not in ("last", "best")
        ]  # tidied
    assert found == {5, 6, 7}


def test_on_another_mesh(tmp_path):
    """A program with four fake devices restores what one device has saved, donates it and saves; one reads it again."""
    c = Checkpoints(str(tmp_path))
    c.save(1, mesh.on_devices(mesh.definition(1)), {"score": 0.1})
    c.save_best(1, mesh.on_devices(mesh.definition(1)["params"]), {"best": True})
    c.close()
    mesh.run("restore", tmp_path, 1, processes=1, devices=4, best=1)
    c = Checkpoints(str(tmp_path))
    got, meta, step = c.restore(mesh.on_devices(mesh.definition(0)))
    assert (step, meta) == (2, {"score": 0.2})
    mesh.assert_same(got, mesh.definition(2))
    c.close()
