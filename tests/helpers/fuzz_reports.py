"""Both readers of reports side by side, on the random texts of report_texts.py, with what is held against them."""

import functools
import random
import tomllib

import jax
import numpy as np
from oracle_reports import AFFIRMED, HEDGED, Reader
from report_texts import LONGEST as LONGEST
from report_texts import SMALL as SMALL
from report_texts import Texts
from report_texts import draw_small as draw_small

from cxr_jax.labels import CHEXPERT_14, lexicon, phrase_reading, report_text
from cxr_jax.labels.phrase_bank import load_phrase_bank

BATCH, WIDTH = 256, 512  # one shape, so that one program is compiled
FIELDS = ("state", "right", "left", "other", "claims", "wrong", "foreign", "unread")
RIGHT, LEFT = 1 << 16, 1

# What the oracle says of a text, and what is to hold against its claims


def draw_truth(rng: random.Random) -> dict:
    """A random truth: sets of labels, and {label: sides}."""
    some = lambda share: {label for label in CHEXPERT_14 if rng.random() < share}
    share = rng.choice([0.05, 0.6])
    sides = {
        label: rng.choice([(), ("right",), ("left",), ("right", "left")]) for label in CHEXPERT_14
    }
    return {"present": some(share), "hedged": some(0.2), "sides": sides}


def masks(truths: list[dict]) -> phrase_reading.Truth:
    bit = lambda label: 1 << CHEXPERT_14.index(label)
    of = lambda labels: sum(map(bit, labels))
    side = {"right": RIGHT, "left": LEFT}
    pairs = [
        sum(bit(label) * sum(map(side.get, s)) for label, s in t["sides"].items()) for t in truths
    ]
    rows = [of(t["present"]) for t in truths], [of(t["hedged"]) for t in truths], pairs
    return phrase_reading.Truth(*(np.array(x, np.int32) for x in rows))


def is_false(claim, truth) -> bool:
    """Does a claim affirm or hedge what is not there, or on a side where it is not, deny what is there, or call a film
    normal that is not?"""
    label, state, side = claim
    if label not in CHEXPERT_14:
        return False
    if label == "No Finding":
        return state == AFFIRMED and not truth["present"] <= {"No Finding", "Support Devices"}
    claimed = {"both": ("right", "left")}.get(side, (side,)) if side else ()
    sides = truth["sides"][label]
    if state in (AFFIRMED, HEDGED):
        elsewhere = bool(sides) and not set(claimed) <= set(
            sides
        )  # without sides, they are not known
        return label not in truth["present"] | truth["hedged"] or elsewhere
    return label in truth["present"] and (not claimed or bool(set(claimed) & set(sides)))


def expected(reader: Reader, text: bytes, truth: dict) -> tuple:
    """The values of `FIELDS` that the oracle gives a text."""
    said = reader.read(text)
    wrong = sum(any(is_false(claim, truth) for claim in sentence) for sentence in said["claims"])
    told = said["state"], said["right"], said["left"], said["other"], len(said["claims"]), wrong
    return *told, said["foreign"], said["unread"]


# The device


def packed(texts: list[bytes], rows: int = BATCH, width: int = WIDTH):
    """stream uint8 [rows, width], lengths int32 [rows]."""
    stream = np.zeros((rows, width), np.uint8)
    for i, text in enumerate(texts):
        stream[i, : len(text)] = np.frombuffer(text, np.uint8)
    return stream, np.array([*map(len, texts), *[0] * (rows - len(texts))], np.int32)


PROGRAM = jax.jit(report_text.read_bytes)


class Pair:
    """A lexicon file, the built-in one by default, for both readers."""

    def __init__(self, path=None):
        self.path = path and str(path)
        with open(path or lexicon.DEFAULT, "rb") as file:
            self.data = tomllib.load(file)
        self.reader, self.texts = Reader(self.data), Texts(self.data)
        self.bank = jax.device_put(load_phrase_bank(self.path))

    def device(self, texts: list[bytes], truths: list[dict]) -> list[tuple]:
        """The values of `FIELDS` for up to `BATCH` texts."""
        nothing = dict(present=set(), hedged=set(), sides={})
        truth = masks(truths + [nothing] * (BATCH - len(truths)))
        out = jax.device_get(PROGRAM(*packed(texts), self.bank, truth))
        return list(zip(*(out[f][: len(texts)].tolist() for f in FIELDS), strict=True))

    def differ(self, texts: list[bytes], truths: list[dict]) -> list[int]:
        got = self.device(texts, truths)
        return [i for i, t in enumerate(texts) if got[i] != expected(self.reader, t, truths[i])]

    def shrunk(self, text: bytes, truth: dict) -> bytes:
        """The text with all words and bytes left out that it differs without."""
        for pattern in (b" ", None):
            parts = text.split(b" ") if pattern else [text[i : i + 1] for i in range(len(text))]
            join, at = (pattern or b"").join, 0
            while at < len(parts):
                fewer = join(parts[:at] + parts[at + 1 :])
                if self.differ([fewer], [truth]):
                    parts.pop(at)
                else:
                    at += 1
            text = join(parts)
        return text

    def compare(self, draw, n: int, seed) -> None:
        """n texts (in whole batches) through both: asserts that they agree, or shows smallest texts that differ."""
        rng, found = random.Random(seed), []
        for _ in range(0, n, BATCH):
            texts, truths = (
                [draw(rng) for _ in range(BATCH)],
                [draw_truth(rng) for _ in range(BATCH)],
            )
            found += [(texts[i], truths[i]) for i in self.differ(texts, truths)]
            if len(found) >= 5:
                break
        small = sorted(((self.shrunk(*x), x[1]) for x in found[:5]), key=lambda x: len(x[0]))
        said = [(t, self.device([t], [w])[0], expected(self.reader, t, w)) for t, w in small]
        assert not said, "\n".join(
            f"{t!r}\n  device {got}\n  oracle {want}" for t, got, want in said
        )


@functools.cache
def built_in() -> Pair:
    """The pair of the built-in lexicon, made once for all tests of a process: its oracle takes ten seconds."""
    return Pair()
