"""Advantages, losses, gradients and clip metrics against TRL's own trainer, 0.22.2 and 1.16.0.

tests/golden_trl/trl_*.npz hold what TRL computed; tests/oracle/trl_golden.py makes them.
"""

import functools
import json

import fast_compile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import ROOT

from cxr_jax.config.sections import PolicyLossConfig
from cxr_jax.rl import losses
from cxr_jax.rl.algorithms import ALGORITHMS
from cxr_jax.training import losses as training_losses

GOLDEN = ROOT / "tests" / "golden_trl"
VERSIONS = ("0.22.2", "1.16.0")
AGGREGATION = {
    "grpo": "sequence",
    "bnpo": "token_local",
    "dr_grpo": "constant",
    "dapo": "token",
    "cispo": "token",
}


def knobs(options: dict, version: str) -> dict:
    """TRL's arguments as values of config.rl, over the preset of TRL's defaults."""
    get, loss = options.get, options.get("loss_type", "dapo")
    out = ALGORITHMS["trl_0_22"] | {
        "num_iterations": get("num_iterations", 1),
        "scale_rewards": get("scale_rewards", "group"),
        "advantage": "gdpo" if get("multi_objective_aggregation") else "grpo",
        "aggregation": AGGREGATION[loss],
        "mask_truncated": get("mask_truncated_completions", False),
        "ratio_level": get("importance_sampling_level", "token"),
        "epsilon": get("epsilon", 0.2),
        "epsilon_high": get("epsilon_high", get("epsilon", 0.2)),
        "delta": get("delta", 0.0),
        "beta": get("beta", 0.0),
    }
    if version != "0.22.2" and out["aggregation"] == "token":
        out["denominator"] = "trained"  # huggingface/trl pull request 6439
    if loss == "cispo":
        out |= {"clip": "cispo", "epsilon_high": options["epsilon_high"] - 1}
    if mode := get("vllm_importance_sampling_mode"):
        out["sampler_correction"] = {"token_truncate": "tis", "token_mask": "icepop"}[mode]
        out["sampler_cap"] = options["vllm_importance_sampling_clip_max"]
    return out


def advantages(knobs, rewards, group, weights):
    """rewards [R, 2] of TRL's two reward functions -> [R]."""
    terms = {f"term_{i}": rewards[:, i].reshape(-1, group) for i in range(len(weights))}
    of = dict(zip(terms, weights, strict=True))
    if knobs["advantage"] == "gdpo":
        return losses.gdpo_advantages(terms, of).reshape(-1)
    total = sum(of[name] * x for name, x in terms.items())
    return losses.group_advantages(total, scale=knobs["scale_rewards"]).reshape(-1)


def masks(knobs, data):
    """Completion tokens and those that train, [R, N], and what divides the loss."""
    completion = jnp.arange(data["logp"].shape[1])[None] < data["lengths"][:, None]
    mask = completion & data["finished"][:, None] if knobs["mask_truncated"] else completion
    how = {k: knobs[k] for k in ("aggregation", "denominator")}
    return mask, losses.divisors(completion, mask, **how)


def step(knobs, parts, data, adv, mask, totals):
    """(loss, gradient by the log-probabilities, what TRL logs) of a batch, the losses of its parts summed."""
    settings = PolicyLossConfig(**{k: knobs[k] for k in PolicyLossConfig.__dataclass_fields__})
    rows = {"sampler_log_probs": data["sampler_logp"]}
    if knobs["beta"]:
        rows["reference_log_probs"] = data["ref_logp"]

    def loss_fn(logp):
        old = data["old_logp"] if knobs["num_iterations"] > 1 else jax.lax.stop_gradient(logp)
        loss = lambda s: losses.policy_loss(
            logp[s],
            old[s],
            adv[s],
            mask[s],
            settings,
            max_tokens=mask.shape[1],
            divisors=totals,
            **{k: v[s] for k, v in rows.items()},
        )
        out = [
            loss(slice(start, start + len(mask) // parts))
            for start in range(0, len(mask), len(mask) // parts)
        ]
        return sum(value for value, _ in out), out[0][1]

    (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(data["logp"])
    return {"loss": loss, "grad": grad} | (clip_and_kl(knobs, metrics, mask) if parts == 1 else {})


def clip_and_kl(knobs, metrics, mask) -> dict:
    """Means as TRL logs them: over tokens, or over rows where a row has one ratio."""
    mean = lambda x: training_losses.masked_mean(x.astype(jnp.float32), mask)
    clip = (lambda x: jnp.any(x, axis=1).mean()) if knobs["ratio_level"] == "sequence" else mean
    if knobs["clip"] == "cispo":
        out = {"cispo_clip_ratio": clip(metrics["clip_high"])}
    else:
        out = {
            f"clip_ratio/{k}_mean": clip(metrics[f"clip_{k}"]) for k in ("low", "high", "region")
        }
    return out | ({"kl": mean(metrics["kl"])} if "kl" in metrics else {})


@functools.cache
def load(version):
    """What TRL was asked, and the arrays, the three batches stacked."""
    with np.load(GOLDEN / f"trl_{version}.npz") as f:
        meta, names = json.loads(str(f["meta"])), {k.split("/", 1)[1] for k in f if k != "meta"}
        return meta, {k: np.stack([f[f"{i}/{k}"] for i in range(3)]) for k in names}


@pytest.fixture(scope="module", params=VERSIONS)
def golden(request):
    return request.param, *load(request.param)


@functools.partial(jax.jit, compiler_options=fast_compile.OPTIONS)
def all_steps(data, of_cases):
    """`step` for every case of the current TRL, of which 0.22.2 has the first: one program for both."""
    return [
        jax.vmap(functools.partial(step, knobs(options, VERSIONS[-1]), options.get("parts", 1)))(
            data, *given
        )
        for options, given in zip(load(VERSIONS[-1])[0]["cases"], of_cases, strict=True)
    ]


def test_equal_to_trl(golden):
    version, meta, arrays = golden
    every = load(VERSIONS[-1])[0]["cases"]
    assert (
        meta["trl"] == version
        and len(meta["cases"]) >= 40
        and meta["cases"] == every[: len(meta["cases"])]
    )
    data = {k: jnp.asarray(v) for k, v in arrays.items() if not k.startswith("trl/")}
    of_trl = lambda case: {
        k.removeprefix("trl/"): v[:, case] for k, v in arrays.items() if k.startswith("trl/")
    }
    known = [knobs(options, version) for options in meta["cases"]]
    given = [
        (of_trl(i)["advantages"], *jax.vmap(functools.partial(masks, k))(data))
        for i, k in enumerate(known)
    ]
    results = all_steps(data, given + given[:1] * (len(every) - len(given)))
    scored = {}
    for case, (options, k) in enumerate(zip(meta["cases"], known, strict=True)):
        how = (k["advantage"], k["scale_rewards"])
        if how not in scored:
            of_rewards = functools.partial(
                advantages, k, group=meta["group"], weights=meta["weights"]
            )
            scored[how] = jax.vmap(of_rewards)(data["rewards"])
        want, trained = of_trl(case), np.asarray(given[case][1]).any((1, 2))
        for name, value in {"advantages": scored[how], **results[case]}.items():
            # Where nothing trains, TRL 0.22.2 logs NaN or the mean over no tokens.
            of = slice(None) if name in ("advantages", "loss", "grad") else trained
            np.testing.assert_allclose(
                value[of], want[name][of], atol=1e-5, rtol=1e-5, err_msg=f"{name} of {options}"
            )


def test_the_fixtures_can_tell(golden):
    """What each knob does shows in them, and where every completion is truncated nothing is learned."""
    _, meta, arrays = golden
    gradient = lambda options: arrays["trl/grad"][:, meta["cases"].index(options)]
    old = {"loss_type": "dapo", "num_iterations": 2}
    for knob in (
        {"delta": 1.3},
        {"epsilon_high": 0.4},
        {"beta": 0.3},
        {"importance_sampling_level": "sequence"},
    ):
        assert not np.array_equal(gradient(old), gradient(old | knob)), knob
    masked = gradient({"mask_truncated_completions": True})
    assert not np.array_equal(gradient({}), masked)
    assert masked[:2].any() and not masked[2].any()
    assert (arrays["trl/clip_ratio/low_mean"] > 0).any() and (
        arrays["trl/clip_ratio/high_mean"] > 0
    ).any()


def test_preset_is_trl_0_22():
    """The preset is what TRL 0.22.2 does without arguments: dividing by truncated tokens once they are masked."""
    assert knobs({}, "0.22.2") == ALGORITHMS["trl_0_22"]
    assert (
        ALGORITHMS["trl_0_22"]["denominator"] == "all"
        and ALGORITHMS["corrected"]["denominator"] == "trained"
    )
