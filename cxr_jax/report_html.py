"""The parts of report.html: strings in, strings out. All text that is not ours goes through `esc`."""

import html
import json
import re
from importlib import resources

from cxr_jax import report_curves, report_svg
from cxr_jax.labels.taxonomy import CHEXPERT_14

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SUBSETS = {
    "all": "all 14 labels",
    "without_no_finding": "without No Finding",
    "without_support_devices": "without Support Devices",
    "findings_only": "without both",
}
NOT_FOR_DIAGNOSIS = "Research use only. Not for diagnosis."
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
_FORMAT = re.compile(r"^<think>(.*?)</think>\s*<answer>(.*?)</answer>$", re.DOTALL)


def esc(text) -> str:
    """Escaped for text and for quoted attributes; control and text-direction characters become visible."""
    return html.escape(_CONTROL.sub("\ufffd", str(text)), quote=True)


def set_name(name: str) -> str:
    return {"A": "Hospital A", "B": "Hospital B", "files": "Given files"}.get(name, name)


def tint(index: int) -> str:
    return "ab"[index % 2]


def fixed(x, digits=3) -> str:
    return "–" if x is None else f"{x:.{digits}f}"


def percent(x) -> str:
    return "–" if x is None else f"{100 * x:.1f} %"


def interval(e, digits=3, sign="") -> str:
    if e.get("lo") is None:
        return ""
    return f"[{e['lo']:{sign}.{digits}f}, {e['hi']:{sign}.{digits}f}]"


def with_ci(e, best=False, extra="") -> str:
    value = f'<span class="best">{fixed(e["value"])}</span>' if best else fixed(e["value"])
    return f'{value}<span class="ci">{interval(e)}</span>{extra}'


def sets_of(models) -> list[str]:
    return list(dict.fromkeys(name for sets in models.values() for name in sets))


# What this is ------------------------------------------------------------------------------------


def banner(kind):
    if kind == "files":
        return (
            f'<p class="banner real"><strong>{NOT_FOR_DIAGNOSIS}</strong> These are real '
            "radiographs. The model that "
            "ships with this package was trained on synthetic phantoms only: numbers it gets on "
            "real films say "
            "nothing about patients.</p>"
        )
    return (
        f'<p class="banner"><strong>Phantom results. {NOT_FOR_DIAGNOSIS}</strong> Every radiograph '
        "on this page was "
        "drawn by a program. The numbers test the system; they say nothing about patients.</p>"
    )


def about(evaluation):
    models, names = evaluation["models"], sets_of(evaluation["models"])
    first = next((sets[n] for sets in models.values() for n in names if n in sets), None)
    counts = ", ".join(f"{set_name(n)}: {next(s[n]['n'] for s in models.values() if n in s)}" for n in names)
    text = (
        "<p>A vision-language model looks at a chest radiograph, writes down its reasoning, and "
        "ends with a list of "
        "findings. This page compares that list with the truth, label by label, on images it was "
        "not trained on"
        f" ({esc(counts)}).</p>"
        if first
        else "<p>No evaluation was recorded.</p>"
    )
    if evaluation["kind"] == "phantom":
        text += (
            "<p>The radiographs are <b>phantoms</b>: a program draws them, so the truth is known exactly. "
            "<b>Hospital A</b> is the world the model was trained in. <b>Hospital B</b> is not: "
            "another detector, more "
            "bedside (AP) and rotated films, other prevalence, other wording. A model that has only "
            "learnt A's habits "
            "fails on B.</p>"
        )
    return text + DEFINITIONS


DEFINITIONS = """<details><summary>How to read the numbers</summary><dl>
<dt>Jaccard</dt><dd>For one image: labels named correctly, divided by all labels that were named or are true.
1 is perfect, also when both lists are empty. Here: the mean over images.</dd>
<dt>F1 of a label</dt><dd>2·TP / (2·TP + FP + FN): the balance of precision (how often a call is right) and
recall (how many positives are called). A label without a positive image has none.</dd>
<dt>macro-F1</dt><dd>The mean of the labels' F1 over the labels with at least one positive image: rare
findings weigh as much as frequent ones.</dd>
<dt>micro-F1</dt><dd>One F1 over all labels and images pooled: frequent findings dominate.</dd>
<dt>95 % interval</dt><dd>Percentile bootstrap over images (patients, where ids are given). It covers the
choice of test images, not the choice of training seed.</dd>
<dt>Constant answer</dt><dd>A reader that never looks: always “No Finding”, always all labels, or always the k
most frequent labels (k = 1–8). The best of these, chosen on the test set itself, is the bar to clear.</dd>
<dt>Invalid answer</dt><dd>Not of the form &lt;think&gt;…&lt;/think&gt;&lt;answer&gt;…&lt;/answer&gt;. It
counts as no finding named, with Jaccard 0.</dd></dl></details>"""


# Headline ----------------------------------------------------------------------------------------


def verdict_lines(evaluation):
    """Plain sentences: the last model against the constant answers, then the paired comparisons."""
    models, out = evaluation["models"], []
    if not models:
        return ""
    name = list(models)[-1]
    for s, summary in models[name].items():
        macro, jaccard = summary["macro_f1"]["all"], summary["jaccard"]
        line = (
            f"<b>{esc(set_name(s))}.</b> {esc(name)}: macro-F1 <b>{fixed(macro['value'])}</b> "
            f"{interval(macro)}, "
            f"Jaccard <b>{fixed(jaccard['value'])}</b> {interval(jaccard)}."
        )
        gain = summary.get("over_constant")
        if gain:
            line += " Against the best constant answer: " + "; ".join(
                f"{label} {_difference(gain[m])}"
                for m, label in (("macro_f1", "macro-F1"), ("jaccard", "Jaccard"))
            )
            line += "."
        out.append(line)
    names = {"macro_f1": "macro-F1", "jaccard": "Jaccard", "micro_f1": "micro-F1"}
    for c in evaluation.get("comparisons", ()):
        e = {"value": c["diff"], "lo": c["lo"], "hi": c["hi"]}
        out.append(
            f"<b>{esc(c['b'])} against {esc(c['a'])}</b>, {esc(set_name(c['set']))}: "
            f"{esc(names.get(c['metric'], c['metric']))} {_difference(e)}."
        )
    return "<ul>" + "".join(f"<li>{line}</li>" for line in out) + "</ul>"


def _difference(e):
    if e["value"] is None:
        return "not defined"
    text = f"<b>{e['value']:+.3f}</b> {interval(e, sign='+')}"
    if e["lo"] is None or e["lo"] <= 0 <= e["hi"]:
        return text + " (the interval includes 0: no difference shown)"
    return text


def forests(models):
    names, out = sets_of(models), []
    for title, pick in (
        ("macro-F1", lambda s: s["macro_f1"]["all"]),
        ("Jaccard", lambda s: s["jaccard"]),
    ):
        key = "macro_f1" if title == "macro-F1" else "jaccard"
        groups = []
        for i, s in enumerate(names):
            rows = [(m, pick(sets[s])) for m, sets in models.items() if s in sets]
            best = next(
                sets[s]["constants"][f"best_{key}"][key]["value"] for sets in models.values() if s in sets
            )
            groups.append((set_name(s), report_svg.PALETTE[i], rows, best))
        out.append(f"<figure><h3>{title}</h3>{report_svg.forest(title, groups)}</figure>")
    return f'<div class="two">{"".join(out)}</div>'


HEADLINE = (("macro_f1", "macro-F1"), ("micro_f1", "micro-F1"), ("jaccard", "Jaccard"))


def _value(summary, metric):
    return summary["jaccard"] if metric == "jaccard" else summary[metric]["all"]


def _constant_cell(summary, metric):
    constants = summary["constants"]
    if metric == "micro_f1":
        policies = constants["policies"]
        name = max(policies, key=lambda p: -1.0 if policies[p][metric] is None else policies[p][metric])
        return f'{fixed(policies[name][metric])}<span class="who">{esc(name)}</span>'
    best = constants[f"best_{metric}"]
    return with_ci(best[metric], extra=f'<span class="who">{esc(best["policy"])}</span>')


def headline_table(models):
    names = sets_of(models)
    groups = "".join(
        f'<th class="group sep {tint(i)}" colspan="4">{esc(set_name(s))}</th>' for i, s in enumerate(names)
    )
    heads = "".join(
        "".join(f"<th{' class=sep' if j == 0 else ''}>{label}</th>" for j, (_, label) in enumerate(HEADLINE))
        + "<th>invalid</th>"
        for _ in names
    )
    constant = ""
    for s in names:
        summary = next(sets[s] for sets in models.values() if s in sets)
        cells = [_constant_cell(summary, m) for m, _ in HEADLINE]
        constant += f'<td class="sep">{cells[0]}</td><td>{cells[1]}</td><td>{cells[2]}</td><td>–</td>'
    rows = f'<tr class="constant"><th>best constant answer</th>{constant}</tr>'
    for model, sets in models.items():
        cells = ""
        for s in names:
            if s not in sets:
                cells += '<td class="sep" colspan="4">not evaluated</td>'
                continue
            for j, (metric, _) in enumerate(HEADLINE):
                e = _value(sets[s], metric)
                top = max((_value(x[s], metric)["value"] or 0) for x in models.values() if s in x)
                cells += f"<td{' class=sep' if j == 0 else ''}>{with_ci(e, e['value'] == top)}</td>"
            cells += f"<td>{percent(sets[s]['parse_failure_rate'])}</td>"
        rows += f"<tr><th>{esc(model)}</th>{cells}</tr>"
    return (
        '<div class="scroll"><table><caption>All 14 labels; 95 % intervals in brackets; bold: the '
        "highest value of a "
        "column. Intervals of two rows may overlap and the paired difference still be "
        "clear.</caption><thead><tr>"
        f"<th></th>{groups}</tr><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def subset_table(models):
    names = sets_of(models)
    head = "".join(
        f'<th class="sep {tint(i)}">{esc(set_name(s))}<br>macro-F1</th><th class="{tint(i)}">micro-F1</th>'
        for i, s in enumerate(names)
    )
    rows = ""
    for model, sets in models.items():
        for key, label in SUBSETS.items():
            cells = "".join(
                f'<td class="sep">{with_ci(sets[s]["macro_f1"][key])}'
                f'<span class="who">{len(sets[s]["macro_f1"][key]["labels"])} labels</span></td>'
                f"<td>{with_ci(sets[s]['micro_f1'][key])}</td>"
                if s in sets
                else '<td class="sep"></td><td></td>'
                for s in names
            )
            rows += f'<tr><th>{esc(model)}</th><td class="left">{label}</td>{cells}</tr>'
    return (
        "<details><summary>The same without No Finding and Support Devices</summary><div "
        "class=scroll><table><thead>"
        "<tr><th></th><th "
        f'class="left">labels</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def calibration_table(models):
    rows = ""
    for model, sets in models.items():
        for s, summary in sets.items():
            c = summary.get("calibration")
            if c:
                rows += (
                    f"<tr><th>{esc(model)}</th><td "
                    f'class="left">{esc(set_name(s))}</td><td>{fixed(c["mean_auroc"])}</td>'
                    f"<td>{fixed(c['ece'])}</td><td>{fixed(c['brier'])}</td></tr>"
                )
    if not rows:
        return ""
    return (
        '<div class="scroll"><table><caption>Calibration of the per-finding probabilities (mean '
        "AUROC over the labels "
        "with both classes; expected calibration error; Brier "
        'score).</caption><thead><tr><th></th><th class="left">set'
        f"</th><th>AUROC</th><th>ECE</th><th>Brier</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


# Image use ---------------------------------------------------------------------------------------


def audit_table(models):
    audits = [(m, s, x["audit"]) for m, sets in models.items() for s, x in sets.items() if x.get("audit")]
    if not audits:
        return '<p class="muted">No image-use audit was recorded.</p>'
    others = list(dict.fromkeys(name for *_, audit in audits for name in audit if name != "real"))
    head = "".join(
        f'<th class="group sep" colspan="{1 + len(others)}">{label}</th>' for label in ("Jaccard", "macro-F1")
    )
    head2 = ("<th class=sep>real</th>" + "".join(f"<th>{esc(n)}</th>" for n in others)) * 2
    head2 += "".join(f"<th{' class=sep' if i == 0 else ''}>{esc(n)}</th>" for i, n in enumerate(others))
    rows = ""
    for model, s, audit in audits:
        cells = ""
        for metric in ("jaccard", "macro_f1"):
            cells += f'<td class="sep">{fixed(audit["real"][metric])}</td>'
            for n in others:
                drop = audit.get(n, {}).get(f"drop_{metric}")
                lost = (
                    f'<span class="ci">{-drop["value"]:+.3f} [{-drop["hi"]:+.3f}, {-drop["lo"]:+.3f}]</span>'
                    if drop and drop["value"] is not None and drop["lo"] is not None
                    else ""
                )
                cells += f"<td>{fixed(audit.get(n, {}).get(metric))}{lost}</td>"
        for i, n in enumerate(others):
            cells += (
                f"<td{' class=sep' if i == 0 else ''}>{percent(audit.get(n, {}).get('same_answer'))}</td>"
            )
        rows += (
            f'<tr><th>{esc(model)}</th><td class="left">{esc(set_name(s))}</td>{cells}{_verdict(audit)}</tr>'
        )
    return (
        '<div class="scroll"><table><caption>Scores against the truth of the real image, when the '
        "model is shown the real "
        "image, a blank one, or another patient’s (swapped). Small: the change from the real image, "
        "paired 95 % interval."
        f'</caption><thead><tr><th></th><th class="left"></th>{head}<th class="group sep" '
        f'colspan="{len(others)}">same answer '
        f'as with real</th><th></th></tr><tr><th></th><th class="left">set</th>{head2}<th '
        'class="left">uses the image?</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _verdict(audit):
    drops = [x["drop_jaccard"] for name, x in audit.items() if name != "real"]
    yes = bool(drops) and all(d["lo"] is not None and d["lo"] > 0 for d in drops)
    kind, text = ("yes", "yes") if yes else ("no", "not shown")
    return f'<td class="left"><span class="verdict {kind}">{text}</span></td>'


# Per label ---------------------------------------------------------------------------------------


def label_table(models):
    names = sets_of(models)
    head = "".join(
        f'<th class="group sep {tint(i)}" '
        f'colspan="{1 + sum(s in x for x in models.values())}">{esc(set_name(s))}</th>'
        for i, s in enumerate(names)
    )
    head2 = "".join(
        "<th class=sep>n+</th>" + "".join(f"<th>{esc(m)}</th>" for m, x in models.items() if s in x)
        for s in names
    )
    rows = ""
    for label in CHEXPERT_14:
        cells = ""
        for i, s in enumerate(names):
            per = [x[s]["per_label"][label] for x in models.values() if s in x]
            cells += f'<td class="sep muted">{per[0]["n_pos"]}</td>'
            cells += "".join(_f1_cell(row, i) for row in per)
        rows += f"<tr><th>{label}</th>{cells}</tr>"
    return (
        '<div class="scroll"><table><caption>F1 of each label (n+: images on which it is truly '
        "positive). Hover over a "
        "cell for precision, recall and counts; “–”: no positive image.</caption><thead><tr><th></th>"
        f"{head}</tr><tr><th></th>{head2}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _f1_cell(row, i):
    f1 = row["f1"]["value"]
    title = (
        f"precision {fixed(row['precision'])}, recall {fixed(row['recall'])}; "
        f"TP {row['tp']}, FP {row['fp']}, FN {row['fn']}, TN {row['tn']}; 95 % {interval(row['f1'])}"
    )
    look = f'class="bar{" hb" if i % 2 else ""}" style="--w:{100 * (f1 or 0):.0f}%"'
    return f'<td {look} title="{title}">{fixed(f1, 2)}</td>'


def label_details(models):
    out = ""
    for model, sets in models.items():
        for s, summary in sets.items():
            rows = "".join(
                f"<tr><th>{label}</th><td>{r['n_known']}</td><td>{r['n_pos']}</td><td>{r['tp']}</td><td>{r['fp']}</td>"
                f"<td>{r['fn']}</td><td>{r['tn']}</td><td>{fixed(r['precision'])}</td><td>{fixed(r['recall'])}</td>"
                f"<td>{fixed(r['f1']['value'])} {interval(r['f1'])}</td></tr>"
                for label, r in summary["per_label"].items()
            )
            out += (
                f"<h3>{esc(model)}, {esc(set_name(s))}</h3><div "
                "class=scroll><table><thead><tr><th></th><th>known</th>"
                "<th>n+</th><th>TP</th><th>FP</th><th>FN</th><th>TN</th><th>precision</th><th>recall</th>"
                f"<th>F1 [95 %]</th></tr></thead><tbody>{rows}</tbody></table></div>"
            )
    return f"<details><summary>All counts, precision and recall</summary>{out}</details>" if out else ""


# The page ----------------------------------------------------------------------------------------


def asset(name: str) -> str:
    return (resources.files("cxr_jax") / "assets" / name).read_text(encoding="utf-8")


def section(anchor, title, body):
    return f'<section id="{anchor}"><h2>{title}</h2>{body}</section>'


def page(evaluation: dict, curves: list, cases: list) -> str:
    """The whole page. `cases`: [(report.Case, PNG data URI)]; formats: see report.py."""
    from cxr_jax import report_cases

    models, title = evaluation["models"], esc(evaluation["title"])
    notes = "".join(f"<li>{esc(n)}</li>" for n in evaluation.get("notes", ()))
    result = verdict_lines(evaluation)
    if models:
        result += forests(models) + headline_table(models) + subset_table(models) + calibration_table(models)
    config = json.dumps(evaluation.get("config") or {}, indent=2, sort_keys=False)
    parts = [
        ("about", "What this is", about(evaluation) + (f"<ul>{notes}</ul>" if notes else "")),
        ("result", "Result", result or '<p class="muted">No evaluation was recorded.</p>'),
        ("image-use", "Does it look at the image?", audit_table(models)),
        ("labels", "Label by label", label_table(models) + label_details(models) if models else ""),
        ("curves", "Training", report_curves.section(curves, models, set_name)),
        ("cases", "Cases", report_cases.section(cases, esc, set_name, _FORMAT)),
        ("config", "Configuration", f"<details><summary>Show</summary><pre>{esc(config)}</pre></details>"),
    ]
    parts = [(anchor, name, body) for anchor, name, body in parts if body]
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in parts)
    body = "".join(section(*part) for part in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CSP}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>
{asset("report.css")}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<nav>{nav}</nav>
<main>
{banner(evaluation["kind"])}
{body}
</main>
<footer><p>{NOT_FOR_DIAGNOSIS} Made by cxr_jax from this run’s metrics.jsonl, evaluation.json and
samples.jsonl; draw it again with <code>python -m cxr_jax.report WORKDIR</code>.</p></footer>
<script>
{asset("report.js")}</script>
</body>
</html>
"""
