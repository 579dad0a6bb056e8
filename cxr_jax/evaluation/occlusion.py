"""Does a model need what is drawn? Its answers with the findings covered by noise, a little, wholly, or beside them.

The cover is that of SHOVIR's audit: noise with the median and the trimmed deviation of the film outside the findings,
smoothed, blended in with a dose and feathered edges. Where the findings are is known of phantoms, and of films that
somebody has drawn boxes on. A reader that looks loses with the dose, and less where the mirrored place is covered:
noise there may pass for an opacity.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cxr_jax.config.sections import EvaluationConfig
from cxr_jax.data.prompts import Prompt
from cxr_jax.data.sources.base import Batch
from cxr_jax.evaluation.reader import Reader
from cxr_jax.metrics.scores import Answers
from cxr_jax.models.image_batches import images_of, pick
from cxr_jax.runtime.trees import Tree

DOSES = (0.5, 1.0)
_FEATHER, _GRAIN = 6, 2  # px over which the cover's edge fades, and over which its noise is smooth
_LEVELS = 255


class CoverAudit:
    """What a model answers to covered images, part by part, of the first images of a set.

    "noise": the whole image is cover; of phantoms with a finding, "covered DOSE" for each of DOSES and "mirrored". Of
    phantoms those without a finding are left out, since there is nothing to cover.

    Args:
        texts: the prompts of the whole set.
        settings: `n_audit`, how many images of the set.
    """

    def __init__(
        self, reader: Reader, params: Tree, texts: Sequence[Prompt], settings: EvaluationConfig
    ) -> None:
        self.reader, self.params, self.texts = reader, params, texts
        self.count = settings.n_audit
        self.places: list[int] = []
        self.answers: dict[str, list[Answers]] = {}

    def add(self, places: np.ndarray, batch: Batch) -> None:
        """Read a part of the set: its places and its batch."""
        masks = region_masks(batch)
        # The first of the set: of files they are drawn, of phantoms all are.
        is_audited = places < self.count
        if masks is not None:
            is_audited &= masks.any(axis=(1, 2))
        rows = np.flatnonzero(is_audited)
        # Most parts of a large set lie beyond.
        if not len(rows):
            return
        self.places += places[rows].tolist()
        films, texts = (pick(images_of(batch), rows), [self.texts[place] for place in places[rows]])
        # Noise of its own for each place of the set, whatever part it comes in.
        seeds = places[rows].tolist()
        self._read("noise", noise_for(films, seeds), texts)
        if masks is None:
            return
        of_findings, squares = masks[rows], np.asarray(films)
        # The place on the other side, as far as it is free: as large a cover where nothing is to be seen.
        mirrored = of_findings[:, :, ::-1] & ~of_findings
        for dose in DOSES:
            covered = cover(squares, of_findings, of_findings, dose, seeds)
            self._read(f"covered {dose:g}", covered, texts)
        self._read("mirrored", cover(squares, mirrored, of_findings, DOSES[-1], seeds), texts)

    def _read(self, name: str, shown: Any, texts: Sequence[Prompt]) -> None:
        readings = self.reader.read(self.params, shown, texts)
        self.answers.setdefault(name, []).append(Answers(readings.answer, readings.valid))

    def joined(self) -> tuple[np.ndarray, dict[str, Answers]]:
        """Give the places that were read, int [n], and the answers by name."""
        return _join(self.places, self.answers)


class BoxAudit:
    """What a model answers to films whose boxes are covered, part by part: the first films of a set that have boxes.

    "covered DOSE" for each of DOSES, and "mirrored": as large a cover on the other side, as far as no box is there.

    Args:
        texts: the prompts of the whole set.
        settings: `n_audit`, how many films with boxes.
        mask_of: tells of a place of the set where its boxes are, bool of its image's shape; None without a box.
    """

    def __init__(
        self,
        reader: Reader,
        params: Tree,
        texts: Sequence[Prompt],
        settings: EvaluationConfig,
        mask_of: Callable[[int], np.ndarray | None],
    ) -> None:
        self.reader, self.params, self.texts = reader, params, texts
        self.count, self.mask_of = settings.n_audit, mask_of
        self.places: list[int] = []
        self.answers: dict[str, list[Answers]] = {}

    def add(self, places: np.ndarray, batch: Batch) -> None:
        """Read a part of the set: its places and its batch."""
        masks: dict[int, np.ndarray] = {}
        for row, place in enumerate(places.tolist()):
            # Boxes are few, and wherever they are in a set: once there are enough, no file is asked any more.
            if len(self.places) + len(masks) >= self.count:
                break
            if (mask := self.mask_of(place)) is not None:
                masks[row] = mask
        if not masks:
            return
        rows, boxes = np.array(list(masks)), list(masks.values())
        # Noise of its own for each place of the set, as for phantoms.
        seeds = places[rows].tolist()
        self.places += seeds
        films, texts = pick(images_of(batch), rows), [self.texts[place] for place in seeds]
        # A heart's box covers most of its own mirror image: what is left of it is little, and says little.
        mirrored = [mask[:, ::-1] & ~mask for mask in boxes]
        shown = {
            f"covered {dose:g}": cover_films(films, boxes, boxes, dose, seeds) for dose in DOSES
        }
        shown["mirrored"] = cover_films(films, mirrored, boxes, DOSES[-1], seeds)
        for name, covered in shown.items():
            readings = self.reader.read(self.params, covered, texts)
            self.answers.setdefault(name, []).append(Answers(readings.answer, readings.valid))

    def joined(self) -> tuple[np.ndarray, dict[str, Answers]]:
        """Give the places that were read, int [n], and the answers by name."""
        return _join(self.places, self.answers)


def _join(
    places: list[int], answers: dict[str, list[Answers]]
) -> tuple[np.ndarray, dict[str, Answers]]:
    # Parts were read in the order of the set, so places and answers go side by side.
    return np.array(places, int), {
        name: Answers(
            np.concatenate([np.asarray(part.labels) for part in parts]),
            np.concatenate([np.asarray(part.valid) for part in parts]),
        )
        for name, parts in answers.items()
    }


def cover_films(
    films: Any,
    masks: Sequence[np.ndarray],
    findings: Sequence[np.ndarray],
    dose: float,
    seeds: Sequence[int],
) -> Any:
    """Blend noise over pixels of films (`image_batches.images_of`), of each the first; see `cover`.

    Args:
        films: squares float32 [B, S, S], or rows of levels uint8 [h, w].
        masks: of each film the pixels that are covered.
        findings: of each film the pixels that the noise is not modelled on.
    """
    if not isinstance(films, list):
        return cover(np.asarray(films), np.stack(masks), np.stack(findings), dose, seeds)
    covered_rows = []
    for (film, *others), mask, finding, seed in zip(films, masks, findings, seeds, strict=True):
        # One film at a time: those of a list have sizes of their own.
        as_square = film[None].astype(np.float32) / _LEVELS
        covered = cover(as_square, mask[None], finding[None], dose, [seed])[0]
        covered_rows.append((np.round(covered * _LEVELS).astype(film.dtype), *others))
    return covered_rows


def region_masks(batch: Batch) -> np.ndarray | None:
    """Tell where findings are drawn, bool [B, rows, columns] of cells; None where nobody knows, or of several films."""
    if "regions" not in batch or np.asarray(batch["image"]).ndim != 3:
        return None
    regions = np.asarray(batch["regions"])
    return np.asarray((regions > 0).any(axis=1))


def cover(
    squares: np.ndarray, masks: np.ndarray, findings: np.ndarray, dose: float, seeds: Sequence[int]
) -> np.ndarray:
    """Blend noise over cells of images.

    Args:
        squares: float32 [B, H, W] in 0..1.
        masks: bool [B, rows, columns], the cells that are covered: as many as pixels, or so few that they divide them.
        findings: bool [B, rows, columns], those that the noise is not modelled on.
        dose: in 0..1, how much of the image goes.
        seeds: of the noise, one an image.
    """
    covered = np.array(squares, np.float32)
    for row, seed in enumerate(seeds):
        film = squares[row]
        # Pixels a cell, down and across.
        cells = (film.shape[0] // masks.shape[1], film.shape[1] // masks.shape[2])
        outside_pixels = film[~np.kron(findings[row], np.ones(cells, bool))]
        noise = _noise(film.shape, outside_pixels if outside_pixels.size else film.ravel(), seed)
        cover_share = dose * _smooth(np.kron(masks[row].astype(float), np.ones(cells)), _FEATHER)
        # In range before it is blended, so that half a dose is half the change.
        covered[row] = (1 - cover_share) * film + cover_share * np.clip(noise, 0, 1)
    return covered


def noise_for(films: Any, seeds: Sequence[int]) -> Any:
    """Make noise of the size and grey of each image (`image_batches.images_of`)."""
    # A list is films of any size, levels of 8 bits.
    if isinstance(films, list):
        return [
            tuple(
                np.clip(np.round(_noise(film.shape, film.ravel(), seed)), 0, _LEVELS).astype(
                    film.dtype
                )
                for film in of_row
            )
            for of_row, seed in zip(films, seeds, strict=True)
        ]
    # Squares stay an array, and in the range of 0 to 1.
    noise_squares = [
        _noise(film.shape, film.ravel(), seed) for film, seed in zip(films, seeds, strict=True)
    ]
    return np.clip(np.stack(noise_squares), 0, 1).astype(np.float32)


def _noise(shape: tuple[int, ...], pixels: np.ndarray, seed: int) -> np.ndarray:
    """Smooth noise with the median and the deviation of pixels, 1 % at both pad_widths left out."""
    # Text and borders, all black or white, are no grey of the film.
    lower_level, upper_level = np.percentile(pixels, [1, 99])
    inner_pixels = pixels[(pixels >= lower_level) & (pixels <= upper_level)]
    white_noise = np.random.default_rng([seed, 29]).normal(size=shape)
    # As films have: neighbours are alike.
    smooth = _smooth(white_noise, _GRAIN)
    # Smoothing takes some of the deviation away.
    return np.median(pixels) + smooth / smooth.std() * inner_pixels.std()


def _smooth(values: np.ndarray, radius: int) -> np.ndarray:
    """Means over 2 * radius + 1 pixels along the last two axes; edges are repeated."""
    width = 2 * radius + 1
    for axis in (-2, -1):
        pad_widths = [(0, 0)] * values.ndim
        pad_widths[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(values, pad_widths, mode="edge"), axis, -1)
        running_sums = np.cumsum(np.concatenate([np.zeros_like(padded[..., :1]), padded], -1), -1)
        values = np.moveaxis(
            (running_sums[..., width:] - running_sums[..., :-width]) / width, -1, axis
        )
    return values
