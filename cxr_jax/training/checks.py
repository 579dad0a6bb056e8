"""Config mistakes caught before anything compiles or is written: one clear line that names the key."""

import functools
import hashlib
import pathlib

import jax
import numpy as np

from cxr_jax import phantom
from cxr_jax.config.schema import check_values, is_number, require
from cxr_jax.data.sources import phantom as sources_phantom
from cxr_jax.errors import UserError
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.labels import answers
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import hf_folder, locate, pretrained


def common(config):
    """What every task needs. Reads the manifest of files, if there is one, and the model's config and tokenizer.

    Returns the training source. Raises UserError.
    """
    check_values(config)
    if "lora" in config:
        Trainable.from_config(config)
    needed = {"phantom": ("hospital", "ood_hospital"), "files": ("manifest", "image_root", "size")}[
        config.data.source
    ]
    for name in needed:
        if name not in config.data:
            raise UserError(
                f"config.data.source={config.data.source!r} needs config.data.{name}: use another preset"
            )
    pretrained.check_model(config.model)
    d = config.data
    if d.source == "phantom":
        source = sources_phantom.PhantomSource(
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
    require(config, "data.size", whole, "must be a multiple of 28")
    from cxr_jax.data.sources import manifest

    train, held = manifest.open_split(d.manifest, d.image_root, size=d.size, seed=d.seed)
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
    tokenizer = pretrained.load_tokenizer(config.model)
    refuse = lambda why: UserError(f"config.model={config.model!r}: {why}")
    vocab, model_config = tokenizer.get_vocab(), read_model_config(config, tokenizer)
    if "<|endoftext|>" not in vocab:
        raise refuse("the tokenizer lacks the special token <|endoftext|>")
    if vocab[tokenizers.IMAGE_PAD] != model_config.image_token_id:
        raise refuse(
            f"the tokenizer's {tokenizers.IMAGE_PAD} is {vocab[tokenizers.IMAGE_PAD]}, the config's "
            f"image_token_id {model_config.image_token_id}: images would not be seen"
        )
    if vocab["<|im_end|>"] not in model_config.eos_token_id:
        raise refuse(
            f"the tokenizer's <|im_end|> is {vocab['<|im_end|>']}, the config's eos_token_id "
            f"{', '.join(map(str, model_config.eos_token_id))}: answers would not end"
        )
    if (last := max(vocab.values())) >= model_config.text.vocab_size:
        raise refuse(
            f"the tokenizer has ids up to {last}, the model embeds {model_config.text.vocab_size}"
        )
    try:
        answers.TokenBytes.from_tokenizer(tokenizer)
    except UserError as e:
        raise refuse(e) from None
    unit, most = (
        model_config.vision.patch_size * model_config.vision.spatial_merge_size,
        model_config.text.max_position_embeddings,
    )
    if size % unit:
        raise refuse(f"images of {size} pixels do not divide into its patches of {unit}")
    grid = (1, size // model_config.vision.patch_size, size // model_config.vision.patch_size)
    for text, name in prompts.items():
        try:
            length = len(inference_prompts.render_prompt(tokenizer, model_config, text, grid))
        except UserError as e:
            raise UserError(f"{name}: {e}") from None
        if length + config.max_completion > most:
            raise UserError(
                f"{name} has {length} tokens: with config.max_completion={config.max_completion} that is "
                f"more than the {most} positions of the model"
            )


def read_model_config(config, tokenizer):
    """The Config of `config.model` with the tokenizer that it brings; weights are not read."""
    if config.model.startswith("random:"):
        return pretrained.random_config(config.model, tokenizer)
    return hf_folder.read_config(locate.find_folder(config.model))


def targets_fit(config, train) -> None:
    """Refuses a `max_completion` that target texts do not fit: all of files, the first 128 of phantoms."""
    if config.data.source == "files":
        texts = train.targets({"targets": [r.target for r in train.rows]}, range(len(train.rows)))
    else:
        indices = np.arange(128)
        texts = train.targets({"scene": jax.tree.map(np.asarray, _scenes(train, indices))}, indices)
    ids = pretrained.load_tokenizer(config.model)(texts, add_special_tokens=False)["input_ids"]
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
    digest, start = hashlib.sha256(), pretrained.fingerprint(config.model)
    if config.data.source == "files":
        with open(config.data.manifest, "rb") as f:
            digest.update(f.read())
        return {"source": "files", "manifest_sha256": digest.hexdigest(), **start}
    for path in sorted(pathlib.Path(phantom.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return {"source": config.data.source, "code_sha256": digest.hexdigest(), **start}


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
