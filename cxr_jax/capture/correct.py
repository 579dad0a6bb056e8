"""What of a thought must be looked at before it is saved, what a doubted word may have been, and what was changed.

Three kinds of words decide a reading and are short, so that a speech model loses or swaps them: sides, negations and
numbers. They are marked whatever the model's confidence was, in typed text as well, and so is every word that the model
doubted. A mark goes away only when a person has looked at it.
"""

import collections
import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cxr_jax.capture import sounds
from cxr_jax.capture.transcribe import Word
from cxr_jax.errors import UserError

LEAST_CONFIDENCE = 0.6
DOUBT, SIDE, NEGATION, NUMBER, SOUND = REASONS = (
    "confidence",
    "side",
    "negation",
    "number",
    "sounds like",
)
MOST_PROPOSED = 60  # doubted words that are looked up at a time, from the first on
_MOST_PAIRS = (
    50_000  # of equal words in two texts: beyond, which nobody writes, they are compared as a whole
)
MOST_CHARACTERS = 20_000  # of a thought; 20 minutes of speech are about 18,000
# A word with the white space before it, so that what is added behind a text changes no word of it.
_TOKEN = re.compile(r"\s*\S+|\s+")
_WORD = re.compile(r"\S+")
_LETTERS = re.compile(r"[^a-z0-9.%]+")

# Words by which a side is said; "both" and "unilateral" decide as much as "left".
_SIDES = frozenset(
    "right left bilateral bilaterally both either unilateral ipsilateral contralateral rightward leftward "
    "right-sided left-sided lt rt rul rml rll lul lll lingula lingular hemithorax-right hemithorax-left".split()
)
# "free", "clear" and "rather" deny what stands behind or before them ("clear of effusion", "rather than").
_NEGATIONS = frozenset(
    "no not without nor neither none never nothing absent absence negative denies deny free clear excluded excludes "
    "exclude unlikely resolved cannot can't isn't aren't wasn't weren't doesn't don't didn't hasn't haven't hadn't "
    "won't couldn't wouldn't lack lacks lacking rather".split()
)
# Digits are numbers as they are; these are the others. Levels, sizes and counts hang on them.
_NUMBERS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred half quarter third fourth fifth "
    "sixth seventh eighth ninth tenth first second single double few several".split()
)
# What a speech model writes where one of the above was said.
_SOUND_ALIKES = {
    "know": "no",
    "known": "no",
    "knot": "not",
    "nought": "not",
    "write": "right",
    "rite": "right",
    "wright": "right",
    "lift": "left",
    "laughed": "left",
    "bare": "bilateral",
    "won": "one",
    "to": "two",
    "too": "two",
    "for": "four",
    "ate": "eight",
}
# Words so common that their other sense is asked of the model's doubt alone.
_COMMON_ALIKES = frozenset(("to", "too", "for", "known", "bare"))

# ---- Words of a text -------------------------------------------------------------------------------


class Mark(NamedTuple):
    """A word that must be looked at.

    Attributes:
        word: its number among the words of the text, from 0.
        start, end: its place in the text, in characters.
        text: as it stands there.
        reasons: of REASONS.
    """

    word: int
    start: int
    end: int
    text: str
    reasons: tuple[str, ...]


class Proposal(NamedTuple):
    """What some words may have been: words `first` up to and with `last`, and the word proposed for them."""

    first: int
    last: int
    text: str
    likeness: float


class _Place(NamedTuple):
    text: str
    start: int
    end: int


def check_text(text: Any) -> str:
    """Return a thought that can be kept.

    Raises:
        UserError: for what is no text, is too long, holds half a character or a control character.
    """
    # All that a client sends in this place may be anything.
    if not isinstance(text, str):
        raise UserError("the text is not a text")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"a thought has at most {MOST_CHARACTERS:,} characters")
    # JSON can spell what no file in UTF-8 holds.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the text holds half a character (a lone surrogate)") from None
    # A terminal that shows a row would obey it.
    if any(ord(letter) < 32 and letter not in "\n\t" or ord(letter) == 127 for letter in text):
        raise UserError("the text holds a control character")
    return text


def words_of(text: str) -> list[_Place]:
    """Cut a text at white space."""
    return [_Place(found.group(), found.start(), found.end()) for found in _WORD.finditer(text)]


def _plain(word: str) -> str:
    """A word in lower case, without the marks around it."""
    return _LETTERS.sub("", word.lower().replace("\u2019", "'").strip(".,;:!?()[]\"'"))


def _parts(word: str) -> list[str]:
    """A word and, of one with dashes or strokes, its parts: "left-sided", "right/left"."""
    lowered = word.lower().replace("\u2019", "'").strip(".,;:!?()[]\"'")
    return [lowered, *re.split(r"[-/\u2013]+", lowered)]


def fixed_reasons(word: str) -> list[str]:
    """Say why a word is marked whoever wrote it: a side, a negation, a number, or what sounds like one."""
    # "left-sided" is a side, and "4.5cm" a number: parts of a word count.
    parts = _parts(word)
    reasons = []
    if any(part in _SIDES for part in parts):
        reasons.append(SIDE)
    if any(part in _NEGATIONS for part in parts):
        reasons.append(NEGATION)
    if any(part in _NUMBERS or any(map(str.isdigit, part)) for part in parts):
        reasons.append(NUMBER)
    return reasons


# ---- Marks -----------------------------------------------------------------------------------------


def heard_confidence(text: str, heard: Sequence[Word]) -> list[float | None]:
    """Give each word of a text the model's confidence in it, None for one that was typed.

    Words that still stand as they were heard keep their doubt; what a person wrote in their place has none.
    """
    placed_words = words_of(text)
    confidence: list[float | None] = [None] * len(placed_words)
    # A word as it was heard may be several of the text, for a script may write what it will.
    heard_words = [(part.text, word.probability) for word in heard for part in words_of(word.text)]
    spoken = [word for word, _ in heard_words]
    written = [placed_word.text for placed_word in placed_words]
    # By their order, and not by the words alone: a "no" that was typed is not the "no" that was heard elsewhere.
    for change_kind, heard_start, heard_end, text_start, _ in _compare(spoken, written):
        if change_kind == "equal":
            for offset in range(heard_end - heard_start):
                confidence[text_start + offset] = heard_words[heard_start + offset][1]
    return confidence


def _compare(
    old_words: Sequence[str], new_words: Sequence[str]
) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield what is equal and what is not, as `SequenceMatcher.get_opcodes` does, in a time that has a bound."""
    # What is the same at both ends costs nothing; a reader changes a few words in the middle.
    shorter = min(len(old_words), len(new_words))
    first = next((i for i in range(shorter) if old_words[i] != new_words[i]), shorter)
    rest = shorter - first
    last = next((i for i in range(rest) if old_words[-1 - i] != new_words[-1 - i]), rest)
    if first:
        yield "equal", 0, first, 0, first
    # What is left between them is compared by difflib, whose time grows with the pairs of equal words, cubed at worst.
    middle = old_words[first : len(old_words) - last]
    other = new_words[first : len(new_words) - last]
    counts = collections.Counter(middle)
    if sum(counts[word] for word in other) > _MOST_PAIRS:
        yield "replace", first, len(old_words) - last, first, len(new_words) - last
    else:
        matcher = difflib.SequenceMatcher(None, middle, other, autojunk=False)
        for change_kind, old_start, old_end, new_start, new_end in matcher.get_opcodes():
            # Its numbers count from the middle's first word.
            yield (
                change_kind,
                old_start + first,
                old_end + first,
                new_start + first,
                new_end + first,
            )
    if last:
        yield "equal", len(old_words) - last, len(old_words), len(new_words) - last, len(new_words)


def find_marks(text: str, heard: Sequence[Word] = ()) -> list[Mark]:
    """Find the words of a text that must be looked at, in their order."""
    found_marks = []
    confidences = heard_confidence(text, heard)
    for number, (placed_word, confidence) in enumerate(
        zip(words_of(text), confidences, strict=True)
    ):
        reasons = fixed_reasons(placed_word.text)
        is_doubted = confidence is not None and confidence < LEAST_CONFIDENCE
        if is_doubted:
            reasons.append(DOUBT)
        # Typed words are what they are; of a heard one the other word of that sound may have been meant.
        plain_word = _plain(placed_word.text)
        if confidence is not None and _sounds_alike(plain_word, is_doubted):
            reasons.append(SOUND)
        if reasons:
            found_marks.append(
                Mark(number, placed_word.start, placed_word.end, placed_word.text, tuple(reasons))
            )
    return found_marks


def unseen(found_marks: Iterable[Mark], looked: Collection[int]) -> list[Mark]:
    """Return the marks whose words nobody has looked at.

    Args:
        looked: numbers of words.
    """
    return [mark for mark in found_marks if mark.word not in looked]


def find_proposals(text: str, heard: Sequence[Word] = ()) -> list[Proposal]:
    """Propose words of radiology for those that the model doubted, and for typed ones that nobody knows.

    Nothing is applied. Doubted neighbours are tried together, up to three: a model cuts what it does not know.
    """
    placed_words = words_of(text)
    confidences = heard_confidence(text, heard)
    plain_words = [_plain(placed_word.text) for placed_word in placed_words]
    # Whether a word may be part of a slip: doubted, or typed (without any confidence) and unknown.
    doubted = [
        (confidence is None and plain_word not in sounds.known_words())
        or (confidence is not None and confidence < LEAST_CONFIDENCE)
        for confidence, plain_word in zip(confidences, plain_words, strict=True)
    ]
    proposals: list[Proposal] = []
    for first in [number for number in range(len(placed_words)) if doubted[number]][:MOST_PROPOSED]:
        for last in range(first, min(first + 3, len(placed_words))):
            if not all(doubted[first : last + 1]):
                break
            for word, likeness in sounds.propose(plain_words[first : last + 1]):
                proposals.append(Proposal(first, last, word, likeness))
            # A slip does not reach over the end of a sentence.
            if placed_words[last].text[-1] in ".!?":
                break
    # Short words are in no dictionary of findings: "know" may have been "no".
    for number, plain_word in enumerate(plain_words):
        if confidences[number] is not None and _sounds_alike(plain_word, doubted[number]):
            proposals.append(Proposal(number, number, _SOUND_ALIKES[plain_word], 1.0))
    return sorted(proposals, key=lambda proposal: (proposal.first, proposal.last))


def _sounds_alike(plain_word: str, is_doubted: bool) -> bool:
    return plain_word in _SOUND_ALIKES and (is_doubted or plain_word not in _COMMON_ALIKES)


# ---- What was changed ------------------------------------------------------------------------------


def find_operations(before: str, after: str) -> list[dict[str, Any]]:
    """List what makes one text the other: by words, as insert, delete and replace, from left to right.

    Returns:
        Objects {op, at, before, after}; `at` is the place in the earlier text, in characters. Of an insertion `before`
        is empty, of a deletion `after`.
    """
    # Words with the space before them: put together again they are the texts, to the letter.
    old_words, new_words = _TOKEN.findall(before), _TOKEN.findall(after)
    starts = [0]
    for token in old_words:
        starts.append(starts[-1] + len(token))
    operations = []
    for change_kind, old_start, old_end, new_start, new_end in _compare(old_words, new_words):
        if change_kind == "equal":
            continue
        operations.append(
            {
                "op": change_kind,
                "at": starts[old_start],
                "before": "".join(old_words[old_start:old_end]),
                "after": "".join(new_words[new_start:new_end]),
            }
        )
    return operations


def apply_operations(before: str, operations: Sequence[Mapping[str, Any]]) -> str:
    """Make the later text of the earlier one and what `find_operations` found.

    Raises:
        UserError: where the earlier text is another one.
    """
    parts, copied_until = [], 0
    for operation in operations:
        start_place, removed = operation["at"], operation["before"]
        end_place = start_place + len(removed)
        # They stand in their order, and each names what it takes away: so another text is noticed.
        if start_place < copied_until or before[start_place:end_place] != removed:
            raise UserError("the operations are of another text")
        parts += [before[copied_until:start_place], operation["after"]]
        copied_until = end_place
    return "".join([*parts, before[copied_until:]])


def changed_words(operations: Sequence[Mapping[str, Any]]) -> int:
    """Count the words that were changed: of a replacement the longer side."""
    return sum(
        max(len(operation["before"].split()), len(operation["after"].split()))
        for operation in operations
    )


# ---- Word error rates ------------------------------------------------------------------------------


class ErrorRates(NamedTuple):
    """How wrong a transcript is: of all words, and of the words of radiology; each may be above 1."""

    words: float
    medical: float


def error_rates(said: str, written: str) -> ErrorRates:
    """Compare what was said with what was written, case and punctuation left out.

    Of radiology's words (`sounds.medical_words`) count those that were lost or replaced and those that were written and
    not said, over those that were said.

    Raises:
        ValueError: if no word, or none of radiology, was said.
    """
    reference = list(filter(None, map(_plain, said.split())))
    words = list(filter(None, map(_plain, written.split())))
    medical = frozenset(sounds.medical_words())
    spoken_medical = sum(word in medical for word in reference)
    if not reference or not spoken_medical:
        raise ValueError("nothing of radiology was said")
    # Over the cheapest alignment; where several are equally cheap, the first from the end.
    errors = medical_errors = 0
    for said_word, written_word in _align(reference, words):
        if said_word != written_word:
            errors += 1
            # Of a replacement it is what was said that counts.
            medical_errors += (said_word or written_word) in medical
    return ErrorRates(errors / len(reference), medical_errors / spoken_medical)


def _align(reference: Sequence[str], words: Sequence[str]) -> list[tuple[str, str]]:
    """Pair words with the fewest errors; "" stands for none."""
    # The table of edit distances of all beginnings: texts here are sentences, so its size is no matter.
    rows, columns = len(reference) + 1, len(words) + 1
    costs = [[0] * columns for _ in range(rows)]
    for row in range(rows):
        for column in range(columns):
            if not row or not column:
                costs[row][column] = row + column
                continue
            is_other = reference[row - 1] != words[column - 1]
            costs[row][column] = min(
                costs[row - 1][column - 1] + is_other,
                costs[row - 1][column] + 1,
                costs[row][column - 1] + 1,
            )
    # Back from the end, along what was cheapest.
    pairs = []
    row, column = rows - 1, columns - 1
    while row or column:
        is_other = bool(row and column) and reference[row - 1] != words[column - 1]
        if row and column and costs[row][column] == costs[row - 1][column - 1] + is_other:
            row, column = row - 1, column - 1
            pairs.append((reference[row], words[column]))
        elif row and costs[row][column] == costs[row - 1][column] + 1:
            row -= 1
            pairs.append((reference[row], ""))
        else:
            column -= 1
            pairs.append(("", words[column]))
    return pairs[::-1]
