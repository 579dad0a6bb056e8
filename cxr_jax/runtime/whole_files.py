"""Files and folders that appear whole or not at all."""

import contextlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from cxr_jax.errors import UserError


def copy_files(source: Path, destination: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files that `source` has, byte for byte."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


# ---- Folders ----


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `folder`, which takes its place at the end of the block, or vanishes.

    On any exception nothing is left, and what stood at `folder` still stands. Missing parents are made.
    """
    # Remembered before they are made, so that a failure can take them away again.
    made_parents = [
        parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()
    ]
    temporary = partial_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had this number
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _swap(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # one that another program has filled by now stays
            for parent in made_parents:
                parent.rmdir()
        raise


def _swap(temporary: Path, folder: Path) -> None:
    """Put a complete folder in place; the old one steps aside first, so no moment mixes the two."""
    if not folder.is_dir() or not any(folder.iterdir()):
        os.rename(temporary, folder)  # replaces an empty folder, too
        return
    # Hidden and with this process's number, so that nobody takes it for a folder to read.
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except BaseException:
        # Back in its place before the error goes on: the old folder is what the caller still has.
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Name the place beside `path` where this process makes what will stand there: hidden, and of this process only."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def check_utf8(path: str | os.PathLike, named: str) -> None:
    """Refuse a place for checkpoints whose path is not UTF-8: the library that writes them takes no such path.

    Args:
        path: of the folder; those above it count.
        named: as the user named it, for the message.

    Raises:
        UserError: for bytes that are no text.
    """
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{named}: the path is not UTF-8, and checkpoints need that") from None


# ---- Files ----


def check_output(path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = ()) -> None:
    """Refuse a place for a file that cannot be one, before work is done for it.

    Args:
        path: as the user gave it.
        inputs: files that are read: none of them may be replaced.

    Raises:
        UserError: for an empty name, a folder, a folder that is not there, one of the inputs.
    """
    if not os.fspath(path):
        raise UserError("the name of the file to write is empty")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: cannot be written (no such folder)") from None
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason})") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: cannot be written (it is a folder)")
    # By the file itself: links and other spellings of its name count.
    for source in inputs:
        with contextlib.suppress(OSError):
            if os.path.samefile(path, source):
                raise UserError(f"{path}: is read, and may not be replaced")


def is_stdout(path: str | os.PathLike) -> bool:
    """Tell whether a name stands for the stdout of this process."""
    return _is_output(path, sys.__stdout__)


def _is_output(path: str | os.PathLike, stream: TextIO | None) -> bool:
    # A process may have none, and a stream that stands for one no number.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.path.samestat(os.stat(path), os.fstat(stream.fileno()))  # type: ignore[union-attr]
    return False


def _is_stream(path: Path) -> bool:
    """Tell whether a name stands for what a rename would put away: a device, a pipe, an output of this process."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode):
        return not stat.S_ISDIR(found.st_mode)
    # /dev/stdout is a regular file where the shell has sent it to one.
    return any(_is_output(path, stream) for stream in (sys.__stdout__, sys.__stderr__))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file by a temporary one and a rename: never half a file, and on an error the old one stays.

    Devices, pipes and outputs of this process are written to; of a link the file that it leads to is replaced.
    """
    path = Path(path)
    if _is_stream(path):
        # At its end, where it has one: others write to it, too.
        with open(path, "ab") as stream:
            stream.write(data)
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    # Beside the file, so on the same file system, where a rename is one step.
    temporary = partial_path(path)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    # Whatever stopped it, an interrupt included: half a file must not stay under any name.
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file in UTF-8, whole or not at all. What UTF-8 cannot hold is escaped, as in JSON (\\udcff)."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write a file of JSON, indented by 2, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def give_name(temporary: Path, path: Path, *, replace: bool) -> None:
    """Give a complete file its name.

    Args:
        replace: whether a file that has the name by now is replaced.

    Raises:
        FileExistsError: if the name is taken and may not be replaced; `temporary` stays.
    """
    if replace and _is_stream(path):
        write_bytes(path, temporary.read_bytes())
        temporary.unlink()
        return
    if not replace:
        try:
            os.link(temporary, path)  # fails where the name is taken, in one step
            temporary.unlink()
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if path.exists():
                raise FileExistsError(f"{path}: exists") from None
    os.replace(temporary, path)
