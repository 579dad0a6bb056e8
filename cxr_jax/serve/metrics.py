"""What /metrics shows: counts of requests and of the engine's work, in Prometheus' text form.

No label comes from a client: paths are those of the routes, statuses are classes.
"""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

# From a health check to a long trace of a large model, seconds.
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)


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

    def text(self) -> bytes:
        """Write all of them in Prometheus' text form."""
        return generate_latest(self.registry)
