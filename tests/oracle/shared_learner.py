"""The learner's loss and gradients against the plain computation: every completion in a row of its own, with its own
images, its own prompt and whole logits.

    PYTHONPATH=. python tests/oracle/shared_learner.py --shapes 60               # one device
    PYTHONPATH=. python tests/oracle/shared_learner.py --shapes 10 --devices 8   # and the same over 8 fake devices

Random shapes: prompts of several lengths with one to three images, groups of 1 to 5, ragged completions, truncated
ones, micro-batches, tied and untied heads, remat, all aggregations and ratio levels, off-policy log-probs, a reference.
Each shape goes through what the learner is made of (`policy.completion_log_probs`, `losses.policy_loss`,
`optim.accumulate`); those with one image a prompt through `learner.make_learn` itself, too: on-policy, the reference a
model, the gradient read off a step of plain descent.
Asserts in float32 that the loss is within 1e-5 (of the loss, where that is above 1) and that every leaf of the gradient
is within 1e-4 of its norm.
"""

import argparse
import dataclasses
import functools
import os
import sys

if __name__ == "__main__" and "--devices" in sys.argv:
    count = sys.argv[sys.argv.index("--devices") + 1]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cxr_jax.config.sections import PolicyLossConfig, RunConfig
from cxr_jax.models import network
from cxr_jax.models.image_batches import SquareImages
from cxr_jax.models.network.config import Config, TextConfig, VisionConfig
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
from cxr_jax.rl import learner, losses
from cxr_jax.runtime import layout as runtime_layout
from cxr_jax.training import log_probs, optimizer
from cxr_jax.training import micro_batches as training_micro_batches
from cxr_jax.training.trainable import Trainable
from experiments import rl as experiment

GRID, V = (1, 4, 4), 50  # 4 image tokens
IMAGE, PAD = 5, 0
LOSS, GRADIENT = 1e-5, 1e-4


def config(rng) -> Config:
    heads = int(rng.choice([2, 4]))
    return Config(
        vision=VisionConfig(
            depth=2,
            hidden_size=16,
            num_heads=2,
            intermediate_size=24,
            out_hidden_size=32,
            fullatt_block_indexes=(1,),
            window_size=56,
        ),
        text=TextConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=int(rng.choice([1, 2])),
            mrope_section=(16 // heads - 2, 1, 1),
            rope_theta=1e4,
        ),
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        pad_token_id=PAD,
        bos_token_id=PAD,
        eos_token_id=(2,),
        tie_word_embeddings=bool(rng.integers(2)),
    )


@dataclasses.dataclass
class Case:
    """One random batch; `knobs` of `losses.policy_loss`, static."""

    model_config: Config
    params: dict
    data: dict
    knobs: dict
    micro_batches: int
    remat: str


def case(seed: int, prompts: int | None = None) -> Case:
    """The random case of a seed. prompts: their number, if it is given."""
    rng = np.random.default_rng(seed)
    model_config = config(rng)
    P, G, C, images = (int(rng.integers(*bounds)) for bounds in ((1, 5), (1, 6), (2, 9), (1, 4)))
    P = prompts or P
    T = int(rng.integers(6 * images + 1, 6 * images + 7))
    ids, lengths = np.full((P, T), PAD, np.int32), np.zeros(P, np.int32)
    positions = np.ones((3, P, T + C), np.int32)
    for p in range(P):
        words = rng.integers(7, V, int(rng.integers(1, T - 6 * images + 1)))
        row = np.array([*[3, *[IMAGE] * 4, 4] * images, *words])
        ids[p, : len(row)], lengths[p] = row, len(row)
        own = network.positions(
            model_config, np.array([[*row, *[7] * C]], np.int32), [GRID] * images
        )[:, 0]
        positions[:, p, : own.shape[1]] = own
    sizes = rng.integers(1, C + 1, (P, G))
    truncated = rng.random((P, G)) < 0.25
    mask = np.arange(C) < np.where(truncated, C, sizes)[:, :, None]
    train_mask = mask & ~truncated[:, :, None]
    f32 = lambda *shape, scale=1.0: rng.normal(0, scale, shape).astype(np.float32)
    image = rng.random((P, images, 56, 56)).astype(np.float32)
    data = {
        "image": image,
        "pixels": PROCESSOR.patchify(image.reshape(-1, 56, 56), np).reshape(P, images, 16, -1),
        "prompts": {"ids": ids, "lengths": lengths, "positions": positions},
        "tokens": rng.integers(7, V, (P, G, C)).astype(np.int32),
        "mask": mask,
        "train_mask": train_mask,
        # One group in three is flat: nothing of it may be missed where it is not computed.
        "advantages": f32(P, G) * (np.arange(P)[:, None] % 3 > 0),
        "gap": f32(P, G, C, scale=0.2),
        "reference": f32(P, G, C, scale=0.2),
    }
    knobs = dict(
        aggregation=str(rng.choice(["sequence", "token", "constant"])),
        ratio_level=str(rng.choice(["token", "sequence"])),
        clip=str(rng.choice(["ppo", "cispo"])),
        beta=float(rng.choice([0.0, 0.1])),
    )
    params = network.init_params(model_config, jax.random.key(seed))
    params["text"]["embed"]["embedding"] *= (
        20.0  # sharp distributions: a wrong key or position changes much
    )
    micro = int(rng.choice([m for m in range(1, P + 1) if P % m == 0]))
    return Case(model_config, params, data, knobs, micro, str(rng.choice(["none", "full"])))


def _loss(case, logp, part, totals):
    rows = lambda x: x.reshape(-1, x.shape[-1])
    frozen = jax.lax.stop_gradient(rows(logp))
    old, ref = frozen + rows(part["gap"]), frozen + rows(part["reference"])
    return losses.policy_loss(
        rows(logp),
        old,
        part["advantages"].reshape(-1),
        rows(part["train_mask"]),
        PolicyLossConfig.with_defaults(**case.knobs),
        reference_log_probs=ref,
        max_tokens=logp.shape[-1],
        divisors=totals,
    )[0]


def shared(case: Case, data):
    """(loss, gradients) as the learner computes them: features and prompts once, in micro-batches."""

    def part_loss(params, part, totals):
        flat = part["pixels"].reshape(-1, *part["pixels"].shape[2:])
        features = network.vision(params, case.model_config, flat, GRID, remat=case.remat)
        width = case.model_config.text.hidden_size
        features = network.Seen(features.tokens.reshape(len(part["tokens"]), -1, width))
        logp, _ = log_probs.completion_log_probs(
            params,
            case.model_config,
            features,
            part["prompts"],
            part["tokens"],
            part["mask"],
            remat=case.remat,
            chunk=16,
        )
        loss = _loss(case, logp, part, totals)
        return loss, loss

    rows = lambda x: x.reshape(-1, x.shape[-1])
    totals = losses.divisors(
        rows(data["mask"]),
        rows(data["train_mask"]),
        aggregation=case.knobs["aggregation"],
        denominator="trained",
    )
    grad = jax.grad(functools.partial(part_loss, totals=totals), has_aux=True)
    return lambda params: training_micro_batches.accumulate(
        grad, params, training_micro_batches.cut(data, case.micro_batches)
    )


def plain(case: Case, params) -> tuple:
    """(loss, gradients): P * G rows of prompt and completion, nothing shared, whole logits."""
    d, model_config = case.data, case.model_config
    P, G, C = d["tokens"].shape
    T = d["prompts"]["ids"].shape[1]
    ids = np.full((P * G, T + C), PAD, np.int32)
    valid = np.zeros(ids.shape, bool)
    at = np.zeros((P * G, C), np.int32)
    for r in range(P * G):
        p, g = divmod(r, G)
        n, m = d["prompts"]["lengths"][p], d["mask"][p, g].sum()
        ids[r, : n + m] = [*d["prompts"]["ids"][p, :n], *d["tokens"][p, g, :m]]
        valid[r, : n + m] = True
        at[r] = np.minimum(n - 1 + np.arange(C), T + C - 1)
    each = lambda x, axis=0: np.repeat(x, G, axis)

    def loss(params):
        hidden = network.hidden_states(
            params,
            model_config,
            ids,
            valid,
            each(d["prompts"]["positions"], 1),
            each(d["pixels"]),
            grid=GRID,
        )
        logp = jax.nn.log_softmax(network.unembed(params, model_config, hidden), -1)
        logp = jnp.take_along_axis(logp, at[:, :, None], 1)
        logp = jnp.take_along_axis(logp, d["tokens"].reshape(P * G, C, 1), 2)[:, :, 0]
        logp = jnp.where(d["mask"].reshape(P * G, C), logp, 0.0).reshape(P, G, C)
        trained = d["train_mask"].reshape(P * G, C)
        rows = trained.any(1).sum() if case.knobs["aggregation"] == "sequence" else P * G
        return _loss(case, logp, d, losses.Divisors(rows, trained.sum()))

    return jax.jit(jax.value_and_grad(loss))(params)


def compare(name, case, got, want) -> tuple[float, float]:
    """(error of the loss, worst error of a gradient leaf as a share of its norm), asserted."""
    (grads, loss), (want_loss, want_grads) = got, want
    error = abs(float(jnp.sum(loss)) - float(want_loss)) / max(1.0, abs(float(want_loss)))
    assert error <= LOSS, (name, "loss", error)
    norm = float(_norm(want_grads))
    worst = 0.0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True
    ):
        size = max(float(jnp.linalg.norm(b)), 1e-6 * norm, 1e-12)
        share = float(jnp.linalg.norm(jnp.asarray(a) - b)) / size
        # A key's bias has a gradient of 0 in exact arithmetic: what both sides have there is rounding of the others.
        if not jax.tree_util.keystr(path).endswith("['k']['bias']"):
            worst = max(worst, share)
            assert share <= GRADIENT, (name, jax.tree_util.keystr(path), share)
    return error, worst


def _norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def check(seed: int) -> list[tuple[float, float]]:
    """One device."""
    c = case(seed)
    got = jax.jit(lambda params, data: shared(c, data)(params))(c.params, c.data)
    results = [compare(f"seed {seed}", c, got, plain(c, c.params))]
    return results + ([check_learner(seed, c)] if c.data["image"].shape[1] == 1 else [])


RATE = 1e6  # of descent: so large that the gradient can be read off the step


def check_learner(seed: int, c: Case, mesh=None) -> tuple[float, float]:
    """`learner.make_learn` against the plain computation, over the devices of a mesh if there is one."""
    P, G, C = c.data["tokens"].shape
    config = experiment.get_config()
    config.update(dict(max_completion=C, remat=c.remat))
    config.rl.update(
        dict(
            prompts_per_step=P, oversample=1, group_size=G, micro_batches=c.micro_batches, **c.knobs
        )
    )
    other = jax.tree.map(lambda x: x * 1.02, c.params) if c.knobs["beta"] else None
    on_policy = {
        **c.data,
        "gap": np.zeros_like(c.data["gap"]),
        "reference": 0.0 * c.data["reference"],
    }
    if other is not None:  # what `plain` takes is ref - logp
        of = lambda params: shared_logp(c, params)
        on_policy["reference"] = np.asarray(jax.jit(lambda a, b: of(a) - of(b))(other, c.params))
    want = plain(dataclasses.replace(c, data=on_policy), c.params)

    tx = optax.sgd(RATE)
    settings = RunConfig.from_config(config)
    trainable = Trainable.create(
        settings.lora, settings.optim.frozen, settings.dtype, settings.param_dtype
    )
    learn = learner.make_learn(
        settings.learner,
        settings.loss,
        c.model_config,
        SquareImages(model_config=c.model_config, grid=GRID),
        {"suppress": ()},
        tx,
        trainable,
        max_completion=C,
        remat=c.remat,
    )
    batch = {"image": c.data["image"][:, 0], "prompts": c.data["prompts"]}
    ro = {k: c.data[k] for k in ("tokens", "mask", "train_mask", "advantages")}
    ro |= {
        "lengths": c.data["mask"].sum(-1),
        "sampler_log_probs": np.zeros((P, G, C), np.float32),
        "kept": np.arange(P),
    }
    state = optimizer.init_state(tx, {"model": jax.tree.map(jnp.array, c.params)})
    layout = runtime_layout.Layout(mesh)
    rows = layout.batch({"batch": batch, "ro": {k: v for k, v in ro.items() if k != "kept"}})
    ro = {**rows["ro"], "kept": ro["kept"]}
    state, metrics = layout.on_mesh(learn)(layout.state(state), {}, rows["batch"], ro, other)
    grads = jax.tree.map(lambda a, b: (a - b) / RATE, c.params, state["params"]["model"])
    return compare(f"seed {seed}, make_learn", c, (grads, metrics["loss"]), want)


def shared_logp(c: Case, params):
    """Log-probs [P, G, C] of a case with one image a prompt."""
    features = network.vision(params, c.model_config, c.data["pixels"][:, 0], GRID)
    return log_probs.completion_log_probs(
        params, c.model_config, features, c.data["prompts"], c.data["tokens"], c.data["mask"]
    )[0]


def check_sharded(seed: int, devices: int) -> list[tuple[float, float]]:
    """By GSPMD, rows over the mesh as a run has them, and by shard_map with the gradients summed by hand."""
    c = dataclasses.replace(case(seed, prompts=2 * devices), micro_batches=2)
    want = plain(c, c.params)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    rows = {k: spec("data") for k in c.data if k != "prompts"}
    rows["prompts"] = {
        "ids": spec("data"),
        "lengths": spec("data"),
        "positions": spec(None, "data"),
    }
    place = lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh, s))
    data, params = jax.tree.map(place, c.data, rows), place(c.params, spec())
    with jax.set_mesh(mesh):
        got = jax.jit(lambda params, data: shared(c, data)(params))(params, data)
    results = [compare(f"seed {seed}, {devices} devices, GSPMD", c, got, want)]

    one = dataclasses.replace(c, micro_batches=1)

    def part(params, data, whole):
        # The divisors are those of the whole batch, so each device's loss is its share of the sum.
        rows = lambda x: x.reshape(-1, x.shape[-1])
        totals = losses.divisors(
            rows(whole["mask"]),
            rows(whole["train_mask"]),
            aggregation=c.knobs["aggregation"],
            denominator="trained",
        )

        def loss(params):
            flat = data["pixels"].reshape(-1, *data["pixels"].shape[2:])
            features = network.vision(params, c.model_config, flat, GRID, remat=c.remat)
            width = c.model_config.text.hidden_size
            features = network.Seen(features.tokens.reshape(len(data["tokens"]), -1, width))
            logp, _ = log_probs.completion_log_probs(
                params,
                c.model_config,
                features,
                data["prompts"],
                data["tokens"],
                data["mask"],
                remat=c.remat,
                chunk=16,
            )
            return _loss(one, logp, data, totals)

        value, grads = jax.value_and_grad(loss)(params)
        return jax.lax.psum((grads, value), "data")

    masks = {k: np.asarray(c.data[k]) for k in ("mask", "train_mask")}
    mapped = jax.shard_map(
        part, mesh=mesh, in_specs=(spec(), rows, spec()), out_specs=spec(), check_vma=False
    )
    got = jax.jit(mapped)(params, data, masks)
    results.append(compare(f"seed {seed}, {devices} devices, shard_map", c, got, want))
    if c.data["image"].shape[1] == 1:
        for mesh in (
            runtime_layout.make_mesh(devices, 1, 1),
            runtime_layout.make_mesh(1, devices, 1),
        ):  # copies of the weights; FSDP
            results.append(check_learner(seed, c, mesh))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=int, default=60)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    errors = []
    for seed in range(args.seed, args.seed + args.shapes):
        errors += check(seed) if args.devices == 1 else check_sharded(seed, args.devices)
    loss, gradient = (max(e[i] for e in errors) for i in range(2))
    print(
        f"{args.shapes} shapes, {args.devices} device(s), {len(errors)} comparisons: worst error of the loss "
        f"{loss:.1e} (<= {LOSS}), of a gradient leaf {gradient:.1e} of its norm (<= {GRADIENT})"
    )


if __name__ == "__main__":
    main()
