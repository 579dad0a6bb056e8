"""Rewards of the user's in a run: checked before it, called between its two programs, watched at every step."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cxr_jax.config.reward_names import parse
from cxr_jax.config.sections import RunConfig
from cxr_jax.data.prompts import as_text
from cxr_jax.data.sources.base import Source
from cxr_jax.errors import FailedBetweenStepsError, UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.models.tokenizer import Tokenizer, completion_text
from cxr_jax.rewards import own as own_functions
from cxr_jax.rewards.own import OwnReward, RewardError
from cxr_jax.rl.reward_columns import RewardColumns
from cxr_jax.rl.rollout import make_weigh, one_row_each
from cxr_jax.runtime import processes
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.signals import Stop
from cxr_jax.runtime.trees import Tree

# What a Python reward is tried with before the run: an answer, and nothing at all.
_TRIAL_TEXTS = ("<think>The lungs are clear.</think><answer>No Finding</answer>", "")


# ---- Before the run ------------------------------------------------------------------------------------


def check(settings: RunConfig, train: Source) -> None:
    """Import the rewards, trace those of tokens and call those of texts once, before anything is written.

    Args:
        train: the source that prompts come from.

    Raises:
        UserError: for a reward that cannot be used, and for columns that are not there or that nobody reads.
    """
    # All of them are imported before one is tried: an import is cheap, a call may not be.
    rollout, data = settings.rollout, settings.data
    rewards = own_functions.load(rollout.rewards)
    if data.columns and not rewards:
        raise UserError("config.data.columns: nobody reads them without config.rl.rewards")
    # Read now, so that a row without a column is told before the run.
    columns = RewardColumns(data.columns, data.manifest)
    for reward in rewards:
        try:
            if reward.on_texts:
                _try_on_texts(
                    reward, train, columns, own_functions.SHARE_OF_STEP * settings.step_timeout
                )
            else:
                _try_on_tokens(reward, settings, columns)
        except RewardError as error:
            raise UserError(f"config.rl.rewards: {error}") from error


def _try_on_tokens(reward: OwnReward, settings: RunConfig, columns: RewardColumns) -> None:
    rollout = settings.rollout
    # The shapes of a step: a reward that passes here does in the program, too.
    P, G = rollout.prompts_per_step * rollout.oversample, rollout.group_size
    shapes = {"tokens": (P, G, settings.max_completion), "lengths": (P, G)}
    tokens = {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}
    # Traced alone: nothing is compiled, or computed.
    jax.eval_shape(
        reward.of_tokens, tokens["tokens"], tokens["lengths"], abstract_batch(P, columns)
    )


def abstract_batch(count: int, columns: RewardColumns) -> Tree:
    """Describe what rewards of tokens see of a batch of `count` prompts."""
    # The arrays of the truth, as every source fills them.
    labels = len(CHEXPERT_14)
    batch: Tree = {
        name: jax.ShapeDtypeStruct((count, labels), bool)
        for name in ("solution", "known", "hedged")
    }
    batch["sides"] = jax.ShapeDtypeStruct((count, labels, 2), bool)
    if columns.shapes:
        batch["columns"] = {
            name: jax.ShapeDtypeStruct((count, *shape), np.float32)
            for name, shape in columns.shapes.items()
        }
    return batch


def _try_on_texts(reward: OwnReward, train: Source, columns: RewardColumns, seconds: float) -> None:
    # A row that is there, with what the run will hand over, and made-up labels.
    about = train.about([0, 0])
    rows = [
        {
            "id": row_id,
            "prompt": as_text(prompt),
            "solution": ["No Finding"],
            "known": [*CHEXPERT_14],
            **values,
        }
        for row_id, prompt, values in zip(
            about["ids"], about["prompts"], columns.rows(about["ids"]), strict=True
        )
    ]
    own_functions.call_within(seconds, reward, _TRIAL_TEXTS, rows)


def complete_shapes(settings: RunConfig, samples: Tree) -> Tree:
    """Describe the samples of a rollout as `OwnRewards.complete` gives them."""
    # Without rewards of texts the program says it all.
    if "reward" in samples:
        return samples
    shape = jax.ShapeDtypeStruct(samples["lengths"].shape, np.float32)
    own = {reward.function: shape for reward in parse(settings.rollout.rewards)}
    terms = {**own, **samples["terms"]}
    weighed = jax.eval_shape(make_weigh(settings.rollout), terms)
    return {**samples, "terms": terms, **weighed}


# ---- At every step -------------------------------------------------------------------------------------


class OwnRewards:
    """What a run does with the rewards that its user brought along.

    Attributes:
        functions: all of them.
        columns: of the manifest, which they read.
        seconds: that those of texts took at the last step.
    """

    def __init__(self, settings: RunConfig, tokenizer: Tokenizer, stop: Stop) -> None:
        """Import the functions, and read the columns of the manifest."""
        self.functions = own_functions.load(settings.rollout.rewards)
        self.columns = RewardColumns(settings.data.columns, settings.data.manifest)
        self.seconds = 0.0
        self._tokenizer, self._stop = tokenizer, stop
        self._limit = own_functions.SHARE_OF_STEP * settings.step_timeout
        self._on_texts = [reward for reward in self.functions if reward.on_texts]
        self._weigh: Callable[..., Tree] = make_weigh(settings.rollout)

    @classmethod
    def open(
        cls, settings: RunConfig, tokenizer: Tokenizer, stop: Stop, run_folder: RunFolder
    ) -> "OwnRewards":
        """Import the functions, and hold their code against that which the run began with."""
        own = cls(settings, tokenizer, stop)
        own.remember(run_folder)
        return own

    def remember(self, run_folder: RunFolder) -> None:
        """Keep which code the rewards have in the run's folder, and say where a resumed run has other code."""
        # Kept once, when the run begins.
        now = own_functions.fingerprints(self.functions)
        if not now:
            return
        if not processes.have_same(json.dumps(now)):
            raise UserError("config.rl.rewards: the processes differ in the code of the rewards")
        before = run_folder.data.get("rewards", now) if processes.is_main() else now
        for name, code in now.items():
            if before.get(name) != code:
                print(
                    f"warning: the file of the reward {name} has changed since the run began; it goes on with the "
                    "file as it is",
                    file=sys.stderr,
                    flush=True,
                )
        run_folder.remember(rewards=now)

    def complete(self, samples: Tree, batch: Tree, rows: Sequence[dict[str, Any]]) -> Tree:
        """Add the rewards of texts to the samples of a rollout, and see that all own rewards are numbers.

        Every process calls it at the same point; the functions are called on the first one.

        Args:
            samples: of the rollout.
            batch: that it was made from, on the devices.
            rows: what is known of each prompt, in the order of the batch.

        Raises:
            FailedBetweenStepsError: for a reward that fails, hangs or is not finite, on all processes.
        """
        # Most runs: nothing is fetched, nobody waits.
        if not self.functions:
            return samples
        # The rollout is over: the limit is for what comes now.
        self._stop.beat()
        began = time.monotonic()
        failure: RewardError | None = None
        found: dict[str, np.ndarray] = {}
        try:
            self._check_finite(samples)
        except RewardError as error:
            failure = error
        if failure is None and self._on_texts:
            call = self._texts_and_rows(samples, batch, rows)  # on all processes: it gathers
            try:
                found = self._call(*call)
            except RewardError as error:
                failure = error
        self._stop.beat()  # a save may follow
        # One that failed alone would leave the others waiting.
        if processes.agree(failure is not None):
            line = f"{failure or 'a reward failed on another process: see its line'}"
            raise FailedBetweenStepsError(
                f"reward {line}; the run is saved as it was before this step"
            ) from failure
        self.seconds = time.monotonic() - began
        # The program has summed all there is.
        if not self._on_texts:
            return samples
        # From here on all processes hold the same numbers.
        shape = samples["lengths"].shape
        terms = {
            reward.name: processes.array_from_main(found.get(reward.name), shape)
            for reward in self._on_texts
        }
        terms = {**samples["terms"], **terms}
        return {**samples, "terms": terms, **self._weigh(terms)}

    def _check_finite(self, samples: Tree) -> None:
        # Fetched one by one: a few numbers each.
        for reward in self.functions:
            if not reward.on_texts:
                values = processes.gather_to_host(samples["terms"][reward.name])
                own_functions.check_finite(reward.place, values)

    def _texts_and_rows(
        self, samples: Tree, batch: Tree, rows: Sequence[dict[str, Any]]
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """What the functions are called with, completion by completion."""
        read = {name: samples[name] for name in ("tokens", "lengths")}
        truth = {name: batch[name] for name in ("solution", "known")}
        truth["opened"] = batch["prompts"].get("opened")
        arrays, truth = processes.gather_to_host((read, truth))
        arrays |= one_row_each(truth, len(arrays["lengths"]))
        # One process calls the functions: others would pay for the same answers.
        if not processes.is_main():
            return [], []
        # Texts as people see them, with what the template has opened.
        P, G = arrays["lengths"].shape
        texts = [
            completion_text(
                self._tokenizer,
                arrays["tokens"][p, g],
                arrays["lengths"][p, g],
                None if arrays["opened"] is None else arrays["opened"][p],
            )
            for p in range(P)
            for g in range(G)
        ]
        # The labels come from the batch: a row may stand in for one that cannot be read.
        truths = [
            {**row, "solution": _names(arrays["solution"][p]), "known": _names(arrays["known"][p])}
            for p, row in enumerate(rows)
        ]
        return texts, [truths[p] for p in range(P) for _ in range(G)]

    def _call(self, texts: list[str], rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        if not processes.is_main():
            return {}
        return {
            reward.name: own_functions.call_within(self._limit, reward, texts, rows)
            for reward in self._on_texts
        }


def _names(flags: np.ndarray) -> list[str]:
    return [name for name, is_set in zip(CHEXPERT_14, flags, strict=True) if is_set]
