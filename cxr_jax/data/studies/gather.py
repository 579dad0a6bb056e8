"""Questions about a film with its lateral and its prior, from rows of single films (`config.data.images`).

Every frontal film is asked about, beside what there is of the films that the config names. Films come from rows of the
same patient only; a prior is of a study that is known to be earlier.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cxr_jax.data import prompts
from cxr_jax.data.sources import views
from cxr_jax.data.sources.patients import same_patient_key
from cxr_jax.data.sources.rows import Row
from cxr_jax.errors import UserError

KEY = "config.data.images"


def parse_images(text: str) -> tuple[str, ...]:
    """Read `config.data.images`: roles with commas between, in the order of `prompts.ROLES`; none if it is empty.

    Raises:
        UserError: naming the key.
    """
    if not text.strip():
        return ()
    try:
        roles = prompts.sort_roles(prompts.split_roles(text))
    except UserError as error:
        raise UserError(f"{KEY}={text!r}: {error}") from None
    # Whose labels the answer is held against.
    if "frontal" not in roles:
        raise UserError(
            f"{KEY}={text!r}: frontal must be among them: it is the film that is asked about"
        )
    return tuple(roles)


def gather(rows: Sequence[Row], roles: Sequence[str]) -> list[Row]:
    """Turn rows into questions about the films of `roles`, as far as there are any; without roles they stay.

    A row of one film is asked about if it is frontal, or nothing says what it is; films of other views are only looked
    at beside others. A row that has the roles of its films keeps those that are named.

    Raises:
        UserError: naming the row: several films without roles, no frontal one, places that are marked in words of the
            row's own.
    """
    if not roles:
        return list(rows)
    # From all rows, since a lateral that is not asked about is looked at.
    studies = _Studies(rows)
    gathered = []
    for row in rows:
        try:
            if row.roles:
                gathered.append(_keep(row, roles))
            elif len(row.image_paths) > 1:
                raise UserError(f"{len(row.image_paths)} images, and no roles of them")
            elif row.view in (views.FRONTAL, None):
                gathered.append(_ask(row, row.prompt, studies.films_of(row, roles)))
        except UserError as error:
            raise UserError(f"row {row.id}: {error} ({KEY}={','.join(roles)})") from None
    # A run without questions would look like one that has nothing left to do.
    if not gathered:
        raise UserError(f"{KEY}={','.join(roles)}: no row has a frontal film")
    return gathered


def _keep(row: Row, roles: Sequence[str]) -> Row:
    """A row with roles, with those of its films that are read."""
    paths = dict(zip(row.roles, row.image_paths, strict=True))
    if "frontal" not in paths:
        raise UserError("no frontal among its images")
    # In the order of the roles, which is that of the wording.
    kept = {role: paths[role] for role in roles if role in paths}
    named = prompts.ask_of_roles(row.roles, "")
    if row.prompt.startswith(named):
        return _ask(row, row.prompt.removeprefix(named), kept)
    # In words of its own it speaks of all of them.
    if len(kept) < len(paths):
        raise UserError("its text marks the places of more images than are read")
    return row


def _ask(row: Row, question: str, paths: Mapping[str, Path]) -> Row:
    texts = (question, *(turn.content for turn in row.later if turn.role == "user"))
    if any(prompts.IMAGE_MARK in text for text in texts):
        raise UserError("its text marks the place of its film, and more are to stand beside it")
    return replace(
        row,
        image_paths=tuple(paths.values()),
        roles=tuple(paths),
        prompt=prompts.ask_of_roles(tuple(paths), question),
    )


class _Studies:
    """Rows of single films by patient and study."""

    def __init__(self, rows: Sequence[Row]) -> None:
        # Whose film it is must be known: a prior of somebody else would be worse than none.
        self._of_patients: dict[str, list[Row]] = {}
        for row in rows:
            if row.patient is not None and len(row.image_paths) == 1:
                self._of_patients.setdefault(same_patient_key(row.patient), []).append(row)

    def films_of(self, row: Row, roles: Sequence[str]) -> dict[str, Path]:
        """The film of each role that there is for a row, its own included, in the order of `roles`."""
        others = [] if row.patient is None else self._of_patients[same_patient_key(row.patient)]
        prior = _last_before(row, others)
        found = {"frontal": row, "prior": prior}
        found["lateral"] = _lateral_of(row, others)
        found["prior_lateral"] = prior and _lateral_of(prior, others)
        # Whatever rows say of it, one file is one film.
        paths: dict[str, Path] = {}
        # In the order of the prompt's wording.
        for role in roles:
            film = found[role]
            if film is not None and film.image_path not in paths.values():
                paths[role] = film.image_path
        return paths


def _last_before(row: Row, others: Iterable[Row]) -> Row | None:
    """The frontal film of the last study that is known to be earlier; of several the one of the least id."""
    earlier = [
        other
        for other in others
        if other.view in (views.FRONTAL, None)
        and other.taken.is_before(row.taken)
        and other.image_path != row.image_path
        # The second film of a study is no later study.
        and (row.study is None or other.study != row.study)
    ]
    # Two whose order nobody knows count as of one study.
    last = [
        other
        for other in earlier
        if not any(other.taken.is_before(later.taken) for later in earlier)
    ]
    return min(last, key=_id_of, default=None)


def _lateral_of(row: Row, others: Iterable[Row]) -> Row | None:
    """The lateral film of a row's study, of several the one of the least id."""
    # By the id that both rows have: of one day there may be several studies.
    laterals = [
        other
        for other in others
        if other.view == views.LATERAL and row.study is not None and other.study == row.study
    ]
    return min(laterals, key=_id_of, default=None)


def _id_of(row: Row) -> str:
    return row.id


def describe(rows: Sequence[Row]) -> str | None:
    """Count in one line what is beside the films that are asked about; None where nothing is."""
    counts = {role: sum(role in row.roles for row in rows) for role in prompts.ROLES}
    if not any(counts.values()):
        return None
    named = ", ".join(
        f"{role.replace('_', ' ')} {count:,}" for role, count in counts.items() if count
    )
    return f"images: {len(rows):,} questions; with {named}"
