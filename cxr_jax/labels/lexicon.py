"""The report lexicon: a TOML file of phrases and what they mean, read and checked. docs/report_parser.md is its manual.

Nothing here runs on a device: `labels/phrase_tables.py` compiles what this returns.
"""

import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

DEFAULT = Path(__file__).with_name("lexicon.toml")
OTHER = "Other"  # abnormalities that are none of the 14
LABELS = (*CHEXPERT_14, OTHER)
# Labels that no side is ever given to.
SIDELESS = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", OTHER)

_MODES = ("negative", "uncertain", "ignore")
# Table -> the keys that it may have; None: label names.
KEYS = {
    "classes": None,
    "findings": None,
    "denials": None,
    "hedged": None,
    "denied": None,
    "subjects": None,
    "qualities": ("normal", "abnormal", "borderline"),
    "cues": tuple(f"{mode}_{place}" for mode in _MODES for place in ("before", "after", "around")),
    "sides": ("right", "left", "both"),
    "headings": ("right", "left", "both"),
    "stops": ("sentence", "clause", "clause_right", "clause_left", "clause_both"),
    "commas": ("comma",),
    "nothing": ("phrases",),
}
MAX_WORDS = 64  # of one phrase
MAX_EXPANSIONS = 1_000  # of one phrase, classes not counted
# Text is compared in lower case, so a lexicon is written in it.
_PLAIN_WORD = re.compile(r"[a-z0-9]+")
_WORD = re.compile(r"[a-z0-9]+\*?|[.?!;:,/]")
# A group in brackets, or what stands between blanks.
_TERM = re.compile(r"\(([^()]*)\)(?!\S)|(\S+)")


class Meaning(NamedTuple):
    """What a phrase is: its table and key, and the labels it speaks of (indices into LABELS)."""

    table: str
    key: str
    labels: tuple[int, ...] = ()


class Lexicon(NamedTuple):
    """The phrases of a lexicon, and what they mean.

    Attributes:
        name: the file it came from.
        classes: name -> its words.
        phrases: sequence of words, stems ("stem*") and classes ("<name>") -> meaning.
    """

    name: str
    classes: dict[str, frozenset[str]]
    phrases: dict[tuple[str, ...], Meaning]


def load(path: str | Path | None = None, more: str | Path | None = None) -> Lexicon:
    """Read and check a lexicon.

    Args:
        path: a TOML file; the built-in lexicon by default.
        more: a second file, whose phrases win over those of the first.

    Raises:
        UserError: one line that names the file and the phrase, for a file that cannot be read, an unknown table, key or
            label, a malformed phrase, and a clash (one expansion with two meanings).
    """
    classes: dict[str, frozenset[str]] = {}
    phrases: dict[tuple[str, ...], Meaning] = {}
    files = [Path(path or DEFAULT)]
    if more:
        files.append(Path(more))
    for file in files:
        # Later files win; clashes are looked for within each file, and where phrases are compiled.
        phrases |= _read_phrases(str(file), read_toml(file), classes)
    name = str(more or path or DEFAULT)
    if not phrases:
        raise UserError(f"{name}: the lexicon has no phrases")
    return Lexicon(name, classes, phrases)


def _read_phrases(
    name: str, tables: dict[str, Any], classes: dict[str, frozenset[str]]
) -> dict[tuple[str, ...], Meaning]:
    """The phrases of one file; its classes are added to `classes`."""
    classes |= _read_classes(name, tables.pop("classes", {}))
    phrases: dict[tuple[str, ...], Meaning] = {}
    for table, entries in tables.items():
        if table not in KEYS:
            raise UserError(f"{name}: unknown table {table!r}; there are: {', '.join(KEYS)}")
        if not isinstance(entries, dict):
            raise UserError(f"{name}: [{table}] is not a table")
        for key, texts in entries.items():
            meaning = _meaning(name, table, key)
            for text in _check_strings(name, table, key, texts):
                for words in expand(name, text, classes):
                    # A phrase may stand in a table twice, but not mean two things.
                    if (other := phrases.setdefault(words, meaning)) != meaning:
                        raise clash_error(name, words, other, meaning)
    return phrases


def clash_error(name: str, words: Sequence[str], first: Meaning, second: Meaning) -> UserError:
    """Make the error of words that have two meanings."""
    phrase = " ".join(words)
    return UserError(
        f"{name}: clash: {phrase!r} is both [{first.table}] {first.key!r} and "
        f"[{second.table}] {second.key!r}"
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file.

    Raises:
        UserError: for one that cannot be read, or is none.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or type(error).__name__}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from error
    except ValueError as error:
        raise UserError(f"{path!s:.80}: not the name of a file") from error


def _read_classes(name: str, table: object) -> dict[str, frozenset[str]]:
    if not isinstance(table, dict):
        raise UserError(f"{name}: [classes] is not a table")
    for key, words in table.items():
        if not re.fullmatch(r"\w+", key):
            raise UserError(f"{name}: [classes] {key!r} is not a name")
        for word in _check_strings(name, "classes", key, words):
            if not _PLAIN_WORD.fullmatch(word):
                raise UserError(
                    f"{name}: [classes] {key}: {word!r} is not one word of lower-case letters and digits"
                )
    return {key: frozenset(words) for key, words in table.items()}


def _check_strings(name: str, table: str, key: str, texts: object) -> Sequence[str]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name}: [{table}] {key!r} is not a list of phrases in quotes")
    return texts


def _meaning(name: str, table: str, key: str) -> Meaning:
    keys = KEYS[table]
    if keys is not None:
        if key not in keys:
            raise UserError(f"{name}: [{table}] has no {key!r}; it may have: {', '.join(keys)}")
        return Meaning(table, key)
    # A key of labels may name several, parted by commas.
    labels = [part.strip() for part in key.split(",")]
    for label in labels:
        if label not in LABELS:
            raise UserError(f"{name}: [{table}]: {label!r} is none of the 14 labels, nor {OTHER!r}")
    return Meaning(table, key, tuple(sorted({LABELS.index(label) for label in labels})))


def expand(name: str, text: str, classes: dict[str, frozenset[str]]) -> Iterator[tuple[str, ...]]:
    """Yield the word sequences that a phrase stands for; section 2 of docs/report_parser.md.

    Classes stay as "<name>", and the plain words of a group become a class of their own: so a few sequences stand for
    thousands.

    Args:
        name: of the file, for messages.
        text: the phrase.
        classes: what each name stands for; those of groups are added.

    Raises:
        UserError: for a malformed phrase.
    """
    choices = []
    for group, word in _TERM.findall(text):
        choices.append([word] if word else _group_options(group.split("|"), classes))
    if (total := math.prod(map(len, choices))) > MAX_EXPANSIONS:
        raise UserError(
            f"{name}: {text!r:.80} stands for {total} phrases; the limit is {MAX_EXPANSIONS}"
        )
    for choice in itertools.product(*choices):
        words = tuple(" ".join(choice).split())  # an option may be of several words, or empty
        _check_words(name, text, words, classes)
        yield words


def _check_words(
    name: str, text: str, words: tuple[str, ...], classes: dict[str, frozenset[str]]
) -> None:
    if not words:
        raise UserError(f"{name}: {text!r} may be empty")
    if len(words) > MAX_WORDS:
        raise UserError(f"{name}: {text!r:.80} has more than {MAX_WORDS} words")
    for word in words:
        if word[0] == "<" and word[1:-1] not in classes:
            raise UserError(f"{name}: {text!r:.80}: there is no class {word:.80}")
        if word[0] != "<" and not _WORD.fullmatch(word):
            reason = "is no word of lower-case letters and digits, nor a stem*"
            raise UserError(f"{name}: {text!r:.80}: {word!r:.80} {reason}")


def _group_options(options: list[str], classes: dict[str, frozenset[str]]) -> list[str]:
    """The options of a group, with its plain words, if there are several, as one class, which is added to `classes`."""
    # One plain word needs no class.
    words = sorted({option for option in options if _PLAIN_WORD.fullmatch(option)})
    if len(words) < 2:
        return options
    key = f"({'|'.join(words)})"
    classes[key] = frozenset(words)
    return [*(option for option in options if option not in words), f"<{key}>"]
