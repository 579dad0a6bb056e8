"""Compressed pixels, decoded by other processes that have little to lose (`_codec_worker.py`).

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from cxr_jax.data.dicom import _codec_worker

SECONDS = 60
BYTES = 4 * 2**30  # address space: numpy and the codecs map about 1 GiB before they do anything
STARTS = 2  # of workers, for one file
REASONS = {
    _codec_worker.NO_CODEC: "no decoder for its compression is installed "
    "(pip install pylibjpeg pylibjpeg-openjpeg python-gdcm pyjpegls)",
    _codec_worker.DAMAGED: "the compressed pixel data is damaged",
    _codec_worker.TOO_BIG: "decoding needs more memory than the limit",
    _codec_worker.KILLED: "the system has ended its decoding (memory or processor time)",
}


class DecodeError(Exception):
    """One line: why a file was not decoded. Says nothing of what is in it."""


class Limits(NamedTuple):
    """What a worker runs, and within what: its script, bytes of memory, seconds, reasons by the script's exit codes."""

    script: str
    max_bytes: int
    seconds: float
    reasons: Mapping[int, str]


def _film_limits() -> Limits:
    return Limits(_codec_worker.__file__, BYTES, SECONDS, REASONS)


class WorkerEndedError(Exception):
    """The worker has ended, which says nothing of the file."""


class Worker:
    """A process that decodes, asked for one file at a time; of films it runs `_codec_worker.py`."""

    def __init__(self, limits: Callable[[], Limits] = _film_limits) -> None:
        # Asked anew for each file: a kept worker obeys what holds by then.
        self._limits = limits
        script, max_bytes, seconds, _ = limits()
        command = [sys.executable, "-P", str(Path(script)), str(max_bytes), str(seconds)]
        # A session of its own: Ctrl-C is for the run, and one signal ends the worker with its child.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Pipes were asked for above, so they are there.
        self._requests = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)
        self._is_late = False

    def decode(self, file_bytes: bytes) -> np.ndarray:
        """The child's answer. Raises DecodeError or WorkerEndedError, or what interrupts it: the worker has ended
        then."""
        _, _, seconds, reasons = self._limits()
        timer = threading.Timer(seconds, self._end_late)
        timer.daemon = True
        try:
            timer.start()
            try:
                answer = self._ask(file_bytes)
            finally:
                timer.cancel()
                timer.join()  # it may be at work
            # No answer: by its exit code the worker says why.
            if answer is None or self._is_late:
                code = self._process.wait()
                if self._is_late:
                    raise DecodeError(f"decoding took longer than {seconds} s")
                raise DecodeError(reasons[code]) if code in reasons else WorkerEndedError
            return np.load(io.BytesIO(answer), allow_pickle=False)
        except BaseException as error:
            self.end()
            if isinstance(error, (ValueError, EOFError)):  # of np.load: no answer of ours
                raise DecodeError(reasons[_codec_worker.DAMAGED]) from None
            raise

    def _ask(self, file_bytes: bytes) -> bytes | None:
        """The bytes of the answer; None where there is no whole one."""
        requests, answers = self._requests, self._answers
        # A worker that has ended is noticed when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            requests.write(len(file_bytes).to_bytes(_codec_worker.LENGTH_BYTES, "big"))
            requests.write(file_bytes)
            requests.flush()
        length = answers.read(_codec_worker.LENGTH_BYTES)
        size = int.from_bytes(length, "big")
        # The worker refuses more pixels, so this is none of its answers.
        if size > self._limits().max_bytes // 8 + 2**16:
            self._kill()
            return None
        answer = answers.read(size)
        is_whole = len(length) == _codec_worker.LENGTH_BYTES and len(answer) == size
        return answer if is_whole else None

    def _end_late(self) -> None:
        self._is_late = True
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(OSError):
            if FORKS:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def end(self) -> None:
        """End the process, whatever it is at, and close its pipes."""
        if self._process.poll() is None:
            self._kill()
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()


_idle: list[Worker] = []
FORKS = hasattr(os, "fork")  # elsewhere a worker decodes one file itself
if FORKS:
    os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's


def decode(file_bytes: bytes) -> np.ndarray:
    """Decode the stored values of the whole DICOM file `data`. Threads have a worker each.

    Raises:
        DecodeError: if the pixels are damaged, need too much memory or time, or have no decoder.
    """
    started = 0
    # A worker that was kept may have been ended since, and a signal may meet one that starts.
    while started < STARTS:
        try:
            worker = _idle.pop()
        except IndexError:
            worker, started = Worker(), started + 1
        try:
            pixels = worker.decode(file_bytes)
        except WorkerEndedError:
            continue
        if FORKS:
            _idle.append(worker)
        else:
            worker.end()
        return pixels
    raise DecodeError("the process that decodes it does not start, or something else ends it")


@atexit.register
def close() -> None:
    """End the workers that are kept."""
    while _idle:
        _idle.pop().end()
