"""rl/losses.py against plain NumPy and plain Python: advantages, every switch of the policy loss."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxr_jax.config import schema
from cxr_jax.config.sections import PolicyLossConfig
from cxr_jax.rl import losses
from cxr_jax.rl.algorithms import ALGORITHMS
from cxr_jax.training import losses as training_losses


def test_group_advantages():
    rewards = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    centred = rewards - rewards.mean(1, keepdims=True)
    expected = {
        "group": centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4),
        "batch": centred / (rewards.std(ddof=1) + 1e-4),
        "none": centred,
    }
    for scale, want in expected.items():
        np.testing.assert_allclose(
            losses.group_advantages(rewards, scale=scale), want, rtol=1e-4, atol=1e-6
        )
    with pytest.raises(ValueError, match="scale_rewards"):
        losses.group_advantages(rewards, scale="groups")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.25, 0.1, 1 / 3])
def test_zero_variance_has_zero_advantage(scale, value):
    """Exactly, though the mean of eight 0.1 is not 0.1 in float32; and the other groups are not touched."""
    rewards = np.full((3, 8), value, np.float32)
    assert not np.asarray(losses.group_advantages(jnp.asarray(rewards), scale=scale)).any()
    rewards[1, 0] = 1.0
    advantages = np.asarray(losses.group_advantages(jnp.asarray(rewards), scale=scale))
    assert not advantages[[0, 2]].any() and advantages[1].all()


def test_gdpo_advantages():
    """Each term normalised in its group; scales and weights of 0 change nothing; flat groups get exactly 0."""
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(2, 3, 4)).astype(np.float32)
    a[2], b[2] = 0.1, 0.7  # a group in which no term varies
    normal = lambda x: (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-4)
    total = 2.0 * normal(a) + 0.5 * normal(b)
    want = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    terms = {"a": jnp.asarray(a), "b": jnp.asarray(b), "c": jnp.full((3, 4), jnp.nan)}
    got = np.asarray(losses.gdpo_advantages(terms, {"a": 2.0, "b": 0.5, "c": 0.0}))
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert not got[2].any()
    larger = losses.gdpo_advantages({"a": terms["a"] * 100, "b": terms["b"]}, {"a": 2.0, "b": 0.5})
    np.testing.assert_allclose(
        larger, got, atol=1e-3
    )  # up to eps: what a summed reward could not give
    assert not np.asarray(losses.gdpo_advantages({"a": jnp.full((3, 4), 0.1)}, {"a": 1.0})).any()


# Per-token log-probabilities of four policies, advantages of both signs, ragged rows of which one does not train.
R, C = 6, 5
RNG = np.random.default_rng(30)
LOGP = RNG.normal(-1, 0.4, (R, C))
OLD, REF, SAMPLER = (LOGP + RNG.normal(0, 0.5, (R, C)) for _ in range(3))
ADVANTAGES = np.array([1.3, -0.7, 0.4, 0.9, -1.6, 0.0])
MASK = np.arange(C) < np.array([5, 3, 0, 1, 4, 5])[:, None]
MAX = 10
DEFAULTS = PolicyLossConfig.with_defaults()


def python_loss(
    logp,
    *,
    aggregation,
    ratio_level,
    clip,
    correction="none",
    kl="k3",
    low=0.2,
    high=0.3,
    delta=0.0,
    beta=0.0,
    cap=1.2,
    old=OLD,
    frozen=None,
):
    """The loss by plain loops, in float64. frozen: logp behind the stop-gradients, so that differences can be taken."""
    frozen = logp if frozen is None else frozen
    rows, marks = [], []
    for i in range(R):
        kept = [j for j in range(C) if MASK[i, j]]
        mean = lambda x, i=i, kept=kept: sum(x[i, j] - old[i, j] for j in kept) / max(len(kept), 1)
        terms = []
        for j in kept:
            if ratio_level == "token":
                r = math.exp(logp[i, j] - old[i, j])
            elif ratio_level == "sequence":
                r = math.exp(mean(logp))
            else:
                r = math.exp(mean(frozen) + logp[i, j] - frozen[i, j])
            a, bounded = ADVANTAGES[i], min(r, delta) if delta else r
            if clip == "ppo":
                value = min(bounded * a, min(max(r, 1 - low), 1 + high) * a)
                marks.append(((a > 0 and bounded > 1 + high), (a < 0 and bounded < 1 - low)))
            elif clip == "cispo":
                s = (
                    math.exp(frozen[i, j] - old[i, j])
                    if ratio_level == "token"
                    else math.exp(mean(frozen))
                )
                value = min(min(s, delta) if delta else s, 1 + high) * a * logp[i, j]
                marks.append((a > 0 and (min(s, delta) if delta else s) > 1 + high, False))
            else:
                value = bounded * a
                marks.append((False, False))
            w = math.exp(old[i, j] - SAMPLER[i, j])
            value *= {"none": 1.0, "tis": min(w, cap), "icepop": w if 1 / cap <= w <= cap else 0.0}[
                correction
            ]
            d = REF[i, j] - logp[i, j]
            terms.append(-value + beta * {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl])
        rows.append(terms)
    count = sum(map(len, rows))
    total = {
        "sequence": sum(sum(r) / max(len(r), 1) for r in rows) / R,
        "token": sum(map(sum, rows)) / count,
        "token_local": sum(map(sum, rows)) / count,
        "constant": sum(map(sum, rows)) / (R * MAX),
    }[aggregation]
    return total, np.array(marks).mean(0)


def ours(
    logp,
    *,
    low=0.2,
    high=0.3,
    correction="none",
    cap=1.2,
    old=OLD,
    part=slice(None),
    divisors=None,
    **switches,
):
    f32 = lambda x: jnp.asarray(x[part], jnp.float32)
    settings = PolicyLossConfig.with_defaults(
        epsilon=low, epsilon_high=high, sampler_correction=correction, sampler_cap=cap, **switches
    )
    return losses.policy_loss(
        logp[part],
        f32(old),
        f32(ADVANTAGES),
        MASK[part],
        settings,
        reference_log_probs=f32(REF),
        sampler_log_probs=f32(SAMPLER),
        max_tokens=MAX,
        divisors=divisors,
    )


def combinations():
    """All of the three switches; the other knobs go round, so that each meets each level, clip and aggregation."""
    others = itertools.cycle(
        itertools.product(
            (0.0, 1.4),
            ((0.0, "k3"), *((0.3, kl) for kl in schema.choices("rl.kl"))),
            schema.choices("rl.sampler_correction"),
        )
    )
    for switches in itertools.product(
        schema.choices("rl.aggregation"),
        schema.choices("rl.ratio_level"),
        schema.choices("rl.clip"),
    ):
        delta, (beta, kl), correction = next(others)
        yield dict(zip(("aggregation", "ratio_level", "clip"), switches, strict=True)) | dict(
            delta=delta, beta=beta, kl=kl, correction=correction
        )


def test_policy_loss_by_plain_python():
    """Values, gradients (by differences) and clip metrics, for every combination of the three switches."""
    step = 1e-5
    for case in combinations():
        (loss, metrics), grad = jax.value_and_grad(functools.partial(ours, **case), has_aux=True)(
            jnp.float32(LOGP)
        )
        want, marks = python_loss(LOGP, **case)
        assert float(loss) == pytest.approx(want, abs=1e-5), case
        got = [
            float(training_losses.masked_mean(metrics[k].astype(jnp.float32), MASK))
            for k in ("clip_high", "clip_low")
        ]
        assert got == pytest.approx(marks, abs=1e-6), case
        numeric = np.zeros((R, C))
        for i, j in np.argwhere(MASK):
            moved = [LOGP.copy() for _ in range(2)]
            moved[0][i, j] += step
            moved[1][i, j] -= step
            up, down = (python_loss(x, frozen=LOGP, **case)[0] for x in moved)
            numeric[i, j] = (up - down) / (2 * step)
        np.testing.assert_allclose(grad, numeric, atol=2e-5, err_msg=str(case))


def test_the_cases_can_tell():
    """Both clips, delta, both corrections and the KL act in them."""
    _, m = ours(jnp.float32(LOGP), delta=1.4, correction="icepop")
    for name in ("clip_low", "clip_high", "clip_delta"):
        assert 0 < np.asarray(m[name]).sum() < MASK.sum()
        assert not np.asarray(m[name])[~MASK].any()
    assert np.array_equal(m["clip_region"], m["clip_low"] | m["clip_high"])
    w = np.exp(OLD - SAMPLER)[MASK]
    assert (np.asarray(m["correction"])[MASK] == 0).sum() == ((w > 1.2) | (w < 1 / 1.2)).sum() > 0
    np.testing.assert_allclose(np.asarray(m["ratio"])[MASK], np.exp(LOGP - OLD)[MASK], rtol=1e-5)
    assert (np.asarray(m["kl"])[MASK] > 0).all() and not np.asarray(m["kl"])[~MASK].any()


@pytest.mark.parametrize("denominator", ["trained", "all"])
@pytest.mark.parametrize("aggregation", schema.choices("rl.aggregation"))
def test_parts_sum_to_the_loss_of_the_batch(aggregation, denominator):
    """Parts with more and fewer tokens, by the divisors of the whole; of "token_local" they average."""
    completion = np.arange(C) < np.array([5, 3, 5, 1, 4, 5])[:, None]  # row 2 was truncated
    totals = losses.divisors(completion, MASK, aggregation=aggregation, denominator=denominator)
    logp, how = jnp.float32(LOGP), dict(aggregation=aggregation, divisors=totals)
    whole = python_loss(LOGP, aggregation=aggregation, ratio_level="token", clip="ppo")[0]
    if aggregation == "sequence" and denominator == "trained":
        whole *= 6 / 5
    if aggregation == "token" and denominator == "all":
        whole *= MASK.sum() / completion.sum()
    halves = slice(3), slice(3, 6)
    if aggregation == "token_local":
        whole = sum(ours(logp, part=s, aggregation="token")[0] for s in halves) / 2
    parts = [ours(logp, part=s, **how)[0] for s in halves]
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-5)


def test_on_policy_gradient_is_the_policy_gradient():
    """With old = stop_gradient(new) the ratio is 1: the gradient is -A / (what divides), whatever the other switches.

    One ratio a row spreads its gradient over the row's tokens, which comes to the same.
    """
    a, sums = (
        jnp.float32(ADVANTAGES),
        {"sequence": R * np.maximum(MASK.sum(1), 1), "constant": np.full(R, R * MAX)},
    )
    for case in combinations():
        how = {k: case[k] for k in ("aggregation", "ratio_level", "clip")}
        settings = PolicyLossConfig.with_defaults(**how)
        loss = lambda x, settings=settings: losses.policy_loss(
            x, jax.lax.stop_gradient(x), a, MASK, settings, max_tokens=MAX
        )[0]
        divisor = sums.get(how["aggregation"], np.full(R, MASK.sum()))
        want = -(ADVANTAGES / divisor)[:, None] * MASK
        np.testing.assert_allclose(
            jax.grad(loss)(jnp.float32(LOGP)), want, atol=1e-7, err_msg=str(how)
        )


@pytest.mark.parametrize("what", ["zero variance", "all truncated"])
def test_nothing_to_learn_is_zero_and_not_nan(what):
    zero = what == "zero variance"
    advantages = (
        losses.group_advantages(jnp.full((2, R // 2), 0.1)).reshape(-1)
        if zero
        else jnp.float32(ADVANTAGES)
    )
    mask, x = np.full((R, C), zero), jnp.float32(LOGP)
    for case in combinations():
        case["sampler_correction"] = case.pop("correction")
        case["beta"] = 0.0 if zero else case["beta"]  # a KL term does not need advantages
        totals = losses.divisors(
            np.ones((R, C)), mask, aggregation=case["aggregation"], denominator="trained"
        )
        settings = PolicyLossConfig.with_defaults(**case)
        f = lambda x, settings=settings, totals=totals: losses.policy_loss(
            x,
            jax.lax.stop_gradient(x),
            advantages,
            mask,
            settings,
            max_tokens=MAX,
            reference_log_probs=x - 1,
            sampler_log_probs=x,
            divisors=totals,
        )
        (loss, metrics), grad = jax.value_and_grad(f, has_aux=True)(x)
        assert loss == 0 and not np.asarray(grad).any(), case
        assert not any(np.asarray(v).any() for k, v in metrics.items() if k.startswith("clip")), (
            case
        )


def test_masked_positions_cannot_poison():
    """Log-probabilities of padding may be anything: neither value, gradient nor metrics may see them."""
    poison = np.resize([np.nan, np.inf, -np.inf], (R, C))
    bad = lambda x: jnp.where(MASK, jnp.float32(x), poison)
    for case in combinations():
        case["sampler_correction"] = case.pop("correction")
        settings = PolicyLossConfig.with_defaults(**case)
        f = lambda x, c, settings=settings: losses.policy_loss(
            x,
            c(OLD),
            jnp.float32(ADVANTAGES),
            MASK,
            settings,
            reference_log_probs=c(REF),
            sampler_log_probs=c(SAMPLER),
            max_tokens=MAX,
        )
        run = lambda c, f=f: jax.value_and_grad(f, has_aux=True)(c(LOGP), c)
        for a, b in zip(jax.tree.leaves(run(bad)), jax.tree.leaves(run(jnp.float32)), strict=True):
            assert np.array_equal(a, b), case


def test_only_log_probs_get_a_gradient():
    others = [jnp.float32(x) for x in (OLD, REF, SAMPLER)]
    f = lambda old, ref, sampler: losses.policy_loss(
        jnp.float32(LOGP),
        old,
        jnp.float32(ADVANTAGES),
        MASK,
        PolicyLossConfig.with_defaults(beta=0.3, sampler_correction="tis"),
        reference_log_probs=ref,
        sampler_log_probs=sampler,
    )[0]
    assert not any(np.asarray(g).any() for g in jax.grad(f, argnums=(0, 1, 2))(*others))


def test_log_ratios_are_bounded():
    """A token that was all but impossible gives a large ratio, not an infinite one, and no gradient."""
    everywhere = lambda value: jnp.full((R, C), value)
    f = lambda x: losses.policy_loss(x, everywhere(-300.0), -jnp.ones(R), MASK, DEFAULTS)[0]
    loss, grad = jax.value_and_grad(f)(everywhere(-0.1))
    assert float(loss) == pytest.approx(math.exp(20.0), rel=1e-5) and not np.asarray(grad).any()
    pulled = PolicyLossConfig.with_defaults(beta=1.0)
    f = lambda x: losses.policy_loss(
        x, x, jnp.zeros(R), MASK, pulled, reference_log_probs=everywhere(0.0)
    )[0]
    assert np.isfinite(jax.grad(f)(everywhere(-500.0))).all()


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(aggregation="dapo"), "aggregation must be"),
        (dict(ratio_level="row"), "ratio_level must be"),
        (dict(clip="dual"), "clip must be"),
        (dict(kl="k0"), "kl must be"),
        (dict(sampler_correction="is"), "sampler_correction must be"),
        (dict(beta=0.1), "beta > 0 needs reference_log_probs"),
        (dict(sampler_correction="tis"), "sampler_correction='tis' needs sampler_log_probs"),
        (dict(aggregation="constant"), "max_tokens"),
    ],
)
def test_refused(options, match):
    x, settings = jnp.zeros((1, 2)), PolicyLossConfig.with_defaults(**options)
    with pytest.raises(ValueError, match=match):
        losses.policy_loss(x, x, jnp.zeros(1), jnp.ones((1, 2)), settings)


def test_unknown_denominator_is_refused():
    with pytest.raises(ValueError, match="denominator must be trained or all"):
        losses.divisors(MASK, MASK, aggregation="token", denominator="trl")


def test_presets():
    """Every preset has the same knobs, and the loss takes each."""
    keys = set(ALGORITHMS["corrected"])
    assert set(ALGORITHMS) == {"corrected", "trl_0_22", "dr_grpo", "dapo", "gspo", "cispo"}
    x, of_loss = jnp.full((R, C), -1.0), set(PolicyLossConfig.__dataclass_fields__)
    for name, knobs in ALGORITHMS.items():
        assert set(knobs) == keys, name
        settings = PolicyLossConfig(**{k: v for k, v in knobs.items() if k in of_loss})
        loss, _ = losses.policy_loss(
            x, x, jnp.ones(R), jnp.ones((R, C)), settings, sampler_log_probs=x, max_tokens=C
        )
        assert float(loss) == pytest.approx(1.0 if knobs["clip"] == "cispo" else -1.0), name
