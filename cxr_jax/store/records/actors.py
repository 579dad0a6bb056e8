"""Say who does something, in the words of the chain."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Actor:
    """Who an event is put down to: a user's id or an API key's name, the role at that time, the login's reference."""

    id: str
    role: str
    login: str | None = None

    def as_arguments(self) -> dict[str, Any]:
        """Return the arguments of `append` that say who."""
        return {"actor": self.id, "role": self.role, "login": self.login}


SERVER = Actor("server", "server")
"""What nobody asked for: a start, a reading that ends."""

OPERATOR = Actor("operator", "operator")
"""Whoever runs `python -m cxr_jax.store` on the machine; such a person may read the files anyhow."""
