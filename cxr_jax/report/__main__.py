"""Draws a run's page again: `cxr-jax report WORKDIR`, or `python -m cxr_jax.report WORKDIR`."""

import sys
from collections.abc import Sequence

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import exit_code
from cxr_jax.report.write import render


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the arguments of the process) and return the exit code."""
    parser = ArgumentParser("cxr_jax.report", description="Draw a run's report.html again.")
    parser.add_argument("workdir", help="the run's folder")

    def draw_page() -> None:
        # The path alone goes to stdout, for a shell to open.
        print(render(parser.parse_args(argv).workdir))

    return exit_code(draw_page, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
