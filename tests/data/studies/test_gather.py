"""Films of a study and the one before it, asked about together: never later, never another's, never across a split."""

import json
import random

import numpy as np
import pytest
from PIL import Image as PilImage

from cxr_jax.data import prompts
from cxr_jax.data.sources import label_table, manifest
from cxr_jax.data.studies.gather import parse_images
from cxr_jax.data.studies.order import Taken, find_study, find_taken
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

ALL = "frontal,lateral,prior,prior_lateral"


def write(folder, rows):
    """Rows of (patient, study, date, view, more), each a film of its own; the order is shuffled."""
    (folder / "films").mkdir(exist_ok=True)
    lines = []
    for number, (patient, study, date, view, more) in enumerate(rows):
        name = f"{number:03}.png"
        PilImage.fromarray(np.full((30, 30), number, np.uint8)).save(folder / "films" / name)
        row = {"id": name, "image": name, "prompt": "What?", "solution": "Edema"}
        row |= {"patient_id": patient, "study_id": study, "StudyDate": date, "view": view} | more
        lines.append(json.dumps(row))
    random.Random(0).shuffle(lines)
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


def read(folder, rows, images=ALL):
    path = write(folder, rows)
    return manifest.load_rows(path, folder / "films", images=images)


def films(row):
    return dict(zip(row.roles, (int(path.stem) for path in row.image_paths), strict=True))


STUDIES = [
    ("p1", "a", "20010101", "PA", {}),
    ("p1", "a", "20010101", "LL", {}),
    ("p1", "b", "20020101", "AP", {}),
    ("p1", "c", "20030101", "lateral", {}),
    ("p1", "c", "20030101", "PA", {}),
    ("p2", "c", "20020601", "PA", {}),
    (None, "a", "20040101", "PA", {}),
]


def test_a_frontal_film_is_asked_about_beside_its_lateral_and_its_prior(tmp_path):
    by_film = {int(row.id[:3]): row for row in read(tmp_path, STUDIES)}
    assert {film: films(row) for film, row in by_film.items()} == {
        0: {"frontal": 0, "lateral": 1},
        2: {"frontal": 2, "prior": 0, "prior_lateral": 1},
        4: {"frontal": 4, "lateral": 3, "prior": 2},
        5: {"frontal": 5},
        6: {"frontal": 6},
    }
    for row in by_film.values():
        assert row.prompt == prompts.ask_of_roles(row.roles, "What?")
    assert by_film[4].prompt == (
        "Current frontal: <image> Current lateral: <image> Prior frontal: <image>\nWhat?"
    )
    fewer = read(tmp_path, STUDIES, "prior, frontal")
    assert films({row.id: row for row in fewer}["004.png"]) == {"frontal": 4, "prior": 2}
    alone = read(tmp_path, STUDIES, "frontal")
    assert {row.prompt for row in alone} == {"Current frontal: <image>\nWhat?"}
    as_they_are = read(tmp_path, STUDIES, "")
    assert len(as_they_are) == 7 and not any(row.roles for row in as_they_are)


@pytest.mark.parametrize("seed", range(6))
def test_random_patients_by_a_plain_search(tmp_path, seed):
    draw = random.Random(seed)
    rows = []
    for _ in range(60):
        patient, study = draw.choice(["p1", "2", "03", None]), draw.choice("abcde")
        date = draw.choice([f"200{draw.randrange(4)}0101", f"200{draw.randrange(4)}-01-01", None])
        more = {"Follow-up #": draw.randrange(5)} if draw.random() < 0.3 else {}
        if draw.random() < 0.3:
            more["StudyTime"] = draw.choice(["081500", "1530.25", "23:59"])
        rows.append((patient, study, date, draw.choice(["PA", "AP", "LL", "LAO", None]), more))
    got = {int(row.id[:3]): row for row in read(tmp_path, rows)}
    asked = {n for n, row in enumerate(rows) if row[3] in ("PA", "AP", None)}
    assert set(got) == asked

    def when(row):
        clock = {"081500": 8.25, "1530.25": 0.2583, "23:59": 23.98}.get(row[4].get("StudyTime"))
        return (row[2] or "").replace("-", ""), clock, row[4].get("Follow-up #")

    def is_before(one, other):
        if one[0] and other[0]:
            if one[0] != other[0]:
                return one[0] < other[0]
            if None not in (one[1], other[1]):
                return one[1] < other[1]
        return None not in (one[2], other[2]) and one[2] < other[2]

    for number, row in got.items():
        own, found = rows[number], films(row)
        assert found["frontal"] == number
        same = [n for n in range(len(rows)) if own[0] and rows[n][0] == own[0]]
        laterals = [n for n in same if rows[n][3] == "LL" and rows[n][1] == own[1]]
        assert found.get("lateral") == min(laterals, default=None)
        earlier = [n for n in same if n in asked and is_before(when(rows[n]), when(own))]
        # Of its own study no film is a prior.
        earlier = [n for n in earlier if rows[n][1] != own[1]]
        assert ("prior" in found) == bool(earlier)
        if earlier:
            prior = rows[found["prior"]]
            assert found["prior"] in earlier  # its own patient's, and not later
            assert not any(is_before(when(prior), when(rows[n])) for n in earlier)
        if "prior_lateral" in found:
            assert rows[found["prior_lateral"]][:2] == rows[found["prior"]][:2]


def test_all_films_of_a_question_are_on_one_side_of_the_split(tmp_path):
    rows = [
        (f"p{n // 6:02}", str(n // 2 % 3), f"200{n // 2 % 3}0101", ("PA", "LL")[n % 2], {})
        for n in range(120)
    ]
    path = write(tmp_path, rows)
    parts = manifest.open_split(path, tmp_path / "films", images=ALL, seed=3)
    sides = [{rows[int(p.stem)][0] for row in part.rows for p in row.image_paths} for part in parts]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 20
    counts = {len(row.image_paths) for part in parts for row in part.rows}
    assert counts == {2, 4}


def test_rows_that_have_roles_keep_those_that_are_read(tmp_path):
    given = [{"path": f"{n:03}.png", "role": role} for n, role in enumerate(prompts.ROLES)]
    more = {"image": None, "images": given}
    rows = [("p", "s", None, None, {}) for _ in range(4)]
    [row] = [
        r for r in read(tmp_path, [*rows, ("q", "s", None, None, more)], ALL) if len(r.roles) > 1
    ]
    assert films(row) == {"frontal": 0, "lateral": 1, "prior": 2, "prior_lateral": 3}
    [row] = [
        r
        for r in read(tmp_path, [*rows, ("q", "s", None, None, more)], "frontal,prior")
        if len(r.roles) > 1
    ]
    assert films(row) == {"frontal": 0, "prior": 2}
    assert row.prompt == "Current frontal: <image> Prior frontal: <image>\nWhat?"


REFUSED = {
    "2 images, and no roles": {"image": None, "images": ["000.png", "001.png"]},
    "no frontal among its images": {"image": {"path": "000.png", "role": "lateral"}},
    "marks the place of its film": {"prompt": "Is it <image> here?"},
    "more images than are read": {
        "prompt": "New <image>, old <image>?",
        "image": None,
        "images": [{"path": f"00{n}.png", "role": r} for n, r in enumerate(("frontal", "prior"))],
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_rows_that_cannot_be_asked_so_are_named(tmp_path, reason):
    rows = [("p", "s", None, None, {}), ("p", "s", None, None, {})]
    bad = ("q", "t", None, None, {"id": "bad one"} | REFUSED[reason])
    with pytest.raises(UserError, match=f"^row bad one: .*{reason}.*config.data.images") as caught:
        read(tmp_path, [*rows, bad], "frontal,lateral")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("lateral", "frontal must be among them"),
        ("frontal,side", "'side' is none of frontal, lateral, prior, prior_lateral"),
        ("frontal,frontal", "frontal is there 2 times"),
        (",", "names none of"),
    ],
)
def test_a_key_that_names_no_films_is_refused(text, reason):
    with pytest.raises(UserError, match=f"^config.data.images='{text}': {reason}"):
        parse_images(text)
    assert parse_images(" ") == () and parse_images("prior ,frontal") == ("frontal", "prior")


def test_when_a_study_was_made():
    def taken(path="x.png", **fields):
        return find_taken(fields, [path])

    assert taken(StudyDate=20010203.0, StudyTime="083015.25") == Taken("20010203", "083015")
    assert taken(study_date="2001-02-03T08:30") == Taken("20010203", "0830")
    assert taken(StudyTime="83015", Date="3.2.2001") == Taken()
    assert taken(StudyDate="20013112", StudyTime="083015") == Taken(time="083015")  # no day
    assert taken("train/patient00012/study3/view1_frontal.jpg") == Taken(number=3)
    assert taken(**{"Follow-up #": 0}) == Taken(number=0)
    assert taken("p10/p10000032/s50414267/a.jpg") == Taken()  # numbers that say no order
    early, late = Taken("20010203", "080000", 9), Taken("20010203", "090000", 1)
    assert early.is_before(late) and not late.is_before(early)
    assert not Taken("20010203").is_before(late) and not late.is_before(Taken("20010203"))
    assert not Taken("20010203").is_before(Taken(number=3)) and not Taken().is_before(Taken())


CLOCKS = {
    # As MIMIC's tables have them: of 00:19:59 a float keeps four digits.
    "001959": [1959.531, "1959.531", "001959.531", "001959", "00:19:59", "0:19:59.5"],
    "002959": ["2959.5", 2959.5],
    "000003": [3.25],
    "213014": [213014.53100000002, "213014", "21:30:14", 213014.0],
    "0830": ["0830", "08:30", "8:30"],
    # What may be another time, and what is none.
    "": ["1430", 1430, 1430.0, "830", 83015, "24:00", "250000", "086000", "083060", "9959.5"]
    + ["02:30 PM", "08:30:15+01:00", "8h30", "0830151", "-830.5", "noon", None, True],
}


@pytest.mark.parametrize("time", CLOCKS)
def test_times_that_were_read_as_numbers_and_times_that_are_none(time):
    for clock in CLOCKS[time]:
        found = find_taken({"StudyDate": "20010203", "StudyTime": clock}, [])
        assert found == Taken("20010203", time), clock
    assert find_taken({"StudyDateTime": "20010203 1430"}, []) == Taken("20010203", "1430")


def test_no_prior_is_later_than_its_film_by_a_time_that_lost_its_zeros(tmp_path):
    rows = [
        ("p", study, "20010101", "PA", {"StudyTime": clock})
        for study, clock in (("a", "140000"), ("b", "1959.531"), ("c", "1430"), ("d", "140030"))
    ]
    got = {row.id: films(row) for row in read(tmp_path, rows)}
    assert got["000.png"] == {"frontal": 0, "prior": 1}  # 14:00 after 00:19
    assert got["001.png"] == {"frontal": 1}
    assert got["002.png"] == {"frontal": 2}  # half past two, or fourteen minutes past midnight
    assert got["003.png"] == {"frontal": 3, "prior": 0}


def test_times_are_compared_as_far_as_both_tell():
    minute, second, later = (Taken("20010203", clock) for clock in ("0830", "083015", "083100"))
    assert not minute.is_before(second) and not second.is_before(minute)
    assert minute.is_before(later) and second.is_before(later) and not later.is_before(minute)


def test_a_second_frontal_film_of_one_study_is_no_prior_of_the_first(tmp_path):
    rows = [
        ("p", "a", "20010101", "PA", {"StudyTime": clock}) for clock in ("081500", "081900")
    ] + [("p", "b", "20000101", "PA", {}), ("p", None, "20010101", "PA", {"StudyTime": "082000"})]
    got = [films(row) for row in sorted(read(tmp_path, rows), key=lambda row: row.id)]
    assert got[0] == {"frontal": 0, "prior": 2} and got[1] == {"frontal": 1, "prior": 2}
    assert got[2] == {"frontal": 2} and got[3] == {
        "frontal": 3,
        "prior": 1,
    }  # of a study nobody names


def test_which_study_a_film_is_of():
    assert find_study({"study_id": 50414267.0}, ["a.png"]) == "50414267"
    assert find_study({"StudyInstanceUID": "1.2.3", "view": "PA"}, []) == "1.2.3"
    assert find_study({}, ["CheXpert/train/patient00012/study3/view1_frontal.jpg"]) == "study3"
    assert find_study({}, ["files/p10/p10000032/s50414267/a.jpg"]) == "s50414267"
    assert find_study({"study_id": None, "accession": "2.5e+20"}, ["a/b.png"]) is None


def test_a_label_table_gives_rows_that_tell_studies_and_their_order(tmp_path):
    names = ",".join(CHEXPERT_14)
    table = tmp_path / "labels.csv"
    rows = [
        ("000.png,7,s1,2001-02-03,PA", "1"),
        ("001.png,7,s1,2001-02-03,LATERAL", "1"),
        ("002.png,7,s2,2002-02-03,AP", "1"),
    ]
    lines = [f"Path,PatientID,StudyID,Study Date,ViewPosition,{names}"]
    lines += [f"{cells},{label}" + "," * 13 for cells, label in rows]
    table.write_text("\n".join(lines))
    write(tmp_path, [("x", "x", None, None, {})] * 3)
    out = tmp_path / "rows.jsonl"
    assert label_table.main([str(table), str(out), "--views=any"]) == 0
    found = manifest.load_rows(out, tmp_path / "films", images=ALL)
    assert [films(row) for row in found] == [
        {"frontal": 0, "lateral": 1},
        {"frontal": 2, "prior": 0, "prior_lateral": 1},
    ]


def test_times_of_a_table_are_those_of_its_rows(tmp_path):
    clocks = ["1959.531", "08:30", "14:30", "083015", "0830", "1430", "noon", "24:00", ""]
    names = ",".join(CHEXPERT_14)
    lines = [f"Path,PatientID,StudyID,Study Date,Study Time,ViewPosition,{names}"]
    lines += [
        f"{n:03}.png,7,s{n},2001-02-03,{clock},PA,1" + "," * 13 for n, clock in enumerate(clocks)
    ]
    table, out = tmp_path / "labels.csv", tmp_path / "rows.jsonl"
    table.write_text("\n".join(lines))
    write(tmp_path, [("x", "x", None, None, {})] * len(clocks))
    assert label_table.main([str(table), str(out)]) == 0
    times = [row.taken.time for row in manifest.load_rows(out, tmp_path / "films")]
    assert times == ["001959", "0830", "1430", "083015", "0830", "", "", "", ""]
