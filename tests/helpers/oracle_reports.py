"""A plain Python reader of reports, written from docs/report_parser.md alone: the oracle and the peer of the device's.

It shares no code with the parser that it checks: only the list of the 14 labels. The sections are those of that page.
One regular expression finds the words of a text; a walk from the right through a trie of words finds its phrases.
"""

import itertools
import re

from cxr_jax.labels.taxonomy import CHEXPERT_14

AFFIRMED, DENIED, HEDGED, UNMENTIONED = 1, 0, -1, -2
STRENGTH = {AFFIRMED: 3, HEDGED: 2, DENIED: 1, UNMENTIONED: 0}
CHILDREN = {
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
    "Lung Opacity": ("Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"),
}

# Section 1. Breaks with nothing between them are as good as one, so one is looked for at each newline: there is one if,
# before the next word or token, another newline (the end of a blank line) or a bullet follows. A break before the first
# word of a text changes nothing, so the first line needs no case of its own.
BREAK = "\n"
TOKENS = re.compile(
    r"[a-z0-9]+(?:(?<=[0-9])\.(?=[0-9])[a-z0-9]+)*|[.?!;:,/]|\n(?=[^a-z0-9.?!;:,/\n*-]*[\n*-])"
)

# Section 2. One element of a phrase, with what has to stand between it and the next one, and what its words may be.
ELEMENT = re.compile(r"(?:\(([^()]*)\)|<([^<>]*)>|([^\s()<>|]+))(?: (?! |\Z)|\Z)")
PLAIN = re.compile(r"[a-z0-9]+(?:(?<=[0-9])\.(?=[0-9])[a-z0-9]+)*")
STEM = re.compile(PLAIN.pattern + r"\*")
WRITTEN, SEVERAL, START = range(
    3
)  # how a phrase has a word: written out, as one of several, as a stem

(
    MENTION,
    DENIAL,
    SUBJECT,
    QUALITY,
    BEFORE,
    AFTER,
    AROUND,
    SIDE,
    SIDE_STOP,
    HEADING,
    STOP,
    COMMA,
    NOTHING,
) = range(13)
NEGATIVE, UNCERTAIN, IGNORE = 1, 2, 3  # 0 is no cue
CUES = {"negative": NEGATIVE, "uncertain": UNCERTAIN, "ignore": IGNORE}
# Section 4: the state of a mention by the number of the cue that it follows. None: the mention is dropped.
BY_CUE = {
    "findings": (AFFIRMED, DENIED, HEDGED, None),
    "hedged": (HEDGED, DENIED, HEDGED, None),
    "denied": (DENIED, DENIED, DENIED, DENIED),
}
QUALITIES = {"normal": DENIED, "abnormal": AFFIRMED, "borderline": HEDGED}
SIDES = ("right", "left", "both")
SIDELESS = frozenset(("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Other"))
STOPS = {"sentence": (STOP, True), "clause": (STOP, False)} | {
    f"clause_{side}": (SIDE_STOP, side) for side in SIDES
}
WORDS_KEPT = (
    1 << 16
)  # words that a state of the walk remembers; what comes after is worked out anew


def tokens(text):
    """The words and tokens of a text (`str` or UTF-8 `bytes`), a break as a newline."""
    if isinstance(text, str):
        # A lone surrogate has no UTF-8; as three bytes above 127 it separates, like any other non-ASCII.
        text = text.encode("utf-8", "surrogatepass")
    return TOKENS.findall(text.lower().decode("latin-1"))  # `bytes.lower` folds ASCII only


def expansions(phrase, classes):
    """All that a phrase stands for: tuples of (word, token or stem without its star; `WRITTEN`, `SEVERAL` or `START`).

    `ValueError` if the phrase is not written as section 2 has it.
    """
    choices, at = [], 0
    while at < len(phrase):
        found = ELEMENT.match(phrase, at)
        if found is None:
            raise ValueError(f"cannot read the phrase {phrase!r} at {phrase[at:]!r}")
        group, name, word = found.groups()
        if group is not None:
            parts = group.split("|")
            # Of at least two plain words each is one of several; other alternatives are as outside of a group.
            plain = {part for part in parts if PLAIN.fullmatch(part)}
            several = plain if len(plain) > 1 else ()
            choices.append([])
            for part in parts:
                choices[-1] += (
                    [((part, SEVERAL),)] if part in several else expansions(part, classes)
                )
        elif name is not None:
            if name not in classes:
                raise ValueError(f"no class {name!r}, in the phrase {phrase!r}")
            if not all(map(PLAIN.fullmatch, classes[name])):
                raise ValueError(f"the class {name!r} is not of plain words")
            choices.append([((word, SEVERAL),) for word in classes[name]])
        elif STEM.fullmatch(word):
            choices.append([((word[:-1], START),)])
        elif PLAIN.fullmatch(word) or word in tuple(".?!;:,/"):
            choices.append([((word, WRITTEN),)])
        else:
            raise ValueError(f"{word!r} is no word, stem or token, in the phrase {phrase!r}")
        at = found.end()
    return [tuple(itertools.chain.from_iterable(parts)) for parts in itertools.product(*choices)]


def entries(lexicon):
    """((table, key), phrases, meaning) of all entries; a meaning: (kind, value). `ValueError` on what is unknown."""

    def names(key):
        labels = tuple(sorted({part.strip() for part in key.split(",")}))
        for label in labels:
            if label != "Other" and label not in CHEXPERT_14:
                raise ValueError(f"{label!r} is no label")
        return labels

    def cue(key):
        kind, _, where = key.rpartition("_")
        return {"before": BEFORE, "after": AFTER, "around": AROUND}[where], CUES[kind]

    meanings = {
        "findings": lambda key: (MENTION, (names(key), BY_CUE["findings"])),
        "denials": lambda key: (DENIAL, (names(key), BY_CUE["findings"])),
        "hedged": lambda key: (MENTION, (names(key), BY_CUE["hedged"])),
        "denied": lambda key: (MENTION, (names(key), BY_CUE["denied"])),
        "subjects": lambda key: (SUBJECT, names(key)),
        "qualities": lambda key: (QUALITY, QUALITIES[key]),
        "cues": cue,
        "sides": lambda key: (SIDE, SIDES[SIDES.index(key)]),
        "headings": lambda key: (HEADING, SIDES[SIDES.index(key)]),
        "stops": STOPS.__getitem__,
        "commas": lambda key: (COMMA, {"comma": None}[key]),
        "nothing": lambda key: (NOTHING, {"phrases": None}[key]),
    }
    for table, content in lexicon.items():
        if table == "classes":
            continue
        if table not in meanings:
            raise ValueError(f"no table [{table}]")
        for key, phrases in content.items():
            try:
                meaning = meanings[table](key)
            except (KeyError, ValueError) as error:
                raise ValueError(f"[{table}] has no {key!r}") from error
            yield (table, key), phrases, meaning


class Node:
    """A node of the trie of expansions, the last word first: what ends (starts, in the text) here, and what goes on."""

    __slots__ = ("entry", "meaning", "next", "longest")

    def __init__(self):
        self.entry, self.meaning = None, None
        self.next = ({}, {}, {})  # by `WRITTEN`, `SEVERAL`, `START`: {word or stem: node}
        self.longest = 0  # of the stems, in letters


class State(dict):
    """All nodes that some words lead to, the most specific first; as a dict, from the next word to a state or None.

    One word can be written out, one of several, and begin with stems: hence several nodes, worked out when the word is
    first met here.
    """

    __slots__ = ("nodes", "meaning")

    def __init__(self, nodes):
        self.nodes = nodes
        self.meaning = next((n.meaning for n in nodes if n.meaning is not None), None)

    def __missing__(self, word):
        nodes = []
        for node in self.nodes:
            written, several, stems = node.next
            nodes += [there[word] for there in (written, several) if word in there]
            starts = (word[:end] for end in range(min(len(word), node.longest), 0, -1))
            nodes += [
                stems[start] for start in starts if start in stems
            ]  # of letters and digits: none begins a token
        state = State(nodes) if nodes else None
        if len(self) < WORDS_KEPT:
            self[word] = state
        return state


class Reader:
    """Reads reports with a lexicon (a dict as `tomllib` gives it). `ValueError` on a lexicon that the page refuses."""

    def __init__(self, lexicon):
        classes, root, self.expansions = lexicon.get("classes", {}), Node(), 0
        for entry, phrases, meaning in entries(lexicon):
            for phrase in phrases:
                for words in expansions(phrase, classes):
                    self._add(root, words, entry, meaning)
        self.root = State([root])
        self.root[BREAK] = State([])  # section 3: a break is a sentence end, and part of no phrase
        self.root[BREAK].meaning = (STOP, True)

    def _add(self, root, words, entry, meaning):
        if not words:  # no token to end at
            return
        node = root
        for word, how in reversed(words):
            if how == START:
                node.longest = max(node.longest, len(word))
            node = node.next[how].setdefault(word, Node())
        if node.entry is not None and node.meaning != meaning:
            said = " ".join(word + "*" * (how == START) for word, how in words)
            raise ValueError(f"clash: {said!r} is in {node.entry} and in {entry}")
        self.expansions += node.entry is None
        node.entry, node.meaning = entry, meaning

    def phrases(self, text):
        """The meanings (kind, value) of a text's phrases, from the right; the start of the text is a sentence end."""
        root, words, out = self.root, [BREAK], []
        words += tokens(text)
        at = len(words) - 1
        while at >= 0:
            state, meaning, i, first = root[words[at]], None, at, at
            while state is not None:  # no state goes on over a break, so none over the one at 0
                if state.meaning is not None:
                    meaning, first = state.meaning, i
                i -= 1
                state = state[words[i]]
            if meaning is not None:
                out.append(meaning)
            at = first - 1
        return out

    def sentences(self, text):
        """Per sentence, in the order of the text, its mentions: lists [labels, state or None, side or None, sided].

        `sided` is False for mentions by a subject, and of labels without sides. A mention that is dropped has no state,
        one of a subject that stays open neither. A sentence without mentions is left out.
        """
        out, sentence, headings = [], [], []
        # `waiting` and `open_` ones wait for what stands to their left; the rest is what stands to the right.
        waiting, after = [], 0  # section 4: mentions that wait for P; A,
        close, around = False, False  # whether it is close, and whether it is an `_around` cue
        open_subjects, quality = [], None
        open_mentions, side, taken = [], None, False  # section 5
        for kind, value in self.phrases(text):
            if kind == SIDE or kind == SIDE_STOP:
                if open_mentions:
                    for mention in open_mentions:
                        mention[2] = value
                    open_mentions = []  # there is no current side where mentions are open
                    if kind == SIDE_STOP:
                        kind, value = STOP, False
                else:
                    side, taken = value, False
            elif (
                kind == DENIAL
            ):  # its cue comes after the mention: it is met first, and stands between mention and A
                for mention, by_cue, _ in waiting:
                    mention[1] = by_cue[NEGATIVE]
                waiting, after = [], 0
                open_mentions, side = [], None
                kind = MENTION
            if kind == MENTION:
                labels, by_cue = value
                mention = [labels, None, None, not SIDELESS.issuperset(labels)]
                sentence.append(mention)
                if after and (close or after == IGNORE):
                    mention[1] = by_cue[after]
                    if mention[1] is None:
                        continue
                else:
                    waiting.append((mention, by_cue, after))
                if not mention[3]:
                    pass
                elif side is None:
                    open_mentions.append(mention)
                else:
                    mention[2], taken = side, True
            elif kind == STOP or kind == HEADING:
                for mention, by_cue, a in waiting:
                    mention[1] = by_cue[a]
                waiting, after = [], 0
                open_subjects, quality = [], None
                open_mentions, side = [], None
                if kind == HEADING:
                    headings.append((value, len(sentence)))
                elif value:
                    # Headings come after the sides of all clauses; of two, the nearest one to the left of a mention.
                    done = 0
                    for heading, right_of_it in headings:
                        for mention in sentence[done:right_of_it]:
                            if mention[3] and mention[2] is None:
                                mention[2] = heading
                        done = right_of_it
                    if sentence:
                        out.append(sentence)
                    sentence, headings = [], []
            elif kind == BEFORE or kind == AROUND:
                for mention, by_cue, _ in waiting:
                    mention[1] = by_cue[value]
                around = close = kind == AROUND
                waiting, after = [], value if around else 0
                open_mentions, side = [], None
            elif kind == AFTER:
                after, close, around = value, True, False
            elif kind == COMMA:
                close = False
                if around:
                    after = 0
                if taken:
                    side = None
            elif kind == SUBJECT:
                mention = [value, quality, None, False]
                sentence.append(mention)
                if quality is None:
                    open_subjects.append(mention)
            elif kind == QUALITY:
                if open_subjects:
                    for mention in open_subjects:
                        mention[1] = value
                    open_subjects, quality = [], None
                else:
                    quality = value
        return out[::-1]

    def read(self, text, parents=False):
        """What a report (`str` or UTF-8 `bytes`) says, as a dict.

        `state`: 14 ints (1, 0, -1, -2), in the order of `CHEXPERT_14`. `right`, `left`: 14 bools, whether a mention
        with that state has the side. `claims`: per sentence with any mention that has a state, in order, the set of its
        (label, state, side), side None, "right", "left" or "both". `parents` changes the states of parents only.
        """
        claims, sides = [], {}  # sides: {label: {state: set of sides}}
        for sentence in self.sentences(text):
            said = {
                (label, state, None if label in SIDELESS else side)
                for labels, state, side, _ in sentence
                if state is not None
                for label in labels
            }
            if said:
                claims.append(said)
            for label, state, side in said:
                sides.setdefault(label, {}).setdefault(state, set()).add(side)
        # Section 6.
        abnormal = any(
            AFFIRMED in states or HEDGED in states
            for label, states in sides.items()
            if label not in ("No Finding", "Support Devices")
        )
        states, right, left = [], [], []
        for label in CHEXPERT_14:
            # Mentions of No Finding count only as "says anything": they decide neither its state nor its sides.
            said = {} if label == "No Finding" else sides.get(label)
            state = max(said, key=STRENGTH.__getitem__) if said else UNMENTIONED
            where = said[state] if said else ()
            states.append(state)
            right.append("right" in where or "both" in where)
            left.append("left" in where or "both" in where)
        states[0] = AFFIRMED if claims and not abnormal else UNMENTIONED
        if parents:
            own = dict(zip(CHEXPERT_14, states, strict=True))
            for parent, children in CHILDREN.items():
                counting = [own[child] for child in children if own[child] in (AFFIRMED, HEDGED)]
                states[CHEXPERT_14.index(parent)] = max(
                    [own[parent], *counting], key=STRENGTH.__getitem__
                )
        return {"state": states, "right": right, "left": left, "claims": claims}

    def labels(self, text, parents=False):
        """The 14 states of a report, as `read` gives them."""
        return self.read(text, parents)["state"]
