"""Config mistakes caught before anything compiles or is written: one clear line that names the key."""

import hashlib
import pathlib
import re

from cxr_jax import pretrained, trainable
from cxr_jax.data import batching, phantom
from cxr_jax.errors import UserError

AT_LEAST_ONE = (
    "steps", "batch_size", "micro_batches", "max_completion", "log_every", "save_every", "rl.prompts_per_step",
    "rl.micro_batches", "rl.oversample", "rl.group_size", "rl.min_length", "eval.every", "eval.n", "eval.n_final",
    "eval.batch_size", "eval.bootstrap",
)  # fmt: skip
MICRO_BATCHES = (("batch_size", "micro_batches"), ("rl.prompts_per_step", "rl.micro_batches"))  # rows, parts
NOT_NEGATIVE = ("locate_steps", "locate_weight", "optim.warmup_steps", "optim.weight_decay", "eval.cases", "lora.rank")
POSITIVE = ("optim.lr", "optim.clip_norm", "optim.eps", "rl.temperature")
ONE_OF = {
    "remat": ("none", "full", "dots"),
    "dtype": tuple(trainable.DTYPES),
    "param_dtype": tuple(trainable.DTYPES),
    "rl.loss_type": ("grpo", "dapo", "dr_grpo"),
    "rl.scale_rewards": ("group", "batch", "none"),
    "eval.select_by": ("jaccard", "macro_f1", "micro_f1", "valid_format"),
    "data.source": ("phantom", "files"),
    "data.hospital": phantom.HOSPITALS,
    "data.ood_hospital": phantom.HOSPITALS,
}


def values(config) -> None:
    """Refuses values that mean nothing, by the config alone. Raises UserError."""
    for name in AT_LEAST_ONE:
        _require(config, name, lambda v: v >= 1, "must be at least 1")
    for name in NOT_NEGATIVE:
        _require(config, name, lambda v: v >= 0, "must not be negative")
    for name in POSITIVE:
        _require(config, name, lambda v: v > 0, "must be above 0")
    for name in ("seed", "data.seed"):
        _require(config, name, lambda v: 0 <= v < 2**32, "must be from 0 to 2^32 - 1: keys know no more bits")
    for name, known in ONE_OF.items():
        _require(config, name, lambda v, k=known: v in k, f"is not one of {', '.join(known)}")
    _require(config, "optim.frozen", lambda v: all(map(_is_pattern, v)), "holds a bad regular expression")
    for rows, parts in MICRO_BATCHES:
        if (n := _get(config, parts)) is not None and _get(config, rows) % n:
            raise UserError(f"config.{rows}={_get(config, rows)} does not divide into {n} micro-batches")
    _require(config, "rl.overlong_from", lambda v: 0 < v < 1, "must be a share of max_completion above 0 and below 1")
    if "lora" in config:
        trainable.Trainable.of(config)


def common(config):
    """What every task needs. Reads the manifest of files, if there is one. Returns the training source.

    Raises UserError.
    """
    values(config)
    needed = {"phantom": ("hospital", "ood_hospital"), "files": ("manifest", "image_root", "size")}[config.data.source]
    for name in needed:
        if name not in config.data:
            raise UserError(f"config.data.source={config.data.source!r} needs config.data.{name}: use another preset")
    pretrained.check(config)
    if config.data.source == "phantom":
        miss = config.data.get("reader_miss", 0.0)
        _require(config, "data.reader_miss", lambda v: 0 <= v <= 1, "is not a probability")
        return batching.PhantomSource(config.data.hospital, "train", config.data.seed, miss)
    for name in ("manifest", "image_root"):
        if not config.data[name]:
            raise UserError(f"config.data.{name} is empty; give it with --config.data.{name}=PATH")
    _require(config, "data.size", lambda v: v >= 28 and v % 28 == 0, "must be a multiple of 28")
    from cxr_jax.data import files

    d = config.data
    return files.open_split(d.manifest, d.image_root, size=d.size, seed=d.seed)[0]


def targets_fit(config, train) -> None:
    """Refuses a `max_completion` that target texts do not fit: all of files, the first 128 of phantoms."""
    if config.data.source == "files":
        texts = train.targets({"targets": [r.target for r in train.rows]}, range(len(train.rows)))
    else:
        texts = []
        for step in range(-(-128 // config.batch_size)):  # the batch size of training: compiled once
            indices = batching.indices_of(step, config.batch_size, len(train), config.data.seed)
            texts += train.targets(train.batch(indices), indices)
    ids = pretrained.tokenizer(config)(texts, add_special_tokens=False)["input_ids"]
    longest = 1 + max(map(len, ids))  # and the end of the turn
    if longest > config.max_completion:
        raise UserError(
            f"config.max_completion={config.max_completion} is too small: target texts have up to {longest} tokens"
        )


def fingerprint(config) -> dict:
    """What a run is made from, beyond its config: the bytes of the manifest, or of the code that draws phantoms; and of
    the weights, if it starts from a folder.

    A run is never resumed on another manifest or from other weights; the code is for the record.
    """
    digest, start = hashlib.sha256(), pretrained.fingerprint(config)
    if config.data.source == "files":
        with open(config.data.manifest, "rb") as f:
            digest.update(f.read())
        return {"source": "files", "manifest_sha256": digest.hexdigest(), **start}
    for path in sorted(pathlib.Path(phantom.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return {"source": config.data.source, "code_sha256": digest.hexdigest(), **start}


def _get(config, name):
    """The value at a dotted name, None if the config has no such key."""
    value = config
    for key in name.split("."):
        if key not in value:
            return None
        value = value[key]
    return value


def _require(config, name, good, what):
    value = _get(config, name)
    if value is not None and not good(value):
        raise UserError(f"config.{name}={value!r} {what}")


def _is_pattern(text) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True
