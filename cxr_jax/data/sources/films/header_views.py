"""Views of films whose tables do not have them: those of their DICOM headers, read without the pixels."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError

from cxr_jax.data.sources.films.tables import folder_of, list_folder, read_view

UNKNOWN = "UNKNOWN"
_THREADS = 16  # a header is one small read: on a network disk nearly all of it is waiting


def find_files(
    data_root: Path, patterns: Sequence[str], image_folder: str, films: Sequence[str]
) -> list[Path | None]:
    """Find the DICOM file of each film in a folder that holds them all: None where there is none.

    Args:
        data_root: of the set.
        patterns: of folders below the root that the image folder may lie in, beside the root itself.
        image_folder: its name.
        films: names of films, without a suffix.
    """
    # A root that is the table's file stands for its folder.
    root = folder_of(data_root)
    bases = [
        root,
        *(path for pattern in patterns if pattern for path in sorted(root.glob(pattern))),
    ]
    # One listing a folder in place of a question a film.
    listed = {
        file_name: base / image_folder / file_name
        for base in bases
        for file_name in list_folder(base / image_folder)
    }
    return [listed.get(f"{film}.dcm", listed.get(f"{film}.dicom")) for film in films]


def read_views(files: Sequence[Path | None]) -> tuple[list[str], str]:
    """Read the views of films from their headers.

    Args:
        files: one a film; None where it is not there.

    Returns:
        Views, UNKNOWN where no header tells one, and a line on where they are from.
    """
    # Without files nothing is asked: tables alone are a set, too.
    if not any(files):
        return [UNKNOWN] * len(files), (
            "the views stand in the DICOM headers alone (config.data.views=any)"
        )
    # In the order of the films, whichever header comes first.
    with ThreadPoolExecutor(_THREADS) as pool:
        header_views = list(pool.map(_read_view, files))
    known_count = sum(view != UNKNOWN for view in header_views)
    return header_views, f"the views of {known_count:,} films are those of their DICOM headers"


def _read_view(path: Path | None) -> str:
    if path is None:
        return UNKNOWN
    try:
        header = pydicom.dcmread(
            path, stop_before_pixels=True, specific_tags=["ViewPosition"], force=False
        )
        return read_view(str(header.get("ViewPosition", "") or ""))
    # A torn film is refused where it is read, with its name: here its view is what nobody knows.
    except (OSError, InvalidDicomError, ValueError, EOFError, AttributeError, NotImplementedError):
        return UNKNOWN
