"""Sittings: the server decides what is next, binds answers to what was shown, and forgets nothing it acknowledged."""

import contextlib
import itertools
import json
import re
import sqlite3
from datetime import UTC, datetime, timedelta

import pytest

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.store import open_store
from cxr_jax.store.records.actors import Actor
from cxr_jax.study.analysis.rows import make_rows
from cxr_jax.study.analysis.study import shortest_washout
from cxr_jax.study.commands import manage
from cxr_jax.study.folder import SEALED, StudyFolder
from cxr_jax.study.ledger import Ledger
from cxr_jax.study.refusals import SittingRefusedError
from cxr_jax.study.sitting import Sitting

ANNA, BERT = Actor("anna", "reader"), Actor("bert", "reader")
NUMBERS = itertools.count()


def key():
    return f"key{next(NUMBERS):09d}"


def whole_answer(study, **more):
    return {
        "labels": {label: {"state": "absent", "side": None} for label in CHEXPERT_14},
        "suspicion": dict.fromkeys(study.protocol.suspicion_labels, 10),
        **more,
    }


def begin(sitting, actor):
    """Open the reader's next task; gives its path and what every request carries."""
    following = sitting.next(actor)
    page = key()
    opened = sitting.open(actor, following["task"], page)
    binding = {"page": page, "shown_sha256": opened["shown_sha256"]}
    return following, opened, binding


def do_task(sitting, actor, confidence=4):
    following = sitting.next(actor)
    if following["kind"] == "ratings":
        ratings = {item["name"]: 1 for item in following["items"]}
        sitting.rate(actor, following["task"], {"ratings": ratings, "idem_key": key()})
        return following
    if following["kind"] == "questionnaire":
        answers = {"tlx": [50] * len(following["tlx"]), "sus": [3] * len(following["sus"])}
        sitting.answer_questionnaire(actor, {"session": following["session"], "answers": answers})
        return following
    following, opened, binding = begin(sitting, actor)
    task = following["task"]
    request = {**binding, "idem_key": key(), "version": 0, "answer": whole_answer(sitting.folder)}
    version = sitting.save(actor, task, request)["version"]
    sign = {**binding, "idem_key": key(), "version": version, "confidence": confidence}
    sitting.sign(actor, task, sign)
    return following | {"opened": opened}


# ---- What a reader may ----------------------------------------------------------------------------


def test_answer_twice_is_kept_once_and_stale_versions_are_refused(study, store):
    sitting = Sitting(study, store)
    following, _, binding = begin(sitting, ANNA)
    task, first = following["task"], {**binding, "idem_key": key(), "version": 0}
    request = first | {"answer": whole_answer(study)}
    assert sitting.save(ANNA, task, request) == sitting.save(ANNA, task, request) == {"version": 1}
    assert len(store.answers.versions(task)) == 1
    with pytest.raises(SittingRefusedError, match="another version") as refusal:
        sitting.save(ANNA, task, request | {"idem_key": key()})
    assert refusal.value.status == 409 and refusal.value.facts == {"version": 1}
    # The same key with another content is a mistake, not a repetition.
    with pytest.raises(SittingRefusedError, match="another answer"):
        sitting.save(ANNA, task, request | {"answer": {}})


def test_answer_to_another_film_is_refused_and_an_event(study, store):
    sitting = Sitting(study, store)
    following, _, binding = begin(sitting, ANNA)
    request = {**binding, "shown_sha256": "0" * 64, "idem_key": key(), "version": 0}
    with pytest.raises(SittingRefusedError, match="another film") as refusal:
        sitting.save(ANNA, following["task"], request | {"answer": whole_answer(study)})
    assert refusal.value.status == 409
    [event] = store.events("task.refused")
    assert event.body == {"reason": "shown"} and event.task == following["task"]


def test_second_tab_takes_the_task_and_the_first_is_out(study, store):
    sitting = Sitting(study, store)
    following, _, binding = begin(sitting, ANNA)
    task, other = following["task"], key()
    assert sitting.open(ANNA, task, other)["resumed"]
    request = {"idem_key": key(), "version": 0, "answer": whole_answer(study)}
    with pytest.raises(SittingRefusedError, match="another tab"):
        sitting.save(ANNA, task, binding | request)
    assert sitting.save(ANNA, task, binding | request | {"page": other}) == {"version": 1}


def test_signing_needs_every_label_slider_and_confidence(study, store):
    sitting = Sitting(study, store)
    following, _, binding = begin(sitting, ANNA)
    task = following["task"]
    sign = {**binding, "idem_key": key(), "version": 0, "confidence": 4}
    with pytest.raises(SittingRefusedError, match="nothing was saved"):
        sitting.sign(ANNA, task, sign)
    half = whole_answer(study, suspicion={})
    sitting.save(ANNA, task, {**binding, "idem_key": key(), "version": 0, "answer": half})
    with pytest.raises(SittingRefusedError, match="suspicion: Cardiomegaly"):
        sitting.sign(ANNA, task, sign | {"version": 1})
    request = {**binding, "idem_key": key(), "version": 1, "answer": whole_answer(study)}
    sitting.save(ANNA, task, request)
    with pytest.raises(SittingRefusedError, match="confidence"):
        sitting.sign(ANNA, task, sign | {"version": 2, "confidence": 8})
    signed = sitting.sign(ANNA, task, sign | {"version": 2})
    assert signed["state"] == "signed"
    # Again with its key: the same; without: too late.
    assert sitting.sign(ANNA, task, sign | {"version": 2}) == signed
    with pytest.raises(SittingRefusedError, match="signed"):
        sitting.sign(ANNA, task, sign | {"version": 2, "idem_key": key()})


def test_tasks_of_others_and_tasks_ahead_are_out_of_reach(study, store):
    sitting = Sitting(study, store)
    following, _, _ = begin(sitting, ANNA)
    sitting.next(BERT)
    with pytest.raises(SittingRefusedError) as refusal:
        sitting.open(BERT, following["task"], key())
    assert refusal.value.status == 404
    later = next(p for p in study.places if p.reader_no == 0 and p.position == 3)
    with pytest.raises(SittingRefusedError, match="turn"):
        sitting.open(ANNA, sitting.task_id(later), key())
    with pytest.raises(SittingRefusedError, match="places"):
        sitting.next(Actor("carl", "reader"))


def test_session_a_day_early_gets_423_with_the_date(study, store):
    now = [datetime.now(UTC)]
    sitting = Sitting(study, store, clock=lambda: now[0])
    while sitting.next(ANNA).get("session") == 1 or sitting.next(ANNA)["kind"] == "ratings":
        try:
            do_task(sitting, ANNA)
        except SittingRefusedError:
            break
        try:
            sitting.next(ANNA)
        except SittingRefusedError:
            break
    now[0] = datetime.now(UTC) + timedelta(days=27)
    with pytest.raises(SittingRefusedError) as refusal:
        sitting.next(ANNA)
    assert refusal.value.status == 423
    expected = datetime.now(UTC) + timedelta(days=28)
    assert refusal.value.facts["earliest"][:10] == expected.strftime("%Y-%m-%d")
    assert re.search(r"on \d{4}-\d\d-\d\d at \d\d:\d\d UTC", str(refusal.value))
    # A page that is loaded again is no other refusal.
    with pytest.raises(SittingRefusedError):
        sitting.next(ANNA)
    [too_early] = store.events("study.too_early")
    assert too_early.body["session_no"] == 1 and len(sitting.ledger.refused_early) == 1
    now[0] = datetime.now(UTC) + timedelta(days=28, minutes=1)
    assert sitting.next(ANNA)["session"] == 2


def test_shortest_washout_is_what_was_kept_and_not_what_was_planned(study, store):
    ledger = Ledger(study.protocol.name)
    days = datetime(2026, 1, 1, tzinfo=UTC)

    def reads(reader_no, session_no, first_day, last_day):
        tasks = Sitting(study, store).tasks_of(reader_no)
        own = [task for task, place in tasks.items() if place.session_no == session_no]
        for day, task in ((first_day, own[0]), (last_day, own[-1])):
            told = (days + timedelta(days=day)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            record = ledger.task(task)
            record.opened, record.signed_at = [told], told

    assert shortest_washout(study, store, ledger) is None
    reads(0, 0, 0, 1)
    reads(0, 1, 30, 31)
    reads(1, 0, 0, 20)
    assert shortest_washout(study, store, ledger) == pytest.approx(29)
    reads(1, 1, 23.5, 24)
    assert shortest_washout(study, store, ledger) == pytest.approx(3.5)


def test_tab_that_never_had_the_task_has_no_time(study, store):
    sitting = Sitting(study, store)
    following, _, binding = begin(sitting, ANNA)
    events = [{"kind": "task_shown", "t": 0.0}, {"kind": "sign", "t": 900.0}]
    with pytest.raises(SittingRefusedError, match="not opened in this tab") as refusal:
        sitting.add_events(ANNA, following["task"], key(), key(), events)
    assert refusal.value.status == 409
    assert sitting.add_events(ANNA, following["task"], binding["page"], key(), events)["kept"]


def test_key_of_an_answer_is_none_of_events(study, store):
    """Told that they were kept, a page would throw away times that nobody has."""
    sitting = Sitting(study, store)
    following, _, binding = begin(sitting, ANNA)
    task, used, events = following["task"], key(), [{"kind": "task_shown", "t": 0.0}]
    request = {**binding, "version": 0, "answer": whole_answer(study)}
    sitting.save(ANNA, task, request | {"idem_key": used})
    with pytest.raises(SittingRefusedError, match="another request"):
        sitting.add_events(ANNA, task, binding["page"], used, events)
    of_events = key()
    for _ in range(2):
        assert sitting.add_events(ANNA, task, binding["page"], of_events, events)["kept"]
    assert sitting.ledger.task(task).pages[binding["page"]] == events
    with pytest.raises(SittingRefusedError, match="another request"):
        sitting.save(ANNA, task, request | {"idem_key": of_events, "version": 1})


def test_session_ends_with_ratings_then_questions_and_not_before(study, store):
    sitting = Sitting(study, store)
    early = {"session": 1, "answers": {"tlx": [50] * 4, "sus": []}}
    sitting.next(ANNA)
    with pytest.raises(SittingRefusedError, match="not over"):
        sitting.answer_questionnaire(ANNA, early)
    kinds = []
    while sitting.next(ANNA)["kind"] != "questionnaire":
        kinds.append(do_task(sitting, ANNA).get("kind"))
    # Each film with AI is rated, the last one of the session, too.
    assert kinds.count("ratings") == 6 and kinds.count("task") == 9
    sitting.answer_questionnaire(ANNA, early)


def test_key_of_a_signature_stands_for_that_signature(study, store):
    sitting = Sitting(study, store)
    following, _, binding = begin(sitting, ANNA)
    request = {**binding, "idem_key": key(), "version": 0, "answer": whole_answer(study)}
    sitting.save(ANNA, following["task"], request)
    sign = {**binding, "idem_key": key(), "version": 1, "confidence": 4}
    sitting.sign(ANNA, following["task"], sign)
    with pytest.raises(SittingRefusedError, match="another signature"):
        sitting.sign(ANNA, following["task"], sign | {"confidence": 7})


def test_command_between_check_and_event_is_not_missed(study, store, monkeypatch):
    sitting = Sitting(study, store)
    following, _, binding = begin(sitting, ANNA)
    append = store.append

    def append_after_close(*arguments, **more):
        # The coordinator's command had the database while this request waited for it.
        monkeypatch.setattr(store, "append", append)
        manage.close(study.path)
        return append(*arguments, **more)

    monkeypatch.setattr(store, "append", append_after_close)
    events = [{"kind": "task_shown", "t": 0.0}]
    sitting.add_events(ANNA, following["task"], binding["page"], key(), events)
    with pytest.raises(SittingRefusedError, match="closed"):
        sitting.next(ANNA)


def test_state_is_the_same_after_a_restart(study, store):
    sitting = Sitting(study, store)
    do_task(sitting, ANNA)
    following, _, binding = begin(sitting, ANNA)
    request = {**binding, "idem_key": key(), "version": 0, "answer": whole_answer(study)}
    sitting.save(ANNA, following["task"], request)
    again = Sitting(study, store)
    assert again.next(ANNA)["task"] == following["task"]
    # A repeated request of before the restart is still the same request.
    assert again.save(ANNA, following["task"], request) == {"version": 1}


# ---- Blinding --------------------------------------------------------------------------------------


def test_manual_tasks_hold_no_byte_of_the_ai(study, store):
    sitting = Sitting(study, store)
    seen = {}
    # A whole session: nine films, ratings between them.
    for _ in range(15):
        done = do_task(sitting, ANNA)
        if "opened" in done:
            seen.setdefault(tuple(done["shows"]), []).append(json.dumps(done))
    assert len(seen) == 3
    for text in seen[()]:
        opened = json.loads(text)["opened"]
        assert opened["shown"] == {}
        for secret in ("zebrafish", "manual", "planted", "plant", '"side"', "present"):
            assert secret not in text
    assert any("zebrafish" in text for text in seen["labels", "sentences", "draft"])
    # The plant is shown as if it were the AI's own, and nothing says that it is one.
    assert "plant" not in "".join(itertools.chain(*seen.values()))


def test_no_arm_shows_probabilities(study):
    for name in ("shown.json", "allocation.json", "cases.json"):
        text = (study.path / name).read_text()
        assert "probab" not in text and "plant" not in text and "truth" not in text


# ---- Seal ------------------------------------------------------------------------------------------


def test_changed_sealed_file_is_named_and_not_opened(study):
    manage.close(study.path)
    path = study.path / SEALED
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    path.write_text(text.replace('"side"', '"drop"', 1))
    assert manage.verify(study.path) == ["sealed.json: is not the one that was sealed"]
    with pytest.raises(UserError, match="sealed.json"):
        manage.unblind(study.path)
    path.write_text(text)
    assert manage.verify(study.path) == []
    manage.unblind(study.path)


@pytest.mark.parametrize("name", ["protocol.json", "shown.json", "allocation.json"])
def test_changed_file_is_named(study, name):
    path = study.path / name
    changed = {"protocol.json": ('"seed": 0', '"seed": 1'), "shown.json": ("zebrafish", "giraffe")}
    before, after = changed.get(name, ("manual", "labels"))
    path.write_text(path.read_text().replace(before, after, 1))
    assert f"{name}: is not the one that was sealed" in manage.verify(study.path)


def read_and_unblind(study, store):
    do_task(Sitting(study, store), ANNA)
    manage.close(study.path)
    manage.unblind(study.path)
    ledger = Ledger(study.protocol.name)
    ledger.refresh(store)
    return lambda: make_rows(StudyFolder(study.path), store, ledger, study.read_sealed())


def test_truth_that_was_changed_after_unblinding_makes_no_numbers(study, store):
    rows = read_and_unblind(study, store)
    assert sum(row["state"] == "signed" for row in rows()) == 1
    path = study.path / SEALED
    text = path.read_text()
    path.write_text(text.replace('"abnormal":true', '"abnormal":false', 1))
    with pytest.raises(UserError, match=r"sealed\.json: is not the one"):
        rows()
    path.write_text(text)
    assert rows()


def test_study_that_was_read_with_other_readings_makes_no_numbers(study, store):
    # Exchanged while readers sat, and put back before anybody looked.
    path = study.path / "shown.json"
    text = path.read_text()
    path.write_text(text.replace("zebrafish", "giraffe"))
    exchanged = StudyFolder(study.path)
    with pytest.raises(UserError, match=r"shown\.json: is not the one"):
        Sitting(exchanged, store).check_record()
    sitting = Sitting(exchanged, store)
    # A whole session: only one of its arms shows sentences.
    for _ in range(15):
        do_task(sitting, ANNA)
    path.write_text(text)
    Sitting(StudyFolder(study.path), store).check_record()
    ledger = Ledger(study.protocol.name)
    ledger.refresh(store)
    with pytest.raises(UserError, match="what was signed is not what was sealed"):
        make_rows(StudyFolder(study.path), store, ledger, study.read_sealed())
    # Neither is it unblinded, nor called whole.
    with pytest.raises(UserError, match="what was signed is not what was sealed"):
        read_and_unblind(study, store)
    assert any("what was signed" in problem for problem in manage.verify(study.path))


def test_folder_without_its_key_is_told_from_one_that_nobody_read(study, store):
    do_task(Sitting(study, store), ANNA)
    (study.path / "secret").write_bytes(b"x" * 32)
    with contextlib.closing(open_store(study.path, exclusive=False)) as other:
        with pytest.raises(UserError, match="secret: is not the one"):
            Sitting(study, other).check_record()


def test_lost_tail_is_told_by_a_head_that_was_kept(study):
    head = manage.head_of(study.path)
    assert manage.verify(study.path, [head]) == []
    number, _, digest = head.partition(":")
    missing = manage.verify(study.path, [f"{int(number) + 5}:{digest}"])
    assert missing and "8" in missing[0]


@pytest.fixture
def edited(study, store):
    """Edit the database of a study in which one answer was signed, past its triggers."""
    do_task(Sitting(study, store), ANNA)
    store.close()

    def run(*statement):
        with contextlib.closing(sqlite3.connect(study.path / "room.db")) as database, database:
            names = database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")
            for (name,) in names.fetchall():
                database.execute(f"DROP TRIGGER {name}")
            assert database.execute(*statement).rowcount == 1

    assert manage.verify(study.path) == []
    return run


def test_changed_byte_of_an_event_is_named(study, edited):
    edited(
        "UPDATE event SET body = replace(body, '\"confidence\":4', '\"confidence\":5') WHERE seq = 7"
    )
    problems = manage.verify(study.path)
    assert problems and "7" in problems[0] and not any("json" in problem for problem in problems)


def test_changed_byte_of_an_answer_is_named(study, edited):
    edited("UPDATE answer SET body = replace(body, '\"Edema\":10', '\"Edema\":90')")
    [problem] = manage.verify(study.path)
    assert "answer" in problem


def test_steps_out_of_turn_are_refused(study):
    for step in (manage.seal, manage.unblind, manage.start):
        with pytest.raises(UserError, match="is open"):
            step(study.path)
    with pytest.raises(UserError, match="reason"):
        manage.set_washout(study.path, 14, " ")
    manage.set_washout(study.path, 14, "holidays")
    with manage.open_study(study.path) as opened:
        assert opened.ledger.washouts[0]["days"] == 14
