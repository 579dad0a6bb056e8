"""Compressed pixels, decoded by other processes that have little to lose (`_decode_worker.py`).

A worker takes a second to start, so it is kept for the next file; every file is decoded in a child of its own, within
limits of memory and time, and a worker whose child has failed is not used again.
"""

import atexit
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from cxr_jax.data import _decode_worker

SECONDS = 60
BYTES = 4 * 2**30  # address space: numpy and the codecs map about 1 GiB before they do anything
REASONS = {
    _decode_worker.NO_CODEC: "no decoder for its compression is installed "
                             "(pip install pylibjpeg pylibjpeg-openjpeg python-gdcm pyjpegls)",
    _decode_worker.DAMAGED: "the compressed pixel data is damaged",
    _decode_worker.TOO_BIG: "decoding needs more memory than the limit",
}  # fmt: skip


class Failed(Exception):
    """One line: why a file was not decoded. Says nothing of what is in it."""


class _Gone(Exception):
    """The worker has ended, which says nothing of the file."""


class _Worker:
    def __init__(self):
        command = [sys.executable, "-P", str(Path(_decode_worker.__file__)), str(BYTES), str(SECONDS)]
        # A session of its own: Ctrl-C is for the run, and one signal ends the worker with its child.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        self._late = False

    def decode(self, data: bytes) -> bytes:
        """The child's answer. Raises Failed or _Gone; the worker cannot be used again then."""
        timer = threading.Timer(SECONDS, self._too_late)
        timer.daemon = True
        timer.start()
        try:
            answer = self._ask(data)
        except BaseException:  # Ctrl-C: the next file must not get the answer for this one
            self._kill()
            raise
        finally:
            timer.cancel()
        if answer is None:
            self.close()
            if self._late:
                raise Failed(f"decoding took longer than {SECONDS} s")
            code = self._process.returncode
            raise Failed(REASONS[code]) if code in REASONS else _Gone()
        return answer

    def _ask(self, data):
        to, back = self._process.stdin, self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            to.write(len(data).to_bytes(8, "big") + data)
            to.flush()
        head = back.read(8)
        size = int.from_bytes(head, "big")
        if size > BYTES // 8 + 2**16:  # the worker refuses more pixels, so this is none of its answers
            self._kill()
            return None
        answer = back.read(size)
        return answer if len(head) == 8 and len(answer) == size else None

    def _too_late(self):
        self._late = True
        self._kill()

    def _kill(self):
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self):
        """Waits for its end: it ends by itself, or when no more files can come."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


_idle: list[_Worker] = []


def decode(data: bytes) -> np.ndarray:
    """Stored values of the whole DICOM file `data`. Raises Failed. Threads have a worker each."""
    for _ in range(2):  # one that was kept may have been ended since, and a signal may meet one that starts
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Worker()
        try:
            answer = worker.decode(data)
        except _Gone:
            continue
        _idle.append(worker)
        return np.load(io.BytesIO(answer), allow_pickle=False)
    raise Failed(REASONS[_decode_worker.DAMAGED])  # and it has ended two workers


@atexit.register
def close() -> None:
    """Ends the workers that are kept."""
    while _idle:
        _idle.pop().close()
