"""The codes that other systems know findings by: `codes.toml`, read once, and the rules that choose among them.

A code says of a finding no more than the reading does. Where a label is a group (Support Devices, Lung Lesion), one
kind is asserted only if its sentences name that kind alone. `--codes=local` gives codes of our own scheme throughout,
for places without a licence for SNOMED CT.
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cxr_jax.errors import UserError

PATH = Path(__file__).with_name("codes.toml")
CHOICES = ("standard", "local")
# FHIR's names of the schemes that DICOM has short ones for.
_SYSTEMS = {
    "SCT": "http://snomed.info/sct",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    "UCUM": "http://unitsofmeasure.org",
    "LN": "http://loinc.org",
}


class Concept(NamedTuple):
    """A code, the scheme it is of (DICOM's designator), and its meaning."""

    code: str
    scheme: str
    meaning: str


class Coded(NamedTuple):
    """A finding in codes.

    Attributes:
        finding: what it is.
        local: the same label in our own scheme.
        site: where it is, or None.
    """

    finding: Concept
    local: Concept
    site: Concept | None


@functools.cache
def load() -> dict[str, Any]:
    """Read the table. Shared by all callers: do not change it."""
    return tomllib.loads(PATH.read_text())


def scheme() -> dict[str, str]:
    """Give our own scheme: "designator", "uid" and "name"."""
    return load()["scheme"]


def system_of(concept: Concept) -> str:
    """Give the scheme of a concept as FHIR names it."""
    # Ours has an OID for a name, as schemes without a registry have.
    own_scheme = scheme()
    return (
        f"urn:oid:{own_scheme['uid']}"
        if concept.scheme == own_scheme["designator"]
        else _SYSTEMS[concept.scheme]
    )


class Codes:
    """The codes of one choice.

    Args:
        choice: of CHOICES.

    Raises:
        UserError: for another choice.
    """

    def __init__(self, choice: str = "standard") -> None:
        if choice not in CHOICES:
            raise UserError(f"--codes={choice}: choose one of {', '.join(CHOICES)}")
        self.choice = choice
        self._rows = {label_row["label"]: label_row for label_row in load()["labels"]}

    def said(self, name: str) -> Concept:
        """Give what is said of a finding: a key of the table's `said`."""
        return self._choose(load()["said"][name], name.upper())

    def state(self, name: str) -> Concept:
        """Give a state: "present", "absent" or "uncertain"."""
        return self._choose(load()["states"][name], name.upper())

    def side(self, name: str) -> Concept:
        """Give a side: "right", "left" or "bilateral"."""
        return self._choose(load()["sides"][name], name.upper())

    def model_state(self, name: str) -> Concept:
        """Give a state as the model had said it: as `state`, and "not_mentioned"."""
        return self.said("not_said") if name == "not_mentioned" else self.state(name)

    def model_side(self, name: str | None) -> Concept:
        """Give a side as the model had said it, None included."""
        return self.said("not_said") if name is None else self.side(name)

    def finding(
        self, label: str, sentences: Iterable[str] = (), beside: Iterable[str] = ()
    ) -> Coded:
        """Give the codes of a label.

        Args:
            label: of the 14.
            sentences: what the reading says of it; they choose among kinds.
            beside: further text, in which no other kind may be named.
        """
        # A label that is none of the 14 is a mistake of the caller.
        label_row = self._rows[label]
        own_scheme = self.local(label)
        # Words anywhere in them count: which of them is meant is not for a pattern to say.
        joined_text = " ".join(sentences)
        kind = self._kind(label_row, joined_text)
        if beside and kind != self._kind(label_row, " ".join([joined_text, *beside])):
            kind = None
        found = kind or label_row.get("finding")
        # Of a site that only some sentences name, nothing is said for the others.
        site = label_row.get("site") or next(
            (
                said["site"]
                for said in label_row.get("sites_said", ())
                if _names(said["words"], joined_text)
            ),
            None,
        )
        return Coded(
            finding=own_scheme if found is None else self._choose(found, label_row["local"], label),
            local=own_scheme,
            site=None if site is None else self._choose(load()["sites"][site], site.upper()),
        )

    def local(self, label: str) -> Concept:
        """Give the code of a label in our own scheme."""
        return Concept(self._rows[label]["local"], scheme()["designator"], label)

    def _kind(self, label_row: Mapping[str, Any], joined_text: str) -> Mapping[str, str] | None:
        named = [kind for kind in label_row.get("kinds", ()) if _names(kind["words"], joined_text)]
        # Two kinds, or one that has no code, are what the group's own code is for.
        return named[0] if len(named) == 1 and "code" in named[0] else None

    def _choose(
        self, entry: Mapping[str, Any], local_code: str, local_meaning: str | None = None
    ) -> Concept:
        # Codes change with the choice, meanings do not; and what has a code of our own keeps it.
        own_scheme = scheme()["designator"]
        if self.choice == "local" and entry["scheme"] != own_scheme:
            return Concept(local_code, own_scheme, local_meaning or entry["meaning"])
        return Concept(entry["code"], entry["scheme"], entry["meaning"])


def _names(words: str, joined_text: str) -> bool:
    return re.search(rf"\b(?:{words})\b", joined_text, re.IGNORECASE) is not None


def label_of(code: str, designator: str) -> str | None:
    """Find the label that a code stands for, in either choice; None for another code."""
    # Few enough to go through; kinds stand for their group.
    for label_row in load()["labels"]:
        own_scheme = (label_row["local"], scheme()["designator"])
        entries = [label_row["finding"]] if "finding" in label_row else []
        entries += [kind for kind in label_row.get("kinds", ()) if "code" in kind]
        if (code, designator) in [
            own_scheme,
            *((entry["code"], entry["scheme"]) for entry in entries),
        ]:
            return label_row["label"]
    return None


def state_of(code: str) -> str | None:
    """Find the state that a code stands for, in either choice; None for another code."""
    return _key_of("states", code)


def side_of(code: str) -> str | None:
    """Find the side that a code stands for, in either choice; None for another code."""
    return _key_of("sides", code)


def _key_of(table: str, code: str) -> str | None:
    # A local code is the name in capitals.
    entries = load()[table].items()
    return next((name for name, entry in entries if code in (entry["code"], name.upper())), None)
