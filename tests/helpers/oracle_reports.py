"""A plain Python reader of reports, written from docs/report_parser.md alone: the oracle and the peer of the device's.

It shares no code with the parser that it checks: only the list of the 14 labels. The sections are those of that page.
oracle_tokens.py finds the words of a text; a walk from the right through a trie of words finds its phrases.
"""

import itertools
import re
import string

from oracle_tokens import BREAK, FOREIGN, PLAIN, abbreviations, tokens

from cxr_jax.labels.taxonomy import CHEXPERT_14

AFFIRMED, DENIED, HEDGED, UNMENTIONED = 1, 0, -1, -2
STRENGTH = {AFFIRMED: 3, HEDGED: 2, DENIED: 1, UNMENTIONED: 0}
CHILDREN = {
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
    "Lung Opacity": ("Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"),
}
DEVICES = "Support Devices"

# Section 2. One element of a phrase, with what has to stand between it and the next one, and what its words may be.
ELEMENT = re.compile(r"(?:\(([^()]*)\)|<([^<>]*)>|([^\s()<>|]+|\|))(?: (?! |\Z)|\Z)")
STEM = re.compile(PLAIN.pattern + r"\*")
TOKENS = frozenset(".?!;:,/|¿+-–^~")
# How a phrase has a word: as it is, as one of several, as a stem, dashed.
WRITTEN, SEVERAL, START, DASHED = range(4)

(
    MENTION, DENIAL, SUBJECT, QUALITY, BEFORE, AFTER, AROUND, FIELD, STATEMENT, VALUE, QUESTION, PART, SIDE, SIDE_STOP,
    HEADING, STOP, COMMA, NOTHING,
) = range(18)  # fmt: skip
NEGATIVE, UNCERTAIN, IGNORE, POSITIVE = 1, 2, 3, 4  # 0 is no cue, or one that changes nothing
CUES = {"negative": NEGATIVE, "uncertain": UNCERTAIN, "ignore": IGNORE}
ANSWERS = CUES | {"positive": POSITIVE}
# Section 4: the state of a mention by the number of the cue that it follows. None: the mention is dropped.
BY_CUE = {
    "findings": (AFFIRMED, DENIED, HEDGED, None, AFFIRMED),
    "hedged": (HEDGED, DENIED, HEDGED, None, HEDGED),
    "denied": (DENIED, DENIED, DENIED, DENIED, DENIED),
}
QUALITIES = {"normal": DENIED, "abnormal": AFFIRMED, "borderline": HEDGED}
SIDES = ("right", "left", "both")
SIDELESS = frozenset(("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Other"))
STOPS = {"sentence": (STOP, True), "clause": (STOP, False)} | {
    f"clause_{side}": (SIDE_STOP, side) for side in SIDES
}
LISTS = ("hanging", "abbreviated", "near", "english", "foreign", "known")
NO_PHRASES = ("classes", "groups", "words")
WORDS_KEPT = 1 << 16  # words that are remembered; what comes after is worked out anew


def expansions(phrase, classes, groups=None):
    """All that a phrase stands for: tuples of (word, token or stem without its star; `WRITTEN`, `SEVERAL`, `START` or
    `DASHED`). The groups are lists of such tuples.

    `ValueError` if the phrase is not written as section 2 has it.
    """
    choices, at, groups = [], 0, groups or {}
    while at < len(phrase):
        found = ELEMENT.match(phrase, at)
        if found is None:
            raise ValueError(f"cannot read the phrase {phrase!r} at {phrase[at:]!r}")
        group, name, word = found.groups()
        if group is not None:
            parts = group.split("|")
            # Of at least two plain words each is one of several; other alternatives are as outside of a group.
            plain = {part: None for part in parts if PLAIN.fullmatch(part)}
            several = plain if len(plain) > 1 else {}
            rest = [part for part in parts if part not in several]
            choices.append([((part, SEVERAL),) for part in several])
            choices[-1] += [words for part in rest for words in expansions(part, classes, groups)]
        elif name == "end":
            choices.append([((BREAK, WRITTEN),)])
        elif name is not None:
            if name not in classes and name not in groups:
                raise ValueError(f"no class or earlier group {name!r}, in the phrase {phrase!r}")
            choices.append(
                groups[name] if name in groups else [((word, SEVERAL),) for word in classes[name]]
            )
        elif STEM.fullmatch(word):
            choices.append([((word[:-1], START),)])
        elif PLAIN.fullmatch(word) or word in TOKENS:
            choices.append([((word, WRITTEN),)])
        elif word[0] == "-" and PLAIN.fullmatch(word[1:]):
            choices.append([((word[1:], DASHED),)])
        else:
            raise ValueError(f"{word!r} is no word, stem or token, in the phrase {phrase!r}")
        at = found.end()
    out = [tuple(itertools.chain.from_iterable(parts)) for parts in itertools.product(*choices)]
    if "<" in phrase and any((BREAK, WRITTEN) in words[:-1] for words in out):
        raise ValueError(f"a break is not the last of the phrase {phrase!r}")
    return out


def named(lexicon):
    """The classes and the (expanded) groups of a lexicon. `ValueError` if they are not as section 2 has them."""
    classes, groups = lexicon.get("classes", {}), {}
    for table in (classes, lexicon.get("words", {})):
        for name, words in table.items():
            if not all(map(PLAIN.fullmatch, words)):
                raise ValueError(f"{name!r} is not of plain words")
    for name, phrases in lexicon.get("groups", {}).items():
        groups[name] = [
            words for phrase in phrases for words in expansions(phrase, classes, groups)
        ]
    if "end" in (*classes, *groups) or set(classes) & set(groups):
        raise ValueError("a name of a class or group means something else, too")
    for name in lexicon.get("words", {}):
        if name not in LISTS:
            raise ValueError(f"[words] has no {name!r}")
    return classes, groups


def entries(lexicon):
    """((table, key), phrases, meaning) of all entries; a meaning: (kind, value). `ValueError` on what is unknown."""

    def mention(key, by_cue):
        labels = tuple(sorted({part.strip() for part in key.split(",")}))
        for label in labels:
            if label != "Other" and label not in CHEXPERT_14:
                raise ValueError(f"{label!r} is no label")
        return labels, by_cue

    def cue(key):
        if key == "field_name":
            return STATEMENT, IGNORE
        name, _, where = key.rpartition("_")
        kind = {"before": BEFORE, "after": AFTER, "around": AROUND, "field": FIELD}[where]
        return kind, CUES[name]

    meanings = {
        "findings": lambda key: (MENTION, mention(key, BY_CUE["findings"])),
        "denials": lambda key: (DENIAL, mention(key, BY_CUE["findings"])),
        "hedged": lambda key: (MENTION, mention(key, BY_CUE["hedged"])),
        "denied": lambda key: (MENTION, mention(key, BY_CUE["denied"])),
        "subjects": lambda key: (SUBJECT, mention(key, None)[0]),
        "qualities": lambda key: (QUALITY, QUALITIES[key]),
        "cues": cue,
        "values": lambda key: (VALUE, ANSWERS[key]),
        "questions": lambda key: (QUESTION, {"question": UNCERTAIN}[key]),
        "parts": lambda key: {"after": (AFTER, 0), "before": (PART, None)}[key],
        "sides": lambda key: (SIDE, SIDES[SIDES.index(key)]),
        "headings": lambda key: (HEADING, SIDES[SIDES.index(key)]),
        "stops": STOPS.__getitem__,
        "commas": lambda key: (COMMA, {"comma": None}[key]),
        "nothing": lambda key: (NOTHING, {"phrases": None}[key]),
    }
    for table, content in lexicon.items():
        if table in NO_PHRASES:
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
        self.next = ({}, {}, {}, {})  # by how a phrase has a word: {word or stem: node}
        self.longest = 0  # of the stems, in letters

    def follow(self, word, how=WRITTEN):
        """The nodes of all that fits each word which a phrase can have so, the most specific first."""
        written, several, stems, dashed = self.next
        out = [dashed[word]] if how == DASHED and word in dashed else []
        if how != START:
            out += [there[word] for there in (written, several) if word in there]
        starts = (word[:end] for end in range(min(len(word), self.longest), 0, -1))
        return out + [stems[start] for start in starts if start in stems]


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
        dashed = len(word) > 1 and word[0] == "-"
        how, plain = (DASHED, word[1:]) if dashed else (WRITTEN, word)
        nodes = [found for node in self.nodes for found in node.follow(plain, how)]
        state = State(nodes) if nodes else None
        if len(self) < WORDS_KEPT:
            self[word] = state
        return state


class Mended(dict):
    """From a word, dashed or not, or token to what it is read as (section 2)."""

    def __init__(self, patterns, near):
        self.known = {word for word, how in patterns if how != START}
        self.stems = {word for word, how in patterns if how == START}
        self.near = {word: i for i, word in reversed([*enumerate(near)]) if word.isalpha()}
        self.longest = max(map(len, self.near), default=-1) + 1

    def fits(self, word):
        """Whether any pattern of the lexicon fits a word."""
        return word in self.known or any(word[: i + 1] in self.stems for i in range(len(word)))

    def __missing__(self, word):
        dash, plain = ("-", word[1:]) if len(word) > 1 and word[0] == "-" else ("", word)
        out = word
        letters = plain.isascii() and plain.isalpha() and len(plain) <= self.longest
        if letters and not self.fits(plain):
            cut = [(plain[:i], plain[i:]) for i in range(len(plain) + 1)]
            slips = {a + b[1:] for a, b in cut} | {a + b[1::-1] + b[2:] for a, b in cut}
            for letter in string.ascii_lowercase:
                slips.update(a + letter + rest for a, b in cut for rest in (b, b[1:]))
            found = slips & self.near.keys()
            out = dash + min(found, key=self.near.__getitem__) if found else word
        if len(self) < WORDS_KEPT:
            self[word] = out
        return out


class Reader:
    """Reads reports with a lexicon (a dict as `tomllib` gives it). `ValueError` on a lexicon that the page refuses."""

    def __init__(self, lexicon):
        classes, groups = named(lexicon)
        lists = {name: lexicon.get("words", {}).get(name, ()) for name in LISTS}
        root, self.expansions, clashes = Node(), 0, []
        # What fits a word (section 2), used in a phrase or not.
        patterns = {*itertools.chain(*itertools.chain(*groups.values()))}
        patterns |= {
            (word, SEVERAL) for word in itertools.chain(*classes.values(), *lists.values())
        }
        stop = ("stops", "sentence"), STOPS["sentence"]  # section 3: a break is a sentence end
        self._add(root, ((BREAK, WRITTEN),), *stop, clashes)
        for entry, phrases, meaning in entries(lexicon):
            for phrase in phrases:
                for words in expansions(phrase, classes, groups):
                    patterns.update(words)
                    self._add(root, words, entry, meaning, clashes)
        for node, words, said in clashes:
            if self._best(root, words) is node:
                raise ValueError(said)
        self.expansions -= 1  # the break is none of the lexicon's
        self.root, self.mended = State([root]), Mended(patterns, lists["near"])
        # Words stand among the tokens dashed or not.
        either = lambda name: frozenset(dash + word for word in lists[name] for dash in ("", "-"))
        self.foreign, self.english = either("foreign"), either("english")
        self.hanging = frozenset(lists["hanging"])
        self.abbreviated = frozenset(lists["abbreviated"])

    def _add(self, root, words, entry, meaning, clashes):
        if not words:  # no token to end at
            return
        if meaning[0] == VALUE:  # the stop is of sentences or clauses by the last token
            meaning = VALUE, (meaning[1], words[-1][0] in (".", "!", "?", BREAK))
        node = root
        for word, how in reversed(words):
            if how == START:
                node.longest = max(node.longest, len(word))
            there = node.next[how]
            node = there.get(word) or there.setdefault(word, Node())
        if node.entry is not None and node.meaning != meaning:
            said = " ".join(
                "-" * (how == DASHED) + word + "*" * (how == START) for word, how in words
            )
            clashes.append((node, words, f"clash: {said!r} is in {node.entry} and in {entry}"))
        self.expansions += node.entry is None
        node.entry, node.meaning = entry, meaning

    def _best(self, root, words):
        """The node of the most specific of the phrases that fit whatever these words do."""
        nodes = [root]
        for word, how in reversed(words):
            nodes = [found for node in nodes for found in node.follow(word, how)]
        return next(node for node in nodes if node.entry is not None)

    def words(self, text):
        """The tokens of a text, misspellings mended."""
        return [*map(self.mended.__getitem__, tokens(text, self.hanging, self.abbreviated))]

    def phrases(self, text):
        """The meanings (kind, value) of a text's phrases, from the right; the start of the text is a sentence end."""
        return self._phrases(self.words(text))

    def _phrases(self, words):
        root, words, out = self.root, ["", *words], []  # no phrase goes on over the start
        at = len(words) - 1
        while at > 0:
            state, meaning, i, first = root[words[at]], None, at, at
            while state is not None:
                if state.meaning is not None:
                    meaning, first = state.meaning, i
                i -= 1
                state = state[words[i]]
            if meaning is not None:
                out.append(meaning)
            at = first - 1
        out.append(STOPS["sentence"])
        return out

    def sentences(self, text):
        """Per sentence, in the text's order, its mentions: lists [labels, state or None, side or None, sided, part].

        `sided` is False for mentions by a subject, and of labels without sides. A mention that is dropped has no state,
        one of a subject that stays open neither. `part`: its Support Devices are affirmed, whatever its state. A
        sentence without mentions is left out.
        """
        return self._sentences(self._phrases(self.words(text)))

    def _sentences(self, phrases):
        out, sentence, headings = [], [], []
        # `waiting` and `open_` ones wait for what stands to their left; the rest is what stands to the right.
        waiting, after = [], 0  # section 4: mentions that wait for P; A,
        close = around = field = False  # whether it is close, an `_around` cue, of a `_field`
        devices = []  # mentions that wait for [parts] before
        reach, under, names = (
            set(),
            set(),
            None,
        )  # labels since the last cue or stop; of that cue; of a field's name
        open_subjects, quality = [], None
        open_mentions, side, taken = [], None, False  # section 5
        kinds_behind = [NOTHING, *(kind for kind, _ in phrases)]
        for (kind, value), behind in zip(phrases, kinds_behind, strict=False):
            if kind == SIDE or kind == SIDE_STOP:
                if open_mentions:
                    for mention in open_mentions:
                        mention[2] = value
                    open_mentions = []  # there is no current side where mentions are open
                    if kind == SIDE_STOP:
                        kind, value = STOP, False
                else:
                    side, taken = value, False
            elif kind == DENIAL:
                # Its cue comes after the mention: it is met first, and stands between mention and A.
                for mention, by_cue, _ in waiting:
                    mention[1] = by_cue[NEGATIVE]
                waiting, after, devices, reach = [], 0, [], set()
                open_mentions, side = [], None
                kind = MENTION
            if kind == MENTION:
                labels, by_cue = value
                mention = [labels, None, None, not SIDELESS.issuperset(labels), False]
                sentence.append(mention)
                reached = after
                if field and (names.isdisjoint(labels) if names else labels == (DEVICES,)):
                    reached = 0
                if field:  # for the nearest mention only
                    after, field = 0, False
                if reached and (close or reached == IGNORE):
                    mention[1] = by_cue[reached]
                    if mention[1] is None:
                        continue
                else:
                    waiting.append((mention, by_cue, reached))
                reach.update(labels)
                if DEVICES in labels:
                    devices.append(mention)
                if not mention[3]:
                    pass
                elif side is None:
                    open_mentions.append(mention)
                else:
                    mention[2], taken = side, True
            elif kind == STOP or kind == HEADING or kind == VALUE or kind == QUESTION:
                for mention, by_cue, a in waiting:
                    mention[1] = by_cue[a]
                waiting, devices, after, close, around, field = [], [], 0, False, False, False
                reach = set()
                open_subjects, quality = [], None
                open_mentions, side = [], None
                ends = kind == QUESTION or value is True
                if kind == VALUE:
                    (after, ends), close = value, True
                elif kind == QUESTION:
                    after = value
                if kind == HEADING:
                    headings.append((value, len(sentence)))
                elif ends:
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
            elif kind == BEFORE or kind == AROUND or kind == FIELD:
                for mention, by_cue, _ in waiting:
                    mention[1] = by_cue[value]
                around, field = kind == AROUND, kind == FIELD
                close, after = kind != BEFORE, {BEFORE: 0, AROUND: value, FIELD: IGNORE}[kind]
                waiting, devices, names = [], [], None
                under, reach = reach, set()
                open_mentions, side = [], None
            elif kind == AFTER:
                after, close, around, field = value, True, False, False
            elif kind == STATEMENT:
                if behind in (BEFORE, AROUND, FIELD) and under:
                    after, close, around, field, names = value, True, False, True, under
            elif kind == PART:
                for mention in devices:
                    mention[4] = True
                devices = []
            elif kind == COMMA:
                close = False
                if around or field:
                    after = 0
                if taken:
                    side = None
            elif kind == SUBJECT:
                mention = [value, quality, None, False, False]
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

    def _unread(self, text, words):
        """How many words of a text are left unread, and whether it is in another language (section 6)."""
        foreign = unread = sum(map(self.foreign.__contains__, words))
        for word in abbreviations(text):
            unread += self.mended[word] == word and not self.mended.fits(word)
        signs = 4 * foreign + words.count(FOREIGN)
        return unread, signs > 3 and signs > 2 * sum(map(self.english.__contains__, words))

    def read(self, text, parents=False):
        """What a report (`str` or UTF-8 `bytes`) says, as a dict.

        `state`: 14 ints (1, 0, -1, -2), in the order of `CHEXPERT_14`. `right`, `left`: 14 bools, whether a mention
        with that state has the side. `claims`: per sentence with any mention that has a state, in order, the set of its
        (label, state, side), side None, "right", "left" or "both". `other`: the state of `Other`. `unread`: how
        many words of it count as unread; `foreign`: whether it is in another language. `parents` changes the states of
        parents only.
        """
        words = self.words(text)
        unread, foreign = self._unread(text, words)
        claims, sides = [], {}  # sides: {label: {state: set of sides}}
        for sentence in self._sentences(self._phrases(words)):
            said = {
                (label, told, None if label in SIDELESS else side)
                for labels, state, side, _, part in sentence
                for label in labels
                for told in (AFFIRMED if part and label == DEVICES else state,)
                if told is not None and (told == DENIED or not foreign)
            }
            if said and not foreign:
                claims.append(said)
            for label, state, side in said:
                sides.setdefault(label, {}).setdefault(state, set()).add(side)
        # Section 6.
        abnormal = any(
            AFFIRMED in states or HEDGED in states
            for label, states in sides.items()
            if label not in ("No Finding", DEVICES)
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
        states[0] = AFFIRMED if claims and not abnormal and not unread else UNMENTIONED
        if parents:
            own = dict(zip(CHEXPERT_14, states, strict=True))
            for parent, children in CHILDREN.items():
                counting = [own[child] for child in children if own[child] in (AFFIRMED, HEDGED)]
                states[CHEXPERT_14.index(parent)] = max(
                    [own[parent], *counting], key=STRENGTH.__getitem__
                )
        said = {"state": states, "right": right, "left": left, "claims": claims}
        other = max(sides.get("Other", ()), key=STRENGTH.__getitem__, default=UNMENTIONED)
        return said | {"other": other, "foreign": foreign, "unread": unread}

    def labels(self, text, parents=False):
        """The 14 states of a report, as `read` gives them."""
        return self.read(text, parents)["state"]
