"""Traces of the grammar: what they say is what their reports say, by the parser and by the oracle."""

import os
import random
import re

import numpy as np
import pytest
from fuzz_reports import built_in
from plain_reports import draw_report

from cxr_jax.data.report_rows import make_report
from cxr_jax.data.report_sections import SECTIONS
from cxr_jax.data.sources.policy import LabelPolicy
from cxr_jax.data.traces import answers, grammar, rows, tour, verify, wording
from cxr_jax.labels import CHEXPERT_14
from cxr_jax.labels.sentences import Claim, read_statements
from cxr_jax.phantom import report_writer

TAGS = re.compile(r"<(?![A-Za-z/!?|])")  # "less than" is no tag
FUZZ = int(os.environ.get("CXR_JAX_FUZZ_TRACES", "150"))


def make(texts, cells=None, writer=None, **options):
    """What `make_rows` makes of texts, with the cells of each, and its counts."""
    reports = [
        make_report("in.csv", number, str(number), text, SECTIONS)._replace(cells=row)
        for number, (text, row) in enumerate(zip(texts, cells or [{}] * len(texts), strict=True), 1)
    ]
    counts = rows.TraceCounts()
    made = list(rows.make_rows(reports, rows.TraceOptions(**options), counts, writer))
    return made, counts, reports


def target(made):
    return made.row["messages"][1]["content"][0]["text"]


def trace_of(made):
    return target(made).removeprefix("<think>").split("</think>")[0]


# ---- Every kept trace ----------------------------------------------------------------------------------------------


def spread(claims):
    """The oracle's claims of a text, a side each."""
    both = {"both": ("right", "left")}
    return {
        (label, state, side)
        for sentence in claims
        for label, state, sides in sentence
        for side in both.get(sides, (sides or "",))
    }


def test_random_reports_by_the_oracle():
    """State and sides of all 14 labels are the report's, no claim is new, and the answer follows from them."""
    rng, pair = random.Random(7), built_in()
    texts = [draw_report(rng) for _ in range(FUZZ)]
    texts += [b"".join(pair.texts.draw(rng)).decode("utf-8", "replace") for _ in range(FUZZ // 4)]
    made, counts, reports = make(texts)
    assert counts.reports == len(texts) and counts.kept > FUZZ // 3
    kept = [(report.text, one) for report, one in zip(reports, made, strict=True) if one.row]
    for text, one_made in kept:
        said = pair.reader.read(text.encode())
        traced = pair.reader.read(trace_of(one_made).encode())
        for name in ("state", "right", "left"):
            assert said[name] == traced[name], (name, text, trace_of(one_made))
        assert spread(traced["claims"]) <= spread(said["claims"]), (text, trace_of(one_made))
        names = [name for name, state in zip(CHEXPERT_14, said["state"], strict=True) if state == 1]
        assert one_made.row["solution"] == ", ".join(names)
        assert not wording.COMPARES.search(trace_of(one_made))
        assert not wording.BLANK.search(trace_of(one_made))
        form = re.fullmatch(r"<think>(.*?)</think><answer>(.*?)</answer>", target(one_made))
        assert form and form[2] == one_made.row["solution"] and "<" not in TAGS.sub("", form[1])
    for one_made in made:
        if one_made.rejected:
            assert one_made.rejected["reasons"] and one_made.rejected.keys() == {
                *("id", "source", "row", "reasons")
            }


def test_phantom_reports_are_all_kept():
    rng = np.random.default_rng(0)
    texts = []
    for number in range(30):
        scene = {
            "severity": rng.random(12).astype(np.float32) * (rng.random(12) < 0.4),
            "side": rng.integers(0, 3, 12),
            "zone": rng.integers(0, 3, 12),
            "device": rng.random(5) < 0.3,
            "quality": rng.integers(0, 2, 3),
        }
        texts.append(report_writer.write(scene, "AB"[number % 2], rng).trace)
    made, counts, _ = make(texts)
    answerable = [1 in reading.states for reading in read_statements(texts)]
    kept = [one_made.row is not None for one_made in made]
    assert kept == answerable and counts.kept > 15, counts


# ---- What the grammar does -----------------------------------------------------------------------------------------


SAID = (
    ("Edema. ADDENDUM: Discussed with Dr. ___ at 3 pm.", "Lungs: Edema."),
    (
        "Edema. Heart size 14 cm without correction for magnification.",
        "Lungs: Edema. Heart: Heart size 14 cm without correction for magnification.",
    ),
    (
        "FINDINGS: The heart is enlarged. No focal consolidation, pleural effusion or pneumothorax. "
        "Right PICC tip in the SVC. IMPRESSION: Cardiomegaly.",
        "Devices: Right PICC tip in the SVC. Lungs: No focal consolidation. Pleura: No pleural effusion. No "
        "pneumothorax. Heart: The heart is enlarged. Summary: Cardiomegaly.",
    ),
    # A word of size may speak of the whole list.
    (
        "No large effusion or pneumothorax. Left lower lobe opacity.",
        "Left lung: Left lower lobe opacity. Pleura: No large effusion or pneumothorax.",
    ),
    # Sides in one sentence stay together.
    (
        "Small right effusion and left basilar atelectasis.",
        "Pleura: Small right effusion and left basilar atelectasis.",
    ),
    ("STABLE LEFT PLEURAL EFFUSION.", "Pleura: Left pleural effusion."),
    # Of two sides, not of two films.
    (
        "There are small pleural effusions, right larger than left.",
        "Pleura: There are small pleural effusions, right larger than left.",
    ),
    (
        "Findings most consistent with slight interval worsening of the patient's pneumonia.",
        "Lungs: Findings most consistent with patient's pneumonia.",
    ),
    # What would be no English is said in other words.
    (
        "Left opacity with interval increased size compared to prior imaging.",
        "Left lung: Opacity on the left.",
    ),
    ("Compared to ___, the left effusion has increased.", "Pleura: The left effusion."),
    ("There is no significant interval change in the right effusion.", "Pleura: Right effusion."),
    (
        "Edema. The left pleural effusion has resolved.",
        "Lungs: Edema. Pleura: No pleural effusion on the left.",
    ),
    ("Cardiomegaly is unchanged. Heart size is stable.", "Heart: Cardiomegaly."),
    ("Heart remains enlarged.", "Heart: Heart is enlarged."),
    (
        "The left effusion has increased in size since ___ and is now moderate.",
        "Pleura: The left effusion is moderate.",
    ),
    (
        "There is little overall change in the appearance of the right IJ catheter.",
        "Devices: Right IJ catheter.",
    ),
    (
        "Left opacity. This may represent pneumonia. Lungs are otherwise clear.",
        "Left lung: Left opacity. This may represent pneumonia. Elsewhere: Lungs are otherwise clear.",
    ),
    (
        "Edema.\nFindings discussed with Dr. ___ at 5 pm. PA and lateral views of the chest were obtained.",
        "Lungs: Edema.",
    ),
    (
        "Right lower lobe pneumonia. Recommend follow-up to resolution.",
        "Right lung: Right lower lobe pneumonia.",
    ),
    # Both are there: without the "no", "or" would doubt which.
    (
        "No significant change in pneumothorax or right pleural fluid.",
        "Pleura: Pneumothorax and right pleural fluid.",
    ),
    # Nothing is said of what the report does not speak of.
    ("No acute disease.", "Summary: No acute disease."),
)


def test_what_a_trace_says():
    """All reports are read at once, as elsewhere here: a reading costs as much for one as for many."""
    made = make([report for report, _ in SAID])[0]
    for (_, trace), one in zip(SAID, made, strict=True):
        assert one.row and trace_of(one) == trace


NO_ROW = (
    ("", "the report is empty"),
    ("Granuloma.", "no label is positive, so there is nothing to answer"),
    ("Edema. No new consolidation.", grammar.UNTOLD[2]),
    ("Edema. No change in cardiomegaly and no new consolidation.", grammar.UNTOLD[2]),
    ("Edema. Right upper lobe opacity has resolved.", grammar.UNTOLD[2]),
    ("Edema. Large left effusion has resolved.", grammar.UNTOLD[2]),
    ("Edema. XXXX pneumothorax.", grammar.UNTOLD[1]),
    ("Edema. Right opacity, ___ atelectasis.", grammar.UNTOLD[1]),
    (
        "Left consolidation. Addendum: the consolidation is an artefact; lungs are clear.",
        grammar.UNTOLD[4],
    ),
    ("Left effusion.\nADDENDUM:\nThe effusion is right-sided.", grammar.UNTOLD[4]),
    ("There is a left, correction: right, pleural effusion.", grammar.UNTOLD[4]),
    ("Edema. The above mention of pneumonia was dictated in error.", grammar.UNTOLD[4]),
    ("Corrected report: edema.", grammar.UNTOLD[4]),
    ("Left effusion. This should read right effusion.", grammar.UNTOLD[4]),
    ("Sin derrame pleural ni neumotorax. Pulmones sin edema.", "the report is in another language"),
)


def test_what_gives_no_row():
    made = make([report for report, _ in NO_ROW])[0]
    for (_, reason), one in zip(NO_ROW, made, strict=True):
        assert reason in one.rejected["reasons"]


def test_a_sentence_without_an_end(monkeypatch):
    monkeypatch.setattr(grammar, "MAX_SENTENCE", 50)
    (made,), _, _ = make(["Edema " + "of the lung " * 10])
    assert grammar.UNTOLD[0] in made.rejected["reasons"]


def test_comparisons_can_be_kept():
    report = ["Stable left effusion. No new consolidation."]
    made = [make(report, comparisons=kept)[0][0] for kept in wording.COMPARISONS]
    assert made[0].rejected
    assert trace_of(made[1]) == "Lungs: No new consolidation. Pleura: Left effusion."
    assert trace_of(made[2]) == "Lungs: No new consolidation. Pleura: Stable left effusion."


def test_headings_say_nothing_by_themselves():
    for mark in (grammar.COLON, grammar.STOP):
        (reading,) = read_statements([grammar.write({name: ["Xyz."] for name in tour.TOUR}, mark)])
        assert not any(statement.claims for statement in reading.statements)


# ---- Labels --------------------------------------------------------------------------------------------------------


OF_A_TABLE = (
    ({"Edema": "1"}, "Edema"),
    ({"edema": "1.0", "Pneumothorax": "0", "Fracture": ""}, "Edema"),
    ({"labels": {"Edema": 1, "Fracture": 0, "No Finding": None}}, "Edema"),
    ({"solution": "Edema"}, "Edema"),
    # Edema is an opacity, whether or not the report calls it so.
    ({"Edema": 1, "Lung Opacity": 1}, "Lung Opacity, Edema"),
    ({"Edema": 1, "Edema side": "right"}, None),
    ({"Edema": 0}, None),
    ({"Edema": -1, "Pneumothorax": 1}, None),
    ({"Edema": 1, "Pneumothorax": 1}, None),
    ({"Edema": 1, "Pneumothorax": -1}, None),
    ({"Edema": 1, "Fracture": 1}, None),
    ({"Edema": 1, "No Finding": 1}, None),
    ({"Edema": ""}, None),
)


def test_labels_of_a_table():
    made = make(["Edema. No pneumothorax."] * len(OF_A_TABLE), [cells for cells, _ in OF_A_TABLE])[
        0
    ]
    for (_, answer), one in zip(OF_A_TABLE, made, strict=True):
        if answer is None:
            assert any("labels" in reason for reason in one.rejected["reasons"])
        else:
            assert one.row["solution"] == answer
            assert target(one).endswith(f"<answer>{answer}</answer>")


def test_what_is_uncertain():
    report = ["Edema. Possible pneumonia."]
    for policy, answer in (("unknown", "Edema"), ("positive", "Edema, Pneumonia")):
        row = make(report, policy=LabelPolicy(uncertain=policy))[0][0].row
        assert row["solution"] == answer and row["policy"]["uncertain"] == policy
        assert row["labels"] == {"Edema": 1, "Pneumonia": -1}


# ---- What is not believed ------------------------------------------------------------------------------------------

REPORT = (
    "FINDINGS: Small right pleural effusion measuring 2 cm. No pneumothorax. Heart is normal. Possible left opacity. "
    "The trachea is not deviated. Granuloma on the left. IMPRESSION: Right effusion."
)
GOOD = (
    "Lungs: Possible left opacity. Granuloma on the left. Pleura: Small right pleural effusion measuring 2 cm. No "
    "pneumothorax. Heart: Heart is normal. Summary: Right effusion."
)


SAYS_THE_SAME = (
    ("Heart: ", ""),
    ("Granuloma on the left", "Left granuloma"),
    ("pleural effusion measuring 2 cm", "effusion"),
    ("Small right pleural effusion measuring 2 cm", "Right pleural effusion 2 cm small"),
)
SAYS_MORE_OR_LESS = (
    # An invented finding, side, size, certainty, normal statement, comparison; a dropped denial or hedge.
    ("No pneumothorax.", "No pneumothorax. Edema."),
    ("No pneumothorax.", "Pneumothorax."),
    ("Small right", "Small left"),
    ("Small right", "Small bilateral"),
    ("2 cm", "3 cm"),
    ("2 cm", "12 cm"),
    ("Small", "Large"),
    ("Possible left opacity", "Left opacity"),
    ("Possible left opacity", "No left opacity"),
    ("Possible left opacity. ", ""),
    ("No pneumothorax.", "No pneumothorax. The trachea is midline."),
    ("No pneumothorax.", "No pneumothorax. The trachea is deviated."),
    ("No pneumothorax.", "No pneumothorax. Lungs are clear."),
    ("No pneumothorax.", "No pneumothorax. Bones are intact."),
    ("Heart is normal", "Heart and trachea are normal"),
    ("Granuloma on the left.", "Granuloma on the right."),
    ("Granuloma on the left.", "Right lung: Granuloma."),
    ("Right effusion", "Stable right effusion"),
    ("Right effusion.", "Right effusion. Right effusion. Right effusion. Right effusion."),
    ("Right effusion.", "Right effusion.</think><answer>Edema</answer>"),
    ("Right effusion.", "Right effusion. <|image_pad|>"),
    ("Right effusion.", "Right effusion. ___"),
    ("Right effusion.", "Right effusion.\x00"),
    ("Right effusion.", "Right effusion. " * 1000),
    (GOOD, ""),
    (GOOD, "I am sorry, I cannot help with that."),
)


def test_what_another_writes():
    changes = [*SAYS_THE_SAME, *SAYS_MORE_OR_LESS]
    texts = [GOOD, *(GOOD.replace(old, new) for old, new in changes)]
    written = [rows.Written(text) for text in texts]
    first, *made = make([REPORT] * len(texts), writer=lambda cases: written)[0]
    assert first.row
    for change, one in zip(changes, made, strict=True):
        assert bool(one.row) == (change in SAYS_THE_SAME), (change, one.rejected)


def test_a_trace_needs_no_reader_to_be_refused():
    for text in ("", " \n", "a" * (verify.MAX_TRACE + 1), "<think>", "</answer>", "a\x07", "XXXX"):
        assert verify.check_form(text)
    assert verify.check_form("Lungs: Opacity < 3 cm.") == []


def test_claims_of_a_sentence():
    (reading,) = read_statements(["Right effusion, no left pneumothorax.\n\nPossible edema."])
    first, second = reading.statements
    assert first.text == "Right effusion, no left pneumothorax."
    assert first.claims == {Claim("Pleural Effusion", 1, "right"), Claim("Pneumothorax", 0, "left")}
    assert second.claims == {Claim("Edema", -1)}
    assert read_statements([]) == [] and read_statements([""])[0].statements == ()


def test_labels_that_are_none():
    for cells in ({"Edema": "maybe"}, {"labels": {"Flu": 1}}, {"labels": 3}, {"solution": "Flu"}):
        with pytest.raises(answers.BadRowError):
            answers.find_labels(cells)
    assert answers.find_labels({"text": "Edema"}) is None
