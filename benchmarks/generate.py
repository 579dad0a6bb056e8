"""Prefill and greedy decoding, cxr_jax against transformers on torch: same weights, same prompts, same machine.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. python benchmarks/generate.py [--shape tiny]

Needs the environment of tests/oracle/requirements.txt for the peer (--peer_python), or --no_peer. The rows: sampling is
`inference.sampling.generate`, which rollouts use, in as many rows as the batch; Model.generate is what a reader calls,
always 8 rows on a CPU (`generation.rows_at_once`), image preparation and text included. Both compile once a shape;
"first calls" has it. On an accelerator: --shape 3b --dtype bfloat16 --no_peer --peak_gbps GB/s.

Measured 2026-11-26, 2 cores of an AMD EPYC (Zen 5), jax 0.10.2, torch 2.13.0, transformers 5.23.0, load average below
2.3; medians of 5 rounds, 136 prompt tokens with a 224 px image:

    tiny (4.7 M), 128 new tokens                  decode tok/s    against    prefill    all      peak GiB
      batch 1    sampling                                 4555     5.1x       1.6x     4.2x     0.96
                 Model.generate                           1363     1.5x       1.0x     1.5x     0.96
                 transformers                              889                                 0.51
      batch 16   sampling                                12048     2.3x       1.9x     2.1x     1.02
                 transformers                             5349                                 0.52
      batch 64   sampling                                15496     1.8x       1.8x     1.8x     1.20
                 transformers                             8439                                 0.67
    small (124 M), 32 new tokens
      batch 1    sampling                                  105     2.3x       1.3x     2.0x     2.14
                 Model.generate                             63     1.4x       1.0x     1.3x     1.97
                 transformers                               45                                 1.01
      batch 16   sampling                                  905     2.4x       2.1x     2.2x     2.16
                 transformers                              374                                 1.26
      batch 64   sampling                                 1347     1.8x       2.0x     1.9x     2.60
                 transformers                              760                                 1.79

Later that day, with the decode loop in stages (inference/compaction.py; tiny, 3 rounds; small not run again): sampling
decodes at 6.0x, 2.9x and 2.2x; peak GiB 1.29 at batch 16 and 1.48 at 64.

Goals: decode 2.5x at batch 1, 2x at batch 16. Every row's tokens equal the peer's in all cells. small at batch 1 is at
2.3x, and reads its weights at 89 % of the memory's measured rate: there is no more to be had in float32.
Model.generate misses the goal at batch 1: it computes 8 rows whatever is asked, so that a completion does not depend on
its company to the last bit.
"""

import argparse
import statistics

import _common as common
import numpy as np

NEVER = (-1,)  # stop ids that no token has: exactly max_new_tokens on both sides
NEW_TOKENS = {"tiny": 128, "small": 32, "3b": 128}


class Ours:
    """Our worker. `rollout` is `inference.sampling.generate`; `reader` is `Model.generate`, one prompt at a time."""

    def __init__(self, args):
        import jax.numpy as jnp

        from cxr_jax.inference.model import Model
        from cxr_jax.models import network
        from cxr_jax.weights import pretrained

        model_config = common.config(args.shape)
        self.model = Model(
            model_config,
            common.random_params(model_config, jnp.dtype(args.dtype)),
            folder=pretrained.PHANTOM,
            dtype=args.dtype,
        )
        self.model.special = {"stop": NEVER, "suppress": model_config.media_token_ids}
        self.inputs = common.prompts(self.model, max(args.batch))
        self.positions = network.positions(model_config, self.inputs["ids"], self.inputs["grid"])
        self.count = network.count(self.model.params)

    def facts(self) -> dict:
        return {**common.facts(), "parameters": f"{self.count:,}"}

    def save(self, folder: str) -> dict:
        from cxr_jax.weights import hf_folder

        hf_folder.save(folder, self.model.config, self.model.params)
        np.savez(f"{folder}/inputs.npz", **{k: self.inputs[k] for k in ("pixels", "grid", "ids")})
        return {}

    def rollout(self, batch: int, new_tokens: int) -> dict:
        from cxr_jax.inference import sampling
        from cxr_jax.inference.model import encode_images

        m, x = self.model, self.inputs
        common.memory(reset=True)

        def run():
            features = encode_images(m.params, m.config, x["pixels"][:batch], x["grid"], m.dtype)
            self.out = np.asarray(
                sampling.generate(
                    m.params,
                    m.config,
                    sampling.PromptBatch(
                        x["ids"][:batch],
                        np.full(batch, common.PROMPT),
                        self.positions[:, :batch],
                        features,
                    ),
                    sampling.SamplingSettings(
                        max_new_tokens=new_tokens, temperature=0.0, stop_ids=NEVER
                    ),
                    dtype=m.dtype,
                )["tokens"]
            )

        return {"seconds": common.clock(run), "tokens": self.out.tolist(), "peak": common.memory()}

    def reader(self, new_tokens: int) -> dict:
        common.memory(reset=True)

        def run():
            [[self.out]] = self.model.generate(
                [self.inputs["image"][0]], self.inputs["text"], new_tokens
            )

        return {
            "seconds": common.clock(run),
            "tokens": [self.out.token_ids],
            "peak": common.memory(),
        }

    def gap(self, row: int, tokens: list[int], other: int) -> dict:
        """How much the logit of `other` is below that of tokens[-1], of a row's prompt and tokens; in std of logits."""
        x = self.inputs
        ids = np.concatenate([x["ids"][row], tokens[:-1]])[None].astype(np.int32)
        logits = self.model.logits(ids, x["pixels"][row], [x["grid"]])[0, -1]
        return {"gap": float((logits[tokens[-1]] - logits[other]) / logits.std())}

    def bandwidth(self) -> dict:
        return {"gbps": common.read_gbps()}

    def step_bytes(self, batch: int, new_tokens: int) -> dict:
        """Bytes that a decode step must read, on average: decoder weights, output matrix, keys and values so far."""
        import jax

        t, size = self.model.config.text, self.model.dtype.itemsize
        text = self.model.params["text"]
        head = (
            text["embed"]["embedding"]
            if self.model.config.tie_word_embeddings
            else text["head"]["kernel"]
        )
        weights = sum(x.size for x in jax.tree.leaves(text["layers"])) + head.size
        keys = (
            2
            * t.num_hidden_layers
            * t.num_key_value_heads
            * t.head_dim
            * (common.PROMPT + new_tokens // 2)
        )
        return {"bytes": size * (weights + batch * keys)}


def serve(args) -> None:
    ours = Ours(args)
    common.serve(
        {
            name: getattr(ours, name)
            for name in ("facts", "save", "rollout", "reader", "gap", "bandwidth", "step_bytes")
        }
    )


def same(ours, a: list, b: list) -> str:
    """How the tokens a of ours compare with the peer's b, row by row."""
    different = [
        (i, next(j for j, (s, t) in enumerate(zip(x, y, strict=True)) if s != t))
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        if x != y
    ]
    text = f"{len(a) - len(different)} of {len(a)} rows equal, token for token"
    for i, j in different:
        gap = ours("gap", row=i, tokens=a[i][: j + 1], other=b[i][j])["gap"]
        text += f"; row {i} differs at token {j}, where the logits are {gap:.1e} of a standard deviation apart"
    return text


def measure(args, ours, peer) -> None:
    """A cell is one side's way of answering a batch: (name, batch) -> a call that draws n tokens a row."""
    new = args.new_tokens
    cells = {}
    for b in args.batch:
        cells["sampling", b] = lambda n, b=b: ours("rollout", batch=b, new_tokens=n)
        if b == 1:
            cells["Model.generate", b] = lambda n: ours("reader", new_tokens=n)
        if peer:
            cells["transformers", b] = lambda n, b=b: peer("generate", batch=b, new_tokens=n)
    first = {
        cell: [run(1)["seconds"], run(new)["seconds"]] for cell, run in cells.items()
    }  # compiles, warms up
    short, long = ({cell: [] for cell in cells} for _ in range(2))
    last, loads = {}, []
    for r in range(args.rounds):
        loads.append(common.load())
        for cell in list(cells)[:: -1 if r % 2 else 1]:
            cells[cell](
                1
            )  # not counted: a process's first call after a rest finds cold caches and returned memory
            short[cell].append(cells[cell](1)["seconds"])
            last[cell] = cells[cell](new)
            long[cell].append(last[cell]["seconds"])
    # One figure for the first token: the difference of two noisy times would be twice as noisy.
    decode = {cell: [t - statistics.median(short[cell]) for t in long[cell]] for cell in cells}

    rows = [
        [
            "",
            "batch",
            "prefill + 1 token, ms",
            "decode tok/s",
            f"all {new}, tok/s",
            "peak GiB",
            "first calls, s",
        ]
    ]
    for cell in cells:
        name, b = cell
        rate = lambda times, n, b=b: common.spread([b * n / t for t in times], digits=0)
        rows.append(
            [
                name,
                str(b),
                common.spread(short[cell], 1e3),
                rate(decode[cell], new - 1),
                rate(long[cell], new),
                f"{last[cell]['peak']:.2f}",
                " + ".join(f"{s:.1f}" for s in first[cell]),
            ]
        )
    print(common.table(rows))
    for cell in cells:
        name, b = cell
        other = ("transformers", b)
        if peer and cell != other:
            ratio = lambda what, times, a=cell, b=other: (
                f"{what} {statistics.median(times[b]) / statistics.median(times[a]):.2f}x"
                f" ({min(times[b]) / min(times[a]):.2f}x)"
            )
            print(
                f"{name}, batch {b}, against transformers by medians (by the fastest): {ratio('decode', decode)}, "
                f"{ratio('prefill', short)}, {ratio('all', long)}; "
                + same(ours, last[cell]["tokens"], last[other]["tokens"])
            )
        if args.gbps and name == "sampling":
            read = ours("step_bytes", batch=b, new_tokens=new)["bytes"] * (new - 1)
            print(
                f"{name}, batch {b}: decoding reads {1e-9 * read / statistics.median(decode[cell]):.1f} GB/s, "
                f"{1e-9 * read / statistics.median(decode[cell]) / args.gbps:.0%} of {args.gbps:.0f}"
            )
    print("load average in the rounds: " + " ".join(loads))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=NEW_TOKENS, default="tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--new_tokens", type=int)
    parser.add_argument("--peak_gbps", type=float, help="memory bandwidth; on a CPU it is measured")
    common.arguments(parser)
    args = parser.parse_args()
    args.new_tokens = args.new_tokens or NEW_TOKENS[args.shape]
    if args.worker:
        return serve(args)
    with common.workers(parser, args) as (ours, peer, known):
        args.gbps = args.peak_gbps or (
            ours("bandwidth")["gbps"] if "cpu" in known[0]["device"].lower() else None
        )
        print(common.header(*known))
        print(
            f"{args.shape}, {args.dtype}, prompts of {common.PROMPT} tokens with an image of {common.SIDE} px, "
            f"{args.new_tokens} new tokens, median (least-most) of {args.rounds} rounds"
        )
        measure(args, ours, peer)


if __name__ == "__main__":
    main()
