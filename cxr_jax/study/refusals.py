"""What a sitting refuses: the status of HTTP that says so, one line, and facts for programs."""

from collections.abc import Mapping
from typing import Any


class SittingRefusedError(Exception):
    """A request of a reader that is not served; the routes turn it into their form of errors.

    Attributes:
        status: 400, 403, 404, 409 or 423.
        message: one line, with nothing that was sent.
        facts: beside the message, such as the date from which a session may begin.
    """

    def __init__(self, status: int, message: str, facts: Mapping[str, Any] | None = None) -> None:
        """Name what is wrong."""
        super().__init__(message)
        self.status, self.message, self.facts = status, message, dict(facts or {})
