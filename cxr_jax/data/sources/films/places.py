"""Where the films of a set lie on disk: published paths, renamed roots, other suffixes, without a look at each file."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from cxr_jax.data.shards import records
from cxr_jax.data.sources.films import Films, as_texts
from cxr_jax.data.sources.films.tables import folder_of, list_folder
from cxr_jax.data.sources.image_files import film_key

CHECKS = ("all", "sample", "none")
CHECK_ALL = 10_000  # films up to which all are looked for
SAMPLE = 1_000  # else
SEED = 0  # that draws them
_PROBES = 20  # films by which a place is chosen
# Copies of a set have others than its tables say; what a set is known to have is asked for first.
_SUFFIXES = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG", ".dcm", ".dicom")


class Place(NamedTuple):
    """How a path of the tables becomes a file: below `base`, without its first `strip` parts, with another `suffix`.

    Of a set that lies in several folders (images_001 .. images_012) `folders` says which has what: the first part of
    a film's path that is left -> the folder instead of `base`.
    """

    base: Path
    strip: int = 0
    suffix: str = ""
    folders: Mapping[str, Path] = MappingProxyType({})

    def image(self, name: str) -> str:
        """Give the path of a film below `base`."""
        # A path with fewer parts keeps its last.
        name = name.split("/", self.strip)[-1]
        if not self.suffix:
            return name
        # Some tables name films without one.
        return film_key(name) + self.suffix

    def path(self, name: str) -> Path:
        """Give the file of a film."""
        image = self.image(name)
        return self.folders.get(image.partition("/")[0], self.base) / image


class Found(NamedTuple):
    """What was looked for.

    Attributes:
        place: where films lie; None where none was found.
        asked: indices of the films that were looked for.
        missing: those that are not there.
        description: one line.
    """

    place: Place | None
    asked: np.ndarray
    missing: np.ndarray
    description: str


def look_for(films: Films, check: str = "") -> Found:
    """Look for the files of films.

    Args:
        check: "all", "sample" (SAMPLE of them, drawn by SEED) or "none"; "": all up to CHECK_ALL, else a sample.
    """
    # ---- Nothing to look for ----
    count = len(films)
    if check == "none" or not films.has_images:
        why = (
            "not looked for"
            if check == "none"
            else "rows are studies; no folder of their films is there"
        )
        return Found(None, np.array([], int), np.array([], int), f"films: {why}")
    # ---- Where films lie, by a few of them ----
    generator = np.random.default_rng(SEED)
    place = find_place(films, generator)
    # ---- All of them, or as many as a network disk answers in seconds ----
    is_all = check == "all" or (not check and count <= CHECK_ALL)
    asked = np.arange(count)
    if not is_all:
        asked = np.sort(generator.choice(count, min(SAMPLE, count), replace=False))
    how = f"all {count:,}" if is_all else f"{len(asked):,} of {count:,}, drawn by seed {SEED},"
    if place is None:
        return Found(
            None, asked, asked, f"films: none was found below {films.root} ({how} are listed)"
        )
    missing = np.array([row for row in asked if not is_film(place.path(films.images[row]))], int)
    found = f"films: looked for {how} below {place.base}{_describe(place)}"
    if not len(missing):
        return Found(place, asked, missing, f"{found}: all are there")
    # One name helps more than a count; paths hold no more than the user's own table.
    first = films.images[missing[0]]
    return Found(
        place, asked, missing, f"{found}: {len(missing):,} are not there, the first {first}"
    )


def _describe(place: Place) -> str:
    # Nothing where the table's own path was right.
    changes = []
    if place.strip:
        changes.append(f"without the first {place.strip} parts of their paths")
    if place.folders:
        changes.append("in several folders")
    if place.suffix:
        changes.append(f"as {place.suffix}")
    # A place that needs no words has none.
    return f" ({', '.join(changes)})" * bool(changes)


def is_film(path: Path) -> bool:
    """Tell whether there is a film: a file, or a record of a shard."""
    return os.path.isfile(path) or records.is_member(path)


def find_place(films: Films, generator: np.random.Generator) -> Place | None:
    """Find where films lie by a few of them: the place that most of them are at; None if none is at any."""
    probes = generator.choice(len(films), min(_PROBES, len(films)), replace=False)
    names = [films.images[row] for row in probes]
    # The same films at each place, so that counts compare.
    best, most = None, 0
    for place in _places(films, max(name.count("/") for name in names)):
        # A place that has all is taken at once; some films may be missing everywhere.
        hits = sum(is_film(place.path(name)) for name in names)
        if hits > most and _is_one_to_one(films, place.strip):
            best, most = place, hits
            if hits == len(names):
                break
    return best


def _is_one_to_one(films: Films, strip: int) -> bool:
    """Tell whether films still have names of their own: view1_frontal.jpg alone would be one file for all patients."""
    if not strip:
        return True
    # A set may list a film in several rows.
    film_images = set(films.images)
    return len({film_image.split("/", strip)[-1] for film_image in film_images}) == len(film_images)


def _places(films: Films, depth: int) -> Iterator[Place]:
    """Where films may lie, the likeliest first."""
    root = folder_of(films.root)
    # Paths of CheXpert begin with the name of the root itself.
    bases = [root, root.parent]
    for pattern in films.image_folders:
        bases += [path for path in sorted(root.glob(pattern)) if path.is_dir()]
    # Flattened, too: then only the name is left.
    strips = dict.fromkeys((*range(min(depth, 2) + 1), depth))
    suffixes = dict.fromkeys(("", *films.suffixes, *_SUFFIXES))
    for suffix in suffixes:
        for base in bases:
            for strip in strips:
                yield Place(base, strip, suffix)
    # All folders together: each is listed once, and none of them has all films.
    folders: dict[str, Path] = {}
    for base in bases[:1] + bases[2:]:
        for name in list_folder(base):
            folders.setdefault(name, base)
    for suffix in suffixes:
        for strip in strips:
            yield Place(root, strip, suffix, folders)


def with_files(films: Films, place: Place | None) -> Films:
    """Give films with the suffix that their files have; the rest of their paths stays as published."""
    if place is None or not place.suffix:
        return films
    # A row that names a file of another suffix could not be opened.
    rename: Callable[[str], str] = Place(Path(), 0, place.suffix).image
    return replace(films, images=as_texts(list(map(rename, films.images))))


def paths_of(films: Films, place: Place, rows: Sequence[int]) -> list[Path]:
    """Give the files of some films."""
    return [place.path(films.images[row]) for row in rows]
