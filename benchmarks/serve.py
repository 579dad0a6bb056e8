"""The engine of the reading room under load, against what there was before it, and against transformers on torch.

    PYTHONPATH=. python benchmarks/serve.py [--rounds 3] [--seconds 60] [--no_peer]

The embedded model reads phantoms, greedily, nothing cached. `burst`: 64 requests at once. `poisson`: 6.7 a second.
`engine` is `cxr_jax.serve.engine`; `one batch at a time` is `Model.generate` behind a queue, which takes 8 that wait
and answers them before any other; `transformers` is the same queue with one request at a time. Needs the environment of
tests/oracle/requirements.txt for the peer (--peer_python), or --no_peer. All three in one run, in turns; every
completion of the first two is compared with `Model.generate`, token for token.

Then memory over 2,000 requests of films of their own (--requests), and 32 of 64 clients that vanish.

The table of the last run stands in docs/room.md.
"""

import argparse
import gc
import pathlib
import statistics
import threading
import time

import _common as common
import _loads as loads
import numpy as np

FILMS, NEW_TOKENS = 64, 512
SYSTEMS = {"engine": "engine", "today": "one batch at a time", "peer": "transformers"}


class Ours:
    """Our worker: the engine, and `Model.generate` behind a queue."""

    def __init__(self):
        import cxr_jax
        from cxr_jax.data.prompts import FIND_PROMPT
        from cxr_jax.phantom import make_batch
        from cxr_jax.serve.engine import Engine

        self.model, self.prompt = cxr_jax.load("phantom"), FIND_PROMPT
        self.films = make_batch(7, "test", "A", np.arange(FILMS))["image"]
        self.engine = Engine(self.model, queue_limit=10**6)
        # Films come again after 64 requests, and other systems keep no prompts.
        self.cache_bytes, self.engine.prompts.most_bytes = self.engine.prompts.most_bytes, 0
        self.engine.start()
        while not self.engine.is_ready:
            assert self.engine.failure is None, self.engine.failure
            time.sleep(0.1)
        self.queue = loads.PlainQueue(self.answer, most=8)
        # The oracle, one by one; it also compiles what the queue runs.
        self.expected = [
            self.model.generate([film], [self.prompt], NEW_TOKENS)[0][0].token_ids
            for film in self.films
        ]

    def facts(self) -> dict:
        return common.facts()

    def save(self, folder: str) -> dict:
        """The model's folder with what the peer is asked."""
        import shutil

        import cxr_jax

        shutil.copytree(cxr_jax.asset("phantom"), folder)
        prepared = [self.model.prepare(film) for film in self.films]
        grid = prepared[0][1]
        special = self.model.special
        np.savez(
            f"{folder}/inputs.npz",
            pixels=np.stack([patches for patches, _ in prepared]),
            grid=np.array(grid),
            ids=np.array([self.model.render(self.prompt, [grid])]),
            new=NEW_TOKENS,
            stop=np.array(special["stop"]),
            suppress=np.array(special["suppress"]),
        )
        return {}

    # ---- Two ways of answering ----

    def submit(self, number: int, request: loads.Request, film=None):
        from cxr_jax.inference.requests import GenerationSettings
        from cxr_jax.serve import asks

        def listener(event) -> None:
            if isinstance(event, asks.Piece):
                request.text()
            elif isinstance(event, asks.Finished):
                request.tokens = event.completion.token_ids
            elif isinstance(event, asks.Done | asks.Failed):
                request.end(request.tokens)

        ask = asks.Ask(
            images=(self.films[number % FILMS] if film is None else film,),
            messages=[{"role": "user", "content": self.prompt}],
            settings=GenerationSettings(NEW_TOKENS),
        )
        return self.engine.submit(ask, listener)

    def answer(self, batch: list) -> None:
        done = self.model.generate(
            [self.films[number % FILMS] for number, _ in batch],
            self.prompt,
            NEW_TOKENS,
            stream=lambda index, _, piece: batch[index][1].text(),
        )
        for (_, request), [completion] in zip(batch, done, strict=True):
            request.end(completion.token_ids)

    def load(self, system: str, kind: str, seconds: float, rate: float) -> dict:
        submit = self.submit if system == "engine" else self.queue.submit
        found = loads.play(submit, loads.arrivals(kind, seconds, rate))
        found["equal"] = sum(
            tokens == self.expected[number % FILMS] for number, tokens in enumerate(found["tokens"])
        )
        return found

    # ---- What else a server must do ----

    def memory(self, requests: int) -> dict:
        """MiB of this process after 0, a tenth and all of `requests` requests, 64 at a time, each of a new film."""
        from cxr_jax.phantom import make_batch

        # As a server has it; it fills within the first tenth.
        self.engine.prompts.most_bytes = self.cache_bytes
        place, begun, sizes, all_over = threading.Semaphore(64), time.perf_counter(), [], []
        sizes.append(_resident())
        batch = make_batch(8, "test", "A", np.arange(FILMS))["image"]
        generator = np.random.default_rng(0)
        for number in range(requests):
            place.acquire()
            request = loads.Request(time.perf_counter())
            end = request.end
            request.end = lambda tokens, end=end: (end(tokens), place.release())
            noise = generator.normal(0, 0.01, batch[0].shape).astype(np.float32)
            self.submit(number, request, np.clip(batch[number % FILMS] + noise, 0, 1))
            all_over = [*all_over[-64:], request.over]
            if number == requests // 10:
                sizes.append(_resident())
        for over in all_over:
            over.wait(600)
        gc.collect()
        return {"mib": [*sizes, _resident()], "seconds": time.perf_counter() - begun}

    def vanish(self) -> dict:
        """Seconds until the slots of 32 of 64 clients are free; whether the others get what they would get."""
        requests = [loads.Request(time.perf_counter()) for _ in range(64)]
        jobs = [self.submit(number, request) for number, request in enumerate(requests)]
        while not all(request.first for request in requests):
            time.sleep(0.001)
        before = self.engine.counts()
        gone = [number for number in range(64) if not requests[number].over.is_set()][:32]
        start, live = time.perf_counter(), before["slots_busy"]
        for number in gone:
            jobs[number].cancel()
        # Until the engine itself has let go of them.
        for number in gone:
            requests[number].over.wait(60)
        seconds = time.perf_counter() - start
        for request in requests:
            request.over.wait(60)
        cancelled = self.engine.counts()["cancelled_total"] - before["cancelled_total"]
        others = [number for number in range(64) if number not in gone]
        equal = sum(requests[number].tokens == self.expected[number] for number in others)
        return {
            "seconds": seconds,
            "live": live,
            "cancelled": cancelled,
            "others": len(others),
            "equal": equal,
        }


def _resident() -> float:
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(args, ours, peer) -> None:
    rates = dict(seconds=args.seconds, rate=args.rate)
    runs = {
        "engine": lambda kind: ours("load", system="engine", kind=kind, **rates),
        "today": lambda kind: ours("load", system="today", kind=kind, **rates),
    }
    if peer:
        runs["peer"] = lambda kind: peer("load", kind=kind, **rates)
    for system in runs:
        runs[system]("burst")  # not counted: warms caches and memory
    found, busy = {}, []
    for turn in range(args.rounds):
        for kind in ("burst", "poisson"):
            for system in list(runs)[:: -1 if turn % 2 else 1]:
                busy.append(common.load())
                found.setdefault((kind, system), []).append(runs[system](kind))

    # ---- Medians over the rounds; a ratio below 1 is quicker than the engine ----
    rows = [
        [
            "",
            "first text p50",
            "p95",
            "done p50",
            "p95",
            "tok/s",
            "all s",
            "done p50 : engine",
            "equal",
        ]
    ]
    for (kind, system), rounds in found.items():
        figures = [
            [
                quantile(each["first"], 0.5),
                quantile(each["first"], 0.95),
                quantile(each["done"], 0.5),
            ]
            + [
                quantile(each["done"], 0.95),
                sum(map(len, each["tokens"])) / each["seconds"],
                each["seconds"],
            ]
            for each in rounds
        ]
        middle = [statistics.median(column) for column in zip(*figures, strict=True)]
        ratios = [
            quantile(each["done"], 0.5) / quantile(base["done"], 0.5)
            for each, base in zip(rounds, found[kind, "engine"], strict=True)
        ]
        equal = sum(each.get("equal", 0) for each in rounds)
        count = sum(len(each["tokens"]) for each in rounds)
        row = [f"{kind}, {SYSTEMS[system]}", *(f"{value:.2f}" for value in middle[:4])]
        row += [f"{middle[4]:.0f}", f"{middle[5]:.1f}", f"{statistics.median(ratios):.2f}x"]
        rows.append([*row, f"{equal}/{count}" if system != "peer" else "-"])
    print(common.table(rows))
    if peer:
        differing = sum(
            one != other
            for one, other in zip(
                found["burst", "engine"][0]["tokens"],
                found["burst", "peer"][0]["tokens"],
                strict=True,
            )
        )
        print(f"transformers draws other tokens for {differing} of 64 films")
    print(f"load average at each run: {', '.join(busy)}")
    gone = ours("vanish")
    print(
        f"{gone['cancelled']} clients vanish, {gone['live']} slots busy: all free after {gone['seconds']:.2f} s, "
        f"{gone['equal']} of {gone['others']} others unharmed"
    )
    if args.requests:
        held = ours("memory", requests=args.requests)
        first, early, last = held["mib"]
        count, growth = args.requests, 100 * (last / early - 1)
        print(
            f"memory: {first:.0f} MiB, after {count // 10} requests {early:.0f}, after {count} {last:.0f} "
            f"({growth:+.1f} % since the tenth), {count / held['seconds']:.1f} requests/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a Poisson load")
    parser.add_argument("--rate", type=float, default=6.7, help="requests a second of it")
    parser.add_argument("--requests", type=int, default=2000, help="for memory; 0: none")
    parser.add_argument("--no_peer", action="store_true")
    parser.add_argument("--peer_python", default=common.ROOT / ".venv-oracle/bin/python")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = "float32"
    if args.worker:
        ours = Ours()
        names = ("facts", "save", "load", "memory", "vanish")
        common.serve({name: getattr(ours, name) for name in names})
        return
    with common.workers(parser, args, "_serve_peer.py") as (ours, peer, known):
        print(common.header(*known))
        measure(args, ours, peer)


if __name__ == "__main__":
    main()
