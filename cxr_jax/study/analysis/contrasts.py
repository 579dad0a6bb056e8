"""Tables of arms, readers and cases, and differences of two arms: what all endpoints of a study are made of."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.study.analysis.rows import Row
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.statistics import paired

Result = dict[str, Any]


def pairs_of(protocol: Protocol, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Choose the pairs of arms that a study has."""
    return [pair for pair in wanted if set(pair) <= set(protocol.arms)]


def column(rows: Sequence[Row], name: str) -> Any:
    """List one column of the rows."""
    return [reading[name] for reading in rows]


def make_table(rows: Sequence[Row], arms: Sequence[str], name: str) -> np.ndarray:
    """Lay out one column as [arms, readers, cases]; NaN where there is no reading."""
    # Whoever has any reading has a row; empty cells are NaN.
    readers = sorted({reading["reader"] for reading in rows})
    cases = sorted({reading["case"] for reading in rows})
    table = np.full((len(arms), len(readers), len(cases)), np.nan)
    for reading in rows:
        if reading[name] is not None:
            place = (
                arms.index(reading["arm"]),
                readers.index(reading["reader"]),
                cases.index(reading["case"]),
            )
            table[place] = reading[name]
    return table


def contrast_of(
    protocol: Protocol, table: np.ndarray, first_arm: str, second_arm: str
) -> paired.PairedContrast:
    """Take the mean difference of two arms: of pairs in a crossed study, of readers' means in a split one.

    Whoever left the study before he had a pair says nothing of the difference, and nor does such a case; how many
    readers and pairs are left stands in the result.

    Raises:
        UserError: if fewer than two readers or cases are left.
    """
    arms = protocol.arms
    # Second less first, in all contrasts.
    before, after = table[arms.index(first_arm)], table[arms.index(second_arm)]
    if protocol.design == "crossed":
        difference = after - before
        is_there = ~np.isnan(difference)
        return paired.contrast(difference[is_there.any(1)][:, is_there.any(0)])
    per_reader = _reader_means(after) - _reader_means(before)
    return paired.contrast_of_readers(per_reader[np.isfinite(per_reader)])


def _reader_means(table: np.ndarray) -> np.ndarray:
    """Each reader's mean over the cases that he has; NaN for a reader without any."""
    counts = (~np.isnan(table)).sum(1)
    return np.where(counts > 0, np.nansum(table, 1) / np.maximum(counts, 1), np.nan)


def as_json(outcome: paired.PairedContrast) -> Result:
    """Give a contrast as analysis.json has it."""
    return {
        "estimate": outcome.estimate,
        "standard_error": outcome.standard_error,
        "degrees": outcome.degrees,
        "low": outcome.low,
        "high": outcome.high,
        "p_value": outcome.p_value,
        "readers": outcome.readers,
        "pairs": outcome.pairs,
    }


def at_random(rows: Sequence[Row]) -> list[list[Any]]:
    """Give the levels of readers, cases and reader by arm: what a model of answers takes at random.

    Without reader by arm, what an arm does would be the same for all readers but for chance, and few readers would
    count as many: intervals come out far too narrow where readers differ.
    """
    by_arm = [f"{reading['reader']}:{reading['arm']}" for reading in rows]
    return [column(rows, "reader"), column(rows, "case"), by_arm]


def wald(estimate: float, error: float) -> Result:
    """Give interval and two-sided test by the normal distribution, as R's packages have them.

    Raises:
        UserError: for an estimate or an error that is no finite number.
    """
    from scipy import stats

    if not (math.isfinite(estimate) and math.isfinite(error) and error > 0):
        raise UserError("the model has no finite effect")
    # Large samples: hundreds of readings stand behind one effect.
    reach = float(stats.norm.ppf(0.975)) * error
    return {
        "estimate": estimate,
        "standard_error": error,
        "low": estimate - reach,
        "high": estimate + reach,
        "p_value": float(2 * stats.norm.sf(abs(estimate) / error)),
    }


def with_readers_at_random(model: Result, of_readers: paired.PairedContrast) -> Result:
    """Let a model decide only together with a contrast that has Satterthwaite's degrees.

    The model has reader by arm at random, and takes few readers as many: its test is by the normal distribution. The
    contrast of the same cells knows how many readers there are; the larger p value of the two decides, so neither
    alone can make an effect.
    """
    return model | {
        "p_model": model["p_value"],
        "p_of_readers": of_readers.p_value,
        "p_value": max(model["p_value"], of_readers.p_value),
    }


def finite(value: Any) -> Any:
    """Replace numbers that are none by None, all the way down: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
