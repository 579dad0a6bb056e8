"""Files and folders that appear whole or not at all."""

import contextlib
import json
import os
import shutil
from pathlib import Path


def copy_files(source: Path, dst: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files that `source` has, byte for byte."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, dst / name)


@contextlib.contextmanager
def atomic_folder(folder: Path):
    """A new, empty folder beside `folder`, which takes its place at the end of the block, or vanishes.

    On any exception nothing is left, and what stood at `folder` still stands. Missing parents are made.
    """
    made = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
    temp = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(temp, ignore_errors=True)  # of a killed process that had this number
    try:
        temp.mkdir(parents=True)
        yield temp
        _swap(temp, folder)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        with contextlib.suppress(OSError):  # one that another program has filled by now stays
            for parent in made:
                parent.rmdir()
        raise


def _swap(temp: Path, folder: Path) -> None:
    """Put a complete folder in place; the old one steps aside first, so no moment mixes the two."""
    if not folder.is_dir() or not any(folder.iterdir()):
        os.rename(temp, folder)  # replaces an empty folder, too
        return
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    os.rename(folder, old)
    try:
        os.rename(temp, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str, obj) -> None:
    """Writes JSON by a temporary file and a rename: never half a file."""
    tmp = f"{path}.tmp{os.getpid()}"
    try:
        with open(tmp, "w") as f:
            json.dump(obj, f, indent=2)
            f.write("\n")
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(tmp)
        raise
