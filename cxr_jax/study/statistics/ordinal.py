"""Cumulative logit models with crossed random effects, by Laplace's approximation: confidence, and yes or no.

P(y <= k) = sigmoid(cut_k - x beta - sum of random effects). The random effects' mode is found by Newton in JAX; the
gradient passes through it by one more Newton step, which is exact at a mode (the implicit function theorem). Two
categories make a logit model. R's `ordinal::clmm` and `lme4::glmer` use the same approximation: tests/oracle.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import optimize, stats

from cxr_jax.errors import UserError

_NEWTON_STEPS = 40
_STEP = 1e-4  # of the differences that make the Hessian out of gradients
_NO_SPREAD = 1e-2  # a standard deviation below this is none: its logarithm has no curvature
_WIDEST = 6.0  # where an effect runs off to, if one arm has no event at all


@dataclass(frozen=True, kw_only=True)
class OrdinalFit:
    """Cuts, effects and spreads, with standard errors of cuts and effects.

    Attributes:
        cuts: [categories - 1], increasing.
        effects: [effects]; positive: higher categories, or "yes".
        spreads: standard deviation of each random effect.
        log_likelihood: Laplace's.
        converged: whether the optimum is one, and every effect finite.
    """

    cuts: np.ndarray
    cut_errors: np.ndarray
    effects: np.ndarray
    effect_errors: np.ndarray
    covariance: np.ndarray
    spreads: np.ndarray
    log_likelihood: float
    converged: bool

    def interval(
        self, place: int, level: float = 0.95, degrees: float = np.inf
    ) -> tuple[float, float]:
        """Give the Wald interval of one effect, by Student's t where degrees are finite."""
        reach = float(stats.t.ppf(0.5 + level / 2, degrees)) * self.effect_errors[place]
        return float(self.effects[place] - reach), float(self.effects[place] + reach)

    def contrast(self, weights: ArrayLike) -> tuple[float, float]:
        """Give a weighted sum of effects and its standard error."""
        combination = np.asarray(weights, float)
        variance = combination @ self.covariance @ combination
        return float(combination @ self.effects), float(np.sqrt(max(variance, 0.0)))


class _Rows(NamedTuple):
    """The data of a fit: category int [N], fixed float [N, P], levels int [N, terms] into all random effects."""

    category: jax.Array
    fixed: jax.Array
    levels: jax.Array
    term_of_level: jax.Array


# ---- The likelihood --------------------------------------------------------------------------------


def _cuts(parameters: jax.Array, cut_count: int) -> jax.Array:
    """First cut, then logarithms of the gaps: cuts come out in order whatever the optimizer tries."""
    gaps = jnp.exp(parameters[1:cut_count])
    return jnp.cumsum(jnp.concatenate([parameters[:1], gaps]))


def _row_likelihood(predictor: jax.Array, category: jax.Array, cuts: jax.Array) -> jax.Array:
    """Log probability of one row's category."""
    far = jnp.array([40.0])  # beyond it a sigmoid is 0 or 1
    edges = jnp.concatenate([-far + jnp.min(cuts), cuts, far + jnp.max(cuts)])
    upper, lower = edges[category + 1] - predictor, edges[category] - predictor
    # log(sigmoid(u) - sigmoid(l)) without taking the difference of two numbers near 1.
    return (
        jax.nn.log_sigmoid(upper)
        + jax.nn.log_sigmoid(-lower)
        + jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-12)))
    )


def _joint(
    random: jax.Array, parameters: jax.Array, rows: _Rows, cut_count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log density of data and standard normal random effects; with its gradient and Hessian in these."""
    # Parameters: cuts, effects, logarithms of the spreads.
    term_count = rows.levels.shape[1]
    cuts = _cuts(parameters, cut_count)
    effects = parameters[cut_count : parameters.shape[0] - term_count]
    spread = jnp.exp(parameters[parameters.shape[0] - term_count :])
    scaled = spread[rows.term_of_level]
    predictor = rows.fixed @ effects + (scaled * random)[rows.levels].sum(1)

    def total(shift: jax.Array) -> jax.Array:
        return jax.vmap(_row_likelihood, in_axes=(0, 0, None))(
            predictor + shift, rows.category, cuts
        )

    zeros = jnp.zeros_like(predictor)
    ones = jnp.ones_like(predictor)

    # Rows do not touch each other, so derivatives along ones are each row's own.
    def slope_of(shift: jax.Array) -> jax.Array:
        return jax.jvp(total, (shift,), (ones,))[1]

    slope, curvature = jax.jvp(slope_of, (zeros,), (ones,))
    # Incidence of the random effects, scaled: [N, levels].
    incidence = jax.nn.one_hot(rows.levels, random.shape[0], dtype=predictor.dtype).sum(1) * scaled
    gradient = incidence.T @ slope - random
    hessian = (incidence.T * curvature) @ incidence - jnp.eye(random.shape[0])
    return total(zeros).sum() - 0.5 * (random**2).sum(), gradient, hessian


def _mode(parameters: jax.Array, rows: _Rows, cut_count: int) -> jax.Array:
    """Random effects at which the joint density is highest."""
    start = jnp.zeros(rows.term_of_level.shape[0], parameters.dtype)

    def step(carry: tuple) -> tuple:
        random, _, count = carry
        _, gradient, hessian = _joint(random, parameters, rows, cut_count)
        move = -jnp.linalg.solve(hessian, gradient)
        # A long step from a bad start would overshoot; near the mode all steps are short.
        move = move / jnp.maximum(1.0, jnp.max(jnp.abs(move)) / 2.0)
        return random + move, jnp.max(jnp.abs(move)), count + 1

    def is_moving(carry: tuple) -> jax.Array:
        return (carry[1] > 1e-10) & (carry[2] < _NEWTON_STEPS)

    return jax.lax.while_loop(is_moving, step, (start, jnp.asarray(1.0, parameters.dtype), 0))[0]


@functools.partial(jax.jit, static_argnames="cut_count")
def _objective(parameters: jax.Array, rows: _Rows, cut_count: int) -> tuple[jax.Array, jax.Array]:
    """Minus Laplace's log likelihood, and its gradient."""
    mode = jax.lax.stop_gradient(_mode(jax.lax.stop_gradient(parameters), rows, cut_count))

    def minus_likelihood(values: jax.Array) -> jax.Array:
        _, gradient, hessian = _joint(mode, values, rows, cut_count)
        # The step is nothing in value, and in its derivative what the mode's own derivative is.
        moved = mode - jnp.linalg.solve(jax.lax.stop_gradient(hessian), gradient)
        density, _, hessian = _joint(moved, values, rows, cut_count)
        return -(density - 0.5 * jnp.linalg.slogdet(-hessian)[1])

    return jax.value_and_grad(minus_likelihood)(parameters)


# ---- The fit ---------------------------------------------------------------------------------------


def fit_ordinal(
    outcome: ArrayLike, fixed: ArrayLike, random: Sequence[Sequence[object]]
) -> OrdinalFit:
    """Fit a cumulative logit model with crossed random intercepts.

    Args:
        outcome: [N], ordered categories; those that nobody used are left out. Two categories: a logit model.
        fixed: [N, effects], without an intercept: the cuts are it.
        random: for each random effect, the level of each row: readers, cases, ..

    Raises:
        UserError: if all outcomes are equal.
    """
    used, category = np.unique(np.asarray(outcome), return_inverse=True)
    if len(used) < 2:
        raise UserError("an ordinal model needs two categories that were used")
    # Categories that nobody used have no cut that data could place.
    matrix = np.asarray(fixed, float)
    cut_count = len(used) - 1
    # The program is compiled in double precision and put away again: the models around it run in single.
    with jax.enable_x64(True):
        rows = _rows(category, matrix, random)
        start = _start(category, cut_count, matrix.shape[1], len(random))

        def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = _objective(jnp.asarray(parameters), rows, cut_count)
            return float(value), np.asarray(gradient)

        found = optimize.minimize(
            objective, start, jac=True, method="BFGS", options={"gtol": 1e-6, "maxiter": 400}
        )
        spread_start = len(found.x) - len(random)
        curvature = _curvature(objective, found.x)
    return _as_fit(found, curvature, cut_count, spread_start, objective_scale=len(category))


def _rows(category: np.ndarray, fixed: np.ndarray, random: Sequence[Sequence[object]]) -> _Rows:
    """Number the levels of all random effects in one row."""
    columns, term_of_level, first = [], [], 0
    for term, levels in enumerate(random):
        # Reader 3 and case 3 are two levels: each term's numbers begin where the last one's ended.
        names, numbers = np.unique(np.asarray(list(map(str, levels))), return_inverse=True)
        columns.append(numbers + first)
        term_of_level += [term] * len(names)
        first += len(names)
    return _Rows(
        jnp.asarray(category, jnp.int32),
        jnp.asarray(fixed, jnp.float64),
        jnp.asarray(np.stack(columns, 1), jnp.int32),
        jnp.asarray(term_of_level, jnp.int32),
    )


def _start(category: np.ndarray, cut_count: int, effect_count: int, term_count: int) -> np.ndarray:
    """Cuts that fit without any effect, no effects, and modest spreads."""
    below = np.array([(category <= place).mean() for place in range(cut_count)])
    cuts = np.log(below / (1 - below))
    gaps = np.log(np.maximum(np.diff(cuts), 1e-3))
    return np.concatenate([cuts[:1], gaps, np.zeros(effect_count), np.full(term_count, -0.7)])


def _curvature(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]], optimum: np.ndarray
) -> np.ndarray:
    """Second derivatives from central differences of the gradient, as R's packages have them."""
    # The gradient alone is exact through the one Newton step; its own derivative is not.
    rows = []
    for place in range(len(optimum)):
        step = np.zeros(len(optimum))
        step[place] = _STEP
        above, below = objective(optimum + step)[1], objective(optimum - step)[1]
        rows.append((above - below) / (2 * _STEP))
    matrix = np.stack(rows)
    return (matrix + matrix.T) / 2


def _as_fit(
    found: optimize.OptimizeResult,
    curvature: np.ndarray,
    cut_count: int,
    spread_start: int,
    objective_scale: int,
) -> OrdinalFit:
    """Turn the optimizer's numbers into cuts, effects and their errors."""
    parameters = found.x
    spreads = np.exp(parameters[spread_start:])
    # A spread that vanished takes its flat direction out of the matrix that is inverted.
    kept = np.concatenate([np.ones(spread_start, bool), spreads > _NO_SPREAD])
    try:
        covariance = np.linalg.inv(curvature[np.ix_(kept, kept)])[:spread_start, :spread_start]
    except np.linalg.LinAlgError:
        covariance = np.full((spread_start, spread_start), np.nan)
    # Cuts are sums of the first and of exponentials: their errors follow by the chain rule.
    cuts = np.cumsum(np.concatenate([parameters[:1], np.exp(parameters[1:cut_count])]))
    chain = np.eye(cut_count)
    for place in range(1, cut_count):
        chain[place:, place] = np.exp(parameters[place])
    chain[:, 0] = 1.0
    cut_covariance = chain @ covariance[:cut_count, :cut_count] @ chain.T
    effects = parameters[cut_count:spread_start]
    effect_covariance = covariance[cut_count:, cut_count:]
    variances = np.diagonal(effect_covariance)
    # An arm in which all, or none, were caught has no finite effect.
    is_sound = bool(np.isfinite(variances).all() and (variances > 0).all())
    is_sound &= bool(np.abs(effects).max(initial=0.0) < _WIDEST)
    with np.errstate(invalid="ignore"):
        cut_errors, effect_errors = np.sqrt(np.diagonal(cut_covariance)), np.sqrt(variances)
    # BFGS may stop for lack of precision with a gradient that is nothing: that is an optimum, too.
    is_flat = bool(np.abs(found.jac).max() < 1e-4 * objective_scale)
    return OrdinalFit(
        cuts=cuts,
        cut_errors=cut_errors,
        effects=effects,
        effect_errors=effect_errors,
        covariance=effect_covariance,
        spreads=spreads,
        log_likelihood=-float(found.fun),
        converged=is_flat and is_sound,
    )
