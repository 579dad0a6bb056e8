"""Hashes of many films, each computed once: they are kept in the user's cache folder, a file for each folder of films.

A film is known by its name below that folder, its size and its time of change; another hash (`VERSION`) or another
folder has another file. Where the cache cannot be written, which is said once, hashes are those of this run alone.
"""

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxr_jax.data import images, loading
from cxr_jax.data.sources.guard.film_hash import BYTES, film_hash
from cxr_jax.errors import UserError, printable
from cxr_jax.runtime import whole_files

VERSION = "rank-dct-256-1"
SAVE_EVERY = 10_000  # films after which a process that is killed has kept what it computed

# name of a film -> (size, time of change in ns, hash in hex)
_Kept = dict[str, tuple[int, int, str]]


def hash_files(
    paths: Sequence[Path], folder: str | Path, threads: int = 0
) -> dict[Path, np.ndarray]:
    """Hash films, or take what is kept of them.

    Args:
        paths: of films, each as often as it comes.
        folder: that they lie below.
        threads: as of `loading.map_in_threads`.

    Returns:
        uint8 [32] of each film that can be read.
    """
    # One file of hashes for each folder, however it is spelt.
    root = os.path.realpath(folder)
    store = cache_folder() / f"{hashlib.sha256(f'{VERSION}:{root}'.encode()).hexdigest()[:32]}.tsv"
    kept = _load(store)
    films = {film_path: _stamp(film_path, root) for film_path in dict.fromkeys(paths)}
    new = [
        film_path
        for film_path, (film_name, *stamp) in films.items()
        if list(kept.get(film_name, ()))[:2] != stamp
    ]
    if len(new) > SAVE_EVERY:
        print(f"guard: hashing {len(new):,} films, once: they are kept", flush=True)
    # In parts, each kept when it is done.
    for start in range(0, len(new), SAVE_EVERY):
        some = new[start : start + SAVE_EVERY]
        for film_path, hash_code in zip(
            some, loading.map_in_threads(_code_of, some, threads), strict=True
        ):
            film_name, file_size, changed = films[film_path]
            kept[film_name] = (file_size, changed, hash_code)
        _save(store, kept)
    # Those that cannot be read have no hash, and no say.
    codes = {film_path: kept[film_name][2] for film_path, (film_name, *_) in films.items()}
    return {
        film_path: np.frombuffer(bytes.fromhex(hash_code), np.uint8)
        for film_path, hash_code in codes.items()
        if hash_code
    }


def cache_folder() -> Path:
    """Give the folder in which hashes are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "cxr_jax" / "film_hashes"


def _stamp(film_path: Path, root: str) -> tuple[str, int, int]:
    """A film's name below the folder, its size and its time of change."""
    # Size and time stand for the content, as make has it: to read it would cost what hashing does.
    try:
        about = film_path.stat()
    except OSError:
        # Whoever reads it will say so.
        return os.path.relpath(film_path, root), -1, -1
    return os.path.relpath(film_path, root), about.st_size, about.st_mtime_ns


def _code_of(film_path: Path) -> str:
    """The hash in hex; "" of a film that cannot be read, which is for the run to refuse."""
    try:
        return film_hash(images.read_image(film_path).pixels).tobytes().hex()
    except UserError:
        return ""


# ---- The file of hashes ----------------------------------------------------------------------------


@functools.cache
def _load(store: Path) -> _Kept:
    """Read what is kept; lines that are none are left out, so that a damaged file is made anew.

    Once a process: what it computes later is added to the very table, so that a run asks twice and computes once.
    """
    kept: _Kept = {}
    with contextlib.suppress(OSError):
        for line in store.read_text(encoding="utf-8", errors="surrogateescape").split("\n"):
            with contextlib.suppress(ValueError):
                hash_code, file_size, changed, film_name = line.split("\t", 3)
                if len(bytes.fromhex(hash_code)) == BYTES:
                    kept[film_name] = (int(file_size), int(changed), hash_code)
    return kept


_unwritable: set[Path] = set()


def _save(store: Path, kept: _Kept) -> None:
    # A film that cannot be read is tried again; a name with a line end would be two lines.
    lines = [
        f"{hash_code}\t{file_size}\t{changed}\t{film_name}\n"
        for film_name, (file_size, changed, hash_code) in kept.items()
        if hash_code and "\n" not in film_name
    ]
    # A cache that cannot be kept costs time, and no run.
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        whole_files.write_bytes(store, "".join(lines).encode(errors="surrogateescape"))
    except OSError as error:
        if store not in _unwritable:
            _unwritable.add(store)
            print(
                f"warning: {printable(store.parent)}: cannot be written ({error.strerror}): hashes of films are "
                "computed for this run alone",
                file=sys.stderr,
                flush=True,
            )
