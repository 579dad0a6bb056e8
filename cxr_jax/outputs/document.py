"""The reading as one JSON document, `cxr_reading` v1: the truth that every other output is made from.

A document is a plain dict that `cxr_reading.v1.json` (JSON Schema 2020-12, beside this file) describes. It is a pure
function of what it is built from: no clock, no random number, no name of a file or a patient. Its findings are what the
project's own parser reads in the trace; once signed, what it reads in the report that the reader has signed.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cxr_jax import __version__
from cxr_jax.data import image_gate
from cxr_jax.data.radiograph import Image
from cxr_jax.errors import UserError
from cxr_jax.labels.answers import FORMAT_PATTERN, answer_warnings, reasoning_of, split_answer
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, PARENTS
from cxr_jax.outputs import schema, sections
from cxr_jax.outputs.trace_sentences import TraceReading, check_words, read_trace
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

NOTICE = f"AI draft. {NOT_FOR_DIAGNOSIS}"
SIGNED_NOTICE = f"Reviewed by a reader in a research setting. {NOT_FOR_DIAGNOSIS}"
# One thing each: to deny it and to affirm it on one side is a contradiction. The others are groups, of which one
# member may be there and another not ("no mass; a calcified nodule").
_SINGLE = (
    "Cardiomegaly",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
)


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """A film that was read.

    Attributes:
        sha256: of the file's bytes.
        view: "PA", "AP", "lateral" or "unknown", as `Image.meta` has it.
        renderer: of `radiograph.RENDERERS`, or "none".
        gate: as `image_gate.Gate.state`; of one that is "refused" the document exists because somebody said so.
        gate_reasons: why.
        role: of `prompts.ROLES`, or None for a film by itself.
    """

    sha256: str
    view: str = "unknown"
    renderer: str = "voi"
    gate: str = "ok"
    gate_reasons: Sequence[str] = ()
    role: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Give the film as the document holds it."""
        return {
            "sha256": self.sha256,
            "view": self.view,
            "renderer": self.renderer,
            "role": self.role,
            "gate": {"state": self.gate, "reasons": list(self.gate_reasons)},
        }


def image_facts(sha256: str, image: Image, role: str | None = None) -> ImageFacts:
    """Make the facts of a film from the film: the same at every door, whatever flag has let it be read."""
    gate = image_gate.gate_of(image)
    return ImageFacts(
        sha256=sha256,
        view=image.meta["view"],
        renderer=image.meta["renderer"],
        gate=gate.state,
        gate_reasons=gate.reasons,
        role=role,
    )


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that read.

    Attributes:
        name: as a user knows it; no path.
        weights_sha256: of its weights.
        words: a key of `trace_sentences.WORDS`, see `trace_sentences.find_words`.
        app_version: of this software.
    """

    name: str
    weights_sha256: str
    words: str = "films"
    app_version: str = __version__


@dataclass(frozen=True, kw_only=True)
class CompletionFacts:
    """What the model was asked, and what it wrote.

    Attributes:
        text: of the completion, with its tags.
        finish_reason: "stop" or "length".
        prompt: the question.
        seed: of the sampling.
        probabilities: label -> the model's own probability that its answer names it; None: not computed.
        warnings: what a reader should know of the image and the probabilities.
    """

    text: str
    finish_reason: str
    prompt: str
    seed: int = 0
    probabilities: Mapping[str, float] | None = None
    warnings: Sequence[str] = ()


# ---- From a completion to a document ----


def build(
    image: ImageFacts,
    model: ModelFacts,
    completion: CompletionFacts,
    other_images: Sequence[ImageFacts] = (),
) -> dict[str, Any]:
    """Build the draft of a reading. Computes with JAX (see `trace_sentences`).

    Args:
        image: the film that is asked about.
        other_images: films that were read with it: a lateral, a prior.

    Raises:
        UserError: for facts that the schema has no room for.
    """
    check_words(model.words)
    # What is read is the reasoning alone: the answer would repeat it.
    reading = read_trace(reasoning_of(completion.text), model.words)
    # Names that are none of the 14 are warned of below, and dropped here.
    answer_items = split_answer(completion.text)
    answer = answer_items.labels if answer_items else []
    document = {
        "schema": schema.NAME,
        "image": image.as_json(),
        "other_images": [other.as_json() for other in other_images],
        "model": {
            "name": model.name,
            "weights_sha256": model.weights_sha256,
            "app_version": model.app_version,
            "words": model.words,
        },
        "prompt": completion.prompt,
        "seed": completion.seed,
        "valid_format": FORMAT_PATTERN.match(completion.text) is not None,
        "findings": _findings(reading, answer, completion.probabilities),
        "trace": [sentence.as_json() for sentence in reading.sentences],
        "answer": answer,
        "contradictions": find_contradictions(reading, answer),
        "report": sections.from_trace(reading, model.words),
        "status": "draft",
        "signed": None,
        "addenda": [],
        # A warning may come from several steps; each is said once.
        "warnings": list(
            dict.fromkeys(
                [*completion.warnings, *answer_warnings(completion.text, completion.finish_reason)]
            )
        ),
        "notice": NOTICE,
    }
    # What we write ourselves is held to the same rules as what others send.
    check(document)
    return document


def _findings(
    reading: TraceReading, answer: Sequence[str], probabilities: Mapping[str, float] | None
) -> list[dict[str, Any]]:
    finding_rows = []
    # All 14, mentioned or not: a reader of the document need not know which could have been.
    for index, label in enumerate(CHEXPERT_14):
        state, finding_side = reading.states[index], reading.sides[index]
        probability = None if probabilities is None else probabilities.get(label)
        finding_rows.append(
            {
                "label": label,
                "state": state,
                "side": finding_side,
                # These stay, whatever a reader makes of the two above.
                "model_state": state,
                "model_side": finding_side,
                "named_in_answer": label in answer,
                # Rounded, so that the same reading is the same bytes whatever the last bits of a float were.
                "probability": None if probability is None else round(float(probability), 6),
                "sentences": [
                    sentence.n
                    for sentence in reading.sentences
                    if any(claim.label == label for claim in sentence.claims)
                ],
            }
        )
    return finding_rows


def find_contradictions(reading: TraceReading, answer: Sequence[str]) -> list[dict[str, Any]]:
    """Say where the trace contradicts the answer, or itself.

    Args:
        reading: of the trace.
        answer: labels of the 14 that the answer names.

    Returns:
        Objects of "kind", "label", "sentences" (their numbers) and "text": kinds are `affirmed_not_named`,
        `named_but_denied`, `named_not_mentioned`, `no_finding_beside_a_finding` and `trace_against_itself`. A hedge
        contradicts neither a name nor its absence.
    """
    found = []
    # Against the answer, label by label ..
    state_of = dict(zip(CHEXPERT_14, reading.states, strict=True))
    # In the order of the labels, so that lists of two readings compare.
    for label in CHEXPERT_14:
        kind = _against_answer(label, state_of, answer)
        if kind is not None:
            wanted = {"affirmed_not_named": "present", "named_but_denied": "absent"}.get(kind)
            found.append(_contradiction(kind, label, _claiming(reading, label, wanted)))
    # .. and against itself.
    found += [
        _contradiction("trace_against_itself", label, numbers)
        for label in _SINGLE
        if (numbers := _both_ways(reading, label))
    ]
    return found


def _against_answer(label: str, state_of: Mapping[str, str], answer: Sequence[str]) -> str | None:
    state, is_named = state_of[label], label in answer
    # Not to say "No Finding" of a normal film is left to the other labels: each speaks for itself.
    if label == "No Finding":
        others = [name for name in CHEXPERT_14 if name not in ("No Finding", "Support Devices")]
        is_sick = any(state_of[name] == "present" or name in answer for name in others)
        return "no_finding_beside_a_finding" if is_named and is_sick else None
    # Without any answer there is nothing to contradict: a warning says that it is missing.
    if state == "present" and not is_named and answer:
        # A parent that is named through its child is no omission (CheXpert's hierarchy).
        is_covered = any(child in answer for child in PARENTS.get(label, ()))
        return None if is_covered else "affirmed_not_named"
    if is_named and state == "absent":
        return "named_but_denied"
    # A parent that only its children speak of is supported by them.
    if is_named and state == "not_mentioned":
        children = PARENTS.get(label, ())
        is_supported = any(state_of[child] in ("present", "uncertain") for child in children)
        return None if is_supported else "named_not_mentioned"
    return None


def _both_ways(reading: TraceReading, label: str) -> list[int]:
    """The sentences that deny a label where others affirm it, with these; [] if there are none."""
    # Who affirms and who denies, each with the side that is said.
    affirmed, denied = (
        [
            (sentence.n, claim.side)
            for sentence in reading.sentences
            for claim in sentence.claims
            if claim.label == label and claim.state == state
        ]
        for state in ("present", "absent")
    )
    # Other sides are other places; what has no side speaks of both.
    return sorted(
        {
            number
            for there, finding_side in affirmed
            for gone, denied_side in denied
            if finding_side == denied_side
            or None in (finding_side, denied_side)
            or "bilateral" in (finding_side, denied_side)
            for number in (there, gone)
        }
    )


def _claiming(reading: TraceReading, label: str, state: str | None) -> list[int]:
    return [
        sentence.n
        for sentence in reading.sentences
        if any(claim.label == label and state in (None, claim.state) for claim in sentence.claims)
    ]


_WHY = {
    "affirmed_not_named": "the reasoning affirms {label}, the answer does not name it",
    "named_but_denied": "the answer names {label}, the reasoning denies it",
    "named_not_mentioned": "the answer names {label}, the reasoning does not mention it",
    "no_finding_beside_a_finding": "the answer says {label} beside a finding",
    "trace_against_itself": "the reasoning both affirms and denies {label}",
}


def _contradiction(kind: str, label: str, numbers: list[int]) -> dict[str, Any]:
    return {
        "kind": kind,
        "label": label,
        "sentences": numbers,
        "text": _WHY[kind].format(label=label),
    }


# ---- What a reader makes of it ----


def sign(
    document: Mapping[str, Any],
    *,
    by: str,
    at: str,
    meaning: str,
    report: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Sign a draft: the findings become those of the report that the reader signs. Computes with JAX.

    Args:
        document: a draft; not changed.
        by: the reader's handle, a pseudonym.
        at: the time in UTC, as "2026-11-30T12:00:00Z".
        meaning: what the signature means ("author", "reviewed" ..), in the reader's words.
        report: the fields as edited; None: as drafted.

    Raises:
        UserError: for what is no draft, or fields that the schema has no room for.
    """
    if document.get("status") != "draft":
        raise UserError("sign: the reading is signed already: only addenda can be made to it")
    # A copy: who holds the draft keeps what the model said.
    signed = copy.deepcopy(dict(document))
    if report is not None:
        signed["report"] = {key: str(report.get(key, "")) for key in sections.FIELDS}
    signed |= {
        "status": "signed",
        "signed": {"by": by, "at": at, "meaning": meaning},
        "notice": SIGNED_NOTICE,
    }
    return _with_findings_of_report(signed)


def revise(document: Mapping[str, Any], report: Mapping[str, str]) -> dict[str, Any]:
    """Put a reader's fields into a draft; its findings are then those of the text, still unsigned. Computes with JAX.

    Raises:
        UserError: for what is no draft, or fields that the schema has no room for.
    """
    if document.get("status") != "draft":
        raise UserError("revise: the reading is signed already: only addenda can be made to it")
    revised = copy.deepcopy(dict(document))
    revised["report"] = {key: str(report.get(key, "")) for key in sections.FIELDS}
    return _with_findings_of_report(revised)


def _with_findings_of_report(document: dict[str, Any]) -> dict[str, Any]:
    """Let the findings say what the report says; what the model said stays beside them."""
    # First, since a parser of text should see no more of it than the schema allows.
    check(document)
    said = sections.read(document["report"], document["model"]["words"])
    for index, finding in enumerate(document["findings"]):
        finding["state"], finding["side"] = said.states[index], said.sides[index]
    check(document)
    return document


def add_addendum(document: Mapping[str, Any], *, by: str, at: str, text: str) -> dict[str, Any]:
    """Add to a signed reading; what was signed stays as it is. Raises UserError for a draft, or a text too long."""
    if document.get("status") not in ("signed", "addendum"):
        raise UserError("addendum: the reading is not signed yet: edit the report instead")
    # Findings stay those of the signed report: an addendum is text beside them.
    extended = copy.deepcopy(dict(document))
    extended["addenda"].append({"by": by, "at": at, "text": text})
    extended["status"] = "addendum"
    check(extended)
    return extended


# ---- Whole documents ----


def check(document: object) -> None:
    """Refuse what is no valid document: by the schema, and by what no schema can say.

    Raises:
        UserError: that names the place and the rule, and never holds what stands there.
    """
    problems = schema.problems(document)
    if not problems and isinstance(document, dict):
        problems = _problems_of_meaning(document)
    if problems:
        raise UserError(f"{schema.NAME}: {problems[0]}")


def _problems_of_meaning(document: dict[str, Any]) -> list[str]:
    problems = []
    # Readers of documents go by place as well as by name.
    labels = tuple(finding["label"] for finding in document["findings"])
    if labels != CHEXPERT_14:
        problems.append("findings: not the 14 labels in their order")
    # Findings, contradictions and a page name sentences by these numbers.
    numbers = [sentence["n"] for sentence in document["trace"]]
    if numbers != list(range(1, len(numbers) + 1)):
        problems.append("trace: sentences are not numbered from 1 on")
    known = set(numbers)
    for finding in document["findings"]:
        if not set(finding["sentences"]) <= known:
            problems.append("findings: a sentence that the trace has not")
        if finding["named_in_answer"] != (finding["label"] in document["answer"]):
            problems.append("findings: named_in_answer is not what the answer says")
        if finding["side"] is not None and finding["state"] not in ("present", "uncertain"):
            problems.append("findings: a side of what is not there")
    # A signature that is there and not there would be read either way.
    if (document["status"] == "draft") != (document["signed"] is None):
        problems.append("signed: a draft has no signature, and what is signed has one")
    if (document["status"] == "addendum") != bool(document["addenda"]):
        problems.append("addenda: not what the status says")
    return problems


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """Write a document as canonical JSON: sorted keys, no blanks, ASCII; the same document is the same bytes."""
    # NaN is no JSON: it would be refused by whoever reads it.
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def sha256(document: Mapping[str, Any]) -> str:
    """Name a document by its bytes: what UIDs and identifiers of all outputs follow from."""
    return hashlib.sha256(to_bytes(document)).hexdigest()


def finding_of(document: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Give the row of one label."""
    return document["findings"][INDEX[label]]


def addenda_of(document: Mapping[str, Any]) -> list[str]:
    """Give the addenda, each with its time, as every output that shows findings shows them beside these."""
    return [f"Addendum of {entry['at']}: {entry['text']}" for entry in document["addenda"]]


def title_of(document: Mapping[str, Any]) -> str:
    """Say in one line what the document concludes: what is present, then what is possible."""
    # What is certain comes first.
    title_parts = [
        name
        for state, form in (("present", "{}"), ("uncertain", "possible {}"))
        for finding in document["findings"]
        if finding["state"] == state
        for name in [form.format(_with_side(finding))]
    ]
    return "; ".join(title_parts) or "No finding is affirmed."


def _with_side(finding: Mapping[str, Any]) -> str:
    return f"{finding['label']} ({finding['side']})" if finding["side"] else finding["label"]
