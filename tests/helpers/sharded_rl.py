"""A program that test_compaction.py starts: sampling and learning over four fake devices equal those of one."""

import os

import fast_compile

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {fast_compile.FLAGS}"

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import tiny_model
from oracle import shared_learner
from tiny_model import CFG, STOP, N, T, V, config

from cxr_jax.config.sections import RunConfig
from cxr_jax.errors import UserError
from cxr_jax.inference import compaction, sampling
from cxr_jax.models import network
from cxr_jax.planning import costs, programs
from cxr_jax.runtime import layout
from cxr_jax.weights import hf_folder
from experiments import rl as rl_config

PROMPTS, GROUP = 8, 2


def check_sampling():
    compaction.GRAIN, compaction.SHORTEST, compaction.LEAST_ROWS = 4, 8, 4
    rng = np.random.default_rng(1)
    params = tiny_model.draw_params(CFG)
    params["text"]["embed"]["embedding"] *= 25.0
    args = {
        "input_ids": rng.integers(7, 20, (PROMPTS, T)).astype(np.int32),
        "lengths": rng.integers(2, T + 1, PROMPTS).astype(np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (3, PROMPTS, T)),
        "keys": sampling.row_keys(0, PROMPTS * GROUP),
    }

    def sample(args):
        prompts = sampling.PromptBatch(args["input_ids"], args["lengths"], args["positions"])
        settings = sampling.SamplingSettings(n=GROUP, max_new_tokens=N, stop_ids=STOP)
        return sampling.generate(params, CFG, prompts, settings, keys=args["keys"])

    want = jax.tree.map(np.asarray, sample(args))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    rows = {k: spec(None, "data") if k == "positions" else spec("data") for k in args}
    placed = {
        k: jax.device_put(v, jax.sharding.NamedSharding(mesh, rows[k])) for k, v in args.items()
    }
    with jax.set_mesh(mesh):
        program = jax.jit(sample).lower(placed).compile()
        got = program(placed)
    assert np.ptp(want["lengths"]) > 12
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(got[name], want[name])
    # Keys stay on their device: what crosses is small, the counts of rows that are left and the exit.
    moves = r"= \(?\w+\[([\d,]*)\][^=]* (?:all-gather|all-to-all|collective-permute)\("
    shapes = re.findall(moves, program.as_text())
    largest = max(
        (np.prod([int(x) for x in s.split(",") if x], initial=1) for s in shapes), default=0
    )
    assert largest <= PROMPTS * GROUP * max(N, CFG.text.hidden_size), shapes


def check_traffic():
    """FSDP: the rollout fetches the weights once, whatever the number of tokens; the learner's loop over them, too."""
    run_config = rl_config.get_config()
    folder = tiny_model.phantom_folder()
    run_config.update(dict(model=folder, max_completion=64))
    run_config.rl.update(dict(prompts_per_step=4, oversample=1, group_size=2))
    run_config.mesh.update(dict(data=1, fsdp=4))
    mesh = layout.Layout.from_config(run_config.mesh).mesh
    model_config, params = hf_folder.load(folder)
    weights = 4 * network.count(params)
    moved = {}
    for name, step, arguments, *_ in programs.programs(RunConfig.from_config(run_config)):
        with jax.set_mesh(mesh):
            text = step.lower(*programs.place(arguments, mesh).values()).compile().as_text()
        few, many = (sum(costs.collectives(text, mesh.size, n).moved.values()) for n in (1, 1000))
        assert many - few < 1000 * 100, (name, few, many)  # a turn moves flags and counts
        moved[name] = few
        # Pixels stay with their rows, as squares and as patches.
        patch_values = model_config.vision.patch_dim
        gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* (?:all-gather|all-to-all)\(", text)
        assert not any(shape.endswith(f",{patch_values}") for shape in gathered), (name, gathered)
        if (
            name == "RL update"
        ):  # of the loop over chunks of tokens: no gradient of the output matrix
            head = f"f32[{model_config.text.hidden_size},{model_config.text.vocab_size}]"
            loops = [
                line for line in text.splitlines() if "all-reduce(" in line and "while/body" in line
            ]
            assert not any(head in line.replace(" ", "") for line in loops), loops
    assert moved["RL rollout"] < 1.5 * weights, (moved, weights)


def check_key_heads():
    """`tensor` above the key heads: one device's samples, and the collectives of a model that has as many key heads."""
    rng = np.random.default_rng(2)
    prompts = sampling.PromptBatch(
        rng.integers(7, 20, (2, T)).astype(np.int32),
        np.array([T, 2], np.int32),
        np.broadcast_to(np.arange(T, dtype=np.int32), (3, 2, T)),
    )
    settings = sampling.SamplingSettings(n=2, max_new_tokens=8, stop_ids=(1,))

    def sample(model_config, params):
        return sampling.generate(
            params, model_config, prompts, settings, keys=sampling.row_keys(0, 4)
        )

    def descend(model_config, params):
        def loss(params):
            both = network.decode_group(
                params,
                model_config,
                network.embed(params, model_config, prompts.input_ids),
                prompts.positions,
                prompts.lengths,
                jnp.ones((4, T, model_config.text.hidden_size)),
                np.broadcast_to(np.arange(T, dtype=np.int32), (3, 4, T)),
            )
            return sum(hidden.sum() for hidden in both)

        return jax.grad(loss)(params)

    calls = {}
    for key_heads in (2, 4):
        text = dict(
            vocab_size=V, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=key_heads
        )
        model_config = config(text=text)
        placed = layout.Layout(layout.make_mesh(1, 1, 4, heads=layout.Heads(4, key_heads)))
        assert str(placed).endswith("(a key head on 2 devices)") == (key_heads == 2)
        params = tiny_model.draw_params(model_config)
        params["text"]["embed"]["embedding"] *= 25.0
        for program in (sample, descend):
            step = jax.jit(functools.partial(program, model_config))
            with jax.set_mesh(placed.mesh):
                compiled = step.lower(placed.state(params)).compile()
                calls[program, key_heads] = costs.collectives(compiled.as_text(), 4, 8).calls
                # Gradients of such a mesh: `check_learner` below.
                if key_heads == 2 and program is sample:
                    pair = compiled(placed.state(params)), step(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *pair)
    assert calls[sample, 2] == calls[sample, 4], calls
    few, enough = calls[descend, 2], calls[descend, 4]
    # Of a layer: the gradients of keys and values are summed over their copies, of prompts and of completions.
    assert few["all-reduce"] <= enough["all-reduce"] + 4, calls
    assert {**few, "all-reduce": 0} == {**enough, "all-reduce": 0}, calls
    assert not any(counts["all-to-all"] + counts["collective-permute"] for counts in calls.values())
    # 6 heads do not divide over 4 devices.
    with contextlib.suppress(UserError):
        layout.make_mesh(1, 1, 4, heads=layout.Heads(6, 2))
        raise AssertionError("6 heads over 4 devices")


if __name__ == "__main__":
    assert jax.device_count() == 4 and jnp.ones(1) == 1
    check_sampling()
    check_traffic()
    check_key_heads()
    # FSDP x tensor; of a model with one key head, so that both devices of `tensor` need it.
    case = dataclasses.replace(shared_learner.case(90, prompts=8), micro_batches=2)
    heads = layout.Heads(4, case.model_config.text.num_key_value_heads)
    assert heads.keys == 1
    shared_learner.check_learner(90, case, layout.make_mesh(1, 2, 2, heads=heads))
