"""Config mistakes caught before anything compiles or is written: one clear line that names the key."""

import contextlib
import functools
import hashlib
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from cxr_jax import phantom
from cxr_jax.config import schema
from cxr_jax.config.sections import DataConfig, LoraConfig, RunConfig
from cxr_jax.data import prompts as data_prompts
from cxr_jax.data.prompts import Conversation, Prompt
from cxr_jax.data.sources.base import ENDLESS, Source
from cxr_jax.data.sources.phantom import open_phantoms
from cxr_jax.data.sources.rows import Row
from cxr_jax.data.sources.several import run_sources
from cxr_jax.data.sources.several.mixture import films_of, tried
from cxr_jax.errors import UserError
from cxr_jax.inference.prompts import (
    ROLES,
    RenderedPrompt,
    least_grids,
    messages_of,
    most_tokens,
    render_conversation,
    render_prompt,
)
from cxr_jax.labels import answers
from cxr_jax.metrics import profile, trackers
from cxr_jax.models import network, plain_text
from cxr_jax.models.image_batches import Images, open_images
from cxr_jax.models.markers import markers_of
from cxr_jax.models.network.config import Config
from cxr_jax.models.tokenizer import Tokenizer
from cxr_jax.runtime import processes
from cxr_jax.runtime.layout import Heads
from cxr_jax.training import conversations, earlier_runs, image_checks
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import hf_folder, locate, pretrained

# Keys of `config.data` without which a source cannot be opened.
NEEDED = {"phantom": ("hospital", "ood_hospital"), "files": ("manifest", "image_root", "size")}
NEEDED_OF_DATA_SETS = ("root", "size")
PHANTOMS_TO_TRY = 128  # target texts that are measured: their lengths are alike


# ---- What every task needs ---------------------------------------------------------------------------


def check_common(config: ConfigDict) -> Source:
    """Refuse what no task can run on; reads the manifest of films, if there is one, and the model's settings.

    Returns:
        The training source.

    Raises:
        UserError: naming the key, file or row that is wrong.
    """
    schema.check_values(config)
    source = config.data.source
    for name in NEEDED.get(source, NEEDED_OF_DATA_SETS):
        if name not in config.data:
            raise UserError(
                f"config.data.source={source!r} needs config.data.{name}: use another preset"
            )
    settings = RunConfig.from_config(config)
    data = settings.data
    trackers.check(settings.trackers)
    if "phantom" in data.scored_sources and not settings.eval.n_final:
        raise UserError("config.eval.n_final=0 reads all images, and phantoms have no end")
    profile.parse(settings.profile)
    Trainable.create(settings.lora, settings.optim.frozen, settings.dtype, settings.param_dtype)
    pretrained.check_model(settings.model)
    pretrained.check_weights(settings.model)
    # Phantoms alone need nothing from a disk.
    opens_all = data.kind == "files" or data.train or data.eval or data.ood
    train, prompts = (_film_prompts if opens_all else _phantom_prompts)(settings)
    check_model(settings.model, train.size, prompts, settings.max_completion, data)
    if data.kind == "files" and not settings.model.startswith("random:"):
        image_checks.warn_of_other_sizes(settings)
    return train


def _phantom_prompts(settings: RunConfig) -> tuple[Source, dict[Prompt, str]]:
    data = settings.data
    train = open_phantoms(data, data.hospital, "train")
    return train, dict.fromkeys(train.prompts(), "the prompt")


def _film_prompts(settings: RunConfig) -> tuple[Source, dict[Prompt, str]]:
    """The training source of a manifest, and each prompt with the first row that asks it."""
    data = settings.data
    if data.kind == "files" and data.sites:
        raise UserError(
            f"config.data.sites={data.sites} must be 0 for files: only phantoms are drawn at other sites"
        )
    if not data.train and data.source != "phantom":
        for name in ("root",) if data.is_data_set else ("manifest", "image_root"):
            if not getattr(data, name):
                raise UserError(
                    f"config.data.{name} is empty; give it with --config.data.{name}=PATH"
                )
        _check_choice_of_films(data)
    is_evaluation = settings.task == "evaluate"
    opened = run_sources.open_sources(data, only_scores=is_evaluation)
    # With another seed others are held out, but all are scored.
    only_scores = is_evaluation and not data.scores_all
    earlier = earlier_runs.check_held_out(settings.model, data, opened, only_scores=only_scores)
    earlier += earlier_runs.check_contamination(settings, opened)
    if processes.is_main():
        for line in (*opened.about, *opened.warnings, *earlier):
            print(line, flush=True)
    sources = [opened.train, *opened.select.values(), *opened.test.values()]
    rows = [row for source in sources for films in films_of(source) for row in films.rows]
    if not data.is_native and rows:
        _check_film_counts(rows)
    named = {row.asked: f"the prompt of row {row.id}" for row in reversed(rows)}
    return opened.train, {**dict.fromkeys(opened.prompts(), "the prompt"), **named}


def _check_choice_of_films(data: DataConfig) -> None:
    """Refuse what the other kind of films alone is asked, and views that none has."""
    # Each is told where it belongs, and not passed over.
    for name in () if data.is_data_set else ("root", "labels", "split", "select_split"):
        if getattr(data, name):
            raise UserError(f"config.data.{name} is of data sets: a manifest lists its rows itself")
    for name in ("manifest", "image_root", "columns") if data.is_data_set else ():
        if getattr(data, name):
            raise UserError(f"config.data.{name} is of manifests: a data set has its own tables")
    views = ("frontal", "any") if data.is_data_set else ("frontal",)
    if len(data.views) != 1 or data.views[0] not in views:
        raise UserError(
            f"config.data.views={','.join(data.views)!r} must be one of: {', '.join(views)}"
        )


def _check_film_counts(rows: Sequence[Row]) -> None:
    """Refuse rows of other numbers of films than the first, where films are squares: a batch of them is one array."""
    for row in rows:
        if len(row.image_paths) != len(rows[0].image_paths):
            raise UserError(
                f"row {row.id}: asks about {len(row.image_paths)} images, row {rows[0].id} about "
                f"{len(rows[0].image_paths)}: in one run that takes films in their own aspect ratio "
                "(config.data.max_pixels)"
            )


# ---- The model ---------------------------------------------------------------------------------------


def check_model(
    model: str,
    size: int,
    prompts: Mapping[Prompt, str],
    max_completion: int,
    data: DataConfig | None = None,
) -> None:
    """Refuse a model that cannot read the images and prompts, or cannot write answers; its weights are not read.

    Args:
        model: `config.model`.
        size: pixels a side of the images, where they are squares.
        prompts: each with what a message calls it.
        max_completion: tokens that follow a prompt at most.
        data: `config.data`; None: images are squares.

    Raises:
        UserError: naming the model and what does not fit, or the prompt that is too long.
    """
    tokenizer = pretrained.load_tokenizer(model)
    model_config = read_model_config(model, tokenizer)
    if problem := _problem_of_tokenizer(tokenizer, model_config):
        raise UserError(f"config.model={model!r}: {problem}")
    data = data or DataConfig.with_defaults()
    images = image_checks.check_images(
        model, model_config, size, data, data_prompts.most_films(prompts)
    )

    _warn_of_spelled_tokens(
        tokenizer, {name: _said_by_people(prompt) for prompt, name in prompts.items()}
    )
    positions = model_config.text.max_position_embeddings
    for text, name in prompts.items():
        try:
            rendered = render_prompt(tokenizer, model_config, text, least_grids(text, images))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        length = most_tokens(len(rendered.ids), text, images)
        if length + max_completion > positions:
            raise UserError(
                f"{name} has {length} tokens: with config.max_completion={max_completion} that is "
                f"more than the {positions} positions of the model"
            )


def _said_by_people(prompt: Prompt) -> str:
    """A prompt without what the model has said in it."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(turn.content for turn in prompt if turn.role != "assistant")


def _warn_of_spelled_tokens(
    tokenizer: Tokenizer, texts: Mapping[str, str], allowed: Sequence[str] = ()
) -> None:
    """Say once that texts (name -> text) spell special tokens, which they are read as words of."""
    spelled = {
        name: tokens
        for name, text in texts.items()
        if (tokens := plain_text.spelled_tokens(tokenizer, text, allowed))
    }
    if spelled and processes.is_main():
        name, tokens = next(iter(spelled.items()))
        others = f", and {len(spelled) - 1} more" if len(spelled) > 1 else ""
        print(
            f"warning: {name} spells {', '.join(tokens)}{others}: read as plain text, not as special tokens",
            file=sys.stderr,
            flush=True,
        )


def _problem_of_tokenizer(tokenizer: Tokenizer, model_config: Config) -> str | None:
    """What keeps a tokenizer from serving the model: special tokens that are missing or other, ids beyond the table."""
    vocabulary = tokenizer.get_vocab()
    markers = markers_of(tokenizer)
    for token in (markers.end_of_text, markers.padding):
        if token not in vocabulary:
            return f"the tokenizer lacks the special token {token}"
    image, end = vocabulary[markers.image], vocabulary[markers.end_of_turn]
    if image != model_config.image_token_id:
        return (
            f"the tokenizer's {markers.image} is {image}, the config's "
            f"image_token_id {model_config.image_token_id}: images would not be seen"
        )
    if end not in model_config.eos_token_id:
        return (
            f"the tokenizer's {markers.end_of_turn} is {end}, the config's eos_token_id "
            f"{', '.join(map(str, model_config.eos_token_id))}: answers would not end"
        )
    if (last := max(vocabulary.values())) >= model_config.text.vocab_size:
        return (
            f"the tokenizer has ids up to {last}, the model embeds {model_config.text.vocab_size}"
        )
    try:
        answers.TokenBytes.from_tokenizer(tokenizer)
    except UserError as error:
        return str(error)
    return None


def read_model_config(model: str, tokenizer: Tokenizer) -> Config:
    """Read the model's config of `config.model`, for the tokenizer that it brings; weights are not read."""
    if model.startswith("random:"):
        return pretrained.random_config(model, tokenizer)
    return hf_folder.read_config(locate.find_folder(model))


def heads_to_divide(settings: RunConfig) -> Heads | None:
    """Read how many heads the model has, where `config.mesh.tensor` divides them."""
    if settings.mesh.tensor == 1:
        return None
    text = read_model_config(settings.model, pretrained.load_tokenizer(settings.model)).text
    return Heads(text.num_attention_heads, text.num_key_value_heads)


_KERNELS = {"splash": "tpu", "cudnn": "gpu"}
"""Kinds of attention that are kernels, and the platform that has them."""


def check_attention(settings: RunConfig) -> None:
    """Refuse a kernel of attention that the devices, or the model, cannot have.

    Raises:
        UserError: naming the key and the reason.
    """
    kind = settings.attention
    # Plain XLA runs anywhere.
    if kind not in _KERNELS:
        return
    if jax.default_backend() != _KERNELS[kind]:
        raise UserError(
            f"config.attention={kind!r} is a kernel of {_KERNELS[kind].upper()}s, and the devices are "
            f"{jax.default_backend().upper()}s: use 'auto'"
        )
    if kind == "cudnn" and settings.dtype != "bfloat16":
        raise UserError(
            f"config.attention='cudnn' is a kernel of bfloat16, and config.dtype is {settings.dtype!r}: use 'auto'"
        )
    # What cuDNN's kernel has no mask for goes by blocks.
    if settings.model and kind == "splash":
        text = read_model_config(settings.model, pretrained.load_tokenizer(settings.model)).text
        if text.image_sees_itself or text.sliding_layers:
            raise UserError(
                f"config.attention={kind!r} has no windows and no images that see themselves both ways, as "
                f"{settings.model} needs: use 'auto'"
            )


# ---- Targets, rows, fingerprint ------------------------------------------------------------------------


def imitates(settings: RunConfig) -> bool:
    """Tell whether a run trains on conversations: SFT that goes past its warm-up, RL with a replay."""
    if settings.task == "sft":
        return settings.locate_steps < settings.steps
    return settings.task == "rl" and settings.learner.replay_weight > 0


def check_targets_fit(settings: RunConfig, train: Source) -> None:
    """Refuse conversations that cannot train or are too long: all of films, the first 128 of phantoms.

    Raises:
        UserError: naming the row, or with the length of the longest target text.
    """
    tokenizer = pretrained.load_tokenizer(settings.model)
    model_config = read_model_config(settings.model, tokenizer)
    room = model_config.text.max_position_embeddings - settings.max_completion
    said, names = _conversations_of(train)
    _warn_of_spelled_turns(tokenizer, said, names)
    longest = 0
    count = data_prompts.most_films(train.prompts())
    images = open_images(settings.data, model_config, train.size, count)
    for row in _measure(tokenizer, images, settings.train_turns, said, names):
        # Of all rows the longest is told: so one change of the key is enough.
        longest = max(longest, row.completion)
        if row.prompt > room:
            raise UserError(
                f"row {row.name}: what is said before its answer has {row.prompt} tokens: with "
                f"config.max_completion={settings.max_completion} that is more than the "
                f"{room + settings.max_completion} positions of the model"
            )
    if longest > settings.max_completion:
        raise UserError(
            f"config.max_completion={settings.max_completion} is too small: target texts have up to "
            f"{longest} tokens"
        )


def history_width(train: Source, tokenizer: Tokenizer, images: Images) -> int:
    """Give the tokens of the longest prompt of those whose last answer trains: what was said before is a part of it."""
    rows = _measure(tokenizer, images, "last", *_conversations_of(train))
    longest = max(row.prompt for row in rows)
    # Of phantoms there are always more than those that are tried.
    return longest + (longest // 8 if len(train) == ENDLESS else 0)


class _Measured(NamedTuple):
    name: str
    prompt: int  # tokens before the first answer that trains
    completion: int  # tokens that follow


def _measure(
    tokenizer: Tokenizer,
    images: Images,
    train_turns: str,
    said: Sequence[Conversation],
    names: Sequence[str],
) -> Iterator[_Measured]:
    """The lengths of conversations as SFT lays them out."""

    @functools.lru_cache(maxsize=1024)
    def render(prompt: Prompt, image_count: int) -> RenderedPrompt:
        return render_conversation(tokenizer, messages_of(prompt), [1] * image_count)

    # Some at a time: encoding many is faster, and keeping all takes memory.
    for start in range(0, len(said), 256):
        some = slice(start, start + 256)
        plans, lengths = [], []
        for messages, name in zip(said[some], names[some], strict=True):
            with _naming(name):
                film_count = data_prompts.count_films(messages)
                plans.append((name, conversations.plan(messages, train_turns, film_count, render)))
                lengths.append(most_tokens(len(plans[-1][1].contexts[0]), messages, images))
        answers = [answer for _, plan in plans for answer in plan.answers]
        encoded = iter(plain_text.encode_texts(tokenizer, answers, plain_text.MODEL_TOKENS))
        stop = tokenizer.get_vocab()[markers_of(tokenizer).end_of_turn]
        for (name, plan), length in zip(plans, lengths, strict=True):
            answer_ids = [[*next(encoded), stop] for _ in plan.answers]
            with _naming(name):
                following, _ = conversations.join(plan.contexts, answer_ids)
            yield _Measured(name, length, len(following))


@contextlib.contextmanager
def _naming(row_name: str) -> Iterator[None]:
    """Puts the name of a row in front of what refuses its conversation."""
    try:
        yield
    except UserError as error:
        raise UserError(f"the target of row {row_name}: {error}") from None


def _conversations_of(train: Source) -> tuple[list[Conversation], list[str]]:
    """Conversations that a source trains on, and names of their rows."""
    return tried(train, PHANTOMS_TO_TRY)


def _warn_of_spelled_turns(
    tokenizer: Tokenizer, said: Sequence[Conversation], names: Sequence[str]
) -> None:
    """Say once that answers, or questions after the first, spell special tokens."""
    answers, questions = {}, {}
    for messages, name in zip(said, names, strict=True):
        texts = {role: [turn.content for turn in messages if turn.role == role] for role in ROLES}
        answers[f"the target of row {name}"] = "\n".join(texts["assistant"])
        questions[f"a later question of row {name}"] = "\n".join(texts["user"][1:])
    _warn_of_spelled_tokens(tokenizer, answers, plain_text.MODEL_TOKENS)
    _warn_of_spelled_tokens(tokenizer, questions)


def fingerprint(model: str, data: DataConfig) -> dict[str, Any]:
    """Hash what a run is made from beyond its config: the manifest or the code that draws phantoms, and the weights.

    A run is never resumed on another manifest or from other weights; the code is for the record.
    """
    weights = pretrained.fingerprint(model)
    rows = {"manifest_sha256": found} if (found := run_sources.digest(data)) else {}
    if data.kind == "files":
        return {"source": data.source, **rows, **weights}
    code = hashlib.sha256()
    for path in sorted(pathlib.Path(phantom.__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    return {"source": data.source, **rows, "code_sha256": code.hexdigest(), **weights}


def check_rows_divide(settings: RunConfig, shards: int) -> None:
    """Refuse batches whose rows do not divide over so many devices (data x fsdp).

    Raises:
        UserError: with the rows of a step and of a turn.
    """
    shares = group_shares(settings, shards)
    for rows, turns in row_counts(settings):
        at_once = rows // turns * shares
        if at_once % shards:
            raise UserError(
                f"{rows} rows a step in {turns} micro-batches are {rows // turns} at a time, which do "
                f"not divide over {shards} devices (data x fsdp)"
            )


def group_shares(settings: RunConfig, shards: int) -> int:
    """Choose among how many devices the completions of a prompt are divided in RL: as few as must be.

    Where a turn has fewer prompts than there are devices (data x fsdp), each of a few devices has the prompt and a
    share of its completions. 1 where prompts divide over the devices, and where no share would make them.
    """
    if settings.task != "rl":
        return 1
    prompts_at_once = [rows // turns for rows, turns in _rl_row_counts(settings)]
    group = settings.rollout.group_size
    for shares in range(1, group + 1):
        if group % shares == 0 and not any(rows * shares % shards for rows in prompts_at_once):
            return shares
    return 1


def row_counts(settings: RunConfig) -> list[tuple[int, int]]:
    """List, for each batch of a step, its rows and the parts in which they are worked through."""
    if settings.task == "evaluate":
        return []
    if settings.task == "sft":
        return [(settings.batch_size, settings.micro_batches)]
    counts = _rl_row_counts(settings)
    if settings.learner.replay_weight:
        counts.append((settings.learner.replay_batch, settings.learner.micro_batches))
    return counts


def _rl_row_counts(settings: RunConfig) -> list[tuple[int, int]]:
    """Those of prompts with a group of completions: sampled, and learned from."""
    rollout, learner = settings.rollout, settings.learner
    return [
        # 0 turns are chosen so that they divide.
        (rollout.prompts_per_step * rollout.oversample, rollout.sample_micro_batches or 1),
        (learner.prompts_per_step, learner.minibatches * learner.micro_batches),
    ]


def check_trains(
    model: str, lora: LoraConfig, frozen: tuple[str, ...], dtype: str, param_dtype: str
) -> None:
    """Refuse frozen patterns that match nothing or everything, and adapters that no kernel can have: by shapes alone.

    Raises:
        UserError: naming the pattern or the adapter.
    """
    model_config = read_model_config(model, pretrained.load_tokenizer(model))
    trainable = Trainable.create(lora, frozen, dtype, param_dtype)

    def split() -> tuple:
        key = jax.random.key(0)
        return trainable.split({"model": network.init_params(model_config, key)}, key)

    jax.eval_shape(split)
