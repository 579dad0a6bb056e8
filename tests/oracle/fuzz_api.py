"""Sends random and hostile bodies to the API and counts what must not happen.

    python tests/oracle/fuzz_api.py --count=10000 [--seed=0] [--real]

No status of 500 or above but 503, no traceback in an answer or a log, no connection opened, no file opened that a
client has named, and no memory growth. Without --real the engine is scripted: what is under test is everything before
it. Exit code 1 if something was found.
"""

import argparse
import asyncio
import collections
import logging
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from asgi_calls import call
from fuzz_bodies import random_requests
from room_servers import scripted_state

from cxr_jax.serve.app import create_app

CONNECTIONS, OPENED = [], []


def watch(event, details):
    """An audit hook: Python tells it of every connection and every file."""
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        CONNECTIONS.append(event)
    elif event == "open" and isinstance(details[0], (str, bytes)):
        name = details[0] if isinstance(details[0], str) else details[0].decode("latin-1")
        if "passwd" in name or name.endswith("film.png"):
            OPENED.append(name)


class Tracebacks(logging.Handler):
    """Counts log records that carry a traceback or an error."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if record.exc_info or record.levelno >= logging.ERROR:
            self.lines.append(record.getMessage()[:200])


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def real_state():
    from cxr_jax.serve.server import open_state
    from cxr_jax.serve.state import ServerSettings

    state = open_state(ServerSettings(port=0))
    state.engine.start()
    while not state.engine.is_ready:
        assert state.engine.failure is None, state.engine.failure
        time.sleep(0.1)
    return state


async def fuzz(state, seed, count, at_once=16):
    """(statuses, problems, bytes of memory half way, and at the end)."""
    app = create_app(state)
    statuses, problems = collections.Counter(), []
    requests = iter(random_requests(seed, count))
    begun, first_rss = 0, 0

    async def work():
        nonlocal begun, first_rss
        for content, headers in requests:
            begun += 1
            # After half of them every library is loaded, and every pool of memory as large as it gets.
            if begun == max(1, count // 2):
                first_rss = resident_bytes()
            piece_size = 1 + begun % 3_000 if begun % 7 == 0 else None
            try:
                status, answer = await call(app, content, headers, piece_size=piece_size)
            except Exception as error:  # noqa: BLE001  whatever comes out is a finding
                problems.append((type(error).__name__, content[:300]))
                continue
            statuses[status] += 1
            if status >= 500 or status == 0 or b"Traceback" in answer:
                problems.append((status, content[:300]))

    await asyncio.gather(*(work() for _ in range(at_once)))
    return statuses, problems, first_rss, resident_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true")
    arguments = parser.parse_args()
    log = Tracebacks()
    logging.getLogger().addHandler(log)
    state = real_state() if arguments.real else scripted_state()
    sys.addaudithook(watch)
    begun = time.monotonic()
    statuses, problems, first, last = asyncio.run(fuzz(state, arguments.seed, arguments.count))
    seconds = time.monotonic() - begun
    print(f"{arguments.count} bodies in {seconds:.0f} s: {dict(sorted(statuses.items()))}")
    print(
        f"memory {first / 2**20:.0f} -> {last / 2**20:.0f} MiB ({100 * (last / first - 1):+.1f} %)"
    )
    print(
        f"{len(CONNECTIONS)} connections, {len(OPENED)} files, {len(log.lines)} errors in the log"
    )
    for problem in [*problems, *log.lines, *CONNECTIONS, *OPENED][:10]:
        print("found:", problem)
    state.engine.stop(timeout_s=5)
    return int(bool(problems or log.lines or CONNECTIONS or OPENED or last > 1.05 * first))


if __name__ == "__main__":
    sys.exit(main())
