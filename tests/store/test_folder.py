"""The folder and the command: where a store may not lie, what only its owner may read, copies, erasure."""

import contextlib
import hashlib
import io
import sys
from pathlib import Path

import pytest

from cxr_jax.errors import UserError
from cxr_jax.store import __main__ as command
from cxr_jax.store import folder, open_store
from cxr_jax.store.records.actors import OPERATOR

MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:50 / /home rw shared:1 - nfs4 server:/home rw
31 30 8:2 / /home/local rw - xfs /dev/sdb rw
32 22 0:51 / /mnt/with\\040blank rw - cifs //server/x rw
33 22 0:52 / /ssh rw - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/room", None),
        ("/home/anna/room", "nfs4"),
        ("/home/local/room", None),
        ("/homes/room", None),
        ("/mnt/with blank/room", "cifs"),
        ("/ssh/room", "fuse.sshfs"),
    ],
)
def test_network_file_systems_are_refused(path, kind):
    if kind is None:
        return folder.check_disk(Path(path), MOUNTS)
    with pytest.raises(UserError, match=f"network file system \\({kind}\\)"):
        folder.check_disk(Path(path), MOUNTS)


def test_a_refused_disk_gets_no_database(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "file_system_of", lambda path, mounts: "nfs")
    with pytest.raises(UserError, match="network file system"):
        open_store(tmp_path / "room")
    assert not list((tmp_path / "room").iterdir())


@pytest.mark.parametrize(
    "place", ["mysql://x/y", "postgresql+pg8000://x@127.0.0.1/y", "://", "nonsense://"]
)
def test_places_that_are_none(place):
    with pytest.raises(UserError, match="--store"):
        open_store(place)


def run(capsys, monkeypatch, *words, line=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(line + "\n"))
    code = command.main(words)
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("typed", "message"), [([], "no password"), (["secret"], "no password"), (["a", "b"], "differ")]
)
def test_password_that_is_not_typed_to_its_end_is_refused(typed, message, monkeypatch):
    """Ctrl-D at either question is no password, and no traceback."""

    def answer(_):
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command.getpass, "getpass", answer)
    with pytest.raises(UserError, match=message):
        command.read_password()


def test_the_command(tmp_path, capsys, monkeypatch):
    flag = f"--store={tmp_path / 'room'}"

    def call(*words, line=""):
        return run(capsys, monkeypatch, *words, line=line)

    # A name that is misspelt is no empty store in order.
    code, printed = call("verify", flag)
    assert code == 2 and "no room.db in it" in printed.err
    code, _ = call(flag, "users", "add", "anna", "--role=admin", line="a long password")
    assert code == 0
    assert call("users", "add", "bert", flag, line="short")[0] == 2
    assert "anna" in call("users", "list", flag)[1].out
    code, printed = call("keys", "add", "bench", "--scopes=chat", flag)
    assert code == 0 and printed.out.startswith("cxr_")
    assert call("keys", "add", "other", "--scopes=sudo", flag)[0] == 2
    # Beside a server, as users are added on any day.
    with contextlib.closing(open_store(tmp_path / "room", announce=str)) as store:
        assert call("keys", "disable", "bench", flag)[0] == 0
        assert call("verify", flag)[1].out.startswith("in order: 3 events, head 3:")
        assert "in use by another server" in call("backup", str(tmp_path / "b"), flag)[1].err
        film = hashlib.sha256(b"film").hexdigest()
        store.write_file(store.image_file(film, "film"), b"film")
        row = {"sha256": film, "kind": "png", "rows": 1, "cols": 1, "bits": 8}
        store.images.add(row, actor=OPERATOR)
    assert call("backup", str(tmp_path / "copy"), flag)[0] == 0
    assert call("backup", str(tmp_path / "copy"), flag)[0] == 2
    assert call("erase", film, "--reason=asked", flag)[0] == 0
    assert call("erase", film, "--reason=asked", flag)[0] == 2
    assert not list((tmp_path / "room" / "images").iterdir())
    assert call("verify", flag)[0] == 0
    # The copy is a store of its own, and has the film.
    copy = f"--store={tmp_path / 'copy'}"
    assert call("verify", copy)[0] == 0
    (tmp_path / "copy" / "images" / f"{film}.film").write_bytes(b"other")
    code, printed = call("verify", copy)
    assert code == 1 and printed.out.startswith(f"image {film}: its file has other bytes")
    assert {p.stat().st_mode & 0o077 for p in (tmp_path / "copy").rglob("*.*")} == {0}


def test_no_file_of_a_new_store_is_anybodys(tmp_path):
    """Also where the folder was there before: the first WAL holds all of the chain until the first checkpoint."""
    (tmp_path / "room").mkdir(mode=0o755)
    with contextlib.closing(open_store(tmp_path / "room", announce=str)) as store:
        store.append("x", {}, actor="a", role="b")
        files = list((tmp_path / "room").glob("room.db*"))
        assert len(files) == 3 and {path.stat().st_mode & 0o077 for path in files} == {0}
