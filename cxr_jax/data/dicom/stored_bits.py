"""The bits of a pixel's cell that are its value: High Bit, Bits Stored, sign, and what else stands in the cell.

By PS3.5 section 8.1.1 the value is in the bits from High Bit down; other bits may hold overlays (retired, but in old
files), a repeated sign, or rubbish. Headers and pixels that contradict each other are refused: a value taken from the
wrong bits makes a picture that looks like a film, and is none.
"""

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from cxr_jax.data.dicom.header import overlay_bits, whole_number
from cxr_jax.errors import UserError

Metadata = dict[str, Any]  # of a `radiograph.Image`

# Up to this share of the pixels may be out of the range of Bits Stored: burnt-in marks, a saturated edge.
FEW = 0.001


def shift(dataset: Dataset, bits: int) -> int:
    """Return how many bits of a pixel's cell lie below its value, which has `bits`."""
    return whole_number(dataset, "HighBit", bits - 1) + 1 - bits


def extract(
    path: str | Path,
    dataset: Dataset,
    cells: np.ndarray,
    padding_mask: np.ndarray,
    metadata: Metadata,
) -> np.ndarray:
    """Take each pixel's value out of its cell.

    Args:
        cells: whole numbers, as decoded; of any shape.
        padding_mask: bool, of that shape: cells that are no pixels, whatever they hold.

    Returns:
        Whole numbers of the type and shape of `cells`; the same array where cells are values already.

    Raises:
        UserError: if the cells contradict the header.
    """
    bits = metadata["bits"]
    size, up = 8 * cells.dtype.itemsize, shift(dataset, bits)
    # A cell that is all value has no room for anything else.
    if bits == size:
        return cells
    whole = cells.view(f"u{cells.dtype.itemsize}")
    overlays = overlay_bits(dataset) & ~(((1 << bits) - 1) << up)
    if not up and not overlays and _are_values(cells, bits):
        return cells
    whole = whole & whole.dtype.type(~overlays & ((1 << size) - 1))
    if _are_in_lowest(whole[~padding_mask], bits) and up:
        # A codec that knows how many bits a value has gives it without a cell around it.
        if not _is_from_codec(dataset):
            raise UserError(f"{path}: High Bit says that the pixels lie in other bits than they do")
        up = 0
    # By the standard: what is above the value is not part of it. Up to the top of the cell and down again, which
    # repeats the sign of signed values.
    room = size - bits
    values = (whole >> up << room).view(cells.dtype) >> room
    whole_values = whole.view(cells.dtype) >> up
    return _settle(path, values, whole_values, padding_mask, bits, metadata)


def _are_values(cells: np.ndarray, bits: int) -> bool:
    """Whether all cells hold their values and nothing else. The usual case, so it costs no copy."""
    lowest, highest = _range(cells, bits)
    return int(cells.min(initial=0)) >= lowest and int(cells.max(initial=0)) <= highest


def _range(values: np.ndarray, bits: int) -> tuple[int, int]:
    """The least and the largest value of so many bits, signed as `values` are."""
    if values.dtype.kind == "u":
        return 0, (1 << bits) - 1
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _are_in_lowest(whole: np.ndarray, bits: int) -> bool:
    """Whether no pixel reaches above the lowest bits.

    With a High Bit above them, either they lie there after all, or the film is so dark that nobody can tell.
    """
    return bool(whole.any()) and not np.any(whole >> bits)


def _is_from_codec(dataset: Dataset) -> bool:
    """Whether the pixels were compressed as values; RLE packs the bytes of cells."""
    syntax = dataset.file_meta.TransferSyntaxUID
    return syntax.is_encapsulated and syntax != RLELossless


def _settle(
    path: str | Path,
    values: np.ndarray,
    whole_values: np.ndarray,
    padding_mask: np.ndarray,
    bits: int,
    metadata: Metadata,
) -> np.ndarray:
    """Decide what the bits above the values are: something else, or the top of values that need more bits.

    Masking the latter wraps bright pixels to black; not masking the former leaves a drawing of full brightness. A film
    is smooth: the right reading has fewer neighbours that differ by half the range. Raises UserError.
    """
    # Padding may be any number, and says nothing of the pixels.
    is_odd = (values != whole_values) & ~padding_mask
    if not is_odd.any():
        return values
    if _jumps(values, padding_mask, bits) <= _jumps(whole_values, padding_mask, bits):
        # A sign that is not repeated above the value is no remark worth.
        if values.dtype.kind == "u" or whole_values[is_odd].min() < 0:
            metadata["warnings"].append("bits beside the pixels' values were masked")
        return values
    if np.count_nonzero(is_odd) > FEW * is_odd.size:
        raise UserError(f"{path}: Bits Stored or Pixel Representation contradict the pixels")
    # Wrapped, they would be black specks in white; one step too high is white all the same.
    metadata["warnings"].append("a few pixels are out of the range of Bits Stored: clipped")
    return np.clip(whole_values, *_range(values, bits))


def _jumps(values: np.ndarray, padding_mask: np.ndarray, bits: int) -> int:
    """Count neighbours that differ by more than half the range of `bits` bits; padding is none."""
    differences = np.diff(np.where(padding_mask, 0, values).astype(np.int64), axis=1)
    return int(np.count_nonzero(np.abs(differences) > 1 << (bits - 1)))
