"""What every data set is held to once its tables are read, whoever read them."""

from cxr_jax.data.sources.films import Films
from cxr_jax.data.sources.image_files import BadNameError, check_name
from cxr_jax.errors import UserError


def check(films: Films) -> Films:
    """Give the films back.

    Raises:
        UserError: if none is left, or for the first whose path, made of what tables hold, is none below the root.
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
    return films
