"""Pictures to vision patches: the arithmetic of Hugging Face image processors (PIL backend), without torch.

A family has one `ImageProcessor`, which is data: sizes, constants and the rule of resizing. The arithmetic is written
out here, and not called from `transformers`, because the import alone costs seconds and because training needs the
same arithmetic inside jit. `tests/data/test_images.py` holds it equal to `Qwen2VLImageProcessorPil`.

A film is gray, so what travels to the device is its levels (uint8) in the order of patches, a sixth of a byte for each
byte of patches: three colours and two frames are made of them in the program (`ImageProcessor.normalise`).
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
from jax.typing import ArrayLike
from PIL import Image as PilImage

from cxr_jax.errors import UserError, shown
from cxr_jax.runtime.trees import Array

CHANNELS = 3
MAX_ASPECT = 200  # the processor's own limit on the ratio of the sides
MOST_PIXELS = 2**28  # some gigabytes of patches: more is a mistake
BILINEAR, BICUBIC = 2, 3  # PIL's numbers


# ---- Sizes and levels ----------------------------------------------------------------------------------------


def smart_resize(
    height: int, width: int, min_pixels: int, max_pixels: int, factor: int
) -> tuple[int, int]:
    """Find the size (h, w), multiples of `factor`, nearest to height x width with min_pixels <= h * w <= max_pixels.

    Source: the Qwen2-VL image processor in transformers.

    Raises:
        UserError: for an aspect ratio above 200.
    """
    check_aspect(height, width)
    sides = height, width
    # Python's round, half to even, as the processor's.
    resized = [round(side / factor) * factor for side in sides]
    # Too large: both sides shrink by one factor, rounded down so that the limit holds.
    if math.prod(resized) > max_pixels:
        reduction = math.sqrt(height * width / max_pixels)
        resized = [max(factor, math.floor(side / reduction / factor) * factor) for side in sides]
    # Too small: rounded up, for the same reason.
    elif math.prod(resized) < min_pixels:
        enlargement = math.sqrt(min_pixels / (height * width))
        resized = [math.ceil(side * enlargement / factor) * factor for side in sides]
    return resized[0], resized[1]


def check_aspect(height: int, width: int) -> None:
    """Refuse a picture that is far too long or high. Raises UserError."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"the picture is {width} x {height}: its aspect ratio is above {MAX_ASPECT}"
        )


def quantise(pixels: ArrayLike) -> np.ndarray:
    """Round gray [..., H, W] in 0..1 to uint8: the one place where a picture loses its depth."""
    # Clipped first: a resize may have overshot, and bytes would wrap around.
    levels = np.clip(np.asarray(pixels, np.float32), 0, 1) * np.float32(255)
    return np.rint(levels).astype(np.uint8)


# ---- The processor of a family -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """How a family's pictures become patches: sizes in pixels. Hashable, so that a jitted function may hold it.

    Attributes:
        types: how the names of the image processor classes begin that compute this; the first one is written.
        processor_class: of the whole processor, with the tokenizer: written beside it.
        patch_size: of a side of a patch.
        merge_size: patches a side that become one token.
        temporal_patch_size: frames of a patch, all the same for a still image; 1: there is no such axis.
        mean, std: of the normalisation, one a colour channel, in the digits of the published files.
        resample: PIL's number of the filter.
        side: of the square that every picture is stretched to; None: sizes by area, in their own aspect ratio.
        default_limits: (min_pixels, max_pixels) of the class, for a file of settings that says neither.
        published_limits: those of the published folders, for a folder without such a file.
        writes_size: whether limits are written as `size` alone, and not as min_pixels and max_pixels.
    """

    types: tuple[str, ...]
    processor_class: str
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    default_limits: tuple[int, int]
    published_limits: tuple[int, int]
    side: int | None = None
    writes_size: bool = False

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Numbers of a patch: channels * frames * height * width."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2

    # ---- Settings of a folder ----

    def _fixed(self) -> dict[str, Any]:
        """Settings of the processors whose arithmetic is the one below."""
        # One that makes squares leaves patches to the model, and may show crops beside the whole.
        if self.side is not None:
            kind: dict[str, Any] = {"do_pan_and_scan": False}
        else:
            kind = {
                "patch_size": self.patch_size,
                "merge_size": self.merge_size,
                "temporal_patch_size": self.temporal_patch_size,
            }
        return {
            **kind,
            "image_mean": self.mean,
            "image_std": self.std,
            "rescale_factor": 1 / 255,
            "resample": self.resample,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
        }

    def check_settings(self, settings: dict[str, Any], path: Path | None) -> None:
        """Refuse a folder's image settings if they ask for other arithmetic than `prepare` does.

        Args:
            settings: of the image processor, without null values (`hf_folder.image_settings`); only keys that are
                there count.
            path: their file.

        Raises:
            UserError: which names the file and the setting.
        """
        # A file without a type is taken for the usual one.
        processor_type = str(settings.get("image_processor_type", self.types[0]))
        if not processor_type.startswith(self.types):
            raise UserError(
                f"{path}: image_processor_type is {processor_type[:60]!r}: images are prepared as "
                f"{self.types[0]}'s only"
            )
        # What is absent has the processor's default, which is what is computed here.
        for setting, wanted in self._fixed().items():
            if setting in settings and not _is_same(settings[setting], wanted):
                given = " ".join(str(settings[setting]).split())[:80]
                needed = wanted
                if np.ndim(wanted):
                    needed = [round(float(value), 8) for value in wanted]
                raise UserError(
                    f"{path}: {setting} is {given}: images are prepared with {needed} only"
                )

    def pixel_limits(self, settings: dict[str, Any], path: Path | None) -> tuple[int, int]:
        """Find (min_pixels, max_pixels) of image settings; min_pixels and max_pixels go before size.

        Args:
            settings: as from `hf_folder.image_settings`.
            path: their file; None, where there is none: the limits of the published folders.

        Raises:
            UserError: which names the file, for limits that no image meets.
        """
        # No file at all: nobody has said otherwise, so the published limits hold.
        if path is None:
            return self.published_limits
        default = dict(zip(("shortest_edge", "longest_edge"), self.default_limits, strict=True))
        size = settings.get("size", default)
        if not isinstance(size, dict):
            raise UserError(f"{path}: size is not a JSON object")
        # Of one size there is nothing to choose, and settings must say the same.
        if self.side is not None:
            wanted = {"height": self.side, "width": self.side}
            if "size" in settings and size != wanted:
                raise UserError(
                    f"{path}: size is {shown(str(size))}: images are prepared with {wanted} only"
                )
            return self.side**2, self.side**2
        # The older keys go first, as in the processor.
        low = settings.get("min_pixels", size.get("shortest_edge"))
        high = settings.get("max_pixels", size.get("longest_edge"))
        if not (self._is_limit(low) and self._is_limit(high)) or low > high:
            raise UserError(
                f"{path}: min_pixels (or size.shortest_edge) is {shown(str(low))} and max_pixels (or "
                f"size.longest_edge) is {shown(str(high))}: they must be whole numbers from {self.factor**2} to "
                f"{MOST_PIXELS}, in this order"
            )
        return low, high

    def _is_limit(self, value: object) -> TypeGuard[int]:
        """At least one merged patch; `type`, because a bool is an int."""
        return type(value) is int and self.factor**2 <= value <= MOST_PIXELS

    def settings(self, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """Write down the arithmetic as preprocessor_config.json has it."""
        limits: dict[str, Any] = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        if self.side is not None:
            limits = {"size": {"height": self.side, "width": self.side}}
        elif self.writes_size:
            limits = {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}
        # Lists, as JSON gives them back.
        fixed = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self._fixed().items()
        }
        return {
            # The names that transformers looks its classes up by.
            "image_processor_type": f"{self.types[0]}ImageProcessor",
            "processor_class": self.processor_class,
            **limits,
            **fixed,
        }

    def processor_settings(self) -> dict[str, Any] | None:
        """Write down what processor_config.json has; None where preprocessor_config.json says all."""
        if self.side is None:
            return None
        # How often the processor repeats the token of an image: 256 by default.
        tokens = self.image_tokens(self.grid(self.side, self.side))
        return {"processor_class": self.processor_class, "image_seq_length": tokens}

    # ---- Sizes ----

    def resized(self, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        """Find the (h, w) that a picture of height x width is resized to.

        Raises:
            UserError: for an aspect ratio above 200, where that is kept.
        """
        if self.side is not None:
            return self.side, self.side
        return smart_resize(height, width, min_pixels, max_pixels, self.factor)

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Count the patches (t, h, w) of a resized picture."""
        return 1, height // self.patch_size, width // self.patch_size

    def image_tokens(self, grid: tuple[int, int, int]) -> int:
        """Count the tokens of a picture of a grid."""
        return math.prod(grid) // self.merge_size**2

    # ---- On the host: a picture -> levels -> patches ----

    def levels(self, pixels: ArrayLike, min_pixels: int, max_pixels: int) -> np.ndarray:
        """Resize one gray picture float [H, W] in 0..1 as the processor does for 8 bit: uint8 [h, w].

        Raises:
            UserError: see `resized`.
        """
        # Levels first: the processor resizes what a PNG of 8 bits holds.
        image = quantise(pixels)
        height, width = self.resized(*cast(tuple[int, int], image.shape), min_pixels, max_pixels)
        if (height, width) != image.shape:
            # The three channels are equal, so one gray resize gives what the processor's RGB resize gives.
            picture = PilImage.fromarray(image)
            image = np.asarray(picture.resize((width, height), PilImage.Resampling(self.resample)))
        return image

    def prepare(
        self, pixels: ArrayLike, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Turn one gray picture float [H, W] in 0..1 into patches.

        Args:
            min_pixels, max_pixels: None: those of the processor's class.

        Returns:
            (patches float32 [P, patch_dim], grid (1, h, w)), P = h * w.

        Raises:
            UserError: see `resized`.
        """
        # Where a caller has no settings, the class's own hold, as in the reference.
        low, high = self.default_limits
        image = self.levels(
            pixels,
            low if min_pixels is None else min_pixels,
            high if max_pixels is None else max_pixels,
        )
        return self.normalise(self.cut(image), np), self.grid(*cast(tuple[int, int], image.shape))

    # ---- On the host or inside jit ----

    def cut(self, gray: Any) -> Any:
        """Cut gray [.., h, w], sides multiples of `factor`, into patches [.., P, patch_size**2] of the same type.

        Patches that become one token follow each other, tokens row by row.
        """
        *rest, height, width = gray.shape
        merge, patch = self.merge_size, self.patch_size
        # Cut both sides into merged blocks, those into patches, and those into pixels.
        cells = gray.reshape(
            -1, height // self.factor, merge, patch, width // self.factor, merge, patch
        )
        cells = cells.transpose(0, 1, 4, 2, 5, 3, 6)  # [N, rows, columns, merge, merge, p, p]
        return cells.reshape(*rest, height * width // patch**2, patch**2)

    def join(self, patches: np.ndarray, columns: int) -> np.ndarray:
        """Undo `cut`: patches [P, patch_size**2] of a picture that is so many patches wide -> [h, w]."""
        merge, patch = self.merge_size, self.patch_size
        # The axes of `cut`, with merged blocks as columns of a row of them.
        cells = patches.reshape(-1, columns // merge, merge, merge, patch, patch)
        return cells.transpose(0, 2, 4, 1, 3, 5).reshape(-1, columns * patch)

    def normalise(self, levels: Array, xp: Any = None) -> Any:
        """Turn levels uint8 [.., P, patch_size**2] of `cut` into patches float32 [.., P, patch_dim]. Works inside jit.

        Looked up in a table of the 256 levels, which the host has computed: a compiler may turn the divisions into
        products, and the result would differ from the processor's by a rounding.

        Args:
            xp: numpy or jax.numpy (the default).
        """
        if xp is None:
            import jax.numpy as xp
        # One table a channel: their results are laid side by side anyway.
        colours = [
            xp.take(xp.asarray(column), levels, mode="clip") for column in _levels_normalised(self)
        ]
        return self._in_frames(xp.stack(colours, -2), xp)

    def patchify(self, pixels: Array, xp: Any = None) -> Any:
        """Turn gray [N, H, W] in 0..1, H and W multiples of `factor`, into patches float32 [N, P, patch_dim], in jit.

        Rounds to 8 bit first, so that training on an array equals reading the same picture from an 8-bit PNG (but for
        the last bit, see `normalise`).

        Args:
            xp: numpy or jax.numpy (the default).

        Raises:
            UserError: if a side is not a multiple of `factor`.
        """
        if xp is None:
            import jax.numpy as xp
        _, height, width = pixels.shape
        if height % self.factor or width % self.factor:
            raise UserError(
                f"patchify needs sides that are multiples of {self.factor}, got {height} x {width}"
            )
        # Half to even, like numpy's rint.
        levels = xp.round(xp.clip(xp.asarray(pixels, xp.float32), 0, 1) * 255)
        # Cut while it is one channel: a sixth of the numbers to move.
        gray = self.cut(levels / 255)[..., None, :]
        mean, std = (
            xp.asarray(np.asarray(values, np.float32))[:, None] for values in (self.mean, self.std)
        )
        return self._in_frames((gray - mean) / std, xp)

    def _in_frames(self, colours: Any, xp: Any) -> Any:
        """[.., P, channels, patch_size**2] -> [.., P, patch_dim]: a still image is a clip of equal frames."""
        # Inside a patch the order is channel, frame, row, column.
        shape = (*colours.shape[:-1], self.temporal_patch_size, self.patch_size**2)
        clip = xp.broadcast_to(colours[..., None, :], shape)
        return clip.reshape(*shape[:-3], self.patch_dim)


@functools.lru_cache(maxsize=16)
def _levels_normalised(processor: ImageProcessor) -> np.ndarray:
    """float32 [channels, 256]: what each level becomes, in float32 throughout, as in the PIL backend."""
    gray = np.arange(256, dtype=np.float32) / np.float32(255)
    mean, std = (
        np.asarray(values, np.float32)[:, None] for values in (processor.mean, processor.std)
    )
    return (gray - mean) / std


def _is_same(value: Any, wanted: Any) -> bool:
    # Settings may be numbers, lists or switches: one comparison for all of them.
    try:
        value = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return value.shape == np.shape(wanted) and np.allclose(value, wanted, rtol=1e-6, atol=0)
