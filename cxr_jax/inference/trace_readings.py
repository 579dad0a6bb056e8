"""Readings with probabilities: an answer, samples beside it, and what the model would say after their traces."""

from typing import Any

import numpy as np

from cxr_jax.inference import answer_probabilities, generation, sampling
from cxr_jax.inference.answer_probabilities import ExpansionSettings, PromptEnds, Traces
from cxr_jax.inference.constrained import Constraint
from cxr_jax.inference.requests import Completion, GenerationSettings, Reading, ReadyModel, Request
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.runtime.trees import Tree


def read(
    model: ReadyModel,
    request: Request,
    greedy: GenerationSettings,
    drawn: GenerationSettings | None,
    constraint: Any,
    answers: Constraint | None,
) -> Reading:
    """Read one image, see `Model.read`.

    Args:
        drawn: settings of the samples, or None without.
        answers: the rules for probabilities, or None without.
    """
    # Once, for the reading that is shown and for all samples.
    prefix, layers = (
        generation.prefix_of(model, request),
        sampling.decode_layers(model.params, model.config),
    )
    # Traces are weighed as they come, while their keys are still at hand.
    reader = _TraceReader(model, layers, prefix, answers)
    [shown], own_keys = generation.decode(model, layers, [(prefix, 0)], greedy, None, constraint)
    # Without samples, the trace that is shown is the only one.
    if drawn is None:
        reader.add([shown], greedy.seed, own_keys, first=0)
        return Reading(shown, [], reader.mean())

    # In turns of as many rows as a decode program has.
    samples: list[Completion] = []
    row_count = generation.rows_for(model.rows, generation.bucket(prefix.length))
    for first_sample in range(0, drawn.n, row_count):
        sample_numbers = range(first_sample, min(first_sample + row_count, drawn.n))
        turn_completions, own_keys = generation.decode(
            model, layers, [(prefix, sample_number) for sample_number in sample_numbers], drawn
        )
        samples += turn_completions
        reader.add(turn_completions, drawn.seed, own_keys, first_sample)
    return Reading(shown, samples, reader.mean())


class _TraceReader:
    """Collects the probabilities after traces of one prompt; without rules, none."""

    def __init__(
        self,
        model: ReadyModel,
        layers: list[Tree],
        prefix: generation.Prefix,
        answers: Constraint | None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.prefix = prefix
        self.answers = answers
        # One array [rows, 14] for each turn.
        self.found: list[np.ndarray] = []

    def add(self, completions: list[Completion], seed: int, own_keys: list, first: int) -> None:
        # Without rules there is nothing to weigh an answer by.
        if self.answers is not None:
            after_traces = after(
                self.model,
                self.layers,
                self.prefix,
                completions,
                self.answers,
                seed,
                own_keys,
                first,
            )
            self.found.append(after_traces["trace"][0])

    def mean(self) -> dict[str, float] | None:
        if not self.found:
            return None
        # Over all traces alike, whatever turn they came in.
        return by_label(np.concatenate(self.found).mean(0))


def after(
    model: ReadyModel,
    layers: list[Tree],
    prefix: generation.Prefix,
    completions: list[Completion],
    answers: Constraint,
    seed: int,
    own_keys: list | None = None,
    first: int = 0,
) -> dict[str, np.ndarray]:
    """Compute `answer_probabilities.probabilities_after` of one prompt, at temperature 1, as numpy arrays.

    Args:
        own_keys: those that `decode` returned with the completions, or None.
        first: the number of the first completion.
    """
    row_count = len(completions)
    # Keys that are at hand tell how many slots there are; without, the longest trace does.
    longest_count = max(len(completion.token_ids) for completion in completions)
    slot_count = generation.bucket(longest_count) if own_keys is None else own_keys[0][0].shape[2]
    tokens = [
        generation.padded(np.array(completion.token_ids, np.int32), slot_count, 0)
        for completion in completions
    ]
    # Other numbers than those of the samples: the survivors must not depend on the noise that drew a trace.
    keys = generation.sample_keys(
        np.uint32(seed),
        np.full(row_count, prefix.mark, np.uint32),
        -1 - first - np.arange(row_count, dtype=np.int32),
    )
    # What makes another program, before it is compiled.
    model.note(
        "probabilities", (generation.bucket(prefix.length), slot_count, row_count, own_keys is None)
    )
    # One prompt, and all its completions as rows.
    probabilities = answer_probabilities.probabilities_after(
        model.params,
        model.config,
        PromptEnds(prefix.device, np.array([prefix.length]), np.array([prefix.start])),
        Traces(
            np.stack(tokens),
            np.array([len(completion.token_ids) for completion in completions]),
            own_keys,
        ),
        answers,
        ExpansionSettings(dtype=model.dtype),
        keys=keys,
        layers=layers,
    )
    return {name: np.asarray(values) for name, values in probabilities.items()}


def by_label(row: np.ndarray) -> dict[str, float]:
    """Name the 14 values of a row."""
    return {label: float(value) for label, value in zip(CHEXPERT_14, row, strict=True)}
