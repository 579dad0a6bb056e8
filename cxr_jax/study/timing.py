"""Active time from the first paint of a film to the signature, out of what the browser's tab has told.

Durations come from the tab's own clock (`performance.now()`), which no change of the wall clock moves; order comes from
the server. A gap without heartbeats is a laptop that was closed: it counts as hidden. Two tabs never count together.
"""

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


def measure(pages: Mapping[str, Sequence[Mapping[str, Any]]]) -> Timing:
    """Add up the active seconds of a task over the tabs that had it, one after the other."""
    parts = [_measure_page(events) for events in pages.values()]
    return Timing(
        active=sum(page_part.active for page_part in parts),
        idle=sum(page_part.idle for page_part in parts),
        paused=sum(page_part.paused for page_part in parts),
        is_shown=any(page_part.is_shown for page_part in parts),
    )


def _measure_page(events: Sequence[Mapping[str, Any]]) -> Timing:
    """One tab: walk from event to event, counting a stretch by the state that it was in."""
    active = idle = paused = 0.0
    previous: float | None = None
    is_paused = is_hidden = False
    # Batches may arrive out of order after a lost connection; the tab's clock knows.
    for event in sorted(events, key=lambda each: float(each["t"])):
        moment, event_kind = float(event["t"]), event["kind"]
        if previous is None:
            # Nothing counts before the first paint.
            if event_kind in ("task_shown", "task_resumed"):
                previous = moment
            continue
        stretch = moment - previous
        if is_paused or is_hidden or stretch > GAP_S:
            paused += stretch
        else:
            active += stretch
        previous = moment
        if event_kind == "idle":
            idle += min(float(event.get("seconds", 0.0)), active)
        is_paused = {"pause": True, "resume": False}.get(event_kind, is_paused)
        is_hidden = {"hidden": True, "visible": False}.get(event_kind, is_hidden)
        if event_kind == "sign":
            break
    return Timing(active, idle, paused, previous is not None)


def agrees_with_server(timing: Timing, server_seconds: float, speed: float = 1.0) -> bool:
    """Tell whether a client's seconds fit into those that passed on the server.

    Args:
        speed: of a simulated study's clock.
    """
    return timing.active + timing.paused <= server_seconds * speed + SLACK_S
