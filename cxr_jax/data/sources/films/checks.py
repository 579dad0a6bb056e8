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
    for film_row, image_name in enumerate(films.images):
        try:
            check_name(image_name)
        except BadNameError as reason:
            raise UserError(f"{films.place_of(film_row)}: {reason}") from None
    if films.solutions is None:
        _check_once(films)
    return films


def _check_once(films: Films) -> None:
    """Refuse a film that is listed under two suffixes: one file would stand for both rows."""
    first_rows: dict[str, int] = {}
    for film_row, image_name in enumerate(films.images):
        first_row = first_rows.setdefault(film_key(image_name), film_row)
        if first_row != film_row:
            first_line = films.place_of(first_row).rpartition(":")[2]
            raise UserError(f"{films.place_of(film_row)}: the film is that of line {first_line}")
