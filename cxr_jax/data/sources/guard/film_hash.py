"""A hash of a film that stays nearly the same when the film is stored anew: another size, format, grey scale, negative.

It is which of the 16 x 16 lowest frequencies of the film's 64 x 64 thumbnail are above their median, greys replaced by
their ranks: what changes greys and keeps their order, as equalising does, changes no rank. The usual hash of 64 bits,
of the greys themselves, is within 2 bits of another patient's film; this one was within 52 of 256 in 2 of 1.96 million
pairs of different films, most of NIH ChestX-ray14. Such a candidate is confirmed by the correlation of ranks: at most
0.972 in those pairs, at least 0.987 of films that were stored anew.

It finds no film whose borders moved: cut by 5 %, framed by 12 %, mirrored; cut by 2 % or turned by 2 degrees some.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image as PilImage

SIDE = 64  # of the thumbnail that is hashed
LOWEST = 16  # frequencies a side
BITS = LOWEST * LOWEST
BYTES = BITS // 8
MOST_BITS = (
    52  # in which two hashes of one film may differ; of its negative: in which they may agree
)
CONFIRMED = 0.98  # correlation of ranks above which two films are one
CONFIRM_SIDE = 32  # of the thumbnails that are correlated
_LEVEL = 1 / 255  # of grey
_LEAST_SHARE = 0.25  # of a thumbnail's pixels by which two films can be told to be one
_AT_ONCE = 4096  # films a side of one product: 64 MiB


def film_hash(pixels: np.ndarray) -> np.ndarray:
    """Hash a film: uint8 [32], 256 bits by rows of frequencies, the constant first.

    Args:
        pixels: grey float32 [H, W], as `images.read_image` gives them.
    """
    # The median and not zero: every hash then has as many ones as zeros, whatever the film.
    spectrum = _COSINES @ ranks_of(thumbnail(pixels, SIDE)) @ _COSINES.T
    return np.packbits((spectrum > np.median(spectrum)).ravel())


def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """Make a small square of a film, whatever its aspect ratio: float32 [side, side]."""
    # The mean of what falls on a pixel: of all filters it moves least when the film's own size is another.
    film = PilImage.fromarray(np.asarray(pixels, np.float32))
    return np.asarray(film.resize((side, side), PilImage.Resampling.BOX))


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Replace numbers by their ranks from 0, equal ones by the mean of theirs: float64 of the same shape."""
    # Equal greys must stay equal, or black borders would be ranked by their place.
    _, position, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count) - 1
    return (last - (count - 1) / 2)[position].reshape(values.shape)


def are_one(one: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two films are one, or one the negative of the other, by the correlation of their ranks (Spearman).

    Args:
        one, other: `thumbnail` of the films, of CONFIRM_SIDE.
    """
    # A window turns all beyond it black or white; by what is left the films can still be one.
    inside = np.ones(one.shape, bool)
    for values in (one, other):
        inside &= (values > values.min() + _LEVEL) & (values < values.max() - _LEVEL)
    if rank_correlation(one, other) > CONFIRMED:
        return True
    return (
        inside.mean() >= _LEAST_SHARE and rank_correlation(one[inside], other[inside]) > CONFIRMED
    )


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Correlate numbers by their ranks, without the sign: 0..1, nan where all are equal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return abs(float(np.corrcoef(ranks_of(one).ravel(), ranks_of(other).ravel())[0, 1]))


def near_pairs(hashes: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs of films that may be one, as positions in `hashes` and in `others`.

    Args:
        hashes, others: uint8 [N, 32] and [M, 32].
    """
    # Block by block: all pairs of two large sets would be hundreds of gigabytes.
    for first in range(0, len(others), _AT_ONCE):
        signs = _signs(others[first : first + _AT_ONCE])
        for start in range(0, len(hashes), _AT_ONCE):
            # +1 for each bit that agrees, -1 for each that does not.
            agreement = _signs(hashes[start : start + _AT_ONCE]) @ signs.T
            is_near = np.abs(agreement) >= BITS - 2 * MOST_BITS
            for row, column in zip(*np.nonzero(is_near), strict=True):
                yield start + int(row), first + int(column)


def _signs(hashes: np.ndarray) -> np.ndarray:
    """The bits as float32 [N, 256] of -1 and 1: one product of matrices then compares all pairs."""
    return np.unpackbits(hashes, axis=1).astype(np.float32) * 2 - 1


def _cosines() -> np.ndarray:
    """The lowest rows of the discrete cosine transform (DCT-II) of SIDE samples."""
    frequencies, samples = np.arange(LOWEST)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * (2 * samples + 1) * frequencies / (2 * SIDE))


_COSINES = _cosines()
