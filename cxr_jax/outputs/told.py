"""What all outputs tell of a document besides its findings: who said what, when, and what it had been before.

SR and FHIR say it in codes of their own; what there is to say is decided here, once.
"""

from collections.abc import Mapping
from typing import Any

from cxr_jax.outputs import document as documents

# ---- Whose words they are ----


def before_review(finding: Mapping[str, Any]) -> dict[str, Any]:
    """Give what the model had said of a finding, where a reader has changed it.

    Returns:
        "model_state" where the state is another; "model_side" where the model had named another side, or none, for
        what it took to be there.
    """
    changed = {name for name in ("state", "side") if finding[name] != finding[f"model_{name}"]}
    # Of what was not there for it, the model had said no side: that it was not there says all.
    if finding["model_state"] not in ("present", "uncertain"):
        changed.discard("side")
    return {
        f"model_{name}": finding[f"model_{name}"] for name in ("state", "side") if name in changed
    }


def is_of_model(finding: Mapping[str, Any]) -> bool:
    """Tell whether the model has said anything of a finding; a reader may have added it."""
    return finding["model_state"] != "not_mentioned"


def sentences_of(document: Mapping[str, Any], finding: Mapping[str, Any]) -> list[str]:
    """Give the model's sentences that say of a finding what the document says, and still stand in its report."""
    reported = " ".join(" ".join(document["report"].values()).split()).casefold()
    found = []
    for sentence in document["trace"]:
        states = {
            claim["state"] for claim in sentence["claims"] if claim["label"] == finding["label"]
        }
        # A heading is left out where the field has it; what a reader has changed is the model's no longer.
        body = " ".join(sentence["text"].rpartition(": ")[2].split()).casefold()
        if states == {finding["state"]} and body in reported:
            found.append(sentence["text"])
    return found


# ---- Who, when, and after what ----


def readers_of(document: Mapping[str, Any]) -> dict[str, str]:
    """Give who answers for a document, in order, each with the time of the last that they wrote; {} of a draft."""
    acts = [entry for entry in (document["signed"], *document["addenda"]) if entry is not None]
    return {entry["by"]: entry["at"] for entry in acts}


def before_addendum(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give a document as it was before its last addendum; None if it has none."""
    if not document["addenda"]:
        return None
    earlier = document["addenda"][:-1]
    status = "addendum" if earlier else "signed"
    return {**document, "addenda": earlier, "status": status}


def time_of(document: Mapping[str, Any], drafted: str) -> str:
    """Give the time of a document's last change: of its last addendum, its signature, or of the draft."""
    # An addendum makes another file: it needs another time.
    if document["addenda"]:
        return document["addenda"][-1]["at"]
    return drafted if document["signed"] is None else document["signed"]["at"]


def reading_id(document: Mapping[str, Any]) -> str:
    """Name the reading that a document began as: the same name whatever readers make of it later."""
    of_model = ("image", "other_images", "model", "prompt", "seed", "trace", "answer")
    return documents.sha256({name: document[name] for name in of_model})
