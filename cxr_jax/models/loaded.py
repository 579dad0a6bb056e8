"""A model ready to read with: what `cxr_jax.load` returns."""

import functools
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax import sampling
from cxr_jax.errors import UserError
from cxr_jax.models import hf, native, qwen2_5_vl
from cxr_jax.models.config import Config
from cxr_jax.models.safetensors_file import PICKLES

ROWS = 64  # completions in flight; more prompts are read in turns
BUCKET = 64  # prompt lengths are padded to a multiple, so that few programs are compiled


@dataclass(frozen=True)
class Completion:
    """One generated answer. token_ids and logprobs include the stop token; text does not show it."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" or "length"


@functools.partial(jax.jit, static_argnames=("cfg", "grid", "dtype"))
def _vision(params, cfg, pixels, grid, dtype):
    return qwen2_5_vl.vision(params, cfg, pixels, grid, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _logits(params, cfg, input_ids, mask, positions, features, dtype):
    hidden = qwen2_5_vl.hidden_states(params, cfg, input_ids, mask, positions, features=features, dtype=dtype)
    return qwen2_5_vl.unembed(params, cfg, hidden)


class Model:
    """Config, parameters (nested dict) and, on first use, the tokenizer of a model folder."""

    def __init__(self, cfg: Config, params: dict, *, folder=None, dtype=jnp.float32):
        self.cfg, self.dtype, self.folder = cfg, jnp.dtype(dtype), None if folder is None else Path(folder)
        self.params = jax.tree.map(lambda x: jnp.asarray(x, self.dtype), params)

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer. Raises UserError if it has none."""
        if self.folder is None:
            raise UserError("the model has no tokenizer, so it cannot take or give text")
        from cxr_jax.data import tokenizer

        return tokenizer.load(str(self.folder))

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

    def render(self, prompt: str, grid: tuple[int, int, int] | None) -> list[int]:
        """Token ids of one user turn, with the image (if any) before the text."""
        from cxr_jax.data import tokenizer

        n = 0 if grid is None else int(np.prod(grid)) // self.cfg.vision.merge_unit
        ids = list(tokenizer.prompt_ids(self.tokenizer, prompt, n))
        if ids.count(self.cfg.image_token_id) != n:
            raise UserError("a prompt must not hold image placeholders of its own")
        return ids

    def prepare(self, image):
        """An image (path, PIL image, or [H, W] floats in 0..1) -> (patches, grid); (None, None) for None."""
        if image is None:
            return None, None
        from cxr_jax.data import preprocess

        low, high = self.pixel_limits
        pixels = preprocess.fit_to_model(_pixels(image), (low, high))
        return preprocess.prepare(pixels, min_pixels=low, max_pixels=high)

    def generate(self, images, prompts, max_new_tokens: int = 512, temperature: float = 0.0, n: int = 1,
                 seed: int = 0, **options) -> list[list[Completion]]:
        """n completions for each (image, prompt).

        images: list of path | PIL image | [H, W] floats in 0..1 | None; prompts: list, or one text for all.
        A completion depends on its own image, prompt, seed and number only, not on the others in the call.
        options: top_k, top_p. Raises UserError for an unusable image or a model without a tokenizer.
        """
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(images):
            raise UserError(f"{len(images)} images but {len(prompts)} prompts")
        out, per_turn = [], max(1, ROWS // n)
        for i in range(0, len(prompts), per_turn):
            ready = [self.prepare(x) for x in images[i : i + per_turn]]
            ids = [self.render(p, g) for p, (_, g) in zip(prompts[i : i + per_turn], ready, strict=True)]
            out += self._complete(ready, ids, max_new_tokens, temperature, n, seed, options)
        return out

    def _complete(self, ready, rows, max_new_tokens, temperature, n, seed, options):
        from cxr_jax.data import tokenizer

        cfg, lengths = self.cfg, np.array([len(r) for r in rows])
        T = -(-lengths.max() // BUCKET) * BUCKET
        ids = np.array([r + [cfg.pad_token_id] * (T - len(r)) for r in rows], np.int32)
        mask = np.arange(T) < lengths[:, None]
        with_image = [(p, g) for p, g in ready if p is not None]
        grids = np.array([g for _, g in with_image]) if with_image else None
        features = []
        if with_image:
            features = self.image_features(np.concatenate([p for p, _ in with_image]), grids)
        special = tokenizer.special_ids(self.tokenizer)
        # Embedding tables are padded beyond the tokenizer: such ids have no text.
        unused = range(len(self.tokenizer), cfg.text.vocab_size)
        marks = [_fingerprint(r, p) for r, (p, _) in zip(rows, ready, strict=True)]
        where, placed = qwen2_5_vl.positions(cfg, ids, grids, mask), self._place(ids, features)
        got = sampling.generate(
            self.params, cfg, ids, lengths, where, placed, n=n, max_new_tokens=max_new_tokens,
            temperature=temperature, keys=_keys(seed, marks, n), stop_ids=special["stop"],
            suppress_ids=(*special["suppress"], *unused), dtype=self.dtype, **options)
        got = {k: np.asarray(v) for k, v in got.items()}
        return [[self._completion(got, b * n + j) for j in range(n)] for b in range(len(rows))]

    def _completion(self, got: dict, row: int) -> Completion:
        length, stopped = int(got["lengths"][row]), bool(got["finished"][row])
        ids = got["tokens"][row, :length].tolist()
        shown = ids[:-1] if stopped else ids
        return Completion(self.tokenizer.decode(shown, skip_special_tokens=False), ids,
                          got["logprobs"][row, :length].tolist(), "stop" if stopped else "length")


def _fingerprint(ids: list[int], patches) -> int:
    """A number for the content of one prompt: equal prompts draw equal noise, wherever they stand."""
    image = b"" if patches is None else np.ascontiguousarray(patches, np.float32).tobytes()
    return zlib.crc32(np.asarray(ids, np.int32).tobytes(), zlib.crc32(image))


def _keys(seed: int, marks: list[int], n: int):
    """Typed keys [B * n] folded from (seed, content of the prompt, sample)."""
    fold = jax.random.fold_in
    one = lambda mark, j: fold(fold(jax.random.key(seed), mark), j)
    marks = jnp.asarray(np.array(marks, np.uint32))
    return jax.vmap(one)(jnp.repeat(marks, n), jnp.tile(jnp.arange(n), len(marks)))


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
