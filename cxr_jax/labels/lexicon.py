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
# Table -> the keys that it may have; None: names (of labels, but for the first two).
KEYS = {
    "classes": None,
    "groups": None,
    "words": ("hanging", "abbreviated", "near", "english", "foreign", "known"),
    "findings": None,
    "denials": None,
    "hedged": None,
    "denied": None,
    "subjects": None,
    "qualities": ("normal", "abnormal", "borderline"),
    "cues": (
        *(f"{mode}_{place}" for mode in _MODES for place in ("before", "after", "around", "field")),
        "field_name",
    ),
    "values": ("positive", *_MODES),
    "questions": ("question",),
    "parts": ("before", "after"),
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
# The marks, lines and dashes of section 1 are tokens that no byte stands for alone; so is the break, written <end>.
BREAK, END = "\n", "<end>"
SENTENCE_ENDS = (".", "!", "?", BREAK)
_WORD = re.compile(r"[a-z0-9]+\*?|-[a-z0-9]+|[.?!;:,/|\u00bf\u2013+^~-]|\n")
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
        phrases: sequence of words ("-word" where dashed), stems ("stem*") and classes ("<name>") -> meaning.
        words: key of [words] -> its words, in the order of the file.
    """

    name: str
    classes: dict[str, frozenset[str]]
    phrases: dict[tuple[str, ...], Meaning]
    words: dict[str, tuple[str, ...]]


def load(path: str | Path | None = None, more: str | Path | None = None) -> Lexicon:
    """Read and check a lexicon.

    Args:
        path: a TOML file; the built-in lexicon by default.
        more: a second file, whose phrases win over those of the first.

    Raises:
        UserError: one line that names the file and the phrase, for a file that cannot be read, an unknown table, key or
            label, a malformed phrase, and a clash (one expansion with two meanings).
    """
    names = Names({}, {})
    phrases: dict[tuple[str, ...], Meaning] = {}
    words: dict[str, tuple[str, ...]] = dict.fromkeys(KEYS["words"] or (), ())
    files = [Path(path or DEFAULT)]
    if more:
        files.append(Path(more))
    for file in files:
        tables = read_toml(file)
        for key, plain_words in _read_word_lists(str(file), "words", tables.pop("words", {})):
            if key not in words:
                raise UserError(f"{file}: [words] has no {key!r}; it may have: {', '.join(words)}")
            words[key] += plain_words
        # Later files win; clashes are looked for within each file, and where phrases are compiled.
        phrases |= _read_phrases(str(file), tables, names)
    name = str(more or path or DEFAULT)
    if not phrases:
        raise UserError(f"{name}: the lexicon has no phrases")
    return Lexicon(name, names.classes, phrases, words)


class Names(NamedTuple):
    """What `<name>` can stand for.

    Attributes:
        classes: plain words; a phrase keeps the class as one pattern.
        groups: phrases; a phrase stands for one with each.
    """

    classes: dict[str, frozenset[str]]
    groups: dict[str, tuple[tuple[str, ...], ...]]


def _read_phrases(
    name: str, tables: dict[str, Any], names: Names
) -> dict[tuple[str, ...], Meaning]:
    """The phrases of one file; its classes and groups are added to `names`."""
    for key, words in _read_word_lists(name, "classes", tables.pop("classes", {})):
        names.classes[key] = frozenset(words)
    _read_groups(name, tables.pop("groups", {}), names)
    phrases: dict[tuple[str, ...], Meaning] = {}
    for table, entries in tables.items():
        if table not in KEYS:
            raise UserError(f"{name}: unknown table {table!r}; there are: {', '.join(KEYS)}")
        if not isinstance(entries, dict):
            raise UserError(f"{name}: [{table}] is not a table")
        for key, texts in entries.items():
            meaning = _meaning(name, table, key)
            for text in _check_strings(name, table, key, texts):
                for words in expand(name, text, names):
                    said = _meaning_of_value(meaning, words)
                    # A phrase may stand in a table twice, but not mean two things.
                    if (other := phrases.setdefault(words, said)) != said:
                        raise clash_error(name, words, other, said)
    return phrases


def _meaning_of_value(meaning: Meaning, words: tuple[str, ...]) -> Meaning:
    """A value ends what its last token ends: "values_end" is the table of those that end a sentence."""
    if meaning.table == "values" and words[-1] in SENTENCE_ENDS:
        return meaning._replace(table="values_end")
    return meaning


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


def _read_word_lists(name: str, table: str, lists: object) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The lists of plain words of [classes] or [words]."""
    if not isinstance(lists, dict):
        raise UserError(f"{name}: [{table}] is not a table")
    for key, words in lists.items():
        if not re.fullmatch(r"\w+", key) or key == END[1:-1]:
            raise UserError(f"{name}: [{table}] {key!r} is not a name")
        for word in _check_strings(name, table, key, words):
            if not _PLAIN_WORD.fullmatch(word):
                raise UserError(
                    f"{name}: [{table}] {key}: {word!r} is not one word of lower-case letters and digits"
                )
        yield key, tuple(words)


def _read_groups(name: str, table: object, names: Names) -> None:
    """Add the groups of one file to `names`; a group may name classes, and groups that stand before it."""
    if not isinstance(table, dict):
        raise UserError(f"{name}: [groups] is not a table")
    for key, texts in table.items():
        if not re.fullmatch(r"\w+", key) or key == END[1:-1] or key in names.classes:
            raise UserError(f"{name}: [groups] {key!r} is not a name")
        phrases: dict[tuple[str, ...], None] = {}
        for text in _check_strings(name, "groups", key, texts):
            phrases |= dict.fromkeys(expand(name, text, names))
        names.groups[key] = tuple(phrases)


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


def expand(name: str, text: str, names: Names) -> Iterator[tuple[str, ...]]:
    """Yield the word sequences that a phrase stands for; section 2 of docs/report_parser.md.

    Classes stay as "<name>", and the plain words of a group in brackets become a class of their own: so a few sequences
    stand for thousands.

    Args:
        name: of the file, for messages.
        text: the phrase.
        names: what `<name>` stands for; classes of brackets are added.

    Raises:
        UserError: for a malformed phrase.
    """
    choices: list[list[tuple[str, ...]]] = []
    for group, word in _TERM.findall(text):
        options = [word] if word else _bracket_options(group.split("|"), names.classes)
        choices.append([words for option in options for words in _option_words(option, names)])
    if (total := math.prod(map(len, choices))) > MAX_EXPANSIONS:
        raise UserError(
            f"{name}: {text!r:.80} stands for {total} phrases; the limit is {MAX_EXPANSIONS}"
        )
    for choice in itertools.product(*choices):
        words = tuple(itertools.chain.from_iterable(choice))
        _check_words(name, text, words, names.classes)
        yield words


def _option_words(option: str, names: Names) -> Iterator[tuple[str, ...]]:
    """What an alternative stands for: it may be of several words, or empty, and name groups."""
    parts = []
    for word in option.split():
        named = names.groups.get(word[1:-1]) if word[0] == "<" else None
        parts.append(named or ((BREAK if word == END else word,),))
    for choice in itertools.product(*parts):
        yield tuple(itertools.chain.from_iterable(choice))


def _check_words(
    name: str, text: str, words: tuple[str, ...], classes: dict[str, frozenset[str]]
) -> None:
    if not words:
        raise UserError(f"{name}: {text!r} may be empty")
    if len(words) > MAX_WORDS:
        raise UserError(f"{name}: {text!r:.80} has more than {MAX_WORDS} words")
    if BREAK in words[:-1]:
        raise UserError(f"{name}: {text!r:.80}: nothing can follow {END}")
    for word in words:
        if word[0] == "<" and word[1:-1] not in classes:
            raise UserError(f"{name}: {text!r:.80}: there is no class {word:.80}")
        if word[0] != "<" and not _WORD.fullmatch(word):
            reason = "is no word of lower-case letters and digits, nor a stem*"
            raise UserError(f"{name}: {text!r:.80}: {word!r:.80} {reason}")


def _bracket_options(options: list[str], classes: dict[str, frozenset[str]]) -> list[str]:
    """The options in brackets; plain words, if there are several, are one class, which is added to `classes`."""
    # One plain word needs no class.
    words = sorted({option for option in options if _PLAIN_WORD.fullmatch(option)})
    if len(words) < 2:
        return options
    key = f"({'|'.join(words)})"
    classes[key] = frozenset(words)
    return [*(option for option in options if option not in words), f"<{key}>"]
