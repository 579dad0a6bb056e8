"""Time to signature: a linear mixed model of its logarithm with readers, cases and reader-by-arm at random.

Without the reader-by-arm term the standard error of an arm is a third too small: readers differ in what an arm does
for them. Fitted by REML as R's lme4 does it, whose numbers it gives to six digits (tests/study). `statsmodels` was not
kept for this: where a spread is nothing, it may stop at the wrong place and call that converged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jax.typing import ArrayLike
from scipy import linalg, optimize

from cxr_jax.errors import RunFailedError, UserError

# Spreads relative to the residual's that the search begins from.
_STARTS = (1.0, 0.2)


@dataclass(frozen=True, kw_only=True)
class MixedFit:
    """Fixed effects with their standard errors, and the variances of what is random.

    Attributes:
        names: of the fixed effects, the intercept first.
        variances: reader, case, reader_arm, residual.
    """

    names: tuple[str, ...]
    estimates: np.ndarray
    standard_errors: np.ndarray
    variances: Mapping[str, float]  # of log seconds, squared
    reml_deviance: float

    def effect(self, name: str) -> tuple[float, float]:
        """Give one fixed effect: estimate and standard error."""
        place = self.names.index(name)
        return float(self.estimates[place]), float(self.standard_errors[place])


def design_matrix(
    arms: Sequence[str],
    reference: str,
    *,
    abnormal: ArrayLike | None = None,
    sessions: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Build the fixed effects: arms against a reference, and where given abnormal, its interaction, order of reading.

    Args:
        abnormal: bool, one a row; centred, so that an arm's effect is that of the average case.
        sessions: numbers of the sessions, linear and centred.
        positions: places within the session, linear, centred and in units of ten cases.

    Returns:
        float [rows, effects] and the effects' names.
    """
    # Against the reference, in the order of the alphabet: R's treatment contrasts.
    arm_values = np.asarray(arms)
    columns, names = [np.ones(len(arm_values))], ["intercept"]
    others = [name for name in dict.fromkeys(arms) if name != reference]
    for name in sorted(others):
        columns.append((arm_values == name).astype(float))
        names.append(name)
    # A study of one kind of case has nothing to interact with.
    if abnormal is not None and len(np.unique(np.asarray(abnormal))) > 1:
        centred = np.asarray(abnormal, float) - np.mean(np.asarray(abnormal, float))
        columns.append(centred)
        names.append("abnormal")
        for name in sorted(others):
            columns.append((arm_values == name) * centred)
            names.append(f"{name}:abnormal")
    # Constant columns would make the model singular: one session is no effect.
    for name, values, unit in (("session", sessions, 1.0), ("position", positions, 10.0)):
        if values is not None and len(np.unique(np.asarray(values))) > 1:
            # Centred, so that arms are compared in the middle of the study.
            numbers = np.asarray(values, float) / unit
            columns.append(numbers - numbers.mean())
            names.append(name)
    return np.stack(columns, axis=1), tuple(names)


def fit_mixed(
    outcome: ArrayLike,
    fixed: np.ndarray,
    names: Sequence[str],
    *,
    readers: Sequence[object],
    cases: Sequence[object],
    arms: Sequence[object] | None,
) -> MixedFit:
    """Fit outcome = fixed + (1|reader) + (1|case) + (1|reader:arm) by REML.

    Args:
        outcome: float [rows], log seconds.
        fixed: [rows, effects], with an intercept (`design_matrix`).
        arms: None leaves the reader-by-arm term out, to show what that does.

    Raises:
        UserError: for an outcome that is not finite, fewer rows than effects, or effects that no row tells apart.
        RunFailedError: if no start leads to an optimum.
    """
    values, matrix = np.asarray(outcome, float), np.asarray(fixed, float)
    _check_rows(values, matrix)
    random = {"reader": list(map(str, readers)), "case": list(map(str, cases))}
    if arms is not None:
        random["reader_arm"] = [f"{who}:{arm}" for who, arm in zip(readers, arms, strict=True)]
    # Readers and cases cross: all their levels stand in one sparse design.
    profile = _Profile(values, matrix, list(random.values()))

    # ---- The best of several starts: a spread of nothing is a place where slopes vanish ----
    bounds = [(0.0, None)] * len(random)
    best = None
    for start in _STARTS:
        # Few numbers and a smooth function: slopes by differences are good enough.
        found = optimize.minimize(
            profile.deviance,
            np.full(len(random), start),
            method="L-BFGS-B",
            bounds=bounds,
            options={"ftol": 1e-13, "gtol": 1e-8},
        )
        if np.isfinite(found.fun) and (best is None or found.fun < best.fun - 1e-9):
            best = found
    if best is None:
        raise RunFailedError("time: the mixed model has no optimum")
    # The effects' errors take the spreads as known, as lme4's do.
    estimates, covariance, residual = profile.effects(best.x)
    variances = {
        name: float(ratio**2 * residual) for name, ratio in zip(random, best.x, strict=True)
    }
    return MixedFit(
        names=tuple(names),
        estimates=estimates,
        standard_errors=np.sqrt(np.diagonal(covariance)),
        variances=variances | {"residual": float(residual)},
        reml_deviance=float(best.fun),
    )


def _check_rows(values: np.ndarray, matrix: np.ndarray) -> None:
    """Refuse rows that no model can be fitted to. Raises UserError."""
    if not np.isfinite(values).all():
        raise UserError("time: a row has no finite logarithm")
    if len(values) <= matrix.shape[1]:
        raise UserError("time: fewer rows than effects")
    # Arms that each had a session of its own, say: no data could tell the two apart.
    if np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        raise UserError("time: arms, order and kinds of case cannot be told apart in these rows")


class _Profile:
    """REML deviance as a function of spreads relative to the residual's; all else is solved for (Bates 2015).

    Only products of the design with itself are kept, so one evaluation costs a Cholesky factor of as many rows as
    there are random effects, however many readings there are.
    """

    def __init__(
        self, outcome: np.ndarray, fixed: np.ndarray, random: Sequence[Sequence[str]]
    ) -> None:
        columns, term_of_level = [], []
        for term, levels in enumerate(random):
            names, numbers = np.unique(np.asarray(levels), return_inverse=True)
            columns.append(np.eye(len(names))[numbers])
            term_of_level += [term] * len(names)
        incidence = np.concatenate(columns, axis=1)
        self.term_of_level = np.array(term_of_level)
        self.random_random = incidence.T @ incidence
        self.random_fixed = incidence.T @ fixed
        self.random_outcome = incidence.T @ outcome
        self.fixed_fixed = fixed.T @ fixed
        self.fixed_outcome = fixed.T @ outcome
        self.outcome_outcome = float(outcome @ outcome)
        self.free = len(outcome) - fixed.shape[1]

    def _solve(self, ratios: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, float]:
        """Log determinant, precision of the effects, the effects, and the residual sum of squares."""
        # A spread multiplies the columns of its term, so a spread of nothing needs no special case.
        scale = ratios[self.term_of_level]
        penalized = self.random_random * np.outer(scale, scale) + np.eye(len(scale))
        factor = np.linalg.cholesky(penalized)
        # Triangles only: no inverse of the large matrix is ever made.
        of_fixed = linalg.solve_triangular(factor, scale[:, None] * self.random_fixed, lower=True)
        of_outcome = linalg.solve_triangular(factor, scale * self.random_outcome, lower=True)
        # What is left of the fixed effects once the random ones have taken their part.
        precision = self.fixed_fixed - of_fixed.T @ of_fixed
        estimates = np.linalg.solve(precision, self.fixed_outcome - of_fixed.T @ of_outcome)
        squares = self.outcome_outcome - of_outcome @ of_outcome
        squares -= estimates @ precision @ estimates
        return 2 * np.log(np.diagonal(factor)).sum(), precision, estimates, float(squares)

    def deviance(self, ratios: np.ndarray) -> float:
        """Minus twice the restricted log likelihood, the residual variance at its best."""
        log_determinant, precision, _, squares = self._solve(ratios)
        return float(
            log_determinant
            + np.linalg.slogdet(precision)[1]
            + self.free * (1 + np.log(2 * np.pi * squares / self.free))
        )

    def effects(self, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Give fixed effects, their covariance and the residual variance."""
        _, precision, estimates, squares = self._solve(ratios)
        residual = squares / self.free
        return estimates, np.linalg.inv(precision) * residual, residual
