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

from cxr_jax.data.dicom import _codec_worker

SECONDS = 60
BYTES = 4 * 2**30  # address space: numpy and the codecs map about 1 GiB before they do anything
REASONS = {
    _codec_worker.NO_CODEC: "no decoder for its compression is installed "
    "(pip install pylibjpeg pylibjpeg-openjpeg python-gdcm pyjpegls)",
    _codec_worker.DAMAGED: "the compressed pixel data is damaged",
    _codec_worker.TOO_BIG: "decoding needs more memory than the limit",
    _codec_worker.KILLED: "the system has ended its decoding (memory or processor time)",
}


class Failed(Exception):
    """One line: why a file was not decoded. Says nothing of what is in it."""


class _Gone(Exception):
    """The worker has ended, which says nothing of the file."""


class _Worker:
    def __init__(self):
        command = [
            sys.executable,
            "-P",
            str(Path(_codec_worker.__file__)),
            str(BYTES),
            str(SECONDS),
        ]
        # A session of its own: Ctrl-C is for the run, and one signal ends the worker with its child.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._late = False

    def decode(self, data: bytes) -> np.ndarray:
        """The child's answer. Raises Failed or _Gone, or what interrupts it: the worker has ended then."""
        timer = threading.Timer(SECONDS, self._too_late)
        timer.daemon = True
        try:
            timer.start()
            try:
                answer = self._ask(data)
            finally:
                timer.cancel()
                timer.join()  # it may be at work
            if answer is None or self._late:
                code = self._process.wait()
                if self._late:
                    raise Failed(f"decoding took longer than {SECONDS} s")
                raise Failed(REASONS[code]) if code in REASONS else _Gone
            return np.load(io.BytesIO(answer), allow_pickle=False)
        except BaseException as e:
            self.end()
            if isinstance(e, (ValueError, EOFError)):  # of np.load: no answer of ours
                raise Failed(REASONS[_codec_worker.DAMAGED]) from None
            raise

    def _ask(self, data):
        to, back = self._process.stdin, self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            to.write(len(data).to_bytes(8, "big"))
            to.write(data)
            to.flush()
        head = back.read(8)
        size = int.from_bytes(head, "big")
        if (
            size > BYTES // 8 + 2**16
        ):  # the worker refuses more pixels, so this is none of its answers
            self._kill()
            return None
        answer = back.read(size)
        return answer if len(head) == 8 and len(answer) == size else None

    def _too_late(self):
        self._late = True
        self._kill()

    def _kill(self):
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL) if FORKS else self._process.kill()

    def end(self):
        if self._process.poll() is None:
            self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


_idle: list[_Worker] = []
FORKS = hasattr(os, "fork")  # elsewhere a worker decodes one file itself
if FORKS:
    os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's


def decode(data: bytes) -> np.ndarray:
    """Stored values of the whole DICOM file `data`. Raises Failed. Threads have a worker each."""
    started = 0
    while (
        started < 2
    ):  # one that was kept may have been ended since, and a signal may meet one that starts
        try:
            worker = _idle.pop()
        except IndexError:
            worker, started = _Worker(), started + 1
        try:
            pixels = worker.decode(data)
        except _Gone:
            continue
        if FORKS:
            _idle.append(worker)
        else:
            worker.end()
        return pixels
    raise Failed("the process that decodes it does not start, or something else ends it")


@atexit.register
def close() -> None:
    """Ends the workers that are kept."""
    while _idle:
        _idle.pop().end()
