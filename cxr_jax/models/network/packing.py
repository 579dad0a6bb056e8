"""Images of any sizes in arrays of one size: where every patch goes, as data that a compiled program takes.

A packed row has a fixed number of slots, one a patch. Whole images go into a row, the largest first; each keeps to its
row, so full attention is one product over rows with a mask. In a row, slots are cut into bins as large as three windows
(of 112 pixels, 64 patches; the last bin may be smaller), and whole windows go into bins: window attention is one
product over bins with a mask. Nothing moves between blocks, and only the slots that no window fits into are computed
in vain.

Everything is counted in units here: the patches that become one token. The program is `tower_packed.forward`.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.models.image_processor import MAX_ASPECT
from cxr_jax.models.network import position_table
from cxr_jax.models.network.config import VisionConfig
from cxr_jax.models.network.tower import WindowPlan, window_plan
from cxr_jax.runtime.trees import Array


class PackSizes(NamedTuple):
    """The sizes of a packed batch: all that its program depends on."""

    rows: int
    patches: int  # slots of a row, a multiple of the patches of a unit


class Packing(NamedTuple):
    """Where the units of R rows go: R, U = rows, patches / merge_unit of the sizes; a unit is a token's patches.

    Reading order: image by image, each in the processor's order, padding last. Slots: the order that is computed in.
    """

    order: Array  # int32 [R, U]: the unit, in reading order, of each slot; a permutation of the row
    inverse: Array  # int32 [R, U]: the slot of each unit in reading order
    images: Array  # int32 [R, U]: of each slot, 1 + the number of its image; 0 for padding
    windows: Array  # int32 [R, U]: of each slot, its window, from 1 in each row; 0 for padding
    places: Array  # int32 [R, U, 2]: of each slot, its row and column in its image, in units
    sides: Array  # int32 [R, U, 2]: of each slot, the rows and columns of its image, in units


class ImageTokens(NamedTuple):
    """Where the tokens of each image stand in the result [R, U, out]: an entry an image, in the order given."""

    rows: np.ndarray  # int32 [images]
    offsets: np.ndarray  # int32 [images], in the row, in tokens
    counts: np.ndarray  # int32 [images]


# ---- Sizes -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def row_patches(
    model_config: VisionConfig, max_patches: int, copies: int = 1, max_aspect: float = MAX_ASPECT
) -> int:
    """Find the least slots of a row into which every image of up to `max_patches` goes, whatever its sides.

    More than max_patches where windows leave a part of their bin empty; none do for the 1,156 of 476 x 476.

    Args:
        copies: how many such images a row must hold, each of up to max_patches.
        max_aspect: of the images that must fit; others may.
    """
    max_units = max_patches // model_config.merge_unit
    merge_size = model_config.spatial_merge_size
    sides = [
        (height, width)
        for height in range(1, max_units + 1)
        for width in range(height, max_units // height + 1)
        # Sides of a film are rounded to units, both down at worst.
        if width <= max_aspect * (height + 1)
    ]
    images = [
        {
            size: count * copies
            for size, count in collections.Counter(
                _window_sizes(window_plan(model_config, height * merge_size, width * merge_size))
            ).items()
        }
        for height, width in sides
    ]
    units, fitted = max_units * copies, -1
    # A row that is larger by one might fit other images worse: all are tried again.
    while fitted != units:
        fitted = units
        for counts in images:
            while not _have_room(counts, units, _bin_units(model_config, units)):
                units += 1
    return units * model_config.merge_unit


BIN_WINDOWS = 3
"""Whole windows of a bin. Those that an edge cuts have 12, 8, 4 .. of 16 units, and 3 * 16 is a multiple of all: no
slot is left over. Scores are a small part of a block: three times as many cost less than the empty slots of small
bins."""


def bin_patches(model_config: VisionConfig) -> int:
    """Count the slots of a bin, in patches."""
    # As the windows are cut: in whole tokens.
    side = model_config.window_size // model_config.spatial_merge_size // model_config.patch_size
    return BIN_WINDOWS * side**2 * model_config.merge_unit


def _bin_units(model_config: VisionConfig, units: int) -> int:
    """The units of a bin; of a tower without windows the row is one."""
    # Nothing keeps patches together there: any slot will do for any of them.
    if not model_config.has_windows:
        return units
    return bin_patches(model_config) // model_config.merge_unit


# ---- Packing -----------------------------------------------------------------------------------------------


def pack(
    model_config: VisionConfig, grids: Sequence[tuple[int, int, int]], sizes: PackSizes
) -> tuple[Packing, ImageTokens]:
    """Pack images of any sizes into rows.

    Args:
        grids: (1, h, w) of each image, in patches.
        sizes: of the program.

    Raises:
        UserError: which names the number of the image that is no right image, or for which there is no room.
    """
    plans = [_image_plan(model_config, number, grid) for number, grid in enumerate(grids)]
    R, U = sizes.rows, sizes.patches // model_config.merge_unit
    order = np.tile(np.arange(U, dtype=np.int32), (R, 1))
    images, windows = np.zeros((2, R, U), np.int32)
    places = np.zeros((R, U, 2), np.int32)
    all_sides = np.ones((R, U, 2), np.int32)
    tokens = ImageTokens(*np.zeros((3, len(plans)), np.int32))

    for row, numbers in enumerate(_images_by_row(model_config, plans, sizes)):
        window_sizes = [size for number in numbers for size in _window_sizes(plans[number])]
        # Images were given rows so that their windows fit.
        starts = cast(np.ndarray, _window_starts(window_sizes, U, _bin_units(model_config, U)))
        # Slots of all units of the row, window by window.
        lengths = np.asarray(window_sizes, np.int64)
        used = int(lengths.sum())
        slots = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(used)
        windows[row, slots] = np.repeat(np.arange(1, len(lengths) + 1), lengths)

        first = 0
        for number in numbers:
            plan = plans[number]
            sides = [side // model_config.spatial_merge_size for side in grids[number][1:]]
            count = len(plan.order)
            of_image = slots[first : first + count]
            order[row, of_image] = first + plan.order
            images[row, of_image] = number + 1
            places[row, of_image] = np.stack(np.divmod(plan.order, sides[1]), -1)
            # By slot, like places: what a table is read at depends on both.
            all_sides[row, of_image] = sides
            for values, value in zip(tokens, (row, first, count), strict=True):
                values[number] = value
            first += count
        # The units of padding go to the slots that are left.
        order[row, images[row] == 0] = np.arange(used, U)
    inverse = np.argsort(order, 1).astype(np.int32)
    return Packing(order, inverse, images, windows, places, all_sides), tokens


def pack_pixels(
    images: Sequence[np.ndarray], tokens: ImageTokens, merge_unit: int, sizes: PackSizes
) -> np.ndarray:
    """Put the patches of all images [h * w, patch_dim] into one array [R, P, patch_dim], zeros for padding."""
    pixels = np.zeros((sizes.rows, sizes.patches, images[0].shape[-1]), images[0].dtype)
    for patches, row, offset in zip(images, tokens.rows, tokens.offsets, strict=True):
        first = offset * merge_unit
        pixels[row, first : first + len(patches)] = patches
    return pixels


def _image_plan(model_config: VisionConfig, number: int, grid: tuple[int, int, int]) -> WindowPlan:
    frames, height, width = grid
    merge_size = model_config.spatial_merge_size
    if frames != 1:
        raise UserError(f"image {number}: {frames} frames: only still images are packed")
    if min(height, width) < 1 or height % merge_size or width % merge_size:
        raise UserError(
            f"image {number}: {height} x {width} patches cannot be merged {merge_size} by {merge_size}"
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"image {number}: {height} x {width} patches: one side is more than {MAX_ASPECT} times the other"
        )
    position_table.check_size(model_config, height, width)
    return window_plan(model_config, height, width)


def _images_by_row(
    model_config: VisionConfig, plans: list[WindowPlan], sizes: PackSizes
) -> list[list[int]]:
    """The numbers of the images of each row: from the largest down, each into the first row that has room."""
    units = sizes.patches // model_config.merge_unit
    window_units = _bin_units(model_config, units)
    rows: list[list[int]] = [[] for _ in range(sizes.rows)]
    window_sizes: list[list[int]] = [[] for _ in range(sizes.rows)]
    for number in sorted(range(len(plans)), key=lambda number: -len(plans[number].order)):
        added = _window_sizes(plans[number])
        for row, present in zip(rows, window_sizes, strict=True):
            if _window_starts(present + added, units, window_units) is not None:
                row.append(number)
                present += added
                break
        else:
            patches = sum(added) * model_config.merge_unit
            is_alone = _window_starts(added, units, window_units) is not None
            where = "beside the others" if is_alone else "even alone"
            raise UserError(
                f"image {number}: {patches:,} patches do not fit {where} into {sizes.rows} packed "
                f"rows of {sizes.patches:,}"
            )
    return [sorted(numbers) for numbers in rows]


def _window_sizes(plan: WindowPlan) -> list[int]:
    """The units of each window of an image, in the plan's order."""
    unit_count = len(plan.order)
    patches = sum(windows * size for windows, size in plan.segments)
    merge_unit = patches // unit_count
    return [size // merge_unit for windows, size in plan.segments for _ in range(windows)]


def _have_room(counts: Mapping[int, int], units: int, bin_units: int) -> bool:
    """Tell whether `_window_starts` finds room for so many windows of each size, without placing each.

    Windows of a size fill one bin after the other, the fullest first: a bin that has taken one and has room for more is
    the fullest that has.
    """
    # Bins by the room that is left in them; the last may be smaller.
    free = collections.Counter({bin_units: units // bin_units})
    if units % bin_units:
        free[units % bin_units] += 1
    for size in sorted(counts, reverse=True):
        left = counts[size]
        for room in sorted(room for room, bins in free.items() if bins and room >= size):
            in_a_bin = room // size
            filled = min(free[room], left // in_a_bin)
            free[room] -= filled
            free[room - in_a_bin * size] += filled
            left -= filled * in_a_bin
            # The rest goes into one more bin of this room, if there is one.
            if left and free[room]:
                free[room] -= 1
                free[room - left * size] += 1
                left = 0
            if not left:
                break
        if left:
            return False
    return True


def _window_starts(sizes: list[int], units: int, window_units: int) -> np.ndarray | None:
    """The first slot of each window in a row such that none lies across two bins; None where they do not fit.

    The largest first, each into the fullest bin that has room. The rows' images need not be known: windows of one size
    are alike, so the answer depends on the sizes alone.
    """
    if sum(sizes) > units:
        return None
    # The first free slot of each bin, by the room that is left in it; the last bin is what is left of the row.
    free: list[list[int]] = [[] for _ in range(window_units + 1)]
    for first in reversed(range(0, units, window_units)):
        free[min(window_units, units - first)].append(first)
    starts = np.zeros(len(sizes), np.int64)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[number]
        room = next((room for room in range(size, window_units + 1) if free[room]), None)
        if room is None:
            return None
        starts[number] = first = free[room].pop()
        free[room - size].append(first + size)
    return starts
