"""A film's pixels for the viewer, and the picture that the model reads.

Pixels go out as 16-bit levels before any window, because a browser turns a 16-bit PNG into 256 levels. They are
compressed here and once: a middleware that compresses would do so again, and would hold back streams of text.
"""

import io
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
from fastapi import APIRouter, Request, Response
from PIL import Image as PilImage

from cxr_jax.models import registry
from cxr_jax.serve.room.access import film_of
from cxr_jax.serve.room.films import shelf_of
from cxr_jax.serve.room.images import reader_of
from cxr_jax.serve.state import ServerState

_VIEWS_KEPT = 8
# Named by its content, so it never changes; but it is a patient's film, which no disk cache may keep.
_PRIVATE = {"Cache-Control": "no-store"}


class ModelView(NamedTuple):
    """What a model reads of a film: its levels uint8 [h, w], and where in them the film lies, in 0..1.

    `box` is (left, top, right, bottom); what is outside it is the padding of a model of one shape.
    """

    levels: np.ndarray
    box: tuple[float, float, float, float]


def model_view(model: Any, pixels: np.ndarray) -> ModelView:
    """Show what the model reads, taken back out of the very patches that `Model.prepare` makes.

    Args:
        pixels: float32 [H, W] in 0..1.
    """
    # A white film of the same shape tells where padding is.
    extent = _levels_of(model, np.ones_like(pixels)) > 127
    rows, columns = np.flatnonzero(extent.any(1)), np.flatnonzero(extent.any(0))
    # In shares of the picture: the page knows its own size of it alone.
    height, width = extent.shape
    box = (
        float(columns[0] / width),
        float(rows[0] / height),
        float((columns[-1] + 1) / width),
        float((rows[-1] + 1) / height),
    )
    return ModelView(_levels_of(model, pixels), box)


def _levels_of(model: Any, pixels: np.ndarray) -> np.ndarray:
    """The levels, uint8 [h, w], that the patches of a picture are made of."""
    processor = registry.processor_of(model.config)
    # An array is not judged by the gate, and prepared on the host: no other thread computes with JAX.
    patches, grid = model.prepare(pixels)
    # Channel and frame come first in a patch, and all of them are the same gray.
    # Undone in float and rounded, so each level comes back as it was.
    gray = np.asarray(patches)[:, : processor.patch_size**2]
    levels = np.rint((gray * processor.std[0] + processor.mean[0]) * 255)
    return processor.join(np.clip(levels, 0, 255).astype(np.uint8), grid[2])


def as_png(levels: np.ndarray) -> bytes:
    """Write gray levels, uint8 [h, w], as a PNG."""
    buffer = io.BytesIO()
    # The fastest compression: it travels within one machine.
    PilImage.fromarray(levels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def router(state: ServerState) -> APIRouter:
    """Make the routes of pixels and of the model's own view."""
    routes = APIRouter()
    shelf, reader = shelf_of(state), reader_of(state)
    views: OrderedDict[str, ModelView] = OrderedDict()
    lock = threading.Lock()

    @routes.get("/room/images/{digest}/pixels")
    def pixels(request: Request, digest: str, user: Any = reader) -> Response:
        film_of(state, request, user, digest)
        return Response(
            shelf.compressed_levels(digest),
            media_type="application/octet-stream",
            headers={"Content-Encoding": "gzip", **_PRIVATE},
        )

    def view_of(digest: str) -> ModelView:
        with lock:
            if digest in views:
                return views[digest]
        # Outside the lock: another film's view need not wait for this one.
        view = model_view(state.model, shelf.picture(digest))
        with lock:
            views[digest] = view
            while len(views) > _VIEWS_KEPT:
                views.popitem(last=False)
        return view

    @routes.get("/room/images/{digest}/model_view.png")
    def model_view_png(request: Request, digest: str, user: Any = reader) -> Response:
        film_of(state, request, user, digest)
        view = view_of(digest)
        # The box goes along in a header: the picture and its place are one answer.
        headers = {"X-Film-Box": ",".join(f"{edge:.6f}" for edge in view.box), **_PRIVATE}
        return Response(as_png(view.levels), media_type="image/png", headers=headers)

    return routes
