"""Runs a whole study whose server is killed (SIGKILL) at random moments, on SQLite or on PostgreSQL.

    python tests/oracle/kill_study.py FOLDER [--kills=50] [--database=sqlite|postgres] [--cases=24] [--seed=7]

The commands are those of the README, one after the other. `simulate` fails by itself if an answer that was acknowledged
is not there or is there twice, if a reader comes back to another task or answer, or if a reading's time is not the one
that was spent; then the chain is verified, and the study analysed. PostgreSQL is Debian's, started for this alone.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
for folder in (HERE.parents[2], HERE.parents[1] / "helpers"):
    sys.path.insert(0, str(folder))

import postgres_server  # noqa: E402  found by the line above

from cxr_jax.study.__main__ import main as study  # noqa: E402


@contextlib.contextmanager
def store_of(database):
    """The flag of the store: none for the folder's own SQLite."""
    if database == "sqlite":
        yield []
        return
    with postgres_server.running() as url:
        yield [f"--store={url}"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    new = [f"--cases=phantom:{arguments.cases}", "--readers=6", "--washout_days=0"]
    steps = (
        ("new", [*new, f"--seed={arguments.seed}"]),
        ("seal", []),
        ("open", []),
        ("simulate", [f"--kills={arguments.kills}"]),
        ("verify", []),
        ("close", []),
        ("unblind", []),
        ("analyse", []),
        ("verify", []),
    )
    with store_of(arguments.database) as store:
        for command, flags in steps:
            began = time.monotonic()
            code = study([command, arguments.folder, *flags, *store])
            print(f"{command}: {code}, {time.monotonic() - began:.0f} s", flush=True)
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
