"""Places of a study: given by name, taken back, and begun anew by whoever comes next."""

import pytest

from cxr_jax.errors import UserError
from cxr_jax.store.records.actors import Actor
from cxr_jax.study.__main__ import main
from cxr_jax.study.analysis.rows import make_rows
from cxr_jax.study.commands import manage, readers
from cxr_jax.study.folder import StudyFolder
from cxr_jax.study.ledger import Ledger
from cxr_jax.study.refusals import SittingRefusedError
from cxr_jax.study.sitting import Sitting

from .test_sitting import do_task


@pytest.fixture
def people(store):
    """Users with passwords that nobody hashes."""
    store.users.local()
    for handle in ("vera", "willi", "xaver"):
        store.users.add(handle, "reader", None)
    return {handle: Actor(store.users.find(handle).id, "reader") for handle in ("vera", "willi")}


def test_try_out_takes_no_place_for_good(study, store, people):
    sitting, local = Sitting(study, store), Actor("local", "reader")
    for _ in range(3):
        do_task(sitting, local)
    [first, second] = readers.change(study.path, [], [], "")
    assert first.startswith("place 1: local, ") and second == "place 2: free"
    assert readers.change(study.path, [], [1], "try-out")[0] == "place 1: free"
    # Whoever has given a place back does not take the next one by looking in.
    with pytest.raises(SittingRefusedError, match="given back") as refusal:
        sitting.next(local)
    assert refusal.value.status == 403
    for handle in ("vera", "willi"):
        assert sitting.next(people[handle])["position"] == 1
    assert manage.verify(study.path) == []


def test_successor_begins_anew_and_sees_nothing_of_who_was_there(study, store, people):
    sitting = Sitting(study, store)
    leaver = people["vera"]
    while sitting.next(leaver)["kind"] != "questionnaire":
        do_task(sitting, leaver)
    with pytest.raises(UserError, match="reason"):
        readers.change(study.path, ["willi=1"], [1], " ")
    lines = readers.change(study.path, ["willi=1"], [1], "moved away")
    assert lines[0] == "place 1: willi, 0 of 27 signed, 0 skipped"
    following = do_task(sitting, people["willi"])
    assert following["position"] == 1 and following["opened"]["answer"] is None
    assert not following["opened"]["resumed"]
    with pytest.raises(SittingRefusedError):
        sitting.open(leaver, following["task"], "a" * 12)
    assert manage.verify(study.path) == []
    ledger = Ledger(study.protocol.name)
    ledger.refresh(store)
    rows = make_rows(StudyFolder(study.path), store, ledger, study.read_sealed())
    assert sum(row["state"] == "signed" for row in rows) == 1
    # Set aside and told, with practice counted nowhere.
    [released] = ledger.released
    assert released["signed"] == 6 and released["reason"] == "moved away"
    assert ledger.questionnaires == {}


def test_what_a_released_reader_sends_in_that_moment_is_nobodys(study, store, people, monkeypatch):
    sitting = Sitting(study, store)
    task, append = sitting.next(people["vera"])["task"], store.append

    def append_after_release(*arguments, **more):
        monkeypatch.setattr(store, "append", append)
        readers.change(study.path, [], [1], "moved away")
        return append(*arguments, **more)

    monkeypatch.setattr(store, "append", append_after_release)
    sitting.open(people["vera"], task, "a" * 12)
    assert sitting.ledger.task(task).state == "waiting" and manage.verify(study.path) == []


@pytest.mark.parametrize(
    ("assigned", "released", "message"),
    [
        (["vera=1"], [], "place 1 is taken"),
        (["willi=3"], [], "places 1 to 2"),
        (["willi=0"], [], "places 1 to 2"),
        (["willi"], [], "HANDLE=PLACE"),
        (["nobody=2"], [], "nobody is no reader"),
        (["vera=2"], [], "vera has place 1"),
        (["willi=2", "xaver=2"], [], "place 2 is taken"),
        (["willi=2", "willi=1"], [1], "willi has place 2"),
        ([], [2], "nobody has that place"),
        (["vera=2"], [1], "has read films"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    study, store, people, assigned, released, message
):
    sitting = Sitting(study, store)
    for _ in range(3):
        do_task(sitting, people["vera"])
    if message == "has read films":
        readers.change(study.path, [], [1], "holidays")
        released = []
    head = manage.head_of(study.path)
    with pytest.raises(UserError, match=message):
        readers.change(study.path, assigned, released, "holidays")
    assert manage.head_of(study.path) == head


def test_places_are_no_choice_once_the_study_is_unblinded(study, store, people, capsys):
    do_task(Sitting(study, store), people["vera"])
    manage.close(study.path)
    assert main(["readers", str(study.path)]) == 0
    assert "place 1: vera, 1 of 27 signed" in capsys.readouterr().out
    manage.unblind(study.path)
    assert main(["readers", str(study.path), "--release=1", "--reason=too slow"]) == 2
    assert "unblinded" in capsys.readouterr().err
