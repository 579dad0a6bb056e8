"""What each of several files is to a question, by their headers and names."""

import re
from collections.abc import Sequence
from pathlib import Path

from cxr_jax.data import prompts, radiograph
from cxr_jax.data.radiograph import Image
from cxr_jax.data.sources import views
from cxr_jax.errors import UserError

# Of a name no other words: "old" and "before" are said of patients, places and operations.
_PRIOR_WORDS = frozenset(("prior", "previous"))


def find_roles(paths: Sequence[str | Path], images: Sequence[Image]) -> list[str]:
    """Find the role of each film of one study, of `prompts.ROLES`.

    By the header's view, else by words of the name (lateral, frontal; prior, previous). One film whose view nobody
    says is the frontal one of its time.

    Raises:
        UserError: if they do not follow, or none is the current frontal.
    """
    seen = [_view_of(path, image) for path, image in zip(paths, images, strict=True)]
    times = ["prior" if _is_prior(path) else "current" for path in paths]
    # Of two that nobody names either may be the lateral.
    for when in ("current", "prior"):
        unknown = [at for at, view in enumerate(seen) if view is None and times[at] == when]
        if len(unknown) == 1:
            seen[unknown[0]] = views.FRONTAL
    roles = []
    for view, when in zip(seen, times, strict=True):
        meant = prompts.Role(view or "", when)
        roles.append(next((name for name, role in prompts.ROLES.items() if role == meant), ""))
    # One role twice may be a prior that nobody called so.
    doubled = [role for role in roles if roles.count(role) > 1]
    problem = ""
    if "" in roles:
        problem = "the view of a film is not known"
    if doubled and doubled[0]:
        problem = f"{roles.count(doubled[0])} films are {doubled[0]}"
    # It is the one that is asked about.
    elif "frontal" not in roles:
        problem = problem or "no film is the current frontal"
    if problem:
        raise UserError(
            f"--study: {problem} by headers and names; give "
            "--roles=frontal,lateral,.. in the order of the files"
        )
    return roles


def _view_of(path: str | Path, image: Image) -> str | None:
    view = views.view_of_header(image.meta["view"])
    return view or views.view_in_path(Path(path).name)


def _is_prior(path: str | Path) -> bool:
    # Of the file alone: a folder of that name may hold anything.
    return not _PRIOR_WORDS.isdisjoint(re.findall(r"[a-z]+", Path(path).stem.lower()))


def fit_to_role(image: Image, role: str) -> Image:
    """Judge a film by the view of its role: a lateral one is not held to be frontal.

    Returns:
        The image, with other reasons and warnings where the header says its view.
    """
    view = views.view_of_header(image.meta["view"])
    if prompts.ROLES[role].view == views.FRONTAL or view is None:
        return image
    # What speaks against a frontal film speaks for this one.
    reasons = [text for text in image.meta["unusable"] if text != radiograph.NOT_FRONTAL]
    warnings = [text for text in image.meta["warnings"] if text != radiograph.NOT_FRONTAL_WARNING]
    if view != views.LATERAL:
        reasons.append(f"not a lateral view, and its role is {role}")
    return Image(image.pixels, {**image.meta, "unusable": reasons, "warnings": warnings})
