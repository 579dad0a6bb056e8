"""Files of a manifest that cannot be read: named once each, counted, and one too many ends the run."""

import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from cxr_jax.data import image_gate, images, loading
from cxr_jax.errors import UserError, printable

CHECK_PART = 256  # files that are decoded between two looks for a signal
LISTED = 100  # unreadable files that a check names


class UnreadableFiles:
    """The files that a run could not read so far, at most `limit` of them. Safe to call from threads."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._paths: set[Path] = set()
        self._lock = threading.Lock()

    def __contains__(self, path: Path) -> bool:
        """Tell whether a file is known to be unreadable."""
        return path in self._paths

    def add(self, path: Path, error: UserError) -> None:
        """Take note of a file, and say so once.

        Raises:
            UserError: if it is one too many.
        """
        with self._lock:
            if path in self._paths:
                return
            if len(self._paths) >= self.limit:
                raise UserError(too_many(str(error), self.limit)) from error
            self._paths.add(path)
            print(
                f"warning: {printable(error)}; left out, {len(self._paths)} of at most {self.limit} "
                "(config.data.max_bad)",
                file=sys.stderr,
                flush=True,
            )


def too_many(problem: str, limit: int) -> str:
    """Say why a file that cannot be read ends a run."""
    if not limit:
        return f"{problem} (config.data.max_bad=0: every film must be readable)"
    return f"{problem} (more than config.data.max_bad={limit} films cannot be read)"


def check_files(
    paths: Iterable[Path],
    *,
    limit: int = 0,
    threads: int = 0,
    gate: str = "off",
    sizes: dict[Path, tuple[int, int]] | None = None,
    poll: Callable[[], object] | None = None,
) -> str:
    """Decode every file, each once, and print those that cannot be read.

    Args:
        limit: files that may be unreadable.
        threads: as of `loading.map_in_threads`.
        gate: policy of `image_gate`; under "refuse" what is no chest film cannot be read.
        sizes: takes the (height, width) of every film that can be read.
        poll: called before every CHECK_PART files; what it raises ends this.

    Returns:
        A line that counts them.

    Raises:
        UserError: if more are unreadable: the first, and how many there are.
    """
    files = list(dict.fromkeys(paths))

    def problem_of(path: Path) -> str | None:
        try:
            film = images.read_image(path)
            if gate == "refuse":
                image_gate.check(path, film, gate, "config.data.image_gate")
        except UserError as error:
            return str(error)
        if sizes is not None:
            sizes[path] = film.pixels.shape
        return None

    problems: list[str] = []
    for start in range(0, len(files), CHECK_PART):
        if poll is not None:
            poll()
        part = loading.map_in_threads(problem_of, files[start : start + CHECK_PART], threads)
        problems += filter(None, part)
    if problems and (limit or len(problems) > 1):
        for problem in problems[:LISTED]:
            print(f"unreadable: {printable(problem)}", flush=True)
    if len(problems) > limit:
        count = (
            f"{len(problems):,} of {len(files):,} films cannot be read, the first: {problems[0]}"
        )
        raise UserError(too_many(count if len(problems) > 1 else problems[0], limit))
    found = "all can be read"
    if problems:
        found = (
            f"{len(problems):,} cannot be read and will be left out (config.data.max_bad={limit})"
        )
    return f"checked {len(files):,} films: {found}"
