"""Decodes recordings, each in a child process that has little to lose: the loop and limits of `_codec_worker.py`.

Run by `audio.py` as `python -P _audio_worker.py MAX_BYTES MAX_SECONDS`. Of each file the answer is an .npy, int16 [N]:
one channel of 16,000 samples a second. Nothing says what went wrong but the exit code.
"""

import importlib.util
import io
import sys
from pathlib import Path

SAMPLE_RATE = 16_000
MAX_MINUTES = 20
TOO_LONG, NO_AUDIO = 14, 15
# First bytes of what browsers and recorders write -> libav's name of the format. It is named and never probed for: some
# of its formats are play lists, which open other files.
FORMATS = ((0, b"\x1aE\xdf\xa3", "matroska"), (0, b"OggS", "ogg"), (4, b"ftyp", "mp4"))
WAVE = ((0, b"RIFF"), (8, b"WAVE"))

# By its path: a script that is run with -P finds no package, and to import ours would cost a second.
_path = Path(__file__).parents[1] / "data" / "dicom" / "_codec_worker.py"
_spec = importlib.util.spec_from_file_location("_codec_worker", _path)
assert _spec is not None and _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


def format_of(file_bytes: bytes) -> str | None:
    """Name the container of a recording by its first bytes; None for any that is not read."""
    for place, magic, container in FORMATS:
        if file_bytes[place : place + len(magic)] == magic:
            return container
    is_wave = all(file_bytes[place : place + 4] == magic for place, magic in WAVE)
    return "wav" if is_wave else None


def _load() -> None:
    import av
    import numpy

    # Its log is about what it reads.
    av.logging.set_level(av.logging.PANIC)
    numpy.zeros(1)


def _decode(size: int, max_bytes: int, max_seconds: int) -> int:
    """Read a recording of `size` bytes from stdin and write its samples to stdout. Returns the exit code."""
    worker._limit(max_bytes, max_seconds)
    # Loaded before the fork, so this costs nothing here.
    try:
        import av
        import numpy as np

        file_bytes = worker._read(size)
        container_format = format_of(file_bytes)
        if container_format is None:
            return NO_AUDIO
        parts, samples = [], 0
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        with av.open(io.BytesIO(file_bytes), "r", format=container_format) as container:
            if not container.streams.audio:
                return NO_AUDIO
            try:
                for frame in container.decode(audio=0):
                    for resampled in resampler.resample(frame):
                        parts.append(resampled.to_ndarray().reshape(-1))
                        samples += parts[-1].size
                    # By what was decoded: what a header says of its length is anybody's.
                    if samples > MAX_MINUTES * 60 * SAMPLE_RATE:
                        return TOO_LONG
            except av.error.FFmpegError:
                # A page that was closed leaves the last second torn: what came before it counts.
                if not parts:
                    return worker.DAMAGED
        for resampled in resampler.resample(None):
            parts.append(resampled.to_ndarray().reshape(-1))
        if not parts:
            return NO_AUDIO
        # The form in which films go through the same pipe.
        answer = io.BytesIO()
        np.save(answer, np.concatenate(parts).astype(np.int16), allow_pickle=False)
        sys.stdout.buffer.write(answer.getbuffer().nbytes.to_bytes(worker.LENGTH_BYTES, "big"))
        sys.stdout.buffer.write(answer.getbuffer())
        sys.stdout.buffer.flush()
    # All was imported before the limits held: a module that fails now has no room.
    except (MemoryError, ImportError):
        return worker.TOO_BIG
    except Exception:
        return worker.DAMAGED
    return 0


def main(max_bytes: str, max_seconds: str) -> int:
    """Decode recordings until stdin ends, or one is not decoded. Returns the exit code."""
    try:
        return worker.main(max_bytes, max_seconds, _load, _decode)
    except ImportError:
        return worker.NO_CODEC


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
