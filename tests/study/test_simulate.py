"""Simulated readers: their clocks fit a slow server's, and kills lose nothing that was acknowledged."""

import contextlib
import time

import pytest

from cxr_jax.store import open_store
from cxr_jax.study.analysis.rows import make_rows
from cxr_jax.study.behaviour import Effects
from cxr_jax.study.commands import manage
from cxr_jax.study.ledger import Ledger
from cxr_jax.study.simulate import Reader, make_world, simulate
from cxr_jax.study.timing import agrees_with_server, measure

from .conftest import make_study

SIMULATED = {"simulated": True, "washout_days": 0}


class SlowClient:
    """A server that takes its time to open a film; when it was opened and signed, and what the tab told."""

    def __init__(self):
        self.opened_at = self.signed_at = 0.0
        self.pages = {}

    def get(self, path):
        return b""

    def post(self, path, content, **odds):
        step = path.rpartition("/")[2]
        if step == "open":
            time.sleep(0.12)
            self.opened_at = time.monotonic()
            return {"shown_sha256": "0" * 64, "shown": {}, "version": 0}
        if step == "events":
            self.pages[content["page"]] = content["events"]
        self.signed_at = time.monotonic()
        return {"version": 1, "items": []}


def test_reading_begins_when_a_slow_server_has_opened_the_film(tmp_path):
    study = make_study(tmp_path / "t", clock_speed=1000, **SIMULATED)
    reader = Reader(make_world(study, Effects(lost_connection=0)), None, 0)
    reader.client = SlowClient()
    reader._read({"task": "t", "session": 1, "position": 2})
    passed = reader.client.signed_at - reader.client.opened_at
    assert agrees_with_server(measure(reader.client.pages), passed, speed=1000)


@pytest.mark.slow
def test_kills_lose_nothing_and_readers_go_on_where_they_were(tmp_path):
    study = make_study(tmp_path / "t", clock_speed=1000, **SIMULATED)
    # It fails by itself if an acknowledged answer is not there, or is there twice.
    lines = simulate(study.path, threads=2, kills=6)
    assert "6 kills" in lines[0] and "retries" in lines[0]
    assert manage.verify(study.path) == []
    with contextlib.closing(open_store(study.path, exclusive=False)) as store:
        ledger = Ledger(study.protocol.name)
        ledger.refresh(store)
        rows = make_rows(study, store, ledger, study.read_sealed())
        signed = [event.task for event in store.events("task.signed")]
    assert len(signed) == len(set(signed)) == len(rows)
    assert all(row["state"] == "signed" and row["clock_ok"] for row in rows)
