"""A server of the reading room for tests: the real films, pixels and pages, a model and readings that are made up.

What it makes up follows the contract of `cxr_jax.serve.room.readings` and `reports`; a test may give it any trace,
hostile ones included.
"""

import asyncio
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.outputs import sections
from cxr_jax.serve.limits import BodyGuard, Limits
from cxr_jax.serve.refusals import RefusedError, add_error_handlers
from cxr_jax.serve.room import images, pages, pixels
from cxr_jax.serve.security import SecurityGuard
from cxr_jax.serve.state import Capabilities, ServerSettings


def make_state(tmp_folder, limits=None, **changes):
    settings = ServerSettings(store=str(tmp_folder), limits=limits or Limits())
    fields = dict(
        settings=settings,
        engine=None,
        model=None,
        model_name="stub",
        weights_sha256="0" * 64,
        capabilities=Capabilities(),
        metrics=None,
        store=None,
        auth=None,
        films=images.Films(tmp_folder / "images"),
        is_stopping=False,
    )
    return SimpleNamespace(**(fields | changes))


class StubRoom:
    """Readings and reports in memory; `trace` is what the model says of every film, one text a sentence.

    Attributes:
        trace: texts, or sentences as dicts of the contract.
        answer: labels.
        pause_after: so many sentences are sent, and then no more until the reading is stopped.
    """

    def __init__(self, trace=(), answer=(), contradictions=(), pause_after=None):
        self.trace = [self._sentence(n, item) for n, item in enumerate(trace, 1)]
        self.answer, self.contradictions = list(answer), list(contradictions)
        self.pause_after = pause_after
        self.readings, self.reports, self.calls = {}, {}, []
        self.lock = threading.Lock()
        self.is_down = False  # answers 503 to saves

    @staticmethod
    def _sentence(n, item):
        fields = item if isinstance(item, dict) else {"text": item}
        return {"n": n, "claims": [], "hedged": [], "sides": [], **fields}

    def document(self, reading):
        image, anyway = self.readings[reading]["image"], self.readings[reading]["read_anyway"]
        said = {claim["label"]: claim for line in self.trace for claim in line["claims"]}
        findings = [
            dict(
                label=label,
                state=said.get(label, {}).get("state", "not_mentioned"),
                side=said.get(label, {}).get("side"),
                named_in_answer=label in self.answer,
                probability=round(0.05 * index, 2),
                sentences=[
                    line["n"]
                    for line in self.trace
                    if any(claim["label"] == label for claim in line["claims"])
                ],
            )
            for index, label in enumerate(CHEXPERT_14)
        ]
        report = dict.fromkeys(sections.FIELDS, "")
        for line in self.trace:
            report["impression"] = f"{report['impression']} {line['text'][:2000]}".strip()
        gate = {"state": "refused" if anyway else "ok", "reasons": []}
        return dict(
            image={"sha256": image, "gate": gate},
            findings=findings,
            trace=self.trace,
            answer=self.answer,
            contradictions=self.contradictions,
            report=report,
            status="draft",
        )

    def router(self, state):
        routes = APIRouter()
        self._add_readings(routes, state)
        self._add_reports(routes)

        @routes.get("/session")
        def session():
            sealing = {"tag": "tag", "key": "0f" * 16}
            who = {"user": "local", "role": "reader", "csrf": "token"}
            return {**who, "idle_s": None, "sealing": sealing}

        return routes

    def _add_readings(self, routes, state):
        @routes.post("/room/readings", status_code=202)
        def begin(request: Request, body: dict):
            assert request.headers["x-csrf-token"] == "token"
            gate = state.films.info(body["image"])["gate"]
            if gate["state"] == "refused" and not body.get("read_anyway"):
                raise RefusedError(422, "refused by the gate")
            name = f"reading-{len(self.readings)}"
            self.readings[name] = {
                "image": body["image"],
                "read_anyway": body.get("read_anyway", False),
                "stopped": False,
                "gate": gate,
            }
            self.calls.append(("begin", body))
            return {"id": name}

        @routes.get("/room/readings/{name}/events")
        def events(name: str):
            return StreamingResponse(self._stream(name), media_type="text/event-stream")

        @routes.get("/room/readings/{name}")
        def document(name: str):
            return self.document(name)

        @routes.delete("/room/readings/{name}")
        def stop(name: str):
            self.readings[name]["stopped"] = True
            self.calls.append(("stop", name))
            return {}

        @routes.post("/room/readings/{name}/ask")
        def ask(name: str, body: dict):
            return {"text": f"You asked: {body['text']}"}

    async def _stream(self, name):
        reading, number = self.readings[name], 0

        def event(kind, body):
            nonlocal number
            number += 1
            return f"id: {number}\nevent: {kind}\ndata: {json.dumps(body)}\n\n"

        yield event("gate", reading["gate"])
        for count, sentence in enumerate(self.trace):
            while self.pause_after is not None and count >= self.pause_after:
                if reading["stopped"]:
                    return
                await asyncio.sleep(0.02)
            yield event("sentence", sentence)
        yield event("answer", {"labels": self.answer})
        yield event("contradictions", self.contradictions)
        numbers = {label: 0.05 * index for index, label in enumerate(CHEXPERT_14)}
        yield event("probabilities", numbers)
        yield event("done", {})

    def _check_shown(self, report, body):
        shown = body.pop("shown")
        assert shown["reading"] == report["reading"]
        assert shown["image"] == self.readings[shown["reading"]]["image"]

    def _add_reports(self, routes):
        @routes.post("/room/reports", status_code=201)
        def begin(body: dict):
            fields = dict.fromkeys(sections.FIELDS, "")
            if body.get("reading"):
                fields = dict(self.document(body["reading"])["report"])
            name = f"report-{len(self.reports)}"
            reading = body.get("reading")
            self.reports[name] = dict(
                id=name,
                version=1,
                state="draft",
                image=body["image"],
                reading=reading,
                fields=fields,
                draft=fields,
            )
            return self.reports[name]

        @routes.get("/room/reports/{name}.{suffix}")
        def export(name: str, suffix: str):
            return PlainTextResponse(json.dumps(self.reports[name]))

        @routes.get("/room/reports/{name}")
        def report(name: str):
            return self.reports[name]

        @routes.put("/room/reports/{name}")
        def save(name: str, request: Request, body: dict):
            kept = self.reports[name]
            self._check_shown(kept, body)
            if self.is_down:
                raise RefusedError(503, "down")
            if request.headers["if-match"] != str(kept["version"]):
                raise RefusedError(409, "stale")
            self.reports[name] = kept | {"version": kept["version"] + 1, "fields": body["fields"]}
            return self.reports[name]

        @routes.post("/room/reports/{name}/flags", status_code=201)
        def flag(name: str, body: dict):
            self._check_shown(self.reports[name], body)
            self.calls.append(("flag", body))
            return {}

        @routes.post("/room/reports/{name}/sign")
        def sign(name: str, body: dict):
            self._check_shown(self.reports[name], body)
            self.calls.append(("sign", body))
            at = "2026-11-30T12:00:00Z"
            signed = {"by": "local", "at": at, "meaning": body["meaning"]}
            self.reports[name] |= {"state": "signed", "signed": signed, "addenda": []}
            return self.reports[name]

        @routes.post("/room/reports/{name}/addendum")
        def addendum(name: str, body: dict):
            self.reports[name]["state"] = "addendum"
            entry = {"by": "local", "at": "2026-11-30T12:01:00Z", "text": body["text"]}
            self.reports[name]["addenda"].append(entry)
            return self.reports[name]


def app_of(state, *routers):
    """The room's films and pages, and whatever else a test brings, behind the server's own guards."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = state
    for module in (images, pixels, pages):
        app.include_router(module.router(state))
    for router in routers:
        app.include_router(router)
    add_error_handlers(app)
    app.add_middleware(BodyGuard, limits=state.settings.limits)
    app.add_middleware(SecurityGuard, settings=state.settings)
    return app


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def served(app):
    """Run an application on loopback; gives its address."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
