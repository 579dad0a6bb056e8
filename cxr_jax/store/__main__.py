"""Keeps the reading room's store: users, API keys, checks, backups, erasure.

    cxr-jax store users add HANDLE [--role=reader] | list | disable HANDLE | password HANDLE
    cxr-jax store keys add NAME [--scopes=chat,read] | list | disable NAME
    cxr-jax store verify [--head=NUMBER:HASH ..]
    cxr-jax store backup FOLDER
    cxr-jax store erase SHA256 --reason=WHY

A handle is a pseudonym; roles are reader, coordinator, admin, analyst. A password is asked for twice at a terminal, and
read as one line from anything else. A key is shown once. `verify` walks the chain of events, compares what folds from
it and the films, names the first bad row first, and ends with 1 if there is any; with a head that was printed,
exported or written down it finds a tail that is gone. `erase` deletes a film's files and leaves its hash.

--store is a folder (default runs/room) or a URL, postgresql+pg8000://USER@HOST/DATABASE?folder=DIR. All but `backup`
and `erase` may be used while a server runs. Exit codes: 0 done, 1 something does not agree or the database failed, 2
bad usage or input. `python -m cxr_jax.store` is the same command. Research use only. Not for diagnosis.
"""

import argparse
import contextlib
import getpass
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import UserError, exit_code, print_lines

# Where launch/serve.sh keeps it, too.
DEFAULT_STORE = "runs/room"

# ---- Flags -----------------------------------------------------------------------------------------------------------


class _SubjectParser(argparse.ArgumentParser):
    """The parser of what stands behind a command's name; its mistakes are one line, too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.store", description=__doc__)
    parser.add_argument("--store", default=DEFAULT_STORE, metavar="DIR", help="folder or URL")
    subjects = parser.add_subparsers(
        dest="subject", required=True, metavar="COMMAND", parser_class=_SubjectParser
    )
    users = subjects.add_parser("users")
    users.add_argument("action", choices=("add", "list", "disable", "password"))
    users.add_argument("name", nargs="?", metavar="HANDLE")
    users.add_argument("--role", default="reader")
    # ---- Keys of programs, and what is done to the whole store ----
    keys = subjects.add_parser("keys")
    keys.add_argument("action", choices=("add", "list", "disable"))
    keys.add_argument("name", nargs="?", metavar="NAME")
    keys.add_argument("--scopes", default="chat,read")
    verify = subjects.add_parser("verify")
    verify.add_argument("--head", action="append", default=[], metavar="NUMBER:HASH")
    backup = subjects.add_parser("backup")
    backup.add_argument("name", metavar="FOLDER")
    erase = subjects.add_parser("erase")
    erase.add_argument("name", metavar="SHA256")
    erase.add_argument("--reason", required=True)
    # The store may be named before the command or behind it.
    for subject in (users, keys, verify, backup, erase):
        subject.add_argument("--store", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        subject.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    needs_name = arguments.subject in ("users", "keys") and arguments.action != "list"
    if needs_name and not arguments.name:
        raise UserError(f"{arguments.subject} {arguments.action}: name whom or which")
    return arguments


# ---- What it does ----------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags say; return the exit code."""
    # Without the extra the rest of the package works; this command says what is missing.
    try:
        from cxr_jax.store import open_store
    except ModuleNotFoundError as error:
        raise UserError(
            f"store: the package {error.name} is not installed (pip install 'cxr_jax[serve]')"
        ) from None
    # A folder, or a URL that may hold a password: it is in no message of ours.
    place = str(arguments.store)
    makes_one = arguments.subject in ("users", "keys") and arguments.action == "add"
    # A misspelt name must not make an empty store, which would then be found to be in order.
    if "://" not in place and not makes_one and not (Path(place) / "room.db").is_file():
        raise UserError(f"--store={place}: there is no store (no room.db in it)")
    # A copy of what is being written would be of no moment; files that are erased may be being read.
    is_alone = arguments.subject in ("backup", "erase")
    store = open_store(place, exclusive=is_alone, announce=_say_nothing)
    with contextlib.closing(store):
        if arguments.subject == "users":
            return _users(store, arguments)
        if arguments.subject == "keys":
            return _keys(store, arguments)
        if arguments.subject == "verify":
            return _verify(store, arguments.head)
        if arguments.subject == "backup":
            from cxr_jax.store.backup import back_up

            print_lines([back_up(store, Path(arguments.name))])
            return 0
        count = store.images.erase(arguments.name, arguments.reason)
        print_lines([f"erased: {count} files of {arguments.name}; its hash stays in the chain"])
        return 0


def _say_nothing(line: str) -> None:
    """The head is said by servers; a command prints what it was asked for."""


def _users(store, arguments: argparse.Namespace) -> int:  # noqa: ANN001  the class is imported late
    name = arguments.name
    if arguments.action == "add":
        # Before the password: nobody types one for a handle that is none.
        store.users.check_new(name, arguments.role)
        store.users.add(name, arguments.role, read_password())
        print_lines([f"added: {name}, {arguments.role}"])
    elif arguments.action == "disable":
        store.users.disable(name)
        print_lines([f"disabled: {name}"])
    elif arguments.action == "password":
        store.users.set_password(name, read_password())
        print_lines([f"password set: {name}; open sessions have ended"])
    else:
        print_lines(
            f"{row['handle']:<40} {row['role']:<12} {row['created']} "
            f"{'disabled ' + row['disabled_at'] if row['disabled_at'] else 'active'}"
            for row in store.users.rows()
        )
    return 0


def _keys(store, arguments: argparse.Namespace) -> int:  # noqa: ANN001  the class is imported late
    if arguments.action == "add":
        # Blanks between commas are nobody's scope.
        scopes = [scope for scope in arguments.scopes.split(",") if scope]
        # The key alone on stdout, so that a script can take it; what it is goes to stderr.
        print_lines([store.api_keys.add(arguments.name, scopes)])
        print_lines(
            [f"key {arguments.name} ({', '.join(scopes)}): shown once, it is kept as a hash"],
            on_stderr=True,
        )
    elif arguments.action == "disable":
        store.api_keys.disable(arguments.name)
        print_lines([f"disabled: {arguments.name}"])
    else:
        print_lines(
            f"{row['name']:<40} {','.join(row['scopes']):<12} {row['created']} "
            f"{'disabled ' + row['disabled_at'] if row['disabled_at'] else 'active'}"
            for row in store.api_keys.rows()
        )
    return 0


def _verify(store, head_texts: Sequence[str]) -> int:  # noqa: ANN001  the class is imported late
    from cxr_jax.store import parse_head

    # Read before anything else: a mistyped head is no damage.
    heads = [parse_head(text) for text in head_texts]
    problems = store.verify(heads, files=True)
    if problems:
        print_lines([*problems, f"{len(problems)} problems"])
        return 1
    print_lines([f"in order: {store.head().seq} events, head {store.head()}"])
    return 0


def read_password() -> str:
    """Read a password: twice from a terminal, without showing it, or one line of a pipe.

    Raises:
        UserError: if the two differ, or there is none.
    """
    # From a pipe, so that scripts can add users; never from a flag, which others see in `ps`.
    if not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        # Ctrl-D, or a terminal that is gone.
        try:
            password, again = getpass.getpass("password: "), getpass.getpass("again: ")
        except EOFError:
            raise UserError("no password was given") from None
        if again != password:
            raise UserError("the two passwords differ")
    if not password:
        raise UserError("no password was given")
    return password


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. No traceback unless --debug.

    Returns:
        The exit code: 0 done, 1 something does not agree or the database failed, 2 bad usage or input.
    """
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
