"""Where somebody has drawn findings on a film, as rows of a manifest say it."""

import math
from collections.abc import Iterable, Mapping, Sequence

from cxr_jax.data.json_rows import BadRowError, is_absent

# Left, top, width and height, as shares of the film's width and height.
Box = tuple[float, float, float, float]
MOST_BOXES = 1000  # of one film; readers of all published sets draw some dozens at most
_SLACK = 0.01  # of a side: people draw to the edge, and tables are rounded


def find_boxes(record: Mapping[str, object]) -> tuple[Box, ...]:
    """Read the key `boxes` of a row: a list of [left, top, width, height], shares of the first film's sides.

    Raises:
        BadRowError: for anything else: a box in pixels would lie nowhere, and an audit would pass over it in silence.
    """
    drawn = record.get("boxes")
    if is_absent(drawn):
        return ()
    if not isinstance(drawn, list) or len(drawn) > MOST_BOXES:
        raise BadRowError(f"boxes is no list of at most {MOST_BOXES:,}")
    return tuple(_box(number, box) for number, box in enumerate(drawn, 1))


def _box(number: int, box: object) -> Box:
    # True is 1 to Python, and no share of a film.
    if not isinstance(box, list) or len(box) != 4 or any(isinstance(side, bool) for side in box):
        raise BadRowError(f"box {number} is not [left, top, width, height]")
    if not all(isinstance(side, int | float) and math.isfinite(side) for side in box):
        raise BadRowError(f"box {number} is not [left, top, width, height]")
    left, top, width, height = map(float, box)
    lies_on_film = min(left, top) >= -_SLACK and max(left + width, top + height) <= 1 + _SLACK
    if min(width, height) <= 0 or not lies_on_film:
        raise BadRowError(f"box {number} does not lie on the film: sides are shares of it, 0 to 1")
    return left, top, width, height


def as_row(boxes: Iterable[Sequence[float]]) -> list[list[float]]:
    """Write boxes as `find_boxes` reads them: cut off at the edges of the film, left out where they lie beside it."""
    rows = []
    for left, top, width, height in boxes:
        right, bottom = min(left + width, 1.0), min(top + height, 1.0)
        left, top = max(left, 0.0), max(top, 0.0)
        if right > left and bottom > top:
            rows.append([left, top, right - left, bottom - top])
    return rows[:MOST_BOXES]


__all__ = ["MOST_BOXES", "Box", "as_row", "find_boxes"]
