"""What one running server holds: its settings, the model, the engine, the store. Every router is made from it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_jax.serve.limits import Limits

if TYPE_CHECKING:
    from cxr_jax.serve.metrics import Metrics

# Names by which programs of this machine reach a server that listens on loopback.
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the flags of the server's command say.

    Attributes:
        model: name or folder of the model.
        host: the address that is listened on.
        port: 0: any free one.
        store: the folder of the store, or its URL; None: no store, nothing is kept.
        study: the reader study that is served, or None.
        dictate: what hears thoughts: "none", "whisper:FOLDER" or "scripted:FILE" (`capture/transcribe.py`).
        api_key_file: a file of keys for /v1, or None.
        no_auth: whether nobody is asked who he is; on loopback only.
        public_hosts: further names that the Host header may have, such as that of a reverse proxy.
        limits: of bodies, rates, queues and texts.
    """

    model: str = "phantom"
    host: str = "127.0.0.1"
    port: int = 8000
    store: str | None = None
    study: str | None = None
    dictate: str = "none"
    api_key_file: Path | None = None
    no_auth: bool = False
    public_hosts: tuple[str, ...] = ()
    # No flags of their own: whoever needs others starts the server from Python.
    limits: Limits = field(default_factory=Limits)

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can connect."""
        # All of 127/8 is this machine, not only its first address.
        return self.host in LOOPBACK_HOSTS or self.host.startswith("127.")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What the model was trained for, as far as the server offers it.

    Attributes:
        chat: whether questions after a reading are answered with sense.
        several_images: whether one prompt may hold several films.
        probabilities: whether its tokenizer can spell every valid answer.
        why_not: reasons in words, by the name of what is not there.
    """

    chat: bool = False
    several_images: bool = False
    probabilities: bool = True
    why_not: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class ServerState:
    """What the routers share.

    Attributes:
        settings: of this server.
        engine: `cxr_jax.serve.engine.Engine`; the only thread that runs JAX.
        model: `cxr_jax.inference.model.Model`. Only the engine's thread may compute with it; its tokenizer and its
            config may be read from anywhere.
        model_name: what clients call it.
        weights_sha256: of its files.
        capabilities: what it was trained for.
        store: `cxr_jax.store.Store`, or None.
        auth: `cxr_jax.serve.auth`'s object, which says who is asking, or None while there is no store.
        films: `cxr_jax.serve.room.images.Films`, the shelf of uploaded films; made by the first router that asks.
        metrics: what /metrics shows.
        started_at: seconds since 1970, for `created` of /v1/models.
        is_stopping: set by a signal: nothing new is admitted, streams end with an error event.
    """

    settings: ServerSettings
    engine: Any
    model: Any
    model_name: str
    weights_sha256: str
    capabilities: Capabilities
    metrics: "Metrics"
    # ---- What a server may be without ----
    store: Any = None
    auth: Any = None
    films: Any = None
    started_at: int = field(default_factory=lambda: int(time.time()))
    is_stopping: bool = False
