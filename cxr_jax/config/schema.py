"""What the values of a config may be, by the config alone."""

import numbers
import operator
import re

import ml_collections
import numpy as np

from cxr_jax import phantom
from cxr_jax.errors import UserError
from cxr_jax.training import trainable
from cxr_jax.weights import pretrained

AGGREGATIONS = ("sequence", "token", "token_local", "constant")
RATIO_LEVELS = ("token", "sequence", "sequence_token")
CLIPS = ("ppo", "cispo", "none")
KLS = ("k1", "k2", "k3")
CORRECTIONS = ("none", "tis", "icepop")

WHOLE = {
    ">= 0": (
        "locate_steps",
        "optim.warmup_steps",
        "eval.cases",
        "lora.rank",
        "rl.patience",
        "data.sites",
        "max_skipped",
        "data.cache_mib",
        "data.threads",
    ),
    ">= 1": (
        "steps",
        "batch_size",
        "micro_batches",
        "max_completion",
        "log_every",
        "save_every",
        "rl.prompts_per_step",
        "rl.micro_batches",
        "rl.oversample",
        "rl.group_size",
        "rl.min_length",
        "rl.num_iterations",
        "rl.minibatches",
        "rl.replay_batch",
        "eval.every",
        "eval.n",
        "eval.n_final",
        "eval.batch_size",
        "eval.bootstrap",
    ),
}
"""Rule -> keys whose values are whole numbers that keep it (and fit an int32)."""

NUMBERS = {
    "> 0": ("optim.lr", "optim.eps", "rl.temperature", "rl.epsilon_high"),
    ">= 0": (
        "locate_weight",
        "optim.weight_decay",
        "rl.beta",
        "rl.replay_weight",
        "rl.delta",
        "grace_seconds",
        "step_timeout",
    ),
    ">= 1": ("rl.sampler_cap",),
    ">= 0, < 1": ("optim.b1", "optim.b2"),
    ">= 0, <= 1": ("optim.final_fraction", "data.reader_miss"),
    "> 0, <= 1": ("rl.epsilon",),
    "> 0, < 1": ("rl.overlong_from",),
}
"""Rule -> keys whose values are finite numbers that keep it in float32, in which they are used."""

TYPES = {
    "a section of keys": (
        ml_collections.ConfigDict,
        ("data", "optim", "eval", "lora", "mesh", "rl", "rl.reward_weights"),
    ),
    "a text": (str, ("model", "data.manifest", "data.image_root")),
    "True or False": (bool, ("rl.mask_truncated",)),
    "a tuple": ((tuple, list), ("optim.frozen",)),
}
ONE_OF = {
    "remat": ("none", "full", "dots"),
    "dtype": tuple(pretrained.DTYPES),
    "param_dtype": tuple(pretrained.DTYPES),
    "rl.advantage": ("grpo", "gdpo"),
    "rl.scale_rewards": ("group", "batch", "none"),
    "rl.aggregation": AGGREGATIONS,
    "rl.denominator": ("trained", "all"),
    "rl.ratio_level": RATIO_LEVELS,
    "rl.clip": CLIPS,
    "rl.kl": KLS,
    "rl.sampler_correction": CORRECTIONS,
    "eval.select_by": ("jaccard", "macro_f1", "micro_f1", "valid_format"),
    "data.source": ("phantom", "files"),
    "data.hospital": phantom.HOSPITALS,
    "data.ood_hospital": phantom.HOSPITALS,
}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_MOST = float(np.finfo(np.float32).max)
_ABSENT = object()


def values(config) -> None:
    """Refuses values that mean nothing, by the config alone. Keys that the config lacks are passed over.

    Raises UserError.
    """
    for what, (kinds, names) in TYPES.items():
        for name in names:
            require(config, name, lambda v, k=kinds: isinstance(v, k), f"must be {what}")
    for table, whole, what in ((WHOLE, True, "whole number"), (NUMBERS, False, "finite number")):
        for rule, names in table.items():
            for name in names:
                require(
                    config,
                    name,
                    lambda v, w=whole, r=rule: is_number(v, r, whole=w),
                    f"must be a {what} {rule}",
                )
    for name in ("seed", "data.seed"):
        require(
            config,
            name,
            lambda v: is_number(v) and v == int(v) and 0 <= v < 2**32,
            "must be from 0 to 2^32 - 1: keys know no more bits",
        )
    clips = lambda v: v == float("inf") or is_number(v, "> 0")
    require(config, "optim.clip_norm", clips, "must be a number > 0, or inf")
    for axis in ("data", "fsdp", "tensor"):
        require(
            config,
            f"mesh.{axis}",
            lambda v: v == -1 or is_number(v, ">= 1", whole=True),
            "must be a whole number >= 1, or -1: what remains",
        )
    for name, known in ONE_OF.items():
        require(config, name, lambda v, k=known: v in k, f"is not one of {', '.join(known)}")
    require(
        config, "optim.frozen", lambda v: all(map(_is_pattern, v)), "holds a bad regular expression"
    )
    divides(config, "batch_size", "micro_batches")
    divides(config, "rl.prompts_per_step", "rl.micro_batches", "rl.minibatches")
    if "lora" in config:
        trainable.Trainable.of(config)


def is_number(value, rule: str = "", *, whole: bool = False) -> bool:
    """Whether a value is a finite number that keeps a rule like ">= 0, < 1": in int32 if whole, else in float32."""
    if isinstance(value, bool) or not isinstance(
        value, numbers.Integral if whole else numbers.Real
    ):
        return False
    if not -_MOST <= value <= _MOST or whole and value >= 2**31:
        return False
    parts = [part.split() for part in rule.split(", ") if part]
    value = value if whole else np.float32(value)
    return all(_COMPARE[sign](value, float(bound)) for sign, bound in parts)


def _get(config, name):
    """The value at a dotted name, _ABSENT if the config has no such key."""
    value = config
    for key in name.split("."):
        if not isinstance(value, ml_collections.ConfigDict) or key not in value:
            return _ABSENT
        value = value[key]
    return value


def require(config, name, good, what):
    value = _get(config, name)
    if value is not _ABSENT and not good(value):
        raise UserError(f"config.{name}={value!r} {what}")


def divides(config, rows, micro_batches, minibatches=None):
    """Every minibatch has as many rows, and so has each of its micro-batches."""
    n, turns = _get(config, rows), _get(config, micro_batches)
    steps = (
        1
        if minibatches is None or _get(config, minibatches) is _ABSENT
        else _get(config, minibatches)
    )
    if n is _ABSENT or turns is _ABSENT or n % (steps * turns) == 0:
        return
    into = (
        f"{turns} micro-batches" if steps == 1 else f"{steps} minibatches of {turns} micro-batches"
    )
    raise UserError(f"config.{rows}={n} does not divide into {into}")


def _is_pattern(text) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True
