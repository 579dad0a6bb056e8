"""How the images of a batch travel to a program, and how image tokens come from them there.

Training, rollouts and evaluation are handed one of two kinds, and know no more of images:

- `SquareImages`: squares of one size, "image" float32 [B, S, S] in 0..1 (or [B, n, S, S] of prompts with n images): the
  phantom's case, with a static grid.
- `PackedImages`: films in their own aspect ratio, "images" {"levels", "packing"}: the patches of a prompt's images are
  a row of one static length, and grids are data (`network.packing`), so that one program serves all sizes.

The i-th image token of a row belongs to the i-th placeholder of its prompt, in both.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cxr_jax.config.sections import DataConfig
from cxr_jax.errors import UserError
from cxr_jax.models import network, registry
from cxr_jax.models.image_processor import ImageProcessor
from cxr_jax.models.network import packing
from cxr_jax.models.network.config import Config, VisionConfig
from cxr_jax.models.network.packing import PackSizes
from cxr_jax.runtime.batch_rows import divide_rows
from cxr_jax.runtime.trees import Tree

Grid = tuple[int, int, int]
Films = Sequence[Sequence[np.ndarray]]
"""Of each prompt its images in reading order, levels uint8 [h, w] as the processor has resized them."""

USUAL_ASPECT = 2.5  # films up to this ratio of their sides always fit into a packed row


@dataclass(frozen=True, kw_only=True)
class SquareImages:
    """Squares of one size (or any one shape).

    Attributes:
        grid: (t, h, w), patches of an image.
        count: images of a prompt.
    """

    model_config: Config
    grid: Grid
    count: int = 1

    names = ("image",)
    """Keys of a batch that hold images, rows on axis 0."""

    @property
    def processor(self) -> ImageProcessor:
        """Of the model."""
        return registry.processor_of(self.model_config)

    def tokens_at_most(self, film_count: int) -> int:
        """Count the image tokens that a prompt of so many images has."""
        return film_count * self.processor.image_tokens(self.grid)

    def inputs(self, images: Any, row_names: Sequence[str] = ()) -> Tree:
        """Turn a source's images [B, S, S] or [B, n, S, S] into the keys of a batch."""
        return {"image": np.asarray(images)}

    def grids(self, images: Any) -> list[list[Grid]] | None:
        """Give the grids of each prompt's images, as `Prompts.encode` takes them; None of one image each."""
        shape = np.shape(images)
        return None if len(shape) == 3 else [[self.grid] * shape[1]] * shape[0]

    def features(
        self, params: Tree, part: Tree, *, remat: str = "none", dtype: DTypeLike = jnp.float32
    ) -> Any:
        """Encode the images of a part of a batch: image tokens [B, I, D], in reading order. Inside jit."""
        images = part["image"]
        # All images of the part in one pass of the tower, whatever their number a prompt.
        # Each device has the images of its rows, and gathers the tower's weights and no pixels.
        pixels = divide_rows(self.processor.patchify(images.reshape(-1, *images.shape[-2:])))
        features = network.vision(
            params, self.model_config, pixels, self.grid, remat=remat, dtype=dtype
        )
        if images.ndim == 3:
            return features
        return jax.tree.map(lambda leaf: leaf.reshape(len(images), -1, leaf.shape[-1]), features)

    def shapes(self, rows: int) -> Tree:
        """Describe `inputs` of so many rows, as jax.ShapeDtypeStructs."""
        count = () if self.count == 1 else (self.count,)
        sides = [side * self.processor.patch_size for side in self.grid[1:]]
        shape = (rows, *count, *sides)
        return {"image": jax.ShapeDtypeStruct(shape, np.float32)}

    def picture(self, batch: Tree, row: int) -> np.ndarray:
        """Show the images of a row of `inputs`, side by side: float [h, w] in 0..1."""
        return self.shown(batch["image"], row)

    def shown(self, images: Any, row: int) -> np.ndarray:
        """Show a prompt's images of a source (`images_of`), side by side: float [h, w] in 0..1."""
        picture = np.asarray(images[row])
        return side_by_side(picture.reshape(-1, *picture.shape[-2:]))


@dataclass(frozen=True, kw_only=True)
class PackedImages:
    """Films in their own aspect ratio, those of a prompt packed into a row.

    Attributes:
        count: images of a prompt at most.
        image_tokens: of the images of a prompt at most.
        max_pixels: of an image.
    """

    model_config: Config
    count: int
    image_tokens: int
    max_pixels: int

    names = ("images",)

    @property
    def processor(self) -> ImageProcessor:
        """Of the model."""
        return registry.processor_of(self.model_config)

    def tokens_at_most(self, film_count: int) -> int:
        """Count the image tokens that a prompt of so many images can have."""
        return min(self.image_tokens, film_count * (self.max_pixels // self.processor.factor**2))

    @functools.cached_property
    def patches(self) -> int:
        """The slots of a row: its static length, patches and what windows leave empty."""
        vision = self.model_config.vision
        # As if a prompt's images had the tokens in equal parts.
        of_one = -(-self.image_tokens // self.count) * vision.merge_unit
        patches = packing.row_patches(vision, of_one, self.count, USUAL_ASPECT)
        # Less room than for all at their largest: they come in unequal parts, each with windows that may cut its own.
        largest = self.max_pixels // self.processor.factor**2
        if vision.has_windows and 1 < self.count and self.image_tokens < self.count * largest:
            patches += self.count * packing.bin_patches(vision)
        return patches

    def grids(self, images: Films) -> list[list[Grid]]:
        """Give the grids of each prompt's images, as `Prompts.encode` takes them."""
        return [[self.processor.grid(*film.shape) for film in films] for films in images]

    def check_room(self, grids: Sequence[Grid], row_name: str) -> None:
        """Refuse images that do not fit into a row. Raises UserError, which names the row."""
        self._pack(grids, row_name)

    def inputs(self, images: Films, row_names: Sequence[str] = ()) -> Tree:
        """Turn the films of each prompt into the keys of a batch.

        Args:
            row_names: what a message calls each prompt.

        Raises:
            UserError: naming the row whose films do not fit.
        """
        names = row_names or [f"{number}" for number in range(len(images))]
        unit = self.processor.patch_size**2
        # Bytes: a sixth of what the program makes of them, and a quarter of that again for float32.
        levels = np.zeros((len(images), self.patches, unit), np.uint8)
        packed = []
        for row, films, name, grids in zip(levels, images, names, self.grids(images), strict=True):
            packed.append(self._pack(grids, name))
            # In reading order, image after image; what is left of the row is padding, which nobody attends to.
            patches = [self.processor.cut(film) for film in films]
            if patches:
                joined = np.concatenate(patches)
                row[: len(joined)] = joined
        fields = {
            name: np.concatenate([row[name] for row in packed]) for name in packing.Packing._fields
        }
        return {"images": {"levels": levels, "packing": fields}}

    def _pack(self, grids: Sequence[Grid], row_name: str) -> Tree:
        """The arrays of `packing.pack` of one row."""
        tokens = sum(map(self.processor.image_tokens, grids))
        films = f"its {len(grids)} films are" if len(grids) > 1 else "its film is"
        if tokens > self.image_tokens:
            raise UserError(
                f"row {row_name}: {films} {tokens:,} image tokens, more than config.data.image_tokens="
                f"{self.image_tokens} leaves room for"
            )
        # Room for the tokens need not be room for the windows.
        packed = _packed_row(self.model_config.vision, tuple(grids), self.patches)
        if packed is None:
            raise UserError(
                f"row {row_name}: {films} {tokens:,} image tokens whose windows do not fit beside each other: "
                f"raise config.data.image_tokens, now {self.image_tokens}"
            )
        return packed

    def features(
        self, params: Tree, part: Tree, *, remat: str = "none", dtype: DTypeLike = jnp.float32
    ) -> Any:
        """Encode the images of a part of a batch: image tokens [B, I, D], in reading order. Inside jit."""
        images = part["images"]
        # Each device makes the patches of its own rows: without a word, levels would be gathered first.
        pixels = divide_rows(self.processor.normalise(divide_rows(images["levels"])))
        return network.vision_packed(
            params,
            self.model_config,
            pixels,
            packing.Packing(**images["packing"]),
            remat=remat,
            dtype=dtype,
        )

    def shapes(self, rows: int) -> Tree:
        """Describe `inputs` of so many rows, as jax.ShapeDtypeStructs."""
        # Of rows without images, which have the same shapes.
        inputs = self.inputs([()] * rows)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)

    def picture(self, batch: Tree, row: int) -> np.ndarray:
        """Show the images of a row of `inputs`, side by side: float [h, w] in 0..1."""
        images = batch["images"]
        levels = np.asarray(images["levels"][row])
        numbers, places = (
            np.asarray(images["packing"][name][row]) for name in ("images", "places")
        )
        merge = self.processor.merge_size
        # What the processor has cut is put together again: nobody else keeps the picture.
        pictures, first = [], 0
        for number in range(1, int(numbers.max(initial=0)) + 1):
            height, width = (places[numbers == number].max(0) + 1) * merge
            pictures.append(self.processor.join(levels[first : first + height * width], width))
            first += height * width
        return self.shown([pictures], 0)

    def shown(self, images: Films, row: int) -> np.ndarray:
        """Show a prompt's images of a source (`images_of`), side by side: float [h, w] in 0..1."""
        return side_by_side([film.astype(np.float32) / 255 for film in images[row]])


Images = SquareImages | PackedImages


def open_images(data: DataConfig, model_config: Config, side: int, count: int = 1) -> Images:
    """Choose how the images of a run travel.

    Args:
        data: `config.data`.
        side: pixels of the squares, where they are squares.
        count: images of a prompt at most.
    """
    if not data.is_native:
        grid = registry.processor_of(model_config).grid(side, side)
        return SquareImages(model_config=model_config, grid=grid, count=count)
    # The tokens of a film at most: the resize keeps to max_pixels.
    of_one = data.max_pixels // registry.processor_of(model_config).factor ** 2
    return PackedImages(
        model_config=model_config,
        count=count,
        image_tokens=data.image_tokens or count * of_one,
        max_pixels=data.max_pixels,
    )


@functools.lru_cache(maxsize=4096)
def _packed_row(vision: VisionConfig, grids: tuple[Grid, ...], patches: int) -> Tree | None:
    """The arrays of `packing.pack` of one row; None where there is no room. Films come in few grids."""
    try:
        packed, _ = packing.pack(vision, grids, PackSizes(1, patches))
    except UserError:
        return None
    return packed._asdict()


def side_by_side(pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Put pictures [h, w] beside each other, black below those that are less high: [H, W]."""
    if len(pictures) == 1:
        return pictures[0]
    height = max((picture.shape[0] for picture in pictures), default=1)
    padded = [np.pad(picture, ((0, height - len(picture)), (0, 0))) for picture in pictures]
    return np.concatenate(padded, 1) if padded else np.zeros((1, 1), np.float32)


def images_of(batch: Tree) -> Any:
    """Pick the images of what a source gives: "images", films of any size, or "image", squares."""
    return batch["images"] if "images" in batch else batch["image"]


def blank(images: Any, level: float) -> Any:
    """Make images of `images_of` all of one level in 0..1, each of its size."""
    # A list is films of any size, an array is squares.
    if isinstance(images, list):
        return [tuple(np.full_like(film, round(255 * level)) for film in films) for films in images]
    return np.full_like(images, level)


def pick(images: Any, rows: Sequence[int] | np.ndarray) -> Any:
    """Take some prompts' images of `images_of`."""
    if isinstance(images, list):
        return [images[int(row)] for row in rows]
    return np.asarray(images)[np.asarray(rows)]
