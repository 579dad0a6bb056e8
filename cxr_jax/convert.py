"""Hugging Face folder <-> our checkpoint: `python -m cxr_jax.convert from-hf SRC DST`, `... to-hf SRC DST`.

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
import signal
import sys
import traceback
import warnings
from pathlib import Path

from cxr_jax.errors import UserError, bad_usage
from cxr_jax.runtime import whole_files
from cxr_jax.weights import hf_folder, native_folder
from cxr_jax.weights.conversion import from_hf, to_hf
from cxr_jax.weights.locate import find_folder

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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


# --- command line --------------------------------------------------------------------------------------


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m cxr_jax.convert",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    parser.add_argument("--debug", action="store_true", help="show tracebacks")

    parser.error = bad_usage
    return parser.parse_args(argv)


def check_paths(args) -> tuple[Path, Path]:
    """(source, destination), links resolved. Raises UserError for a pair that cannot be converted."""
    if not args.max_shard_gb > 0:
        raise UserError(f"--max_shard_gb={args.max_shard_gb}: must be above 0")
    if args.adapter and args.direction == "to-hf":
        raise UserError("--adapter is for from-hf: adapters are merged when the base is read")
    source = find_folder(args.source)
    if native_folder.is_native(source) != (args.direction == "to-hf"):
        has = (
            "one of our checkpoints" if native_folder.is_native(source) else "a Hugging Face folder"
        )
        raise UserError(f"{source}: is {has} already, so {args.direction} has nothing to do")
    destination = Path(os.path.realpath(args.destination))
    for folder in (source, args.source):
        folder = Path(os.path.realpath(folder))
        if destination == folder or folder in destination.parents:
            raise UserError(f"{args.destination}: lies inside {args.source}")
    if destination.is_symlink():
        raise UserError(f"{args.destination}: a symbolic link that leads to itself")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{args.destination}: exists and is not an empty folder")
    return Path(os.path.realpath(source)), destination


def main(argv=None, apart: bool = False) -> int:
    """Exit code: 0 done, 1 failed, 2 bad usage or bad SRC; one line on stderr, no traceback unless --debug.

    apart: work in a child process. A signal then ends it at once, whatever it was in, and the parent removes what
    it left; an in-process interrupt would leave Orbax's threads writing.
    """
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        args = parse_args(argv)
        source, destination = check_paths(args)

        def work():
            if args.direction == "from-hf":
                from_hf(source, temp, args.adapter)
            else:
                to_hf(source, temp, args.max_shard_gb)

        with whole_files.atomic_folder(destination) as temp:
            if apart:
                _in_child(work, debug)
            else:
                work()
        size = sum(f.stat().st_size for f in destination.rglob("*") if f.is_file())
        print(f"{args.destination}: written, {size / 1e9:.3f} GB")
        if not any((destination / name).exists() for name in hf_folder.TOKENIZER_FILES):
            print("note: SRC has no tokenizer, so the model takes and gives token ids only")
        return 0
    except _ChildFailed as e:
        return e.code
    except (Exception, KeyboardInterrupt) as e:
        return _report(e, debug)


def _report(e: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    text = " ".join(str(e).split())
    if isinstance(e, OSError) and e.errno in _PATH_ERRORS:
        e, text = UserError(), f"{e.filename}: {e.strerror}"
    if isinstance(e, KeyboardInterrupt):
        text = "stopped before the end; DST was not written"
    elif not isinstance(e, UserError):
        text = f"the conversion failed ({type(e).__name__}): {text}"
    print(f"error: {text}", file=sys.stderr)
    return 2 if isinstance(e, UserError) else 1


class _ChildFailed(Exception):
    def __init__(self, code: int):
        self.code = code


def _in_child(work, debug: bool) -> None:
    """Run `work` in a forked process and wait for it. Raises _ChildFailed after it has reported an error."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks; it has started nothing yet
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both; the parent answers it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
        code, stderr = 1, os.dup(2)
        if not debug:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Orbax prints tracebacks of its own
        try:
            import jax

            jax.config.update("jax_platforms", "cpu")  # nothing here is for an accelerator
            work()
            code = 0
        except BaseException as e:  # noqa: BLE001
            os.dup2(stderr, 2)
            code = _report(e, debug)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    if code < 0:
        raise RuntimeError(
            f"killed by signal {-code}" + (": out of memory?" if code == -signal.SIGKILL else "")
        )
    if code:
        raise _ChildFailed(code)


def _stop(*_):
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)  # the clean-up is not to be interrupted
    raise KeyboardInterrupt


if __name__ == "__main__":
    for _number in _STOP:
        signal.signal(_number, _stop)
    sys.exit(main(apart=True))
