"""What /metrics shows: counts of requests and of the engine's work, in Prometheus' text form.

No label comes from a client: routes are named as the code declares them, statuses by their class.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOG = logging.getLogger("cxr_jax.serve.requests")
# From a health check to a long trace of a large model, seconds.
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)
_OTHER = "other"  # a path that no route has


class Metrics:
    """The counters of one server: a registry of its own, so that two servers in one process do not mix."""

    def __init__(self) -> None:
        """Begin at zero."""
        # The library's own registry is one for the process, and refuses a second counter of a name.
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cxr_jax_requests_total",
            "Requests by route and class of status.",
            ("route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "cxr_jax_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("route",),
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.lost = Counter(
            "cxr_jax_clients_lost_total",
            "Answers that ended before they were complete: the client left, or was cut.",
            registry=self.registry,
        )

    def watch_engine(self, counts: Callable[[], Mapping[str, Any]]) -> None:
        """Show the engine's own counts, too, as they are when somebody looks."""
        self.registry.register(_EngineCounts(counts))

    def text(self) -> bytes:
        """Write all of them in Prometheus' text form."""
        return generate_latest(self.registry)


class _EngineCounts(Collector):
    """Numbers of `Engine.counts`: a name that ends in _total is a counter, any other a gauge; a dict has a label."""

    def __init__(self, counts: Callable[[], Mapping[str, Any]]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        """Read the counts now."""
        # Read without a lock: the engine gives a copy.
        for name, value in self._counts().items():
            is_counter = name.endswith("_total")
            metric_family = CounterMetricFamily if is_counter else GaugeMetricFamily
            full_name = f"cxr_jax_engine_{name.removesuffix('_total')}"
            metric = metric_family(full_name, f"The engine's {name}.", labels=("kind",))
            # Without kinds the metric has no label, as scrapers expect.
            if isinstance(value, Mapping):
                for kind, number in value.items():
                    metric.add_metric((str(kind),), float(number))
            elif isinstance(value, (int, float)):
                metric = metric_family(full_name, f"The engine's {name}.", value=float(value))
            yield metric


class RequestMeter:
    """Counts and times every request, and logs a line of it: method, route, status, time. ASGI middleware.

    Nothing that a client chose is in the line: no path, no query, no address, no header.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Stand before an application."""
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, is_complete, begun = 0, False, time.monotonic()

        async def watched_send(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                is_complete = not message.get("more_body", False)
            await send(message)

        # Counted whatever happens inside: a request that fails is one, too.
        try:
            await self.app(scope, receive, watched_send)
        finally:
            # The router leaves in the scope which route it has found; of a refused request there is none.
            route = getattr(scope.get("route"), "path", _OTHER)
            seconds = time.monotonic() - begun
            self.metrics.requests.labels(route, f"{status // 100}xx").inc()
            self.metrics.seconds.labels(route).observe(seconds)
            if not is_complete:
                self.metrics.lost.inc()
            method = scope["method"] if scope["method"] in _METHODS else _OTHER
            _LOG.info("%s %s %d %.0f ms", method, route, status, 1000 * seconds)


# Of a request line the client may write any word in the place of a method.
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
