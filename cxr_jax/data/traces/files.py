"""OUT and the file of what was rejected: both written under other names, and whole or not there."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cxr_jax.data.traces.rows import Made
from cxr_jax.errors import UserError
from cxr_jax.runtime import whole_files


class RowFiles:
    """Two files of JSON Lines that appear together.

    Args:
        out: of the rows.
        rejected: of the reports that gave none.
        replace: whether files that stand there may be replaced.
    """

    def __init__(self, out: Path, rejected: Path, *, replace: bool) -> None:
        self.paths = (rejected, out)  # OUT last: where it stands, all is done
        self.replace = replace
        self._files: list[TextIO] = []

    def write(self, made: Made) -> None:
        """Write a row, or a rejected record."""
        file = self._files[made.rejected is None]
        file.write(_line(made.row if made.rejected is None else made.rejected))

    @contextlib.contextmanager
    def open(self) -> Iterator["RowFiles"]:
        """Open both files; at the end of the block they have their names, after an exception nothing is left.

        Raises:
            UserError: where they cannot be written.
        """
        parts = [whole_files.partial_path(path) for path in self.paths]
        try:
            for part, path in zip(parts, self.paths, strict=True):
                self._files.append(_open(part, path))
            yield self
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for part, path in zip(parts, self.paths, strict=True):
                self._give_name(part, path)
        finally:
            for file in self._files:
                file.close()
            for part in parts:
                part.unlink(missing_ok=True)

    def _give_name(self, part: Path, path: Path) -> None:
        try:
            whole_files.give_name(part, path, replace=self.replace)
        except FileExistsError:
            raise UserError(f"{path}: has been made meanwhile; --force replaces it") from None


def _open(part: Path, path: Path) -> TextIO:
    try:
        return open(part, "w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _line(record: dict[str, Any] | None) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
