"""A PostgreSQL server of the tests' own: Debian's programs, a fresh folder, loopback alone, stopped at the end."""

import contextlib
import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile

PROGRAMS = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))


def why_not() -> str | None:
    """Why it cannot be run here; None if it can."""
    if not PROGRAMS:
        return "PostgreSQL is not installed (Debian: postgresql)"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "PostgreSQL refuses to run as root, and there is no user postgres"
    return None


def _as_postgres(*command, check=True):
    # initdb refuses root.
    before = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*before, *command], check=check, capture_output=True, text=True, cwd="/tmp", timeout=120
    )


@contextlib.contextmanager
def running():
    """Yield the URL of an empty database, without a folder."""
    programs = os.path.dirname(PROGRAMS[-1])
    folder = tempfile.mkdtemp(prefix="cxr_pg_")
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = os.path.join(folder, "data")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    # What a commit has written outlives every process, and no test cuts the power: nothing waits for the disk.
    options += " -c fsync=off -c synchronous_commit=off -c full_page_writes=off"
    try:
        _as_postgres(
            f"{programs}/initdb", "-D", data, "-U", "reader", "--auth=trust", "-E", "UTF8", "-N"
        )
        _as_postgres(
            f"{programs}/pg_ctl", "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "start"
        )
        yield f"postgresql+pg8000://reader@127.0.0.1:{port}/postgres"
    finally:
        _as_postgres(f"{programs}/pg_ctl", "-D", data, "-m", "immediate", "stop", check=False)
        shutil.rmtree(folder, ignore_errors=True)
