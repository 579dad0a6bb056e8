"""What every data set is held to once its tables are read, whoever read them."""

from cxr_jax.data.sources.films import Films
from cxr_jax.data.sources.image_files import BadNameError, check_name, film_key
from cxr_jax.errors import UserError


def check(films: Films) -> Films:
    """Give the films back.

    Raises:
        UserError: if none is left; for the first whose path, made of what tables hold, is none below the root; for
            one that is listed twice.
    """
    if not len(films):
        reasons = [f"{count:,} left out: {reason}" for reason, count in films.left_out.items()]
        table = films.tables[0] if films.tables else films.root
        raise UserError(f"{table}: no film is left ({'; '.join(reasons) or 'none is listed'})")
    for row, image in enumerate(films.images):
        try:
            check_name(image)
        except BadNameError as reason:
            raise UserError(f"{films.place_of(row)}: {reason}") from None
    if films.solutions is None:
        _check_once(films)
    return films


def _check_once(films: Films) -> None:
    """Refuse a film that is listed under two suffixes: one file would stand for both rows."""
    first: dict[str, int] = {}
    for row, image in enumerate(films.images):
        before = first.setdefault(film_key(image), row)
        if before != row:
            where = films.place_of(before).rpartition(":")[2]
            raise UserError(f"{films.place_of(row)}: the film is that of line {where}")
