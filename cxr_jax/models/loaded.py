"""A model ready to read with: what `cxr_jax.load` returns."""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax import generation
from cxr_jax.errors import UserError
from cxr_jax.generation import Completion, Request, Settings
from cxr_jax.models import chat as chats
from cxr_jax.models import hf, native, qwen2_5_vl
from cxr_jax.models.config import Config
from cxr_jax.models.safetensors_file import PICKLES


@functools.partial(jax.jit, static_argnames=("cfg", "grid", "dtype"))
def _vision(params, cfg, pixels, grid, dtype):
    return qwen2_5_vl.vision(params, cfg, pixels, grid, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _logits(params, cfg, input_ids, mask, positions, features, dtype):
    hidden = qwen2_5_vl.hidden_states(params, cfg, input_ids, mask, positions, features=features, dtype=dtype)
    return qwen2_5_vl.unembed(params, cfg, hidden)


class Model:
    """Config, parameters (nested dict) and, on first use, the tokenizer of a model folder.

    rows: completions decoded at once, see `generation.rows_at_once`. More go in turns; raise it to read many prompts
    faster (another number rounds differently: log-probs change by some 1e-6).
    """

    def __init__(self, cfg: Config, params: dict, *, folder=None, dtype=jnp.float32):
        self.cfg, self.dtype, self.folder = cfg, jnp.dtype(dtype), None if folder is None else Path(folder)
        self.params = jax.tree.map(lambda x: jnp.asarray(x, self.dtype), params)
        self.rows = generation.rows_at_once()

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer. Raises UserError if it has none."""
        if self.folder is None:
            raise UserError("the model has no tokenizer, so it cannot take or give text")
        from cxr_jax.data import tokenizer

        return tokenizer.load(str(self.folder))

    @functools.cached_property
    def special(self) -> dict:
        """Ids that end an answer ("stop") and ids that are never drawn ("suppress"): media tokens, and those
        without a text (embedding tables are padded beyond the tokenizer)."""
        from cxr_jax.data import tokenizer

        ids = tokenizer.special_ids(self.tokenizer, self.cfg.text.vocab_size)
        return {"stop": ids["stop"], "suppress": tuple(sorted({*ids["suppress"], *self.cfg.media_token_ids}))}

    @functools.cached_property
    def pixel_limits(self) -> tuple[int, int]:
        """(min_pixels, max_pixels) of the folder's preprocessor settings, or the processor's defaults."""
        path = None if self.folder is None else self.folder / "preprocessor_config.json"
        d = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        size = d.get("size") or {}
        return (int(d.get("min_pixels") or size.get("shortest_edge") or 3136),
                int(d.get("max_pixels") or size.get("longest_edge") or 12845056))

    def image_features(self, pixel_values, image_grid_thw) -> list:
        """Image tokens [t*h*w/4, D] of each image; images of one grid run together.

        pixel_values: [sum of t*h*w, patch_dim], all images' patches; image_grid_thw: int [n, 3].
        """
        grids = [tuple(int(x) for x in g) for g in np.asarray(image_grid_thw).reshape(-1, 3)]
        sizes = [int(np.prod(g)) for g in grids]
        pixels = np.asarray(pixel_values)
        if pixels.shape != (sum(sizes), self.cfg.vision.patch_dim):
            raise UserError(f"pixel_values has shape {list(pixels.shape)}, image_grid_thw needs "
                            f"{[sum(sizes), self.cfg.vision.patch_dim]}")
        parts = np.split(pixels, np.cumsum(sizes)[:-1])
        out: list = [None] * len(grids)
        for grid in dict.fromkeys(grids):
            which = [i for i, g in enumerate(grids) if g == grid]
            found = _vision(self.params, self.cfg, np.stack([parts[i] for i in which]), grid, self.dtype)
            for i, f in zip(which, np.asarray(found), strict=True):  # eager slices would each compile
                out[i] = f
        return out

    def _place(self, input_ids, features: list):
        """[B, I, D]: each row's image tokens in reading order, or None if there are none."""
        if not features:
            return None
        counts = (input_ids == self.cfg.image_token_id).sum(1)
        joined = np.concatenate(features)
        if counts.sum() != len(joined):
            raise UserError(f"input_ids has {counts.sum()} image tokens, the images give {len(joined)}")
        first = np.cumsum(counts) - counts
        index = np.minimum(first[:, None] + np.arange(max(1, counts.max())), len(joined) - 1)
        return joined[index]

    def logits(self, input_ids, pixel_values=None, image_grid_thw=None, attention_mask=None) -> np.ndarray:
        """Next-token logits float32 [B, T, V] from the arrays that a Hugging Face processor gives.

        input_ids int [B, T]; pixel_values [patches, patch_dim] and image_grid_thw int [n, 3] for all images
        in reading order, or None; attention_mask [B, T], 0 at right padding. Raises UserError when they
        disagree.
        """
        ids = np.asarray(input_ids)
        mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
        grids = None if image_grid_thw is None or not len(image_grid_thw) else np.asarray(image_grid_thw)
        _check_ids(ids, mask, self.cfg)
        positions = qwen2_5_vl.positions(self.cfg, ids, grids, mask)
        features = [] if grids is None else self.image_features(pixel_values, grids)
        placed = self._place(np.where(mask, ids, self.cfg.pad_token_id), features)
        return np.asarray(_logits(self.params, self.cfg, ids, mask, positions, placed, self.dtype))

    def render(self, prompt, grid: tuple[int, int, int] | None) -> list[int]:
        """Token ids of one user turn (or a conversation), with the image (if any) before the first user's text."""
        return chats.render(self.tokenizer, self.cfg, prompt, grid)

    def prepare(self, image):
        """An image (path, PIL image, or [H, W] floats in 0..1) -> (patches, grid); (None, None) for None."""
        if image is None:
            return None, None
        from cxr_jax.data import preprocess

        low, high = self.pixel_limits
        pixels = preprocess.fit_to_model(_pixels(image), (low, high))
        return preprocess.prepare(pixels, min_pixels=low, max_pixels=high)

    def generate(self, images, prompts, max_new_tokens: int = 512, temperature: float = 0.0, n: int = 1,
                 seed: int = 0, *, top_p: float | None = None, top_k: int | None = None, stream=None,
                 constraint=None) -> list[list[Completion]]:
        """n completions for each (image, prompt). An image is encoded and a prompt computed once for all n.

        images: list of path | PIL image | [H, W] floats in 0..1 | None. prompts: one text for all, or a list of
        texts or conversations ([{"role", "content"}, ...], ending with the user; the image goes to the first user
        turn). A completion depends on its own image, prompt, settings, seed and number only, not on the others in
        the call. temperature 0 is greedy (top_p and top_k then change nothing). Log-probs are at the temperature,
        under constraint (see `sampling`), before top_p and top_k.
        stream: called with (prompt index, sample index, new text) every few tokens; the pieces of a completion add
        up to its text. Raises UserError for arguments out of range, an unusable image, a prompt that does not leave
        room for max_new_tokens, or a model without a tokenizer; nothing is computed then.
        """
        settings = Settings(max_new_tokens, temperature, n, seed, top_p, top_k)
        images, prompts = _pairs(images, prompts)
        requests = []
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            patches, grid = self.prepare(image)
            requests.append(Request(self.render(prompt, grid), patches, grid))
            what = "the prompt" if len(prompts) == 1 else f"prompt {i}"
            generation.check_room(self.cfg, len(requests[-1].ids), settings.max_new_tokens, what)
        return generation.complete(self, requests, settings, stream, constraint)

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
        raise UserError("images must be a list, one for each prompt (None where there is none)") from None
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


def _check_ids(ids: np.ndarray, mask: np.ndarray, cfg: Config) -> None:
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise UserError(f"input_ids {list(ids.shape)} and mask {list(mask.shape)} must both be [B, T]")
    if ids.size and (ids.min() < 0 or ids.max() >= cfg.text.vocab_size):
        raise UserError(f"input_ids must lie in 0..{cfg.text.vocab_size - 1}")
    if (np.diff(mask.astype(np.int8), axis=1) > 0).any():
        raise UserError("attention_mask must be right padding: ones, then zeros")


def _pixels(image) -> np.ndarray:
    """Any accepted image -> float32 [H, W] in 0..1."""
    if isinstance(image, (str, os.PathLike)):
        from cxr_jax.data import images

        return images.read_image(image).pixels
    if hasattr(image, "convert"):
        return np.asarray(image.convert("L"), np.float32) / 255
    pixels = np.asarray(image, np.float32)
    if pixels.ndim != 2 or not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
        raise UserError(f"an image array must be [H, W] with values in 0..1, got shape {list(pixels.shape)}")
    return pixels


def find_folder(name: str | os.PathLike) -> Path:
    """The model folder behind a name: "phantom", a Hugging Face folder, a checkpoint of `cxr_jax.convert`, or a
    run's workdir (its `hf/`). Raises UserError when there is none."""
    if str(name) == "phantom":
        folder = Path(__file__).parent.parent / "assets" / "phantom"
        if not (folder / "config.json").is_file():
            raise UserError("the embedded model 'phantom' is missing from this installation")
        return folder
    if not Path(name).is_dir():
        raise UserError(f"{name}: no model there: not a folder")
    for folder in (Path(name), Path(name) / "hf"):
        if (folder / "config.json").is_file() and (native.is_native(folder) or any(folder.glob("*.safetensors*"))):
            return folder
    if any(f for p in PICKLES for f in Path(name).glob(p)):
        raise UserError(f"{name}: its weights are pickle files, which can run code when they are read; "
                        "only safetensors are read")
    raise UserError(f"{name}: no model there (config.json and *.safetensors, or a run with hf/)")


def load(name: str | os.PathLike, dtype=None) -> Model:
    """See `cxr_jax.load`."""
    folder = find_folder(name)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    read = native.load if native.is_native(folder) else hf.load_hf
    cfg, params = read(folder, np.dtype(dtype))
    return Model(cfg, params, folder=folder, dtype=dtype)
