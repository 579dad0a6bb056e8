"""Hugging Face folder <-> our checkpoint: `cxr-jax convert from-hf SRC DST`, `.. to-hf SRC DST`.

`python -m cxr_jax.convert` is the same command.

from-hf: SRC is a Hugging Face Qwen2.5-VL folder (safetensors, one file or shards, either key layout); DST becomes
a checkpoint that `cxr_jax.load(DST)` and `--config.model=DST` open. to-hf: the way back, in the published layout,
for transformers and vLLM. Weights keep their type: HF -> ours -> HF gives every tensor back bit for bit, and the
settings files byte for byte. With --adapter=DIR, LoRA adapters in PEFT's format are merged on the way in.

DST must not exist, or be empty. It appears whole or not at all. Shards are read and written one after the other;
from-hf holds the model's arrays and one tensor in memory, to-hf one stacked array and one tensor.

Exit codes: 0 done; 1 the conversion failed (disk full, interrupted); 2 bad usage or a bad SRC.
"""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import UserError, exit_code
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.runtime import child_process, interrupts, whole_files
from cxr_jax.weights import native_folder
from cxr_jax.weights.conversion import from_hf, to_hf
from cxr_jax.weights.locate import find_folder

# What is wrong with a path that was given, and not with the machine.
_PATH_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EROFS,
}


# ---- Command line ----


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.convert", description=__doc__)
    parser.add_argument("direction", choices=("from-hf", "to-hf"))
    parser.add_argument("source", metavar="SRC", help="folder to read")
    parser.add_argument(
        "destination", metavar="DST", help="folder to write; must not exist, or be empty"
    )
    parser.add_argument(
        "--max_shard_gb", type=float, default=5.0, help="to-hf: 10^9 bytes a file (default 5)"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="from-hf: LoRA adapters in PEFT's format, merged"
    )
    return parser.parse_args(argv)


def check_paths(args: argparse.Namespace) -> tuple[Path, Path]:
    """Find (source, destination), links resolved. Raises UserError for a pair that cannot be converted."""
    if not args.max_shard_gb > 0:
        raise UserError(f"--max_shard_gb={args.max_shard_gb}: must be above 0")
    if args.adapter and args.direction == "to-hf":
        raise UserError("--adapter is for from-hf: adapters are merged when the base is read")
    # Our checkpoint is the one of the two.
    checkpoint = args.destination if args.direction == "from-hf" else args.source
    whole_files.check_utf8(os.path.realpath(checkpoint), checkpoint)
    source = find_folder(args.source)
    if native_folder.is_native(source) != (args.direction == "to-hf"):
        kind = "a Hugging Face folder"
        if native_folder.is_native(source):
            kind = "one of our checkpoints"
        raise UserError(f"{source}: is {kind} already, so {args.direction} has nothing to do")
    destination = Path(os.path.realpath(args.destination))
    # What is named may hold what is read: a run's folder holds its hf/.
    for folder in (source, args.source):
        resolved = Path(os.path.realpath(folder))
        if destination == resolved or resolved in destination.parents:
            raise UserError(f"{args.destination}: lies inside {args.source}")
    if destination.is_symlink():
        raise UserError(f"{args.destination}: a symbolic link that leads to itself")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{args.destination}: exists and is not an empty folder")
    return Path(os.path.realpath(source)), destination


# ---- Conversion ----


def main(argv: Sequence[str] | None = None, in_child: bool = False) -> int:
    """Run the command. Prints one line on stderr for an error, no traceback unless --debug.

    Args:
        in_child: whether to work in a child process. A signal then ends the work at once, and the parent removes what
            it left; an interrupt in the same process would leave Orbax's threads writing.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage or bad SRC.
    """
    return exit_code(
        lambda: _run(parse_args(argv), in_child), debug=wants_debug(argv), failure=_failure
    )


def _run(args: argparse.Namespace, in_child: bool) -> int:
    with _bad_paths_as_user_errors():
        source, destination = check_paths(args)
        try:
            with whole_files.atomic_folder(destination) as folder:
                if in_child:
                    _convert_in_child(args, source, folder)
                else:
                    _convert(args, source, folder)
        except child_process.ChildFailedError as error:
            return error.exit_code
        _print_result(args.destination, destination)
    return 0


@contextlib.contextmanager
def _bad_paths_as_user_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _PATH_ERRORS:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _convert(args: argparse.Namespace, source: Path, folder: Path) -> None:
    if args.direction == "from-hf":
        from_hf(source, folder, args.adapter)
    else:
        to_hf(source, folder, args.max_shard_gb)


def _convert_in_child(args: argparse.Namespace, source: Path, folder: Path) -> None:
    def work() -> None:
        import jax

        jax.config.update("jax_platforms", "cpu")  # nothing here is for an accelerator
        with _bad_paths_as_user_errors():
            _convert(args, source, folder)

    def report(error: BaseException) -> int:
        def raise_again() -> None:
            raise error

        return exit_code(raise_again, debug=args.debug, failure=_failure)

    # Orbax prints tracebacks of its own.
    child_process.run_in_child(work, report, quiet=not args.debug)


def _print_result(name: str, destination: Path) -> None:
    size = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    print(f"{name}: written, {size / 1e9:.3f} GB")
    if missing := tokenizers.missing_files(destination):
        print(
            f"note: SRC has no tokenizer ({missing}), so the model takes and gives token ids only"
        )


def _failure(error: BaseException) -> str:
    """Return one line for an error that is nobody's input."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped before the end; DST was not written"
    return f"the conversion failed ({type(error).__name__}): {error}"


def command() -> int:
    """Run as a program: the work in a child process, and an answer to signals."""
    interrupts.on_interrupt(interrupts.raise_keyboard_interrupt, even_if_ignored=True)
    return main(in_child=True)


if __name__ == "__main__":
    sys.exit(command())
