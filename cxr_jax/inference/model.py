"""A model ready to read with: what `cxr_jax.load` returns."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from cxr_jax.errors import UserError
from cxr_jax.inference import answer_rules, generation, image_inputs, sampling, trace_readings
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.inference.chat import Chat
from cxr_jax.inference.constrained import Constraint
from cxr_jax.inference.requests import (
    Completion,
    GenerationSettings,
    Picture,
    Reading,
    Request,
    check_completions,
    check_constraint,
    check_ids,
    check_room,
    pair_up,
)
from cxr_jax.models import network, registry
from cxr_jax.models.layers import UNROLL_UP_TO
from cxr_jax.models.network import Seen
from cxr_jax.models.network.config import Config
from cxr_jax.models.tokenizer import Tokenizer
from cxr_jax.runtime import trees
from cxr_jax.runtime.trees import Array, Tree
from cxr_jax.weights import hf_folder, native_folder, peft_folder
from cxr_jax.weights.locate import find_folder

_LOG = logging.getLogger(__name__)


@functools.partial(jax.jit, static_argnames=("model_config", "grid", "dtype"))
def encode_images(
    params: Tree, model_config: Config, pixels: Array, grid: tuple[int, int, int], dtype: DTypeLike
) -> Seen:
    """Run the vision tower, compiled, on images of one grid: [N, P, patch_dim] -> tokens [N, I, D]."""
    return network.vision(params, model_config, pixels, grid, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("model_config", "dtype"))
def _logits(
    params: Tree,
    model_config: Config,
    input_ids: Array,
    mask: Array,
    positions: Array,
    features: Seen | None,
    dtype: DTypeLike,
) -> jax.Array:
    hidden = network.hidden_states(
        params, model_config, input_ids, mask, positions, features=features, dtype=dtype
    )
    return network.unembed(params, model_config, hidden)


class Model:
    """Config, parameters (nested dict) and, on first use, the tokenizer of a model folder.

    Attributes:
        rows: completions decoded at once, see `generation.rows_at_once`. More go in turns; raise it to read many
            prompts faster (another number rounds differently: log-probs change by some 1e-6).
        grids: "exact" gives each image the shape that the Hugging Face processor gives it, so every other shape
            compiles a vision program of its own (and a prefill program for every other length bucket). "bucket" pads
            images to at most 9 shapes, and for images below max_pixels to 9 of half its area, of a quarter ..
            (`image_inputs.prepare_in_buckets`): few programs for many sizes, but other pixels than the processor's,
            so not the published model's exact answers. A model of one image size has one shape either way.
        max_pixels: most pixels of an image, where that is less than the model's own limit; None: the model's own.
        image_gate: what becomes of image files that are no chest films by their pixels: "refuse", "warn" or "off".
        number_images: whether "Picture n: " stands before each image, as the published template's add_vision_id has it.
    """

    # Off: prompts are as training writes them.
    number_images = False

    def __init__(
        self,
        model_config: Config,
        params: Tree,
        *,
        folder: str | os.PathLike | None = None,
        dtype: DTypeLike = jnp.float32,
        grids: str = "exact",
        max_pixels: int | None = None,
        image_gate: str = "refuse",
    ) -> None:
        """Put the parameters on the device, in `dtype`; `load` reads them from a folder."""
        self._processor = registry.processor_of(model_config)
        image_inputs.check_settings(grids, max_pixels, image_gate, self._processor.factor)
        self.config = model_config
        self.dtype = jnp.dtype(dtype)
        self.folder = None if folder is None else Path(folder)
        self.grids, self.max_pixels, self.image_gate = grids, max_pixels, image_gate
        self.params = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), params)
        self.rows = generation.rows_at_once()
        self._programs: dict[str, set] = {}  # kind -> what makes each of its programs, see `note`

    # ---- What a folder brings ------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer. Raises UserError if it has none."""
        if self.folder is None:
            raise UserError("the model has no tokenizer, so it cannot take or give text")
        from cxr_jax.models import tokenizer as tokenizers

        return tokenizers.load(str(self.folder))

    @functools.cached_property
    def special(self) -> dict[str, tuple[int, ...]]:
        """Ids that end an answer ("stop") and ids that are never drawn ("suppress"): media tokens, and those
        without a text (embedding tables are padded beyond the tokenizer)."""
        from cxr_jax.models import tokenizer as tokenizers

        ids = tokenizers.special_ids(self.tokenizer, self.config.text.vocab_size)
        suppress = {*ids["suppress"], *self.config.media_token_ids}
        return {"stop": ids["stop"], "suppress": tuple(sorted(suppress))}

    @functools.cached_property
    def pixel_limits(self) -> tuple[int, int]:
        """(min_pixels, max_pixels) of the folder's image settings (`hf_folder.image_settings`), or the published ones.

        Raises UserError, naming the file, for settings that are damaged or ask for other arithmetic than ours.
        """
        settings: dict = {}
        path = None
        if self.folder is not None:
            settings, path = hf_folder.image_settings(self.folder)
        self._processor.check_settings(settings, path)
        return self._processor.pixel_limits(settings, path)

    @functools.cached_property
    def answers(self) -> Constraint:
        """The rules of valid answers for this tokenizer: <think>, free text, </think>, <answer>, a list of the 14
        names, </answer>. Takes seconds once. Raises UserError for a tokenizer that cannot express them."""
        from cxr_jax.labels.answers import TokenBytes

        rules = answer_rules.compile_answers(
            TokenBytes.from_tokenizer(self.tokenizer),
            self.config.text.vocab_size,
            self.special["stop"],
            suppress_ids=self.special["suppress"],
            max_new_tokens=512,  # replaced by `within`, see `constraint`
        )
        return jax.tree.map(jnp.asarray, rules)

    def constraint(self, constraint: Any, max_new_tokens: int, opened: str = "") -> Any:
        """Turn "answers" into `answers` after what the template opened, within max_new_tokens; others stay.

        Raises:
            UserError: for another text, or if no valid answer is as short as max_new_tokens, or begins as opened.
        """
        check_constraint(constraint)
        if isinstance(constraint, str):
            constraint = self.answers.after(opened).within(max_new_tokens)
        return constraint

    # ---- Which programs it needed --------------------------------------------------------------------------

    def note(self, kind: str, shape: Hashable) -> None:
        """Count a program by what makes it another one; log a new one (INFO)."""
        known_shapes = self._programs.setdefault(kind, set())
        if shape not in known_shapes:
            known_shapes.add(shape)
            _LOG.info("%s program %d: %s", kind, len(known_shapes), shape)

    def programs(self) -> dict[str, int]:
        """Count the programs that generate, chat, read and finding_probabilities have needed so far, by kind: vision
        (one for each image shape), prefill (length bucket), extend (a later turn), decode, probabilities."""
        return {kind: len(shapes) for kind, shapes in self._programs.items()}

    # ---- Arrays in, arrays out -----------------------------------------------------------------------------

    def image_features(self, pixel_values: ArrayLike | None, image_grid_thw: Any) -> list[Seen]:
        """Compute the image tokens [t*h*w/4, D], and their taps, of each image; images of one grid run together.

        Args:
            pixel_values: [sum of t*h*w, patch_dim], all images' patches.
            image_grid_thw: int [n, 3].

        Raises:
            UserError: if the two disagree.
        """
        patch_dim = self.config.vision.patch_dim
        grids, images = image_inputs.split_images(pixel_values, image_grid_thw, patch_dim)
        features: list = [None] * len(grids)  # in the order of the images
        for image_grid in dict.fromkeys(grids):
            same_grid = [index for index, other in enumerate(grids) if other == image_grid]
            self.note("vision", (image_grid, len(same_grid)))
            # Images of one grid are one batch; every grid is a program of its own.
            stacked = np.stack([images[image_index] for image_index in same_grid])
            encoded = encode_images(self.params, self.config, stacked, image_grid, self.dtype)
            # To the host first: slices of a device array would each compile.
            host = jax.tree.map(np.asarray, encoded)
            for number, image_index in enumerate(same_grid):
                features[image_index] = jax.tree.map(lambda array, i=number: array[i], host)
        return features

    def _place(self, input_ids: np.ndarray, features: list[Seen]) -> Seen | None:
        """[B, I, D]: each row's image tokens in reading order, or None if there are none."""
        if not features:
            return None
        counts = (input_ids == self.config.image_token_id).sum(1)  # [B]
        joined = jax.tree.map(lambda *images: np.concatenate(images), *features)
        given = len(joined.tokens)  # [tokens of all images, D]
        if counts.sum() != given:
            raise UserError(f"input_ids has {counts.sum()} image tokens, the images give {given}")
        first = np.cumsum(counts) - counts  # [B]: each row's own run; beyond, any token will do
        index = np.minimum(first[:, None] + np.arange(max(1, counts.max())), given - 1)
        return jax.tree.map(lambda tokens: tokens[index], joined)

    def logits(
        self,
        input_ids: ArrayLike,
        pixel_values: ArrayLike | None = None,
        image_grid_thw: Array | Sequence[Any] | None = None,
        attention_mask: ArrayLike | None = None,
    ) -> np.ndarray:
        """Compute next-token logits float32 [B, T, V] from the arrays that a Hugging Face processor gives.

        Args:
            input_ids: int [B, T].
            pixel_values: [patches, patch_dim] of all images in reading order, or None.
            image_grid_thw: int [n, 3], or None.
            attention_mask: [B, T], 0 at right padding.

        Raises:
            UserError: when they disagree.
        """
        ids = np.asarray(input_ids)
        mask = np.ones(ids.shape, bool)
        if attention_mask is not None:
            mask = np.asarray(attention_mask).astype(bool)
        grids = None
        if image_grid_thw is not None and len(image_grid_thw):
            grids = np.asarray(image_grid_thw)
        check_ids(ids, mask, self.config)
        positions = network.positions(self.config, ids, grids, mask)
        features = [] if grids is None else self.image_features(pixel_values, grids)
        # Padding must not count as an image token.
        placed = self._place(np.where(mask, ids, self.config.pad_token_id), features)
        return np.asarray(
            _logits(self.params, self.config, ids, mask, positions, placed, self.dtype)
        )

    # ---- Images and texts in, texts out --------------------------------------------------------------------

    def render(
        self, prompt: str | Sequence[dict[str, Any]], grids: Sequence[tuple[int, int, int]] = ()
    ) -> list[int]:
        """Render one user turn (or a conversation) with its images, see `inference.prompts.render_conversation`."""
        return self._rendered(inference_prompts.render_prompt, prompt, grids).ids

    def _rendered(self, render: Callable[..., Any], prompt: Any, grids: Sequence[Any]) -> Any:
        return render(self.tokenizer, self.config, prompt, grids, numbered=self.number_images)

    def prepare(self, image: Any) -> tuple[np.ndarray | None, tuple[int, int, int] | None]:
        """Turn an image (path, PIL image, or [H, W] floats in 0..1) into (patches, grid); (None, None) for None."""
        if image is None:
            return None, None
        pixels = image_inputs.pixels_of(image, self.image_gate)
        low, high = image_inputs.limited(self._processor, self.pixel_limits, self.max_pixels)
        if self.grids == "bucket" and low != high:  # a model of one size has one shape anyway
            return image_inputs.prepare_in_buckets(self._processor, pixels, high, low)
        # A processor of one square stretches to it; squares by limits are padded, as in training.
        if self._processor.side is None:
            pixels = image_inputs.fit_to_model(pixels, (low, high))
        return self._processor.prepare(pixels, min_pixels=low, max_pixels=high)

    def pictures(self, images: Any) -> tuple[Picture, ...]:
        """Turn an image, a list of several, or None into what the model takes, each by `prepare`."""
        return image_inputs.prepare_all(images, self.prepare)

    def generate(
        self,
        images: Sequence[Any],
        prompts: str | Sequence[Any],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        n: int = 1,
        seed: int = 0,
        *,
        top_p: float | None = None,
        top_k: int | None = None,
        stream: Callable[[int, int, str], None] | None = None,
        constraint: Any = None,
    ) -> list[list[Completion]]:
        """Draw n completions for each (image, prompt). An image is encoded and a prompt computed once for all n.

        A completion depends on its own image, prompt, settings, seed and number only, not on the others in the call.
        Log-probs are at the temperature, under constraint (see `sampling`), before top_p and top_k.

        Args:
            images: list of path | PIL image | [H, W] floats in 0..1 | None | a list of several of these but None.
            prompts: one text for all, or a list of texts or conversations ([{"role", "content"}, ...], ending with
                the user). Images stand where the user's texts mark their places with <image>, all of them in order;
                without marks before the first of these texts.
            temperature: 0 is greedy (top_p and top_k then change nothing).
            constraint: None, "answers" (the completion ends with a valid answer list, see `answers`), or what
                `sampling` takes.
            stream: called with (prompt index, sample index, new text) every few tokens; the pieces add up to the text.

        Raises:
            UserError: for arguments out of range, an unusable image, a prompt that does not leave room for
                max_new_tokens, a max_new_tokens that is too small for any valid answer, or a model without a
                tokenizer; nothing is computed then.
        """
        # All of it is checked before anything is computed: a bad last prompt costs nothing.
        settings = GenerationSettings(max_new_tokens, temperature, n, seed, top_p, top_k)
        check_constraint(constraint)
        image_list, prompt_list = pair_up(images, prompts)
        requests = []
        for index, (image, prompt) in enumerate(zip(image_list, prompt_list, strict=True)):
            name = "the prompt" if len(prompt_list) == 1 else f"prompt {index}"
            requests.append(self._request(image, prompt, settings.max_new_tokens, name))
        # A rule a beginning: what a template opens is part of the answer's format.
        new_tokens, beginnings = settings.max_new_tokens, {request.opened for request in requests}
        rules = {opened: self.constraint(constraint, new_tokens, opened) for opened in beginnings}
        return generation.complete(self, requests, settings, stream, rules)

    def _request(
        self, image: Any, prompt: Any, new_tokens: int, name: str = "the prompt"
    ) -> Request:
        pictures = self.pictures(image)
        grids = [picture.grid for picture in pictures]
        rendered = self._rendered(inference_prompts.render_question, prompt, grids)
        request = Request(rendered.ids, pictures, rendered.opened)
        check_room(self.config, len(request.ids), new_tokens, name)
        return request

    def read(
        self,
        image: Any,
        prompt: str | Sequence[dict[str, Any]],
        samples: int = 8,
        max_new_tokens: int = 512,
        seed: int = 0,
        *,
        constraint: Any = None,
        probabilities: bool = True,
    ) -> Reading:
        """Read one image: greedily, in `samples` completions at temperature 1, and as a probability of each finding.

        The image is encoded and the prompt computed once for all of it. shown and samples are what `generate` gives
        for temperature 0 and 1.

        Args:
            image: one, or a list of several that are read together, as for `generate`.
            constraint: as for `generate`, for what is shown only.
            probabilities: the mean over the samples' traces (without samples: after the trace shown) of the
                probability that the answer names each of the 14 labels, see `finding_probabilities`; False leaves
                them out.

        Raises:
            UserError: as `generate`, and as `answers` if there are to be probabilities.
        """
        # All arguments are checked before anything is computed.
        greedy = GenerationSettings(max_new_tokens, seed=seed)
        drawn = GenerationSettings(max_new_tokens, 1.0, samples, seed) if samples != 0 else None
        check_constraint(constraint)
        request = self._request(image, prompt, greedy.max_new_tokens)
        rules = self.constraint(constraint, greedy.max_new_tokens, request.opened)
        answers = self.answers.after_if_valid(request.opened) if probabilities else None
        return trace_readings.read(self, request, greedy, drawn, rules, answers)

    def finding_probabilities(
        self,
        image: Any,
        prompt: str | Sequence[dict[str, Any]],
        completions: list[Completion],
        seed: int = 0,
    ) -> dict:
        """Compute the model's own probability that the answer names each label, after the trace of each completion.

        Of a completion (of `generate` for this image and prompt) only the trace counts: what precedes the answer
        list. All valid answers after it are weighed at temperature 1 (`answer_probabilities.probabilities_after`);
        seed matters where they are too many. A probability is what the model would say, and no calibrated risk.

        Returns:
            {"each": [{label: probability}], "mean": {label: probability}, "exact_mass": [the error of each is at most
            1 minus this]}.

        Raises:
            UserError: as `generate` and `answers` do, and without completions.
        """
        GenerationSettings(1, seed=seed)  # checks the seed
        check_completions(completions)
        longest = max(len(completion.token_ids) for completion in completions)
        request = self._request(image, prompt, longest)
        answers = self.answers.after_if_valid(request.opened)
        prefix = generation.prefix_of(self, request)
        # Completions in turns of as many rows as the model's programs have.
        layers = sampling.decode_layers(self.params, self.config)  # once for all turns
        turns = []
        for first in range(0, len(completions), self.rows):
            turn = completions[first : first + self.rows]
            turns.append(
                trace_readings.after(self, layers, prefix, turn, answers, seed, first=first)
            )
        after_traces = np.concatenate([turn["trace"][0] for turn in turns])
        exact_mass = np.concatenate([turn["exact_mass"][0] for turn in turns])
        return {
            "each": [trace_readings.by_label(row) for row in after_traces],
            "mean": trace_readings.by_label(after_traces.mean(0)),
            "exact_mass": exact_mass.tolist(),
        }

    def chat(self, image: Any = None, system: str | None = None) -> Chat:
        """Begin a conversation about an image (or several, or None, as for `generate`); system replaces the template's
        own prompt."""
        return Chat(self, image, system)


# ---- From a folder -----------------------------------------------------------------------------------------


def load(
    name: str | os.PathLike,
    dtype: DTypeLike | None = None,
    grids: str = "exact",
    adapter: str | os.PathLike | None = None,
    max_pixels: int | None = None,
    image_gate: str = "refuse",
) -> Model:
    """Load a model; see `cxr_jax.load`."""
    if not all(isinstance(given, (str, os.PathLike)) for given in (name, adapter or "")):
        raise UserError(
            f"a model or an adapter must be a name or a folder, not {name!r}, {adapter!r}"
        )
    image_inputs.check_settings(grids, max_pixels, image_gate)  # before the weights take their time
    folder = find_folder(name)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if not _is_floating(dtype):
        raise UserError(f"dtype={dtype!r}: use float32, bfloat16 or float16")
    model_config, params = _read_params(folder, dtype, adapter)
    layer_count = model_config.text.num_hidden_layers
    layers = params["text"].pop("layers")  # apart from the rest: they are most of a model
    params = trees.to_device(params)
    if jax.default_backend() == "cpu" and layer_count > UNROLL_UP_TO:  # see `layers_apart`
        params["text"]["layers"] = trees.layers_apart(layers, layer_count)
    else:
        params["text"]["layers"] = trees.to_device(layers)
    model = Model(
        model_config, params, folder=folder, dtype=dtype, grids=grids, max_pixels=max_pixels
    )
    model.image_gate = image_gate
    if max_pixels:
        processor, limits = registry.processor_of(model_config), model.pixel_limits
        if remark := image_inputs.remark_on_limit(processor, limits, max_pixels):
            _LOG.warning(remark)
    return model


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(np.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def _read_params(
    folder: Path, dtype: DTypeLike, adapter: str | os.PathLike | None
) -> tuple[Config, Tree]:
    """Config and parameters of a folder on the host, with an adapter merged in. The adapter is read first: a bad one
    is refused before the weights take their time."""
    is_native = native_folder.is_native(folder)
    lora = None
    if adapter is not None:
        if is_native:
            model_config = native_folder.Arrays(folder).config
        else:
            model_config = hf_folder.read_config(folder)
        lora = peft_folder.load(adapter, model_config)
    read = native_folder.load if is_native else hf_folder.load
    model_config, params = read(folder, np.dtype(dtype))
    if lora:
        peft_folder.merge(params, *lora)
    return model_config, params
