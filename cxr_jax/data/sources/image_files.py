"""The file of each row of a manifest, below the image root."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

from cxr_jax.data.shards import records
from cxr_jax.data.sources import patients
from cxr_jax.errors import UserError

# Of films; case does not count.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom")


class BadNameError(Exception):
    """The reason why the name of an image is refused."""


def split_name(name: str) -> tuple[str, ...]:
    """Split the name of an image at / and at \\ alike, which must be a path relative to a root that it never leaves.

    Raises:
        BadNameError: with the reason.
    """
    # Paths of either system, and never out of the root: a manifest comes from elsewhere.
    windows_path = PureWindowsPath(name)
    if (
        "://" in name
        or "\0" in name
        or name.startswith("/")
        or windows_path.drive
        or windows_path.is_absolute()
    ):
        raise BadNameError("the image is not a path relative to the image root")
    if ".." in windows_path.parts:
        raise BadNameError("the image path leaves the image root")
    if not windows_path.parts:
        raise BadNameError("the image is the image root itself, not a file in it")
    return windows_path.parts


# A path of usual characters that stays where it is: no step is made of dots alone, none is empty.
PLAIN_NAME = re.compile(r"(?:[A-Za-z0-9_ -][A-Za-z0-9_. -]*/)*[A-Za-z0-9_-][A-Za-z0-9_. -]*")


def check_name(name: str) -> None:
    """Refuse the name of an image that is no plain path below its root: made of ids, these may hold anything.

    Raises:
        BadNameError: as `split_name` does, and for an empty step or a \\, which another root or system would read anew.
    """
    # Nearly all are plain: nothing to split.
    if not PLAIN_NAME.fullmatch(name) and "/".join(split_name(name)) != name:
        raise BadNameError("the image path has an empty step, a . or a \\")


def film_key(name: str) -> str:
    """Give what the names of a film's copies have in common: all but the suffix of an image."""
    stem, dot, suffix = name.rpartition(".")
    if f"{dot}{suffix.lower()}" in IMAGE_SUFFIXES:
        return stem
    return name


class ImageFinder:
    """Finds images below a root: by their path, then by their bare name, since users flatten published folders.

    A bare name stands for one path only: view1_frontal.jpg of a second patient would be the first one's film.
    """

    def __init__(self, root: str | Path) -> None:
        """Look below `root`.

        Raises:
            UserError: if it is no folder.
        """
        if not os.path.isdir(root):
            raise UserError(f"{root}: the image root is not a directory")
        self.root = Path(root)
        # Text and no Path: a manifest of a large set has hundreds of thousands of rows.
        self._root_name = str(root)
        self._inside = os.path.join(os.path.realpath(root), "")
        self._names: dict[str, tuple[str, ...]] = {}  # file -> the name by which it was asked for
        self._flattened: set[str] = set()  # files that were found by a bare name

    def find(self, name: str) -> Path:
        """Find the file of an image.

        Raises:
            BadNameError: with the reason: a name as `split_name` refuses it, no file, a link out of the root, a bare
                name that would stand for two images.
        """
        parts = split_name(name)
        for candidate in (
            os.path.join(self._root_name, *parts),
            os.path.join(self._root_name, parts[-1]),
        ):
            if os.path.isfile(candidate) or records.is_member(candidate):
                if not os.path.realpath(candidate).startswith(self._inside):
                    raise BadNameError("the image is a link that leaves the image root")
                self._check_one_name(candidate, parts)
                return Path(candidate)
        raise BadNameError(f"image file not found: {name!r} below {self._root_name!r}")

    def find_all(self, names_of_images: Sequence[Sequence[str]]) -> tuple[str, tuple[Path, ...]]:
        """Find the files of the images of a row.

        Args:
            names_of_images: of each image its name in every key that has one.

        Returns:
            The name by which the row is known, that of its first image, and the files.

        Raises:
            BadNameError: as `find_named` does, without an image, for one file twice, and for several patients.
        """
        if not names_of_images:
            raise BadNameError("no image")
        found = [self.find_named(names) for names in names_of_images]
        files = tuple(file for _, file in found)
        # A film of somebody else beside a patient's would be a slip that no score shows.
        if patients.are_several(name for name, _ in found):
            raise BadNameError("the images are of several patients by their paths")
        # Nobody means to ask about one film as two.
        if len(set(files)) < len(files):
            raise BadNameError("two of the images are one file")
        return found[0][0], files

    def find_named(self, names: Sequence[str]) -> tuple[str, Path]:
        """Find the file of an image that has a name in several keys of its row.

        Returns:
            The name relative to the root by which rows are known, the last one, and the file.

        Raises:
            BadNameError: as `find` does, and for names of different files.
        """
        # The last stands beside the dialogue: rows are known by that.
        *others, image_name = (self._below_root(name) for name in names)
        image_path = self.find(image_name)
        for other in dict.fromkeys(others):
            parts = split_name(other)
            own_path = self.root.joinpath(*parts)
            # Where folders are flattened, the same name in other folders is the same film.
            is_same = own_path == image_path or (
                parts[-1] == image_path.name and not own_path.is_file()
            )
            if not is_same:
                raise BadNameError("the keys of the row name different files")
        return image_name, image_path

    def _below_root(self, name: str) -> str:
        """The name relative to the root, where it is an absolute path below it."""
        with contextlib.suppress(ValueError):
            if name.startswith("/"):
                return str(Path(name).relative_to(self.root.absolute()))
        return name

    def _check_one_name(self, file: str, parts: tuple[str, ...]) -> None:
        other = self._names.setdefault(file, parts)
        if file != os.path.join(self._root_name, *parts):
            self._flattened.add(file)
        if other != parts and file in self._flattened:
            raise BadNameError(
                f"{'/'.join(parts)!r} and {'/'.join(other)!r} would both be read from {parts[-1]!r}: their folders are "
                f"missing below {self._root_name!r}"
            )
