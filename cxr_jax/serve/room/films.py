"""The shelf of films: what they are, whether they are chest films, and where they are kept.

A film is named by the SHA-256 of its bytes, and by nothing else: no file name and no text of a header is kept. The
shelf holds the bytes as they came, which exports of a DICOM need, its levels for the viewer, and what a reader is told
of it; none of these is served as it came.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.data import display, image_gate
from cxr_jax.data.display import Display
from cxr_jax.errors import UserError
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.state import ServerState

INFO_FORM = 1  # raised when `info` gets another form: files of older ones are made anew
NO_NAME = "the file"  # what messages call it: its own name may hold a patient's
_SHA = re.compile(r"[0-9a-f]{64}")
_PARTIAL = ".part-"  # names of files begin so until they are whole
_AT_ONCE = 2  # films that are decoded at the same time: each may take some hundred megabytes
_IN_MEMORY = 4  # pictures that are kept decoded, for follow-ups on the same film


class NoSuchFilmError(UserError):
    """No film of that hash was uploaded."""


class Films:
    """The shelf: a folder of films by hash. Safe in threads.

    Args:
        folder: made if missing, readable by its owner alone.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A kill in the middle of a write leaves a film under a name by which no erasure would find it.
        for left_over in self.folder.glob(f"{_PARTIAL}*"):
            left_over.unlink(missing_ok=True)
        self._decoders = threading.BoundedSemaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._pictures: OrderedDict[str, np.ndarray] = OrderedDict()

    def add(self, file_bytes: bytes) -> dict[str, Any]:
        """Keep a film and describe it, see `info`. The same bytes are the same film.

        Raises:
            UserError: for bytes that are no film that can be read; nothing is kept then.
        """
        digest = hashlib.sha256(file_bytes).hexdigest()
        known = self._known(digest)
        if known is not None:
            return known
        return self._shelve(digest, file_bytes)

    def info(self, digest: str) -> dict[str, Any]:
        """Describe a film: what `POST /room/images` answers.

        Raises:
            NoSuchFilmError: for a hash that is none, or of no film here.
        """
        known = self._known(digest)
        return known if known is not None else self._shelve(digest, self.original(digest))

    def picture(self, digest: str) -> np.ndarray:
        """Give the film as a model reads it, float32 [H, W] in 0..1. Nobody may write into it.

        Raises:
            NoSuchFilmError: as `info` does.
        """
        with self._lock:
            if digest in self._pictures:
                self._pictures.move_to_end(digest)
                return self._pictures[digest]
        # Decoded again from the bytes: a float of every pixel would fill the disk.
        film = self._open(self.original(digest))
        return self._remember(digest, film.image.pixels)

    def original(self, digest: str) -> bytes:
        """Give the bytes as they were uploaded. Raises NoSuchFilmError."""
        return self._read(digest, "film")

    def compressed_levels(self, digest: str) -> bytes:
        """Give the levels, little-endian uint16 row by row, compressed by gzip. Raises NoSuchFilmError."""
        self.info(digest)  # made anew where an older version has left them
        return self._read(digest, "levels.gz")

    # ---- Files -------------------------------------------------------------------------------------

    def _known(self, digest: str) -> dict[str, Any] | None:
        # A description that another version wrote, or that is damaged, is made anew.
        with contextlib.suppress(NoSuchFilmError, ValueError):
            described = json.loads(self._read(digest, "json"))
            if described.pop("form", None) == INFO_FORM:
                return described
        return None

    def _shelve(self, digest: str, file_bytes: bytes) -> dict[str, Any]:
        # Nothing is written before the film has been read: bad files leave no trace.
        film = self._open(file_bytes)
        described = describe(digest, film)
        levels = np.ascontiguousarray(film.levels, "<u2").tobytes()
        self._write(digest, "film", file_bytes)
        # The fastest level: it is read from the same machine, once.
        self._write(digest, "levels.gz", gzip.compress(levels, compresslevel=1, mtime=0))
        # Last, because a film that is described is whole.
        self._write(digest, "json", json.dumps({"form": INFO_FORM, **described}).encode())
        self._remember(digest, film.image.pixels)
        return described

    def _open(self, file_bytes: bytes) -> Display:
        with self._decoders:
            return display.open_film(NO_NAME, file_bytes)

    def _remember(self, digest: str, pixels: np.ndarray) -> np.ndarray:
        # Several readings may share it.
        pixels.flags.writeable = False
        with self._lock:
            self._pictures[digest] = pixels
            while len(self._pictures) > _IN_MEMORY:
                self._pictures.popitem(last=False)
        return pixels

    def _read(self, digest: str, suffix: str) -> bytes:
        # A hash and nothing else: what a client sends becomes part of a path here.
        if not _SHA.fullmatch(digest):
            raise NoSuchFilmError("an image is named by the 64 hexadecimal digits of its SHA-256")
        try:
            return (self.folder / f"{digest}.{suffix}").read_bytes()
        except OSError:
            raise NoSuchFilmError("no image of that SHA-256 was uploaded") from None

    def _write(self, digest: str, suffix: str, content: bytes) -> None:
        """Whole or not at all, whoever writes the same film beside it."""
        # Made by mkstemp: mode 0600.
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=_PARTIAL)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{digest}.{suffix}")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        # The name is on the disk only with its folder; the store's row, which comes next, must not outlive the film.
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---- What a reader is told -------------------------------------------------------------------------


def describe(digest: str, film: Display) -> dict[str, Any]:
    """Describe a film in JSON: what it is, its gate, its windows, and how levels become values."""
    metadata = film.image.meta
    # Numbers, known words and our own sentences: nothing else of a header leaves here.
    rows, columns = film.levels.shape
    return {
        "sha256": digest,
        "kind": metadata["kind"],
        "rows": rows,
        "columns": columns,
        "bits": metadata["bits"],
        "view": metadata["view"],
        "photometric": metadata["photometric"],
        "renderer": metadata["renderer"],
        "marker": film.marker,
        "gate": image_gate.gate_of(film.image)._asdict(),
        "windows": film.windows,
        "inverted": film.is_inverted,
        "warnings": metadata["warnings"],
        "slope": film.slope,
        "offset": film.offset,
        "padding": film.padding,
        "aspect": film.aspect,
        "units": film.units,
        "levels_range": _range_of_levels(film),
    }


def _range_of_levels(film: Display) -> list[int]:
    """The least and the largest level of a pixel that is none of padding: a viewer's tables span them."""
    # Tables of all 65,536 levels would cost a drag its speed.
    levels = film.levels
    if film.padding is not None:
        levels = levels[levels != film.padding]
    return [int(levels.min()), int(levels.max())] if levels.size else [0, 0]


# ---- Of a server -----------------------------------------------------------------------------------


def shelf_of(state: ServerState) -> Films:
    """Give the server's shelf: one for all routers, in the store's folder, else in a temporary one."""
    if state.films is None:
        folder = getattr(state.store, "folder", None)
        # Without a store nothing outlives the server.
        place = Path(folder) / "images" if folder else tempfile.mkdtemp(prefix="cxr_jax-")
        state.films = Films(place)
    return state.films


def find_film(shelf: Films, digest: str) -> dict[str, Any]:
    """Describe a film for a client. Raises RefusedError (404) where there is none."""
    try:
        return shelf.info(digest)
    except NoSuchFilmError as error:
        raise RefusedError(404, str(error), "sha256") from None
