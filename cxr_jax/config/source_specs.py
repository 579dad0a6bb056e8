"""Sources by name, as `config.data.train` and `config.data.eval` have them: what trains together, what is looked at.

In a config file a dict, name -> source; on a command line a text, sources with semicolons between them:

    config.data.eval = {"nih_test": {"source": "nih", "root": "/data/nih", "split": "test"}}
    --config.data.eval="nih_test: nih /data/nih split=test; hospital_b: phantom hospital=B"
    --config.data.train="nih: nih /data/nih split=train weight=2; phantom"

Of a text the first word is the source and the second, without an equals sign, its root (of `files` its manifest);
without a name before a colon the source is its own. Keys are those of `config.data` that say what is read.
"""

import ast
import shlex
from collections.abc import Mapping
from typing import Any

from cxr_jax.config import schema
from cxr_jax.errors import UserError, shown

# Of `config.data`, what may differ from source to source; all else is of the run.
_OF_PHANTOMS = ("hospital", "seed", "reader_miss", "follow_ups", "reader_confused", "views")
_OF_FILMS = (
    *("manifest", "image_root", "root", "labels", "split", "views"),
    *("uncertain", "blank", "parents", "no_finding"),
)
WEIGHT = "weight"  # of a source that trains: its share of the examples is this over the sum of all
MAX_NAME = 40  # characters


def parse(value: Any, key: str) -> dict[str, dict[str, Any]]:
    """Read sources by name.

    Args:
        value: a text or a mapping, see the head of this file.
        key: "train" or "eval", for messages and for what a source may say.

    Returns:
        Name -> {"source": .., key of `config.data`: value}; of "train" with "weight".

    Raises:
        UserError: naming the source and what is wrong.
    """
    key_name = f"config.data.{key}"
    source_specs = _split(value, key_name) if isinstance(value, str) else value
    if not isinstance(source_specs, Mapping):
        raise UserError(f"{key_name}={shown(repr(value))} must be sources by name")
    # Names stand in tables and in file names of a report.
    for name in source_specs:
        is_name = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.strip() == name
        if not is_name or not name.isprintable() or set(name) & set("/\\:;|"):
            raise UserError(f"{key_name}: {shown(repr(name))} is no name of a source")
    return {
        name: _read(name, source_spec, key, f"{key_name}.{name}")
        for name, source_spec in source_specs.items()
    }


def _split(text: str, key_name: str) -> dict[str, str]:
    """The sources of a text, by name."""
    source_specs: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, colon, source_spec = part.partition(":")
        # A colon further on belongs to a path.
        if not colon or any(character.isspace() for character in name.strip()):
            name, source_spec = part.split()[0], part
        if name.strip() in source_specs:
            raise UserError(f"{key_name}: {name.strip()!r} stands there twice")
        source_specs[name.strip()] = source_spec.strip()
    return source_specs


def _read(name: str, source_spec: Any, key: str, key_name: str) -> dict[str, Any]:
    """One source, checked."""
    said_keys = _words(source_spec, key_name) if isinstance(source_spec, str) else source_spec
    if not isinstance(said_keys, Mapping):
        raise UserError(
            f"{key_name}={shown(repr(source_spec))} must be a source: a text, or a dict of its keys"
        )
    # A copy: what is read is taken out of it.
    said_keys = dict(said_keys)
    source = said_keys.pop("source", name)
    if source not in schema.choices("data.source"):
        raise UserError(
            f"{key_name}: source={shown(repr(source))} is not one of {', '.join(schema.choices('data.source'))}"
        )
    # A root that is given without its key is what that source is read from.
    if (root := said_keys.pop("", None)) is not None:
        said_keys["manifest" if source == "files" else "root"] = root
    weight = said_keys.pop(WEIGHT, 1.0)
    if key != "train" and weight != 1.0:
        raise UserError(f"{key_name}: only sources that train have a weight")
    if not schema.is_number(weight, "> 0"):
        raise UserError(f"{key_name}: weight={shown(repr(weight))} must be a positive number")
    allowed = _OF_PHANTOMS if source == "phantom" else _OF_FILMS
    for source_key in said_keys:
        if source_key not in allowed:
            raise UserError(
                f"{key_name} has no key {source_key!r}; a source {source} may say {', '.join(allowed)}"
            )
    _check_values(said_keys, key_name)
    return {"source": source, **said_keys, **({WEIGHT: float(weight)} if key == "train" else {})}


def _words(text: str, key_name: str) -> dict[str, Any]:
    """The keys of a source that is a text; "" is the word without an equals sign behind the source."""
    try:
        text_words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{key_name}: {error}") from None
    said_keys: dict[str, Any] = {}
    for place, text_word in enumerate(text_words):
        source_key, equals, value = text_word.partition("=")
        if not equals:
            # The first two words may stand alone: the source, and what it is read from.
            if place > 1:
                raise UserError(f"{key_name}: {text_word!r} is no KEY=VALUE")
            source_key, value = ("source", "")[place], text_word
        if source_key in said_keys:
            raise UserError(f"{key_name} says {source_key or 'its root'!r} twice")
        said_keys[source_key] = value if not equals else _typed(source_key, value)
    return said_keys


def _typed(source_key: str, value: str) -> Any:
    """A value of a text as its key has it: numbers as numbers, names as a tuple."""
    if source_key == WEIGHT:
        return _number(value)
    key = schema.keys().get(f"data.{source_key}")
    if key is None or key.type in ("text", "choice"):
        return value
    return tuple(value.split(",")) if key.type == "names" else _number(value)


def _number(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value  # refused by whoever wants a number


def _check_values(said_keys: Mapping[str, Any], key_name: str) -> None:
    """Refuse values that the same key of `config.data` would not have."""
    for source_key, value in said_keys.items():
        if rule := schema.rule_of(f"data.{source_key}"):
            is_good, must = rule
            if not is_good(value):
                raise UserError(f"{key_name}: {source_key}={shown(repr(value))} {must}")
