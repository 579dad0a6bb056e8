"""The report lexicon: a TOML file of phrases and what they mean, read and checked. docs/report_parser.md is its manual.

Nothing here runs on a device: `labels/phrases.py` compiles what this returns.
"""

import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

DEFAULT = Path(__file__).with_name("lexicon.toml")
OTHER = "Other"
LABELS = (*CHEXPERT_14, OTHER)
SIDELESS = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", OTHER)

MODES = ("negative", "uncertain", "ignore")
KEYS = {  # table -> the keys it may have; None: label names
    "classes": None,
    "findings": None,
    "denials": None,
    "hedged": None,
    "denied": None,
    "subjects": None,
    "qualities": ("normal", "abnormal", "borderline"),
    "cues": tuple(f"{mode}_{where}" for mode in MODES for where in ("before", "after", "around")),
    "sides": ("right", "left", "both"),
    "headings": ("right", "left", "both"),
    "stops": ("sentence", "clause", "clause_right", "clause_left", "clause_both"),
    "commas": ("comma",),
    "nothing": ("phrases",),
}
MAX_WORDS = 64  # of one phrase
MAX_EXPANSIONS = 1_000  # of one phrase, classes not counted
_WORD = re.compile(r"[a-z0-9]+\*?|[.?!;:,/]")
_TERM = re.compile(r"\(([^()]*)\)(?!\S)|(\S+)")


class Meaning(NamedTuple):
    """What a phrase is: its table and key, and the labels it speaks of (indices into LABELS)."""

    table: str
    key: str
    labels: tuple[int, ...] = ()


class Lexicon(NamedTuple):
    """phrases: sequence of words, stems ("stem*") and classes ("<name>") -> meaning. classes: name -> its words.

    name: the file it came from.
    """

    name: str
    classes: dict[str, frozenset[str]]
    phrases: dict[tuple[str, ...], Meaning]


def load(path: str | Path | None = None, more: str | Path | None = None) -> Lexicon:
    """The lexicon in a TOML file, the built-in one by default, and the phrases of a second file, which win over it.

    Raises UserError, one line that names the file and the phrase, for a file that cannot be read, an unknown table, key
    or label, a malformed phrase, and a clash (one expansion with two meanings).
    """
    classes: dict[str, frozenset[str]] = {}
    phrases: dict[tuple[str, ...], Meaning] = {}
    for file in (Path(path or DEFAULT), *([Path(more)] if more else ())):
        phrases |= _phrases(str(file), read_toml(file), classes)
    name = str(more or path or DEFAULT)
    if not phrases:
        raise UserError(f"{name}: the lexicon has no phrases")
    return Lexicon(name, classes, phrases)


def _phrases(
    name: str, data: dict, classes: dict[str, frozenset[str]]
) -> dict[tuple[str, ...], Meaning]:
    """The phrases of one file; its classes are added to `classes`."""
    classes |= _classes(name, data.pop("classes", {}))
    phrases: dict[tuple[str, ...], Meaning] = {}
    for table, entries in data.items():
        if table not in KEYS:
            raise UserError(f"{name}: unknown table {table!r}; there are: {', '.join(KEYS)}")
        if not isinstance(entries, dict):
            raise UserError(f"{name}: [{table}] is not a table")
        for key, texts in entries.items():
            meaning = _meaning(name, table, key)
            for text in _strings(name, table, key, texts):
                for words in expand(name, text, classes):
                    if (other := phrases.setdefault(words, meaning)) != meaning:
                        raise clash(name, words, other, meaning)
    return phrases


def clash(name: str, words: Sequence[str], a: Meaning, b: Meaning) -> UserError:
    return UserError(
        f"{name}: clash: {' '.join(words)!r} is both [{a.table}] {a.key!r} and [{b.table}] {b.key!r}"
    )


def read_toml(path: Path) -> dict:
    """A TOML file's tables; UserError for one that cannot be read, or is none."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or type(e).__name__}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"{path}: not a TOML file: {e}") from e
    except ValueError as e:
        raise UserError(f"{path!s:.80}: not the name of a file") from e


def _classes(name: str, table) -> dict[str, frozenset[str]]:
    if not isinstance(table, dict):
        raise UserError(f"{name}: [classes] is not a table")
    for key, words in table.items():
        if not re.fullmatch(r"\w+", key):
            raise UserError(f"{name}: [classes] {key!r} is not a name")
        for word in _strings(name, "classes", key, words):
            if not re.fullmatch(r"[a-z0-9]+", word):
                raise UserError(
                    f"{name}: [classes] {key}: {word!r} is not one word of lower-case letters and digits"
                )
    return {key: frozenset(words) for key, words in table.items()}


def _strings(name: str, table: str, key: str, texts) -> Sequence[str]:
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{name}: [{table}] {key!r} is not a list of phrases in quotes")
    return texts


def _meaning(name: str, table: str, key: str) -> Meaning:
    keys = KEYS[table]
    if keys is not None:
        if key not in keys:
            raise UserError(f"{name}: [{table}] has no {key!r}; it may have: {', '.join(keys)}")
        return Meaning(table, key)
    labels = [part.strip() for part in key.split(",")]
    for label in labels:
        if label not in LABELS:
            raise UserError(f"{name}: [{table}]: {label!r} is none of the 14 labels, nor {OTHER!r}")
    return Meaning(table, key, tuple(sorted({LABELS.index(label) for label in labels})))


def expand(name: str, text: str, classes: dict[str, frozenset[str]]) -> Iterator[tuple[str, ...]]:
    """The word sequences of a phrase; section 2 of docs/report_parser.md. Raises UserError.

    Classes stay as "<name>", and the plain words of a group become a class of their own, which is added to `classes`:
    so a few sequences stand for thousands.
    """
    groups = [
        [word] if word else _options(group.split("|"), classes)
        for group, word in _TERM.findall(text)
    ]
    if (total := math.prod(map(len, groups))) > MAX_EXPANSIONS:
        raise UserError(
            f"{name}: {text!r:.80} stands for {total} phrases; the limit is {MAX_EXPANSIONS}"
        )
    for choice in itertools.product(*groups):
        words = tuple(" ".join(choice).split())
        if not words:
            raise UserError(f"{name}: {text!r} may be empty")
        if len(words) > MAX_WORDS:
            raise UserError(f"{name}: {text!r:.80} has more than {MAX_WORDS} words")
        for word in words:
            if word[0] == "<" and word[1:-1] not in classes:
                raise UserError(f"{name}: {text!r:.80}: there is no class {word:.80}")
            if word[0] != "<" and not _WORD.fullmatch(word):
                what = "is no word of lower-case letters and digits, nor a stem*"
                raise UserError(f"{name}: {text!r:.80}: {word!r:.80} {what}")
        yield words


def _options(options: list[str], classes: dict[str, frozenset[str]]) -> list[str]:
    words = sorted({o for o in options if re.fullmatch(r"[a-z0-9]+", o)})
    if len(words) < 2:
        return options
    key = f"({'|'.join(words)})"
    classes[key] = frozenset(words)
    return [*(o for o in options if o not in words), f"<{key}>"]
