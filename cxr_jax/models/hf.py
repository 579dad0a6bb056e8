"""Qwen2.5-VL weights to and from Hugging Face folders, through one table, without torch.

Reads single-file and sharded safetensors, in the key layout of the published weights (`visual.*`,
`model.layers.*`) and in the nested one (`model.visual.*`, `model.language_model.*`). The mapping is a
bijection or an error: a missing, unexpected or mis-shaped tensor is never passed over.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.models.config import Config

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(v): k for k, v in DTYPES.items()}


# --- the table -----------------------------------------------------------------------------------------

# (our path, HF key, transform). "{}" in a key is a layer number: such parameters are stacked on axis 0.
# Transforms: "as is"; "t": torch keeps [out, in], we keep [in, out]; "conv": a 3-D patch convolution
# (out, c, t, h, w) that we keep as the product [c*t*h*w, out].
_VISION = (
    ("patch_embed/proj/kernel", "visual.patch_embed.proj.weight", "conv"),
    ("blocks/norm1/scale", "visual.blocks.{}.norm1.weight", "as is"),
    ("blocks/norm2/scale", "visual.blocks.{}.norm2.weight", "as is"),
    ("blocks/attn/qkv/kernel", "visual.blocks.{}.attn.qkv.weight", "t"),
    ("blocks/attn/qkv/bias", "visual.blocks.{}.attn.qkv.bias", "as is"),
    ("blocks/attn/proj/kernel", "visual.blocks.{}.attn.proj.weight", "t"),
    ("blocks/attn/proj/bias", "visual.blocks.{}.attn.proj.bias", "as is"),
    ("blocks/mlp/gate/kernel", "visual.blocks.{}.mlp.gate_proj.weight", "t"),
    ("blocks/mlp/gate/bias", "visual.blocks.{}.mlp.gate_proj.bias", "as is"),
    ("blocks/mlp/up/kernel", "visual.blocks.{}.mlp.up_proj.weight", "t"),
    ("blocks/mlp/up/bias", "visual.blocks.{}.mlp.up_proj.bias", "as is"),
    ("blocks/mlp/down/kernel", "visual.blocks.{}.mlp.down_proj.weight", "t"),
    ("blocks/mlp/down/bias", "visual.blocks.{}.mlp.down_proj.bias", "as is"),
    ("merger/norm/scale", "visual.merger.ln_q.weight", "as is"),
    ("merger/fc1/kernel", "visual.merger.mlp.0.weight", "t"),
    ("merger/fc1/bias", "visual.merger.mlp.0.bias", "as is"),
    ("merger/fc2/kernel", "visual.merger.mlp.2.weight", "t"),
    ("merger/fc2/bias", "visual.merger.mlp.2.bias", "as is"),
)
_TEXT = (
    ("embed/embedding", "model.embed_tokens.weight", "as is"),
    ("layers/norm1/scale", "model.layers.{}.input_layernorm.weight", "as is"),
    ("layers/norm2/scale", "model.layers.{}.post_attention_layernorm.weight", "as is"),
    ("layers/attn/q/kernel", "model.layers.{}.self_attn.q_proj.weight", "t"),
    ("layers/attn/q/bias", "model.layers.{}.self_attn.q_proj.bias", "as is"),
    ("layers/attn/k/kernel", "model.layers.{}.self_attn.k_proj.weight", "t"),
    ("layers/attn/k/bias", "model.layers.{}.self_attn.k_proj.bias", "as is"),
    ("layers/attn/v/kernel", "model.layers.{}.self_attn.v_proj.weight", "t"),
    ("layers/attn/v/bias", "model.layers.{}.self_attn.v_proj.bias", "as is"),
    ("layers/attn/o/kernel", "model.layers.{}.self_attn.o_proj.weight", "t"),
    ("layers/mlp/gate/kernel", "model.layers.{}.mlp.gate_proj.weight", "t"),
    ("layers/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight", "t"),
    ("layers/mlp/down/kernel", "model.layers.{}.mlp.down_proj.weight", "t"),
    ("final/norm/scale", "model.norm.weight", "as is"),
    ("head/kernel", "lm_head.weight", "t"),
)


@dataclass(frozen=True)
class Rule:
    """One HF tensor: its key, our path, its layer (None if not stacked), transform and HF shape."""

    key: str
    path: tuple[str, ...]
    layer: int | None
    transform: str
    shape: tuple[int, ...]

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        if self.transform == "conv":
            return x.reshape(x.shape[0], -1).T
        return x.T if self.transform == "t" else x

    def to_hf(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x if self.transform == "as is" else x.T).reshape(self.shape)


def our_shapes(cfg: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter of a config, from an abstract init: no array is made."""
    import jax

    from cxr_jax.models import qwen2_5_vl

    tree = jax.eval_shape(lambda k: qwen2_5_vl.init_params(cfg, k), jax.random.key(0))
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree)}


def flatten(tree: dict, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """(path, leaf) of a nested dict, in key order."""
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from flatten(tree[name], (*prefix, name))
        else:
            yield (*prefix, name), tree[name]


def rules(cfg: Config) -> list[Rule]:
    """Every tensor of a model folder, in file order. Raises KeyError if the table and the model disagree."""
    shapes = our_shapes(cfg)
    out, seen = [], set()
    for part, table in (("vision", _VISION), ("text", _TEXT)):
        for name, key, transform in table:
            path = (part, *name.split("/"))
            if path not in shapes and path[1] == "head" and cfg.tie_word_embeddings:
                continue
            shape = shapes[path]
            seen.add(path)
            layers = range(shape[0]) if "{}" in key else [None]
            own = shape[1:] if "{}" in key else shape
            for i in layers:
                out.append(Rule(key.format(i), path, i, transform, _hf_shape(cfg, own, transform)))
    if seen != set(shapes):
        raise KeyError(f"no rule for {sorted(set(shapes) - seen)}")
    return out


def _hf_shape(cfg: Config, own: tuple[int, ...], transform: str) -> tuple[int, ...]:
    v = cfg.vision
    if transform == "conv":
        return (v.hidden_size, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    return own[::-1] if transform == "t" else own


def canonical_key(key: str) -> str:
    """A key of either layout -> the key of the published layout."""
    for nested, flat in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if key.startswith(nested):
            return flat + key[len(nested) :]
    return key


# --- safetensors files ---------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict, int]:
    """(header, offset of the data) of a safetensors file, bounds checked. Raises UserError if damaged."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise UserError(f"{path}: not a safetensors file, or cut short")
        try:
            header = json.loads(f.read(length))
        except ValueError as e:
            raise UserError(f"{path}: damaged safetensors header") from e
    header.pop("__metadata__", None)
    for key, info in header.items():
        start, end = info["data_offsets"]
        dtype = DTYPES.get(info["dtype"])
        if dtype is None:
            raise UserError(f"{path}: tensor {key} has unsupported type {info['dtype']}")
        want = int(np.prod(info["shape"], dtype=np.int64)) * np.dtype(dtype).itemsize
        if not 0 <= start <= end <= size - 8 - length or end - start != want:
            raise UserError(f"{path}: tensor {key} lies outside the file: the file is cut short or damaged")
    return header, 8 + length


class Tensors:
    """All tensors of a model folder by canonical key; memory-mapped, read one at a time."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.where: dict[str, tuple[Path, int, dict]] = {}
        for path in self._files():
            header, base = read_header(path)
            for key, info in header.items():
                name = canonical_key(key)
                if name in self.where:
                    raise UserError(f"{self.folder}: tensor {name} occurs twice")
                self.where[name] = (path, base, info)

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as e:
                raise UserError(f"{index}: not a safetensors index") from e
            if any(Path(n).name != n for n in names):
                raise UserError(f"{index}: shard names must be plain file names")
            files = [self.folder / n for n in names]
        else:
            files = [self.folder / "model.safetensors"]
        for f in files:
            if not f.is_file():
                raise UserError(f"{self.folder}: {f.name} is missing")
        return files

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.where[key][2]["shape"])

    def __getitem__(self, key: str) -> np.ndarray:
        path, base, info = self.where[key]
        start, end = info["data_offsets"]
        if end == start:  # an empty file region cannot be mapped
            return np.zeros(info["shape"], DTYPES[info["dtype"]])
        raw = np.memmap(path, np.uint8, "r", base + start, (end - start,))
        return raw.view(DTYPES[info["dtype"]]).reshape(info["shape"])


def write_safetensors(path: Path, tensors: list[tuple[str, tuple[int, ...], np.dtype, Callable]]) -> None:
    """Write (key, shape, dtype, function returning the array) one tensor at a time: memory stays flat."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for key, shape, dtype, _ in tensors:
        end = at + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header[key] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _key, shape, dtype, make in tensors:
            x = np.ascontiguousarray(make(), dtype=dtype)
            assert x.shape == tuple(shape)
            f.write(x.tobytes())
        f.flush()
        os.fsync(f.fileno())


# --- folders -------------------------------------------------------------------------------------------


def read_config(folder: str | os.PathLike) -> Config:
    """The Config of a model folder. Raises UserError when it is absent, damaged or another architecture."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; not a Hugging Face model folder")
    try:
        d = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON") from e
    generation = Path(folder) / "generation_config.json"
    if generation.is_file():
        # The stop ids that generation uses live here in the published folders (config.json names only one).
        try:
            extra = json.loads(generation.read_text())
        except ValueError as e:
            raise UserError(f"{generation}: not valid JSON") from e
        d = {**d, **{k: extra[k] for k in ("eos_token_id", "pad_token_id") if extra.get(k) is not None}}
    return Config.from_hf(d)


def _check(folder, table: list[Rule], tensors: Tensors, tied: bool) -> None:
    want = {r.key: r.shape for r in table}
    have = set(tensors.where)
    if tied:
        have.discard("lm_head.weight")  # some writers store the tied head once more
    have = {k for k in have if not k.endswith("rotary_emb.inv_freq")}  # a buffer of old files, not a weight
    problems = []
    for title, keys in (("missing", sorted(set(want) - have)), ("unexpected", sorted(have - set(want)))):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"{title}: {', '.join(keys[:4])}{more}")
    wrong = [k for k in sorted(set(want) & have) if tensors.shape(k) != want[k]]
    if wrong:
        k = wrong[0]
        problems.append(f"wrong shape: {k} is {list(tensors.shape(k))}, config.json says {list(want[k])}"
                        + (f" ({len(wrong)} such)" if len(wrong) > 1 else ""))
    if problems:
        raise UserError(f"{folder}: weights do not fit config.json; " + "; ".join(problems))


def load_hf(folder: str | os.PathLike, dtype=None) -> tuple[Config, dict]:
    """(config, parameters as nested dict of numpy arrays) of a model folder.

    dtype: what the arrays are converted to; None keeps the file's. Raises UserError, naming the tensors,
    unless files and config fit exactly.
    """
    cfg = read_config(folder)
    table, tensors = rules(cfg), Tensors(folder)
    _check(folder, table, tensors, cfg.tie_word_embeddings)
    params: dict = {}
    shapes = our_shapes(cfg)
    for r in table:
        node = params
        for name in r.path[:-1]:
            node = node.setdefault(name, {})
        raw = tensors[r.key]
        if r.path[-1] not in node:
            node[r.path[-1]] = np.empty(shapes[r.path], dtype or raw.dtype)
        node[r.path[-1]][... if r.layer is None else r.layer] = r.to_ours(raw)
    return cfg, params


def hf_tensors(cfg: Config, params: dict, dtype=None):
    """(key, shape, dtype, function returning the array) for every tensor, for `write_safetensors`."""
    flat = dict(flatten(params))
    out = []
    for r in rules(cfg):
        leaf = flat[r.path]
        kind = np.dtype(dtype or leaf.dtype)
        make = lambda r=r, leaf=leaf, kind=kind: r.to_hf(
            np.asarray(leaf if r.layer is None else leaf[r.layer]).astype(kind))
        out.append((r.key, r.shape, kind, make))
    return out


def generation_config(cfg: Config) -> dict:
    return {"bos_token_id": cfg.bos_token_id, "eos_token_id": list(cfg.eos_token_id),
            "pad_token_id": cfg.pad_token_id, "do_sample": False}


def preprocessor_config(cfg: Config, min_pixels: int, max_pixels: int) -> dict:
    """The image arithmetic of Qwen2-VL (mean and standard deviation are CLIP's)."""
    v = cfg.vision
    return {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": min_pixels, "max_pixels": max_pixels, "patch_size": v.patch_size,
        "temporal_patch_size": v.temporal_patch_size, "merge_size": v.spatial_merge_size,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "rescale_factor": 1 / 255, "resample": 3,
    }  # fmt: skip


def save_hf(folder: str | os.PathLike, cfg: Config, params: dict, *, dtype=None, min_pixels: int = 3136,
            max_pixels: int = 12845056, tokenizer=None) -> None:
    """Write a model folder that transformers and vLLM load: config, generation and preprocessor settings,
    one model.safetensors; and the tokenizer, if given as an object or a folder.

    dtype: stored type (None: that of the arrays). The folder appears whole or not at all; an existing one is
    replaced only after the new one is complete.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        config = cfg.to_hf()
        config["torch_dtype"] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[
            NAMES[np.dtype(dtype or params["text"]["embed"]["embedding"].dtype)]]
        files = {"config.json": config, "generation_config.json": generation_config(cfg),
                 "preprocessor_config.json": preprocessor_config(cfg, min_pixels, max_pixels)}
        for name, d in files.items():
            (temp / name).write_text(json.dumps(d, indent=2) + "\n")
        if tokenizer is not None:
            _add_tokenizer(tokenizer, temp)
        write_safetensors(temp / "model.safetensors", hf_tensors(cfg, params, dtype))
        os.chmod(temp, 0o755)
        _swap(temp, folder)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json",
                   "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json")


def _add_tokenizer(source, dst: Path) -> None:
    """Copy the tokenizer files of a folder, or let a tokenizer object write its own."""
    if hasattr(source, "save_pretrained"):
        source.save_pretrained(str(dst))
        _name_tokenizer_class(dst / "tokenizer_config.json")
        return
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, dst / name)


def _name_tokenizer_class(path: Path) -> None:
    """transformers 5 writes a class name that transformers 4 and vLLM do not know; both read this one."""
    d = json.loads(path.read_text())
    if d.get("tokenizer_class") == "TokenizersBackend":
        d["tokenizer_class"] = "PreTrainedTokenizerFast"
        d = {k: v for k, v in d.items() if k not in ("backend", "is_local", "local_files_only")}
        path.write_text(json.dumps(d, indent=2) + "\n")


def _swap(temp: Path, folder: Path) -> None:
    """Put a complete folder in place; the old one steps aside first, so no moment mixes the two."""
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.rmdir(old)
        os.rename(folder, old)
    os.rename(temp, folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
