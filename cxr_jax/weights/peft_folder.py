"""Adapters in the folder format of PEFT (adapter_config.json, adapter_model.safetensors), without torch.

`save` writes what `peft.PeftModel.from_pretrained` and vLLM load, under the module names of transformers 4.52 and
later. `load` also reads those of older versions. Names come from the weights' table in `hf.py`.
"""

import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from cxr_jax.errors import UserError, shown
from cxr_jax.models import registry
from cxr_jax.models.family import TensorRule
from cxr_jax.models.layers import merge_adapters
from cxr_jax.models.lora import PATHS, TARGETS, Lora
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.models.qwen2_5_vl.config import Config
from cxr_jax.runtime import trees, whole_files
from cxr_jax.weights import hf_folder
from cxr_jax.weights.safetensors_file import NAMES, Tensors, write_safetensors

__all__ = ["load", "merge", "save"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALVES = (("a", "lora_A"), ("b", "lora_B"))

# Settings without an effect on what a trained adapter computes. All that is neither here nor in `_READ` must be off.
_NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "bias",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}
_PLAIN_INIT = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # the others change the base model's weights


def _modules(model_config: Config) -> dict[str, TensorRule]:
    """Every weight that PEFT could adapt: module name in the published layout -> its rule."""
    return {
        r.key.removesuffix(".weight"): r
        for r in registry.family_of(model_config).tensor_rules(model_config)
        if len(r.shape) > 1
    }


def _path(rule: TensorRule) -> str:
    return "/".join(rule.path[:-1])


def _nested(name: str) -> str:
    """A module's name in the published layout -> that of transformers 4.52 and later."""
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.", "model.language_model.", name)


def merge(params: dict, adapters: dict, lora: Lora) -> None:
    """Add adapters to the kernels of host parameters, in place and one module after the other; types are kept.

    Raises UserError if a kernel is not finite with them.
    """
    for path in lora.paths:
        module, own = params, adapters
        for name in path.split("/"):
            module, own = module[name], own[name]
        with np.errstate(over="ignore"):  # looked at below
            scaled = own["a"] * np.float32(lora.scale)
        joined = {"kernel": module["kernel"], "lora_a": scaled, "lora_b": own["b"]}
        module["kernel"] = np.asarray(merge_adapters(joined)["kernel"])
        if not hf_folder.is_finite(module["kernel"]):
            raise UserError(
                f"the adapters do not fit this model: {path} is infinite or NaN with them"
            )


# --- writing -------------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike, model_config: Config, adapters: dict, lora: Lora, base_model: str
) -> None:
    """Write a PEFT folder. base_model: name or folder of the model that the adapters belong to.

    Tensors keep the adapters' type. The folder appears whole or not at all; an existing one is replaced only after
    the new one is complete. Raises ValueError if the adapters are not those of `lora`.
    """
    leaves = {"/".join(path): np.asarray(x) for path, x in trees.flatten(adapters)}
    if leaves.keys() != {f"{path}/{half}" for path in lora.paths for half in "ab"}:
        raise ValueError(f"adapters are not those of {lora}")
    rules = {name: r for name, r in _modules(model_config).items() if _path(r) in lora.paths}
    with whole_files.atomic_folder(Path(folder)) as temp:
        whole_files.write_json(temp / CONFIG, _settings(rules, lora, base_model))
        write_safetensors(temp / WEIGHTS, list(_entries(rules, lora, leaves)))


def _entries(rules: dict[str, TensorRule], lora: Lora, leaves: dict[str, np.ndarray]):
    for name, rule in rules.items():
        for (half, theirs), shape in zip(_HALVES, _shapes(rule, lora.rank), strict=True):
            x = leaves[f"{_path(rule)}/{half}"]
            x = x if rule.layer is None else x[rule.layer]
            yield f"{_PREFIX}{_nested(name)}.{theirs}.weight", shape, x.dtype, lambda x=x: x.T


def _shapes(rule: TensorRule, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of lora_A and lora_B, as torch keeps them."""
    out, into = rule.shape
    return (rank, into), (out, rank)


def _settings(rules: dict[str, TensorRule], lora: Lora, base_model: str) -> dict:
    """adapter_config.json. Both parts of the model have modules of one suffix, so targets are a full pattern."""
    patterns = []
    for name, rule in rules.items():
        pattern = re.escape(_nested(name))
        patterns.append(
            pattern if rule.layer is None else pattern.replace(rf"\.{rule.layer}\.", r"\.\d+\.", 1)
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": "|".join(dict.fromkeys(patterns)),
        "exclude_modules": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


# --- reading -------------------------------------------------------------------------------------------


class _Adapter(Tensors):
    """The tensors of a PEFT folder, by module name in the published layout; `nested`: the file has the newer names."""

    def __init__(self, folder: Path):
        self.nested = False
        super().__init__(folder, self._canonical)

    def _canonical(self, key: str) -> str:
        if not key.startswith(_PREFIX):
            raise UserError(f"{self.folder}: tensor {shown(key)} does not begin with {_PREFIX}")
        name = key.removeprefix(_PREFIX)
        found = hf_table.canonical_key(name)
        self.nested |= found != name
        return found

    def _files(self):
        path = self.folder / WEIGHTS
        if not path.is_file():
            pickle = path.with_suffix(".bin")
            raise UserError(
                f"{self.folder}: {pickle.name} is a pickle file, which can run code when it is read; "
                "only safetensors are read"
                if pickle.is_file()
                else f"{path} is missing"
            )
        return [(path, None)]


def load(folder: str | os.PathLike, model_config: Config) -> tuple[dict, Lora]:
    """(adapters as numpy arrays, float32; their Lora) of a PEFT folder made for a model of this config.

    A module that PEFT adapted in some layers only gets zeros in the others. That is exact: they add nothing, and
    since a and b are both zero they have no gradient, so that training goes on with PEFT's layers only.
    rsLoRA's scale, alpha / sqrt(r), comes back as an alpha larger by sqrt(r).

    Raises UserError, naming the setting or the tensors, for settings that change what an adapter computes (DoRA,
    ranks by pattern, trained biases, ...), for modules outside lora.TARGETS, and unless the tensors are exactly
    those that the settings ask for, finite and of their shapes.
    """
    folder = Path(folder)
    settings = _read_settings(folder / CONFIG)
    tensors, modules = _Adapter(folder), _modules(model_config)
    spelled = lambda name: _nested(name) if tensors.nested else name
    try:
        chosen = {
            name: r for name, r in modules.items() if _is_target(settings, spelled(name), r.layer)
        }
    except (re.error, OverflowError, RecursionError) as e:
        raise UserError(
            f"{folder / CONFIG}: a pattern is not a regular expression: {shown(e)}"
        ) from e
    if outside := [name for name, r in chosen.items() if _path(r) not in PATHS]:
        raise UserError(
            f"{folder / CONFIG}: {outside[0]} cannot carry an adapter here (lora.TARGETS lists what can)"
        )
    if not chosen:
        raise UserError(f"{folder / CONFIG}: target_modules match no module of the model")
    lora = _lora(folder / CONFIG, settings, {_path(r) for r in chosen.values()})
    want = {
        f"{name}.{theirs}.weight": shape
        for name, r in chosen.items()
        for (_, theirs), shape in zip(_HALVES, _shapes(r, lora.rank), strict=True)
    }
    _check(folder, tensors, want)
    adapters = _read(folder, tensors, modules, chosen, lora.rank)
    if settings.get("use_rslora"):
        lora = replace(lora, alpha=lora.alpha * math.sqrt(lora.rank))
    return adapters, lora


def _read_settings(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path.parent}: no {path.name}; not a PEFT folder")
    d = hf_folder.read_json(path)
    if d.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {shown(d.get('peft_type'))}, not LORA")
    if d.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {shown(d['bias'])}; trained biases are not supported")
    if d.get("init_lora_weights") not in _PLAIN_INIT:
        raise UserError(
            f"{path}: init_lora_weights {shown(d['init_lora_weights'])} changes the base model's weights; "
            "not supported"
        )
    for key in sorted(d.keys() - _NO_EFFECT - _READ):
        if d[key]:
            raise UserError(f"{path}: {shown(key)} is not supported")
    _check_types(path, d)
    return d


def _check_types(path: Path, d: dict) -> None:
    texts = lambda x: isinstance(x, list) and all(isinstance(s, str) for s in x)
    layers = d.get("layers_to_transform")
    good = {
        "target_modules": isinstance(d.get("target_modules"), str)
        or texts(d.get("target_modules")),
        "use_rslora": d.get("use_rslora") in (None, True, False),
        **{
            key: d.get(key) is None or isinstance(d[key], str) or texts(d[key])
            for key in ("exclude_modules", "layers_pattern")
        },
        "layers_to_transform": layers is None or all(type(i) is int for i in _listed(layers)),
    }
    for key, ok in good.items():
        if not ok:
            raise UserError(f"{path}: {key} is not of its type: {shown(d.get(key))}")


def _listed(x) -> list:
    return x if isinstance(x, list) else [] if x is None else [x]


def _is_target(settings: dict, name: str, layer: int | None) -> bool:
    """Whether PEFT adapts the module: a text is a pattern for the whole name, a list holds names or their ends."""

    def named(targets: str | list[str]) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(name == t or name.endswith(f".{t}") for t in targets)

    targets, excluded = settings["target_modules"], settings.get("exclude_modules")
    if (excluded and named(excluded)) or not named(targets):
        return False
    layers = _listed(settings.get("layers_to_transform"))
    if isinstance(targets, str) or not layers:
        return True
    parents = _listed(settings.get("layers_pattern") or None)
    inside = not parents or any(re.match(rf"(?:^|.*?\.){p}\.\d+\.", name) for p in parents)
    return inside and layer in layers


def _lora(path: Path, settings: dict, found: set[str]) -> Lora:
    """Groups where all their modules are adapted, else single paths; without rsLoRA's scale."""
    targets: list[str] = []
    for group, paths in TARGETS.items():
        targets += [group] if found.issuperset(paths) else [p for p in paths if p in found]
    try:
        return Lora(settings.get("r"), settings.get("lora_alpha"), tuple(targets))
    except UserError as e:
        raise UserError(f"{path}: {shown(e)}") from e


def _check(folder: Path, tensors: Tensors, want: dict[str, tuple[int, ...]]) -> None:
    have = set(tensors.where)
    some = lambda keys: (
        ", ".join(map(shown, keys[:4])) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    )
    for title, keys in (
        ("missing", sorted(want.keys() - have)),
        ("unexpected", sorted(have - want.keys())),
    ):
        if keys:
            raise UserError(f"{folder}: {WEIGHTS} does not fit {CONFIG}; {title}: {some(keys)}")
    for key, shape in want.items():
        if tensors.shape(key) != shape:
            raise UserError(
                f"{folder}: {key} is {list(tensors.shape(key))}; model and rank need {list(shape)}"
            )
        if tensors.dtype(key) not in hf_folder.WEIGHT_TYPES:
            raise UserError(
                f"{folder}: {key} is {NAMES[tensors.dtype(key)]}; adapters are F32, BF16 or F16"
            )


def _read(
    folder: Path,
    tensors: Tensors,
    modules: dict[str, TensorRule],
    chosen: dict[str, TensorRule],
    rank: int,
) -> dict:
    adapters: dict = {}
    for name, rule in chosen.items():
        node = adapters
        for part in rule.path[:-1]:
            node = node.setdefault(part, {})
        if not node:
            stack = (
                () if rule.layer is None else (sum(r.path == rule.path for r in modules.values()),)
            )
            for (half, _), shape in zip(_HALVES, _shapes(rule, rank), strict=True):
                node[half] = np.zeros((*stack, *shape[::-1]), np.float32)
        for half, theirs in _HALVES:
            raw = tensors[key := f"{name}.{theirs}.weight"]
            if not hf_folder.is_finite(raw):
                raise UserError(f"{folder}: {key} holds NaN or infinity")
            node[half][... if rule.layer is None else rule.layer] = raw.T
    return adapters
