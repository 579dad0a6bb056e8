"""One RL step (rollout, reward, learning), cxr_jax against TRL on torch and tunix: same weights, prompts, images.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. python benchmarks/grpo_step.py [--side 476 224 0]

--side 0 has no image: there tunix is compared, too. Needs the environments .venv-trl022, .venv-trl
(tests/oracle/requirements-trl*.txt and Pillow) and .venv-tunix (requirements-tunix.txt beside this file), or --peers
for some of them, or --no_peer. Every completion has exactly --completion tokens, on all sides. Ours is the shipped step
of `cxr_jax.rl` with all rewards; the peers' reward is one cheap Python function. On an accelerator: --shape 3b --dtype
bfloat16 --remat full --group 16 --prompts 64 --micro_batches N --no_peer --peak_tflops N --peak_gbps N.

2026-11-26, AMD EPYC (Zen 5), 2 cores, jax 0.10.2, torch 2.13.0, Python 3.11.7, load 1.6 to 1.9, `--rounds 3`:
4,683,904 parameters, float32, 4 prompts x 8 completions of 128 tokens; seconds, median (least-most)

                                    cxr_jax           TRL 0.22.2          TRL 1.16.0          tunix 0.1.7
476 px, prompts of 355  step        1.35 (1.30-1.93)  10.84 (10.3-11.9)   11.59 (11.5-12.0)
                        rollout     0.46              3.15                3.23
                        learning    0.90              7.68                8.66
                        peak GiB    2.89              4.82                5.56
                        ours is                       8.0x                8.6x
224 px, prompts of 130  step        0.81 (0.77-1.39)  3.68 (2.98-3.73)    4.30 (4.10-4.34)
                        ours is                       4.5x                5.3x
text, prompts of 100    step        0.78 (0.77-1.31)  2.42 (2.04-2.56)    2.88 (2.62-3.12)    1.61 (1.48-1.99)
                        ours is                       3.1x                3.7x                2.07x

By the fastest steps: 7.9x and 8.9x, 3.9x and 5.4x; 1.91x tunix. Three programs are compiled in the first step, none
afterwards. The reward, all terms, is 0.2 to 0.4 % of a step. FLOPs at 476 px: 226 a step, 3.8 times as much if nothing
is shared. Ours computes at 27 % (rollout) and 42 % (learning) of the rate of a 2048^3 product, 466 GFLOP/s (torch here
has 213): what is left is decoding, 2.3 ms a token of 32 rows where the products need 0.6, and the attention of one
whole-image block in the vision tower. One round in three had a step half as long again on our side.

Against c11d399 (2026-11-30, its worker and ours in turns, 12 rounds, 476 px, on a machine at a load of 11 to 19, where
a second of wall means little, so by CPU time; --worker --no_peer): all groups learn: 3.27 s there, 3.26 s here, median
of the rounds' ratios 1.02. The programs are the same: 317 and 390 products, 25.2 and 174.4 GFLOP, decode loops equal
operation by operation, 1,324 MiB of temporary memory in the update; rewards have three small loops more. Half of the
groups flat (--flat 0.5 --micro_batches 2, c11d399 computes them all): 1.93 s, 1.59 (median of ratios; wall 1.58, by the
least CPU time 1.55). A third of the step is the rollout, which flat groups need, too, so half of the learner saved is
1.5 by arithmetic, and more than that is noise or the smaller parts' memory.
"""

import argparse
import contextlib
import pathlib
import statistics
import sys
import tempfile

import _common as common
from _grpo_ours import ALONE, TEXT, Ours

HERE = pathlib.Path(__file__).parent
PEERS = {
    "TRL 0.22.2": (".venv-trl022", "_grpo_peer.py"),
    "TRL 1.16.0": (".venv-trl", "_grpo_peer.py"),
    "tunix": (".venv-tunix", "_tunix_peer.py"),
}


def serve(args) -> None:
    args.side = args.side[-1]
    ours = Ours(args)
    names = ("facts", "save", "step", "gemm", "bandwidth", "work", "parts")
    common.serve({name: getattr(ours, name) for name in names})


@contextlib.contextmanager
def workers(args, side: int):
    """{name: worker}, ours first, with the same weights and inputs; and the facts of all."""
    all_workers = {
        "cxr_jax": common.Worker(
            sys.executable, sys.argv[0], "--worker", *sys.argv[1:], "--side", side
        )
    }
    try:
        known = [all_workers["cxr_jax"]("facts")]
        with tempfile.TemporaryDirectory() as temp:
            folder = pathlib.Path(temp) / "model"
            if args.peers:
                all_workers["cxr_jax"]("save", folder=str(folder))
            for name in args.peers:
                if name == "tunix" and side:
                    continue  # it has no images
                env, script = PEERS[name]
                all_workers[name] = common.Worker(
                    common.ROOT / env / "bin/python", HERE / script, folder
                )
                known.append(all_workers[name]("facts"))
            yield all_workers, known
    finally:
        for worker in all_workers.values():
            worker.close()


def measure(args, side: int, sides: dict) -> None:
    ours = sides["cxr_jax"]
    first = {name: worker("step") for name, worker in sides.items()}
    runs, gemm, loads = {name: [] for name in sides}, {name: [] for name in sides}, []
    second = ours("step")["compiled"]
    for r in range(args.rounds):
        loads.append(common.load())
        for name in list(sides)[:: -1 if r % 2 else 1]:
            sides[name](
                "step"
            )  # not counted: after a rest, a process finds cold caches and returned memory
            runs[name].append(sides[name]("step"))
            gemm[name].append(sides[name]("gemm")["gflops"])
    work, parts = ours("work"), ours("parts", rounds=args.rounds)
    n = args.prompts * args.group * args.completion
    rows = [
        [
            "",
            "step, s",
            "rollout, s",
            "learning, s",
            "CPU time, s",
            "tokens/s",
            "GEMM GFLOP/s",
            "peak GiB",
            "first step, s",
        ]
    ]
    for name in sides:
        of = lambda key, name=name: [x[key] for x in runs[name]]
        rows.append(
            [
                name,
                *(
                    common.spread(of(key), digits=2)
                    for key in ("seconds", "rollout", "learn", "cpu")
                ),
                common.spread([n / t for t in of("seconds")], digits=0),
                common.spread(gemm[name], digits=0),
                f"{runs[name][-1]['peak']:.2f}",
                f"{first[name]['seconds']:.1f}",
            ]
        )
    print(common.table(rows))
    mid = lambda name, key: statistics.median(x[key] for x in runs[name])
    for name in list(sides)[1:]:
        least = min(x["seconds"] for x in runs[name]) / min(x["seconds"] for x in runs["cxr_jax"])
        times = {
            key: mid(name, key) / mid("cxr_jax", key) for key in ("seconds", "rollout", "learn")
        }
        print(
            f"against {name} by medians: step {times['seconds']:.2f}x (by the fastest {least:.2f}x), rollout "
            f"{times['rollout']:.2f}x, learning {times['learn']:.2f}x"
        )
    for name in list(sides)[1:]:
        split = runs[name][-1]["parts"]
        seen = sides[name]("check")
        print(
            f"{name}, last step: {', '.join(f'{k} {v:.3f} s' for k, v in split.items())}; {seen['rows']} rows, "
            f"prompts of {seen['prompt']} tokens, {'the' if seen['same ids'] else 'NOT THE'} same, pixels "
            f"{seen['pixels apart']:.0e} apart, {seen['tokens']} tokens drawn"
        )
    row = runs["cxr_jax"][-1]["row"]
    print(
        f"cxr_jax: programs compiled in step 1: {first['cxr_jax']['compiled']}, in step 2: {second}, in the measured "
        f"steps: {sum(x['compiled'] for x in runs['cxr_jax'])}; last step: standard deviation of the reward "
        f"{row['reward_std']:.3f}, gradient norm {row['grad_norm']:.3f}, {row['completions/mean_length']:.0f} tokens"
    )
    describe(args, work, parts, mid, statistics.median(gemm["cxr_jax"]))
    print("load average in the rounds: " + " ".join(loads))


def describe(args, work: dict, parts: dict, mid, gflops: float) -> None:
    """Our step by parts, and against arithmetic."""
    limit = 1e3 * args.peak_tflops if args.peak_tflops else gflops
    for part in ("rollout", "learn"):
        shared, unshared, program = (
            1e-9 * work[k][part] for k in ("shared", "unshared", "program")
        )
        seconds = mid("cxr_jax", part)
        print(
            f"{part}: {shared:.1f} GFLOP by arithmetic ({unshared / shared:.1f} times as much if nothing is shared), "
            f"{program:.1f} in the program: {program / seconds:.0f} GFLOP/s, {program / seconds / limit:.0%} of "
            f"{limit:.0f}; floor {shared / limit:.2f} s"
        )
    vision, prefill, reward = (parts.get(k, 0.0) for k in ("vision", "prefill + 1 token", "reward"))
    decode = mid("cxr_jax", "rollout") - vision - prefill - reward
    print(
        f"rollout by parts: vision {vision:.3f}, prefill + 1 token {prefill:.3f}, reward {reward:.4f} "
        f"({reward / mid('cxr_jax', 'seconds'):.1%} of the step), the rest (decoding) {decode:.3f} s, "
        f"{1e-9 * work['bytes'] / decode:.1f} GB/s"
        + (
            f", {1e-9 * work['bytes'] / decode / args.gbps:.0%} of {args.gbps:.0f}"
            if args.gbps
            else ""
        )
    )
    back = parts["decoder + head"] - parts["head"]
    print(
        f"learning by parts: vision {parts.get('vision with gradient', 0.0):.3f}, decoder {back:.3f} (forward "
        f"{parts['decoder + head, forward'] - parts['head, forward']:.3f}), head {parts['head']:.3f} (forward "
        f"{parts['head, forward']:.3f}), update {parts['update']:.3f} s; sum "
        f"{parts.get('vision with gradient', 0.0) + back + parts['head'] + parts['update']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("tiny", "small", "3b"), default="tiny")
    parser.add_argument(
        "--side", type=int, nargs="+", default=[476, 224, 0], help="pixels of an image; 0: no image"
    )
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--micro_batches", type=int, default=1)
    parser.add_argument(
        "--flat", type=float, default=0.0, help="share of our groups without an advantage"
    )
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--peak_tflops", type=float, help="the device's; without: the product measured in the run"
    )
    parser.add_argument("--peak_gbps", type=float, help="memory bandwidth; on a CPU it is measured")
    common.arguments(parser)
    args = parser.parse_args()
    if args.worker:
        return serve(args)
    args.peers = [] if args.no_peer else args.peers
    if args.dtype != "float32" and args.peers:
        parser.error("the peers are compared in float32; give --no_peer")
    if missing := [PEERS[p][0] for p in args.peers if not (common.ROOT / PEERS[p][0]).exists()]:
        parser.error(
            f"no environment {missing[0]}; make it, or name other --peers, or give --no_peer"
        )
    for i, side in enumerate(args.side):
        with workers(args, side) as (sides, known):
            if i == 0:
                args.gbps = args.peak_gbps or (
                    sides["cxr_jax"]("bandwidth")["gbps"]
                    if "cpu" in known[0]["device"].lower()
                    else None
                )
            print(common.header(*known) if i == 0 else "")
            size = f"with an image of {side} px" if side else "without an image"
            prompt = (side // 28) ** 2 + TEXT if side else ALONE
            print(
                f"{args.shape}, {args.dtype}, {args.prompts} prompts of {prompt} tokens {size}, {args.group} "
                f"completions of {args.completion} tokens each; median (least-most) of {args.rounds} rounds"
            )
            measure(args, side, sides)


if __name__ == "__main__":
    main()
