"""The plain Python peers of labels.py, one process each:

    python benchmarks/_plain.py TEXTS.json       # {kind: [report, ..]}

`rules`: tests/helpers/oracle_reports.py, which agrees with ours on every text. `regex`: a labeler written the
obvious way with `re`, as CheXpert's and NegBio's are: one alternation a label, cues looked for around each mention.
"""

import json
import pathlib
import re
import sys
import time
import tomllib

from _common import serve

from cxr_jax.labels import lexicon
from cxr_jax.labels.taxonomy import CHEXPERT_14

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "helpers"))
from oracle_reports import Reader  # noqa: E402

CHUNK = 32  # reports between two looks at the clock


class Regex:
    """14 states of a report by regular expressions over the phrases of a lexicon. Not exact: no sides, phrases of other
    tables do not hide a mention (but those of [nothing] do), and of several cues the nearest on either side counts."""

    def __init__(self, lex: lexicon.Lexicon):
        self.classes, keys = lex.classes, {}
        for words, meaning in lex.phrases.items():
            keys.setdefault((meaning.table, meaning.key), []).append(words)
        self.labels = {
            key: next(m.labels for m in lex.phrases.values() if (m.table, m.key) == key)
            for key in keys
        }
        mentions = ("findings", "denials", "hedged", "denied", "subjects")
        self.mentions = [(*key, self.compile(keys[key])) for key in keys if key[0] in mentions]
        self.qualities = [
            (state, self.compile(keys[key]))
            for key in keys
            if key[0] == "qualities"
            for state in [{"normal": 0, "abnormal": 1, "borderline": -1}[key[1]]]
        ]
        cues = {}
        for mode in ("ignore", "negative", "uncertain"):
            for side in ("before", "after"):
                words = keys.get(("cues", f"{mode}_{side}"), []) + keys.get(
                    ("cues", f"{mode}_around"), []
                )
                cues.setdefault(side, []).append((mode, self.compile(words)))
        self.cues = cues
        self.clause = self.compile(
            [
                w
                for (table, key), v in keys.items()
                if table == "stops" and key != "sentence"
                for w in v
            ]
        )
        self.nothing = self.compile(keys["nothing", "phrases"])

    def compile(self, phrases) -> re.Pattern:
        """An alternation, the longest first; words are separated by anything but letters, digits and punctuation."""
        options = sorted(
            (r"[^\w.?!;:,/]+".join(map(self.word, words)) for words in phrases),
            key=len,
            reverse=True,
        )
        return re.compile(r"(?<!\w)(?:" + "|".join(options) + r")(?!\w)")

    def word(self, pattern: str) -> str:
        if pattern[0] == "<":
            return (
                "(?:" + "|".join(sorted(self.classes[pattern[1:-1]], key=len, reverse=True)) + ")"
            )
        return re.escape(pattern[:-1]) + r"\w*" if pattern[-1] == "*" else re.escape(pattern)

    def read(self, text: str) -> list[int]:
        said = [set() for _ in lexicon.LABELS]
        for sentence in re.split(r"(?<!\d)[.?!]|[.?!](?!\d)|\n\s*\n", text.lower()):
            sentence = self.nothing.sub(lambda m: " " * len(m[0]), sentence)
            cuts = [
                0,
                *(i for m in self.clause.finditer(sentence) for i in m.span()),
                len(sentence),
            ]
            for start, end in zip(cuts[::2], cuts[1::2], strict=True):
                self.read_clause(sentence[start:end], said)
        states = [1 if 1 in s else -1 if -1 in s else 0 if 0 in s else -2 for s in said]
        abnormal = any(
            state in (1, -1)
            for label, state in zip(lexicon.LABELS, states, strict=True)
            if label not in ("No Finding", "Support Devices")
        )
        states[0] = 1 if any(said) and not abnormal else -2
        return states[: len(CHEXPERT_14)]

    def read_clause(self, clause: str, said) -> None:
        for table, key, pattern in self.mentions:
            for match in pattern.finditer(clause):
                state = (
                    self.quality(clause) if table == "subjects" else self.cue(clause, match, table)
                )
                if state is not None:
                    for i in self.labels[table, key]:
                        said[i].add(state)

    def quality(self, clause: str):
        return next((state for state, pattern in self.qualities if pattern.search(clause)), None)

    def cue(self, clause: str, match, table: str):
        if table == "denied":
            return 0
        after = [
            (m.start(), mode)
            for mode, pattern in self.cues["after"]
            if (m := pattern.search(clause, match.end()))
        ]
        before = [
            (-m.end(), mode)
            for mode, pattern in self.cues["before"]
            for m in pattern.finditer(clause, 0, match.start())
        ]
        mode = min(before or after or [(0, None)])[1]
        if after and "," not in clause[match.end() : min(after)[0]]:
            mode = min(after)[1]
        if mode == "ignore":
            return None
        return 0 if mode == "negative" else -1 if mode == "uncertain" or table == "hedged" else 1


class Plain:
    def __init__(self, path: str):
        self.texts = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        self.at = 0  # where `rate` goes on
        rules = Reader(tomllib.loads(lexicon.DEFAULT.read_text()))
        self.readers = {
            "rules": lambda text: rules.read(text)["state"],
            "regex": Regex(lexicon.load()).read,
        }

    def states(self, name: str, kind: str, n: int) -> dict:
        """States [n, 14] of the first n reports."""
        return {"states": [list(self.readers[name](text)) for text in self.texts[kind][:n]]}

    def rate(self, name: str, kind: str, seconds: float) -> dict:
        """Reports a second, over about `seconds`; goes on where the last call stopped."""
        read, texts, done = self.readers[name], self.texts[kind], 0
        start, cpu = time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - start) < seconds:
            at = (self.at + done) % len(texts)
            for text in texts[at : at + CHUNK]:
                read(text)
            done += CHUNK
        self.at += done
        return {"rate": done / passed, "cores": (time.process_time() - cpu) / passed}


if __name__ == "__main__":
    plain = Plain(sys.argv[1])
    serve({"states": plain.states, "rate": plain.rate})
