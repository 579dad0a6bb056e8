"""plan.py, costs.py, sharding.py: counts against hand arithmetic, and the command as a user calls it."""

import json
import math
import os

import forked
import jax
import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.sharding import PartitionSpec as P

from cxr_jax import plan
from cxr_jax.config.sections import OptimizerConfig, RunConfig
from cxr_jax.errors import UserError
from cxr_jax.models import attention, lora, network
from cxr_jax.models.qwen2_5_vl.config import PHANTOM, QWEN2_5_VL_3B, QWEN2_5_VL_7B
from cxr_jax.planning import costs, films, programs
from cxr_jax.runtime import layout, sharding, trees
from cxr_jax.training import optimizer, trainable
from experiments import rl as rl_config
from experiments import sft as sft_config


def test_flops_count_loops_as_often_as_they_run():
    x, w = jax.ShapeDtypeStruct((8, 16), "float32"), jax.ShapeDtypeStruct((5, 16, 16), "float32")
    one = 2 * 8 * 16 * 16
    scanned = lambda x, w: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0].sum()
    assert costs.flops(scanned, x, w) == 5 * one
    assert (
        costs.flops(jax.grad(scanned, argnums=1), x, w) == 3 * 5 * one
    )  # forward, and one product for each operand
    remat = lambda x, w: jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, w)[
        0
    ].sum()
    assert costs.flops(jax.grad(remat, argnums=1), x, w) == 4 * 5 * one
    until = lambda x, w: jax.lax.while_loop(lambda h: h.sum() < 1, lambda h: h @ w[0], x)
    assert costs.flops(jax.jit(until), x, w, while_trips=[9]) == 9 * one
    batched = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
    assert costs.flops(batched, jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))) == 2 * 3 * 4 * 5 * 6


HLO = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %g = f32[16,8]{1,0} all-gather(%x), dimensions={0}
  %r = bf16[4,8]{1,0} all-reduce(%y), to_apply=%add
}

%yes (p: f32[4]) -> f32[4] {
  ROOT %t = f32[4]{0} all-to-all(%p)
}

%no (p: f32[4]) -> f32[4] {
  ROOT %n = f32[4]{0} negate(%p)
}

ENTRY %main (q: f32[4,8]) -> f32[4,8] {
  %w = (s32[], f32[4,8]) while(%q), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %v = (s32[], f32[4,8]) while(%w), condition=%cond, body=%body
  %c = f32[4]{0} conditional(%i, %a, %b), branch_computations={%no, %yes}
  %k = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%z), dimensions={0}
  ROOT %d = f32[1,8]{1,0} reduce-scatter(%z), to_apply=%add
}
"""


def test_collectives_in_loops_and_branches():
    gather, reduce = 16 * 8 * 4, 2 * 4 * 8 * 2
    turns = 7 + 3  # the compiler knows 7 of the first loop; the caller says 3 of the second
    assert costs.collectives(HLO, 4, while_trips=3).moved == {
        "all-gather": turns * gather + gather,
        "all-reduce": turns * reduce,
        "reduce-scatter": 4 * 8 * 4,
        "all-to-all": 16,
        "collective-permute": 0,
        "between-slices": 0,
    }


def abstract_state(model_config, adapters=None):
    """The train state and what is fixed, of a whole model or of adapters."""
    what = trainable.Trainable(adapters=adapters)
    params = {"model": jax.eval_shape(lambda: network.init_params(model_config, None))}
    tx = optimizer.make_optimizer(OptimizerConfig.with_defaults(), 10)
    return jax.eval_shape(
        lambda p: [
            f(x)
            for f, x in zip(
                (lambda t: optimizer.init_state(tx, t), lambda x: x),
                what.split(p, jax.random.key(0)),
                strict=True,
            )
        ],
        params,
    )


@pytest.mark.parametrize("model_config", [QWEN2_5_VL_3B, QWEN2_5_VL_7B], ids=["3B", "7B"])
@pytest.mark.parametrize(
    "adapters", [None, lora.Lora(16, 32.0, tuple(lora.TARGETS))], ids=["full", "LoRA"]
)
def test_every_array_has_a_place_on_published_meshes(model_config, adapters):
    state, fixed = abstract_state(model_config, adapters)
    for fsdp, tensor in ((8, 1), (64, 1), (256, 1), (16, 4)):
        sizes = {"data": 1, "fsdp": fsdp, "tensor": tensor}
        held = 0
        for path, x in jax.tree_util.tree_leaves_with_path(fixed if adapters else state["params"]):
            spec = sharding.partition_spec("model/" + trees.path_string(path), x.shape, sizes)
            held += x.size / math.prod(sizes[axis] for axis in spec if axis)
        # All but norms, biases and, over `tensor`, the vision tower is divided by all devices.
        ideal = network.count(jax.eval_shape(lambda: network.init_params(model_config, None))) / (
            fsdp * tensor
        )
        assert ideal <= held < ideal * (1.6 if tensor > 1 else 1.02 if fsdp <= 64 else 1.06), (
            fsdp,
            tensor,
        )
        for path, x in jax.tree_util.tree_leaves_with_path(state):
            sharding.partition_spec(trees.path_string(path), x.shape, sizes)


def test_moments_follow_their_parameters():
    state = abstract_state(QWEN2_5_VL_3B)[0]
    sizes = {"data": 1, "fsdp": 8, "tensor": 2}
    specs = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = trees.path_string(path)
        if name.endswith("text/layers/mlp/down/kernel"):
            specs[name] = sharding.partition_spec(name, x.shape, sizes)
    assert len(specs) == 3 and set(specs.values()) == {P(None, "tensor", "fsdp")}


def test_what_has_no_place_is_refused():
    sizes = {"data": 1, "fsdp": 8, "tensor": 3}
    with pytest.raises(
        UserError,
        match=r"layers/attn/q/kernel \[36, 2048, 2048\]: 2048 does not divide by tensor=3",
    ):
        sharding.partition_spec("text/layers/attn/q/kernel", (36, 2048, 2048), sizes)
    with pytest.raises(UserError, match="no rule covers the parameter text/new/kernel"):
        sharding.partition_spec("text/new/kernel", (2, 2), sizes)


@pytest.mark.parametrize("experiment", [sft_config, rl_config], ids=["sft", "rl"])
def test_all_arguments_of_all_programs_are_placed(experiment):
    """On a mesh of one device, which every machine has. Bytes by what they hold add up to the arguments."""
    mesh = layout.make_mesh(1, 1, 1, jax.devices()[:1])
    for config in (experiment.get_config(), experiment.get_config("nv_reason_3b")):
        for name, _, arguments, _, tokens, waiting in programs.programs(
            RunConfig.from_config(config)
        ):
            placed = programs.place(arguments, mesh)
            held, leaves = programs.parts(placed, mesh), jax.tree.leaves(placed)
            assert (
                sum(held.values()) == sum(x.size * x.dtype.itemsize for x in leaves) and tokens > 0
            ), name
            held = programs.parts(programs.place({**placed, "waiting": waiting}, mesh), mesh)
            if config.model == "":  # the published shape
                assert 4 * 3_754_622_976 <= held["parameters"] < 4.001 * 3_754_622_976
            assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=1e-3), (
                name
            )  # in every program


def test_every_film_of_a_prompt_is_planned():
    """Abstract shapes: nothing is compiled."""

    def shapes(**data):
        config = sft_config.get_config()
        config.data.update(data)
        planned = programs.Shapes(RunConfig.from_config(config))
        return planned, planned.batch(2)

    one, batch_of_one = shapes()
    two, batch = shapes(views=("frontal", "lateral"))
    assert batch["image"].shape == (2, 2, *batch_of_one["image"].shape[1:])
    assert (
        two.prompt_width > one.prompt_width + 60
    )  # the tokens of a film of 224 pixels, and more words
    native = {"source": "files", "max_pixels": 224**2}
    single, three = shapes(**native), shapes(**native, images="frontal,lateral,prior")
    tokens = [planned.images.image_tokens for planned, _ in (single, three)]
    assert tokens == [64, 192]
    levels = [batch["images"]["levels"].shape[1] for _, batch in (single, three)]
    assert levels[1] > 2.9 * levels[0] and three[0].prompt_width > single[0].prompt_width + 120


NO_LLVM = "--xla_backend_optimization_level=0"
PLAN = (
    "--config=experiments/sft.py",
    "--devices=2",
    "--hbm_gib=0.001",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=2",
)


@pytest.fixture(scope="module")
def commands():
    """{arguments: (exit code, stdout, stderr)}."""
    lists = [PLAN, FILM, *(tuple(args) for args, _ in BAD)]
    # What is counted is XLA's; LLVM, which would take a quarter of the time, changes none of it.
    env = os.environ | {"XLA_FLAGS": NO_LLVM}
    return dict(zip(lists, forked.calls(lists, module="cxr_jax.plan", env=env), strict=True))


def test_a_plan_on_devices_that_are_not_there(commands):
    """Argument bytes are exact: half of the matrices, and all of the rest, on each of two devices."""
    code, out, err = commands[PLAN]
    assert (code, err) == (1, "")
    assert (
        "random:phantom, sft, computed in float32, on 2 device(s): data 1 x fsdp 2 x tensor 1"
        in out
    )
    assert "films, read at 224 x 224: 256 patches, 64 image tokens" in out
    assert "SFT step: 4,784 tokens" in out and "moved a step: all-gather" in out
    model = network.count(jax.eval_shape(lambda: network.init_params(PHANTOM, None)))
    assert (
        f"{model * 4 / 2 / 2**30:.2f} GiB  parameters" in out
        and f"{model * 4 / 2**30:.2f} GiB  optimizer" in out
    )
    assert out.splitlines()[-1].startswith("does not fit: SFT step needs ")


def test_the_plan_of_a_reading_says_the_film_its_patches_and_the_peak(commands):
    code, out, err = commands[FILM]
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["name"] for row in rows] == ["vision", "prompt", "decode"]
    for row in rows:
        assert (row["film"], row["resized"]) == ([2544, 3056], [84, 84])
        assert (row["patches"], row["image_tokens"]) == (36, 9)
        assert row["peak"] == sum(row["bytes"].values()) and row["flops"] > 0
    assert rows[0]["bytes"]["batch"] == 36 * 1176 * 4


def reading(size, max_pixels=None, model="", **keys):
    config = sft_config.get_config("nv_reason_3b")
    config.update(model=model, **keys)
    return films.FilmReading(RunConfig.from_config(config), size, max_pixels)


def test_a_full_size_film_at_published_settings_in_the_plan():
    """2,544 x 3,056 is below the published max_pixels; the published recipe's own limit is 476 x 476."""
    film = reading((2544, 3056)).film
    assert film == ((2544, 3056), (2548, 3052), 39676, 9919)
    assert str(film) == (
        "film of 2,544 x 3,056 pixels, read at 2,548 x 3,052: 39,676 patches, 9,919 image tokens"
    )
    limited = reading((2544, 3056), 476**2).film
    assert limited.resized == (420, 504) and limited.image_tokens == 270
    assert reading((4000, 5000)).film.resized == (3192, 4004)  # 12,845,056 pixels at most
    with pytest.raises(UserError, match="more than the 4096 positions of the model"):
        reading((2544, 3056), model="random:phantom")


def test_the_plan_counts_the_memory_of_scores_that_cpu_kernels_hide(monkeypatch):
    """Vision of 4,356 patches: scores of all of them, or by blocks. Both are in the plan's temporary memory."""
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 2**22)
    made = reading((924, 924), model="random:phantom", max_completion=64)
    program = made.programs()[0]
    assert made.film.patches == 4356
    all_scores = PHANTOM.vision.num_heads * 4356**2 * 4

    def temporary():
        needs = programs.needs_of(program, program, compiler_options=plan.WITHOUT_HIDDEN_MEMORY)
        return needs.bytes["temporary"]

    assert temporary() < all_scores
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 10**12)
    program = made.programs()[0]
    assert temporary() > all_scores


@pytest.mark.parametrize(
    "text",
    ["2544", "2544x", "x", "2544X3056", "-1x5", "31x31", "1e3x1e3", "99999x99999", "40x4000"],
)
def test_a_film_that_is_none_is_refused(text):
    with pytest.raises(UserError) as error:
        films.parse_size(text)
    assert str(error.value).startswith(f"--film={text}: ") and "\n" not in str(error.value)


FILM = ("--config=evaluate", "--film=2544x3056", "--max_pixels=10000", "--json")


BAD = [
    (["--config=evaluate", "--film=2544"], None),
    (
        ["--config=sft", "--max_pixels=10000"],
        "--max_pixels is for --film; of a run it is --config.data.max_pixels",
    ),
    (
        ["--config=experiments/eval.py"],
        "config.task='evaluate': only sft and rl have steps to plan",
    ),
    (
        ["--config=experiments/sft.py", "--config.mesh.data=-2"],
        "config.mesh.data=-2 must be a whole number >= 1, or -1: what remains",
    ),
    (
        ["--config=experiments/sft.py", "--config.mesh.fsdp=3", "--devices=2"],
        "config.mesh: -1 x 3 x 1 (data x fsdp x tensor; -1: what remains) is not 2 device(s)",
    ),
    (["--config=experiments/sft.py", "--devices=0"], None),
    (["--config=experiments/sft.py", "--config.model=random:9b"], None),
    (
        ["--config=experiments/sft.py", "--config.dtype=float16"],
        "config.dtype='float16' is not one of float32, bfloat16",
    ),
    (
        ["--config=experiments/sft.py", "--devices=32"],
        "16 rows a step in 1 micro-batches are 16 at a time, which do not divide over 32 devices (data x fsdp)",
    ),
    ([], "--config is missing, for example --config=experiments/rl.py"),
    (
        ["--config=sft", "--topology=v5e:3x5"],
        "--topology=v5e:3x5: slices of a v5e are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    ),
    (
        ["--config=sft", "--topology=v5e:2x2", "--devices=4"],
        "--topology says for which devices the plan is: --devices does not go with it",
    ),
    (
        ["--config=sft", "--gpu"],
        "--gpu is about the verdict: say the memory of the GPU, --hbm_gib=80",
    ),
]


# ---- The verdict -----------------------------------------------------------------------------------


def said_of(capsys, gib, hbm_gib, more=(), **flags_given):
    """(exit code, the line) of the verdict on a program that needs so many GiB."""
    sizes = {"parameters": round(gib * 2**30) - 2**20, "code": 2**20}
    needs = [programs.Needs("step", sizes, 0, 0, {}, {}), *more]
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(hbm_gib=hbm_gib, **flags_given):
        memory = plan.memory_of_device()
        return plan.print_verdict(needs, memory), capsys.readouterr().out.strip()


def test_a_verdict_says_what_a_gpu_keeps_from_arrays(capsys, monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    # 20.9 GiB are below 24, and above the 18 that JAX would give them there.
    on_any = said_of(capsys, 20.9, 24.0)
    assert on_any[0] == 0 and "fits: 20.9 of 24 GiB" in on_any[1]
    assert "on a GPU, arrays get 18 of them unless XLA_CLIENT_MEM_FRACTION=0.88 is set" in on_any[1]
    assert said_of(capsys, 17.9, 24.0) == (0, "fits: 17.9 of 24 GiB (step)")
    code, line = said_of(capsys, 20.9, 24.0, gpu=True)
    assert code == 1 and "a device has 18 GiB (JAX's share of 24 on a GPU)" in line
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.88")
    assert said_of(capsys, 20.9, 24.0, gpu=True)[0] == 0
    for bad in ("x", "0", "1.5", "nan", "-1"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", bad)
        with pytest.raises(UserError, match="must be a share"):
            plan.gpu_share()


def test_the_code_of_all_programs_stays_loaded(capsys):
    other = programs.Needs("other", {"temporary": 2**20, "code": 2**30}, 0, 0, {}, {})
    assert said_of(capsys, 3.5, 4.0)[0] == 0
    code, line = said_of(capsys, 3.5, 4.0, [other])
    assert code == 1 and "step needs 4.5 GiB" in line


def test_a_program_that_the_compiler_refuses_does_not_fit(capsys):
    film = films.Film(None, (28, 28), 4, 1)
    refused = programs.Needs(
        "RL update", {"parameters": 2**30}, 0, 0, {}, {}, refused="Used 18G of 15.75G hbm."
    )
    fits = programs.Needs("RL rollout", {"temporary": 2**20, "code": 2**20}, 0, 0, {}, {})
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    assert plan.print_plan(film, iter([fits, refused]), 15.0) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "does not fit: RL update: Used 18G of 15.75G hbm."


@pytest.mark.parametrize("args, line", BAD)
def test_bad_usage_is_one_line(commands, args, line):
    code, out, err = commands[tuple(args)]
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert line is None or err == f"error: {line}\n"
