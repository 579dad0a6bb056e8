"""Random reports for differential tests: texts from a lexicon's own phrases, and both readers side by side."""

import functools
import random
import string
import tomllib

import jax
import numpy as np
from oracle_reports import AFFIRMED, HEDGED, START, STRENGTH, UNMENTIONED, Reader, expansions

from cxr_jax.labels import CHEXPERT_14, lexicon, report_text
from cxr_jax.labels.phrase_bank import load_phrase_bank

BATCH, WIDTH, LONGEST = 256, 512, 400  # one shape, so that one program is compiled
FIELDS = ("state", "right", "left", "other", "claims", "wrong")
RIGHT, LEFT = 1 << 16, 1

# One word a kind of phrase, so that short texts meet all rules about what stands around a mention.
SMALL = """
[classes]
colour = ["red", "green"]
[findings]
"Edema" = ["f1", "see saw"]
"Fracture, Other" = ["f2"]
"No Finding" = ["fine"]
"Support Devices" = ["tube"]
"Consolidation" = ["<colour> light", "(red|blue) lamp", "red stop", "(red|) start", "ab*"]
"Pneumonia" = ["red light", "red lamp", "<colour> stop", "abc*", "abcd"]
[denials]
"No Finding" = ["d1"]
"Pneumonia" = ["d2"]
[hedged]
"Pleural Effusion" = ["h"]
[denied]
"Atelectasis" = ["x"]
"Edema" = ["not f1"]
[subjects]
"Cardiomegaly" = ["s1"]
"Enlarged Cardiomediastinum, Cardiomegaly" = ["s2"]
[qualities]
normal = ["good"]
abnormal = ["bad"]
borderline = ["so"]
[cues]
negative_before = ["nb"]
negative_after = ["na"]
negative_around = ["nr"]
uncertain_before = ["ub"]
uncertain_after = ["ua"]
uncertain_around = ["ur"]
ignore_before = ["ib"]
ignore_after = ["ia"]
ignore_around = ["ir"]
[sides]
right = ["r"]
left = ["l"]
both = ["b"]
[headings]
right = ["r :"]
left = ["l :"]
both = ["b :"]
[stops]
sentence = [".", "?"]
clause = [";", "but"]
clause_right = [", r"]
clause_left = [", l"]
clause_both = [", b"]
[commas]
comma = [","]
[nothing]
phrases = ["no f1", "saw f2"]
"""
SMALL_WORDS = (
    "f1 f2 see saw fine tube red green blue light lamp stop start ab abcx abcd d1 d2 h x not no s1 s2 good bad so nb "
    "na nr ub ua ur ib ia ir r l b r: l: b: . ? ; but ,r ,l ,b , , / word 1.5"
).split(" ")
SMALL_WORDS += "f1 f2 tube f1 f2 tube h x r l b , , , , ur ir ia nb ub".split(
    " "
)  # these interact the most


# Random texts


class Texts:
    """Random texts, as lists of pieces (bytes), from the phrases of a lexicon (a dict as `tomllib` gives it)."""

    TABLES = dict(
        findings=26,
        denials=4,
        hedged=4,
        denied=3,
        subjects=7,
        qualities=7,
        cues=20,
        sides=11,
        headings=3,
    )
    TABLES |= dict(stops=9, commas=8, nothing=5)
    FILLER = b"the of in lung base lower upper lobe xxxx is a and or with area seen zone patient view 3".split()
    FILLER += [b"1.5", b"2.", b".5", b"10.0.1", b"4cm"]
    ODD = [bytes([b]) for b in range(256)]
    ODD += [
        "é".encode(),
        "\u00a0".encode(),
        "\u2028".encode(),
        "\u212a".encode(),
        "\u0130".encode(),
        "肺".encode(),
    ]
    ODD += [b"\xe2\x80", b"\xed\xa0\x80", b"\xf0\x9f", b"...", b"--", b"_", b"1.", b"'s", b"\x00"]
    GAPS = [
        b"\n",
        b"\n\n",
        b"\n- ",
        b"\n* ",
        b"\n \t\n",
        b"-",
        b"- ",
        b"",
        b"\t",
        b"\x00",
        b"\xc2\xa0",
        b" (",
        b") ",
    ]
    GAPS += [
        b"\r\n",
        b"\r\n\r\n",
        b". ",
        b", ",
        b",",
        b".",
        b": ",
        b"/",
        b"; ",
        b"? ",
        b"\n-\n*",
        b"\n.\n",
        b"\n\xff-",
    ]

    def __init__(self, data: dict):
        self.classes = data.get("classes", {})
        self.tables = [t for t in self.TABLES if t in data]
        self.weights = [self.TABLES[t] for t in self.tables]
        self.entries = {t: [[p for p in ps if p] for ps in data[t].values()] for t in self.tables}
        self.expand = functools.cache(lambda phrase: expansions(phrase, self.classes))

    def phrase(self, rng: random.Random) -> bytes:
        """A phrase as the lexicon means it."""
        table = rng.choices(self.tables, self.weights)[0]
        entries = self.entries[table]
        if rng.random() < 0.5:  # by phrases, else by entries
            entries = [[p for ps in entries for p in ps]]
        out = []
        for word, how in rng.choice(self.expand(rng.choice(rng.choice(entries)))):
            if how == START:
                word += rng.choice(
                    ["", "", "s", "es", "1", "".join(rng.choices(string.ascii_lowercase, k=3))]
                )
            out.append(word)
        gap = (
            " "
            if rng.random() < 0.95
            else rng.choice(["\n", "-", "  ", " \n", ", ", ". ", "", "\n\n", "\u00a0"])
        )
        return gap.join(out).encode()

    def piece(self, rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.84:
            out = self.phrase(rng)
        elif kind < 0.95:
            out = rng.choice(self.FILLER)
        else:
            out = rng.choice(self.ODD)
        change = rng.random()
        if change < 0.03:  # cut
            out = (
                out[rng.randrange(len(out) + 1) :]
                if rng.random() < 0.5
                else out[: rng.randrange(len(out) + 1)]
            )
        elif change < 0.12:
            out = out.upper() if rng.random() < 0.5 else out.title()
        elif change < 0.14:
            at = rng.randrange(len(out) + 1)
            out = out[:at] + rng.choice(self.ODD) + out[at:]
        return out

    def draw(self, rng: random.Random) -> list[bytes]:
        """The pieces of a text of at most `LONGEST` bytes."""
        end = rng.randrange(LONGEST + 1) if rng.random() < 0.7 else rng.randrange(60)
        plain = rng.choice([0.5, 0.85, 0.97])
        out, size = [], 0
        while size < end:
            out += [self.piece(rng), b" " if rng.random() < plain else rng.choice(self.GAPS)]
            size += len(out[-1]) + len(out[-2])
        if size > end:
            out[-2:] = [(out[-2] + out[-1])[: end - size or None]]
        return out


def draw_small(rng: random.Random) -> bytes:
    """A text of the words of `SMALL`, many of them few words long."""
    words = rng.choices(SMALL_WORDS, k=rng.randrange(rng.choice([4, 8, 40])))
    return " ".join(words).encode()


# What the oracle says of a text, and what is to hold against its claims


def draw_truth(rng: random.Random) -> dict:
    """A random truth: sets of labels, and {label: sides}."""
    some = lambda share: {label for label in CHEXPERT_14 if rng.random() < share}
    share = rng.choice([0.05, 0.6])
    sides = {
        label: rng.choice([(), ("right",), ("left",), ("right", "left")]) for label in CHEXPERT_14
    }
    return {"present": some(share), "hedged": some(0.2), "sides": sides}


def masks(truths: list[dict]) -> report_text.Truth:
    bit = lambda label: 1 << CHEXPERT_14.index(label)
    of = lambda labels: sum(map(bit, labels))
    side = {"right": RIGHT, "left": LEFT}
    pairs = [
        sum(bit(label) * sum(map(side.get, s)) for label, s in t["sides"].items()) for t in truths
    ]
    rows = [of(t["present"]) for t in truths], [of(t["hedged"]) for t in truths], pairs
    return report_text.Truth(*(np.array(x, np.int32) for x in rows))


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
    other = [
        state for sentence in said["claims"] for label, state, _ in sentence if label == "Other"
    ]
    wrong = sum(any(is_false(claim, truth) for claim in sentence) for sentence in said["claims"])
    strongest = max(other, key=STRENGTH.get, default=UNMENTIONED)
    return said["state"], said["right"], said["left"], strongest, len(said["claims"]), wrong


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
