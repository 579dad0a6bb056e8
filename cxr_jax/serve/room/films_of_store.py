"""Films of the shelf in the store: a film that a reading or a report stands on has its row there."""

from typing import Any

from cxr_jax.serve.room.films import find_film, shelf_of
from cxr_jax.serve.state import ServerState
from cxr_jax.store.records.users import User


def kept_film(state: ServerState, digest: str, current_user: User) -> dict[str, Any]:
    """Describe a film of the shelf, and see that the store has its row; 404 where there is none."""
    described = find_film(shelf_of(state), digest)
    # The shelf knows films that were uploaded before there was a store around it.
    if state.store.images.get(digest) is None:
        state.store.images.add(
            {
                "sha256": digest,
                "kind": described["kind"],
                "rows": described["rows"],
                "cols": described["columns"],
                "bits": described["bits"],
                "voi": described["windows"],
                "meta": {name: described[name] for name in ("view", "renderer", "inverted")},
                "gate": described["gate"],
            },
            actor=current_user.actor,
        )
    return described
