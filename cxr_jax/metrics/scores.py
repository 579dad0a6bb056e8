"""Statistics of label predictions: F1, Jaccard, bootstrap intervals, constant policies, image-use audit.

Pure NumPy. Every metric here is a function of sums over rows, so a row (or a patient) is reduced once to a
short vector of counts, and a bootstrap of any metric is one matrix product of resampling weights with those
vectors.

Conventions, used everywhere:
- `pred`, `truth`: bool [N, 14] in the order of `CHEXPERT_14`; `known`: bool [N, 14], False = the reference
  does not say (uncertain, blank), and that cell is left out of every number. Default: all known.
- `valid`: bool [N], False = the completion could not be parsed. Such a row predicts nothing (its positives
  count as missed) and has Jaccard 0, even where the truth is empty: no answer never earns a point.
- `groups`: [N] patient ids; the bootstrap then draws patients, not images.
- Jaccard of two empty sets is 1. A row with no known label carries no Jaccard at all.
- A label without a known positive has no F1. Macro-F1 is the mean over the labels that have one (again in
  each bootstrap resample, so the interval is that of the number that is printed); micro-F1 pools all
  labels.
- An undefined number is None in the results.
"""

from collections.abc import Mapping

import numpy as np

from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX

N_LABELS = len(CHEXPERT_14)
METRICS = ("jaccard", "macro_f1", "micro_f1")
SUBSETS = {
    "all": (),
    "without_no_finding": ("No Finding",),
    "without_support_devices": ("Support Devices",),
    "findings_only": ("No Finding", "Support Devices"),
}
_KEEP = {
    name: np.array([label not in out for label in CHEXPERT_14]) for name, out in SUBSETS.items()
}
_CHUNK = 4_000_000  # resampling weights held at once: 32 MB, whatever n_boot and N are


# Rows -> counts -----------------------------------------------------------------------------------


def _checked(pred, truth, known=None, valid=None):
    pred, truth = np.asarray(pred, bool), np.asarray(truth, bool)
    known = np.ones_like(truth) if known is None else np.asarray(known, bool)
    valid = np.ones(len(truth), bool) if valid is None else np.asarray(valid, bool)
    if truth.ndim != 2 or truth.shape[1] != N_LABELS or len(truth) == 0:
        raise ValueError(f"truth must be [N, {N_LABELS}] with N >= 1, got {list(truth.shape)}")
    if pred.shape != truth.shape or known.shape != truth.shape or valid.shape != truth.shape[:1]:
        shapes = {
            "pred": pred.shape,
            "truth": truth.shape,
            "known": known.shape,
            "valid": valid.shape,
        }
        raise ValueError(f"shapes do not agree: {shapes}")
    return pred, truth, known, valid


def jaccard_rows(pred, truth, known=None, valid=None) -> np.ndarray:
    """Jaccard index of each row's label sets: float64 [N]; NaN where the row has no known label."""
    pred, truth, known, valid = _checked(pred, truth, known, valid)
    pred = pred & valid[:, None]
    both = (pred & truth & known).sum(1)
    either = ((pred | truth) & known).sum(1)
    value = np.where(either == 0, 1.0, both / np.maximum(either, 1)) * valid
    return np.where(known.any(1), value, np.nan)


def _row_counts(pred, truth, known=None, valid=None) -> np.ndarray:
    """float64 [N, 58]: tp, fp, fn and known flags of the 14 labels, then Jaccard and its weight (0 or 1)."""
    pred, truth, known, valid = _checked(pred, truth, known, valid)
    jaccard = jaccard_rows(pred, truth, known, valid)
    pred = pred & valid[:, None]
    flags = [pred & truth & known, pred & ~truth & known, ~pred & truth & known, known]
    scored = np.isfinite(jaccard)
    return np.concatenate(
        [*flags, np.where(scored, jaccard, 0.0)[:, None], scored[:, None]], axis=1
    ).astype(float)


def _split(counts):
    tp, fp, fn, n = (counts[..., i * N_LABELS : (i + 1) * N_LABELS] for i in range(4))
    return tp, fp, fn, n


def _ratio(a, b):
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _label_f1(counts):
    tp, fp, fn, _ = _split(counts)
    return np.where(tp + fn > 0, _ratio(2 * tp, 2 * tp + fp + fn), np.nan)


def _jaccard(counts, subset="all"):
    return _ratio(counts[..., -2], counts[..., -1])


def _macro_f1(counts, subset="all"):
    f1 = _label_f1(counts)[..., _KEEP[subset]]
    return _ratio(np.nansum(f1, -1), np.isfinite(f1).sum(-1))


def _micro_f1(counts, subset="all"):
    tp, fp, fn, _ = (x[..., _KEEP[subset]].sum(-1) for x in _split(counts))
    return _ratio(2 * tp, 2 * tp + fp + fn)


_METRIC = {"jaccard": _jaccard, "macro_f1": _macro_f1, "micro_f1": _micro_f1}


# Bootstrap ----------------------------------------------------------------------------------------


def _by_group(rows, groups):
    """Sum the row counts of each patient, so that a resample draws patients."""
    if groups is None:
        return rows
    groups = np.asarray(groups)
    if groups.shape != rows.shape[:1]:
        raise ValueError(f"groups must have one id a row: {groups.shape} for {len(rows)} rows")
    _, index = np.unique(groups, return_inverse=True)
    out = np.zeros((index.max() + 1, rows.shape[1]))
    np.add.at(out, index, rows)
    return out


def _resampled(units, n_boot, seed):
    """Counts of `n_boot` resamples of the units with replacement: [n_boot, K] (multinomial weights)."""
    n, rng, out = len(units), np.random.default_rng(seed), []
    for start in range(0, n_boot, max(1, _CHUNK // n)):
        b = min(max(1, _CHUNK // n), n_boot - start)
        draws = rng.integers(n, size=(b, n)) + np.arange(b)[:, None] * n
        weights = np.bincount(draws.ravel(), minlength=b * n).reshape(b, n).astype(float)
        out.append(weights @ units)
    return np.concatenate(out)


def _interval(samples):
    """95 % percentile interval (Efron) of the finite samples: (lo, hi), NaN where there is none."""
    samples = samples[np.isfinite(samples)]
    return tuple(np.percentile(samples, [2.5, 97.5])) if samples.size else (np.nan, np.nan)


def _number(x):
    return float(x) if np.isfinite(x) else None


def _estimate(point, samples):
    lo, hi = _interval(samples)
    return {"value": _number(point), "lo": _number(lo), "hi": _number(hi)}


def _mean(values, groups, n_boot, seed):
    rows = np.stack([np.asarray(values, float), np.ones(len(values))], axis=1)
    units = _by_group(rows, groups)
    boot = _resampled(units, n_boot, seed)
    return _estimate(units[:, 0].sum() / units[:, 1].sum(), boot[:, 0] / boot[:, 1])


def paired_bootstrap(
    metric,
    pred_a,
    pred_b,
    truth,
    *,
    known=None,
    valid_a=None,
    valid_b=None,
    groups=None,
    subset="all",
    n_boot=1000,
    seed=0,
):
    """Difference metric(b) - metric(a) on the same rows, with its 95 % percentile interval.

    `metric`: one of METRICS; `subset`: one of SUBSETS (not used by Jaccard). Both predictions are resampled
    with the same weights. Returns (diff, lo, hi), floats; NaN where the metric is undefined.
    """
    if metric not in _METRIC:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    a, b = _row_counts(pred_a, truth, known, valid_a), _row_counts(pred_b, truth, known, valid_b)
    units = _by_group(np.concatenate([a, b], axis=1), groups)
    f = lambda counts: (
        _METRIC[metric](counts[..., a.shape[1] :], subset)
        - _METRIC[metric](counts[..., : a.shape[1]], subset)
    )
    lo, hi = _interval(f(_resampled(units, n_boot, seed)))
    return float(f(units.sum(0))), float(lo), float(hi)


# Constant policies --------------------------------------------------------------------------------


def constant_predictions(truth, known=None, prior=None) -> dict[str, np.ndarray]:
    """The answers that ignore the image: policy name -> bool [14].

    No Finding; all 14 labels; the k most frequent labels for k = 1..8. `prior`: float [14] frequencies (of
    the training set, say); default: those of `truth` itself, which favours the policy and makes the bar
    higher.
    """
    _, truth, known, _ = _checked(truth, truth, known)
    frequency = (
        np.asarray(prior, float)
        if prior is not None
        else _ratio((truth & known).sum(0), known.sum(0))
    )
    order = np.argsort(-np.nan_to_num(frequency), kind="stable")
    rows = {"No Finding": [INDEX["No Finding"]], "all labels": list(range(N_LABELS))}
    rows |= {f"top-{k} prior": order[:k] for k in range(1, 9)}
    return {name: np.isin(np.arange(N_LABELS), index) for name, index in rows.items()}


def constant_policies(truth, *, known=None, groups=None, prior=None, n_boot=1000, seed=0) -> dict:
    """Scores of every constant policy and the best ones (ties: the first named).

    Returns {"policies": {name: {"labels", "jaccard", "macro_f1", "micro_f1"}}, "best_jaccard": {...},
    "best_macro_f1": {...}}; the two best hold the name under "policy" and estimates with intervals.
    """
    rows = constant_predictions(truth, known, prior)
    counts = {
        name: _row_counts(np.broadcast_to(row, np.shape(truth)), truth, known)
        for name, row in rows.items()
    }
    policies = {
        name: {
            "labels": [CHEXPERT_14[i] for i in np.flatnonzero(rows[name])],
            **{m: _number(_METRIC[m](c.sum(0))) for m in METRICS},
        }
        for name, c in counts.items()
    }
    out = {"policies": policies}
    for metric in ("jaccard", "macro_f1"):
        best = max(
            policies,
            key=lambda name: -1.0 if policies[name][metric] is None else policies[name][metric],
        )
        units = _by_group(counts[best], groups)
        boot = _resampled(units, n_boot, seed)
        out[f"best_{metric}"] = {
            "policy": best,
            "labels": policies[best]["labels"],
            **{m: _estimate(_METRIC[m](units.sum(0)), _METRIC[m](boot)) for m in METRICS},
        }
    return out


# Image-use audit ----------------------------------------------------------------------------------


def image_use_audit(
    predictions: Mapping, truth, *, known=None, valid=None, groups=None, n_boot=1000, seed=0
) -> dict:
    """Does the answer depend on the image? The same prompts, answered with the real and with other images.

    `predictions`: {"real": bool [N, 14], "blank": ..., "swapped": ..., any other name}; `valid`: the same
    names, or None. The truth is always that of the real image. Returns for each name its Jaccard and
    macro-F1, and for each but "real": `same_answer` (share of rows answered exactly as with the real image)
    and `drop_jaccard`, `drop_macro_f1` (real minus this one, paired interval). A model that reads has drops
    with lo > 0.
    """
    if "real" not in predictions:
        raise ValueError("predictions must hold 'real'")
    valid, out = valid or {}, {}
    options = {"known": known, "groups": groups, "n_boot": n_boot, "seed": seed}
    for name, pred in predictions.items():
        total = _row_counts(pred, truth, known, valid.get(name)).sum(0)
        out[name] = {m: _number(_METRIC[m](total)) for m in ("jaccard", "macro_f1")}
        if name == "real":
            continue
        cells = np.ones_like(np.asarray(truth, bool)) if known is None else np.asarray(known, bool)
        same = ((np.asarray(pred, bool) == np.asarray(predictions["real"], bool)) | ~cells).all(1)
        out[name]["same_answer"] = float(same.mean())
        for metric in ("jaccard", "macro_f1"):
            diff = paired_bootstrap(
                metric,
                pred,
                predictions["real"],
                truth,
                valid_a=valid.get(name),
                valid_b=valid.get("real"),
                **options,
            )
            out[name][f"drop_{metric}"] = dict(
                zip(("value", "lo", "hi"), map(_number, diff), strict=True)
            )
    return out


# Calibration --------------------------------------------------------------------------------------


def auroc(probability, truth) -> float | None:
    """Area under the ROC curve by ranks (Mann-Whitney; ties share their rank); None without both classes."""
    probability, truth = np.asarray(probability, float), np.asarray(truth, bool)
    n_pos, n_neg = int(truth.sum()), int((~truth).sum())
    if not n_pos or not n_neg:
        return None
    _, index, count = np.unique(probability, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[index]
    return float((rank[truth].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def calibration(probabilities, truth, *, known=None, bins=15) -> dict:
    """Per-finding probabilities float [N, 14] against the truth: ECE, Brier and AUROC.

    ECE: `bins` equal-width bins of the probability, |mean probability - share of positives|, weighted by
    count, over all known cells. Brier: mean squared error over the same cells. `auroc`: per label (None
    where one class is missing); `mean_auroc`: over the labels that have one.
    """
    _, truth, known, _ = _checked(truth, truth, known)
    probabilities = np.asarray(probabilities, float)
    p, y = probabilities[known], truth[known].astype(float)
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    gap = np.abs(np.bincount(bin_of, p - y, bins))
    areas = {
        name: auroc(probabilities[known[:, i], i], truth[known[:, i], i])
        for i, name in enumerate(CHEXPERT_14)
    }
    defined = [a for a in areas.values() if a is not None]
    return {
        "ece": _number(gap.sum() / p.size) if p.size else None,
        "brier": _number(np.mean((p - y) ** 2)) if p.size else None,
        "mean_auroc": float(np.mean(defined)) if defined else None,
        "auroc": areas,
        "bins": bins,
    }


# Everything of one model on one set ---------------------------------------------------------------


def _per_label(total, boot):
    tp, fp, fn, n = _split(total)
    f1, f1_boot = _label_f1(total), _label_f1(boot)
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {
        name: {
            "tp": int(tp[i]),
            "fp": int(fp[i]),
            "fn": int(fn[i]),
            "tn": int(n[i] - tp[i] - fp[i] - fn[i]),
            "n_known": int(n[i]),
            "n_pos": int(tp[i] + fn[i]),
            "n_pred": int(tp[i] + fp[i]),
            "precision": _number(precision[i]),
            "recall": _number(recall[i]),
            "f1": _estimate(f1[i], f1_boot[:, i]),
        }
        for i, name in enumerate(CHEXPERT_14)
    }


def _over_constant(pred, truth, valid, constants, options):
    """Paired gain over the best constant policy (chosen on these very rows, which favours the policy)."""
    out = {}
    for metric in ("jaccard", "macro_f1"):
        best = constants[f"best_{metric}"]
        constant = np.tile(np.isin(CHEXPERT_14, best["labels"]), (len(truth), 1))
        diff = paired_bootstrap(metric, constant, pred, truth, valid_b=valid, **options)
        values = dict(zip(("value", "lo", "hi"), map(_number, diff), strict=True))
        out[metric] = {"policy": best["policy"], **values}
    return out


def summary(
    pred,
    truth,
    *,
    known=None,
    valid=None,
    groups=None,
    prior=None,
    audit=None,
    audit_valid=None,
    probabilities=None,
    trace=None,
    n_boot=1000,
    seed=0,
) -> dict:
    """Everything that is printed about one model on one test set, as a JSON-serialisable dict.

    Keys: `n`, `n_units` and `unit` (what the bootstrap draws), `n_boot`, `seed`, `parse_failure_rate`;
    `jaccard` {value, lo, hi}; `macro_f1` and `micro_f1`, each {subset: {value, lo, hi, labels}} for the
    SUBSETS (`labels`: those that enter the number); `per_label`; `constants` (see constant_policies, with
    `prior`); `over_constant` (paired gain over the best of them); `audit` where other-image predictions
    {name: bool [N, 14]} are given; `calibration` where `probabilities` are; `trace` where values of the traces
    {term: float [N]} are: {term: {value, lo, hi}} of the mean.
    """
    pred, truth, known, valid = _checked(pred, truth, known, valid)
    units = _by_group(_row_counts(pred, truth, known, valid), groups)
    total, boot = units.sum(0), _resampled(units, n_boot, seed)
    used = np.isfinite(_label_f1(total))
    out = {
        "n": len(truth),
        "n_units": len(units),
        "unit": "row" if groups is None else "patient",
        "n_boot": n_boot,
        "seed": seed,
        "parse_failure_rate": float((~valid).mean()),
        "jaccard": _estimate(_jaccard(total), _jaccard(boot)),
    }
    for metric, needs_positive in (("macro_f1", True), ("micro_f1", False)):
        out[metric] = {
            subset: {
                **_estimate(_METRIC[metric](total, subset), _METRIC[metric](boot, subset)),
                "labels": [
                    name
                    for i, name in enumerate(CHEXPERT_14)
                    if keep[i] and (used[i] or not needs_positive)
                ],
            }
            for subset, keep in _KEEP.items()
        }
    out["per_label"] = _per_label(total, boot)
    options = {"known": known, "groups": groups, "n_boot": n_boot, "seed": seed}
    out["constants"] = constant_policies(truth, prior=prior, **options)
    out["over_constant"] = _over_constant(pred, truth, valid, out["constants"], options)
    if audit:
        out["audit"] = image_use_audit(
            {"real": pred, **audit}, truth, valid={"real": valid, **(audit_valid or {})}, **options
        )
    if trace is not None:
        out["trace"] = {term: _mean(values, groups, n_boot, seed) for term, values in trace.items()}
    if probabilities is not None:
        out["calibration"] = calibration(probabilities, truth, known=known)
    return out
