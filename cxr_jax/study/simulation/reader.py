"""What a simulated reader does with what the server puts before him: look, answer, sign, come back after a kill."""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cxr_jax.errors import RunFailedError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.store import sha256_of
from cxr_jax.study.allocate import Place
from cxr_jax.study.behaviour import Conduct, Effects, draw_conduct
from cxr_jax.study.folder import SealedCase, StudyFolder
from cxr_jax.study.shown import ABSENT, PRESENT, UNSURE
from cxr_jax.study.simulation.client import Address, Client, Refused

Events = list[dict[str, Any]]
_MISREAD = 0.04  # of the labels that a reader states, without AI and without a plant
_STREAM = 9  # of the protocol's seed
_PAUSE_S = 120.0
_HEARTBEAT_S = 10.0


@dataclass
class World:
    """What simulated readers know that real ones do not: the truth, and what they themselves are like."""

    folder: StudyFolder
    effects: Effects
    sealed: list[SealedCase]
    conduct: Conduct
    suspicion: dict[str, np.ndarray]
    places: dict[tuple[int, int, int], Place] = field(default_factory=dict)


def make_world(folder: StudyFolder, effects: Effects) -> World:
    """Draw what every reader would do with every case in every arm."""
    protocol = folder.protocol
    # Programs may know the truth: they have to be wrong as often as they are told.
    sealed = folder.read_sealed()
    seed = [protocol.seed, _STREAM]
    shape = (protocol.arms, protocol.readers)
    conduct = draw_conduct(effects, *shape, [sealed_case.abnormal for sealed_case in sealed], seed)
    # A latent number of its own for each label: whoever has an effusion need not have cardiomegaly.
    suspicion = {}
    for number, label_name in enumerate(protocol.suspicion_labels):
        present = [sealed_case.truth.get(label_name) == PRESENT for sealed_case in sealed]
        drawn = draw_conduct(effects, *shape, present, [*seed, 1 + number]).suspicion
        # Halfway between the two kinds of case is 50 of 100.
        middle = effects.separation.get("", 1.5) / 2
        suspicion[label_name] = np.round(100 / (1 + np.exp(-1.7 * (drawn - middle))), 1)
    places = {(p.reader_no, p.session_no, p.position): p for p in folder.places}
    return World(folder, effects, sealed, conduct, suspicion, places)


@dataclass
class Tab:
    """A task as one tab of the reader's browser has it."""

    task: str
    page: str
    shown: Mapping[str, Any]
    shown_sha256: str
    version: int  # of the answer that the server has
    answer_sha256: str | None
    cuts: int  # of the connection, when the tab was opened

    @property
    def path(self) -> str:
        """Where the task is on the server."""
        return f"/study/tasks/{self.task}"

    @property
    def binding(self) -> dict[str, Any]:
        """What every answer carries."""
        return {"page": self.page, "shown_sha256": self.shown_sha256}


class Reader:
    """One simulated reader at his browser.

    Attributes:
        acknowledged: task, version and hash of each answer that the server said it has.
        seconds: active seconds of each task that was signed, as this reader has spent them.
    """

    def __init__(
        self,
        world: World,
        server: Address,
        reader_no: int,
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        """Sit down; `answered` is called after each answer of 2xx."""
        self.world, self.reader_no = world, reader_no
        # Not numpy's: one stream of yes and no, apart from what was drawn for the whole study.
        self.chance = random.Random(f"{world.folder.protocol.seed} {reader_no}")
        self.client = Client(server, self.chance, answered)
        self.acknowledged: list[tuple[str, int, str]] = []
        self.signed: set[str] = set()
        self.seconds: dict[str, float] = {}

    def work(self) -> None:
        """Do all that the server has for this reader, who has logged in."""
        while True:
            following = self.client.get("/study/next")
            if following["kind"] == "done":
                break
            if following["kind"] == "task":
                self._read(following)
            elif following["kind"] == "ratings":
                self._rate(following["task"], following["items"])
            else:
                answers = {"tlx": [self.chance.randrange(101) for _ in following["tlx"]]}
                answers["sus"] = [self.chance.randint(1, 5) for _ in following["sus"]]
                content = {"session": following["session"], "answers": answers}
                self.client.post("/study/questionnaire", content)
        self.client.close()

    # ---- Tabs ----

    def _open(self, task: str) -> Tab:
        """Open a task in a tab of its own."""
        page, cuts = self._name(), self.client.cuts
        opened = self.client.post(f"/study/tasks/{task}/open", {"page": page})
        answer = opened["answer"]
        return Tab(
            task=task,
            page=page,
            shown=opened["shown"],
            shown_sha256=opened["shown_sha256"],
            version=opened["version"],
            answer_sha256=None if answer is None else sha256_of(answer),
            cuts=cuts,
        )

    def _load_again(self, tab: Tab) -> Tab:
        """Load the page again, as people do when the server was away: it must be where it was.

        Raises:
            RunFailedError: if another task comes, or another answer than the one that was acknowledged.
        """
        self.client.counts["pages loaded again"] += 1
        following = self.client.get("/study/next")
        if following["kind"] != "task" or following["task"] != tab.task:
            raise RunFailedError("simulate: a reader came back to another task")
        again = self._open(tab.task)
        if (again.version, again.answer_sha256) != (tab.version, tab.answer_sha256):
            raise RunFailedError("simulate: a reader came back to another answer")
        return again

    def _after_cut(self, tab: Tab) -> Tab:
        """The tab to go on with: another one if the connection has broken since this one was opened."""
        return tab if tab.cuts == self.client.cuts else self._load_again(tab)

    def _second_tab(self, tab: Tab) -> Tab:
        """Open the task in another tab; what the first one saves after that must be refused."""
        self.client.counts["second tabs"] += 1
        other = self._open(tab.task)
        request = {"idem_key": self._name(), "version": tab.version, **tab.binding}
        try:
            self.client.post(f"{tab.path}/answer", request | {"answer": {}})
        except Refused as refusal:
            if refusal.status == 409:
                return other
        raise RunFailedError("simulate: a tab that is out could still save")

    # ---- One film ----

    def _read(self, following: Mapping[str, Any]) -> None:
        """Open a task, look, answer, sign."""
        effects = self.world.effects
        place = self.world.places[
            self.reader_no, following["session"] - 1, following["position"] - 1
        ]
        tab = self._open(following["task"])
        if self.chance.random() < effects.lost_connection:
            tab = self._second_tab(tab)
        # Nobody sees a film before it is opened: a slow server's opening is none of the reader's time.
        began = time.monotonic()
        self.client.get(f"{tab.path}/pixels")
        odds = {"loss": effects.lost_connection, "twice": effects.double_post}
        seconds, halves = self._times(place)
        tab = self._tell_times(tab, halves, began, odds)
        if not place.practice and self.chance.random() < effects.skip:
            skip = {"reason": "cannot be judged", "idem_key": self._name(), **tab.binding}
            self.client.post(f"{tab.path}/skip", skip, **odds)
            return
        tab = self._save(tab, self._answer(place, tab.shown), odds)
        arm_index, case_no = self._place_in_conduct(place)
        confidence = int(self.world.conduct.confidence[arm_index, self.reader_no, case_no])
        signature = {"idem_key": self._name(), "version": tab.version, **tab.binding}
        signed = self.client.post(
            f"{tab.path}/sign", signature | {"confidence": confidence}, **odds
        )
        self.signed.add(tab.task)
        self.seconds[tab.task] = seconds
        if signed["items"]:
            self._rate(tab.task, signed["items"])

    def _tell_times(
        self, tab: Tab, halves: tuple[Events, Events], began: float, odds: Mapping[str, float]
    ) -> Tab:
        """Spend the time and tell of it in two batches; the second by another tab, if the server was away."""
        first, second = halves
        self._spend(first[-1]["t"], began)
        batch = {"page": tab.page, "idem_key": self._name(), "events": first}
        self.client.post(f"{tab.path}/events", batch, **odds)
        self._spend(second[-1]["t"], began)
        after_cut = self._after_cut(tab)
        if after_cut is not tab:
            # The clock of a page begins with the page.
            start = first[-1]["t"]
            second = [
                {"kind": "task_resumed", "t": 0.0},
                *(event | {"t": event["t"] - start} for event in second),
            ]
            # In which it is spent: a tab has no more than the server's time between its opening and the next one's.
            self._spend(second[-1]["t"], time.monotonic())
        batch = {"page": after_cut.page, "idem_key": self._name(), "events": second}
        self.client.post(f"{tab.path}/events", batch, **odds)
        return after_cut

    def _spend(self, seconds: float, began: float) -> None:
        """Wait until the server's clock has come as far as the reader's."""
        speed = self.world.folder.protocol.clock_speed
        time.sleep(max(0.0, seconds / speed - (time.monotonic() - began)))

    def _save(self, tab: Tab, answer: dict[str, Any], odds: Mapping[str, float]) -> Tab:
        """Save half an answer and then the whole, as autosaving does."""
        # First without the sliders, as a reader fills in the form.
        halves = ({**answer, "suspicion": {}, "flags": [], "rejected": []}, answer)
        for content in halves:
            tab = self._after_cut(tab)
            request = {"idem_key": self._name(), "version": tab.version, **tab.binding}
            saved = self.client.post(f"{tab.path}/answer", request | {"answer": content}, **odds)
            tab.version, tab.answer_sha256 = saved["version"], sha256_of(content)
            self.acknowledged.append((tab.task, tab.version, tab.answer_sha256))
        return tab

    def _rate(self, task: str, items: list[dict[str, Any]]) -> None:
        ratings = {item["name"]: self.chance.randint(2, len(item["points"])) for item in items}
        self.client.post(
            f"/study/tasks/{task}/ratings", {"ratings": ratings, "idem_key": self._name()}
        )

    def _name(self) -> str:
        return f"{self.chance.getrandbits(96):024x}"

    def _place_in_conduct(self, place: Place) -> tuple[int, int]:
        return self.world.folder.protocol.arms.index(place.arm), place.case_no

    # ---- Times and answers ----

    def _times(self, place: Place) -> tuple[float, tuple[Events, Events]]:
        """Active seconds, and what the tab tells of them, in two halves: paint, heartbeats, a pause, the signature."""
        arm_index, case_no = self._place_in_conduct(place)
        seconds = math.exp(self.world.conduct.log_seconds[arm_index, self.reader_no, case_no])
        seconds *= math.exp(self.world.effects.session * place.session_no)
        pause = _PAUSE_S if self.chance.random() < self.world.effects.pause else 0.0
        middle = seconds / 2
        beats = [float(beat) for beat in np.arange(_HEARTBEAT_S, seconds, _HEARTBEAT_S)]

        def told(kind: str, moment: float) -> dict[str, Any]:
            return {"kind": kind, "t": moment}

        first = [told("task_shown", 0.0)]
        first += [told("heartbeat", beat) for beat in beats if beat < middle]
        first.append(told("heartbeat", middle))
        # Heartbeats from the second half come after the pause.
        second = [told("pause", middle), told("resume", middle + pause)] if pause else []
        second += [told("heartbeat", beat + pause) for beat in beats if beat >= middle]
        second.append(told("sign", seconds + pause))
        return seconds, (first, second)

    def _answer(self, place: Place, shown: Mapping[str, Any]) -> dict[str, Any]:
        """The signed report: mostly the truth, the planted error where it was not caught."""
        arm_index, case_no = self._place_in_conduct(place)
        sealed_case = self.world.sealed[case_no]
        labels = {
            label_name: self._state(
                sealed_case.truth.get(label_name, ABSENT), sealed_case.truth_sides.get(label_name)
            )
            for label_name in CHEXPERT_14
        }
        caught = bool(self.world.conduct.caught[arm_index, self.reader_no, case_no])
        made_flags: list[dict[str, Any]] = []
        # In each arm's own medium: a sentence where there are any, a chip elsewhere.
        rejected: list[str] = []
        if sealed_case.plant is not None:
            planted = sealed_case.plant
            state_word, side = planted.state_true, planted.side_true
            if not caught:
                state_word, side = planted.state_shown, planted.side_shown
            labels[planted.label] = {"state": state_word, "side": side}
            if caught and "sentences" in shown:
                kinds = {"side": "side", "drop": "missing", "hedge": "overconfident"}
                number = planted.sentences[0] if planted.sentences else None
                made_flags.append({"sentence": number, "kind": kinds.get(planted.kind, "wrong")})
            elif caught and shown:
                rejected.append(planted.label)
        made_flags += self._false_flags(place, shown, sealed_case)
        suspicion = {
            label_name: float(scores[arm_index, self.reader_no, case_no])
            for label_name, scores in self.world.suspicion.items()
        }
        present = [label_name for label_name, value in labels.items() if value["state"] == PRESENT]
        fields = {"impression": ", ".join(present) or "No acute abnormality."}
        return {
            "fields": fields,
            "labels": labels,
            "suspicion": suspicion,
            "flags": made_flags,
            "rejected": rejected,
        }

    def _state(self, state_word: str, side: str | None) -> dict[str, Any]:
        """What a reader states of one label: the truth, but for a slip."""
        if self.chance.random() < _MISREAD:
            state_word = ABSENT if state_word in (PRESENT, UNSURE) else PRESENT
        return {"state": state_word, "side": side if state_word != ABSENT else None}

    def _false_flags(
        self, place: Place, shown: Mapping[str, Any], sealed_case: SealedCase
    ) -> list[dict[str, Any]]:
        arm_index, case_no = self._place_in_conduct(place)
        wanted = int(self.world.conduct.false_flags[arm_index, self.reader_no, case_no])
        planted = sealed_case.plant.sentences if sealed_case.plant else ()
        free = [
            sentence["n"] for sentence in shown.get("sentences", []) if sentence["n"] not in planted
        ]
        # Flags on true sentences: whoever flags everything detects everything.
        chosen = self.chance.sample(free, min(wanted, len(free)))
        return [{"sentence": number, "kind": "wrong"} for number in chosen]
