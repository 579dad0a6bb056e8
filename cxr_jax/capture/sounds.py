"""How alike two words are, by their letters and by their sound, and the words of radiology that one may have been.

The words are those of the report lexicon: what the labeler knows is what a slip costs most. A match is a proposal; no
code applies one.
"""

import functools
import re
from collections.abc import Sequence

from cxr_jax.labels import lexicon as lexicons

LEAST_LIKENESS = (
    0.62  # of a proposal: "glunting" is to "blunting" 0.85, "new motor axe" to "pneumothorax" 0.83
)
MOST_PROPOSALS = 3
LEAST_LETTERS = 4  # of a word that is proposed: short ones are like everything
# Words of radiology that the lexicon reads by their stem, or that are read around its phrases.
_MORE_WORDS = (
    "pneumothorax pneumothoraces effusion effusions edema consolidation consolidations pneumonia atelectasis opacity "
    "opacities infiltrate infiltrates nodule nodules fracture fractures cardiomegaly congestion emphysema carina "
    "blunting costophrenic cardiophrenic hemidiaphragm retrocardiac perihilar endotracheal nasogastric catheter "
    "pacemaker mediastinum mediastinal silhouette interstitial airspace lingula apex apical basilar bibasilar "
    "bilateral sternotomy vascular tortuous calcified granuloma scoliosis degenerative kyphosis unremarkable"
).split()
# Slips that the lexicon reads, too; nobody is to be led into one.
_MISSPELT = frozenset(("atelecatsis", "pneumothoracies"))
_COMMON = re.compile(r"[a-z]{4,}")

# ---- Likeness --------------------------------------------------------------------------------------


def edit_distance(one: str, other: str) -> int:
    """Count the letters to insert, delete, replace or exchange with their neighbour until one word is the other."""
    # Row by row of the usual table; an exchange looks two rows back.
    before_last: list[int] = []
    last = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        current = [row]
        for column, other_letter in enumerate(other, 1):
            cost = min(
                last[column] + 1, current[-1] + 1, last[column - 1] + (letter != other_letter)
            )
            is_exchange = (
                row > 1
                and column > 1
                and letter == other[column - 2]
                and one[row - 2] == other_letter
            )
            if is_exchange:
                cost = min(cost, before_last[column - 2] + 1)
            current.append(cost)
        before_last, last = last, current
    return last[-1]


# Spellings of one sound, the longer ones first; what a word begins with that is not spoken.
_SILENT_STARTS = (("pn", "n"), ("ps", "s"), ("kn", "n"), ("wr", "r"), ("x", "s"))
_SPELLINGS = (
    ("tion", "xn"),
    ("sion", "xn"),
    ("tch", "x"),
    ("sch", "sk"),
    ("ch", "k"),
    ("ph", "f"),
    ("gh", ""),
    ("th", "t"),
    ("sh", "x"),
    ("ck", "k"),
    ("qu", "kw"),
    ("x", "ks"),
    ("dg", "j"),
    ("ce", "se"),
    ("ci", "si"),
    ("cy", "sy"),
    ("oe", "e"),
    ("c", "k"),
    ("q", "k"),
    ("z", "s"),
    ("v", "f"),
    ("b", "p"),
    ("d", "t"),
    ("g", "k"),
    ("j", "k"),
    ("m", "n"),
)


@functools.lru_cache(maxsize=4096)
def sound_of(word: str) -> str:
    """Spell a word by its consonants alone, voiced and unvoiced ones as one: "pneumo" and "new mo" are both "nn"."""
    letters = re.sub(r"[^a-z]", "", word.lower())
    for start, spoken in _SILENT_STARTS:
        if letters.startswith(start):
            letters = spoken + letters[len(start) :]
            break
    for spelling, sound in _SPELLINGS:
        letters = letters.replace(spelling, sound)
    # A vowel is kept as a place, or "effusion" and "fissure" were nearly one word.
    letters = re.sub(r"[aeiouyhw]+", "", letters)
    return re.sub(r"(.)\1+", r"\1", letters)


def likeness(one: str, other: str, least: float = 0.0) -> float:
    """Tell how alike two words are, 0..1: the mean of their letters and of their sounds; 0 below `least`."""
    sound, other_sound = sound_of(one), sound_of(other)
    by_sound = 1 - edit_distance(sound, other_sound) / max(len(sound), len(other_sound), 1)
    # Sounds are short, so they are compared first; letters at best differ by their number alone.
    longest = max(len(one), len(other), 1)
    if (by_sound + 1 - abs(len(one) - len(other)) / longest) / 2 < least:
        return 0.0
    alike = (by_sound + 1 - edit_distance(one, other) / longest) / 2
    return alike if alike >= least else 0.0


# ---- The words of the lexicon ----------------------------------------------------------------------


@functools.cache
def known_words() -> frozenset[str]:
    """Return every word that the lexicon spells out, whatever it is for."""
    # Stems and classes of its phrases are spelt out as far as they are words.
    lexicon = lexicons.load()
    words = set(_MORE_WORDS)
    for key, plain_words in lexicon.words.items():
        # Words of other languages, and slips that are known as such, are none to write.
        if key not in ("foreign", "known"):
            words.update(plain_words)
    for members in lexicon.classes.values():
        words.update(members)
    for phrase in lexicon.phrases:
        words.update(part.lstrip("-") for part in phrase if part[0] != "<" and part[-1] != "*")
    return frozenset(words)


@functools.cache
def medical_words() -> tuple[str, ...]:
    """Return the words of findings, devices and anatomy: what proposals are made of, and medical WER counts."""
    lexicon = lexicons.load()
    words = set(_MORE_WORDS) | set(lexicon.words["near"])
    for phrase, meaning in lexicon.phrases.items():
        if meaning.table in ("findings", "subjects", "sides"):
            words.update(part.lstrip("-") for part in phrase if _COMMON.fullmatch(part))
    # Plain English among them ("with", "seen") is nobody's finding.
    plain = {*lexicon.words["english"], *lexicon.words["hanging"]} - {*lexicon.words["near"]}
    sides = {"right", "left", "bilateral", "upper", "lower", "heart", "lung", "lungs"}
    return tuple(sorted(((words - plain) | sides) - _MISSPELT))


@functools.cache
def _candidates() -> tuple[tuple[str, int], ...]:
    return tuple((word, len(word)) for word in medical_words() if len(word) >= LEAST_LETTERS)


@functools.lru_cache(maxsize=4096)
def _nearest(heard: str) -> tuple[tuple[str, float], ...]:
    """The words most like what was heard, with their likeness, best first."""
    found = []
    for word, letters in _candidates():
        # Of another length by half it cannot come near; and that is asked before anything costs.
        if abs(letters - len(heard)) > max(letters, len(heard)) * 0.4:
            continue
        if alike := likeness(heard, word, LEAST_LIKENESS):
            found.append((word, round(alike, 3)))
    return tuple(sorted(found, key=lambda match: (-match[1], match[0]))[:MOST_PROPOSALS])


def propose(heard_words: Sequence[str]) -> list[tuple[str, float]]:
    """Propose words of radiology that one to three doubted words may have been, best first.

    Args:
        heard_words: neighbours, as they were written down: a model cuts a word it does not know into several.
    """
    # As one word: between "new", "motor" and "axe" nobody paused.
    heard = re.sub(r"[^a-z]", "", "".join(heard_words).lower())
    if len(heard) < LEAST_LETTERS:
        return []
    # A word of radiology as it stands is no slip, however alike another is.
    if len(heard_words) == 1 and heard in known_words():
        return []
    return list(_nearest(heard))
