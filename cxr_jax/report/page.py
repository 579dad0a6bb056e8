"""The page of report.html: what it is, in plain words, and its sections in order."""

import json
from importlib import resources

from cxr_jax.report import cases as report_cases
from cxr_jax.report import curves as report_curves
from cxr_jax.report import groups as report_groups
from cxr_jax.report import tables
from cxr_jax.report.tables import esc, set_name

# Nothing is loaded: no network, no fonts, no foreign script; the page's own style and script are in the page.
CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
NOT_FOR_DIAGNOSIS = "Research use only. Not for diagnosis."

REAL = f"""<p class="banner real"><strong>{NOT_FOR_DIAGNOSIS}</strong>
These are real radiographs. The model that ships with this package was trained on synthetic phantoms only: its
numbers on real films say nothing about patients.</p>"""
PHANTOM = f"""<p class="banner"><strong>Phantom results. {NOT_FOR_DIAGNOSIS}</strong>
Every radiograph on this page was drawn by a program. The numbers test the system; they say nothing about
patients.</p>"""
ABOUT = """<p>A vision-language model looks at a chest radiograph, writes down its reasoning, and ends with a
list of findings. This page compares that list with the truth, label by label, on images it was not trained on
({counts}).</p>"""
ABOUT_KIND = {
    "phantom": """<p>The radiographs are <b>phantoms</b>: a program draws them, so the truth is known exactly.
<b>Hospital A</b> is the world the model was trained in. <b>Hospital B</b> is not: another detector, more
bedside (AP) and rotated films, other prevalence, other wording. A model that has only learnt A’s habits fails
on B.</p>""",
    "files": """<p>The radiographs and their reference labels are the files that this run was given; “known”
counts the cells that the reference decides. A reference label is a person’s or a program’s reading, not the
truth itself.</p>""",
}
DEFINITIONS = """<details><summary>How to read the numbers</summary><dl>
<dt>Jaccard</dt><dd>For one image: labels named correctly, divided by all labels that were named or are true.
1 is perfect, also when both lists are empty. Here: the mean over images.</dd>
<dt>F1 of a label</dt><dd>2·TP / (2·TP + FP + FN): the balance of precision (how often a call is right) and
recall (how many positives are called). A label without a positive image has none.</dd>
<dt>macro-F1</dt><dd>The mean of the labels’ F1 over the labels with at least one positive image: rare
findings weigh as much as frequent ones.</dd>
<dt>micro-F1</dt><dd>One F1 over all labels and images pooled: frequent findings dominate.</dd>
<dt>95 % interval</dt><dd>Percentile bootstrap over images (patients, where ids are given). It covers the
choice of test images, not the choice of training seed.</dd>
<dt>Constant answer</dt><dd>A reader that never looks: always “No Finding”, always all labels, or always the k
most frequent labels (k = 1–8). The best of these, chosen on the test set itself, is the bar to clear.</dd>
<dt>Invalid answer</dt><dd>Not of the form &lt;think&gt;…&lt;/think&gt;&lt;answer&gt;…&lt;/answer&gt;. It
counts as no finding named, with Jaccard 0.</dd></dl></details>"""


def about(evaluation):
    """What was done, how to read the numbers, and the run's own notes."""
    models, notes = (
        evaluation["models"],
        "".join(f"<li>{esc(n)}</li>" for n in evaluation.get("notes", ())),
    )
    counts = {n: next(s[n]["n"] for s in models.values() if n in s) for n in tables.sets_of(models)}
    text = ", ".join(f"{set_name(name)}: {n} images" for name, n in counts.items()) or "none yet"
    about_kind = ABOUT_KIND[evaluation["kind"]]
    run = f"<h3>Notes on this run</h3><ul>{notes}</ul>" if notes else ""
    return ABOUT.format(counts=esc(text)) + about_kind + DEFINITIONS + run


def result(evaluation):
    """The headline: sentences, intervals, tables."""
    models = evaluation["models"]
    if not models:
        return '<p class="muted">No evaluation was recorded.</p>'
    parts = (tables.headline_table, tables.subset_table, tables.calibration_table)
    return (
        tables.verdict_lines(evaluation)
        + tables.forests(models)
        + "".join(part(models) for part in parts)
    )


# The page ----------------------------------------------------------------------------------------


def asset(name: str) -> str:
    return (resources.files("cxr_jax") / "assets" / name).read_text(encoding="utf-8")


def section(anchor, title, body):
    return f'<section id="{anchor}"><h2>{title}</h2>{body}</section>'


def page(evaluation: dict, curves: list, cases: list, groups: list = ()) -> str:
    """The whole page. `cases`: [(report.Case, PNG data URI)]; `groups`: of report_groups.Group; formats: report.py."""
    models, title, kind = evaluation["models"], esc(evaluation["title"]), evaluation["kind"]
    config = json.dumps(evaluation.get("config") or {}, indent=2, ensure_ascii=False)
    parts = [
        ("about", "What this is", about(evaluation)),
        ("result", "Result", result(evaluation)),
        ("image-use", "Does it look at the image?", tables.audit_table(models)),
        ("trace", "Does the reasoning say so?", tables.trace_table(models)),
        ("labels", "Label by label", tables.label_table(models) + tables.label_details(models)),
        ("curves", "Training", report_curves.section(curves, models, kind)),
        (
            "groups",
            "What RL preferred, and why",
            report_groups.section(groups, sides=kind == "phantom"),
        ),
        ("cases", "Cases", report_cases.section(cases, sides=kind == "phantom")),
        (
            "config",
            "Configuration",
            f"<details><summary>Show</summary><pre>{esc(config)}</pre></details>",
        ),
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
{asset("report.css")}{report_groups.STYLE if groups else ""}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<nav>{nav}</nav>
<main>
{REAL if kind == "files" else PHANTOM}
{body}
</main>
<footer><p>{NOT_FOR_DIAGNOSIS} Made by cxr_jax from this run’s metrics.jsonl, evaluation.json and
samples.jsonl; draw it again with <code>python -m cxr_jax.report WORKDIR</code>.</p></footer>
<script>
{asset("report.js")}</script>
</body>
</html>
"""
