"""Items of CLAIM, DECIDE-AI and MI-CLAIM that the software can answer; the rest is left for the authors, visibly."""

from typing import Any

from cxr_jax.study.protocol import Protocol

OPEN = "to be filled in by the authors"


def checklists(protocol: Protocol, document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """List (checklist, item, answer), in our words, not those of the checklists."""
    # From the numbers of the analysis, so that they cannot differ from it.
    flow = document["flow"]
    allocated = sum(flow_row["allocated"] for flow_row in flow)
    signed = sum(flow_row["signed"] for flow_row in flow)
    # A manifest is the authors' own: only they know where it is from.
    film_source = "synthetic phantoms" if protocol.cases.startswith("phantom") else OPEN
    readers = "programs (simulated)" if protocol.simulated else OPEN
    planted = f"planted in {protocol.plant_share:.0%} of the cases, kinds {', '.join(protocol.plant_kinds)}"
    sealed = f"protocol and truth sealed before the first sitting, sha256 {document['seal_sha256'][:12]}.."
    return [
        ("CLAIM", "Study design", document["first_line"]),
        ("CLAIM", "Source and selection of the cases", film_source),
        ("CLAIM", "Reference standard", film_source if film_source != OPEN else OPEN),
        ("CLAIM", "How the reference was kept from readers", sealed),
        (
            "CLAIM",
            "Statistical measures and their uncertainty",
            "above; 95 % intervals, readers and cases at random",
        ),
        ("CLAIM", "Flow of cases", f"{allocated} readings allocated, {signed} signed; table above"),
        ("CLAIM", "Robustness", "idle time trimmed; model without reader by arm; order effects"),
        ("DECIDE-AI", "Intended use and users", OPEN),
        ("DECIDE-AI", "Who the readers are, their experience", readers),
        (
            "DECIDE-AI",
            "Training of the readers",
            f"practice films before each block: {protocol.practice_per_block}",
        ),
        ("DECIDE-AI", "How AI output is shown", "; ".join(protocol.arms)),
        ("DECIDE-AI", "Errors of the AI and what they led to", planted),
        (
            "DECIDE-AI",
            "Human factors",
            "NASA-TLX after each session, SUS at the end, ratings after each film",
        ),
        ("DECIDE-AI", "Ethics", OPEN),
        ("MI-CLAIM", "Model, version, weights", OPEN),
        ("MI-CLAIM", "Baseline for comparison", "manual arm on the same films and form"),
        (
            "MI-CLAIM",
            "Reproducibility",
            "rows.csv and analysis.R redo the numbers; chain head in analysis.json",
        ),
    ]
