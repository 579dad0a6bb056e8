"""report/: text of models, manifests and configs is text on the page, whatever stands in it."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from cxr_jax.labels.sentences import Sentence
from cxr_jax.metrics import scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from cxr_jax.report import Case, markup
from cxr_jax.report.group_records import Completion, Group
from cxr_jax.report.page import page

HOSTILE = {
    "an element": "<script>alert(1)</script>",
    "an attribute": '" onload="alert(2)" x="',
    "an attribute in single quotes": "' onload='alert(3)' x='",
    "the end of what it may stand in": "</pre></p></td></style></script><b>",
    "a template": "{{ 7 * 7 }}{% raw %}{# #}",
    "characters of HTML": "&lt;b&gt; &amp; <!-- ]]>",
}

SLASH = "\N{FRACTION SLASH}"


class Elements(HTMLParser):
    """Every element with its attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def structure(self):
        """What hostile text would change: the elements and the names of their attributes."""
        return [(tag, sorted(attributes)) for tag, attributes in self.elements]

    def everything(self):
        values = (value for _, attributes in self.elements for value in attributes.values())
        return (self.text + "\n".join(value or "" for value in values)).replace(SLASH, "/")


def evaluation(text):
    rng = np.random.default_rng(0)
    truth, answers = rng.random((2, 20, 14)) < 0.3
    summary = scores.summary(
        Answers(answers),
        Reference(truth),
        other_images={text("audit"): Answers(~answers)},
        trace={
            term: rng.random(20)
            for term in ("trace_answer", "trace_findings", "trace_truth", "trace_false")
        },
        probabilities=rng.random((20, 14)),
        bootstrap=Bootstrap(3),
    )
    comparison = {"a": text("older"), "b": text("newer"), "set": text("compared set")}
    return {
        "title": text("title"),
        "kind": "phantom",
        "notes": [text("note")],
        "config": {text("key"): text("value")},
        "models": {text("model"): {text("set"): json.loads(json.dumps(summary))}},
        "comparisons": [comparison | {"metric": text("metric"), "diff": 1.0, "lo": 0.5, "hi": 2.0}],
    }


def curves(text):
    part = lambda field: text(field).replace("/", SLASH)  # a name of a metric is cut at its slashes
    names = [text("metric"), f"rewards/{part('term')}/mean", f"alarms/{part('alarm')}"]
    rows = [
        {"step": step, "kind": "train"} | {name: float(step) for name in names} for step in (1, 2)
    ]
    return [*rows, {"step": 2, "kind": "eval", f"eval/{part('curve set')}/jaccard": 0.5}]


def cases(text):
    completions = (
        f"<think>{text('reasoning')}</think><answer>{text('answer as written')}</answer>",
        text("completion of no format"),
    )
    return [
        Case(
            image=None,
            prompt=text(f"prompt {i}"),
            completion=completion,
            answer=[text("answer")],
            truth=[text("truth")],
            score=0.5,
            id=text("id"),
            hospital=text("hospital"),
            model=text("model of a case"),
        )
        for i, completion in enumerate(completions)
    ]


def groups(text):
    completions = [
        Completion(
            text=f"<think>x</think><answer>{text('text')}</answer>",
            length=5,
            finished=True,
            answer=[text("group answer")],
            valid_format=True,
            terms={text("weighed"): advantage, text("unweighed"): 0.0, "format": 1.0},
            reward=advantage,
            advantage=advantage,
            trained=True,
            sentences=[Sentence(text("sentence"), "contradicts", [text("why")])],
        )
        for advantage in (-1.0, 1.0)
    ]
    return [
        Group(
            step=3,
            id=text(f"group id {i}"),
            set=text("group set"),
            prompt=text(f"group prompt {i}"),
            truth=[text("group truth")],
            hedged=[text("hedged")],
            known=None,
            sides={text("hedged"): text("side")},
            completions=completions,
            weights={text("weighed"): 1.0, "format": 1.0, text("unweighed"): 0.0},
            kept=True,
        )
        for i in range(2)
    ]


SHOWN = (
    "title, note, key, value, model, set, older, newer, compared set, metric, audit, term, alarm, curve set, "
    "reasoning, answer as written, completion of no format, answer, id, hospital, model of a case, text, group answer, "
    "weighed, unweighed, sentence, why, group set, group truth, hedged, side, prompt 0, prompt 1, group prompt 0, "
    "group id 1"
).split(", ")


def drawn(payload):
    text = lambda field: f"{field}: {payload}!"
    case_uris = [(case, "data:,") for case in cases(text)]
    group_uris = [(group, "data:,") for group in groups(text)]
    return Elements(page(evaluation(text), curves(text), case_uris, group_uris)), text


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE)
def test_no_text_becomes_an_element_or_an_attribute(payload):
    harmless, _ = drawn("harmless")
    hostile, text = drawn(payload)
    assert hostile.structure() == harmless.structure()
    everything = hostile.everything()
    # A config is shown as JSON, so its quotes have a backslash.
    missing = [
        field
        for field in SHOWN
        if text(field) not in everything and json.dumps(text(field))[1:-1] not in everything
    ]
    assert not missing


def test_characters_that_hide_or_turn_text_are_visible():
    assert markup.escape("a\x00b\u202ec\n") == "a\ufffdb\ufffdc\n"
    hidden, _ = drawn("\u202e\x00")
    assert "\u202e" not in hidden.everything() and "\x00" not in hidden.everything()


def test_a_name_that_a_template_misspells_is_an_error():
    with pytest.raises(Exception, match="undefined"):
        markup.render("about.html", counts={}, notes=[])
