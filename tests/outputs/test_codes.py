"""codes.toml: identifiers that are well formed, and are what their sources say."""

import re

import pytest
from pydicom.sr import _concepts_dict

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.outputs import codes

# Verhoeff's tables: the dihedral group of order 10, the permutation's powers. Written from the definition.
_PERMUTATION = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


def _product(first, second):
    """In the group of the pentagon's symmetries: 0 to 4 turn it, 5 to 9 mirror it."""
    turn, mirror = first % 5, first // 5
    other_turn, other_mirror = second % 5, second // 5
    sign = -1 if mirror else 1
    return (turn + sign * other_turn) % 5 + 5 * (mirror ^ other_mirror)


def has_right_check_digit(identifier):
    check = 0
    for place, digit in enumerate(map(int, reversed(identifier))):
        for _ in range(place):
            digit = _PERMUTATION[digit]
        check = _product(check, digit)
    return check == 0


def _entries():
    """Every code of the table: (scheme, code, meaning, level, sources)."""
    table = codes.load()
    for group in ("said", "states", "sides", "sites"):
        for entry in table[group].values():
            yield entry["scheme"], entry["code"], entry["meaning"], entry["level"], entry["sources"]
    for row in table["labels"]:
        if "finding" in row:
            found = row["finding"]
            yield found["scheme"], found["code"], found["meaning"], row["level"], row["sources"]
        for kind in row.get("kinds", ()):
            if "code" in kind:
                yield kind["scheme"], kind["code"], kind["meaning"], kind["level"], kind["sources"]


def test_the_check_digit_is_that_of_known_identifiers():
    assert all(map(has_right_check_digit, ("236", "22298006", "73211009", "404684003")))
    # In public lists for consolidation, and invented there.
    assert not any(map(has_right_check_digit, ("95436003", "60567007", "237")))


def test_identifiers_of_snomed_ct_have_their_check_digits_and_every_code_its_sources():
    entries = list(_entries())
    assert len(entries) > 25
    for scheme, code, meaning, level, sources in entries:
        if scheme == "SCT":
            assert has_right_check_digit(code), code
            # A concept's identifier: partition 00.
            assert code[-3:-1] == "00", code
        assert 0 < len(meaning) <= 64 and len(code) <= 16  # LO and SH
        assert level in "ABL" and (level == "L" or sources), code
        assert level != "B" or len(sources) >= 2 or "two" in sources[0], code


def test_codes_of_level_a_stand_in_pydicoms_copy_of_ps3_16():
    meanings = {}
    for scheme in ("SCT", "DCM"):
        for by_code in _concepts_dict.concepts[scheme].values():
            for code, (meaning, _) in by_code.items():
                meanings.setdefault((scheme, code), set()).add(meaning)
    assert len(meanings) > 1000
    for scheme, code, meaning, level, _ in _entries():
        if level == "A":
            assert meaning in meanings[scheme, code], (code, meaning)


def test_all_14_labels_have_codes_of_their_own_in_both_choices():
    assert tuple(row["label"] for row in codes.load()["labels"]) == CHEXPERT_14
    assert all(len(row["local"]) <= 16 for row in codes.load()["labels"])
    for choice in codes.CHOICES:
        table = codes.Codes(choice)
        found = {label: table.finding(label).finding for label in CHEXPERT_14}
        assert len(set(found.values())) == 14
        for label, concept in found.items():
            assert codes.label_of(concept.code, concept.scheme) == label
            assert choice == "standard" or concept.scheme == "99CXRJAX"
        for state in ("present", "absent", "uncertain"):
            assert codes.state_of(table.state(state).code) == state
        for side in ("right", "left", "bilateral"):
            assert codes.side_of(table.side(side).code) == side
    assert codes.label_of("8186001", "DCM") is None and codes.state_of("8186001") is None
    with pytest.raises(UserError, match="--codes=snomed"):
        codes.Codes("snomed")


def test_a_kind_is_asserted_only_where_its_sentences_name_it_alone():
    table = codes.Codes()

    def meaning(label, *sentences):
        return table.finding(label, sentences).finding.meaning

    assert meaning("Support Devices", "Endotracheal tube in place.") == "Endotracheal tube"
    assert (
        meaning("Support Devices", "Endotracheal tube.", "Right chest tube.") == "Support Devices"
    )
    assert meaning("Support Devices", "Central line and sternal wires.") == "Support Devices"
    assert meaning("Lung Lesion", "A nodule in the upper zone.") == "Nodule"
    assert meaning("Lung Lesion", "No nodule or mass.") == "Lesion"
    assert table.finding("Fracture", ["Right rib fracture."]).site.meaning == "Rib"
    assert table.finding("Fracture", ["Clavicle fracture."]).site is None


def test_the_own_scheme_is_named_by_a_uid():
    own = codes.scheme()
    assert re.fullmatch(r"2\.25\.[1-9][0-9]{0,38}", own["uid"]) and len(own["uid"]) <= 64
    assert codes.system_of(codes.Codes("local").state("present")) == f"urn:oid:{own['uid']}"
