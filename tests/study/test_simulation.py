"""Simulated readers: their clocks fit a slow server's, and kills lose nothing that was acknowledged."""

import contextlib
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import postgres_server
import pytest
import sqlalchemy as sa
from places import ROOT

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.store.records.actors import Actor
from cxr_jax.study.analysis.rows import make_rows, times_of
from cxr_jax.study.behaviour import Effects
from cxr_jax.study.commands import manage
from cxr_jax.study.folder import SEALED, place_of
from cxr_jax.study.ledger import Ledger
from cxr_jax.study.simulation.client import Client
from cxr_jax.study.simulation.reader import Reader, make_world
from cxr_jax.study.simulation.run import simulate
from cxr_jax.study.simulation.server import Kills, Server, free_port, moments
from cxr_jax.study.sitting import Sitting
from cxr_jax.study.timing import agrees_with_server, measure

from .conftest import make_study

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
SIMULATED = {"simulated": True, "washout_days": 0}


class SlowClient:
    """A server that takes its time to open a film; when it was opened and signed, and what the tab told."""

    def __init__(self):
        self.opened_at = self.signed_at = 0.0
        self.cuts = 0
        self.pages = {}

    def get(self, path):
        return b""

    def post(self, path, content, **odds):
        step = path.rpartition("/")[2]
        if step == "open":
            time.sleep(0.12)
            self.opened_at = time.monotonic()
            return {"shown_sha256": "0" * 64, "shown": {}, "version": 0, "answer": None}
        if step == "events":
            self.pages.setdefault(content["page"], []).extend(content["events"])
        self.signed_at = time.monotonic()
        return {"version": 1, "items": []}


def test_reading_begins_when_a_slow_server_has_opened_the_film(tmp_path):
    study = make_study(tmp_path / "t", clock_speed=1000, **SIMULATED)
    reader = Reader(make_world(study, Effects(lost_connection=0)), None, 0)
    reader.client = SlowClient()
    reader._read({"task": "t", "session": 1, "position": 2})
    passed = reader.client.signed_at - reader.client.opened_at
    assert agrees_with_server(measure(reader.client.pages), passed, speed=1000)


# ---- Kills -----------------------------------------------------------------------------------------


def test_port_is_none_that_the_system_gives_to_connections():
    first, last = map(int, EPHEMERAL.read_text().split()) if EPHEMERAL.exists() else (32768, 65535)
    assert not any(first <= free_port() <= last for _ in range(20))


class Restarts:
    """A server that is killed in no time."""

    def __init__(self, answers):
        self.answers, self.killed_at, self.is_lost = answers, [], False

    def restart(self):
        self.killed_at.append(len(self.answers))


def test_kills_come_after_numbers_of_answers_and_never_before_the_log_ins():
    answers = []
    server = Restarts(answers)
    kills = Kills(server, 4, 40, "seed")
    # Whatever happens before readers are at work counts for nothing.
    for _ in range(1000):
        kills.answered()
    with kills.during():
        time.sleep(0.01)
        assert server.killed_at == []
        deadline = time.monotonic() + 30
        while kills.done < 4 and time.monotonic() < deadline:
            answers.append(1)
            kills.answered()
            time.sleep(0.01)
    assert kills.done == 4 and server.killed_at == sorted(server.killed_at)
    assert all(at >= moment for at, moment in zip(server.killed_at, drawn(4, 40), strict=True))


def drawn(count, answers):
    return moments(random.Random("seed"), count, answers)


def test_moments_are_drawn_from_the_seed_each_its_own():
    assert drawn(50, 3000) == drawn(50, 3000) and len(set(drawn(50, 3000))) == 50
    assert len(drawn(9, 3)) == 9 and set(drawn(9, 3)) <= {1, 2, 3}


def test_readers_stop_waiting_for_a_server_that_cannot_start(tmp_path):
    study = make_study(tmp_path / "t", **SIMULATED)
    server = Server(str(study.path / "nothing_here"))
    with pytest.raises(RunFailedError, match=r"did not start: error: .*protocol"):
        server.start()
    server.is_lost = True
    with pytest.raises(RunFailedError, match="does not come back"):
        Client(server, random.Random(1)).get("/study/next")


class Away:
    """A client whose connection breaks when the second batch of times is to be sent, and once more later."""

    def __init__(self, sitting, actor):
        self.sitting, self.actor, self.cuts = sitting, actor, 0
        self.counts = Counter()

    def get(self, path):
        if path == "/study/next":
            return self.sitting.next(self.actor)
        return b""

    def post(self, path, content, **odds):
        task, step = path.split("/")[-2:]
        calls = {"answer": self.sitting.save, "sign": self.sitting.sign, "rate": self.sitting.rate}
        if step == "open":
            return self.sitting.open(self.actor, task, content["page"])
        if step == "events":
            self.cuts += 1
            page, key = content["page"], content["idem_key"]
            return self.sitting.add_events(self.actor, task, page, key, content["events"])
        if step == "ratings":
            return self.sitting.rate(self.actor, task, content)
        return calls[step](self.actor, task, content)


def test_page_that_is_loaded_again_goes_on_with_the_time(tmp_path):
    study = make_study(tmp_path / "t", clock_speed=1000, **SIMULATED)
    with contextlib.closing(study.open_store()) as store:
        sitting = Sitting(study, store)
        reader = Reader(
            make_world(study, Effects(lost_connection=0, double_post=0, pause=1)), None, 0
        )
        reader.client = Away(sitting, Actor("anna", "reader"))
        reader._read(sitting.next(Actor("anna", "reader")))
        [(task, seconds)] = reader.seconds.items()
        record = sitting.ledger.task(task)
    assert reader.client.counts["pages loaded again"] == 2 and len(record.pages) == 3
    # As the analysis counts, for which a tab has only the time in which it had the task.
    times = times_of(study, record)
    assert times["active_s"] == pytest.approx(seconds, abs=0.01)
    assert times["paused_s"] == pytest.approx(120, abs=0.01)


def test_study_is_served_without_jax():
    """Whoever starts it again after a power cut waits for no compiler that frozen readings have no use for."""
    code = "import sys, cxr_jax.serve.study_server; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- Whole studies ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_kills_lose_nothing_and_readers_go_on_where_they_were(database, tmp_path, request):
    place = str(tmp_path / "t")
    if database == "postgres":
        place = place_of(place, request.getfixturevalue("postgres_url"))
    study = make_study(place, clock_speed=1000, **SIMULATED)
    # It fails by itself if an acknowledged answer is not there or there twice, or a time is another.
    lines = simulate(place, threads=2, kills=4)
    assert "4 kills" in lines[0] and "retries" in lines[0] and "loaded again" in lines[0]
    assert manage.verify(place) == []
    with contextlib.closing(study.open_store()) as store:
        ledger = Ledger(study.protocol.name)
        ledger.refresh(store)
        rows = make_rows(study, store, ledger, study.read_sealed())
        assert store.engine.dialect.name.startswith(database[:6])
    assert all(row["state"] == "signed" and row["clock_ok"] for row in rows)
    manage.close(place)
    check_that_tampering_is_named(study, place)


def check_that_tampering_is_named(study, place):
    """The sealed file, the tail of the chain, one byte of an event."""
    sealed_path = study.path / SEALED
    sealed_text = sealed_path.read_text()
    sealed_path.write_text(sealed_text.replace("present", "absent", 1))
    assert manage.verify(place) == [f"{SEALED}: is not the one that was sealed"]
    with pytest.raises(UserError, match=SEALED):
        manage.unblind(place)
    sealed_path.write_text(sealed_text)
    manage.unblind(place)
    head = manage.head_of(place)
    assert manage.verify(place, [head]) == []
    # Only what the database says of itself has changed; its files are as they were.
    last = int(head.partition(":")[0])
    with contextlib.closing(study.open_store()) as store:
        edit_events(store, f"DELETE FROM event WHERE seq = {last}")
    assert manage.verify(place, [head])[0].startswith(f"event {last}: is gone")
    with contextlib.closing(study.open_store()) as store:
        edit_events(store, "UPDATE event SET body = body || ' ' WHERE seq = 40")
    assert "40" in manage.verify(place)[0]


def edit_events(store, statement):
    """Do what an editor of the database would: with its triggers out of the way."""
    with store.engine.begin() as connection:
        if store.engine.dialect.name == "sqlite":
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS event_no_update")
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS event_no_delete")
        else:
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS event_append_only ON event")
        connection.execute(sa.text(statement))


@pytest.fixture
def postgres_url():
    if reason := postgres_server.why_not():
        pytest.skip(reason)
    with postgres_server.running() as url:
        yield url
