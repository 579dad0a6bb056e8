"""The report's cases: radiograph, reasoning and answer against the truth, worst first."""

import re

from cxr_jax.labels.taxonomy import CHEXPERT_14

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\S)")
_THINK = re.compile(r"<think>(.*?)(?:</think>|<answer>|$)", re.DOTALL)
LEGEND = (
    '<ul class="chips"><li class="chip correct"><b>✓</b> named and true</li><li class="chip '
    'missed"><b>missed</b> true, not '
    'named</li><li class="chip false"><b>false</b> named, not true</li><li class="chip '
    'open"><b>?</b> named, the reference '
    "does not say</li></ul>"
)


def marks(case) -> list[tuple[str, str]]:
    """[(kind, label)] with kind correct, missed, false or open, in the labels' order, unknown names last."""
    known = set(CHEXPERT_14 if case.known is None else case.known)
    order = list(CHEXPERT_14) + [n for n in case.answer if n not in CHEXPERT_14]
    out = []
    for name in order:
        said, true = name in case.answer, name in case.truth
        if said and name in CHEXPERT_14 and name not in known:
            out.append(("open", name))
        elif said or (true and name in known):
            out.append(("correct" if said and true else "false" if said else "missed", name))
    return out


def _chips(found, esc):
    text = {"correct": "✓", "missed": "missed", "false": "false", "open": "?"}
    if not found:
        return '<p class="muted small">No label named, none true.</p>'
    items = "".join(f'<li class="chip {kind}"><b>{text[kind]}</b> {esc(name)}</li>' for kind, name in found)
    return f'<ul class="chips">{items}</ul>'


def _trace(case, esc, valid_format):
    """Sentences of the reasoning; the raw text as well where the format is broken."""
    valid = valid_format.match(case.completion)
    think = _THINK.search(case.completion)
    text = think[1].strip() if think else ""
    items = "".join(f"<li>{esc(s)}</li>" for s in _SENTENCE.split(text) if s.strip())
    out = f'<ol class="trace">{items}</ol>' if items else '<p class="muted small">No reasoning found.</p>'
    if not valid:
        out = f'<p class="invalid small">Invalid format</p><pre>{esc(case.completion)}</pre>' + (
            out if items else ""
        )
    return bool(valid), out


def _card(i, case, uri, esc, set_name, valid_format, show_prompt):
    found = marks(case)
    valid, trace = _trace(case, esc, valid_format)
    kinds = " ".join(dict.fromkeys([k for k, _ in found] + ([] if valid else ["invalid"])))
    names = "|".join(dict.fromkeys(n for _, n in found))
    score = "–" if case.score is None else f"{case.score:.2f}"
    where = ", ".join(x for x in (set_name(case.hospital), case.model) if x)
    prompt = (
        f"<details><summary class=small>Prompt</summary><pre>{esc(case.prompt)}</pre></details>"
        if show_prompt
        else ""
    )
    return (
        f'<article class="case" data-order="{i}" '
        f'data-score="{0 if case.score is None else float(case.score)}" '
        f'data-set="{esc(case.hospital)}" data-labels="{esc(names)}" data-kinds="{kinds}">'
        f'<div class="head"><span>{esc(case.id)} <span class="muted">{esc(where)}</span></span>'
        f'<span class="score">Jaccard {score}</span></div>'
        f'<div><img src="{uri}" alt="Radiograph of case {esc(case.id)}" loading="lazy">'
        '<div class="side"><span>R (patient’s right)</span><span>L</span></div></div>'
        f"<div>{_chips(found, esc)}{trace}</div>{prompt}</article>"
    )


def _select(id, title, options, esc):
    items = "".join(f'<option value="{esc(value)}">{esc(name)}</option>' for value, name in options)
    return f'<label>{title} <select id="{id}"><option value="">all</option>{items}</select></label>'


def _controls(cases, esc, set_name):
    labels = [(n, n) for n in CHEXPERT_14 if any(n in c.answer or n in c.truth for c, _ in cases)]
    sets = [(s, set_name(s)) for s in dict.fromkeys(c.hospital for c, _ in cases)]
    kinds = [("missed", "something missed"), ("false", "something false"), ("invalid", "invalid format")]
    return (
        '<div class="controls"><button type="button" data-sort="worst" aria-pressed="true">Worst '
        "first</button>"
        '<button type="button" data-sort="best" aria-pressed="false">Best first</button>'
        + _select("by-label", "Label", labels, esc)
        + (_select("by-set", "Set", sets, esc) if len(sets) > 1 else "")
        + _select("by-kind", "With", kinds, esc)
        + '<span id="shown" class="muted" aria-live="polite"></span></div>'
    )


def section(cases, esc, set_name, valid_format) -> str:
    """HTML of [(Case, PNG data URI)]. Works without its script: all cases, worst first."""
    if not cases:
        return '<p class="muted">No case was recorded.</p>'
    cases = sorted(cases, key=lambda pair: 0.0 if pair[0].score is None else pair[0].score)
    prompts = list(dict.fromkeys(c.prompt for c, _ in cases))
    shared = (
        f"<p>Every case has the same prompt:</p><pre>{esc(prompts[0])}</pre>" if len(prompts) == 1 else ""
    )
    cards = "".join(
        _card(i, case, uri, esc, set_name, valid_format, len(prompts) > 1)
        for i, (case, uri) in enumerate(cases)
    )
    return f'{shared}{LEGEND}{_controls(cases, esc, set_name)}<div class="cases">{cards}</div>'
