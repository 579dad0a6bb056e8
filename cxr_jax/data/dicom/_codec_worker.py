"""Decodes the compressed pixels of DICOM files, each in a child process that has little to lose.

Run by `codecs.py` as `python -P _codec_worker.py MAX_BYTES MAX_SECONDS`. On stdin, for each file, its length (8
bytes, big-endian) and its bytes; on stdout, of each, the length of an .npy and that. Codecs are C code that has had
memory bugs, and a small compressed file can ask for any amount of memory: hence the limits. Once a file is not decoded
this ends with one of the exit codes below, and nothing else says what went wrong, because exception texts can hold
header values.
"""

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable

NO_CODEC, DAMAGED, TOO_BIG, KILLED = 10, 11, 12, 13
# Modules that pydicom decodes with: loaded once here, so that every child finds them loaded.
CODECS = ("pylibjpeg", "libjpeg", "openjpeg", "gdcm", "jpeg_ls", "PIL.Image")
LENGTH_BYTES = 8  # of the length in front of a file or an answer


def _limit(max_bytes: int, max_seconds: int) -> None:
    """Bound this process: address space, processor time, no core file."""
    try:
        import resource
    except ImportError:  # Windows: the parent's timeout still holds
        return
    for kind, limit in (
        (resource.RLIMIT_AS, max_bytes),
        (resource.RLIMIT_CPU, max_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            _, hard_limit = resource.getrlimit(kind)
            ceiling = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
            resource.setrlimit(kind, (ceiling, ceiling))
        except (OSError, ValueError):  # e.g. macOS refuses RLIMIT_AS
            pass


def _read(size: int) -> bytes:
    """So many bytes, unbuffered: what follows is for another child. Fewer at the end."""
    parts = []
    while size and (part := os.read(0, min(size, 2**20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _decode(size: int, max_bytes: int, max_seconds: int) -> int:
    """Read a file of `size` bytes from stdin and write its pixels to stdout. Returns the exit code."""
    _limit(max_bytes, max_seconds)
    try:
        import numpy as np
        import pydicom
        from pydicom.pixels import get_decoder

        dataset = pydicom.dcmread(io.BytesIO(_read(size)))
        try:
            available = get_decoder(dataset.file_meta.TransferSyntaxUID).is_available
        except NotImplementedError:
            available = False
        if not available:
            return NO_CODEC
        # Which bits of a cell are the pixel, the reader says (`stored_bits.py`).
        dataset.pixel_array_options(correct_unused_bits=False)
        pixels = dataset.pixel_array
        if pixels.nbytes > max_bytes // 8:  # the parent has to hold it too
            return TOO_BIG
        answer = io.BytesIO()
        np.save(answer, np.ascontiguousarray(pixels), allow_pickle=False)
        sys.stdout.buffer.write(answer.getbuffer().nbytes.to_bytes(LENGTH_BYTES, "big"))
        sys.stdout.buffer.write(answer.getbuffer())
        sys.stdout.buffer.flush()
    except MemoryError:
        return TOO_BIG
    except Exception:
        return DAMAGED
    return 0


def _exit_code_of(child_code: int) -> int:
    """This worker's exit code, from how a child ended that has failed."""
    if child_code > 0:
        return child_code
    # By its limit, or by a system short of memory.
    if child_code in (-signal.SIGKILL, -signal.SIGXCPU):
        return KILLED
    return DAMAGED  # the codec crashed


def _load_codecs() -> None:
    import pydicom
    import pydicom.pixels

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for name in CODECS:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def main(
    max_bytes: str,
    max_seconds: str,
    load: Callable[[], None] = _load_codecs,
    decode: Callable[[int, int, int], int] | None = None,
) -> int:
    """Decode files until stdin ends, or one is not decoded. Returns the exit code.

    Args:
        max_bytes, max_seconds: of one file.
        load: imports what every child is to find loaded.
        decode: what a child does, as `_decode` of films does it (None).
    """
    # They are for the run, which ends this with its time limit.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Ignored, as some parents have it, no child's end is told.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Thread stacks would count against the limit.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"
    load()
    work = decode or _decode

    while len(length := _read(LENGTH_BYTES)) == LENGTH_BYTES:
        order = int.from_bytes(length, "big"), int(max_bytes), int(max_seconds)
        if not hasattr(os, "fork"):
            return work(*order)
        if (child := os.fork()) == 0:
            os._exit(work(*order))
        if child_code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            return _exit_code_of(child_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
