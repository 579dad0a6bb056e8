"""Active time from the first paint of a film to the signature, out of what the browser's tab has told.

Durations come from the tab's own clock (`performance.now()`), which no change of the wall clock moves; order comes from
the server. A gap without heartbeats is a laptop that was closed: it counts as hidden. Two tabs never count together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEARTBEAT_S = 10
# Longer than two heartbeats and a half: one that was lost is no absence.
GAP_S = 25
SLACK_S = 2.0  # between the clocks of client and server

KINDS = (
    "task_shown",  # first paint of the pixels: the clock starts
    "task_resumed",  # the same after a reload
    "ai_shown",  # first paint of what the AI says
    "first_input",  # of mouse or keys
    "first_edit",  # of the report
    "pause",  # by key; film and text are blanked
    "resume",
    "hidden",  # another tab or program in front
    "visible",
    "idle",  # seconds without input, told when it ends
    "heartbeat",  # every ten seconds
    "window",  # behaviour: the viewer's window was changed
    "zoom",
    "panel",  # a panel was opened or left
    "sign",  # the clock stops
)


@dataclass(frozen=True)
class Timing:
    """Seconds of one task.

    Attributes:
        active: what the analysis takes.
        idle: within the active seconds, without any input; kept, and trimmed in a sensitivity analysis.
        paused: pauses, hidden tabs and gaps.
        is_shown: whether the film was ever painted.
    """

    active: float
    idle: float
    paused: float
    is_shown: bool


def measure(
    pages: Mapping[str, Sequence[Mapping[str, Any]]], held: Mapping[str, float] | None = None
) -> Timing:
    """Add up the active seconds of a task over the tabs that had it, one after the other.

    Args:
        held: seconds for which each tab had the task, as the server knows; a tab that is not named had it to the end.
            What a tab tells of later is another tab's time, and would count twice.
    """
    seconds_of = held or {}
    parts = [
        _measure_page(events, seconds_of.get(page, math.inf)) for page, events in pages.items()
    ]
    return Timing(
        active=sum(page_part.active for page_part in parts),
        idle=sum(page_part.idle for page_part in parts),
        paused=sum(page_part.paused for page_part in parts),
        is_shown=any(page_part.is_shown for page_part in parts),
    )


def _measure_page(events: Sequence[Mapping[str, Any]], held: float) -> Timing:
    """One tab: walk from event to event, counting a stretch by the state that it was in."""
    # Batches may arrive out of order after a lost connection; the tab's clock knows.
    ordered = sorted(events, key=lambda each: float(each["t"]))
    # The last one: a signature that the server refused stops no clock.
    last_sign = max((float(each["t"]) for each in ordered if each["kind"] == "sign"), default=None)
    counted: list[tuple[float, float]] = []  # from, to: active
    without_input: list[tuple[float, float]] = []
    paused, end = 0.0, math.inf
    previous: float | None = None
    is_paused = is_hidden = False
    for event in ordered:
        moment, event_kind = float(event["t"]), event["kind"]
        if previous is None:
            # Nothing counts before the first paint.
            if event_kind in ("task_shown", "task_resumed"):
                previous, end = moment, moment + held
            continue
        moment = min(moment, end)
        if is_paused or is_hidden or moment - previous > GAP_S:
            paused += moment - previous
        else:
            counted.append((previous, moment))
        previous = moment
        if event_kind == "idle":
            without_input.append((moment - float(event.get("seconds", 0.0)), moment))
        is_paused = {"pause": True, "resume": False}.get(event_kind, is_paused)
        is_hidden = {"hidden": True, "visible": False}.get(event_kind, is_hidden)
        if moment == end or (event_kind == "sign" and moment == last_sign):
            break
    active = sum(last - first for first, last in counted)
    return Timing(active, _overlap(counted, without_input), paused, previous is not None)


def _overlap(
    counted: Sequence[tuple[float, float]], without_input: Sequence[tuple[float, float]]
) -> float:
    """Seconds of the counted stretches that lie in one without input: nobody is idle in a pause, or twice at once."""
    total = 0.0
    for first, last in counted:
        # Stretches without input may lie in one another: each moment counts once.
        reached = first
        for idle_first, idle_last in sorted(without_input):
            begin, stop = max(idle_first, reached), min(idle_last, last)
            if stop > begin:
                total += stop - begin
                reached = stop
    return total


def agrees_with_server(timing: Timing, server_seconds: float, speed: float = 1.0) -> bool:
    """Tell whether a client's seconds fit into those that passed on the server.

    Args:
        speed: of a simulated study's clock.
    """
    return timing.active + timing.paused <= server_seconds * speed + SLACK_S
