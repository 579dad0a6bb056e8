"""A model ready to read with: what `cxr_jax.load` returns."""

import functools
import logging
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.inference import chat as chats
from cxr_jax.inference import constrained, generation, image_inputs, sampling
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.inference.generation import Completion, Reading, Request, Settings
from cxr_jax.inference.image_inputs import GRIDS, pixels_of
from cxr_jax.models import qwen2_5_vl, registry
from cxr_jax.models.layers import UNROLL_UP_TO
from cxr_jax.models.qwen2_5_vl.config import Config
from cxr_jax.weights import hf_folder, native_folder, peft_folder
from cxr_jax.weights.locate import find_folder

_LOG = logging.getLogger(__name__)


@functools.partial(jax.jit, static_argnames=("model_config", "grid", "dtype"))
def _vision(params, model_config, pixels, grid, dtype):
    return qwen2_5_vl.vision(params, model_config, pixels, grid, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("model_config", "dtype"))
def _logits(params, model_config, input_ids, mask, positions, features, dtype):
    hidden = qwen2_5_vl.hidden_states(
        params, model_config, input_ids, mask, positions, features=features, dtype=dtype
    )
    return qwen2_5_vl.unembed(params, model_config, hidden)


class Model:
    """Config, parameters (nested dict) and, on first use, the tokenizer of a model folder.

    rows: completions decoded at once, see `generation.rows_at_once`. More go in turns; raise it to read many prompts
    faster (another number rounds differently: log-probs change by some 1e-6).
    grids: "exact" gives each image the shape that the Hugging Face processor gives it, so every other shape compiles
    a vision program of its own (and a prefill program for every other length bucket). "bucket" pads images to at
    most 9 shapes (`preprocess.prepare_in_buckets`): few programs for many sizes, but other pixels than the
    processor's, so not the published model's exact answers. A model of one image size has one shape either way.
    """

    def __init__(
        self,
        model_config: Config,
        params: dict,
        *,
        folder=None,
        dtype=jnp.float32,
        grids: str = "exact",
    ):
        if grids not in GRIDS:
            raise UserError(f"grids={grids!r}: use one of {', '.join(GRIDS)}")
        self.grids, self._programs = grids, {}
        self.config, self.dtype, self.folder = (
            model_config,
            jnp.dtype(dtype),
            None if folder is None else Path(folder),
        )
        self.params = jax.tree.map(lambda x: jnp.asarray(x, self.dtype), params)
        self.rows = generation.rows_at_once()
        self._processor = registry.family_of(model_config).processor

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer. Raises UserError if it has none."""
        if self.folder is None:
            raise UserError("the model has no tokenizer, so it cannot take or give text")
        from cxr_jax.models import tokenizer as tokenizers

        return tokenizers.load(str(self.folder))

    @functools.cached_property
    def special(self) -> dict:
        """Ids that end an answer ("stop") and ids that are never drawn ("suppress"): media tokens, and those
        without a text (embedding tables are padded beyond the tokenizer)."""
        from cxr_jax.models import tokenizer as tokenizers

        ids = tokenizers.special_ids(self.tokenizer, self.config.text.vocab_size)
        return {
            "stop": ids["stop"],
            "suppress": tuple(sorted({*ids["suppress"], *self.config.media_token_ids})),
        }

    @functools.cached_property
    def pixel_limits(self) -> tuple[int, int]:
        """(min_pixels, max_pixels) of the folder's image settings (`hf.image_settings`), or the published ones.

        Raises UserError, naming the file, for settings that are damaged or ask for other arithmetic than ours.
        """
        settings, path = (
            ({}, None) if self.folder is None else hf_folder.image_settings(self.folder)
        )
        self._processor.check_settings(settings, path)
        return self._processor.pixel_limits(settings, path)

    @functools.cached_property
    def answers(self) -> constrained.Constraint:
        """The rules of valid answers for this tokenizer: <think>, free text, </think>, <answer>, a list of the 14
        names, </answer>. Takes seconds once. Raises UserError for a tokenizer that cannot express them."""
        from cxr_jax.labels.answers import TokenBytes

        rules = constrained.compile_answers(
            TokenBytes.from_tokenizer(self.tokenizer),
            self.config.text.vocab_size,
            self.special["stop"],
            suppress_ids=self.special["suppress"],
            max_new_tokens=512,
        )
        return jax.tree.map(jnp.asarray, rules)

    def constraint(self, constraint, max_new_tokens: int):
        """What `sampling` takes: "answers" -> `answers` within max_new_tokens; anything else but a text as it is.

        Raises UserError for another text, or if no valid answer is as short as max_new_tokens.
        """
        known = constraint is None or hasattr(constraint, "allowed")
        if not known and not (isinstance(constraint, str) and constraint == "answers"):
            raise UserError(f'constraint={constraint!r}: use "answers"')
        return self.answers.within(max_new_tokens) if isinstance(constraint, str) else constraint

    def note(self, kind: str, shape) -> None:
        """Counts a program by what makes it another one; logs a new one (INFO)."""
        seen = self._programs.setdefault(kind, set())
        if shape not in seen:
            seen.add(shape)
            _LOG.info("%s program %d: %s", kind, len(seen), shape)

    def programs(self) -> dict[str, int]:
        """Programs that generate, chat, read and finding_probabilities have needed so far, by kind: vision (one for
        each image shape), prefill (length bucket), extend (a later turn), decode, probabilities."""
        return {kind: len(seen) for kind, seen in self._programs.items()}

    def image_features(self, pixel_values, image_grid_thw) -> list:
        """Image tokens [t*h*w/4, D] of each image; images of one grid run together.

        pixel_values: [sum of t*h*w, patch_dim], all images' patches; image_grid_thw: int [n, 3].
        """
        grids = [tuple(int(x) for x in g) for g in np.asarray(image_grid_thw).reshape(-1, 3)]
        sizes = [int(np.prod(g)) for g in grids]
        pixels = np.asarray(pixel_values)
        if pixels.shape != (sum(sizes), self.config.vision.patch_dim):
            raise UserError(
                f"pixel_values has shape {list(pixels.shape)}, image_grid_thw needs "
                f"{[sum(sizes), self.config.vision.patch_dim]}"
            )
        parts = np.split(pixels, np.cumsum(sizes)[:-1])
        out: list = [None] * len(grids)
        for grid in dict.fromkeys(grids):
            which = [i for i, g in enumerate(grids) if g == grid]
            self.note("vision", (grid, len(which)))
            found = _vision(
                self.params, self.config, np.stack([parts[i] for i in which]), grid, self.dtype
            )
            for i, f in zip(
                which, np.asarray(found), strict=True
            ):  # eager slices would each compile
                out[i] = f
        return out

    def _place(self, input_ids, features: list):
        """[B, I, D]: each row's image tokens in reading order, or None if there are none."""
        if not features:
            return None
        counts = (input_ids == self.config.image_token_id).sum(1)
        joined = np.concatenate(features)
        if counts.sum() != len(joined):
            raise UserError(
                f"input_ids has {counts.sum()} image tokens, the images give {len(joined)}"
            )
        first = np.cumsum(counts) - counts
        index = np.minimum(first[:, None] + np.arange(max(1, counts.max())), len(joined) - 1)
        return joined[index]

    def logits(
        self, input_ids, pixel_values=None, image_grid_thw=None, attention_mask=None
    ) -> np.ndarray:
        """Next-token logits float32 [B, T, V] from the arrays that a Hugging Face processor gives.

        input_ids int [B, T]; pixel_values [patches, patch_dim] and image_grid_thw int [n, 3] for all images
        in reading order, or None; attention_mask [B, T], 0 at right padding. Raises UserError when they
        disagree.
        """
        ids = np.asarray(input_ids)
        mask = (
            np.ones(ids.shape, bool)
            if attention_mask is None
            else np.asarray(attention_mask).astype(bool)
        )
        grids = (
            None
            if image_grid_thw is None or not len(image_grid_thw)
            else np.asarray(image_grid_thw)
        )
        _check_ids(ids, mask, self.config)
        positions = qwen2_5_vl.positions(self.config, ids, grids, mask)
        features = [] if grids is None else self.image_features(pixel_values, grids)
        placed = self._place(np.where(mask, ids, self.config.pad_token_id), features)
        return np.asarray(
            _logits(self.params, self.config, ids, mask, positions, placed, self.dtype)
        )

    def render(self, prompt, grid: tuple[int, int, int] | None) -> list[int]:
        """Token ids of one user turn (or a conversation), with the image (if any) before the first user's text."""
        return inference_prompts.render_prompt(self.tokenizer, self.config, prompt, grid)

    def prepare(self, image):
        """An image (path, PIL image, or [H, W] floats in 0..1) -> (patches, grid); (None, None) for None."""
        if image is None:
            return None, None
        pixels = pixels_of(image)
        low, high = self.pixel_limits
        if self.grids == "bucket" and low != high:
            return image_inputs.prepare_in_buckets(pixels, high)
        fitted = image_inputs.fit_to_model(pixels, (low, high))
        return self._processor.prepare(fitted, min_pixels=low, max_pixels=high)

    def generate(
        self,
        images,
        prompts,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        n: int = 1,
        seed: int = 0,
        *,
        top_p: float | None = None,
        top_k: int | None = None,
        stream=None,
        constraint=None,
    ) -> list[list[Completion]]:
        """n completions for each (image, prompt). An image is encoded and a prompt computed once for all n.

        images: list of path | PIL image | [H, W] floats in 0..1 | None. prompts: one text for all, or a list of
        texts or conversations ([{"role", "content"}, ...], ending with the user; the image goes to the first user
        turn). A completion depends on its own image, prompt, settings, seed and number only, not on the others in
        the call. temperature 0 is greedy (top_p and top_k then change nothing). Log-probs are at the temperature,
        under constraint (see `sampling`), before top_p and top_k.
        constraint: None, "answers" (the completion ends with a valid answer list, see `answers`), or what `sampling`
        takes. stream: called with (prompt index, sample index, new text) every few tokens; the pieces of a completion
        add up to its text. Raises UserError for arguments out of range, an unusable image, a prompt that does not
        leave room for max_new_tokens, a max_new_tokens that is too small for any valid answer, or a model without a
        tokenizer; nothing is computed then.
        """
        settings = Settings(max_new_tokens, temperature, n, seed, top_p, top_k)
        images, prompts = _pairs(images, prompts)
        rules = self.constraint(constraint, settings.max_new_tokens)
        name = lambda i: "the prompt" if len(prompts) == 1 else f"prompt {i}"
        pairs = zip(images, prompts, strict=True)
        requests = [
            self._request(*pair, settings.max_new_tokens, name(i)) for i, pair in enumerate(pairs)
        ]
        return generation.complete(self, requests, settings, stream, rules)

    def _request(self, image, prompt, new_tokens: int, what: str = "the prompt") -> Request:
        patches, grid = self.prepare(image)
        request = Request(self.render(prompt, grid), patches, grid)
        generation.check_room(self.config, len(request.ids), new_tokens, what)
        return request

    def read(
        self,
        image,
        prompt,
        samples: int = 8,
        max_new_tokens: int = 512,
        seed: int = 0,
        *,
        constraint=None,
        probabilities: bool = True,
    ) -> Reading:
        """One image read greedily, `samples` completions at temperature 1, and the probability of each finding.

        The image is encoded and the prompt computed once for all of it. shown and samples are what `generate` gives
        for temperature 0 and 1; constraint, as there, is for what is shown only. probabilities: the mean over the
        samples' traces (without samples: after the trace shown) of the probability that the answer names each of the
        14 labels, see `finding_probabilities`; False leaves them out. Errors as for `generate`, and those of
        `answers` if there are to be probabilities.
        """
        greedy = Settings(max_new_tokens, seed=seed)
        drawn = None if samples == 0 else Settings(max_new_tokens, 1.0, samples, seed)
        rules = self.constraint(constraint, greedy.max_new_tokens)
        answers = self.answers if probabilities else None
        request = self._request(image, prompt, greedy.max_new_tokens)
        return generation.read(self, request, greedy, drawn, rules, answers)

    def finding_probabilities(
        self, image, prompt, completions: list[Completion], seed: int = 0
    ) -> dict:
        """The model's own probability that the answer names each label, after the trace of each completion.

        Of a completion (of `generate` for this image and prompt) only the trace counts: what precedes the answer
        list. All valid answers after it are weighed at temperature 1 (`answer_tree.probabilities_after`); seed
        matters where they are too many. Returns {"each": [{label: probability}], "mean": {label: probability},
        "exact_mass": [the error of each is at most 1 minus this]}. A probability is what the model would say, and no
        calibrated risk. Raises UserError as `generate` and `answers` do, and without completions.
        """
        Settings(1, seed=seed)
        if not isinstance(completions, (list, tuple)) or not all(
            isinstance(c, Completion) for c in completions
        ):
            raise UserError(
                "finding_probabilities needs a list of completions, as generate gives them"
            )
        if not completions:
            raise UserError("finding_probabilities needs at least one completion")
        answers, longest = self.answers, max(len(c.token_ids) for c in completions)
        prefix = generation.prefix_of(self, self._request(image, prompt, longest))
        layers = sampling.decode_layers(self.params, self.config)
        found = [
            generation.after(
                self, layers, prefix, completions[i : i + self.rows], answers, seed, first=i
            )
            for i in range(0, len(completions), self.rows)
        ]
        trace, exact = (
            np.concatenate([f[name][0] for f in found]) for name in ("trace", "exact_mass")
        )
        return {
            "each": [generation.by_label(row) for row in trace],
            "mean": generation.by_label(trace.mean(0)),
            "exact_mass": exact.tolist(),
        }

    def chat(self, image=None, system: str | None = None) -> chats.Chat:
        """A conversation about an image (as for `generate`, or None); system replaces the template's own prompt."""
        return chats.Chat(self, image, system)


def _pairs(images, prompts) -> tuple[list, list]:
    """Images and prompts as two lists of one length >= 1."""
    try:
        if isinstance(images, (str, bytes, os.PathLike)) or getattr(images, "ndim", 3) == 2:
            raise TypeError
        images = list(images)
    except TypeError:
        raise UserError(
            "images must be a list, one for each prompt (None where there is none)"
        ) from None
    if isinstance(prompts, str):
        prompts = [prompts] * len(images)
    elif isinstance(prompts, (list, tuple)):
        prompts = list(prompts)
    else:
        raise UserError("prompts must be a text or a list of texts or conversations")
    if not images or not prompts:
        raise UserError("nothing to read: images and prompts must not be empty")
    if len(prompts) != len(images):
        raise UserError(f"{len(images)} images but {len(prompts)} prompts")
    return images, prompts


def _check_ids(ids: np.ndarray, mask: np.ndarray, model_config: Config) -> None:
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise UserError(
            f"input_ids {list(ids.shape)} and mask {list(mask.shape)} must both be [B, T]"
        )
    if not ids.size or ids.dtype.kind not in "iu":
        raise UserError(
            f"input_ids must be whole numbers, at least one, not {ids.dtype} {list(ids.shape)}"
        )
    if ids.min() < 0 or ids.max() >= model_config.text.vocab_size:
        raise UserError(f"input_ids must lie in 0..{model_config.text.vocab_size - 1}")
    if (np.diff(mask.astype(np.int8), axis=1) > 0).any():
        raise UserError("attention_mask must be right padding: ones, then zeros")


def _to_device(tree: dict) -> dict:
    """A tree of host arrays, which is emptied on the way: at no time are there two copies of more than one leaf."""
    return {
        name: _to_device(x) if isinstance(x, dict) else jnp.asarray(x)
        for name in list(tree)
        for x in [tree.pop(name)]
    }


def _layers_apart(stacked: dict, n: int) -> list[dict]:
    """`_to_device` of stacked layers, as a list of n trees.

    Decoding needs layers apart, and a CPU reads stacked ones at a fraction of its memory's speed. An accelerator keeps
    both; here a second copy of a 3B model would not fit 24 GB, and one serves prompts and decoding alike.
    """
    layers: list[dict] = [{} for _ in range(n)]
    for name in list(stacked):
        x = stacked.pop(name)
        parts = _layers_apart(x, n) if isinstance(x, dict) else [jnp.array(x[i]) for i in range(n)]
        for layer, part in zip(layers, parts, strict=True):
            layer[name] = part
    return layers


def load(name: str | os.PathLike, dtype=None, grids: str = "exact", adapter=None) -> Model:
    """See `cxr_jax.load`."""
    if not all(isinstance(x, (str, os.PathLike)) for x in (name, adapter or "")):
        raise UserError(
            f"a model or an adapter must be a name or a folder, not {name!r}, {adapter!r}"
        )
    folder = find_folder(name)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        known = jnp.issubdtype(np.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise UserError(f"dtype={dtype!r}: use float32, bfloat16 or float16")
    read = native_folder.load if native_folder.is_native(folder) else hf_folder.load_hf
    found = (
        None
        if adapter is None
        else peft_folder.load(
            adapter,
            native_folder.Arrays(folder).config
            if native_folder.is_native(folder)
            else hf_folder.read_config(folder),
        )
    )
    model_config, params = read(folder, np.dtype(dtype))
    if found:
        peft_folder.merge(params, *found)
    layers, n = params["text"].pop("layers"), model_config.text.num_hidden_layers
    params = _to_device(params)
    deep = jax.default_backend() == "cpu" and n > UNROLL_UP_TO
    params["text"]["layers"] = _layers_apart(layers, n) if deep else _to_device(layers)
    return Model(model_config, params, folder=folder, dtype=dtype, grids=grids)
