"""Which way a film was taken, as far as a table or a path says: a prompt for frontal films is not asked of others."""

import re
from collections.abc import Iterable, Mapping

from cxr_jax.data.dicom import words
from cxr_jax.data.sources.table import column_key

FRONTAL, LATERAL, OTHER = "frontal", "lateral", "other"

# As `column_key` spells them.
VIEW_COLUMNS = frozenset(
    (
        "view",
        "views",
        "viewposition",
        "viewpositiondicom",
        "viewpos",
        "viewtype",
        "viewlabel",
        "viewname",
        "imageview",
        "xrayview",
        "projection",
        "projectionview",
        "frontallateral",
        "lateralfrontal",
        "appa",
        "paap",
        "viewcodesequence",
        "viewcodesequencecodemeaning",
        "viewcode",
        "filmview",
    )
)
# Columns that say yes or no of one view.
_YES_NO_COLUMNS = {
    "lateral": LATERAL,
    "islateral": LATERAL,
    "frontal": FRONTAL,
    "isfrontal": FRONTAL,
}
_YES, _NO = ("1", "1.0", "true", "yes", "y"), ("0", "0.0", "false", "no", "n")

# What the words of a header's view are to a prompt for frontal films.
_VIEW_OF_HEADER = {
    "PA": FRONTAL,
    "AP": FRONTAL,
    "FRONTAL": FRONTAL,
    "LATERAL": LATERAL,
    "OTHER": OTHER,
}
# In a file's name a single letter is no view.
PATH_LATERAL = frozenset(("lateral", "lat", "llat", "rlat"))


def _words(text: str) -> list[str]:
    # POSTERO_ANTERIOR, ap-supine, viewLateral
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return re.findall(r"[a-z]+", spaced.lower())


def view_of_text(text: str) -> str | None:
    """Read a view as a header's is read: PA, AP_horizontal, POSTERO_ANTERIOR; LL, "left lateral"; LAO, Axial.

    Returns:
        None where it says none. A lateral decubitus is `OTHER`, and so is what names a frontal and a lateral view.
    """
    return view_of_header(words.view_of_position(text))


def view_of_header(view: str) -> str | None:
    """Give the view of a film whose header was understood as `view` (`Image.meta`); None where nobody knows it."""
    return _VIEW_OF_HEADER.get(view)


def view_in_path(path: str) -> str | None:
    """Find the view that a file's name or its folder says: view2_lateral.jpg, lateral/00012.png."""
    names = path.replace("\\", "/").split("/")
    in_file = set(_words(names[-1].rpartition(".")[0] or names[-1]))
    in_folder = set(_words(names[-2])) if len(names) > 1 else set()
    is_lateral = bool(in_file & PATH_LATERAL) or "lateral" in in_folder
    is_frontal = "frontal" in in_file or "frontal" in in_folder
    if is_frontal == is_lateral:
        return None
    return FRONTAL if is_frontal else LATERAL


def find_view(fields: Mapping[str, object], paths: Iterable[str]) -> str | None:
    """Find the view of a row in its usual columns and in its paths; what is not frontal counts before what is.

    Args:
        fields: column or key -> its value, however they are spelt.
        paths: the row's id, its image.

    Returns:
        FRONTAL, LATERAL, OTHER, or None where nothing says.
    """
    found = {view_in_path(path) for path in paths}
    for name, value in fields.items():
        key, text = column_key(name), str(value).strip()
        if key in VIEW_COLUMNS:
            # The three names as they are written here, of which "other" says no view in anybody else's words.
            found.add(text if text in (FRONTAL, LATERAL, OTHER) else view_of_text(text))
        elif key in _YES_NO_COLUMNS:
            found.add(_view_of_answer(_YES_NO_COLUMNS[key], text.lower()))
    return next((view for view in (LATERAL, OTHER, FRONTAL) if view in found), None)


def _view_of_answer(view: str, answer: str) -> str | None:
    if answer in _YES:
        return view
    if answer in _NO:
        return FRONTAL if view == LATERAL else LATERAL
    return None
