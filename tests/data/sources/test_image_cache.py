"""Decoded films are kept, within bounds, and decoded by several threads."""

import threading
import time

import numpy as np
import pytest
from manifest_rows import grpo, sft, write

from cxr_jax.data import image_cache, images
from cxr_jax.data.sources import manifest
from cxr_jax.errors import UserError

ONE = 56 * 56 * 4 / 2**20  # MiB of an image


@pytest.fixture
def reads(monkeypatch):
    """Names of the files read, in order."""
    names, real = [], images.read_image
    monkeypatch.setattr(
        manifest.images, "read_image", lambda p, r: (names.append(p.name), real(p, r))[1]
    )
    return names


def test_cache_is_bounded_and_used(tmp_path, root, reads):
    rows = manifest.load_rows(write(tmp_path, grpo(), sft(), grpo("sub/c.png")), root)
    roomy = manifest.FilesSource(rows, 56, cache=image_cache.ImageCache(3 * ONE))
    first = roomy.batch([0, 1, 2])["image"]
    np.testing.assert_array_equal(roomy.batch([0, 1, 2, 1])["image"], first[[0, 1, 2, 1]])
    assert len(reads) == 3
    assert roomy.cache.stats() == {"hits": 4, "misses": 3, "images": 3, "mib": 3 * ONE}
    for images_held in (0, 0.9, 1, 1.9, 2, 3):
        source = manifest.FilesSource(rows, 56, cache=image_cache.ImageCache(images_held * ONE))
        for _ in range(3):
            np.testing.assert_array_equal(source.batch([0, 1, 2])["image"], first)
            assert source.cache.stats()["images"] == int(
                images_held
            )  # all the room is used, and no more
        assert (
            sum(x.nbytes for x in source.cache._images.values())
            == source.cache.stats()["mib"] * 2**20
        )


def test_cache_drops_what_was_not_asked_for_the_longest(tmp_path, root, reads):
    rows = manifest.load_rows(write(tmp_path, grpo(), sft(), grpo("sub/c.png")), root)
    source = manifest.FilesSource(rows, 56, cache=image_cache.ImageCache(2 * ONE), threads=1)
    for i in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, and 1 that of 2
        source.image(i)
    assert reads == ["a.png", "b.png", "c.png", "b.png"]
    with pytest.raises(ValueError, match="read-only"):
        source.image(0)[0, 0] = 1
    with pytest.raises(UserError, match="cache_mib=-1"):
        image_cache.ImageCache(-1)
    with pytest.raises(UserError, match="threads=-1"):
        manifest.FilesSource(rows, threads=-1)


def test_two_threads_do_not_decode_one_image_at_a_time():
    cache, begun, go, calls = image_cache.ImageCache(0), threading.Event(), threading.Event(), []

    def decode():
        calls.append(1)
        begun.set()
        go.wait(5)
        if len(calls) == 2:
            raise UserError("a.png: is torn")
        return np.ones(3, np.float32)

    def ask():
        try:
            got.append(cache.get("a", decode))
        except UserError as e:
            got.append(str(e))

    for count, want in (
        (1, np.ones(3)),
        (2, "a.png: is torn"),
    ):  # not even where nothing can be kept
        begun.clear(), go.clear()
        got, threads = [], [threading.Thread(target=ask) for _ in range(4)]
        for t in threads:
            t.start()
        begun.wait(5)
        while cache.stats()["hits"] < 3 * count:  # until all the others wait for the one
            time.sleep(0.01)
        go.set()
        for t in threads:
            t.join(5)
        assert len(calls) == count and len(got) == 4
        for value in got:
            np.testing.assert_array_equal(value, want)


def test_rows_of_a_batch_are_decoded_by_several_threads(tmp_path, root, monkeypatch):
    rows, together = (
        manifest.load_rows(write(tmp_path, grpo(), sft(), grpo("sub/c.png")), root),
        threading.Barrier(3),
    )
    real = images.read_image
    monkeypatch.setattr(
        manifest.images, "read_image", lambda p, r: (together.wait(5), real(p, r))[1]
    )
    assert manifest.FilesSource(rows, 56, threads=3).batch([0, 1, 2])["ids"] == [
        "a.png",
        "b.png",
        "sub/c.png",
    ]
