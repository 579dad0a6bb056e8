"""Decoded pictures that are kept in memory, up to a limit, each decoded once."""

import collections
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future

import numpy as np

from cxr_jax.errors import UserError

CACHE_MIB = 512


class ImageCache:
    """Decoded images, never more than `mib` MiB of them: the one not asked for the longest goes first.

    One cache can serve several sources. Safe to call from threads; no two of them decode one image at a time. Where
    every epoch has its own order, a cache that holds a fraction c of a source spares c + (1 - c) ln(1 - c) of the
    decoding: 15 % at a half, 67 % at nine tenths.

    Raises:
        UserError: for a negative size.
    """

    def __init__(self, mib: float = CACHE_MIB) -> None:
        if not mib >= 0:  # so written, it refuses NaN as well
            raise UserError(f"config.data.cache_mib={mib} must be a number of MiB, 0 for no cache")
        self._limit, self._bytes, self._hits, self._misses = int(mib * 2**20), 0, 0, 0
        self._lock = threading.Lock()
        # In the order in which they were last asked for.
        self._images: collections.OrderedDict[Hashable, np.ndarray] = collections.OrderedDict()
        # Images that some thread decodes at the moment: the others wait for its result.
        self._decoding: dict[Hashable, Future[np.ndarray]] = {}

    def get(self, cache_key: Hashable, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """Give the read-only array of a key, from `decode()` if it is not there. Raises what that raises."""
        with self._lock:
            if cache_key in self._images:
                self._images.move_to_end(cache_key)
                self._hits += 1
                return self._images[cache_key]
            # Another thread may be at it; then this one waits, outside the lock.
            awaited = self._decoding.get(cache_key)
            if awaited:
                self._hits += 1
            else:
                self._misses += 1
                promise = self._decoding[cache_key] = Future()
        if awaited:
            return awaited.result()

        # Outside the lock: decoding takes long, and other images can be decoded meanwhile.
        try:
            image = decode()
            image.setflags(write=False)  # shared by all who ask for it
        except BaseException as error:
            with self._lock:
                del self._decoding[cache_key]
            promise.set_exception(error)  # those who wait fail alike
            raise
        with self._lock:
            del self._decoding[cache_key]
            self._keep(cache_key, image)
        promise.set_result(image)
        return image

    def _keep(self, cache_key: Hashable, image: np.ndarray) -> None:
        """Make room for an image and keep it, unless it alone is above the limit. The lock must be held."""
        if image.nbytes > self._limit:
            return
        while self._bytes + image.nbytes > self._limit:
            _, oldest = self._images.popitem(last=False)
            self._bytes -= oldest.nbytes
        self._images[cache_key] = image
        self._bytes += image.nbytes

    def __contains__(self, cache_key: Hashable) -> bool:
        """Tell whether the image of a key is held now."""
        with self._lock:
            return cache_key in self._images

    def stats(self) -> dict[str, float]:
        """Count hits and misses (images decoded or refused) since the start; images and mib held now."""
        with self._lock:
            held = {"images": len(self._images), "mib": self._bytes / 2**20}
            return {"hits": self._hits, "misses": self._misses, **held}
