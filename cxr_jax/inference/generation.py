"""Completions for readers: fixed shapes, streaming. `Model.generate` and `Chat` use it.

A completion is to depend on its own prompt, settings, seed and number only. The noise does by its keys
(`sampling`); for the logits to do so to the last bit, every program that a prompt meets has a shape that follows
from the prompt and the settings alone: images and prompts are computed one by one, prompts of one length bucket
are decoded together, always in the same number of rows (`rows_at_once`). So few programs are compiled, too.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cxr_jax.inference import sampling
from cxr_jax.inference.requests import (
    Completion,
    GenerationSettings,
    GrowingText,
    ReadyModel,
    Request,
    text_of,
)
from cxr_jax.models import network
from cxr_jax.models.tokenizer import Tokenizer
from cxr_jax.runtime.trees import Tree

# Often enough to look fluent; each call costs a way to the host and back.
STREAM_EVERY = 8  # tokens between two calls of a stream's callback

RowStream = Callable[[int, str], None]
"""Called with (row, new text)."""


# ---- Shapes ------------------------------------------------------------------------------------------------


def bucket(length: int) -> int:
    """Find the smallest of 64, 128, 192, 256, 384, 512, 768, 1024, ... that holds `length`: powers of 2 and halfway
    marks."""
    # The least length that is worth a program of its own.
    bucket_size = 64
    while bucket_size < length:
        is_power = bucket_size & (bucket_size - 1) == 0
        if bucket_size == 64:
            bucket_size = 128
        elif is_power:
            bucket_size += bucket_size // 2
        else:
            bucket_size += bucket_size // 3
    return bucket_size


ROWS_ON_ACCELERATORS = 16


def rows_at_once() -> int:
    """Choose the rows of every decode program; more rows go in turns, fewer are filled up.

    One count for all calls, because XLA rounds a row differently among 2, 4 or 16 rows (a few 1e-6 in a log-prob).
    Few on a CPU, where an idle row costs time: one answer takes twice as long among 8 rows as among 2. An
    accelerator reads the same weights for one row as for 16.
    """
    return 8 if jax.default_backend() == "cpu" else ROWS_ON_ACCELERATORS


# Slots up to which every row of a decode program has its copy of its prompt's keys: 36 kB a slot in a 3B, in float32.
_LONG_PROMPT = 4096


def rows_for(rows: int, slot_count: int) -> int:
    """Choose the rows of a decode program for prompts of so many slots: fewer than `rows` where prompts are long.

    A prompt with a full-size film has 12,288 slots: its keys take 0.9 GB a row in the 3B (float32). A function of the
    bucket alone, for the same reason as `rows_at_once`.
    """
    return max(1, min(rows, rows * _LONG_PROMPT // slot_count))


def padded(values: np.ndarray, length: int, axis: int, fill: int = 0) -> np.ndarray:
    """Pad one axis at its end to `length`."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, length - values.shape[axis])
    return np.pad(values, widths, constant_values=fill)


# ---- Prompts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefix:
    """A prompt on the device (see `sampling`), its length, the position of the next token, its content's mark, and
    what it has opened the answer with."""

    device: sampling.ComputedPrompt
    length: int
    start: int
    mark: int
    opened: str


def prefill(
    model: ReadyModel,
    request: Request,
    features: network.Seen | None,
    slot_count: int | None = None,
) -> Prefix:
    """Compute a whole prompt in slot_count slots (None: `bucket`); features of its images, joined, [I, D], or None."""
    model_config, length = model.config, len(request.ids)
    slot_count = slot_count or bucket(length)
    # Told before it is compiled, so that a log shows what takes the time.
    model.note("prefill", slot_count)
    positions = request.positions(model_config)
    # As many slots as tokens, with an image or without: one program a bucket.
    padded_features = _no_image(model, slot_count)
    if features is not None:
        for slots, tokens in zip(
            jax.tree.leaves(padded_features), jax.tree.leaves(features), strict=True
        ):
            slots[0, : len(tokens)] = tokens
    token_ids = np.array([request.ids], np.int32)
    batch = sampling.PromptBatch(
        padded(token_ids, slot_count, 1, model_config.pad_token_id),
        np.array([length], np.int32),
        padded(positions, slot_count, 2),
        padded_features,
    )
    device = sampling.prefill(model.params, model_config, batch, dtype=model.dtype)
    # One past the largest position, as `next_positions` has it for batches.
    return Prefix(device, length, int(positions.max()) + 1, request.mark(), request.opened)


def _no_image(model: ReadyModel, slot_count: int) -> network.Seen:
    """Zeros in the place of image tokens and taps [1, slots, D]."""
    # As many as with an image: a prompt without one then runs the same program.
    shape = 1, slot_count, model.config.text.hidden_size
    taps = len(model.config.vision.tapped)
    return network.Seen(
        np.zeros(shape, model.dtype), tuple(np.zeros(shape, model.dtype) for _ in range(taps))
    )


def prefix_of(model: ReadyModel, request: Request) -> Prefix:
    """Compute one prompt and its images."""
    return prefill(model, request, _Features(model, [request]).of_request(request))


def join_features(features: Sequence[network.Seen]) -> network.Seen | None:
    """Join what the tower gave for each image of a prompt, in the order of their places; None without images."""
    if len(features) < 2:
        return features[0] if features else None
    return jax.tree.map(lambda *of_images: np.concatenate(of_images), *features)


def extend(model: ReadyModel, keys: list, used: int, request: Request) -> Prefix:
    """Compute a prompt whose first `used` tokens have their keys already; the rest must hold no image."""
    model_config, length = model.config, len(request.ids)
    # Of the whole prompt, because an image in front shifts the text behind it.
    positions = request.positions(model_config)
    new_tokens = np.array([request.ids[used:]], np.int32)
    # Three lengths make the program: what is kept, what is new, and their sum.
    new_slots, kept_slots = bucket(new_tokens.shape[1]), keys[0][0].shape[2]
    model.note("extend", (kept_slots, new_slots, bucket(length)))
    tokens = sampling.PromptBatch(
        padded(new_tokens, new_slots, 1, model_config.pad_token_id),
        np.array([new_tokens.shape[1]], np.int32),
        padded(positions[:, :, used:], new_slots, 2),
    )
    device = sampling.extend(
        model.params,
        model_config,
        keys,
        np.array([used], np.int32),
        tokens,
        room=bucket(length),
        dtype=model.dtype,
    )
    return Prefix(device, length, int(positions.max()) + 1, request.mark(), request.opened)


# ---- Decoding ----------------------------------------------------------------------------------------------


class _Streamer:
    """Hands the new text of growing rows to a callback."""

    def __init__(self, tokenizer: Tokenizer, opened: list[str], stream: RowStream) -> None:
        self.texts = [GrowingText(tokenizer, row_opened) for row_opened in opened]
        self.has_ended = np.zeros(len(opened), bool)
        self.stream = stream

    def show(self, drawn: _Drawn, is_last: bool) -> None:
        for row_number in np.flatnonzero(~self.has_ended):
            # A stop token is part of the completion, and not of its text.
            is_done = drawn.done[row_number]
            token_ids = drawn.tokens[row_number, : drawn.counts[row_number] - is_done].tolist()
            # At the end whatever is held back comes out.
            piece = self.texts[row_number].add(token_ids, bool(is_done) or is_last)
            if piece:
                self.stream(int(row_number), piece)
        self.has_ended = drawn.done.copy()


@jax.jit
def sample_keys(seed: jax.Array, marks: jax.Array, numbers: jax.Array) -> jax.Array:
    """Make typed keys [R] folded from (seed, content of the prompt, number of the sample)."""
    fold = jax.random.fold_in
    # Folded one by one: each of the three changes the noise by itself.
    return jax.vmap(lambda mark, number: fold(fold(jax.random.key(seed), mark), number))(
        marks, numbers
    )


@dataclass(frozen=True)
class _Drawn:
    """What the rows of a decode hold so far, on the host: tokens and logprobs [R, N], counts and done [R]."""

    tokens: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    done: np.ndarray

    @staticmethod
    def of_state(state: sampling.State, live_rows: int) -> _Drawn:
        """The first `live` rows; the others only fill the batch."""
        values = (state.tokens, state.logprobs, state.lengths, state.done)
        return _Drawn(*(np.asarray(value)[:live_rows] for value in values))

    def completions(self, tokenizer: Tokenizer, opened: list[str]) -> list[Completion]:
        drawn_rows = zip(self.tokens, self.logprobs, self.counts, self.done, opened, strict=True)
        return [
            Completion(
                # The stop token counts as a token with its log-prob, and shows no text.
                row_opened + text_of(tokenizer, token_ids[: count - stopped].tolist()),
                token_ids[:count].tolist(),
                logprobs[:count].tolist(),
                "stop" if stopped else "length",
                row_opened,
            )
            for token_ids, logprobs, count, stopped, row_opened in drawn_rows
        ]


def decode(
    model: ReadyModel,
    layers: list[Tree],
    samples: list[tuple[Prefix, int]],
    settings: GenerationSettings,
    stream: RowStream | None = None,
    constraint: Any = None,
) -> tuple[list[Completion], list]:
    """Decode at most `rows_for` rows together.

    Args:
        layers: of `sampling.decode_layers`.
        samples: (prefix, number of the sample) of each row; all prefixes of one bucket.

    Returns:
        (a Completion for each, the keys of the drawn tokens).
    """
    live_rows, max_new_tokens = len(samples), settings.max_new_tokens
    rows, own_keys, rest = _begin(model, samples, settings, constraint)
    distribution, step_settings = _choice(model, settings)
    _note_decode(model, samples[0][0], settings, constraint)

    # ---- All tokens in one call, or a few at a time for who watches ----
    opened = [prefix.opened for prefix, _ in samples]
    streamer = None if stream is None else _Streamer(model.tokenizer, opened, stream)
    until, tokens_a_call = 0, max_new_tokens if stream is None else STREAM_EVERY
    # At least one call, so that `drawn` is what the state holds.
    drawn = None
    while drawn is None or (until < max_new_tokens and not drawn.done.all()):
        until = min(until + tokens_a_call, max_new_tokens)
        own_keys, rest = sampling.decode(
            model.params,
            layers,
            model.config,
            rows,
            distribution,
            own_keys,
            rest,
            np.int32(until),
            constraint,
            settings=step_settings,
        )
        drawn = _Drawn.of_state(rest, live_rows)
        if streamer is not None:
            streamer.show(drawn, is_last=until == max_new_tokens)
    return drawn.completions(model.tokenizer, opened), own_keys


def _begin(
    model: ReadyModel,
    samples: list[tuple[Prefix, int]],
    settings: GenerationSettings,
    constraint: Any,
) -> tuple[sampling.Rows, list, sampling.State]:
    """The batch before its first token (rows, own keys, the state without), filled up with copies of its first row."""
    # A filling row needs keys of the same shapes; nobody looks at what it draws.
    row_count = rows_for(model.rows, bucket(samples[0][0].length))
    full_batch = samples + samples[:1] * (row_count - len(samples))
    prefixes = [prefix for prefix, _ in full_batch]
    prompt_keys, own_keys, rest = sampling.begin(
        [prefix.device for prefix in prefixes],
        len(samples),
        constraint,
        model_config=model.config,
        room=bucket(settings.max_new_tokens),
        dtype=model.dtype,
    )
    rows = sampling.Rows(
        prompt_keys=prompt_keys,
        # As arrays: what changes from call to call must not be part of the program.
        prompt_lengths=_integers(prefix.length for prefix in prefixes),
        start=_integers(prefix.start for prefix in prefixes),
        random_keys=sample_keys(
            np.uint32(settings.seed),
            np.array([prefix.mark for prefix in prefixes], np.uint32),
            _integers(number for _, number in full_batch),
        ),
    )
    return rows, own_keys, rest


def _integers(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), np.int32)


def _choice(
    model: ReadyModel, settings: GenerationSettings
) -> tuple[sampling.Distribution, sampling.StepSettings]:
    """The settings as `sampling.decode` takes them; greedy decoding has neither top_k nor top_p."""
    is_greedy = settings.temperature == 0
    # At 1, where it does nothing: greedy choice knows no temperature.
    distribution = sampling.Distribution(np.float32(1))
    if not is_greedy:
        top_k, top_p = settings.top_k, settings.top_p
        distribution = sampling.Distribution(
            temperature=np.float32(settings.temperature),
            # No more than there are: the program looks up the k-th largest.
            top_k=None if top_k is None else np.int32(min(top_k, model.config.text.vocab_size)),
            top_p=None if top_p in (None, 1) else np.float32(top_p),
        )
    # Static: another value of these is another program.
    return distribution, sampling.StepSettings(
        greedy=is_greedy,
        stop_ids=model.special["stop"],
        suppress_ids=model.special["suppress"],
        dtype=model.dtype,
    )


def _note_decode(
    model: ReadyModel, prefix: Prefix, settings: GenerationSettings, constraint: Any
) -> None:
    """Tell the model what makes another decode program."""
    is_greedy = settings.temperature == 0
    # Another constraint of the same shapes is the same program.
    rules = (
        jax.tree.structure(constraint),
        tuple(np.shape(leaf) for leaf in jax.tree.leaves(constraint)),
    )
    model.note(
        "decode",
        (
            bucket(prefix.length),
            bucket(settings.max_new_tokens),
            is_greedy,
            # Without a limit the program has no sort.
            is_greedy or settings.top_k is None,
            is_greedy or settings.top_p in (None, 1),
            rules,
        ),
    )


def complete(
    model: ReadyModel,
    requests: list[Request],
    settings: GenerationSettings,
    stream: Callable[[int, int, str], None] | None = None,
    constraints: Mapping[str, Any] | None = None,
) -> list[list[Completion]]:
    """Draw settings.n completions of each request.

    Args:
        stream: called with (request, sample, new text).
        constraints: for each `Request.opened` the rules that its completions follow.
    """
    # Made once for all turns of the call.
    layers = sampling.decode_layers(model.params, model.config)
    prompts = _Prompts(model, requests)

    # ---- Prompts of one length bucket are decoded together, if their answers have begun alike ----
    groups: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for request_index, request in enumerate(requests):
        samples = [(request_index, sample_number) for sample_number in range(settings.n)]
        groups.setdefault((bucket(len(request.ids)), request.opened), []).extend(samples)

    # ---- in turns of as many rows as a program has ----
    completions: dict[tuple[int, int], Completion] = {}
    for (slot_count, opened), group_samples in groups.items():
        row_count = rows_for(model.rows, slot_count)
        for first_sample in range(0, len(group_samples), row_count):
            turn_samples = group_samples[first_sample : first_sample + row_count]
            turn_rows = prompts.of_turn(turn_samples)
            turn_completions, _ = decode(
                model,
                layers,
                turn_rows,
                settings,
                _stream_of_turn(stream, turn_samples),
                None if constraints is None else constraints[opened],
            )
            # Whatever order the turns came in, each goes to its request and number.
            completions.update(zip(turn_samples, turn_completions, strict=True))
    return [
        [completions[request_index, sample_number] for sample_number in range(settings.n)]
        for request_index in range(len(requests))
    ]


def _stream_of_turn(
    stream: Callable[[int, int, str], None] | None, turn: list[tuple[int, int]]
) -> RowStream | None:
    if stream is None:
        return None
    # Rows of a turn are numbered from 0, and the caller counts requests and samples.
    return lambda row, piece: stream(*turn[row], piece)


class _Prompts:
    """The prompts of a call, computed when their turn comes: each once, and each image once for all its prompts."""

    def __init__(self, model: ReadyModel, requests: list[Request]) -> None:
        self.model = model
        self.requests = requests
        self.features = _Features(model, requests)
        self.computed: dict[int, Prefix] = {}

    def of_turn(self, turn_samples: list[tuple[int, int]]) -> list[tuple[Prefix, int]]:
        """The rows of a turn of (request, sample); prompts of earlier turns that are over are let go."""
        # What an earlier turn has computed and this one needs again is kept.
        self.computed = {
            request_index: self.computed.get(request_index) or self._compute(request_index)
            for request_index in dict(turn_samples)
        }
        return [
            (self.computed[request_index], sample_number)
            for request_index, sample_number in turn_samples
        ]

    def _compute(self, request_index: int) -> Prefix:
        request = self.requests[request_index]
        return prefill(self.model, request, self.features.of_request(request))


class _Features:
    """What the tower makes of the images of a call: of each once, however many prompts show it."""

    def __init__(self, model: ReadyModel, requests: list[Request]) -> None:
        self.model = model
        # By content; hashed once for each time that an image is shown.
        self.keys = {
            id(request): [picture.key() for picture in request.pictures] for request in requests
        }
        self.to_come = Counter(itertools.chain(*self.keys.values()))
        self.known: dict[Any, network.Seen] = {}

    def of_request(self, request: Request) -> network.Seen | None:
        """The features of a request's images, joined; None without any. To be asked for once."""
        features = []
        for picture, key in zip(request.pictures, self.keys[id(request)], strict=True):
            # One by one, so that no program depends on what stands beside an image.
            if key not in self.known:
                [self.known[key]] = self.model.image_features(picture.patches, [picture.grid])
            features.append(self.known[key])
            # The features of an image are let go with its last prompt.
            self.to_come[key] -= 1
            if not self.to_come[key]:
                del self.known[key]
        return join_features(features)
