"""One SFT step (forward, backward, AdamW), cxr_jax against transformers on torch: same weights, tokens, machine.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. python benchmarks/sft_step.py [--shape tiny]

Needs the environment of tests/oracle/requirements.txt for the peer (--peer_python), or --no_peer. Ours is the joint
step of `cxr_jax.sft.loop` without the located loss, with patch preparation, clipping and the guard against non-finite
gradients; the peer has none of these. On an accelerator: --shape 3b --dtype bfloat16 --remat full --no_peer
--peak_tflops N.

Measured 2026-11-26, 2 cores of an AMD EPYC (Zen 5), jax 0.10.2, torch 2.13.0, transformers 5.23.0, load average below
2.2; medians, 8 rows of 264 tokens with a 224 px image, 128 of them labelled:

                                  step, s    against    GFLOP/s    of our 2048^3 product    peak GiB
    tiny (4.7 M), 7 rounds
      cxr_jax                       0.242       1.7x        238      50% of 473              1.52
      transformers                  0.417                            (its product: 218)      0.81
    small (124 M), 3 rounds
      cxr_jax                       3.71        2.4x        372      79% of 469              5.30
      transformers                  8.96                             (its product: 219)      4.02

Goals: 1x the peer, 70 % of the product's rate. Losses of the first step agree to 1e-7, gradient norms to 1e-5. tiny
misses the second goal: its products run at the full rate, but with 256 features all that lies between them (softmax,
norms, rotary, transposes for attention and for weight gradients) takes as long again.
"""

import argparse
import statistics

import _common as common
import numpy as np


def flops(model_config, batch: int, prompt: int, completion: int, patches: int) -> dict:
    """FLOPs of one step's matrix products by part: 2 for a multiply and add, three times the forward pass.

    Per image of P patches, w = P in full blocks and patches a window in the others, D wide, F hidden:
      blocks 2 P (4 D^2 + 3 D F) + 4 P w D each; merger 2 (P/4) (16 D^2 + 4 D out); patch embedding 2 P (patch_dim D),
      twice only, for pixels need no gradient.
    Per row of T = prompt + completion tokens, H heads and K key heads of d:
      layers 2 T (D (2 H + 2 K) d + 3 D F) + 4 H d T (T + 1) / 2 each (a token sees those before it only);
      output 2 completion D V: tokens without a label need none.
    """
    v, t = model_config.vision, model_config.text
    P, D, F = patches, v.hidden_size, v.intermediate_size
    window = min(P, (v.window_size // v.patch_size) ** 2)
    seen = sum(P if i in v.fullatt_block_indexes else window for i in range(v.depth))
    merged = D * v.merge_unit
    tower = (
        v.depth * 2 * P * (4 * D**2 + 3 * D * F)
        + 4 * P * D * seen
        + 2 * P // v.merge_unit * (merged**2 + merged * v.out_hidden_size)
    )
    T, D, F, heads = (
        prompt + completion,
        t.hidden_size,
        t.intermediate_size,
        t.num_attention_heads * t.head_dim,
    )
    kv = t.num_key_value_heads * t.head_dim
    linear = 2 * T * (D * (2 * heads + 2 * kv) + 3 * D * F)
    layers = t.num_hidden_layers * (linear + 4 * heads * T * (T + 1) // 2)
    return {
        "vision": batch * (3 * tower + 2 * 2 * P * v.patch_dim * v.hidden_size),
        "decoder": batch * 3 * layers,
        "output": batch * 3 * 2 * completion * D * t.vocab_size,
    }


class Ours:
    """Our worker: the joint step of SFT without the located loss, with the optimizer of experiments/sft.py."""

    def __init__(self, args):
        import jax
        import jax.numpy as jnp

        from cxr_jax.config.sections import OptimizerConfig
        from cxr_jax.inference.model import Model
        from cxr_jax.models import network
        from cxr_jax.models.image_batches import SquareImages
        from cxr_jax.sft import step as sft_step
        from cxr_jax.training.optimizer import init_state, make_optimizer
        from cxr_jax.training.trainable import Trainable
        from cxr_jax.weights import pretrained

        self.config, self.dtype = common.config(args.shape), jnp.dtype(args.dtype)
        params = common.random_params(self.config, self.dtype)
        self.count = network.count(params)
        x = self.inputs = common.prompts(
            Model(self.config, {}, folder=pretrained.PHANTOM, dtype=args.dtype), args.batch
        )
        x["completions"] = np.random.default_rng(1).integers(
            0, common.WORDS, (args.batch, args.completion), np.int32
        )
        both = np.concatenate([x["ids"], x["completions"]], 1)
        self.batch = jax.device_put(
            {
                "image": x["image"],
                "completions": x["completions"],
                "lengths": np.full(args.batch, args.completion, np.int32),
                "mask": np.ones(x["completions"].shape, bool),
                "prompts": {
                    "ids": x["ids"],
                    "lengths": np.full(args.batch, common.PROMPT, np.int32),
                    "positions": network.positions(self.config, both, x["grid"]),
                },
            }
        )
        settings = OptimizerConfig.with_defaults(
            lr=1e-4,
            warmup_steps=1,
            final_fraction=1.0,
            b1=0.9,
            b2=0.99,
            eps=1e-8,
            weight_decay=0.05,
            clip_norm=1.0,
        )
        params = {"model": params}
        trainable = Trainable(dtype=self.dtype, param_dtype=self.dtype)
        optimizer = make_optimizer(settings, 1000)
        self.params, self.state = params, init_state(optimizer, params)
        self.update = sft_step.make_steps(
            self.config,
            optimizer,
            SquareImages(model_config=self.config, grid=x["grid"]),
            trainable,
            micro_batches=args.micro_batches,
            locate_weight=0.0,
            remat=args.remat,
        )[1]
        self.flops = flops(
            self.config, args.batch, common.PROMPT, args.completion, x["pixels"].shape[1]
        )
        self.optimizer = {
            name: getattr(settings, name) for name in ("lr", "b1", "b2", "eps", "weight_decay")
        }

    def facts(self) -> dict:
        return {**common.facts(), "parameters": f"{self.count:,}"}

    def save(self, folder: str) -> dict:
        from cxr_jax.weights import hf_folder

        hf_folder.save(folder, self.config, self.params["model"])
        np.savez(
            f"{folder}/inputs.npz",
            **{k: self.inputs[k] for k in ("pixels", "grid", "ids", "completions")},
        )
        return {}

    def settings(self) -> dict:
        """Of the optimizer, and the step's FLOPs by part."""
        return {"optimizer": self.optimizer, "flops": self.flops}

    def step(self) -> dict:
        self.params = None  # the state, which is donated, holds them
        common.memory(reset=True)

        def run():
            self.state, metrics = self.update(self.state, {}, self.batch)
            self.metrics = {k: float(v) for k, v in metrics.items()}

        seconds = common.clock(run)
        return {
            "seconds": seconds,
            "loss": self.metrics["loss"],
            "norm": self.metrics["grad_norm"],
            "peak": common.memory(),
        }

    def gemm(self) -> dict:
        return {"gflops": common.gemm_gflops(self.dtype)}


def serve(args) -> None:
    ours = Ours(args)
    common.serve(
        {name: getattr(ours, name) for name in ("facts", "save", "settings", "step", "gemm")}
    )


def measure(args, ours, peer) -> None:
    settings = ours("settings")
    sides = {"cxr_jax": ours}
    if peer:
        sides["transformers"] = peer
    step = {
        name: (
            lambda side=side, kw=settings["optimizer"] if side is peer else {}: side("step", **kw)
        )
        for name, side in sides.items()
    }
    first = {name: run() for name, run in step.items()}
    runs, gemm, loads = {name: [] for name in sides}, {name: [] for name in sides}, []
    for r in range(args.rounds):
        loads.append(common.load())
        for name in list(sides)[:: -1 if r % 2 else 1]:
            step[
                name
            ]()  # not counted: a process's first step after a rest finds cold caches and returned memory
            runs[name].append(step[name]())
            gemm[name].append(sides[name]("gemm")["gflops"])
    rows = [
        [
            "",
            "step, s",
            "tokens/s",
            "GEMM GFLOP/s",
            "peak GiB",
            "first step, s",
            "loss",
            "gradient norm",
        ]
    ]
    tokens = args.batch * (common.PROMPT + args.completion)
    for name in sides:
        times = [x["seconds"] for x in runs[name]]
        rows.append(
            [
                name,
                common.spread(times, digits=3),
                common.spread([tokens / t for t in times], digits=0),
                common.spread(gemm[name], digits=0),
                f"{runs[name][-1]['peak']:.2f}",
                f"{first[name]['seconds']:.1f}",
                f"{first[name]['loss']:.6f}",
                f"{first[name]['norm']:.5f}",
            ]
        )
    print(common.table(rows))
    parts, total = settings["flops"], sum(settings["flops"].values())
    best = args.peak_tflops * 1e3 if args.peak_tflops else statistics.median(gemm["cxr_jax"])
    middle = {name: statistics.median(x["seconds"] for x in runs[name]) for name in sides}
    least = {name: min(x["seconds"] for x in runs[name]) for name in sides}
    share = lambda seconds: (
        f"{1e-9 * total / seconds:.0f} GFLOP/s = {1e-9 * total / seconds / best:.0%}"
    )
    print(
        f"cxr_jax: {1e-9 * total:.1f} GFLOP a step ("
        + ", ".join(f"{k} {v / total:.0%}" for k, v in parts.items())
        + f"); {share(middle['cxr_jax'])} of {best:.0f} (fastest step: {share(least['cxr_jax'])})"
    )
    if peer:
        a, b = (first[name]["loss"] for name in sides)
        print(
            f"cxr_jax: {middle['transformers'] / middle['cxr_jax']:.2f}x the peer's speed by the medians, "
            f"{least['transformers'] / least['cxr_jax']:.2f}x by the fastest; losses of the first step agree to "
            f"{abs(a / b - 1):.1e}"
        )
    print("load average in the rounds: " + " ".join(loads))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("tiny", "small", "3b"), default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--completion", type=int, default=128, help="labelled tokens a row")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--micro_batches", type=int, default=1)
    parser.add_argument(
        "--peak_tflops", type=float, help="the device's; without: the product measured in the run"
    )
    common.arguments(parser)
    args = parser.parse_args()
    if args.worker:
        return serve(args)
    with common.workers(parser, args) as (ours, peer, known):
        print(common.header(*known))
        print(
            f"{args.shape}, {args.dtype}, {args.batch} rows of {common.PROMPT} + {args.completion} tokens with an "
            f"image of {common.SIDE} px, labels on the last {args.completion}; median (least-most) of "
            f"{args.rounds} rounds"
        )
        measure(args, ours, peer)


if __name__ == "__main__":
    main()
