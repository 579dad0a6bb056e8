"""Draws a run's page again: `python -m cxr_jax.report WORKDIR`."""

import argparse
import sys
from collections.abc import Sequence

from cxr_jax.errors import bad_usage, exit_code
from cxr_jax.report.write import render


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the page; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m cxr_jax.report", description="Draw a run's report.html again."
    )
    parser.add_argument("workdir", help="the run's folder")
    parser.error = bad_usage
    return exit_code(lambda: print(render(parser.parse_args(argv).workdir)))


if __name__ == "__main__":
    sys.exit(main())
