"""One film as a model reads it: its size, its patches, and the programs that read it, from shapes alone."""

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from cxr_jax.data import radiograph
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.errors import UserError
from cxr_jax.planning.programs import Program, abstract_array, read_model
from cxr_jax.runtime.trees import Tree

if TYPE_CHECKING:
    from cxr_jax.config.sections import RunConfig
    from cxr_jax.models.image_batches import Images
    from cxr_jax.models.network.config import Config


class Film(NamedTuple):
    """A film and what is made of it; its fields are keys of `plan --json`.

    Attributes:
        film: its (height, width) in pixels; None for films of any size, which training fits into one.
        resized: the (height, width) that is cut into patches; None: its own, resized by area.
        patches: of the vision tower.
        image_tokens: of the prompt.
    """

    film: tuple[int, int] | None
    resized: tuple[int, int] | None
    patches: int
    image_tokens: int

    def __str__(self) -> str:
        """Say it in one line."""
        whole = "films" if self.film is None else "film of {:,} x {:,} pixels".format(*self.film)
        read = "in their own aspect ratio, packed"
        if self.resized is not None:
            read = "read at {:,} x {:,}".format(*self.resized)
        return f"{whole}, {read}: {self.patches:,} patches, {self.image_tokens:,} image tokens"


def film_of_grid(
    size: tuple[int, int] | None, grid: tuple[int, int, int], model_config: "Config"
) -> Film:
    """Describe a film (height, width) that is cut into a grid (t, h, w) of patches."""
    vision = model_config.vision
    _, rows, columns = grid
    resized = rows * vision.patch_size, columns * vision.patch_size
    return Film(size, resized, rows * columns, rows * columns // vision.merge_unit)


def film_of_run(images: "Images") -> Film:
    """Describe the films of a run: squares of one size, or a packed row of those of a prompt."""
    from cxr_jax.models.image_batches import SquareImages

    # Packed rows have the slots that windows leave empty, too: they are computed.
    if isinstance(images, SquareImages):
        return film_of_grid(None, images.grid, images.model_config)
    return Film(None, None, images.patches, images.image_tokens)


def parse_size(text: str) -> tuple[int, int]:
    """Read HEIGHTxWIDTH, in pixels.

    Raises:
        UserError: for anything else, and for sizes that no radiograph has.
    """
    numbers = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not numbers:
        raise UserError(f"--film={text}: write HEIGHTxWIDTH in pixels, as in 2544x3056")
    height, width = int(numbers[1]), int(numbers[2])
    radiograph.check_size(f"--film={text}", height, width)
    return height, width


class FilmReading:
    """How the model of a run's settings reads a film of a size.

    Args:
        size: (height, width) of the film.
        max_pixels: the reader's own limit, or None.

    Raises:
        UserError: for a model folder that cannot be read, or a prompt beyond the model's positions.
    """

    def __init__(
        self, settings: "RunConfig", size: tuple[int, int], max_pixels: int | None = None
    ) -> None:
        # Imported here: the command sets up its devices before JAX looks for them.
        from cxr_jax.inference import generation, prompts
        from cxr_jax.inference.requests import check_room
        from cxr_jax.weights.pretrained import DTYPES

        self.settings, self.dtype = settings, DTYPES[settings.dtype]
        model_config, tokenizer = read_model(settings.model)
        self.model_config = model_config.with_attention(settings.attention)
        self.grid = _grid(size, settings.model, self.model_config, max_pixels)
        self.film = film_of_grid(size, self.grid, self.model_config)
        rendered = prompts.render_prompt(tokenizer, self.model_config, FIND_PROMPT, [self.grid])
        ids = rendered.ids
        check_room(self.model_config, len(ids), settings.max_completion)
        self.slot_count = generation.bucket(len(ids))

    def programs(self) -> list[Program]:
        """Return vision, prompt and decode, in the order in which they run."""
        import jax

        from cxr_jax.models import network

        draw = partial(network.init_params, self.model_config, jax.random.key(0))
        # A reader holds its weights in the type of the computation.
        params = jax.tree.map(
            lambda leaf: abstract_array(leaf.shape, self.dtype), jax.eval_shape(draw)
        )
        prompt = self._prompt(params)
        return [self._vision(params), prompt, self._decode(params, prompt)]

    def _vision(self, params: Tree) -> Program:
        import jax

        from cxr_jax.models import network

        def encode(params: Tree, patches: Any) -> Any:
            return network.vision(params, self.model_config, patches, self.grid, dtype=self.dtype)

        patches = abstract_array((1, self.film.patches, self.model_config.vision.patch_dim))
        arguments = {"parameters": params, "batch": patches}
        return Program("vision", jax.jit(encode), arguments, [1], self.film.image_tokens, {})

    def _prompt(self, params: Tree) -> Program:
        import jax

        from cxr_jax.inference import sampling
        from cxr_jax.models import network

        def prefill(params: Tree, prompts: Any) -> Any:
            return sampling.prefill(params, self.model_config, prompts, dtype=self.dtype)

        slots = self.slot_count
        tokens = abstract_array((1, slots, self.model_config.text.hidden_size), self.dtype)
        arrays: list[Any] = [
            abstract_array((1, slots), "int32"),
            abstract_array((1,), "int32"),
            abstract_array((self.model_config.text.position_axes, 1, slots), "int32"),
            network.Seen(tokens, (tokens,) * len(self.model_config.vision.tapped)),
        ]
        prompts = sampling.PromptBatch(*arrays)
        arguments = {"parameters": params, "batch": prompts}
        return Program("prompt", jax.jit(prefill), arguments, [1], slots, {})

    def _decode(self, params: Tree, prompt: Program) -> Program:
        """Return what draws completions, each row with its copy of the prompt's keys."""
        import jax

        from cxr_jax.inference import generation, sampling
        from cxr_jax.inference.compaction import Rows
        from cxr_jax.inference.token_choice import Distribution, StepSettings

        room = generation.bucket(self.settings.max_completion)
        row_count = generation.rows_for(generation.ROWS_ON_ACCELERATORS, self.slot_count)
        choice = StepSettings(
            greedy=False,
            stop_ids=self.model_config.eos_token_id,
            suppress_ids=self.model_config.media_token_ids,
            dtype=self.dtype,
        )
        begin = partial(sampling.begin, model_config=self.model_config, room=room, dtype=self.dtype)
        computed = jax.eval_shape(prompt.step, *prompt.arguments.values())
        live = abstract_array((), "int32")
        prompt_keys, own_keys, rest = jax.eval_shape(begin, [computed] * row_count, live, None)
        integers = abstract_array((row_count,), "int32")
        random_keys = jax.eval_shape(partial(sampling.row_keys, 0, row_count))
        rows = Rows(prompt_keys, integers, integers, random_keys)

        def decode(params: Tree, layers: Tree, batch: tuple, own_keys: Tree) -> Any:
            rows, rest = batch
            return sampling.decode(
                params,
                layers,
                self.model_config,
                rows,
                Distribution(1.0),
                own_keys,
                rest,
                self.settings.max_completion,
                None,
                settings=choice,
            )

        # An accelerator keeps the decoder's layers twice: stacked for prompts, and apart for this loop.
        layers = jax.eval_shape(
            partial(sampling.decode_layers, model_config=self.model_config), params
        )
        arguments = {
            "parameters": params,
            "fixed": layers,
            "batch": (rows, rest),
            "own_keys": own_keys,
        }
        turns, tokens = [self.settings.max_completion], row_count * self.settings.max_completion
        return Program("decode", jax.jit(decode, donate_argnums=3), arguments, turns, tokens, {})


def _grid(
    size: tuple[int, int], model: str, model_config: "Config", max_pixels: int | None
) -> tuple[int, int, int]:
    """Find the grid (t, h, w) of a film of a size, as `Model.prepare` makes it."""
    from cxr_jax.inference import image_inputs
    from cxr_jax.models import registry
    from cxr_jax.weights import hf_folder, locate

    settings: dict = {}
    path = None
    # A shape without a folder has the published settings.
    if model and not model.startswith("random:"):
        settings, path = hf_folder.image_settings(locate.find_folder(model))
    processor = registry.processor_of(model_config)
    limits = processor.pixel_limits(settings, path)
    image_inputs.check_max_pixels(max_pixels, processor.factor)
    low, high = image_inputs.limited(processor, limits, max_pixels)
    # A model of one size pads every film to a square of it.
    if low == high:
        size = math.isqrt(high), math.isqrt(high)
    return processor.grid(*processor.resized(*size, low, high))
