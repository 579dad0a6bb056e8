"""Random reports, as bytes: of a lexicon's own phrases, and of the words of a small lexicon that has one of each kind.

Between the words stands what docs/report_parser.md has rules for, on both sides of each of their bounds.
"""

import functools
import random
import string

from oracle_reports import DASHED, START, expansions, named
from oracle_tokens import BREAK

LONGEST = 400  # bytes

# One word a kind of phrase, so that short texts meet all rules about what stands around a mention.
SMALL = """
[classes]
colour = ["red", "green"]
[groups]
seen = ["g1", "(see|hear) g2", "<colour> g3", "-low g1"]
last = ["<seen> end", "g4 <end>", "-low <end>"]
[findings]
"Edema" = ["f1", "see saw"]
"Fracture, Other" = ["f2"]
"No Finding" = ["fine"]
"Support Devices" = ["tube", "<seen> tube"]
"Support Devices, Lung Lesion" = ["port"]
"Consolidation" = ["<colour> light", "(red|blue) lamp", "red stop", "(red|) start", "ab*", "-low", "-red lamp"]
"Pleural Other" = ["shadower"]
"Pneumonia" = ["red light", "red lamp", "<colour> stop", "abc*", "abcd", "low", "-low f1", "shadowed"]
"Pneumothorax" = ["(<seen>|g5)", "hear g2", "red g3"]
[denials]
"No Finding" = ["d1"]
"Pneumonia" = ["d2"]
"Support Devices" = ["d3"]
[hedged]
"Pleural Effusion" = ["h"]
"Support Devices" = ["wire"]
[denied]
"Atelectasis" = ["x"]
"Edema" = ["not f1"]
"Support Devices" = ["bare"]
[subjects]
"Cardiomegaly" = ["s1"]
"Enlarged Cardiomediastinum, Cardiomegaly" = ["s2"]
[qualities]
normal = ["good"]
abnormal = ["bad"]
borderline = ["so"]
[cues]
negative_before = ["nb", "~"]
negative_after = ["na"]
negative_around = ["nr"]
negative_field = ["nf :"]
uncertain_before = ["ub", "¿"]
uncertain_after = ["ua"]
uncertain_around = ["ur"]
uncertain_field = ["uf :"]
ignore_before = ["ib"]
ignore_after = ["ia"]
ignore_around = ["ir"]
ignore_field = ["if :"]
field_name = ["sf :", "| sf", "fn"]
[values]
negative = ["vn", ": no", "no .", "no <end>", "-", "<last>", "– no"]
uncertain = ["vu !", ": vu", "doubt (.|<end>|;)"]
ignore = ["vi", "vi ."]
positive = ["+", "yes", "yes (.|<end>)"]
[questions]
question = ["?", "asked <end>"]
[parts]
after = ["tip"]
before = ["tip of", "^ tip"]
[sides]
right = ["r"]
left = ["l"]
both = ["b"]
[headings]
right = ["r :"]
left = ["l :"]
both = ["b :"]
[stops]
sentence = [".", "!"]
clause = [";", "but", "|", "–"]
clause_right = [", r"]
clause_left = [", l"]
clause_both = [", b"]
[commas]
comma = [","]
[nothing]
phrases = ["no f1", "saw f2", "^", "hide <end>", "- f2"]
[words]
hanging = ["of", "nb", "red"]
abbreviated = ["dr", "f2", "x15", "r"]
near = ["shadowed", "shadower", "swollen"]
english = ["the", "of", "is", "not"]
foreign = ["der", "und", "swollen"]
known = ["lol", "okay"]
"""
SMALL_WORDS = (
    "f1 f2 see saw fine tube red green blue light lamp stop start ab abcx abcd d1 d2 h x not no s1 s2 good bad so nb "
    "na nr ub ua ur ib ia ir r l b r: l: b: . ? ; but ,r ,l ,b , , / word 1.5 g1 g2 g3 g4 g5 hear end low -low -red "
    "port d3 wire bare nf: uf: if: sf: |sf | vn :no no. vu! :vu doubt vi yes yes. asked tip tip of hide ! the is of "
    "tip_of ^_tip see_g2 g3_end low_f1 no_f1 red_light dr. dr., f2. 1.5. lol LOL XYZ QQ ABCDE ABCDEF QX1 okay shadowed"
).split(" ")
# These interact the most.
SMALL_WORDS += (
    "f1 f2 tube f1 f2 tube h x r l b , , , , ur ir ia nb ub tip tip_of ? no yes nf: sf:".split()
)
SMALL_WORDS = [word.replace("_", " ") for word in SMALL_WORDS]

# Signs of section 1, each with what it is cut to in the middle.
MARKS = "(+) [+] (x) [x] (X) [X] ✓ ✔ ☑ ☒ (-) [-] ( ) [ ] () [] ✗ ✘ ☐".replace("( )", "(_)")
MARKS = [mark.replace("_", " ") for mark in MARKS.replace("[ ]", "[_]").split()]
AFFIRMING, DENYING = MARKS[:10], MARKS[10:]
COLONS, DASHES, STROKES = (
    [":", "=", "→", "->", "=>"],
    ["-", "–", "(", "["],
    [" - ", " – ", "—", "--", " –\t"],
)
BULLETS = ["•", "●", "◦", "▪", "*", "·", "+", "(2) ", "[2] ", "1(2) ", "(2)", "(12) ", "(a) "]
TAGS = ["<br>", "<p>", "</p>", "<b>", "</b>", "<B>", "<i>", "</u>", "< b", "</ b>", "<1>", "<bb>"]
SIGNS = [sign.encode() for sign in MARKS + COLONS + DASHES + STROKES + BULLETS + TAGS]
SIGNS += [
    sign.encode() for sign in "… ¿ > < # | × ÷ \t abc\td ab\td \r \r\n - -- --- --> \" '".split(" ")
]
CUT = [part for sign in SIGNS if len(sign) > 1 for part in (sign[:1], sign[:-1], sign[1:])]
FOREIGN = [sign.encode() for sign in "éßàñ肺かЖعक"] + [bytes([byte]) for byte in range(0xC0, 0xF0)]
FOREIGN_WORDS = [b"der", b"und", b"swolen", b"swollen"]
FOREIGN_SHARE = 0.2  # of the texts: one sign of another language can be enough
ODD = [bytes([byte]) for byte in (*range(0xC0), *range(0xF0, 0x100))]
ODD += [sign.encode() for sign in ("\u00a0", "\u2028", "\u212a", "’", "\U0001fac1")] + SIGNS + CUT
ODD += [part.encode() for part in "...¦--¦_¦1.¦'s¦\x00¦??¦ ?¦ ? ¦(?¦~¦^".split("¦")] + [
    b"\xe2\x80",
    b"\xf0\x9f",
]
GAPS = "¦\n¦\n\n¦\n- ¦\n* ¦\n \t\n¦-¦- ¦\t¦\x00¦\u00a0¦ (¦) ¦\r\n¦\r\n\r\n¦. ¦, ¦,¦.¦: ¦/¦; ¦? ¦\n-\n*¦\n.\n¦  "
GAPS += "¦ ?¦\n\ufffd-¦ – ¦—¦\n– ¦\n• ¦ • ¦ | ¦ = ¦ -> ¦\n(x) ¦\n[ ] ¦\n- [x] ¦\n(-) ¦\r¦\r\r¦\r- ¦\n\r¦ - ¦ -\n¦--¦…"
GAPS += "¦\n+ ¦\n· ¦\n→ ¦<br>¦\n(2) ¦ (2) ¦\n[ ] a [x] "
GAPS = [gap.encode() for gap in GAPS.split("¦")]
ENDS = "\n\n¦\r\n\r\n¦\r\r¦<br>¦\n+ ¦\n- ¦\n¦\nR: ¦\nThe ¦\n1. ¦\n\n\n¦\n• ¦ • ¦\n  * ¦\nA ".split(
    "¦"
)
STARTS = "Red |RED |R |R|R1|red |r|1. |1) |1.|1)|1.5 |12. |1 .|É|(R|\r|R\n|R:|r=|R.|-R|X-|\n|a) |A) |a)|Ab)"
STARTS = f"{STARTS}|r. |r. Ab|r. AB|? a|? A|?A|?a|?  a".split("|")


def line_end(rng: random.Random, text: bytes) -> bytes:
    """A newline behind a text, with what may make it end its line: of lengths on both sides of the bounds."""
    fill, size = b"", len(text) - 1 - max(text.rfind(b"\n"), text.rfind(b"\r"))
    if size < 33 and rng.random() < 0.5:
        fill = rng.choice([b" ", b"w", b".", b"\xa0"]) * (rng.choice([30, 31, 32, 33]) - size)
    skipped = rng.choice([0, 0, 0, 1, 2, 6, 7, 8, 9])
    blanks = "".join(rng.choices(" \t*#_\"'>-", [16, 4, 1, 1, 1, 1, 1, 1, 0.1], k=skipped))
    start = rng.choice(STARTS)
    if rng.random() < 0.4:  # a field
        run = rng.choices(
            "abyzAZ09 \t/-*()_.", [4] * 16 + [0.3], k=rng.choice([0, 1, 5, 28, 29, 30, 31, 32])
        )
        start = rng.choice("aRzZ") + "".join(run) + rng.choice([":", ":", "=", " :", "; ", ""])
    return fill + rng.choice([b"\n", b"\n", b"\n", b"\r", b"\r\n"]) + (blanks + start).encode()


def slipped(rng: random.Random, word: str) -> str:
    """A word with a slip of any kind, or with two."""
    for _ in range(rng.choice([1, 1, 1, 2])):
        at, letter = rng.randrange(len(word) + 1), rng.choice(string.ascii_letters + "1")
        left, rest = word[:at], word[at:]
        word = rng.choice(
            [
                left + rest[1:],
                left + letter + rest,
                left + letter + rest[1:],
                left + rest[1::-1] + rest[2:],
            ]
        )
    return word


class Texts:
    """Random texts, as lists of pieces (bytes), from the phrases of a lexicon (a dict as `tomllib` gives it)."""

    TABLES = dict(
        findings=26,
        denials=4,
        hedged=4,
        denied=3,
        subjects=7,
        qualities=7,
        cues=22,
        sides=16,
        headings=3,
    )
    TABLES |= dict(values=7, questions=2, parts=4, stops=9, commas=8, nothing=5)
    FILLER = b"the of in lung base lower upper lobe xxxx is a and or with area seen zone patient view 3".split()
    FILLER += [b"1.5", b"2.", b".5", b"10.0.1", b"4cm", b"QRS", b"XQ", b"ABCDEF", b"Q1X"]

    def __init__(self, data: dict):
        self.classes, self.groups = named(data)
        self.tables = [t for t in self.TABLES if t in data]
        self.weights = [self.TABLES[t] for t in self.tables]
        self.entries = {t: [[p for p in ps if p] for ps in data[t].values()] for t in self.tables}
        self.expand = functools.cache(lambda phrase: expansions(phrase, self.classes, self.groups))
        phrases = [p for entries in self.entries.values() for ps in entries for p in ps]
        self.closing = [p for p in phrases if p.endswith("<end>")]
        lists = data.get("words", {})
        self.near, self.foreign = lists.get("near", []), lists.get("foreign", [])
        self.lists = [
            lists[name]
            for name in ("hanging", "abbreviated", "english", "known")
            if lists.get(name)
        ]

    def phrase(self, rng: random.Random) -> bytes:
        """A phrase as the lexicon means it."""
        table = rng.choices(self.tables, self.weights)[0]
        entries = self.entries[table]
        if rng.random() < 0.5:  # by phrases, else by entries
            entries = [[p for ps in entries for p in ps]]
        entries = [ps for ps in entries if ps]
        words = rng.choice(self.expand(rng.choice(rng.choice(entries))) or [()])
        return self.rendered(rng, words).encode()

    def rendered(self, rng: random.Random, words: tuple) -> str:
        """The words and tokens of a phrase, as a text may have them."""
        out, gap = "", ""
        for word, how in words:
            if how == START:
                letters = "".join(rng.choices(string.ascii_lowercase, k=3))
                word += rng.choice(["", "", "s", "es", "1", letters])
            elif how == DASHED:
                gap, word = (
                    rng.choice(["", gap]),
                    rng.choice(DASHES) + rng.choice(["", "", " "]) + word,
                )
            elif word == BREAK:
                gap, word = (
                    rng.choice(["", " ", "."]) if rng.random() < 0.2 else "",
                    rng.choice(ENDS),
                )
            elif word in "^~":
                gap, word = (
                    rng.choice(["\n", "\n", "\n- ", "\n  "]),
                    rng.choice(AFFIRMING if word == "^" else DENYING),
                )
            elif word in "+-":
                word = rng.choice(AFFIRMING if word == "+" else DENYING)
            elif word == ":":
                gap, word = rng.choice(["", gap]), rng.choice(COLONS[:1] * 4 + COLONS)
            elif word == "–":
                gap, word = rng.choice(["", gap]), rng.choice(STROKES)
            elif word == "." and rng.random() < 0.1:
                word = "…"
            elif word in ".!?,;/|":
                gap = rng.choice(["", gap])
            out += gap + word.replace("¿", rng.choice(["?", "? "]))
            gap = (
                " "
                if rng.random() < 0.95
                else rng.choice(["\n", "-", "  ", " \n", ", ", ". ", "", "\n\n", "\u00a0"])
            )
            gap = "" if word == "¿" else gap
        return out

    def word(self, rng: random.Random, foreign: bool) -> bytes:
        """One of the lexicon's plain words, or a slip away from it."""
        if foreign and self.foreign and rng.random() < 0.5:
            return rng.choice(self.foreign).encode()
        if self.near and rng.random() < 0.5:
            return slipped(rng, rng.choice(self.near)).encode()
        if not self.lists:
            return rng.choice(self.FILLER)
        word = rng.choice(rng.choice(self.lists))
        return (word + rng.choice(["", "", ".", ". a", ".,", ". A", ".)"])).encode()

    def piece(self, rng: random.Random, foreign: bool = False) -> bytes:
        kind, odd = rng.random(), FOREIGN if foreign and rng.random() < 0.5 else ODD
        if kind < 0.80:
            out = self.phrase(rng)
        elif kind < 0.90:
            out = rng.choice(self.FILLER)
        elif kind < 0.95:
            out = self.word(rng, foreign)
        else:
            out = rng.choice(odd)
        change = rng.random()
        if change < 0.03:  # cut
            at = rng.randrange(len(out) + 1)
            out = out[at:] if rng.random() < 0.5 else out[:at]
        elif change < 0.12:
            out = out.upper() if rng.random() < 0.5 else out.title()
        elif change < 0.14:
            at = rng.randrange(len(out) + 1)
            out = out[:at] + rng.choice(odd) + out[at:]
        return out

    def draw(self, rng: random.Random) -> list[bytes]:
        """The pieces of a text of at most `LONGEST` bytes."""
        end = rng.randrange(LONGEST + 1) if rng.random() < 0.7 else rng.randrange(60)
        plain, foreign = rng.choice([0.5, 0.85, 0.97]), rng.random() < FOREIGN_SHARE
        out, size = [], 0
        while size < end:
            gap = b" " if rng.random() < plain else rng.choice(GAPS)
            out.append(self.piece(rng, foreign))
            out.append(line_end(rng, b"".join([*out[-8:]])) if rng.random() < 0.04 else gap)
            size += len(out[-1]) + len(out[-2])
        if size > end:
            out[-2:] = [(out[-2] + out[-1])[: end - size or None]]
        if self.closing and rng.random() < 0.2:  # the end of the text is the break of a phrase
            words = rng.choice(self.expand(rng.choice(self.closing)))
            last = b" " + self.rendered(rng, words[:-1]).encode()
            out += [last] if sum(map(len, out)) + len(last) <= LONGEST else []
        return out


def draw_small(rng: random.Random) -> bytes:
    """A text of the words of `SMALL`, many of them few words long."""
    out, plain = b"", rng.choice([0.6, 0.9, 1.0])
    foreign = rng.random() < FOREIGN_SHARE
    for word in rng.choices(SMALL_WORDS, k=rng.randrange(rng.choice([4, 8, 40]))):
        kind = rng.random()
        if kind < 0.03:
            word = slipped(rng, rng.choice(["shadowed", "shadower", "swollen"]))
        elif kind < 0.06:
            word = rng.choice([word.upper(), word.title()])
        out += word.encode()
        if foreign and rng.random() < 0.2:
            out += b" " + rng.choice(FOREIGN + FOREIGN_WORDS * 8)
        if rng.random() < plain:
            out += b" "
        else:
            kind = rng.random()
            sign = (
                line_end(rng, out)
                if kind < 0.3
                else rng.choice(GAPS if kind < 0.8 else SIGNS + CUT)
            )
            out += sign + rng.choice([b"", b" "])
    return out[:LONGEST].removesuffix(b" ") if rng.random() < 0.8 else out[:LONGEST]
