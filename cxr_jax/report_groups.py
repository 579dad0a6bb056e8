"""The report's groups: why RL preferred one completion of an image to another.

A group is one image and prompt of a training step with its G sampled completions, every reward term of each, and the
advantages that the step learned from. `groups_of` takes a few from a rollout; report.py keeps them in samples.jsonl;
`section` draws them.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import jax
import numpy as np

from cxr_jax import report_cases
from cxr_jax.labels import sentences
from cxr_jax.labels.sentences import (
    AGREES,
    CONTRADICTS,
    NOTHING,
    OPEN,
    Sentence,
    side_name,
    trace_of,
)
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.report_tables import cell, esc, folded, head, table

SAME = 1e-6  # rewards of a group that spread less are the same
LOOKS = 12  # looks of a run that the page shows: the first, and the latest
ENDS = 2  # completions shown of each end of a group; those between are folded


@dataclass
class Completion:
    """One sampled completion. length: tokens. answer: labels named. terms: every reward term's value, unweighted.
    trained: False if the update left it out (truncated and masked, or its group was not taken)."""

    text: str
    length: int
    finished: bool
    answer: list[str]
    valid_format: bool
    terms: dict[str, float]
    reward: float
    advantage: float
    trained: bool
    sentences: list[Sentence]


@dataclass
class Group:
    """The completions of one prompt at one step. truth, hedged: labels that are there, and that may be (subtle, or not
    known). known: the labels that the reference decides (None: all). sides: label -> right, left or both sides.
    weights: reward term -> weight. kept: the update took it. image: float [H, W] in 0..1, or the PNG."""

    step: int
    id: str
    set: str
    prompt: str
    truth: list[str]
    hedged: list[str]
    known: list[str] | None
    sides: dict[str, str]
    completions: list[Completion]
    weights: dict[str, float]
    kept: bool
    image: np.ndarray | None = None
    png: bytes | None = None

    def row(self) -> dict:
        """The line of samples.jsonl, without its image."""
        plain = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("image", "png", "completions")
        }
        completions = [
            vars(c) | {"sentences": [s._asdict() for s in c.sentences]} for c in self.completions
        ]
        return {"kind": "group"} | plain | {"completions": completions}

    @classmethod
    def of_row(cls, row: Mapping, png: bytes) -> "Group":
        """From a line of samples.jsonl. Raises KeyError, TypeError, ValueError or AttributeError for what is none."""
        numbers = lambda d: {str(k): _number(v) for k, v in d.items()}
        known = None if row["known"] is None else _texts(row["known"])
        completions = [
            Completion(
                str(c["text"]),
                int(c["length"]),
                bool(c["finished"]),
                _texts(c["answer"]),
                bool(c["valid_format"]),
                numbers(c["terms"]),
                _number(c["reward"]),
                _number(c["advantage"]),
                bool(c["trained"]),
                [
                    Sentence(str(s["text"]), str(s["verdict"]), _texts(s.get("why", [])))
                    for s in c["sentences"]
                ],
            )
            for c in row["completions"]
        ]
        if not completions:
            raise ValueError("no completion")
        return cls(
            int(row["step"]),
            str(row["id"]),
            str(row["set"]),
            str(row["prompt"]),
            _texts(row["truth"]),
            _texts(row["hedged"]),
            known,
            {str(k): str(v) for k, v in row.get("sides", {}).items()},
            completions,
            numbers(row["weights"]),
            bool(row["kept"]),
            png=png,
        )


def _number(x) -> float:
    return float("nan") if x is None else float(x)


def _texts(x) -> list[str]:
    if not isinstance(x, list):
        raise TypeError("not a list")
    return [str(t) for t in x]


# From a rollout --------------------------------------------------------------------------------------


def choose(reward, n: int) -> list[int]:
    """The n most telling groups of reward [P, G]: those that spread most, and one, if any, that does not."""
    spread = np.asarray(reward).std(axis=1)
    order = np.argsort(-spread, kind="stable")
    varied, flat = [[int(p) for p in order if (spread[p] >= SAME) == v] for v in (True, False)]
    taken = varied[: max(1, n - bool(flat))]
    return (taken + flat)[:n] if len(taken) < n else taken


def groups_of(
    ro: Mapping,
    batch: Mapping,
    tok,
    *,
    step: int,
    weights: Mapping[str, float],
    n: int = 4,
    set_name: str = "train",
    lexicon: str | None = None,
    prompts: Sequence[str] | str = "",
    ids: Sequence | None = None,
) -> list[Group]:
    """n groups of a rollout, for `report.save_groups`.

    ro: as rl.make_rollout gives it (tokens int [P, G, C], lengths, finished, reward, advantages [P, G], terms
    {name: [P, G]}, answer bool [P, G, 14], train_mask bool [P, G, C], kept int [n]); batch: image [P, S, S], solution,
    known, hedged bool [P, 14], sides bool [P, 14, 2]. tok: decodes ids. weights: of the reward terms. lexicon: as in
    `reports.bank(None, lexicon)`. prompts: a text a prompt, or one for all. ids: of the images.
    """
    wanted = (
        "tokens",
        "lengths",
        "finished",
        "reward",
        "advantages",
        "terms",
        "answer",
        "train_mask",
        "kept",
    )
    ro = jax.device_get({k: ro[k] for k in wanted})
    truth = {k: np.asarray(batch[k]) for k in ("solution", "known", "hedged", "sides")}
    chosen, kept = choose(ro["reward"], n), set(np.asarray(ro["kept"]).tolist())
    g = ro["reward"].shape[1]
    texts = [
        tok.decode(ro["tokens"][p, i, : ro["lengths"][p, i]], skip_special_tokens=True)
        for p in chosen
        for i in range(g)
    ]
    rows = np.repeat(np.array(chosen, int), g)
    certain = truth["solution"] & ~truth["hedged"]
    read = sentences.sentence_verdicts(
        texts, certain[rows], truth["hedged"][rows], truth["sides"][rows], lexicon
    )
    names = lambda bits: [name for name, on in zip(CHEXPERT_14, bits, strict=True) if on]
    out = []
    for at, p in enumerate(chosen):
        completions = [
            Completion(
                texts[at * g + i],
                int(ro["lengths"][p, i]),
                bool(ro["finished"][p, i]),
                names(ro["answer"][p, i]),
                bool(ro["terms"]["format"][p, i] == 1),
                {k: float(v[p, i]) for k, v in ro["terms"].items()},
                float(ro["reward"][p, i]),
                float(ro["advantages"][p, i]),
                p in kept and bool(ro["train_mask"][p, i].any()),
                read[at * g + i],
            )
            for i in range(g)
        ]
        some = truth["solution"][p] | truth["hedged"][p]
        sides = {CHEXPERT_14[i]: side_name(truth["sides"][p, i]) for i in np.flatnonzero(some)}
        out.append(
            Group(
                step,
                f"prompt {p}" if ids is None else str(ids[p]),
                set_name,
                prompts if isinstance(prompts, str) else str(prompts[p]),
                names(truth["solution"][p]),
                names(truth["hedged"][p]),
                None if truth["known"][p].all() else names(truth["known"][p]),
                {k: v for k, v in sides.items() if v},
                completions,
                {k: float(v) for k, v in weights.items()},
                p in kept,
                image=np.asarray(batch["image"][p]),
            )
        )
    return out


# In words --------------------------------------------------------------------------------------------

ABOUT = {  # docs/rewards.md, in a line each
    "accuracy": "labels right of all that are named or true (Jaccard)",
    "format": "is the text <think>…</think><answer>…</answer>?",
    "tag_count": "¼ for each tag that occurs once",
    "accuracy_hard": "accuracy, if the format is valid",
    "overshort": "0, or below 0 if the text is short",
    "invented": "answer items that are no label",
    "no_finding_conflict": "No Finding beside a finding",
    "overlong": "0, or below 0 near the limit",
    "repetition": "share of repeated 8-token runs",
    "trace_answer": "does the reasoning say what the answer says?",
    "trace_findings": "does the reasoning affirm what is there, on its side, and nothing else?",
    "trace_coverage": "share of the 13 findings rightly affirmed or denied in the reasoning",
    "trace_truth": "share of claiming sentences without an error",
    "trace_false": "how many sentences claim what is not so",
}


def number(x: float, sign: bool = False) -> str:
    text = f"{x:+.2f}" if sign else f"{x:.2f}"
    return ("0" if float(text) == 0 else text).replace("-", "−")


def contributions(group: Group, c: Completion) -> dict[str, float]:
    """Weighed term -> value x weight: they add up to the reward."""
    return {k: c.terms[k] * w for k, w in group.weights.items() if w and k in c.terms}


def ranked(group: Group) -> list[Completion]:
    """Highest advantage first, of equal ones the higher reward."""
    return sorted(
        group.completions, key=lambda c: (-np.nan_to_num(c.advantage), -np.nan_to_num(c.reward))
    )


def _is_same(group: Group, term: str) -> bool:
    values = [c.terms.get(term, 0.0) for c in group.completions]
    return max(values) - min(values) < SAME


def why(group: Group) -> str:
    """One plain sentence: what the best completion earned that the worst did not."""
    order = ranked(group)
    best, worst = order[0], order[-1]
    if best.advantage - worst.advantage < SAME:
        return (
            f"All {len(order)} earned the same: none is preferred, and there is nothing to learn."
        )
    a, b = contributions(group, best), contributions(group, worst)
    change = sorted(((a[k] - b[k], k) for k in a), key=lambda x: -abs(x[0]))
    told = [(d, k) for d, k in change[:3] if abs(d) >= 0.005]
    parts = []
    for difference, term in told:
        reason = _reason(group, term, best, worst)
        parts.append(f"{number(difference, True)} {term}" + (f" ({reason})" if reason else ""))
    total = best.reward - worst.reward
    rest = total - sum(d for d, _ in told)
    if abs(rest) >= 0.005:
        parts.append(f"{number(rest, True)} all else")
    return f"Best against worst, {number(total, True)} reward: {', '.join(parts)}."


def _reason(group: Group, term: str, best: Completion, worst: Completion) -> str:
    """What in the two texts makes a term differ."""
    if term in ("accuracy", "accuracy_hard"):
        if term == "accuracy_hard" and best.valid_format != worst.valid_format:
            return f"the {'worst' if best.valid_format else 'best'}’s format is invalid"
        said = []
        true = ("names {}, which the worst misses", "misses {}, which the worst names")
        false = ("adds {}", "the worst adds {}")
        for right, pair in ((True, true), (False, false)):
            named = [
                {k for k in c.answer if (k in group.truth) == right and _counts(group, k)}
                for c in (best, worst)
            ]
            for text, more in zip(pair, (named[0] - named[1], named[1] - named[0]), strict=True):
                if more:
                    said.append(text.format(", ".join(k for k in CHEXPERT_14 if k in more)))
        return "; ".join(said)
    if term in ("trace_findings", "trace_truth", "trace_false"):
        false = [[s for s in c.sentences if s.verdict == CONTRADICTS] for c in (best, worst)]
        reasons = list(dict.fromkeys(w for s in false[1] for w in s.why))[:3]
        text = f"false sentences: {len(false[0])} against {len(false[1])}"
        return text + (
            f"; in truth: {', '.join(reasons)}" if reasons and len(false[1]) > len(false[0]) else ""
        )
    if term in ("overshort", "overlong"):
        return f"{best.length} against {worst.length} tokens"
    return f"{number(best.terms[term])} against {number(worst.terms[term])}"


def _counts(group: Group, label: str) -> bool:
    return group.known is None or label in group.known


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
    return report_cases._chips(report_cases.marks(case))


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
    after = c.text[len(trace_of(c.text)) :]
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
    image = f'<img src="{uri}" alt="Radiograph of {esc(group.id)}">{report_cases.SIDES if shows_sides else ""}'
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
