"""Whether the films of a run are those that its model reads: sizes, shapes, room in a prompt."""

import pathlib
import sys
from collections.abc import Mapping, Sequence

from cxr_jax.config.sections import DataConfig, RunConfig
from cxr_jax.data.sources.rows import Row
from cxr_jax.errors import UserError
from cxr_jax.models import registry
from cxr_jax.models.image_batches import Images, PackedImages, open_images
from cxr_jax.models.network.config import Config
from cxr_jax.runtime import processes
from cxr_jax.weights import hf_folder, locate


def check_images(
    model: str, model_config: Config, size: int, data: DataConfig, count: int
) -> Images:
    """How the images of a run travel, once they are known to be the model's."""
    processor = registry.processor_of(model_config)
    if processor.side is not None:
        _check_stretched(model, processor.side, size, data)
        return open_images(data, model_config, size, count)
    unit = processor.factor
    # Squares must divide into merged patches; the processor sees to it that films do.
    if not data.is_native:
        if size % unit:
            raise UserError(
                f"config.data.size={size}: must be a multiple of {unit}, a token's side of config.model={model!r}"
            )
    elif not unit**2 <= data.min_pixels < data.max_pixels:
        raise UserError(
            f"config.data.min_pixels={data.min_pixels} and config.data.max_pixels={data.max_pixels}: the least pixels "
            f"of a film must be below the most, and {unit}**2 at least"
        )
    return open_images(data, model_config, size, count)


def _check_stretched(model: str, side: int, size: int, data: DataConfig) -> None:
    """Refuse images that a model, whose processor stretches films to squares of `side`, would read otherwise."""
    if data.kind == "files" and data.max_pixels != side**2:
        raise UserError(
            f"config.model={model!r} reads films that are stretched to {side} x {side} pixels: set "
            f"config.data.max_pixels to {side**2}"
        )
    if data.kind != "files" and size != side:
        raise UserError(
            f"config.model={model!r} reads squares of {side} pixels, and the images of config.data.source="
            f"{data.source!r} have {size}"
        )


def check_room_for_films(
    model_config: Config,
    data: DataConfig,
    rows: Sequence[Row],
    sizes: Mapping[pathlib.Path, tuple[int, int]],
) -> None:
    """Refuse rows whose films have more image tokens than a prompt has room for (`config.data.image_tokens`).

    Args:
        sizes: (height, width) of each film that can be read; rows of others are left out.

    Raises:
        UserError: naming the first such row, and how many there are.
    """
    # What cannot be read has no size, and is reported where files are.
    readable = [row for row in rows if all(path in sizes for path in row.image_paths)]
    if not data.is_native or not readable:
        return
    most_films = max(len(row.image_paths) for row in readable)
    images = open_images(data, model_config, data.size, most_films)
    assert isinstance(images, PackedImages), "films in their own aspect ratio are packed"
    processor = registry.processor_of(model_config)
    # As the batches will be made: the resize, then the room.
    problems = []
    for row in readable:
        try:
            resized = [
                processor.resized(*sizes[path], *data.pixel_limits) for path in row.image_paths
            ]
            images.check_room([processor.grid(*sides) for sides in resized], row.id)
        except UserError as error:
            problems.append(str(error))
    if problems:
        others = f" ({len(problems):,} of {len(rows):,} rows)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{others}")


def warn_of_other_sizes(settings: RunConfig) -> None:
    """Say once that a run reads films in other sizes than its model's folder asks for.

    A published folder asks for sizes that nobody trains at: of those only an evaluation is told.
    """
    folder = locate.find_folder(settings.model)
    processor = registry.processor_of(hf_folder.read_config(folder))
    own, wanted = (
        processor.pixel_limits(*hf_folder.image_settings(folder)),
        settings.data.pixel_limits,
    )
    is_published = own == processor.published_limits and settings.task != "evaluate"
    if own != wanted and not is_published and processes.is_main():
        print(
            f"warning: config.model={settings.model!r} asks for films of {_pixels(own)}, this run reads "
            f"{_pixels(wanted)} (config.data.max_pixels, min_pixels and size)",
            file=sys.stderr,
            flush=True,
        )


def _pixels(limits: tuple[int, int]) -> str:
    low, high = limits
    return f"{high:,} pixels" if low == high else f"{low:,} to {high:,} pixels"
