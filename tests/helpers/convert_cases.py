"""Small Hugging Face folders for tests/weights/test_convert.py, and ways to damage them: name -> (damage, message)."""

import json
import shutil

import golden_cases
import ml_dtypes
import numpy as np
from golden_cases import entries

from cxr_jax.models import registry
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.weights.safetensors_file import (
    INDEX,
    Tensors,
    read_header,
    write_folder,
    write_safetensors,
)

HEAD = "lm_head.weight"
LAYER = "model.layers.1.self_attn.q_proj.weight"
BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32


def nested(key):
    return (
        {"visual": "model.visual", "model": "model.language_model"}.get(key.split(".")[0])
        + key[key.index(".") :]
        if key != HEAD
        else key
    )


def make(
    folder,
    case="ragged",
    dtype=lambda key: F32,
    rename=lambda key: key,
    shard_gb=5.0,
    stored_head=False,
    head_alone=False,
):
    """A Hugging Face folder with unknown config keys and some side files."""
    c = golden_cases.case(case)
    canonical_key = registry.family_of_type(c["config"]["model_type"]).canonical_key
    arrays = {canonical_key(k): w.astype(dtype(k)) for k, w in c["weights"].items()}
    embed = next(key for key in arrays if "embed_tokens" in key)
    if stored_head:
        arrays[HEAD] = arrays[embed]
    if head_alone:
        arrays[HEAD] = arrays.pop(embed)
    folder.mkdir(parents=True)
    write_folder(folder, entries(arrays, rename), shard_gb)
    text = json.dumps(
        {**c["config"], "our_note": {"kept": [1, 2.5, None]}, "transformers_version": "4.56.1"},
        indent=3,
    )
    (folder / "config.json").write_text(text)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 1e-6}')
    (folder / "chat_template.json").write_text('{"chat_template": "x"}')
    (folder / "tokenizer.json").write_text("{}\n")
    (folder / "unrelated.py").write_text("raise SystemExit\n")
    return folder


def header_edit(change):
    """A corruption that edits the parsed header of model.safetensors and leaves its data."""

    def corrupt(folder):
        path = folder / "model.safetensors"
        header, base = read_header(path)
        data = path.read_bytes()[base:]
        header = change(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    return corrupt


def arrays_edit(change):
    """A corruption that rewrites all tensors after `change` to their dict."""

    def corrupt(folder):
        tensors = Tensors(folder, hf_table.canonical_key)
        arrays = {k: np.array(tensors[k]) for k in tensors.stored}
        change(arrays)
        write_safetensors(folder / "model.safetensors", entries(arrays))

    return corrupt


def bytes_edit(change, name="model.safetensors"):
    def corrupt(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return corrupt


def sharded(change):
    """A corruption of a sharded folder: `change(folder, index)`; a returned index is written."""

    def corrupt(folder):
        tensors = Tensors(folder, hf_table.canonical_key)
        arrays = {k: np.array(tensors[k]) for k in tensors.stored}
        (folder / "model.safetensors").unlink()
        write_folder(folder, entries(arrays), 1e-4)
        index = json.loads((folder / INDEX).read_text())
        change(folder, index)
        (folder / INDEX).write_text(json.dumps(index))

    return corrupt


def config_edit(**values):
    def corrupt(folder):
        d = json.loads((folder / "config.json").read_text())
        for key, value in values.items():
            part, _, name = key.rpartition("__")
            (d[part] if part else d)[name] = value
        (folder / "config.json").write_text(json.dumps(d))

    return corrupt


def link_loop(name):
    def corrupt(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return corrupt


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def poison(value, dtype=F32):
    def change(arrays):
        arrays.update({k: x.astype(dtype) for k, x in arrays.items()})
        arrays[LAYER][3, 5] = value

    return arrays_edit(change)


def swap_shard(folder, index):
    index["weight_map"][LAYER] = next(
        f for f in set(index["weight_map"].values()) if f != index["weight_map"][LAYER]
    )


def copy_tensor(
    folder, index
):  # the same tensor in a second shard, and the index says so only once
    shards = sorted(folder.glob("*.safetensors"))
    tensors = Tensors(folder)
    first = {
        k: np.array(tensors[k]) for k, name in index["weight_map"].items() if name == shards[0].name
    }
    write_safetensors(shards[0], entries({**first, LAYER: np.array(tensors[LAYER])}))


set_first = lambda **kw: header_edit(lambda h: h[LAYER].update(kw))
BAD = {
    "truncated data": (bytes_edit(lambda b: b[:-1]), "cut short"),
    "truncated header": (bytes_edit(lambda b: b[:200]), "cut short"),
    "empty file": (bytes_edit(lambda b: b""), "not a safetensors file"),
    "trailing bytes": (bytes_edit(lambda b: b + b"\0"), "longer than its header"),
    "header length huge": (bytes_edit(lambda b: b"\xff" * 8 + b[8:]), "not a safetensors file"),
    "header not JSON": (header_edit(lambda h: b"{nonsense"), "not valid JSON"),
    "header not UTF-8": (header_edit(lambda h: b"\xff\xfe{\0}\0"), "not valid JSON"),
    "header nested deeply": (header_edit(lambda h: b"[" * 100_000), "not valid JSON"),
    "header a list": (header_edit(lambda h: b"[1]"), "not a JSON object"),
    "header names a tensor twice": (header_edit(lambda h: b'{"a":{},"a":{}}'), "a occurs twice"),
    "entry not an object": (header_edit(lambda h: h.update({LAYER: 3})), "has no dtype"),
    "offsets missing": (
        header_edit(lambda h: h[LAYER].pop("data_offsets") and None),
        "no valid data_offsets",
    ),
    "offsets not ints": (set_first(data_offsets=[0.0, "x"]), "no valid data_offsets"),
    "offsets out of range": (set_first(data_offsets=[2**62, 2**62 + 64 * 64 * 4]), "hole"),
    "offsets overlap": (
        header_edit(
            lambda h: h[LAYER].update(
                data_offsets=h["model.layers.0.self_attn.q_proj.weight"]["data_offsets"]
            )
        ),
        "overlaps",
    ),
    "shape negative": (set_first(shape=[-64, -64]), "no valid shape"),
    "shape huge": (set_first(shape=[2**60, 2**60]), "no valid shape"),
    "shape times size overflows": (
        set_first(shape=[2**40, 2**40, 2**40]),
        "does not fit its data_offsets",
    ),
    "shape of bools": (set_first(shape=[True, 4096]), "no valid shape"),
    "type unknown": (set_first(dtype="F8_E4M3"), "unsupported type F8_E4M3"),
    "type no text": (set_first(dtype=["F32"]), "has no dtype"),
    "integer weights": (
        arrays_edit(lambda t: t.update({LAYER: t[LAYER].astype(np.int32)})),
        "weights are F32, BF16",
    ),
    "tensor missing": (arrays_edit(lambda t: t.pop(LAYER)), f"missing: {LAYER}"),
    "tensor unexpected": (
        arrays_edit(lambda t: t.update({"a\nb\x1b[2J": t[LAYER]})),
        r"unexpected: 'a\\nb\\x1b\[2J'",
    ),
    "tensor in both layouts": (
        arrays_edit(lambda t: t.update({nested(LAYER): t[LAYER]})),
        "occurs twice",
    ),
    "wrong shape": (
        arrays_edit(lambda t: t.update({LAYER: t[LAYER][:-1]})),
        f"wrong shape: {LAYER}",
    ),
    "NaN": (poison(np.nan), f"{LAYER} holds NaN"),
    "infinity in bfloat16": (poison(-np.inf, BF16), f"{LAYER} holds NaN or infinity"),
    "infinity in float16": (poison(np.inf, F16), f"{LAYER} holds NaN or infinity"),
    "shard missing": (
        sharded(lambda f, i: min(f.glob("*.safetensors")).unlink()),
        "model-00001-of-.* is missing",
    ),
    "index missing": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00001.safetensors"),
        "index.json is missing",
    ),
    "index not JSON": (sharded(lambda f, i: i.clear()), "no weight_map"),
    "index names a path outside": (
        sharded(lambda f, i: i["weight_map"].update({LAYER: "../src/model.safetensors"})),
        "must be plain file names",
    ),
    "index names no file": (
        sharded(lambda f, i: i["weight_map"].update({LAYER: 7})),
        "must be plain file names",
    ),
    "index lacks a tensor": (
        sharded(lambda f, i: i["weight_map"].pop(LAYER)),
        "is not in the index",
    ),
    "index has one too many": (
        sharded(lambda f, i: i["weight_map"].update(x=i["weight_map"][LAYER])),
        "is not in it",
    ),
    "index names the wrong shard": (sharded(swap_shard), "does not agree with"),
    "tensor in two shards": (sharded(copy_tensor), "is not in the index"),
    "index beside one file": (
        sharded(lambda f, i: shutil.copy(min(f.glob("*.safetensors")), f / "model.safetensors")),
        "holds both",
    ),
    "shard link loops": (link_loop("model.safetensors"), "broken link"),
    "config link loops": (link_loop("config.json"), "no model there"),
    "config missing": (lambda f: (f / "config.json").unlink(), "no model there"),
    "config not JSON": (bytes_edit(lambda b: b[:50], "config.json"), "config.json: not valid JSON"),
    "config a list": (bytes_edit(lambda b: b"[]", "config.json"), "config.json: not a JSON object"),
    "another architecture": (config_edit(model_type="llama"), "model_type 'llama'"),
    "config lacks a size": (config_edit(num_hidden_layers=None), "num_hidden_layers is missing"),
    "config without vision": (config_edit(vision_config=None), "vision_config is missing"),
    "config size no number": (config_edit(vocab_size="many"), "not of its type"),
    "config size no list": (config_edit(vision_config__fullatt_block_indexes=3), "not of its type"),
    "config size zero": (config_edit(num_attention_heads=0), "not of its type"),
    "config size negative": (config_edit(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "config size huge": (config_edit(vision_config__depth=10**12), "depth is 1000000000000"),
    "config of another size": (
        config_edit(vocab_size=161),
        r"wrong shape: lm_head.weight is \[160, .* \(2 such\)",
    ),
    "head differs though tied": (config_edit(tie_word_embeddings=True), "lm_head.weight differs"),
    "generation settings not JSON": (
        bytes_edit(lambda b: b"{", "generation_config.json"),
        "not valid JSON",
    ),
    "pickle": (pickle_only, "pickle file"),
}
