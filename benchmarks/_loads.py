"""Loads of requests for serve.py and its peer, which has no jax: standard library only."""

import random
import threading
import time


def arrivals(kind: str, seconds: float, rate: float, seed: int = 0) -> list[float]:
    """Seconds at which requests come: "burst" has 64 at once, "poisson" `rate` a second."""
    if kind == "burst":
        return [0.0] * 64
    generator, times, now = random.Random(seed), [], 0.0
    while (now := now + generator.expovariate(rate)) < seconds:
        times.append(now)
    return times


class Request:
    """One client: when its first text and its last came, in seconds after it was due."""

    def __init__(self, due: float):
        self.due, self.first, self.done, self.tokens = due, None, None, []
        self.over = threading.Event()

    def text(self) -> None:
        self.first = self.first or time.perf_counter() - self.due

    def end(self, tokens: list[int]) -> None:
        self.done, self.tokens = time.perf_counter() - self.due, tokens
        self.over.set()


def play(submit, times: list[float]) -> dict:
    """Submits request i at its time by submit(i, request), and waits for all of them."""
    start, requests = time.perf_counter(), []
    for number, due in enumerate(times):
        time.sleep(max(0.0, start + due - time.perf_counter()))
        requests.append(Request(start + due))
        submit(number, requests[-1])
    for request in requests:
        assert request.over.wait(900), "a request was lost"
    seconds = max(request.due + request.done for request in requests) - start
    return {
        "first": [request.first for request in requests],
        "done": [request.done for request in requests],
        "seconds": seconds,
        "tokens": [request.tokens for request in requests],
    }


class PlainQueue:
    """A queue and a thread that takes `most` waiting requests at a time and answers these before any other.

    answer(list of (number, request)): calls `text` and `end` of each.
    """

    def __init__(self, answer, most: int):
        self.answer, self.most = answer, most
        self.waiting, self.changed = [], threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, number: int, request: Request) -> None:
        with self.changed:
            self.waiting.append((number, request))
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self.waiting:
                    self.changed.wait()
                batch, self.waiting = self.waiting[: self.most], self.waiting[self.most :]
            self.answer(batch)
