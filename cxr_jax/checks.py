"""Config mistakes caught before anything compiles or is written: one clear line that names the key."""

import functools
import hashlib
import numbers
import operator
import pathlib
import re

import jax
import ml_collections
import numpy as np

from cxr_jax import losses, pretrained, trainable
from cxr_jax.data import batching, phantom
from cxr_jax.data import tokenizer as tokenizers
from cxr_jax.errors import UserError
from cxr_jax.labels import answers
from cxr_jax.models import chat, hf, loaded

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
    "dtype": tuple(trainable.DTYPES),
    "param_dtype": tuple(trainable.DTYPES),
    "rl.advantage": ("grpo", "gdpo"),
    "rl.scale_rewards": ("group", "batch", "none"),
    "rl.aggregation": losses.AGGREGATIONS,
    "rl.denominator": ("trained", "all"),
    "rl.ratio_level": losses.RATIO_LEVELS,
    "rl.clip": losses.CLIPS,
    "rl.kl": losses.KLS,
    "rl.sampler_correction": losses.CORRECTIONS,
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
            _require(config, name, lambda v, k=kinds: isinstance(v, k), f"must be {what}")
    for table, whole, what in ((WHOLE, True, "whole number"), (NUMBERS, False, "finite number")):
        for rule, names in table.items():
            for name in names:
                _require(
                    config,
                    name,
                    lambda v, w=whole, r=rule: is_number(v, r, whole=w),
                    f"must be a {what} {rule}",
                )
    for name in ("seed", "data.seed"):
        _require(
            config,
            name,
            lambda v: is_number(v) and v == int(v) and 0 <= v < 2**32,
            "must be from 0 to 2^32 - 1: keys know no more bits",
        )
    clips = lambda v: v == float("inf") or is_number(v, "> 0")
    _require(config, "optim.clip_norm", clips, "must be a number > 0, or inf")
    for axis in ("data", "fsdp", "tensor"):
        _require(
            config,
            f"mesh.{axis}",
            lambda v: v == -1 or is_number(v, ">= 1", whole=True),
            "must be a whole number >= 1, or -1: what remains",
        )
    for name, known in ONE_OF.items():
        _require(config, name, lambda v, k=known: v in k, f"is not one of {', '.join(known)}")
    _require(
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


def common(config):
    """What every task needs. Reads the manifest of files, if there is one, and the model's config and tokenizer.

    Returns the training source. Raises UserError.
    """
    values(config)
    needed = {"phantom": ("hospital", "ood_hospital"), "files": ("manifest", "image_root", "size")}[
        config.data.source
    ]
    for name in needed:
        if name not in config.data:
            raise UserError(
                f"config.data.source={config.data.source!r} needs config.data.{name}: use another preset"
            )
    pretrained.check(config)
    d = config.data
    if d.source == "phantom":
        source = batching.PhantomSource(
            d.hospital, "train", d.seed, d.get("reader_miss", 0.0), d.get("sites", 0)
        )
        model(config, source.size, dict.fromkeys(source.prompts(), "the prompt"))
        return source
    if d.get("sites"):
        raise UserError(
            f"config.data.sites={d.sites} must be 0 for files: only phantoms are drawn at other sites"
        )
    for name in ("manifest", "image_root"):
        if not d[name]:
            raise UserError(f"config.data.{name} is empty; give it with --config.data.{name}=PATH")
    whole = lambda v: is_number(v, ">= 28", whole=True) and v % 28 == 0
    _require(config, "data.size", whole, "must be a multiple of 28")
    from cxr_jax.data import files

    train, held = files.open_split(d.manifest, d.image_root, size=d.size, seed=d.seed)
    model(
        config,
        d.size,
        {r.prompt: f"the prompt of row {r.id}" for r in reversed([*train.rows, *held.rows])},
    )
    return train


def model(config, size: int, prompts: dict) -> None:
    """Refuses a model that cannot read images of `size` pixels and prompts {text: what to call it} or that cannot
    write answers: by its config and tokenizer, its weights are not read. Raises UserError.
    """
    tok = pretrained.tokenizer(config)
    refuse = lambda why: UserError(f"config.model={config.model!r}: {why}")
    vocab, cfg = tok.get_vocab(), model_config(config, tok)
    if "<|endoftext|>" not in vocab:
        raise refuse("the tokenizer lacks the special token <|endoftext|>")
    if vocab[tokenizers.IMAGE_PAD] != cfg.image_token_id:
        raise refuse(
            f"the tokenizer's {tokenizers.IMAGE_PAD} is {vocab[tokenizers.IMAGE_PAD]}, the config's "
            f"image_token_id {cfg.image_token_id}: images would not be seen"
        )
    if vocab["<|im_end|>"] not in cfg.eos_token_id:
        raise refuse(
            f"the tokenizer's <|im_end|> is {vocab['<|im_end|>']}, the config's eos_token_id "
            f"{', '.join(map(str, cfg.eos_token_id))}: answers would not end"
        )
    if (last := max(vocab.values())) >= cfg.text.vocab_size:
        raise refuse(f"the tokenizer has ids up to {last}, the model embeds {cfg.text.vocab_size}")
    try:
        answers.TokenBytes.from_tokenizer(tok)
    except UserError as e:
        raise refuse(e) from None
    unit, most = (
        cfg.vision.patch_size * cfg.vision.spatial_merge_size,
        cfg.text.max_position_embeddings,
    )
    if size % unit:
        raise refuse(f"images of {size} pixels do not divide into its patches of {unit}")
    grid = (1, size // cfg.vision.patch_size, size // cfg.vision.patch_size)
    for text, name in prompts.items():
        try:
            length = len(chat.render(tok, cfg, text, grid))
        except UserError as e:
            raise UserError(f"{name}: {e}") from None
        if length + config.max_completion > most:
            raise UserError(
                f"{name} has {length} tokens: with config.max_completion={config.max_completion} that is "
                f"more than the {most} positions of the model"
            )


def model_config(config, tok):
    """The Config of `config.model` with the tokenizer that it brings; weights are not read."""
    if config.model.startswith("random:"):
        return pretrained.random_config(config.model, tok)
    return hf.read_config(loaded.find_folder(config.model))


def targets_fit(config, train) -> None:
    """Refuses a `max_completion` that target texts do not fit: all of files, the first 128 of phantoms."""
    if config.data.source == "files":
        texts = train.targets({"targets": [r.target for r in train.rows]}, range(len(train.rows)))
    else:
        indices = np.arange(128)
        texts = train.targets({"scene": jax.tree.map(np.asarray, _scenes(train, indices))}, indices)
    ids = pretrained.tokenizer(config)(texts, add_special_tokens=False)["input_ids"]
    longest = 1 + max(map(len, ids))  # and the end of the turn
    if longest > config.max_completion:
        raise UserError(
            f"config.max_completion={config.max_completion} is too small: target texts have up to {longest} tokens"
        )


def _scenes(source, indices):
    """The scenes of a `batching.PhantomSource`, without drawing them: a fraction of the time of `batch`."""
    keys, sites = (
        phantom.example_keys(source.seed, source.split, source.hospital, indices),
        source.sites_of(indices),
    )
    sites = None if sites is None else phantom.site_keys(source.seed, sites)
    return jax.jit(functools.partial(phantom.sample_scenes, hospital=source.hospital))(
        keys, sites=sites
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
    """The value at a dotted name, _ABSENT if the config has no such key."""
    value = config
    for key in name.split("."):
        if not isinstance(value, ml_collections.ConfigDict) or key not in value:
            return _ABSENT
        value = value[key]
    return value


def _require(config, name, good, what):
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


def rows_divide(config, shards: int) -> None:
    """Refuses batches whose rows do not divide over so many devices (data x fsdp). Raises UserError."""
    for rows, turns in row_counts(config):
        if rows // turns % shards:
            raise UserError(
                f"{rows} rows a step in {turns} micro-batches are {rows // turns} at a time, which do not "
                f"divide over {shards} devices (data x fsdp)"
            )


def row_counts(config) -> list[tuple[int, int]]:
    """(rows, parts in which they are worked through) of each batch of a step."""
    if config.task == "evaluate":
        return []
    if config.task == "sft":
        return [(config.batch_size, config.micro_batches)]
    r = config.rl
    replay = [(r.replay_batch, r.micro_batches)] if r.replay_weight else []
    sampled = r.prompts_per_step * r.oversample, r.micro_batches
    return [sampled, (r.prompts_per_step, r.minibatches * r.micro_batches), *replay]


def _is_pattern(text) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True
