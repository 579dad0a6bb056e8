"""Recordings: second by second onto the disk, each piece safe before it is acknowledged, and then as samples.

A browser's recorder cuts one file (webm/opus, mp4/aac in Safari) into pieces of a second; put together again they are
that file. A piece is a file of its own under its number, so that a piece that comes twice is there once, and one that
is missing is known. Names of pieces hold the key under which they came.
"""

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_jax.capture import _audio_worker
from cxr_jax.data.dicom import _codec_worker, codecs
from cxr_jax.errors import UserError

SAMPLE_RATE = _audio_worker.SAMPLE_RATE
MAX_BYTES = 32 * 2**20  # of a recording; 20 minutes of opus are about 10 MB
MAX_PIECE = 2**20
MAX_PIECES = 2 * 60 * _audio_worker.MAX_MINUTES  # recorders cut early when a key is let go
WORKER_BYTES, WORKER_SECONDS = 2 * 2**30, 60
# Keys become parts of names of files.
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PIECE = re.compile(r"(\d{5})\.([A-Za-z0-9_-]{1,64})\.piece")
_REASONS = {
    _codec_worker.NO_CODEC: "recordings are decoded by PyAV, which is not installed (pip install 'cxr_jax[dictate]')",
    _codec_worker.DAMAGED: "the recording is damaged",
    _codec_worker.TOO_BIG: "decoding the recording needs more memory than the limit",
    _codec_worker.KILLED: "the system has ended its decoding (memory or processor time)",
    _audio_worker.TOO_LONG: f"the recording is longer than {_audio_worker.MAX_MINUTES} minutes",
    _audio_worker.NO_AUDIO: "this is no recording (webm, ogg, mp4 and wav are read)",
}


class PieceConflictError(Exception):
    """Another piece has this number, or another content this key; one line says which."""


class TooMuchError(Exception):
    """A limit of size is passed; one line says which."""


class Recording(NamedTuple):
    """A whole recording: its bytes, and how many pieces they came in."""

    file_bytes: bytes
    pieces: int

    @property
    def sha256(self) -> str:
        """Hash the recording as it came."""
        return hashlib.sha256(self.file_bytes).hexdigest()


# ---- Pieces on the disk ----------------------------------------------------------------------------


def put_piece(capture_folder: Path, number: int, key: str, piece: bytes) -> bool:
    """Keep one piece; when this returns, a power cut does not lose it.

    Args:
        capture_folder: made if it is not there, for this user alone.
        number: of the piece, from 0.
        key: that the sender gives each piece, the same whenever the piece is sent again.
        piece: its bytes.

    Returns:
        Whether it is new: False for one that was there, of the same key and content.

    Raises:
        UserError: for a number or key that is none.
        PieceConflictError: if the number is taken by another key, or the key by another content.
        TooMuchError: beyond the limits.
    """
    if not _KEY.fullmatch(key):
        raise UserError("the key of a piece is 1 to 64 letters, digits, - and _")
    # An empty piece would end the recording where it stands, for all that counts pieces.
    if not piece:
        raise UserError("the piece is empty")
    if not 0 <= number < MAX_PIECES:
        raise TooMuchError(f"a recording has at most {MAX_PIECES:,} pieces")
    if len(piece) > MAX_PIECE:
        raise TooMuchError(f"a piece has at most {MAX_PIECE:,} bytes")
    # Listed anew each time: after a restart the folder is all that is known.
    _make_folder(capture_folder)
    known_pieces = _pieces(capture_folder)
    if number in known_pieces:
        known_key, path = known_pieces[number]
        # The same number under another key is another recorder's: a second tab, or a page that was loaded anew.
        if known_key != key:
            raise PieceConflictError(f"piece {number} is there under another key")
        if path.read_bytes() != piece:
            raise PieceConflictError(f"piece {number} is there with another content")
        return False
    if sum(path.stat().st_size for _, path in known_pieces.values()) + len(piece) > MAX_BYTES:
        raise TooMuchError(f"a recording has at most {MAX_BYTES:,} bytes")
    _write_durably(capture_folder / f"{number:05d}.{key}.piece", piece)
    return True


def _make_folder(capture_folder: Path) -> None:
    """Make the folder of a capture, and see that its name is on the disk."""
    if not capture_folder.is_dir():
        capture_folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        for parent in (capture_folder.parent, capture_folder.parent.parent):
            _sync_folder(parent)


def _write_durably(path: Path, content: bytes) -> None:
    # Under another name first: a piece that stands under its own is whole.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    # The rename itself is in the folder.
    _sync_folder(path.parent)


def _sync_folder(capture_folder: Path) -> None:
    # Windows knows no descriptors of folders.
    with contextlib.suppress(OSError, PermissionError):
        descriptor = os.open(capture_folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _pieces(capture_folder: Path) -> dict[int, tuple[str, Path]]:
    """Number -> key and file of each piece that is there."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in capture_folder.iterdir():
            if parts := _PIECE.fullmatch(path.name):
                # Partial files begin with a dot, and are none.
                found[int(parts[1])] = (parts[2], path)
    return found


def missing_pieces(capture_folder: Path, count: int) -> list[int]:
    """List the numbers below `count` that no piece has, so that the sender can send those again."""
    known_pieces = _pieces(capture_folder)
    return [number for number in range(min(count, MAX_PIECES)) if number not in known_pieces]


def count_pieces(capture_folder: Path) -> int:
    """Count the pieces that are there without a gap from the first on."""
    known_pieces = _pieces(capture_folder)
    return next(number for number in range(len(known_pieces) + 1) if number not in known_pieces)


def assemble(capture_folder: Path, count: int | None = None) -> Recording:
    """Put the pieces together.

    Args:
        count: how many there are; None: those from the first on without a gap, of a page that was closed.

    Raises:
        UserError: if there is none, or one is missing.
    """
    # Behind a gap nothing can be used: the pieces are parts of one stream.
    if count is None:
        count = count_pieces(capture_folder)
    known_pieces = _pieces(capture_folder)
    if missing := missing_pieces(capture_folder, count):
        raise UserError(f"pieces of the recording are missing, {missing[0]} first")
    if not count or count > MAX_PIECES:
        raise UserError("nothing was recorded")
    return Recording(
        b"".join(known_pieces[number][1].read_bytes() for number in range(count)), count
    )


def erase(capture_folder: Path) -> None:
    """Remove all pieces of a recording, and what an interrupted write has left."""
    # An error is told by what is left, whatever it was.
    shutil.rmtree(capture_folder, ignore_errors=True)
    if capture_folder.exists():
        raise OSError(f"{capture_folder.name}: a recording could not be erased")
    if capture_folder.parent.is_dir():
        _sync_folder(capture_folder.parent)


# ---- Samples ---------------------------------------------------------------------------------------


def decode(file_bytes: bytes) -> np.ndarray:
    """Decode a recording in a process of its own, within limits of memory and time.

    Args:
        file_bytes: webm, ogg, mp4 or wav, told by its first bytes.

    Returns:
        float32 [N] in -1..1: one channel, SAMPLE_RATE samples a second.

    Raises:
        UserError: for what is no recording, is damaged, too long, or where PyAV is not installed.
    """
    if len(file_bytes) > MAX_BYTES:
        raise UserError(f"a recording has at most {MAX_BYTES:,} bytes")
    # What cannot be one costs no process.
    if _audio_worker.format_of(file_bytes) is None:
        raise UserError(_REASONS[_audio_worker.NO_AUDIO])
    # One for each: recordings come once a minute, and a kept process would hold what was said.
    worker = codecs.Worker(_limits)
    try:
        samples = worker.decode(file_bytes)
    except codecs.DecodeError as error:
        raise UserError(str(error)) from None
    except codecs.WorkerEndedError:
        raise UserError("the process that decodes recordings does not start") from None
    finally:
        worker.end()
    # Whole numbers came: half the bytes through the pipe.
    return samples.astype(np.float32) / 32768.0


def _limits() -> codecs.Limits:
    return codecs.Limits(_audio_worker.__file__, WORKER_BYTES, WORKER_SECONDS, _REASONS)


def loudness(samples: np.ndarray) -> float:
    """Give the root mean square of samples, in dB of full scale; -120 of nothing."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0
    return max(-120.0, 10.0 * float(np.log10(power))) if power > 0 else -120.0
