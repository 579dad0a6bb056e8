"""Hold a store's folder: who may write in it, on what kind of disk it may lie, and the files beside the database."""

import fcntl
import os
import secrets
from pathlib import Path
from typing import IO

from cxr_jax.errors import UserError

NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "afs", "glusterfs", "ceph", "lustre", "fuse.sshfs")
"""Beginnings of the kinds whose locks or whose fsync cannot be trusted between machines."""

# Names in the folder, which backups and other programs know.
DATABASE = "room.db"
IMAGES = "images"


def file_system_of(path: Path, mounts: str) -> str:
    """Return the kind of file system that a path lies on.

    Args:
        path: an absolute path, links followed.
        mounts: the text of Linux's /proc/self/mountinfo.
    """
    # The mount whose point is the longest beginning of the path is the one that it lies on.
    kind, longest = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        # Blanks in a mount point are written as \040.
        mount_point = Path(fields[4].encode().decode("unicode_escape"))
        # Of two mounts on one point the later one is seen.
        if path.is_relative_to(mount_point) and len(mount_point.parts) >= longest:
            kind, longest = after.split()[0], len(mount_point.parts)
    return kind


def check_disk(folder: Path, mounts: str | None = None) -> None:
    """Refuse a folder on a network file system, where SQLite's locks do not hold.

    Raises:
        UserError: if it lies on one.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:  # not Linux
            return
    kind = file_system_of(folder.resolve(), mounts)
    if kind.startswith(NETWORK_FILE_SYSTEMS):
        raise UserError(
            f"--store={folder}: lies on a network file system ({kind}), where a lock or a commit may be lost; "
            "use a local disk, or PostgreSQL by its URL"
        )


class StoreFolder:
    """A store's folder: the lock of its one server, the key of its HMACs, and films as they were uploaded.

    Args:
        path: made if it is not there, for its owner alone.
        exclusive: hold the lock of the server until `close`.

    Raises:
        UserError: if it cannot be written, lies on a network file system, or another server holds it.
    """

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # After making it, since a folder that is not there lies nowhere; an empty one is all that a refusal leaves.
            check_disk(path)
            (path / IMAGES).mkdir(mode=0o700, exist_ok=True)
            if exclusive:
                self._lock = _locked(path)
            self.secret = _secret(path / "secret")
        except OSError as error:
            raise UserError(f"--store={path}: cannot be written ({error.strerror})") from error

    def image_file(self, sha256: str, suffix: str) -> Path:
        """Return where a film's file lies: `original`, `pixels`, or what else its owner calls it."""
        return self.path / IMAGES / f"{sha256}.{suffix}"

    def write_file(self, path: Path, content: bytes) -> None:
        """Write a file of the folder whole or not at all, readable for its owner alone, and on the disk at the end."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A random name, so that two threads that write one film do not write one file.
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as opened_file:
                opened_file.write(content)
                opened_file.flush()
                os.fsync(opened_file.fileno())
            # Now it is whole; the name has either this content or the one before.
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        # The name is on the disk only with its folder.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Let another server have the folder."""
        if self._lock is not None:
            # Closing it lets go of the lock.
            self._lock.close()
            self._lock = None


def _locked(path: Path) -> IO[str]:
    # Never deleted: two programs that each lock their own file of this name would both go on.
    lock = open(path / "lock", "a", encoding="utf-8")
    try:
        # The system lets go of it when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"--store={path}: in use by another server; a store has one") from None
    return lock


def _secret(path: Path) -> bytes:
    """Return the key of this store's HMACs, made at the first opening."""
    # O_EXCL: of two programs that open a new store at once, one makes it and the other reads it.
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        secret = path.read_bytes()
        # A kill between making the file and filling it.
        if len(secret) == 32:
            return secret
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC, 0o600)
    secret = secrets.token_bytes(32)
    with os.fdopen(descriptor, "wb") as opened_file:
        opened_file.write(secret)
        opened_file.flush()
        os.fsync(opened_file.fileno())
    return secret
