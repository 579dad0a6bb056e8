"""Blinding over all bytes that a server sent: what it says without AI does not depend on what the AI says."""

import asyncio
import contextlib
import json
import re
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.serve.server import RoomServer, bind, uvicorn_config
from cxr_jax.serve.state import ServerSettings
from cxr_jax.serve.study_server import create_study_app, study_state
from cxr_jax.store import open_store
from cxr_jax.study.behaviour import Effects
from cxr_jax.study.shown import ABSENT, PRESENT
from cxr_jax.study.simulation.reader import Reader, make_world
from cxr_jax.study.sitting import Sitting

from .conftest import hand_made_case, make_study

OTHER_SENTENCE = "Heart: an okapi of a silhouette, certainly enlarged."
# What a browser keeps its unsent texts with: a key of the log-in, which has nothing to do with the study's seal.
SEALING = rb'"sealing":\{[^}]*\}'
# Times and names of requests differ from run to run, and nothing else may.
CHANGING = (rb"(?im)^(date|set-cookie|content-length): .*$", rb'"csrf":"[^"]*"', SEALING)


def other_case(number):
    """The same films, of which the AI says something else in every respect."""
    case = hand_made_case(number)
    states = {
        label: ABSENT if state == PRESENT else PRESENT for label, state in case.shown.states.items()
    }
    sides = dict.fromkeys(CHEXPERT_14, "left")
    shown = replace(case.shown, sentences=(OTHER_SENTENCE,), states=states, sides=sides)
    # The plant stays: the order of the films goes by it.
    return replace(case, natural=shown, shown=shown)


@contextlib.contextmanager
def serving(study, store):
    """The study's server in a thread; its port."""
    settings = ServerSettings(store=str(study.path), study=study.protocol.name)
    listener = bind("127.0.0.1", 0)
    app = create_study_app(study_state(settings, store))
    server = RoomServer(uvicorn_config(app), lambda: None)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield SimpleNamespace(port=listener.getsockname()[1], is_lost=False)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def bytes_of_manual_tasks(path, make_case):
    """Let a simulated reader do all there is to do; what came back for each film without AI, and for the others."""
    values = {"simulated": True, "washout_days": 0, "clock_speed": 100_000}
    study = make_study(path, make_case, **values)
    # Two posts of one thing and broken connections come in other tests, where chance may differ.
    effects = Effects(lost_connection=0, double_post=0, pause=0)
    with contextlib.closing(open_store(study.path, exclusive=False)) as store:
        store.users.add("anna", "reader", "correct horse battery")
        with serving(study, store) as server:
            reader = Reader(make_world(study, effects), server, 0)
            reader.client.keeps_bytes = True
            reader.client.log_in("anna", "correct horse battery")
            reader.work()
        sitting = Sitting(study, store)
        places = [place for place in study.places if place.reader_no == 0]
        manual = {sitting.task_id(place) for place in places if place.arm == "manual"}
        others = {sitting.task_id(place) for place in places if place.arm != "manual"}
    wanted, rest = [], []
    for asked, answer in reader.client.received:
        names = set(re.findall(r"tasks/([^/]+)/", asked))
        if asked == "/study/next":
            names = {json.loads(answer[answer.index(b"{") :].strip()).get("task")}
        # What is of no task at all, the log-in and the questions, belongs to every arm.
        target = rest if names & others else wanted
        target.append((asked, answer))
    assert len(manual) == 9 and reader.signed == manual | others
    return wanted, rest


def normal(recorded):
    """What was sent, without what changes from run to run."""
    changed = []
    for asked, answer in recorded:
        # Names of tasks are HMACs by a key of the store's own; they have one length.
        answer = re.sub(rb'"task":"[^"]*"', b'"task":""', answer)
        for pattern in CHANGING:
            answer = re.sub(pattern, b"", answer)
        changed.append((re.sub(r"tasks/[^/]+", "tasks", asked), answer))
    return changed


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    return [
        bytes_of_manual_tasks(folder / name / "t", make_case)
        for name, make_case in (("one", hand_made_case), ("two", other_case))
    ]


def test_no_byte_without_ai_depends_on_the_ai(recorded):
    (manual, shown), (other_manual, other_shown) = recorded
    assert len(manual) > 40
    assert normal(manual) == normal(other_manual)
    # The same readers with AI were told other things: the comparison could have found a difference.
    assert normal(shown) != normal(other_shown)


def test_no_sentence_state_arm_or_plant_is_in_the_bytes(recorded):
    for (manual, shown), secret in zip(recorded, (b"zebrafish", b"okapi"), strict=True):
        sent = re.sub(SEALING, b"", b"\n".join(answer for _, answer in manual))
        assert secret in b"\n".join(answer for _, answer in shown)
        # "labels" and the 14 names are those of the form; states, sides and arms are in nothing.
        for word in (secret, b"manual", b"full", b"plant", b"seal", b"truth", b"sentence"):
            assert word not in sent.lower(), word
        opened = [answer for asked, answer in manual if asked.endswith("/open")]
        assert len(opened) == 9
        for answer in opened:
            form = json.loads(answer[answer.index(b"{") :])
            assert form["shown"] == {} and form["answer"] is None
            assert (len(answer[answer.index(b"{") :]) % 1024) == 0
