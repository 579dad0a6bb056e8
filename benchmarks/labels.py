"""Reports labelled a second: the jitted parser against its rules in plain Python, regular expressions, and BERT-base.

    PYTHONPATH=. python benchmarks/labels.py [--rounds 5] [--no_peer]

Needs the environment of tests/oracle/requirements.txt for BERT (--peer_python), or --no_peer. Reports are windows, each
at another place, of Open-i reports joined (--reports: a folder with openi_manifest.csv) or, without that folder, of
the texts of tests/labels/report_cases.jsonl joined. Two kinds: 320 characters, and 2,048: 512 word pieces of BERT.
Rows:

    tokens, 1 or 2 threads   token ids in numpy -> bytes -> states and sides of 14 labels, one jitted program; each
                             thread has its own batches, in the batch size that was fastest before the rounds
    bytes                    the same from bytes, 2 threads
    strings                  `read_reports` on a list of Python strings, with encoding and padding
    rules                    tests/helpers/oracle_reports.py: the same rules, the same result, in plain Python
    regex                    a `re` labeler written the obvious way (_plain.py); it agrees in most reports only
    BERT-base                a forward pass in float32, 2 threads, the best batch of 1, 4, 8; 512 word pieces, or 80 for
                             320 characters (4 characters each), though many BERT labelers pad all to 512

"cores" is processor time over wall time. The last line is the reward's share of a step of experiments/rl.py.

Measured 2026-11-26, 2 cores of an AMD EPYC (Zen 5), idle but for the bench, jax 0.10.2, torch 2.13.0, Open-i reports;
medians of 5 rounds, reports/s:

                             320 characters    2,048 characters
    tokens, 1 thread                178,117              21,037
    tokens, 2 threads               222,464              31,847
    bytes, 2 threads                297,702              30,049
    strings                         109,333              20,751
    rules, 1 process                 39,885               7,509
    rules, 2 processes               78,712              14,597
    regex, 1 process                  2,050                 320
    regex, 2 processes                4,050                 632
    BERT-base                          14.5                2.02
    reports that regex reads alike     95 %                80 %

Since 2026-11-29 fields, lines, marks and languages are read, too, and the figures above are those of the parser before.
On that day, in turn on one idle machine (3 rounds, --no_peer), before / after: 320 characters: tokens, 2 threads
218,320 / 205,945 (0.94), bytes 288,148 / 284,581 (0.99); 2,048 characters: tokens 30,896 / 29,932 (0.97), bytes
34,827 / 42,835 (1.23), strings 19,913 / 21,964 (1.10). Strings of 320 characters, 40 calls of 4,096 each in turn, the
tables on the device: 126,064 / 130,144 (1.03).

So from token ids 55 and 50 times the regex labeler on the same two cores, 15,342 and 15,728 times BERT-base; and 2.8
and 2.2 times the same rules in plain Python, whose reader walks a trie of words with remembered states.
The reward of a step of experiments/rl.py (256 completions of 208 tokens): 21 ms of 5.03 s, 0.4 %
(since the decode loop is in stages a step takes 4.5 s: 0.5 %).
"""

import argparse
import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import _common as common
import numpy as np

KINDS = {"320 characters": 320, "2,048 characters": 2048}
POOL = 4096  # reports of a kind
BATCHES = (256, 512, 1024, 2048)
BERT_TOKENS = {"320 characters": 80, "2,048 characters": 512}  # 4 characters a word piece
SHARE = common.ROOT.parent / "shared" / "data" / "reports"


# Our worker


def corpus(folder: pathlib.Path) -> tuple[str, str]:
    """(running text of many reports, where it is from)."""
    from cxr_jax.data import report_files
    from cxr_jax.evaluation import label_agreement

    if folder.is_dir():
        gold = label_agreement.load_gold(
            folder, "openi_manifest.csv", label_agreement.load_map(label_agreement.MAP)
        )
        rows = list(report_files.read(report_files.open_inputs(gold.paths)))
        return " ".join(
            " ".join((row.text or "").split()) for row in rows
        ), f"{len(rows)} Open-i reports"
    lines = (
        (common.ROOT / "tests" / "labels" / "report_cases.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    return " ".join(
        " ".join(json.loads(line)["text"].split()) for line in lines
    ), f"{len(lines)} made texts"


class Kind:
    """A pool of reports of one kind as texts, tokens int32 [POOL, T], lengths [POOL], bytes uint8 [POOL, L]."""

    def __init__(self, text: str, tokenizer, size: int):
        rng = np.random.default_rng(0)
        self.texts = [text[s : s + size] for s in rng.integers(0, len(text) - size, POOL)]
        rows = [tokenizer.encode(t, add_special_tokens=False) for t in self.texts]
        coded = [t.encode() for t in self.texts]
        self.tokens, self.lengths = padded(rows, np.int32, 1)
        self.bytes, self.sizes = padded(coded, np.uint8, 32)


def padded(rows, dtype, multiple: int):
    """Rows of differing length as an array [N, L], L rounded up, and the lengths [N]."""
    lengths = np.array([len(r) for r in rows], np.int32)
    out = np.zeros((len(rows), -(-lengths.max() // multiple) * multiple), dtype)
    for cells, row in zip(out, rows, strict=True):
        cells[: len(row)] = np.frombuffer(row, np.uint8) if isinstance(row, bytes) else row
    return out, lengths


def pump(step, threads: int, seconds: float) -> dict:
    """step(i) -> reports done, called for i = 0, 1, .. by each thread for about `seconds`: the rates added up."""

    def one(thread: int) -> float:
        start, done, i = time.perf_counter(), 0, thread
        while (passed := time.perf_counter() - start) < seconds:
            done += step(i)
            i += threads
        return done / passed

    start, cpu = time.perf_counter(), time.process_time()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        rate = sum(pool.map(one, range(threads)))
    return {"rate": rate, "cores": (time.process_time() - cpu) / (time.perf_counter() - start)}


class Ours:
    def __init__(self, args):
        import jax

        from cxr_jax.labels import answers as labels_answers
        from cxr_jax.labels import report_text
        from cxr_jax.labels.phrase_bank import load_phrase_bank
        from cxr_jax.models import tokenizer as tokenizers
        from cxr_jax.weights import pretrained

        tokenizer = tokenizers.load(pretrained.PHANTOM)
        text, self.source = corpus(args.reports)
        self.kinds = {name: Kind(text, tokenizer, size) for name, size in KINDS.items()}
        table, bank = jax.device_put(
            (labels_answers.TokenBytes.from_tokenizer(tokenizer), load_phrase_bank())
        )
        self.batch = {}  # kind, what -> batch size

        def read_tokens(tokens, lengths, table, bank, max_bytes):
            return report_text.read_bytes(
                *labels_answers.tokens_to_bytes(tokens, lengths, table, max_bytes), bank
            )

        from_tokens, from_bytes = (
            jax.jit(read_tokens, static_argnums=4),
            jax.jit(report_text.read_bytes),
        )
        self.programs = {
            "tokens": lambda kind, at: from_tokens(
                kind.tokens[at], kind.lengths[at], table, bank, kind.bytes.shape[1]
            ),
            "bytes": lambda kind, at: from_bytes(kind.bytes[at], kind.sizes[at], bank),
        }

    def facts(self) -> dict:
        return common.facts()

    def describe(self) -> dict:
        return {
            "source": self.source,
            "kinds": {
                name: f"{k.tokens.shape[1]} x {POOL} token ids, {k.sizes.mean():.0f} bytes on average, "
                f"{k.bytes.shape[1]} at most"
                for name, k in self.kinds.items()
            },
        }

    def save(self, path: str) -> dict:
        pathlib.Path(path).write_text(
            json.dumps({name: kind.texts for name, kind in self.kinds.items()}), encoding="utf-8"
        )
        return {}

    def states(self, kind: str, n: int) -> dict:
        """States [n, 14] from tokens; the other two ways have to agree."""
        from cxr_jax.labels import read_reports

        at = slice(0, n)
        ways = [self.programs[name](self.kinds[kind], at)["state"] for name in ("tokens", "bytes")]
        ways.append(read_reports(self.kinds[kind].texts[at])["state"])
        if not all(np.array_equal(ways[0], way) for way in ways):
            raise SystemExit("tokens, bytes and strings are not read alike")
        return {"states": np.asarray(ways[0]).tolist()}

    def tune(self, kind: str, name: str, threads: int, seconds: float) -> dict:
        """Finds and keeps the fastest batch size."""
        rates = {}
        for batch in BATCHES:
            self.batch[kind, name, threads] = batch
            self.rate(kind, name, threads, 0.0)  # compiles
            rates[batch] = self.rate(kind, name, threads, seconds)["rate"]
        self.batch[kind, name, threads] = max(rates, key=rates.get)
        return {"batch": self.batch[kind, name, threads]}

    def rate(self, kind: str, name: str, threads: int, seconds: float) -> dict:
        pool, batch, program = (
            self.kinds[kind],
            self.batch[kind, name, threads],
            self.programs[name],
        )

        def step(i):
            at = i * batch % POOL
            program(pool, slice(at, at + batch))["state"].block_until_ready()
            return batch

        return pump(step, threads, seconds) if seconds else (step(0), {})[1]

    def strings(self, kind: str, seconds: float) -> dict:
        from cxr_jax.labels import read_reports

        def step(i):
            at = i * 1024 % POOL
            return len(read_reports(self.kinds[kind].texts[at : at + 1024])["state"])

        return pump(step, 1, seconds)


def serve(args) -> None:
    ours = Ours(args)
    common.serve(
        {
            name: getattr(ours, name)
            for name in ("facts", "describe", "save", "states", "tune", "rate", "strings")
        }
    )


# The rates


def at_once(calls) -> dict:
    """Requests to several workers at the same time: rates and cores added up."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(lambda call: call(), calls))
    return {key: sum(a[key] for a in answers) for key in ("rate", "cores")}


def rows_of(kind: str, args, ours, plain, bert) -> dict:
    """Name -> a function that measures it once."""
    seconds = args.seconds
    batch = {
        (name, t): ours("tune", kind=kind, name=name, threads=t, seconds=seconds / 3)["batch"]
        for name, t in (("tokens", 1), ("tokens", 2), ("bytes", 2))
    }
    rows = {
        f"{name}, {t} thread{'s'[: t > 1]}, batch {batch[name, t]}": lambda name=name, t=t: ours(
            "rate", kind=kind, name=name, threads=t, seconds=seconds
        )
        for name, t in batch
    }
    ours("strings", kind=kind, seconds=0.01)  # compiles
    rows["strings"] = lambda: ours("strings", kind=kind, seconds=seconds)
    for name in ("rules", "regex"):
        for n in (1, len(plain)):
            rows[f"{name}, {n} process{'es' * (n > 1)}"] = lambda name=name, n=n: at_once(
                [lambda w=w: w("rate", name=name, kind=kind, seconds=seconds) for w in plain[:n]]
            )
    if bert:
        tokens = BERT_TOKENS[kind]
        run = lambda b: bert("forward", batch=b, tokens=tokens)
        run(1)
        best = max((1, 4, 8), key=lambda b: run(b)["rate"])
        rows[f"BERT-base, {tokens} word pieces, batch {best}"] = lambda: run(best)
    return rows


def agreement(kind: str, ours, plain, n: int = 1024) -> str:
    """How often the peers read the same as ours; stops if the rules do not always."""
    states = np.array(ours("states", kind=kind, n=n)["states"])
    peer = {
        name: np.array(plain[0]("states", name=name, kind=kind, n=n)["states"])
        for name in ("rules", "regex")
    }
    if not np.array_equal(states, peer["rules"]):
        raise SystemExit(f"{kind}: the rules in plain Python do not read what ours reads")
    same = states == peer["regex"]
    return (
        f"of {n} reports, ours and the rules read all alike; regex {same.mean():.1%} of the cells, "
        f"{same.all(1).mean():.1%} of the reports"
    )


def measure(args, ours, plain, bert) -> None:
    about = ours("describe")
    print(
        f"windows of {about['source']}; median (least-most) of {args.rounds} rounds, {args.seconds:g} s each"
    )
    sides = {kind: rows_of(kind, args, ours, plain, bert) for kind in KINDS}
    runs = {kind: {name: [] for name in rows} for kind, rows in sides.items()}
    loads = []
    for r in range(args.rounds):
        loads.append(common.load())
        for kind, rows in sides.items():
            for name in list(rows)[:: -1 if r % 2 else 1]:
                runs[kind][name].append(rows[name]())
    for kind, done in runs.items():
        middle = {name: statistics.median(x["rate"] for x in xs) for name, xs in done.items()}
        best = max(middle[name] for name in middle if name.startswith("tokens"))
        rows = [["", "reports/s", "cores", "best tokens row is"]]
        for name, xs in done.items():
            digits = 0 if middle[name] >= 100 else 2
            cores = statistics.median(x["cores"] for x in xs)
            ratio = best / middle[name]
            rows.append(
                [
                    name,
                    common.spread([x["rate"] for x in xs], digits=digits),
                    f"{cores:.1f}",
                    f"{ratio:,.{0 if ratio >= 100 else 2}f}x",
                ]
            )
        print(
            f"\n{kind} ({about['kinds'][kind]})\n{common.table(rows)}\n{agreement(kind, ours, plain)}"
        )
    print("\nload average in the rounds: " + " ".join(loads))


# The reward's share of an RL step


def reward_share(args, rounds: int = 7, steps: int = 4) -> str:
    """Seconds of the reward of a step of the phantom preset, alone, against those of a step of a short run."""
    import importlib.util

    import jax

    from cxr_jax import rewards
    from cxr_jax.labels import answers as labels_answers
    from cxr_jax.labels import phrase_reading
    from cxr_jax.labels.phrase_bank import load_phrase_bank
    from cxr_jax.models import tokenizer as tokenizers
    from cxr_jax.weights import pretrained

    spec = importlib.util.spec_from_file_location(
        "rl_config", common.ROOT / "experiments" / "rl.py"
    )
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    config = module.get_config()
    rows, width = (
        config.rl.prompts_per_step * config.rl.oversample * config.rl.group_size,
        config.max_completion,
    )
    tokenizer, rng = tokenizers.load(pretrained.PHANTOM), np.random.default_rng(0)
    ids = np.array(tokenizer.encode(corpus(args.reports)[0], add_special_tokens=False), np.int32)
    max_bytes = width * rewards.BYTES_PER_TOKEN
    inputs = jax.device_put(
        {
            "tokens": np.stack(
                [ids[s : s + width] for s in rng.integers(0, len(ids) - width, rows)]
            ),
            "lengths": np.full(rows, width, np.int32),
            "table": labels_answers.TokenBytes.from_tokenizer(tokenizer),
        }
    )
    solution, known = rng.random((rows, 14)) < 0.2, np.ones((rows, 14), bool)
    bank = jax.device_put(load_phrase_bank())

    def reward(parsed, lengths, weights):
        terms = rewards.reward_terms(
            parsed,
            solution,
            lengths,
            known=known,
            min_length=config.rl.min_length,
            max_length=int(config.rl.overlong_from * width),
            limit=width,
        )
        return rewards.combine(terms, weights)

    def answer_only(x):
        return reward(
            labels_answers.parse_tokens(**x, max_bytes=max_bytes), x["lengths"], rewards.PUBLISHED
        )

    def whole(x, bank):
        truth = phrase_reading.Truth.from_arrays(
            solution, np.zeros_like(solution), np.ones((rows, 14, 2), bool)
        )
        parsed = rewards.read_tokens(**x, max_bytes=max_bytes, bank=bank, truth=truth)
        return reward(parsed, x["lengths"], dict(config.rl.reward_weights))

    short, full = jax.jit(answer_only), jax.jit(whole)
    runs = {
        "answer": lambda: short(inputs).block_until_ready(),
        "all": lambda: full(inputs, bank).block_until_ready(),
    }
    times = [[common.clock(run) for run in runs.values()] for _ in range(rounds + 1)][
        1:
    ]  # the first compiles
    answer, total = map(statistics.median, zip(*times, strict=True))
    step, rollout = step_seconds(steps)
    return (
        f"reward of {rows} completions of {width} tokens (up to {max_bytes} bytes): {1e3 * total:.1f} ms = "
        f"{total / step:.2%} of a step of experiments/rl.py ({step:.2f} s, {rollout:.2f} of it the rollout, which "
        f"has the reward in it); without trace and repetition {1e3 * answer:.1f} ms"
    )


def step_seconds(steps: int) -> tuple[float, float]:
    """Median seconds of a step of a short phantom run and of its rollout; the first step, which compiles, left out."""
    with tempfile.TemporaryDirectory() as folder:
        small = dict(steps=steps, save_every=steps) | {
            f"eval.{k}": 8 for k in ("n", "n_final", "batch_size", "cases")
        }
        command = [
            sys.executable,
            "-m",
            "cxr_jax.main",
            "--config=experiments/rl.py",
            f"--workdir={folder}/run",
            *(f"--config.{k}={v}" for k, v in small.items()),
        ]
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the RL run failed: {done.stderr[-500:]}")
        rows = [
            json.loads(line)
            for line in (pathlib.Path(folder) / "run/metrics.jsonl").read_text().splitlines()
        ]
    rows = [row for row in rows if "step_time" in row][1:]
    return tuple(
        statistics.median(row[key] for row in rows) for key in ("step_time", "perf/rollout_seconds")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7, help="of each measurement")
    parser.add_argument(
        "--reports", type=pathlib.Path, default=SHARE, help="folder with openi_manifest.csv"
    )
    parser.add_argument("--no_peer", action="store_true", help="without BERT")
    parser.add_argument(
        "--no_rl", action="store_true", help="without the reward's share of an RL step"
    )
    parser.add_argument("--peer_python", default=common.ROOT / ".venv-oracle/bin/python")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(args)
    beside = lambda name: pathlib.Path(__file__).with_name(name)
    with tempfile.TemporaryDirectory() as folder:
        ours = common.Worker(sys.executable, sys.argv[0], "--worker", *sys.argv[1:])
        ours("save", path=f"{folder}/texts.json")
        plain = [
            common.Worker(sys.executable, beside("_plain.py"), f"{folder}/texts.json")
            for _ in range(2)
        ]
        bert = None if args.no_peer else common.Worker(args.peer_python, beside("_bert.py"))
        print(common.header(*(worker("facts") for worker in (ours, bert) if worker)))
        measure(args, ours, plain, bert)
        for worker in (ours, *plain, bert):
            if worker:
                worker.close()
    if not args.no_rl:
        print(reward_share(args))


if __name__ == "__main__":
    main()
