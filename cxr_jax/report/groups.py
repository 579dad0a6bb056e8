"""The report's groups: why RL preferred one completion of an image to another.

A group is one image and prompt of a training step with its G sampled completions, every reward term of each, and the
advantages that the step learned from. `groups_of` takes a few from a rollout; report.py keeps them in samples.jsonl;
`section` draws them.
"""

import types
from collections.abc import Sequence

import numpy as np

from cxr_jax.labels.answer_text import extract_trace
from cxr_jax.labels.sentences import AGREES, CONTRADICTS, NOTHING, OPEN, Sentence
from cxr_jax.report import cases
from cxr_jax.report.group_records import SAME, Completion, Group
from cxr_jax.report.preference import ABOUT, _is_same, contributions, number, ranked, why
from cxr_jax.report.tables import cell, esc, folded, head, table

LOOKS = 12  # looks of a run that the page shows: the first, and the latest
ENDS = 2  # completions shown of each end of a group; those between are folded


# HTML ------------------------------------------------------------------------------------------------

STYLE = """
.group { border-top: 1.5px solid var(--ink); padding: 12px 0 20px; margin-top: 18px; }
.group .top { display: grid; grid-template-columns: minmax(120px, 210px) minmax(0, 1fr); gap: 6px 20px; }
.group .top img { width: 100%; background: #000; display: block; border-radius: 3px; }
.group .side { font-size: .7rem; color: var(--muted); display: flex; justify-content: space-between; }
.group .because { font-size: 1.04rem; font-weight: 600; max-width: 92ch; }
.group .note { color: var(--warn); font-weight: 600; }
.comps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 262px), 1fr)); gap: 12px;
  margin: 12px 0 0; align-items: start; }
.comp { border: 1px solid var(--line); border-radius: 5px; padding: 10px; min-width: 0; }
.comp.left-out { background: var(--soft); border-style: dashed; }
.comp h4 { margin: 0; font-size: .92rem; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 8px; }
.comp table { font-size: .78rem; } .comp th, .comp td { padding: 2px 4px; } .comp .scroll { margin: 6px 0; }
.comp tbody th { font-weight: 400; white-space: normal; } .comp p.answer { font-size: .8rem; }
.comp tr.total th, .comp tr.total td { font-weight: 700; border-top: 1.5px solid var(--ink); }
.comp td.part { background: linear-gradient(to right, var(--tint) var(--w), transparent var(--w)); }
.comp td.up { --tint: #d3ecdb; } .comp td.down { --tint: #f8d9dd; }
.adv { position: relative; height: 10px; background: var(--soft); margin: 4px 0 8px; border-radius: 2px; }
.adv::after { content: ""; position: absolute; left: 50%; top: -2px; bottom: -2px;
  border-left: 1.5px solid var(--ink); }
.adv i { position: absolute; top: 0; bottom: 0; }
.adv i.up { background: var(--good); } .adv i.down { background: var(--bad); }
.said { list-style: none; margin: 8px 0 0; padding: 0; font-size: .8rem; line-height: 1.42; }
.said li { padding-left: 1.25em; position: relative; overflow-wrap: anywhere; margin: 2px 0; }
.said li > b { position: absolute; left: 0; }
.said .agrees b { color: var(--good); } .said .contradicts b, .said em { color: var(--bad); }
.said .agrees u { text-decoration: underline solid #7fbf97 1.5px; text-underline-offset: 3px; }
.said .contradicts u { text-decoration: underline wavy var(--bad) 1px; text-underline-offset: 3px; }
.said .open u { text-decoration: underline dotted #7b848d 1.5px; text-underline-offset: 3px; }
.said .nothing u { text-decoration: none; } .said .nothing { color: var(--muted); }
.said em { font-style: normal; font-weight: 600; }
ul.said.key { display: flex; flex-wrap: wrap; gap: 2px 22px; font-size: .86rem; }
@media (max-width: 560px) { .group .top { grid-template-columns: minmax(0, 1fr); }
  .group .top > div:first-child { max-width: 256px; } }
"""
MARKS = {  # verdict -> class, mark, what it means
    AGREES: ("agrees", "✓", "agrees with the truth"),
    CONTRADICTS: ("contradicts", "✗", "contradicts it"),
    OPEN: ("open", "~", "the truth does not decide it"),
    NOTHING: ("nothing", "", "claims nothing about a finding"),
}
INTRO = """<p>For every image RL samples several completions and rewards each. The <b>advantage</b> says where a
completion’s reward stands among those of the same image: what stands above is made more likely, what stands below less.
Each group below was recorded at the step that learned from it, the highest advantage first. Read the bold sentence
beside the image first; the parts of a reward (a term’s value × its weight) add up to the reward.</p>"""


def _said(s: Sentence) -> str:
    kind, mark, _ = MARKS.get(s.verdict, MARKS[NOTHING])
    reasons = f" <em>[{esc(', '.join(s.why))}]</em>" if s.why else ""
    return f'<li class="{kind}"><b>{mark}</b><u>{esc(s.text)}</u>{reasons}</li>'


def _legend() -> str:
    items = "".join(
        _said(Sentence(text, v, ["what is so"] * (v == CONTRADICTS)))
        for v, (_, _, text) in MARKS.items()
    )
    return f'<ul class="said key">{items}</ul>'


def _chips(group: Group, c: Completion) -> str:
    # An answer that can be made out is shown even where the format is invalid: accuracy counts it.
    case = types.SimpleNamespace(
        answer=c.answer,
        truth=group.truth,
        known=group.known,
        completion="<think></think><answer></answer>",
    )
    return cases._chips(cases.marks(case))


def _parts(group: Group, c: Completion, varied: list[str], largest: float) -> str:
    """The table of what the reward is made of; terms that are the same in all are one row."""
    parts = contributions(group, c)
    same = sum(v for k, v in parts.items() if k not in varied)
    rows = []
    for term in varied:
        value, weight = parts[term], group.weights[term]
        width = f' style="--w:{min(100.0, 100 * abs(value) / largest):.0f}%"' if largest > 0 else ""
        bar = cell(number(value, True), f"part {'up' if value > 0 else 'down'}", attributes=width)
        product = cell(number(c.terms[term])) + cell(f"× {weight:g}".replace("-", "−"))
        rows.append(head(esc(term).replace("_", "_<wbr>")) + product + bar)
    if len(varied) < len(parts):
        rows.append(head("same in all") + cell() * 2 + cell(number(same, True)))
    total = head("reward") + cell() * 2 + cell(number(c.reward, True))
    return table(
        [head("term", "left") + head("value") + head("weight") + head("part")],
        [*rows, f'<tr class="total">{total}</tr>'],
    )


def _notes(group: Group, c: Completion) -> str:
    notes = []
    if not c.valid_format:
        notes.append("Invalid format.")
    if not c.finished:
        notes.append("Truncated at the token limit.")
    if group.kept and not c.trained:
        notes.append("Left out of the update.")
    return f'<p class="invalid small">{" ".join(notes)}</p>' if notes else ""


def _completion(
    group: Group, c: Completion, place: str, scale: tuple[float, float], varied: list[str]
) -> str:
    top, largest = scale
    share = 50 * min(1.0, abs(np.nan_to_num(c.advantage)) / top) if top > 0 else 0.0
    up = c.advantage > 0
    bar = f'<i class="{"up" if up else "down"}" style="left:{50 if up else 50 - share:.1f}%;width:{share:.1f}%"></i>'
    unweighed = [k for k, v in c.terms.items() if not group.weights.get(k)]
    others = ", ".join(f"{k} {number(c.terms[k])}" for k in unweighed)
    others = folded(
        '<span class="small">Terms without weight</span>', f'<p class="small">{esc(others)}</p>'
    )
    after = c.text[len(extract_trace(c.text)) :]
    written = f'<p class="answer"><b>As written:</b> {esc(after)}</p>' if after else ""
    said = "".join(_said(s) for s in c.sentences) or '<li class="nothing">Empty reasoning.</li>'
    return (
        f'<div class="comp{"" if c.trained else " left-out"}"><h4><span>{place}</span>'
        f"<span>advantage {number(c.advantage, True)}</span></h4>"
        f'<div class="adv">{bar}</div>{_notes(group, c)}{_chips(group, c)}{_parts(group, c, varied, largest)}'
        f'<p class="muted small">{c.length} tokens</p><ul class="said">{said}</ul>{written}'
        f"{others if unweighed else ''}</div>"
    )


def _truth(group: Group) -> str:
    name = lambda k: k + (f" ({group.sides[k]})" if k in group.sides else "")
    lists = [("Truth", [k for k in group.truth if k not in group.hedged])]
    lists.append(("Subtle, may be hedged" if group.known is None else "Not known", group.hedged))
    return "".join(
        f"<p><b>{title}:</b> {esc(', '.join(map(name, labels)) or 'no label')}</p>"
        for title, labels in lists
        if labels or title == "Truth"
    )


def _group(group: Group, uri: str, shows_sides: bool, shows_prompt: bool) -> str:
    order = ranked(group)
    weighed = list(contributions(group, order[0]))
    varied = [k for k in weighed if not _is_same(group, k)]
    same = [k for k in weighed if k not in varied]
    top = max(abs(np.nan_to_num(c.advantage)) for c in order)
    largest = max(
        (abs(v) for c in order for k, v in contributions(group, c).items() if k in varied),
        default=0.0,
    )
    n = len(order)
    places = [
        f"{'Best' if i == 0 else 'Worst' if i == n - 1 else f'Place {i + 1}'} of {n}"
        for i in range(n)
    ]
    if top < SAME:
        places = [f"{i + 1} of {n}" for i in range(n)]
    cards = [
        _completion(group, c, place, (top, largest), varied)
        for c, place in zip(order, places, strict=True)
    ]
    between = cards[ENDS : n - ENDS] if n > 2 * ENDS else []
    shown = cards[:ENDS] + cards[n - ENDS :] if between else cards
    more = (
        folded(f"{len(between)} more between", f'<div class="comps">{"".join(between)}</div>')
        if between
        else ""
    )
    note = "" if group.kept else '<p class="note">The update did not take this group.</p>'
    if same:
        text = ", ".join(
            f"{k} {number(order[0].terms[k])} × {group.weights[k]:g}" for k in same
        ).replace("-", "−")
        note += folded("Terms that are the same in all", f'<p class="small">{esc(text)}</p>')
    if shows_prompt:
        note += folded("Prompt", f"<pre>{esc(group.prompt)}</pre>")
    image = (
        f'<img src="{uri}" alt="Radiograph of {esc(group.id)}">{cases.SIDES if shows_sides else ""}'
    )
    return (
        f'<article class="group"><div class="top"><div>{image}</div><div>'
        f'<p class="muted small">Step {group.step}, {esc(group.set)}, {esc(group.id)}</p>{_truth(group)}'
        f'<p class="because">{esc(why(group))}</p>{note}</div></div><div class="comps">{"".join(shown)}</div>{more}'
        "</article>"
    )


def section(groups: Sequence[tuple[Group, str]], *, sides: bool = True) -> str:
    """HTML of [(Group, PNG data URI)], the latest step open, earlier ones folded; "" without any.

    sides: mark the patient's right and left (the image is known to be in the usual orientation).
    """
    if not groups:
        return ""
    steps = sorted({g.step for g, _ in groups})
    shown = steps if len(steps) <= LOOKS else [steps[0], *steps[1 - LOOKS :]]
    prompts = list(dict.fromkeys(g.prompt for g, _ in groups))
    draw = lambda s: "".join(
        _group(g, uri, sides, len(prompts) > 1) for g, uri in groups if g.step == s
    )
    latest, *earlier = reversed(shown)
    terms = [k for k in ABOUT if any(k in c.terms for g, _ in groups for c in g.completions)]
    glossary = "".join(f"<dt>{k}</dt><dd>{esc(ABOUT[k])}</dd>" for k in terms)
    body = INTRO + _legend() + folded("What the reward terms are", f"<dl>{glossary}</dl>")
    if len(prompts) == 1 and prompts[0]:
        body += folded("The prompt, the same for all", f"<pre>{esc(prompts[0])}</pre>")
    body += f"<h3>Step {latest}</h3>{draw(latest)}"
    body += "".join(folded(f"Step {s}", draw(s)) for s in earlier)
    if len(shown) < len(steps):
        body += f'<p class="muted">{len(steps) - len(shown)} more steps are in samples.jsonl.</p>'
    return body
