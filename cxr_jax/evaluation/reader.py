"""Greedy reading of many images in fixed shapes, with the probability of each finding where it is asked for."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cxr_jax import rewards
from cxr_jax.data.prompts import Prompt
from cxr_jax.errors import UserError
from cxr_jax.inference import answer_probabilities, answer_rules, sampling
from cxr_jax.inference.answer_probabilities import ExpansionSettings, PromptEnds, Traces
from cxr_jax.inference.constrained import Constraint
from cxr_jax.inference.prompts import Grids, Prompts
from cxr_jax.labels import answers, phrase_reading
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.metrics import alarms
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.image_batches import pick
from cxr_jax.models.network.config import Config
from cxr_jax.models.tokenizer import Tokenizer, completion_text
from cxr_jax.rewards.terms import BYTES_PER_TOKEN, TRACE_TERMS
from cxr_jax.runtime import processes, sharding
from cxr_jax.runtime.layout import ONE_DEVICE, Layout, Watch
from cxr_jax.runtime.trees import Tree


class Readings(NamedTuple):
    """What a model said of N images, C tokens at most.

    Attributes:
        tokens: int [N, C].
        lengths: int [N], tokens of each completion.
        answer: bool [N, 14], labels that the answer names.
        valid: bool [N], whether the format was kept.
        opened: int [N, K], tokens that the prompts have opened the answers with (`Prompts.opened_ids`), or None.
        log_odds: float32 [N, 14] of naming each label after the trace, or None where nobody asked.
        exact_mass: float32 [N]: no probability is wrong by more than 1 minus this, or None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    answer: np.ndarray
    valid: np.ndarray
    opened: np.ndarray | None = None
    log_odds: np.ndarray | None = None
    exact_mass: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: "Sequence[Readings]") -> "Readings":
        """Join the readings of parts of a set."""
        # What one part does not have, none has.
        columns = zip(*parts, strict=True)
        joined: list[Any] = [
            None if column[0] is None else np.concatenate(column) for column in columns
        ]
        return cls(*joined)

    @property
    def probabilities(self) -> np.ndarray | None:
        """The probability that the answer names each label, float64 [N, 14], or None."""
        if self.log_odds is None:
            return None
        return 1 / (1 + np.exp(-self.log_odds.astype(float)))

    def has_answers_without_format(self, solution: np.ndarray) -> bool:
        """Tell whether answers name what is there, bool [N, 14], and no text holds the format; see `alarms`."""
        # Scores count the labels of valid texts alone: this is about the others.
        accuracy = float((self.answer & solution).any(axis=1).mean())
        return alarms.format_never_held(accuracy, float(self.valid.mean()))


class Samples(NamedTuple):
    """What a model said of N images in K completions each, drawn at temperature 1.

    Attributes:
        answer: bool [N, K, 14].
        valid: bool [N, K].
        log_odds: float32 [N, K, 14] of naming each label after each trace.
    """

    answer: np.ndarray
    valid: np.ndarray
    log_odds: np.ndarray


class Reader:
    """Reads greedily in fixed shapes: one compiled program for any number of images, one more with probabilities."""

    def __init__(
        self,
        model_config: Config,
        tokenizer: Tokenizer,
        prompts: Prompts,
        batch_size: int,
        dtype: DTypeLike = jnp.float32,
        lexicon: str | None = None,
        poll: Callable[[], None] | None = None,
        layout: Layout = ONE_DEVICE,
        unwatched: Watch | None = None,
    ) -> None:
        """Compile nothing yet: that happens with the first images.

        Args:
            batch_size: images at once; rounded up to divide evenly over the devices of `layout`.
            dtype: of the computation.
            lexicon: a file of words of the traces beyond labels/lexicon.toml.
            poll: called before each batch; what it raises ends the reading.
            unwatched: see `Layout.on_mesh`.
        """
        self.tokenizer, self.prompts, self.layout = tokenizer, prompts, layout
        self.model_config, self.dtype, self.unwatched = model_config, dtype, unwatched
        # Completions an image -> the program that draws them.
        self._draw_batch: dict[int, Callable] = {}
        self.poll = poll or _go_on
        # JAX divides rows evenly or not at all.
        self.batch_size = -(-batch_size // layout.shards) * layout.shards
        # Compiled for the mesh; the terms of traces are small, and computed on one device.
        self._read_batch, self._weigh_batch = (
            layout.on_mesh(jax.jit(self._reading_program(model_config, dtype, weighs)), unwatched)
            for weighs in (False, True)
        )
        self._score_traces = jax.jit(self._trace_program(lexicon))

    def _reading_program(self, model_config: Config, dtype: DTypeLike, weighs: bool) -> Callable:
        # Ids without text, and those of media, can never be drawn.
        special = tokenizers.special_ids(self.tokenizer, model_config.text.vocab_size)
        token_bytes, byte_limit = self._bytes_of_tokens()

        def read(params: Tree, batch: Tree, rules: Constraint | None = None) -> tuple:
            # Whole once, before the loop that uses them at every token (see `gather_weights`).
            params = sharding.gather_weights(params, dtype)
            # Every image once; its features stand in the prompt, so the loop never sees pixels.
            features = self.prompts.images.features(params, batch, dtype=dtype)
            # One completion a prompt, of the likeliest tokens: evaluation has no noise of its own.
            sampled = sampling.sample_completions(
                params,
                model_config,
                features,
                batch["prompts"],
                special,
                n=1,
                max_new_tokens=self.prompts.max_completion,
                temperature=0.0,
                prompts_kept=weighs,
            )
            tokens, lengths = sampled["tokens"], sampled["lengths"]
            # Read on the device, by the parser that rewards use: both judge an answer alike.
            opened = batch["prompts"].get("opened")
            parsed = answers.parse_tokens(tokens, lengths, token_bytes, byte_limit, opened)
            weighed: tuple[Any, ...] = ()
            if weighs:
                assert rules is not None
                found = self._weigh(params, rules, batch, sampled, dtype)
                weighed = found["log_odds"][:, 0], found["exact_mass"][:, 0]
            return tokens, lengths, parsed["answer"], parsed["format"], *weighed

        return read

    def _weigh(
        self, params: Tree, rules: Constraint, batch: Tree, sampled: dict, dtype: DTypeLike
    ) -> dict:
        """The tree of answers behind each completion of a batch. Inside jit."""
        # On the prompt that the answer was drawn from; of the trace all tokens go through the model at once.
        lengths, width = batch["prompts"]["lengths"], batch["prompts"]["ids"].shape[1]
        start = network.next_positions(batch["prompts"]["positions"][:, :, :width], lengths)
        # Completions of a prompt, one of the greedy reading.
        of_each = len(sampled["tokens"]) // len(lengths)
        return answer_probabilities.weigh_answers(
            params,
            self.model_config,
            PromptEnds(sampled["prompts"], lengths, start),
            Traces(sampled["tokens"], sampled["lengths"]),
            rules._replace(start=jnp.repeat(batch["rules_start"], of_each)),
            ExpansionSettings(dtype=dtype),
            keys=keys_of(sampled["tokens"], sampled["lengths"]),
        )

    def _drawing_program(self, model_config: Config, dtype: DTypeLike, count: int) -> Callable:
        special = tokenizers.special_ids(self.tokenizer, model_config.text.vocab_size)
        token_bytes, byte_limit = self._bytes_of_tokens()

        def draw(params: Tree, batch: Tree, rules: Constraint) -> tuple:
            params = sharding.gather_weights(params, dtype)
            # An image once for all its completions.
            features = self.prompts.images.features(params, batch, dtype=dtype)
            # By seed, image and number: what is drawn depends on no batch.
            keys = jax.vmap(
                lambda row: jax.vmap(jax.random.fold_in, (None, 0))(
                    jax.random.fold_in(jax.random.key(0), row), jnp.arange(count)
                )
            )(batch["row"])
            sampled = sampling.sample_completions(
                params,
                model_config,
                features,
                batch["prompts"],
                special,
                n=count,
                max_new_tokens=self.prompts.max_completion,
                temperature=1.0,
                keys=keys.reshape(-1),
                prompts_kept=True,
            )
            opened = batch["prompts"].get("opened")
            # What the template has said stands before each of them.
            if opened is not None:
                opened = jnp.repeat(opened, count, axis=0)
            parsed = answers.parse_tokens(
                sampled["tokens"], sampled["lengths"], token_bytes, byte_limit, opened
            )
            log_odds = self._weigh(params, rules, batch, sampled, dtype)["log_odds"]
            shape = (len(batch["row"]), count)
            return parsed["answer"].reshape(*shape, -1), parsed["format"].reshape(shape), log_odds

        return draw

    def sample(
        self, params: Tree, images: Any, texts: Sequence[Prompt], rows: np.ndarray, count: int
    ) -> Samples:
        """Answer prompts `count` times each at temperature 1, and weigh the answers behind each trace.

        Args:
            images: as for `read`.
            rows: int [N], numbers of the images, from which the noise of each follows.

        Raises:
            UserError: if the tokenizer cannot spell valid answers.
        """
        # A program for each k, compiled when it is first asked for.
        if count not in self._draw_batch:
            program = jax.jit(self._drawing_program(self.model_config, self.dtype, count))
            self._draw_batch[count] = self.layout.on_mesh(program, self.unwatched)
        # As many completions at once as a reading has images.
        turn_size = max(1, self.batch_size // count // self.layout.shards) * self.layout.shards
        batch_samples = []
        for turn_start in range(0, len(texts), turn_size):
            self.poll()
            # The last batch is filled up, as in `read`.
            batch_rows = np.minimum(turn_start + self.layout.rows_of(turn_size), len(texts) - 1)
            batch_images, batch_texts = pick(images, batch_rows), [texts[row] for row in batch_rows]
            grids = self.prompts.images.grids(batch_images)
            batch = {
                **self.prompts.images.inputs(batch_images),
                "prompts": self.prompts.encode(batch_texts, grids),
                "rules_start": self._rule_starts(batch_texts, grids),
                "row": np.asarray(rows)[batch_rows].astype(np.int32),
            }
            drawn_samples = self._draw_batch[count](params, self.layout.batch(batch), self.rules)
            batch_samples.append(
                [
                    part[: len(texts) - turn_start]
                    for part in processes.gather_to_host(drawn_samples)
                ]
            )
        answer, valid, log_odds = (
            np.concatenate(parts) for parts in zip(*batch_samples, strict=True)
        )
        return Samples(answer.astype(bool), valid.astype(bool), log_odds)

    @functools.cached_property
    def rules(self) -> Constraint:
        """The rules of valid answers, which probabilities are of. Takes seconds, once.

        Raises:
            UserError: if the tokenizer cannot spell valid answers.
        """
        special = tokenizers.special_ids(self.tokenizer, self.model_config.text.vocab_size)
        rules = answer_rules.compile_answers(
            answers.TokenBytes.from_tokenizer(self.tokenizer),
            self.model_config.text.vocab_size,
            special["stop"],
            suppress_ids=special["suppress"],
            # Traces are given, so nothing has to end within these.
            max_new_tokens=512,
        )
        answer_probabilities.check_room(rules, ExpansionSettings())
        return rules

    def why_no_probabilities(self) -> str | None:
        """Say why the tokenizer cannot express valid answers; None if it can."""
        try:
            self.rules  # noqa: B018  compiled on first use
        except UserError as error:
            return str(error)
        return None

    @functools.cached_property
    def _start_of(self) -> Callable[[str], Any]:
        """Where the rules are after what a chat template has opened the answer with."""
        return functools.cache(lambda opened: self.rules.after_if_valid(opened).start)

    def _trace_program(self, lexicon: str | None) -> Callable:
        token_bytes, byte_limit = self._bytes_of_tokens()
        phrase_bank = load_phrase_bank(None, lexicon)

        def score(
            tokens: jax.Array, lengths: jax.Array, opened: jax.Array | None, truth: Tree
        ) -> dict[str, jax.Array]:
            # A finding that is there for certain, and not one that the truth itself hedges.
            certain = truth["solution"] & ~truth["hedged"]
            facts = phrase_reading.Truth.from_arrays(
                certain, truth["hedged"], truth["sides"], truth["known"]
            )
            parsed_traces = rewards.read_tokens(
                tokens, lengths, token_bytes, byte_limit, phrase_bank, facts, opened
            )
            # Those that nobody asks for are dropped by the compiler.
            reward_terms = rewards.reward_terms(parsed_traces, truth["solution"])
            return {term_name: reward_terms[term_name] for term_name in TRACE_TERMS}

        return score

    def _bytes_of_tokens(self) -> tuple[answers.TokenBytes, int]:
        """The bytes of each token, and how many bytes of a completion the parsers read at most."""
        token_bytes = answers.TokenBytes.from_tokenizer(self.tokenizer)
        token_count = self.prompts.max_completion + self.prompts.opened_width
        return token_bytes, token_count * BYTES_PER_TOKEN

    def read(
        self,
        params: Tree,
        images: Any,
        texts: Sequence[Prompt],
        row_names: Sequence[str] = (),
        *,
        weighs: bool = False,
    ) -> Readings:
        """Answer the prompts `texts` [N] about the images of each, greedily.

        Args:
            images: of N prompts, as a source gives them (`image_batches.images_of`).
            row_names: what a message calls each.
            weighs: whether the probability of naming each label is computed, too, after each trace: by the tree of all
                valid answers (`answer_probabilities`), which costs less than the reading twice over.

        Raises:
            UserError: if `weighs`, and the tokenizer cannot spell valid answers.
        """
        image_count, batch_outputs = len(texts), []
        for batch_start in range(0, image_count, self.batch_size):
            self.poll()
            # The last batch is filled with repeats of its last row: one shape, one program.
            batch_rows = np.minimum(
                batch_start + self.layout.rows_of(self.batch_size), image_count - 1
            )
            # Films of any size are a list, so rows are picked one by one.
            batch_images = pick(images, batch_rows)
            names = [row_names[row] for row in batch_rows] if row_names else ()
            batch_texts = [texts[image_index] for image_index in batch_rows]
            grids = self.prompts.images.grids(batch_images)
            batch = {
                **self.prompts.images.inputs(batch_images, names),
                "prompts": self.prompts.encode(batch_texts, grids),
            }
            # Each answer's rules begin behind what the template has said for it.
            if weighs:
                batch["rules_start"] = self._rule_starts(batch_texts, grids)
            # Of several processes each has made its share; `layout.batch` joins them.
            batch = self.layout.batch(batch)
            if weighs:
                outputs = self._weigh_batch(params, batch, self.rules)
            else:
                outputs = self._read_batch(params, batch)
            # Without the repeats that filled the last batch.
            batch_outputs.append(
                [
                    batch_output[: image_count - batch_start]
                    for batch_output in processes.gather_to_host(outputs)
                ]
            )
        # Every process has gathered all rows, so all return the same.
        tokens, lengths, answer, valid, *weighed = (
            np.concatenate(pieces) for pieces in zip(*batch_outputs, strict=True)
        )
        opened = self.prompts.opened_ids(texts, self.prompts.images.grids(images))
        return Readings(tokens, lengths, answer.astype(bool), valid.astype(bool), opened, *weighed)

    def _rule_starts(self, texts: Sequence[Prompt], grids: Grids | None) -> np.ndarray:
        """Where the rules are at the first token of each answer, int32 [B]."""
        each = [None] * len(texts) if grids is None else grids
        known = (self.prompts.known(text, own) for text, own in zip(texts, each, strict=True))
        return np.array([self._start_of(prompt.opened) for prompt in known], np.int32)

    def score_traces(self, readings: Readings, truth: Tree) -> dict[str, np.ndarray]:
        """Hold the traces against the answers and against what is so.

        Args:
            truth: "solution", "known", "hedged" bool [N, 14] and "sides" bool [N, 14, 2].

        Returns:
            Each of `rewards.TRACE_TERMS` as float32 [N].
        """
        reading_count, batch_terms = len(readings.tokens), []
        for batch_start in range(0, reading_count, self.batch_size):
            self.poll()
            # The same filling as in `read`, so here, too, one shape is compiled.
            batch_rows = np.minimum(
                np.arange(batch_start, batch_start + self.batch_size), reading_count - 1
            )
            facts = {
                term_name: truth[term_name][batch_rows]
                for term_name in ("solution", "known", "hedged", "sides")
            }
            values_by_term = self._score_traces(
                readings.tokens[batch_rows],
                readings.lengths[batch_rows],
                None if readings.opened is None else readings.opened[batch_rows],
                facts,
            )
            batch_terms.append(
                {
                    term_name: np.asarray(term_values)[: reading_count - batch_start]
                    for term_name, term_values in values_by_term.items()
                }
            )
        return {
            term_name: np.concatenate([batch_term[term_name] for batch_term in batch_terms])
            for term_name in TRACE_TERMS
        }

    def texts(self, readings: Readings, rows: Sequence[int]) -> list[str]:
        """Decode the completions of the given rows, with what the prompts have opened them with."""
        return [
            completion_text(
                self.tokenizer,
                readings.tokens[image_index],
                readings.lengths[image_index],
                None if readings.opened is None else readings.opened[image_index],
            )
            for image_index in rows
        ]


def keys_of(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Make typed keys [B] of completions int [B, C], folded from their tokens: numbers are functions of these alone."""
    # Powers of an odd number modulo 2^32: another token at any place gives another sum.
    powers = np.cumprod(np.full(tokens.shape[1], 0x01000193, np.uint32), dtype=np.uint32)
    counted = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens + 1, 0)
    mixed = (counted.astype(jnp.uint32) * powers).sum(1, dtype=jnp.uint32)
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(mixed)


def _go_on() -> None:
    """The poll of a reader that nobody stops."""
