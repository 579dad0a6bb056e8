"""Serves the reading room: `cxr-jax serve [--model=NAME_OR_DIR] [--port=8000] [--store=DIR]`.

The page for readers, and an OpenAI-compatible API under /v1 (docs/room.md). Only programs of this machine can connect,
unless --host says otherwise; then users or a file of keys are needed. `/ready` is 200 once every program is compiled.
SIGTERM ends the server: nothing new is admitted, streams end with an error event, and the exit code is 0.

`python -m cxr_jax.serve` is the same command. Research use only. Not for diagnosis.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import UserError, exit_code
from cxr_jax.serve.limits import Limits
from cxr_jax.serve.state import ServerSettings


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.serve", description=__doc__)
    parser.add_argument(
        "--model", default="phantom", help="embedded model, Hugging Face folder or workdir of a run"
    )
    parser.add_argument("--port", type=_port, default=8000, help="0: any free one (default 8000)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument(
        "--store",
        metavar="DIR",
        help="folder, or URL of PostgreSQL, that keeps readings and reports",
    )
    parser.add_argument(
        "--dictate",
        default="none",
        metavar="ENGINE",
        help="what hears spoken thoughts: none (they are typed) or whisper:FOLDER (extra dictate)",
    )
    # ---- Who may come, and under which name ----
    parser.add_argument(
        "--study", metavar="NAME", help="serve this reader study of the store, alone"
    )
    parser.add_argument(
        "--api_key_file", metavar="F", type=Path, help="keys for /v1, one a line (docs/room.md)"
    )
    parser.add_argument(
        "--no_auth", action="store_true", help="ask nobody who he is; on this machine alone"
    )
    parser.add_argument(
        "--public_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which a proxy or other machines reach the server; may be repeated",
    )
    parser.add_argument(
        "--film_quota",
        type=_gibibytes,
        default=Limits.films_bytes,
        metavar="GIB",
        help="what the films of one reader may take on the disk (default 20)",
    )
    parser.add_argument("--log_requests", action="store_true", help="a line for every request")
    return parser.parse_args(argv)


def _port(text: str) -> int:
    # argparse makes one line of whatever is raised here.
    number = int(text)
    if not 0 <= number < 2**16:
        raise ValueError
    return number


_port.__name__ = "port from 0 to 65535"  # argparse puts it in its message


def _gibibytes(text: str) -> int:
    number = float(text)
    # A thousandth: below it no film would fit.
    if not 0.001 <= number <= 1_000_000:
        raise ValueError
    return int(number * 2**30)


_gibibytes.__name__ = "number of GiB from 0.001"


def serve(arguments: argparse.Namespace) -> int:
    """Run the server that the flags describe; return its exit code."""
    # Keep stderr for our own lines: transformers would say there that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Ours alone: libraries log at this level what clients have sent.
    level = logging.INFO if arguments.log_requests else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("cxr_jax.serve").setLevel(level)
    # Without an extra the rest of the package works; this command says what is missing.
    try:
        from cxr_jax.serve.server import run_server
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve: the package {error.name} is not installed (pip install 'cxr_jax[serve]')"
        ) from None
    # From here on everything is typed: below the door nobody reads flags.
    settings = ServerSettings(
        model=arguments.model,
        host=arguments.host,
        port=arguments.port,
        store=None if arguments.store == "none" else arguments.store,
        study=arguments.study,
        dictate=arguments.dictate,
        api_key_file=arguments.api_key_file,
        no_auth=arguments.no_auth,
        public_hosts=tuple(arguments.public_host),
        limits=Limits(films_bytes=arguments.film_quota),
    )
    if settings.study is None:
        return run_server(settings)
    # A study is served alone, without a model.
    from cxr_jax.serve import study_server

    return study_server.serve(settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. No traceback unless --debug.

    Returns:
        The exit code: 0 stopped by a signal, 2 bad usage or bad input, 1 the engine failed.
    """
    return exit_code(lambda: serve(parse_args(argv)), debug=wants_debug(argv), failure=_failure)


def _failure(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped before it was ready"
    # The type alone: a message could hold what a client sent.
    return f"the server failed ({type(error).__name__})"


if __name__ == "__main__":
    sys.exit(main())
