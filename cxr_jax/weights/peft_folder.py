"""Adapters in the folder format of PEFT (adapter_config.json, adapter_model.safetensors), without torch.

`save` writes what `peft.PeftModel.from_pretrained` and vLLM load, under the module names of transformers 4.52 and
later. `load` also reads those of older versions. Names come from the table of the model's family.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.errors import UserError, shown
from cxr_jax.models import registry
from cxr_jax.models.family import Family, TensorRule
from cxr_jax.models.layers import merge_adapters
from cxr_jax.models.lora import PATHS, TARGETS, Lora, modules_of
from cxr_jax.models.network.config import Config
from cxr_jax.runtime import trees, whole_files
from cxr_jax.runtime.trees import Tree
from cxr_jax.weights import hf_folder
from cxr_jax.weights.safetensors_file import NAMES, Tensors, TensorToWrite, write_safetensors

__all__ = ["load", "merge", "save"]

# Fixed by PEFT: `from_pretrained` looks for exactly these.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT wraps around the model stands before the name of every tensor.
_PREFIX = "base_model.model."
_HALVES = (("a", "lora_A"), ("b", "lora_B"))  # our name of each matrix, and PEFT's

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
# Ways to begin that leave the base model's weights as they are; the others change them.
_PLAIN_INIT = (None, True, False, "gaussian", "eva", "orthogonal")


def _modules(model_config: Config) -> dict[str, TensorRule]:
    """Every weight that PEFT could adapt: module name in the published layout -> its rule."""
    # Vectors (norms, biases) cannot be adapted; LoRA needs a matrix.
    return {
        tensor_rule.key.removesuffix(".weight"): tensor_rule
        for tensor_rule in registry.family_of(model_config).tensor_rules(model_config)
        if len(tensor_rule.shape) > 1
    }


def _module_path(tensor_rule: TensorRule) -> str:
    return "/".join(tensor_rule.path[:-1])


def _peft_shapes(
    tensor_rule: TensorRule, lora_rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of lora_A and lora_B, as torch keeps them."""
    # torch stores a linear layer as [out, in]; ours are [in, out], so a and b are transposed.
    out_features, in_features = tensor_rule.shape
    return (lora_rank, in_features), (out_features, lora_rank)


def merge(params: Tree, adapters: Tree, lora_settings: Lora) -> None:
    """Add adapters to the kernels of host parameters, in place and one module after the other; types are kept.

    Raises:
        UserError: if a kernel is not finite with them.
    """
    # One module at a time: beside the weights, memory holds a single merged kernel.
    for module_path in lora_settings.paths_in(modules_of(params)):
        module, adapter = params, adapters
        for part in module_path.split("/"):
            module, adapter = module[part], adapter[part]
        # Alpha from a file may overflow here, and the check below names the module, where a warning
        # would not.
        with np.errstate(over="ignore"):  # looked at below
            scaled = adapter["a"] * np.float32(lora_settings.scale)
        adapted = {"kernel": module["kernel"], "lora_a": scaled, "lora_b": adapter["b"]}
        module["kernel"] = np.asarray(merge_adapters(adapted)["kernel"])
        if not hf_folder.is_finite(module["kernel"]):
            raise UserError(
                f"the adapters do not fit this model: {module_path} is infinite or NaN with them"
            )


# ---- Writing ----


def save(
    folder: str | os.PathLike,
    model_config: Config,
    adapters: Tree,
    lora_settings: Lora,
    base_model: str,
) -> None:
    """Write a PEFT folder.

    Tensors keep the adapters' type. The folder appears whole or not at all; an existing one is replaced only after the
    new one is complete.

    Args:
        base_model: name or folder of the model that the adapters belong to.

    Raises:
        ValueError: if the adapters are not those of `lora_settings`.
    """
    modules = _modules(model_config)
    adapted = lora_settings.paths_in(set(map(_module_path, modules.values())))
    # A tree of others would be written as if it were whole.
    leaves = {
        "/".join(module_path): np.asarray(leaf) for module_path, leaf in trees.flatten(adapters)
    }
    if leaves.keys() != {
        f"{module_path}/{half_name}" for module_path in adapted for half_name in "ab"
    }:
        raise ValueError(f"adapters are not those of {lora_settings}")
    # Of all modules of the model, those that are adapted, in the order of the table.
    tensor_rules = {
        module_name: tensor_rule
        for module_name, tensor_rule in modules.items()
        if _module_path(tensor_rule) in adapted
    }
    module_key = registry.family_of(model_config).module_key
    with whole_files.atomic_folder(Path(folder)) as temporary:
        whole_files.write_json(
            temporary / CONFIG, _settings(tensor_rules, lora_settings, base_model, module_key)
        )
        write_safetensors(
            temporary / WEIGHTS,
            list(_tensors_to_write(tensor_rules, lora_settings, leaves, module_key)),
        )


def _tensors_to_write(
    tensor_rules: dict[str, TensorRule],
    lora_settings: Lora,
    leaves: dict[str, np.ndarray],
    module_key: Callable[[str], str],
) -> Iterator[TensorToWrite]:
    # Layer by layer, as PEFT names them: ours lie stacked in one array.
    for module_name, tensor_rule in tensor_rules.items():
        for (half_name, peft_name), torch_shape in zip(
            _HALVES, _peft_shapes(tensor_rule, lora_settings.rank), strict=True
        ):
            matrix = leaves[f"{_module_path(tensor_rule)}/{half_name}"]
            if tensor_rule.layer is not None:
                matrix = matrix[tensor_rule.layer]
            tensor_name = f"{_PREFIX}{module_key(module_name)}.{peft_name}.weight"
            yield TensorToWrite(tensor_name, torch_shape, matrix.dtype, matrix.transpose)


def _settings(
    tensor_rules: dict[str, TensorRule],
    lora_settings: Lora,
    base_model: str,
    module_key: Callable[[str], str],
) -> dict:
    """The content of adapter_config.json."""
    # Both parts of the model have modules of one suffix, so targets are a pattern for whole names.
    patterns = []
    # Layers of a stack share one pattern, with digits in place of the layer's number.
    for module_name, tensor_rule in tensor_rules.items():
        pattern = re.escape(module_key(module_name))
        if tensor_rule.layer is not None:
            pattern = pattern.replace(rf"\.{tensor_rule.layer}\.", r"\.\d+\.", 1)
        patterns.append(pattern)
    # PEFT writes and expects a whole number where it is one.
    alpha = lora_settings.alpha
    if alpha == int(alpha):
        alpha = int(alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "revision": None,
        "inference_mode": True,
        "r": lora_settings.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        # Each pattern once, in order: every layer of a stack has made the same one.
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


# ---- Reading ----


class _AdapterTensors(Tensors):
    """The tensors of a PEFT folder, by module name in the published layout; `nested`: the file has the newer names."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.nested, self.family = False, family
        super().__init__(folder, self._canonical, WEIGHTS)

    def _canonical(self, tensor_name: str) -> str:
        # A tensor of something else has no place here, and to pass it over would be a silent loss.
        if not tensor_name.startswith(_PREFIX):
            raise UserError(
                f"{self.folder}: tensor {shown(tensor_name)} does not begin with {_PREFIX}"
            )
        stored_name = tensor_name.removeprefix(_PREFIX)
        module_name = self.family.canonical_key(stored_name)
        # One renamed tensor is enough: a file is written by one version of transformers.
        self.nested |= module_name != stored_name
        return module_name

    def file_name_of(self, module_name: str) -> str:
        """A module's name in the published layout -> its name in this file's layout."""
        return self.family.module_key(module_name) if self.nested else module_name


def load(folder: str | os.PathLike, model_config: Config) -> tuple[Tree, Lora]:
    """Load (adapters as numpy arrays, float32; their Lora) of a PEFT folder made for a model of this config.

    A module that PEFT adapted in some layers only gets zeros in the others. That is exact: they add nothing, and
    since a and b are both zero they have no gradient, so that training goes on with PEFT's layers only.
    rsLoRA's scale, alpha / sqrt(r), comes back as an alpha larger by sqrt(r).

    Raises:
        UserError: naming the setting or the tensors, for settings that change what an adapter computes (DoRA, ranks by
            pattern, trained biases, ...), for modules outside lora.TARGETS, and unless the tensors are exactly those
            that the settings ask for, finite and of their shapes.
    """
    folder = Path(folder)
    # Settings first: they are small, and say what is to be found in the weights.
    settings = _read_settings(folder / CONFIG)
    _check_weights_exist(folder)
    tensors = _AdapterTensors(folder, registry.family_of(model_config))
    modules = _modules(model_config)

    # ---- Which modules the settings target, and whether an adapter can be there ----
    try:
        targeted = {
            module_name: tensor_rule
            for module_name, tensor_rule in modules.items()
            if _is_target(settings, tensors.file_name_of(module_name), tensor_rule.layer)
        }
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{folder / CONFIG}: a pattern is not a regular expression: {shown(error)}"
        ) from error
    # Whatever is targeted must have a place in our tree, or a part of the adapter would be lost.
    for module_name, tensor_rule in targeted.items():
        if _module_path(tensor_rule) not in PATHS:
            raise UserError(
                f"{folder / CONFIG}: {module_name} cannot carry an adapter here (lora.TARGETS lists what can)"
            )
    if not targeted:
        raise UserError(f"{folder / CONFIG}: target_modules match no module of the model")
    adapted, own = ({*map(_module_path, some.values())} for some in (targeted, modules))
    lora_settings = _lora(folder / CONFIG, settings, adapted, own)

    # ---- Whether the file holds their tensors and no others ----
    wanted = {
        f"{module_name}.{peft_name}.weight": torch_shape
        for module_name, tensor_rule in targeted.items()
        for (_, peft_name), torch_shape in zip(
            _HALVES, _peft_shapes(tensor_rule, lora_settings.rank), strict=True
        )
    }
    _check_tensors(folder, tensors, wanted)
    # How many layers a stack has in the model, adapted or not: the arrays have room for all.
    layer_counts = Counter(tensor_rule.path for tensor_rule in modules.values())
    adapters = _read_adapters(folder, tensors, targeted, layer_counts, lora_settings.rank)
    # Our scale is alpha / rank, so this alpha gives rsLoRA's alpha / sqrt(rank).
    if settings.get("use_rslora"):
        lora_settings = replace(
            lora_settings, alpha=lora_settings.alpha * math.sqrt(lora_settings.rank)
        )
    return adapters, lora_settings


def _check_weights_exist(folder: Path) -> None:
    weights_path = folder / WEIGHTS
    if weights_path.is_file():
        return
    # The older format of PEFT; said outright, since the folder looks complete.
    pickle = weights_path.with_suffix(".bin")
    if pickle.is_file():
        raise UserError(
            f"{folder}: {pickle.name} is a pickle file, which can run code when it is read; "
            "only safetensors are read"
        )
    raise UserError(f"{weights_path} is missing")


def _read_settings(settings_path: Path) -> dict:
    if not settings_path.is_file():
        raise UserError(f"{settings_path.parent}: no {settings_path.name}; not a PEFT folder")
    settings = hf_folder.read_json(settings_path)
    # What changes what an adapter computes is refused by name; a wrong reading would go unnoticed.
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{settings_path}: peft_type is {shown(settings.get('peft_type'))}, not LORA"
        )
    if settings.get("bias", "none") != "none":
        raise UserError(
            f"{settings_path}: bias is {shown(settings['bias'])}; trained biases are not supported"
        )
    initialization = settings.get("init_lora_weights")
    if initialization not in _PLAIN_INIT:
        raise UserError(
            f"{settings_path}: init_lora_weights {shown(initialization)} changes the base model's weights; "
            "not supported"
        )
    # What is off does nothing, whatever it is.
    for setting in sorted(settings.keys() - _NO_EFFECT - _READ):
        if settings[setting]:
            raise UserError(f"{settings_path}: {shown(setting)} is not supported")
    _check_types(settings_path, settings)
    return settings


def _check_types(settings_path: Path, settings: dict) -> None:
    # By type only: whether the names exist in the model is the caller's question.
    targets = settings.get("target_modules")
    layer_indices = _as_list(settings.get("layers_to_transform"))
    is_good = {
        "target_modules": targets is not None and _is_text_or_texts(targets),
        "use_rslora": settings.get("use_rslora") in (None, True, False),
        "exclude_modules": _is_text_or_texts(settings.get("exclude_modules")),
        "layers_pattern": _is_text_or_texts(settings.get("layers_pattern")),
        "layers_to_transform": all(
            type(layer_index) is int for layer_index in layer_indices
        ),  # and no bool
    }
    for setting, is_good_value in is_good.items():
        if not is_good_value:
            raise UserError(
                f"{settings_path}: {setting} is not of its type: {shown(settings.get(setting))}"
            )


def _is_text_or_texts(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(text, str) for text in value)
    return value is None or isinstance(value, str)


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _is_target(settings: dict, module_name: str, layer_index: int | None) -> bool:
    """Whether PEFT adapts the module: a text is a pattern for the whole name, a list holds names or their ends."""

    def is_named(targets: str | list[str]) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, module_name) is not None
        return any(
            module_name == target or module_name.endswith(f".{target}") for target in targets
        )

    targets, excluded = settings["target_modules"], settings.get("exclude_modules")
    # Exclusion wins over targets, as in PEFT.
    if (excluded and is_named(excluded)) or not is_named(targets):
        return False
    layer_indices = _as_list(settings.get("layers_to_transform"))
    # PEFT narrows by layer only where the targets are a list; a pattern names its layers itself.
    if isinstance(targets, str) or not layer_indices:
        return True
    # A list of targets may be narrowed to some layers, and to the stacks whose names match these.
    stacks = _as_list(settings.get("layers_pattern") or None)
    is_inside = not stacks or any(
        re.match(rf"(?:^|.*?\.){stack}\.\d+\.", module_name) for stack in stacks
    )
    return is_inside and layer_index in layer_indices


def _lora(settings_path: Path, settings: dict, adapted: set[str], modules: set[str]) -> Lora:
    """Groups where all their modules that the model has are adapted, else single paths; without rsLoRA's scale."""
    targets: list[str] = []
    for group, group_paths in TARGETS.items():
        own_paths = modules.intersection(group_paths)
        if own_paths and adapted.issuperset(own_paths):
            targets.append(group)
        else:
            targets += [module_path for module_path in group_paths if module_path in adapted]
    # Rank and alpha come from a file, and are checked where ours are.
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    try:
        return Lora(rank, alpha, tuple(targets))
    except UserError as error:
        raise UserError(f"{settings_path}: {shown(error)}") from error


def _check_tensors(folder: Path, tensors: Tensors, wanted: dict[str, tuple[int, int]]) -> None:
    """Refuse a file whose tensors are not exactly those wanted."""
    # Both directions: one tensor missing or one too many means that file and settings are not a
    # pair.
    stored = set(tensors.stored)
    for title, tensor_names in (
        ("missing", sorted(wanted.keys() - stored)),
        ("unexpected", sorted(stored - wanted.keys())),
    ):
        if tensor_names:
            names = hf_folder.first_names(tensor_names)
            raise UserError(f"{folder}: {WEIGHTS} does not fit {CONFIG}; {title}: {names}")
    # By the headers alone; no weight is read for a file that does not fit.
    for tensor_name, torch_shape in wanted.items():
        if tensors.shape(tensor_name) != torch_shape:
            raise UserError(
                f"{folder}: {tensor_name} is {list(tensors.shape(tensor_name))}; model and rank need "
                f"{list(torch_shape)}"
            )
        if tensors.dtype(tensor_name) not in hf_folder.WEIGHT_TYPES:
            raise UserError(
                f"{folder}: {tensor_name} is {NAMES[tensors.dtype(tensor_name)]}; adapters are F32, BF16 or F16"
            )


def _read_adapters(
    folder: Path,
    tensors: Tensors,
    targeted: dict[str, TensorRule],
    layer_counts: dict[tuple[str, ...], int],
    lora_rank: int,
) -> Tree:
    """The adapters as our tree. layer_counts: path of a weight -> layers that are stacked in it."""
    adapters: Tree = {}
    for module_name, tensor_rule in targeted.items():
        # Walk to the module's place in the tree, making what is missing on the way.
        module = adapters
        for part in tensor_rule.path[:-1]:
            module = module.setdefault(part, {})
        # The first layer of a stack makes the arrays for all of them; those that PEFT left out stay zero.
        if not module:
            stack = () if tensor_rule.layer is None else (layer_counts[tensor_rule.path],)
            for (half_name, _), torch_shape in zip(
                _HALVES, _peft_shapes(tensor_rule, lora_rank), strict=True
            ):
                module[half_name] = np.zeros((*stack, *torch_shape[::-1]), np.float32)
        # Converted to float32 by the assignment; transposed from torch's [out, in].
        for half_name, peft_name in _HALVES:
            tensor_name = f"{module_name}.{peft_name}.weight"
            tensor = tensors[tensor_name]
            if not hf_folder.is_finite(tensor):
                raise UserError(f"{folder}: {tensor_name} holds NaN or infinity")
            module[half_name][... if tensor_rule.layer is None else tensor_rule.layer] = tensor.T
    return adapters
