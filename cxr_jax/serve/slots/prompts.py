"""What an ask is to the device: checked and rendered on the caller's thread, computed on the engine's.

A prompt's beginning, its images above all, is computed in one piece, the rest in pieces of equal length on top of it:
a few programs for prompts of any length. What was computed is kept for a while: a second reading of the same prompt
costs nothing, and a follow-up costs what it adds to the conversation.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.inference import generation, sampling
from cxr_jax.inference.generation import Prefix, padded
from cxr_jax.inference.prompts import render_question
from cxr_jax.inference.requests import ReadyModel, Request, check_room
from cxr_jax.models.network import Seen
from cxr_jax.serve.asks import Ask
from cxr_jax.serve.slots import programs
from cxr_jax.serve.slots.layout import Layout
from cxr_jax.serve.slots.programs import Entry

_Key = tuple[tuple[Hashable, ...], tuple[int, ...]]

# ---- On the caller's thread --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An ask that is checked and rendered.

    Attributes:
        entry: what all its completions tell the device.
        picture_keys: names of its images, by content.
        positions: of its tokens, int32 [axes, 1, T].
        is_follow_up: whether it goes on after an answer.
    """

    request: Request
    entry: Entry
    picture_keys: tuple[Hashable, ...]
    positions: np.ndarray
    is_follow_up: bool

    @property
    def key(self) -> _Key:
        """Name the prompt by its content."""
        return self.picture_keys, tuple(self.request.ids)


def prepare(model: ReadyModel, layout: Layout, ask: Ask) -> Prepared:
    """Check an ask and render its prompt.

    Raises:
        UserError: for what `Model.generate` refuses, and for what has no place in the rooms.
    """
    settings = ask.settings
    # In the order of cost: what is refused should be so before pixels are touched.
    _check_stop(ask.stop)
    if settings.max_new_tokens > layout.long.own_slots:
        raise UserError(
            f"max_new_tokens={settings.max_new_tokens}: this server draws at most {layout.long.own_slots}"
        )
    # The model's own preparation, so that a picture is what `Model.generate` makes of it.
    pictures = model.pictures(list(ask.images) or None)
    grids = [picture.grid for picture in pictures]
    numbered = model.number_images
    rendered = render_question(
        model.tokenizer, model.config, ask.messages, grids, numbered=numbered
    )
    request = Request(rendered.ids, pictures, rendered.opened)
    check_room(model.config, len(request.ids), settings.max_new_tokens)
    _check_places(model, layout, request)
    # Now, and not after a whole trace has been drawn.
    if ask.probabilities:
        model.answers  # noqa: B018  raises where the tokenizer cannot express answers
    # Of the whole prompt, since an image shifts the text behind it.
    positions = request.positions(model.config)
    return Prepared(
        request=request,
        entry=_entry(model, ask, request, int(positions.max()) + 1),
        picture_keys=tuple(picture.key() for picture in pictures),
        positions=positions,
        is_follow_up=any(message["role"] == "assistant" for message in ask.messages),
    )


def _check_stop(stop: Any) -> None:
    is_texts = isinstance(stop, (tuple, list)) and all(isinstance(text, str) for text in stop)
    if not is_texts or not all(stop):
        raise UserError("stop must be a tuple of texts, none of them empty")


def _check_places(model: ReadyModel, layout: Layout, request: Request) -> None:
    """Refuse what is longer than the rooms, or shows more images than a prompt's beginning holds."""
    length, longest = len(request.ids), layout.long.prompt_slots
    if length > longest:
        raise UserError(f"the prompt has {length} tokens: this server reads at most {longest}")
    # Images are read in the first piece alone, where they may see each other both ways.
    image_tokens = np.flatnonzero(np.array(request.ids) == model.config.image_token_id)
    most = layout.prompt_buckets[-1]
    if len(image_tokens) and image_tokens[-1] >= most:
        raise UserError(f"the images end at token {image_tokens[-1] + 1}, beyond the first {most}")


def _entry(model: ReadyModel, ask: Ask, request: Request, start: int) -> Entry:
    settings, vocab_size = ask.settings, model.config.text.vocab_size
    is_greedy = settings.temperature == 0
    # A greedy choice has neither, whatever was asked for.
    top_k = vocab_size if is_greedy or settings.top_k is None else settings.top_k
    top_p = settings.top_p if not is_greedy and settings.top_p not in (None, 1) else 2
    rules = model.constraint(ask.constraint, settings.max_new_tokens, request.opened)
    if rules is not None and ask.constraint != "answers":
        raise UserError(f'constraint={ask.constraint!r}: use "answers"')
    return Entry(
        slot_number=np.int32(0),
        length=np.int32(len(request.ids)),
        start=np.int32(start),
        seed=np.uint32(settings.seed),
        mark=np.uint32(request.mark()),
        number=np.int32(0),
        temperature=np.float32(settings.temperature),
        top_k=np.int32(min(top_k, vocab_size)),
        top_p=np.float32(top_p),
        is_bound=np.bool_(rules is not None),
        rule_start=np.int32(0 if rules is None else rules.start),
        budget=np.int32(0 if rules is None else rules.budget),
    )


# ---- On the engine's thread --------------------------------------------------------------------------------


class Prompts:
    """Computes prompts, and keeps those asked for last, up to a number of bytes; so it does features of images."""

    def __init__(self, model: ReadyModel, layout: Layout, most_bytes: int) -> None:
        """Keep nothing yet."""
        self.model = model
        self.layout = layout
        self.most_bytes = most_bytes
        self.bytes = 0
        self._known: OrderedDict[_Key, tuple[list[int], Prefix]] = OrderedDict()
        self._features: OrderedDict[Hashable, Seen] = OrderedDict()

    def __len__(self) -> int:
        """Count the prompts that are kept."""
        return len(self._known)

    def of(self, prepared: Prepared) -> tuple[Prefix, int]:
        """Compute a prompt, or find it.

        Returns:
            (the prompt on the device, how many of its tokens had been computed before).
        """
        # The very same bits as before, so the same completion from the same seed.
        if prepared.key in self._known:
            self._known.move_to_end(prepared.key)
            return self._known[prepared.key][1], len(prepared.request.ids)
        request, longest = prepared.request, self.layout.long.prompt_slots
        # A first question is computed afresh whatever is kept: so its bits depend on nothing but itself.
        keys, kept = self._beginning(prepared) if prepared.is_follow_up else (None, 0)
        cached = kept
        if keys is None:
            device, kept = self._prefill(prepared)
            keys = device.keys
        # ---- The rest, a piece at a time ----
        if kept < len(request.ids):
            keys = programs.with_slots(keys, slots=longest)
        while kept < len(request.ids):
            device, kept = self.extend(keys, kept, prepared)
            keys = device.keys
        # In as many slots as the room has where it will be decoded.
        usual, length = self.layout.usual.prompt_slots, len(request.ids)
        if length <= usual < keys[0][0].shape[2]:
            device = device._replace(keys=programs.with_slots(keys, slots=usual))
        entry = prepared.entry
        prefix = Prefix(device, length, int(entry.start), int(entry.mark), request.opened)
        self._keep(prepared, prefix)
        return prefix, cached

    # ---- Pieces --------------------------------------------------------------------------------------------

    def _prefill(self, prepared: Prepared) -> tuple[sampling.ComputedPrompt, int]:
        """The first tokens in one piece, with all images: (computed, how many)."""
        request, layout = prepared.request, self.layout
        bucket_size = layout.bucket_of(len(request.ids))
        # Padded up to its length, or cut at it: what is left comes in pieces.
        first = dataclasses.replace(request, ids=request.ids[:bucket_size])
        features = [
            self._features_of(key, picture)
            for key, picture in zip(prepared.picture_keys, request.pictures, strict=True)
        ]
        # In the order of their places.
        joined = generation.join_features(features)
        prefix = generation.prefill(self.model, first, joined, slot_count=bucket_size)
        return prefix.device, len(first.ids)

    def _features_of(self, key: Hashable, picture: Any) -> Seen:
        if key not in self._features:
            [self._features[key]] = self.model.image_features(picture.patches, [picture.grid])
        self._features.move_to_end(key)
        # As many as there are prompts, and few at least: another question about a film is the usual case.
        while len(self._features) > max(16, len(self._known)):
            self._features.popitem(last=False)
        return self._features[key]

    def extend(
        self, keys: list, used: int, prepared: Prepared
    ) -> tuple[sampling.ComputedPrompt, int]:
        """Compute the next piece on top of `used` tokens: (computed, how many tokens there are then)."""
        chunk, longest = self.layout.chunk, self.layout.long.prompt_slots
        # The last piece may be short: padding behind it is never seen.
        new = np.array([prepared.request.ids[used : used + chunk]], np.int32)
        count = new.shape[1]
        tokens = sampling.PromptBatch(
            padded(new, chunk, 1, self.model.config.pad_token_id),
            np.array([count], np.int32),
            padded(prepared.positions[:, :, used : used + count], chunk, 2),
        )
        device = sampling.extend(
            self.model.params,
            self.model.config,
            keys,
            np.array([used], np.int32),
            tokens,
            room=longest,
            dtype=self.model.dtype,
        )
        return device, used + count

    # ---- What is kept --------------------------------------------------------------------------------------

    def _beginning(self, prepared: Prepared) -> tuple[list | None, int]:
        """The keys of the kept prompt that shares the most tokens, and how many; its images must be the same."""
        ids, best, most = prepared.request.ids, None, 0
        for (picture_keys, _), (known_ids, prefix) in self._known.items():
            # By content: the same words about another film are another prompt.
            if picture_keys != prepared.picture_keys:
                continue
            # The last token is always computed: the answer is drawn from it.
            shared = _common(ids[:-1], known_ids)
            if shared > most:
                best, most = prefix, shared
        # An image itself cannot be read in the pieces that follow.
        if best is None or self.model.config.image_token_id in ids[most:]:
            return None, 0
        return best.device.keys, most

    def _keep(self, prepared: Prepared, prefix: Prefix) -> None:
        self._known[prepared.key] = prepared.request.ids, prefix
        self.bytes += _bytes_of(prefix)
        # The one that was just computed stays, however large it is.
        while self.bytes > self.most_bytes and len(self._known) > 1:
            _, (_, oldest) = self._known.popitem(last=False)
            self.bytes -= _bytes_of(oldest)


def _bytes_of(prefix: Prefix) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(prefix.device))


def _common(first: list[int], second: list[int]) -> int:
    """Count the leading tokens that two prompts share."""
    most = min(len(first), len(second))
    # Comparing slices is quicker than tokens one by one, and most follow-ups end here.
    if first[:most] == second[:most]:
        return most
    return next(index for index in range(most) if first[index] != second[index])
