"""The report's tables and the sentences above them. All text that is not ours goes through `esc`."""

import html
import re

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.report import svg

METRIC = {"macro_f1": "macro-F1", "micro_f1": "micro-F1", "jaccard": "Jaccard"}
SUBSETS = {
    "all": "all 14 labels",
    "without_no_finding": "without No Finding",
    "without_support_devices": "without Support Devices",
    "findings_only": "without both",
}
SET_NAMES = {"A": "Hospital A", "B": "Hospital B", "files": "Given files"}
# C0 controls except tab and newline, and the characters that turn the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


# Text and numbers --------------------------------------------------------------------------------


def esc(text) -> str:
    """Escaped for text and for quoted attributes; control and text-direction characters become visible."""
    return html.escape(_CONTROL.sub("\ufffd", str(text)), quote=True)


def set_name(name: str) -> str:
    return SET_NAMES.get(name, name)


def fixed(x, digits=3) -> str:
    return "–" if x is None else f"{x:.{digits}f}"


def signed(x) -> str:
    return f"{x:+.3f}".replace("-", "−")


def percent(x) -> str:
    return "–" if x is None else f"{100 * x:.1f} %"


def interval(e, sign="") -> str:
    """[lo, hi], or nothing where there is none."""
    return (
        ""
        if e.get("lo") is None
        else f"[{e['lo']:{sign}.3f}, {e['hi']:{sign}.3f}]".replace("-", "−")
    )


# HTML --------------------------------------------------------------------------------------------


def cell(content="", kind="", tag="td", span=1, attributes="") -> str:
    """A table cell; `kind`: its classes."""
    kind = f' class="{kind}"' if kind else ""
    span = f' colspan="{span}"' if span > 1 else ""
    return f"<{tag}{kind}{span}{attributes}>{content}</{tag}>"


def head(content="", kind="", span=1) -> str:
    return cell(content, kind, "th", span)


def table(head_rows: list[str], body_rows: list[str], caption="") -> str:
    """Rows are strings of cells. The box scrolls sideways on a narrow screen."""
    tr = lambda cells: cells if cells.startswith("<tr") else f"<tr>{cells}</tr>"
    text = f'<p class="caption">{caption}</p>' if caption else ""
    top, body = "".join(map(tr, head_rows)), "".join(map(tr, body_rows))
    return (
        f'{text}<div class="scroll"><table><thead>{top}</thead><tbody>{body}</tbody></table></div>'
    )


def folded(title, content) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def small(text, kind="ci") -> str:
    return f'<span class="{kind}">{text}</span>'


def with_interval(e, bold=False) -> str:
    value = fixed(e["value"])
    return (f"<b>{value}</b>" if bold else value) + small(interval(e))


def sets_of(models) -> list[str]:
    return list(dict.fromkeys(name for sets in models.values() for name in sets))


def _set_heads(models, span) -> str:
    """One spanning head a set, in the set's colour."""
    return "".join(
        head(esc(set_name(s)), f"group sep {'ab'[i % 2]}", span(s))
        for i, s in enumerate(sets_of(models))
    )


def _first(models, name):
    """A summary of that set: what concerns the set alone (constants, counts) is the same in all."""
    return next(sets[name] for sets in models.values() if name in sets)


def _value(summary, metric):
    return summary["jaccard"] if metric == "jaccard" else summary[metric]["all"]


# Headline ----------------------------------------------------------------------------------------


def verdict_lines(evaluation) -> str:
    """Plain sentences: the last model against the constant answers, then the paired comparisons."""
    models, out, pairs = evaluation["models"], [], {}
    name = list(models)[-1]
    for s, summary in models[name].items():
        values = ", ".join(
            f"{METRIC[m]} <b>{fixed(_value(summary, m)['value'])}</b> {interval(_value(summary, m))}"
            for m in ("macro_f1", "jaccard")
        )
        line = f"<b>{esc(set_name(s))}.</b> {esc(name)}: {values}."
        if gain := summary.get("over_constant"):
            gains = "; ".join(
                f"{METRIC[m]} {_difference(gain[m])}" for m in ("macro_f1", "jaccard")
            )
            line += f" Against the best constant answer: {gains}."
        out.append(line)
    for c in evaluation.get("comparisons", ()):
        pairs.setdefault((c["b"], c["a"], c["set"]), []).append(c)
    for (new, old, s), found in pairs.items():
        text = "; ".join(
            f"{esc(METRIC.get(c['metric'], c['metric']))} {_difference(c)}" for c in found
        )
        out.append(f"<b>{esc(new)} against {esc(old)}</b>, {esc(set_name(s))}: {text}.")
    return "<ul>" + "".join(f"<li>{line}</li>" for line in out) + "</ul>"


def _difference(e) -> str:
    """A signed difference and what its interval allows to say; `e` holds "diff" or "value", "lo", "hi"."""
    value = e["diff"] if "diff" in e else e["value"]
    if value is None:
        return "not defined"
    text = f"<b>{signed(value)}</b> {interval(e, sign='+')}"
    if e["lo"] is None or e["lo"] <= 0 <= e["hi"]:
        return text + " (the interval includes 0: no difference shown)"
    return text + (" (worse)" if e["hi"] < 0 else "")


def forests(models) -> str:
    """Interval plots of macro-F1 and Jaccard, with the best constant answer of each set."""
    out = []
    for metric in ("macro_f1", "jaccard"):
        groups = []
        for i, s in enumerate(sets_of(models)):
            rows = [(m, _value(sets[s], metric)) for m, sets in models.items() if s in sets]
            constant = _first(models, s)["constants"][f"best_{metric}"][metric]["value"]
            groups.append((set_name(s), svg.PALETTE[i % len(svg.PALETTE)], rows, constant))
        plot = svg.forest(METRIC[metric], groups)
        out.append(f"<figure><h3>{METRIC[metric]}</h3>{plot}</figure>")
    return f'<div class="two">{"".join(out)}</div>'


def _constant_cell(summary, metric) -> str:
    """The best constant answer by this very metric, with its name."""
    constants = summary["constants"]
    if f"best_{metric}" in constants:
        best = constants[f"best_{metric}"]
        return with_interval(best[metric]) + small(esc(best["policy"]), "who")
    policies = constants["policies"]
    name = max(policies, key=lambda p: -1.0 if policies[p][metric] is None else policies[p][metric])
    return fixed(policies[name][metric]) + small(esc(name), "who")


def headline_table(models) -> str:
    names = sets_of(models)
    titles = "".join(head(t, "" if i else "sep") for i, t in enumerate(METRIC.values())) + head(
        "invalid"
    )
    constant = head("best constant answer")
    for s in names:
        summary = _first(models, s)
        cells = [cell(_constant_cell(summary, m), "" if i else "sep") for i, m in enumerate(METRIC)]
        constant += "".join(cells) + cell("–")
    rows = [f'<tr class="constant">{constant}</tr>']
    for model, sets in models.items():
        row = head(esc(model))
        for s in names:
            if s not in sets:
                row += cell("not evaluated", "sep", span=4)
                continue
            for i, m in enumerate(METRIC):
                e, every = (
                    _value(sets[s], m),
                    [_value(x[s], m)["value"] for x in models.values() if s in x],
                )
                top = max((v for v in every if v is not None), default=None)
                row += cell(
                    with_interval(e, top is not None and e["value"] == top), "" if i else "sep"
                )
            row += cell(percent(sets[s]["parse_failure_rate"]))
        rows.append(row)
    return table(
        [head() + _set_heads(models, lambda s: 4), head() + titles * len(names)],
        rows,
        "All 14 labels. Brackets: 95 % intervals. Bold: the highest of the models. The intervals of two "
        "models may overlap although their paired difference is clear.",
    )


def subset_table(models) -> str:
    names, rows = sets_of(models), []
    for model, sets in models.items():
        for key, label in SUBSETS.items():
            row = head(esc(model)) + cell(label, "left")
            for s in names:
                if s not in sets:
                    row += cell("", "sep", span=2)
                    continue
                macro, micro = sets[s]["macro_f1"][key], sets[s]["micro_f1"][key]
                count = small(f"{len(macro['labels'])} labels", "who")
                row += cell(with_interval(macro) + count, "sep") + cell(with_interval(micro))
            rows.append(row)
    titles = (head("macro-F1", "sep") + head("micro-F1")) * len(names)
    heads = [head() * 2 + _set_heads(models, lambda s: 2), head() + head("labels", "left") + titles]
    return folded("The same without No Finding and Support Devices", table(heads, rows))


def calibration_table(models) -> str:
    rows = [
        head(esc(model))
        + cell(esc(set_name(s)), "left")
        + "".join(
            cell(fixed(summary["calibration"][key])) for key in ("mean_auroc", "ece", "brier")
        )
        for model, sets in models.items()
        for s, summary in sets.items()
        if summary.get("calibration")
    ]
    if not rows:
        return ""
    titles = head() + head("set", "left") + head("AUROC") + head("ECE") + head("Brier")
    return table(
        [titles],
        rows,
        "The per-finding probabilities: mean AUROC over the labels with both classes, expected "
        "calibration error, Brier score.",
    )


# Image use ---------------------------------------------------------------------------------------


def audit_table(models) -> str:
    audits = [
        (m, s, x["audit"]) for m, sets in models.items() for s, x in sets.items() if x.get("audit")
    ]
    if not audits:
        return '<p class="muted">No image-use audit was recorded.</p>'
    others = list(dict.fromkeys(name for *_, audit in audits for name in audit if name != "real"))
    rows = []
    for model, s, audit in audits:
        row = head(esc(model)) + cell(esc(set_name(s)), "left")
        for metric in ("jaccard", "macro_f1"):
            row += cell(fixed(audit["real"][metric]), "sep")
            row += "".join(cell(_audit_cell(audit.get(name, {}), metric)) for name in others)
        for i, name in enumerate(others):
            row += cell(percent(audit.get(name, {}).get("same_answer")), "" if i else "sep")
        rows.append(row + cell(_uses_image(audit), "left"))
    n = len(others)
    groups = head("Jaccard", "group sep", 1 + n) + head("macro-F1", "group sep", 1 + n)
    groups += head("same answer as<br>with the real one", "group sep", n)
    titles = (head("real", "sep") + "".join(head(esc(name)) for name in others)) * 2
    titles += "".join(head(esc(name), "" if i else "sep") for i, name in enumerate(others))
    return table(
        [
            head() * 2 + groups + head(),
            head() + head("set", "left") + titles + head("uses the<br>image?", "left"),
        ],
        rows,
        "Scores against the truth of the real image when the model is shown that image, a blank one, or "
        "another patient’s (swapped). Small: the change from the real image, with the paired 95 % "
        "interval. “Yes”: with each of the other images Jaccard falls, and the interval is clear of 0.",
    )


def _audit_cell(x, metric) -> str:
    drop = x.get(f"drop_{metric}") or {}
    if drop.get("value") is None or drop.get("lo") is None:
        return fixed(x.get(metric))
    change = {"lo": -drop["hi"], "hi": -drop["lo"]}
    return fixed(x.get(metric)) + small(signed(-drop["value"])) + small(interval(change, sign="+"))


def _uses_image(audit) -> str:
    drops = [x["drop_jaccard"] for name, x in audit.items() if name != "real"]
    yes = bool(drops) and all(d["lo"] is not None and d["lo"] > 0 for d in drops)
    return small("yes", "verdict yes") if yes else small("not shown", "verdict no")


# The trace ---------------------------------------------------------------------------------------

TRACE = {
    "trace_answer": "agrees with<br>the answer",
    "trace_findings": "agrees with<br>the truth",
    "trace_truth": "sentences<br>without an error",
    "trace_false": "false sentences<br>a trace",
}


def trace_table(models) -> str:
    rows = [
        head(esc(model))
        + cell(esc(set_name(s)), "left")
        + "".join(cell(with_interval(summary["trace"][key])) for key in TRACE)
        for model, sets in models.items()
        for s, summary in sets.items()
        if summary.get("trace")
    ]
    if not rows:
        return '<p class="muted">The traces were not read.</p>'
    return table(
        [head() + head("set", "left") + "".join(map(head, TRACE.values()))],
        rows,
        "The reasoning, read sentence by sentence as a report (docs/report_parser.md), held against the answer below "
        "it and against the truth, with sides where they are known. 1 is best; the last column counts "
        "(docs/rewards.md).",
    )


# Per label ---------------------------------------------------------------------------------------


def label_table(models) -> str:
    if not models:
        return ""
    names, rows = sets_of(models), []
    with_set = lambda s: [m for m, sets in models.items() if s in sets]
    for label in CHEXPERT_14:
        row = head(label)
        for i, s in enumerate(names):
            row += cell(_first(models, s)["per_label"][label]["n_pos"], "sep muted")
            row += "".join(_f1_cell(models[m][s]["per_label"][label], i) for m in with_set(s))
        rows.append(row)
    titles = "".join(head("n+", "sep") + "".join(head(esc(m)) for m in with_set(s)) for s in names)
    return table(
        [head() + _set_heads(models, lambda s: 1 + len(with_set(s))), head() + titles],
        rows,
        "F1 of each label; n+: images on which it is truly positive. Move over a cell for precision, "
        "recall and counts. “–”: no positive image.",
    )


def _f1_cell(row, i) -> str:
    """F1 over a bar of its length."""
    title = (
        f"precision {fixed(row['precision'])}, recall {fixed(row['recall'])}; TP {row['tp']}, FP "
        f"{row['fp']}, FN {row['fn']}, TN {row['tn']}; F1 {fixed(row['f1']['value'])} "
        f"{interval(row['f1'])}"
    )
    f1 = row["f1"]["value"]
    attributes = f' style="--w:{100 * (f1 or 0):.0f}%" title="{title}"'
    return cell(fixed(f1, 2), "bar hb" if i % 2 else "bar", attributes=attributes)


def label_details(models) -> str:
    columns = ("n_known", "n_pos", "tp", "fp", "fn", "tn")
    titles = ("known", "n+", "TP", "FP", "FN", "TN", "precision", "recall", "F1", "95 %")
    out = ""
    for model, sets in models.items():
        for s, summary in sets.items():
            rows = [
                head(label)
                + "".join(cell(r[key]) for key in columns)
                + cell(fixed(r["precision"]))
                + cell(fixed(r["recall"]))
                + cell(fixed(r["f1"]["value"]))
                + cell(interval(r["f1"]))
                for label, r in summary["per_label"].items()
            ]
            heads = head() + "".join(map(head, titles))
            out += f"<h3>{esc(model)}, {esc(set_name(s))}</h3>{table([heads], rows)}"
    return folded("All counts, precision and recall", out) if out else ""
