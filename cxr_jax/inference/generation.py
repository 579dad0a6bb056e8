"""Completions for readers: checked settings, fixed shapes, streaming. `Model.generate` and `models.chat` use it.

A completion is to depend on its own prompt, settings, seed and number only. The noise does by its keys
(`sampling`); for the logits to do so to the last bit, every program that a prompt meets has a shape that follows
from the prompt and the settings alone: images and prompts are computed one by one, prompts of one length bucket
are decoded together, always in the same number of rows (`rows_at_once`). So few programs are compiled, too.
"""

import hashlib
import math
import numbers
import operator
import zlib
from collections import Counter
from dataclasses import dataclass

import jax
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.inference import answer_probabilities, sampling
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.models import qwen2_5_vl

STREAM_EVERY = 8  # tokens between two calls of a stream's callback


@dataclass(frozen=True)
class Completion:
    """One generated answer. token_ids and logprobs include the stop token; text does not show it."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" or "length"


def bucket(n: int) -> int:
    """The smallest of 64, 128, 192, 256, 384, 512, 768, 1024, ... that holds n: powers of 2 and halfway marks."""
    size = 64
    while size < n:
        power = size & (size - 1) == 0
        size += size if size == 64 else size // 2 if power else size // 3
    return size


def rows_at_once() -> int:
    """Rows of every decode program; more rows go in turns, fewer are filled up.

    One count for all calls, because XLA rounds a row differently among 2, 4 or 16 rows (a few 1e-6 in a log-prob).
    Few on a CPU, where an idle row costs time: one answer takes twice as long among 8 rows as among 2. An
    accelerator reads the same weights for one row as for 16.
    """
    return 8 if jax.default_backend() == "cpu" else 16


# Settings


@dataclass(frozen=True)
class Settings:
    """How to draw. Raises UserError for values that mean nothing."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    n: int = 1
    seed: int = 0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        put("max_new_tokens", _whole("max_new_tokens", self.max_new_tokens, 1))
        put("n", _whole("n", self.n, 1))
        put("seed", _whole("seed", self.seed, 0, 2**32 - 1))  # keys know no more bits
        put("temperature", _real("temperature", self.temperature))
        # Beyond these, float32 logits over the temperature overflow, or ruled-out tokens come back.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise UserError(
                f"temperature must be 0 (greedy) or from 1e-6 to 1e6, got {self.temperature}"
            )
        if self.top_p is not None:
            put("top_p", _real("top_p", self.top_p))
            if not 0 < self.top_p <= 1:
                raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None:
            put("top_k", _whole("top_k", self.top_k, 1))


def _whole(name, value, least, most=None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if (
        number is None
        or isinstance(value, (bool, np.bool_))
        or number < least
        or (most and number > most)
    ):
        upper = f" and at most {most}" if most else ""
        raise UserError(f"{name} must be a whole number of at least {least}{upper}, got {value!r}")
    return number


def _real(name, value) -> float:
    is_number = isinstance(value, (numbers.Real, np.number)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def check_room(model_config, length: int, max_new_tokens: int, what: str = "the prompt") -> None:
    """Raises UserError if a prompt of `length` tokens and its answer exceed the model's positions."""
    most = model_config.text.max_position_embeddings
    if length + max_new_tokens > most:
        raise UserError(
            f"{what} has {length} tokens: with max_new_tokens={max_new_tokens} that is more than the "
            f"{most} positions of the model"
        )


# Prompts


@dataclass(frozen=True)
class Request:
    """One rendered prompt: token ids, and patches and grid of its image (or None)."""

    ids: list[int]
    patches: np.ndarray | None
    grid: tuple[int, int, int] | None

    def image_key(self):
        return (
            None
            if self.patches is None
            else (self.grid, hashlib.sha256(self.patches.tobytes()).digest())
        )

    def mark(self) -> int:
        """A number for the content: equal prompts draw equal noise, wherever they stand."""
        image = (
            b""
            if self.patches is None
            else np.ascontiguousarray(self.patches, np.float32).tobytes()
        )
        return zlib.crc32(np.asarray(self.ids, np.int32).tobytes(), zlib.crc32(image))

    def positions(self, model_config) -> np.ndarray:
        """M-RoPE positions int32 [3, 1, T]."""
        return qwen2_5_vl.positions(
            model_config, np.array([self.ids]), None if self.grid is None else [self.grid]
        )


@dataclass(frozen=True)
class Prefix:
    """A prompt on the device (see `sampling`), its length, the position of the next token, its content's mark."""

    device: dict
    length: int
    start: int
    mark: int


def _padded(x: np.ndarray, length: int, axis: int, value: int = 0) -> np.ndarray:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return np.pad(x, widths, constant_values=value)


def prefill(model, request: Request, features) -> Prefix:
    """Compute a whole prompt; features [I, D] of its image or None."""
    model_config, length = model.config, len(request.ids)
    room = bucket(length)
    model.note("prefill", room)
    where = request.positions(model_config)
    # As many slots as tokens, with an image or without: one program a bucket.
    image = np.zeros((1, room, model_config.text.hidden_size), model.dtype)
    if features is not None:
        image[0, : len(features)] = features
    device = sampling.prefill(
        model.params,
        model_config,
        _padded(np.array([request.ids], np.int32), room, 1, model_config.pad_token_id),
        np.array([length], np.int32),
        _padded(where, room, 2),
        image,
        dtype=model.dtype,
    )
    return Prefix(device, length, int(where.max()) + 1, request.mark())


def prefix_of(model, request: Request) -> Prefix:
    """One prompt and its image, computed."""
    if request.patches is None:
        return prefill(model, request, None)
    return prefill(model, request, model.image_features(request.patches, [request.grid])[0])


def extend(model, keys, used: int, request: Request) -> Prefix:
    """The prefix of a prompt whose first `used` tokens have their keys already; the rest must hold no image."""
    model_config, length = model.config, len(request.ids)
    where, new = request.positions(model_config), np.array([request.ids[used:]], np.int32)
    width = bucket(new.shape[1])
    model.note("extend", (keys[0][0].shape[2], width, bucket(length)))
    device = sampling.extend(
        model.params,
        model_config,
        keys,
        np.array([used], np.int32),
        _padded(new, width, 1, model_config.pad_token_id),
        np.array([new.shape[1]], np.int32),
        _padded(where[:, :, used:], width, 2),
        room=bucket(length),
        dtype=model.dtype,
    )
    return Prefix(device, length, int(where.max()) + 1, request.mark())


# Decoding


@jax.jit
def _keys(seed, marks, numbers):
    """Typed keys [R] folded from (seed, content of the prompt, number of the sample)."""
    fold = jax.random.fold_in
    return jax.vmap(lambda mark, j: fold(fold(jax.random.key(seed), mark), j))(marks, numbers)


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class _Pieces:
    """New text of one growing completion. A character split over tokens is held back until it is whole."""

    def __init__(self, tokenizer):
        self.tokenizer, self.shown = tokenizer, ""

    def add(self, ids: list[int], last: bool) -> str:
        """The text that `ids`, all tokens so far, add to what was given before."""
        text = text_of(self.tokenizer, ids)
        # An unfinished character decodes to replacement characters; one that the model meant comes out later.
        text = text if last else text.rstrip("\ufffd")
        piece, self.shown = text[len(self.shown) :], text
        return piece


def decode(
    model, layers, rows: list[tuple[Prefix, int]], settings: Settings, stream=None, constraint=None
):
    """(a Completion for each (prefix, number of the sample), the keys of the drawn tokens).

    All prefixes of one bucket; at most model.rows rows. stream: called with (row, piece of text).
    """
    model_config, live = model.config, len(rows)
    R, N = model.rows, settings.max_new_tokens
    full = rows + rows[:1] * (R - live)
    ints = lambda values, dtype=np.int32: np.array(list(values), dtype)
    prompt, own, rest = sampling.begin(
        [p.device for p, _ in full],
        live,
        constraint,
        model_config=model_config,
        room=bucket(N),
        dtype=model.dtype,
    )
    lengths, start = ints(p.length for p, _ in full), ints(p.start for p, _ in full)
    keys = _keys(
        np.uint32(settings.seed),
        ints((p.mark for p, _ in full), np.uint32),
        ints(j for _, j in full),
    )
    greedy = settings.temperature == 0
    k, p = (None, None) if greedy else (settings.top_k, settings.top_p)
    choice = {
        "greedy": greedy,
        "stop_ids": model.special["stop"],
        "suppress_ids": model.special["suppress"],
        "top_k": None if k is None else np.int32(min(k, model_config.text.vocab_size)),
        "top_p": None if p in (None, 1) else np.float32(p),
    }
    rules = jax.tree.structure(constraint), tuple(np.shape(x) for x in jax.tree.leaves(constraint))
    model.note(
        "decode", (bucket(full[0][0].length), bucket(N), greedy, k is None, p in (None, 1), rules)
    )
    pieces, until = [_Pieces(model.tokenizer) for _ in rows], 0
    ended = np.zeros(live, bool)
    while until < N and not ended.all():
        until = N if stream is None else min(until + STREAM_EVERY, N)
        own, rest = sampling.decode(
            model.params,
            layers,
            model_config,
            prompt,
            lengths,
            start,
            keys,
            np.float32(1 if greedy else settings.temperature),
            own,
            rest,
            np.int32(until),
            constraint,
            dtype=model.dtype,
            **choice,
        )
        tokens, logprobs, counts, done = (
            np.asarray(x)[:live] for x in (rest.tokens, rest.logprobs, rest.lengths, rest.done)
        )
        if stream is not None:
            for i in np.flatnonzero(~ended):
                last = bool(done[i]) or until == N
                piece = pieces[i].add(tokens[i, : counts[i] - done[i]].tolist(), last)
                if piece:
                    stream(int(i), piece)
        ended = done.copy()
    out = []
    for ids, logps, count, stopped in zip(tokens, logprobs, counts, done, strict=True):
        text = text_of(model.tokenizer, ids[: count - stopped].tolist())
        out.append(
            Completion(
                text, ids[:count].tolist(), logps[:count].tolist(), "stop" if stopped else "length"
            )
        )
    return out, own


def complete(model, requests: list[Request], settings: Settings, stream=None, constraint=None):
    """settings.n completions of each request, as list of lists. stream: called with (request, sample, piece)."""
    out = [[None] * settings.n for _ in requests]
    layers = sampling.decode_layers(model.params, model.config)
    image_keys = [r.image_key() for r in requests]
    to_come, features, prefixes = Counter(image_keys), {}, {}

    def computed(b):
        """Each prompt is computed once, and each image once for all its prompts."""
        key = image_keys[b]
        if key is not None and key not in features:
            [features[key]] = model.image_features(requests[b].patches, [requests[b].grid])
        to_come[key] -= 1
        return prefill(
            model, requests[b], features.get(key) if to_come[key] else features.pop(key, None)
        )

    groups: dict[int, list] = {}
    for b, request in enumerate(requests):
        groups.setdefault(bucket(len(request.ids)), []).extend((b, j) for j in range(settings.n))
    for jobs in groups.values():
        for i in range(0, len(jobs), model.rows):
            turn = jobs[i : i + model.rows]
            prefixes = {b: prefixes.get(b) or computed(b) for b in dict(turn)}
            tell = (
                None
                if stream is None
                else (lambda row, piece, turn=turn: stream(*turn[row], piece))
            )
            got, _ = decode(
                model, layers, [(prefixes[b], j) for b, j in turn], settings, tell, constraint
            )
            for (b, j), completion in zip(turn, got, strict=True):
                out[b][j] = completion
    return out


# Readings with probabilities


@dataclass(frozen=True)
class Reading:
    """One image read: the greedy completion, the samples drawn beside it, and the mean over their traces (without
    samples: over the greedy one) of the probability that the answer names each of the 14 labels, or None."""

    shown: Completion
    samples: list[Completion]
    probabilities: dict[str, float] | None


def read(
    model, request: Request, greedy: Settings, drawn: Settings | None, constraint, answers
) -> Reading:
    """See `Model.read`. drawn: settings of the samples, answers: the rules for probabilities; each None without."""
    prefix, layers = prefix_of(model, request), sampling.decode_layers(model.params, model.config)
    [shown], own = decode(model, layers, [(prefix, 0)], greedy, None, constraint)
    samples, found = [], []
    if drawn is None and answers is not None:
        found.append(after(model, layers, prefix, [shown], answers, greedy.seed, own)["trace"][0])
    for i in range(0, 0 if drawn is None else drawn.n, model.rows):
        got, own = decode(
            model, layers, [(prefix, j) for j in range(i, min(i + model.rows, drawn.n))], drawn
        )
        samples += got
        if answers is not None:
            found.append(after(model, layers, prefix, got, answers, drawn.seed, own, i)["trace"][0])
    return Reading(shown, samples, by_label(np.concatenate(found).mean(0)) if found else None)


def after(
    model,
    layers,
    prefix: Prefix,
    completions: list[Completion],
    answers,
    seed: int,
    own=None,
    first: int = 0,
) -> dict:
    """`answer_tree.probabilities_after` of one prompt, at temperature 1, as numpy arrays.

    own: the keys that `decode` returned with the completions, or None; first: the number of the first completion.
    """
    rows, longest = len(completions), max(len(c.token_ids) for c in completions)
    room = bucket(longest) if own is None else own[0][0].shape[2]
    tokens = np.stack([_padded(np.array(c.token_ids, np.int32), room, 0) for c in completions])
    # Other numbers than those of the samples: the survivors must not depend on the noise that drew a trace.
    keys = _keys(
        np.uint32(seed),
        np.full(rows, prefix.mark, np.uint32),
        -1 - first - np.arange(rows, dtype=np.int32),
    )
    model.note("probabilities", (bucket(prefix.length), room, rows, own is None))
    got = answer_probabilities.probabilities_after(
        model.params,
        model.config,
        prefix.device,
        np.array([prefix.length]),
        np.array([prefix.start]),
        tokens,
        np.array([len(c.token_ids) for c in completions]),
        answers,
        keys=keys,
        own=own,
        layers=layers,
        dtype=model.dtype,
    )
    return {name: np.asarray(x) for name, x in got.items()}


def by_label(row: np.ndarray) -> dict[str, float]:
    """A row [14] -> {label: value}."""
    return {label: float(x) for label, x in zip(CHEXPERT_14, row, strict=True)}
