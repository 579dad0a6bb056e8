"""Decodes the compressed pixels of one DICOM file in a process that has little to lose.

Run by `dicom.py` as `python -P _decode_worker.py MAX_BYTES MAX_SECONDS`: the file on stdin, one .npy on
stdout. Codecs are C code that has had memory bugs, and a small compressed file can ask for any amount of
memory: hence the limits. Nothing but the exit code says what went wrong, because exception texts can hold
header values.
"""

import io
import os
import signal
import sys

NO_CODEC, DAMAGED, TOO_BIG = 10, 11, 12


def _limit(max_bytes, max_seconds):
    try:
        import resource
    except ImportError:  # Windows: the parent's timeout still holds
        return
    for what, value in (
        (resource.RLIMIT_AS, max_bytes),
        (resource.RLIMIT_CPU, max_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            _, hard = resource.getrlimit(what)
            ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(what, (ceiling, ceiling))
        except (OSError, ValueError):  # e.g. macOS refuses RLIMIT_AS
            pass


def main(max_bytes, max_seconds):
    for number in (signal.SIGTERM, signal.SIGINT):  # they are for the run, which ends this with its time limit
        signal.signal(number, signal.SIG_IGN)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):  # thread stacks would count against the limit
        os.environ[name] = "1"
    _limit(int(max_bytes), int(max_seconds))
    import numpy as np
    import pydicom
    from pydicom.pixels import get_decoder

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        dataset = pydicom.dcmread(io.BytesIO(sys.stdin.buffer.read()))
        try:
            available = get_decoder(dataset.file_meta.TransferSyntaxUID).is_available
        except NotImplementedError:
            available = False
        if not available:
            return NO_CODEC
        pixels = dataset.pixel_array
        if pixels.nbytes > int(max_bytes) // 8:  # the parent has to hold it too
            return TOO_BIG
        np.save(sys.stdout.buffer, np.ascontiguousarray(pixels), allow_pickle=False)
        sys.stdout.buffer.flush()
    except MemoryError:
        return TOO_BIG
    except Exception:
        return DAMAGED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
