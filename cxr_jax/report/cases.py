"""The report's cases: radiograph, reasoning and answer against the truth, worst first."""

import re

from cxr_jax.labels.answer_text import FORMAT_PATTERN
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.report.tables import esc, set_name

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\S)")
UNSCORED = 2.0  # sorts after every score
SIDES = '<div class="side"><span>R (patient’s right)</span><span>L</span></div>'
LEGEND = """<ul class="chips"><li class="chip correct"><b>✓</b> named and true</li>
<li class="chip missed"><b>missed</b> true, not named</li>
<li class="chip false"><b>false</b> named, not true</li>
<li class="chip open"><b>?</b> named, the reference does not say</li></ul>"""


def marks(case) -> list[tuple[str, str]]:
    """[(kind, label)] with kind correct, missed, false or open, in the labels' order, unknown names last.

    A completion of invalid format names nothing, as in the score, even if an answer can be made out in it.
    """
    answer = case.answer if FORMAT_PATTERN.match(case.completion) else []
    known = set(CHEXPERT_14 if case.known is None else case.known)
    order = list(CHEXPERT_14) + [n for n in answer if n not in CHEXPERT_14]
    out = []
    for name in order:
        said, true = name in answer, name in case.truth
        if said and name in CHEXPERT_14 and name not in known:
            out.append(("open", name))
        elif said or (true and name in known):
            out.append(("correct" if said and true else "false" if said else "missed", name))
    return out


def _chips(found):
    text = {"correct": "✓", "missed": "missed", "false": "false", "open": "?"}
    if not found:
        return '<p class="muted small">No label named, none true.</p>'
    items = "".join(
        f'<li class="chip {kind}"><b>{text[kind]}</b> {esc(name)}</li>' for kind, name in found
    )
    return f'<ul class="chips">{items}</ul>'


def _trace(case):
    """(valid format, HTML): the sentences of the reasoning and the answer as written, or the raw text."""
    found = FORMAT_PATTERN.match(case.completion)
    if not found:
        raw = f"<pre>{esc(case.completion)}</pre>"
        return False, f'<p class="invalid small">Invalid format. The raw text:</p>{raw}'
    sentences = [s for s in _SENTENCE.split(found[1].strip()) if s.strip()]
    items = "".join(f"<li>{esc(s)}</li>" for s in sentences)
    trace = (
        f'<ol class="trace">{items}</ol>'
        if items
        else '<p class="muted small">Empty reasoning.</p>'
    )
    return (
        True,
        trace + f'<p class="answer"><b>Answer:</b> {esc(found[2].strip()) or "(empty)"}</p>',
    )


def _score(case):
    return UNSCORED if case.score is None else float(case.score)


def _card(i, case, uri, show_prompt, sides):
    found = marks(case)
    valid, trace = _trace(case)
    kinds = " ".join(dict.fromkeys([k for k, _ in found] + ([] if valid else ["invalid"])))
    names = "|".join(dict.fromkeys(n for _, n in found))
    score = "–" if case.score is None else f"{case.score:.2f}"
    where = ", ".join(x for x in (set_name(case.hospital), case.model) if x)
    prompt = (
        f"<details><summary class=small>Prompt</summary><pre>{esc(case.prompt)}</pre></details>"
        if show_prompt
        else ""
    )
    attributes = (
        f'data-order="{i}" data-score="{_score(case)}" data-set="{esc(case.hospital)}" '
        f'data-labels="{esc(names)}" data-kinds="{kinds}"'
    )
    head = f'{esc(case.id)} <span class="muted">{esc(where)}</span>'
    image = f'<img src="{uri}" alt="Radiograph of case {esc(case.id)}">{SIDES if sides else ""}'
    return (
        f'<article class="case" {attributes}>'
        f'<div class="head"><span>{head}</span><span class="score">Jaccard {score}</span></div>'
        f"<div>{image}</div><div>{_chips(found)}{trace}</div>{prompt}</article>"
    )


def _select(id, title, options):
    items = "".join(f'<option value="{esc(value)}">{esc(name)}</option>' for value, name in options)
    return f'<label>{title} <select id="{id}"><option value="">all</option>{items}</select></label>'


def _controls(cases):
    labels = [(n, n) for n in CHEXPERT_14 if any(n in c.answer or n in c.truth for c, _ in cases)]
    sets = [(s, set_name(s)) for s in dict.fromkeys(c.hospital for c, _ in cases)]
    kinds = [
        ("missed", "something missed"),
        ("false", "something false"),
        ("invalid", "invalid format"),
    ]
    sort = "".join(
        f'<button type="button" data-sort="{key}" aria-pressed="{pressed}">{text}</button>'
        for key, pressed, text in (
            ("worst", "true", "Worst first"),
            ("best", "false", "Best first"),
        )
    )
    selects = [_select("by-label", "Label", labels), _select("by-kind", "With", kinds)]
    if len(sets) > 1:
        selects.insert(1, _select("by-set", "Set", sets))
    shown = '<span id="shown" class="muted" aria-live="polite"></span>'
    return f'<div class="controls">{sort}{"".join(selects)}{shown}</div>'


def section(cases, *, sides: bool = True) -> str:
    """HTML of [(Case, PNG data URI)]. Works without its script: all cases, worst first.

    `sides`: mark the patient's right and left (the image is known to be in the usual orientation).
    """
    if not cases:
        return '<p class="muted">No case was recorded.</p>'
    cases = sorted(cases, key=lambda pair: _score(pair[0]))
    prompts = list(dict.fromkeys(c.prompt for c, _ in cases))
    shared = (
        f"<p>Every case has the same prompt:</p><pre>{esc(prompts[0])}</pre>"
        if len(prompts) == 1
        else ""
    )
    cards = "".join(
        _card(i, case, uri, len(prompts) > 1, sides) for i, (case, uri) in enumerate(cases)
    )
    return f'{shared}{LEGEND}{_controls(cases)}<div class="cases">{cards}</div>'
