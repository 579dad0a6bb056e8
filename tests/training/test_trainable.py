"""trainable.py: what trains, what stays, in which type; and that parts of a batch sum to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cxr_jax.config.sections import RunConfig
from cxr_jax.data.sources import phantom
from cxr_jax.errors import UserError
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.models import lora, network
from cxr_jax.models.image_batches import SquareImages
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
from cxr_jax.runtime import layout as runtime_layout
from cxr_jax.runtime import trees
from cxr_jax.sft import loop
from cxr_jax.sft import step as sft_step
from cxr_jax.training import conversations, optimizer, targets, train_state
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import pretrained
from experiments import sft as experiment


def leaves(tree):
    return {trees.path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def world():
    """The embedded model and a batch of four phantoms."""
    config = experiment.get_config("continued")
    config.update(dict(batch_size=4, max_completion=160, locate_weight=0.3))
    m = pretrained.load_starting_model(config.model, config.seed)
    source = phantom.PhantomSource("A", "train", 3)
    grid = PROCESSOR.grid(source.size, source.size)
    prompts = inference_prompts.Prompts(m.tokenizer, m.config, grid, config.max_completion)
    batch = loop.make_batch_fn(
        RunConfig.from_config(config),
        source,
        conversations.Examples(
            prompts, targets.Completions(m.tokenizer, config.max_completion), "each"
        ),
    )(0)
    head = sft_step.init_locate_head(jax.random.key(0), m.config.text.hidden_size, 12)
    return config, m, grid, batch, {"model": m.params, "locate": head}


def create(settings):
    return Trainable.create(
        settings.lora, settings.optim.frozen, settings.dtype, settings.param_dtype
    )


def run(world, tx=None, steps=1, **changes):
    """(train before, fixed, state after, metrics, what) of some steps on one batch."""
    config, m, grid, batch, params = world
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    settings = RunConfig.from_config(config)
    what = create(settings)
    train, frozen = what.split(params, jax.random.key(1))
    tx = tx or optax.sgd(1.0)
    state = optimizer.init_state(tx, train)
    before = jax.tree.map(np.array, train)
    step = sft_step.make_steps(
        m.config,
        tx,
        SquareImages(model_config=m.config, grid=grid),
        what,
        micro_batches=settings.micro_batches,
        locate_weight=settings.locate_weight,
        remat=settings.remat,
    )[1]
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    return before, frozen, state, metrics, what


@pytest.fixture(scope="module")
def plain(world):
    return run(world)


def test_frozen_parameters_neither_move_nor_cost(world, plain):
    frozen = ("^model/vision/", "norm1", "embedding")
    before, frozen, state, _, what = run(world, **{"optim.frozen": frozen})
    all_before, _, all_after, _, _ = plain
    kept = leaves(frozen)
    assert all("vision" in k or "norm1" in k or "embedding" in k for k in kept)
    assert not any("vision" in k or "norm1" in k for k in leaves(state["params"]))
    whole = leaves(what.merge(state["params"], frozen))
    assert whole.keys() == leaves(all_before).keys()
    for name, value in whole.items():
        if name in kept:
            np.testing.assert_array_equal(value, leaves(all_before)[name])
        else:  # what trains gets the gradient that it gets when all train
            want = leaves(all_after["params"])[name]
            np.testing.assert_allclose(
                value, want, atol=2e-6 + 1e-4 * np.abs(want - leaves(all_before)[name]).max()
            )


def test_a_frozen_pattern_that_matches_nothing_is_refused(world):
    what = Trainable(frozen_patterns=("visoin",))
    with pytest.raises(UserError, match="config.optim.frozen: 'visoin' matches no parameter"):
        what.split(world[4], None)


def test_lora_trains_adapters_alone(world):
    config, m, grid, batch, params = world
    before, frozen, state, metrics, what = run(
        world, optax.adam(3e-3), 3, **{"lora.rank": 4, "lora.targets": ("decoder", "merger")}
    )
    assert state["params"].keys() == {"locate", "lora"}
    moved = {
        k: not np.array_equal(x, leaves(before)[k]) for k, x in leaves(state["params"]).items()
    }
    assert all(moved.values())
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(state["params"]) < 0.1 * size(frozen)
    merged = what.export_params(state["params"], frozen)
    want = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), m.params)
    changed = {k for k, x in leaves(merged).items() if not np.array_equal(x, leaves(want)[k])}
    own = lora.Lora(4, 32.0, ("decoder", "merger")).paths_in(lora.modules_of(want))
    assert changed == {f"{p}/kernel" for p in own}
    patches = PROCESSOR.patchify(batch["image"])
    see = jax.jit(lambda params: network.vision(params, m.config, patches, grid).tokens)
    joined = what.merge(state["params"], frozen)["model"]
    np.testing.assert_allclose(see(joined), see(merged), atol=1e-4)


def test_lora_with_frozen_patterns_is_refused(world):
    config = world[0].copy_and_resolve_references()
    config.lora.rank, config.optim.frozen = 4, ("vision",)
    with pytest.raises(UserError, match="must be empty with LoRA"):
        create(RunConfig.from_config(config))


def test_parts_of_a_batch_sum_to_the_whole(world, plain):
    """Completions differ in length, so a mean of the parts' means would be something else. Nor does it matter that
    activations are recomputed."""
    lengths = world[3]["mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    before, _, state, metrics, _ = run(world, micro_batches=2, remat="full")
    _, _, want, want_metrics, _ = plain
    for name in want_metrics:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=2e-4, err_msg=name)
    for name, value in leaves(state["params"]).items():
        other, start = leaves(want["params"])[name], leaves(before)[name]
        np.testing.assert_allclose(
            value, other, atol=2e-6 + 1e-4 * np.abs(other - start).max(), err_msg=name
        )


def test_bfloat16(world, plain):
    """The computation and what trains in bfloat16: about the same loss and gradient, masters in float32."""
    _, _, state, metrics, _ = run(world, dtype="bfloat16", param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state["master"])} == {np.dtype(np.float32)}
    for name in ("loss", "locate_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], plain[3][name], rtol=0.05, err_msg=name)
    assert abs(metrics["loss"] / plain[3]["loss"] - 1) > 1e-6  # and it is not float32 after all


def test_nothing_to_train_is_refused(world):
    with pytest.raises(UserError, match="nothing would train"):
        Trainable(frozen_patterns=("",)).split(world[4], None)


def test_a_rank_that_no_matrix_has_is_refused(world):
    with pytest.raises(
        UserError, match=r"lora rank 300 is more than text/layers/attn/q \[192, 192\] can have"
    ):
        Trainable(adapters=lora.Lora(300, 1.0)).split(world[4], jax.random.key(0))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_resume_never_holds_two_states(world, lora_rank, monkeypatch):
    """The checkpoint is read before a fresh state is made, from shapes alone."""
    config = experiment.get_config()
    config.lora.rank = lora_rank
    settings = RunConfig.from_config(config)
    what, tx = create(settings), optimizer.make_optimizer(settings.optim, settings.steps)
    params = world[4]
    made, real = [], optimizer.init_state
    concrete = lambda tree: not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
    monkeypatch.setattr(
        train_state,
        "init_state",
        lambda tx, p: (made.append("state") if concrete(p) else 0, real(tx, p))[1],
    )

    class Checkpoints:
        def __init__(self, found):
            self.found = found

        def restore(self, like):
            assert not made and all(
                isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(like)
            )
            self.like = like
            return self.found

    def layout_state(tree):
        made.append(tree)
        return tree

    layout = runtime_layout.Layout(None)
    layout.state = layout_state
    first = Checkpoints(None)
    start = train_state.train_state(params, what, tx, layout, first, seed=config.seed)
    state, train, frozen = start.state, start.train, start.frozen
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert (start.meta, start.step) == ({}, 0) and describe(first.like) == describe(state)
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal,
            what.merge(train, frozen)["model"]["vision"],
            what.merge(state["params"], frozen)["model"]["vision"],
        )
    )
    made.clear()
    checkpoints = Checkpoints(("theirs", {"seconds": 1.0}, 7))
    got = train_state.train_state(params, what, tx, layout, checkpoints, seed=config.seed)
    assert (got.state, got.train) == ("theirs", None)
    assert (got.meta, got.step) == ({"seconds": 1.0}, 7)
    assert [x is got.frozen for x in made] == [True]  # and of all that a start makes, what is fixed
