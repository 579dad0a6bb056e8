"""The model card of an export, and the licence that it carries: that of the model which the run started from.

A licence of this project's own would be wrong there: who trains a model further may hand it on under its terms alone.
The card names that model by its name, and by the SHA-256 of its weights, but never by a path of this machine.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cxr_jax.errors import shown
from cxr_jax.runtime import whole_files
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

# Files that hold terms, as folders name them, whatever their case.
_TERMS = re.compile(r"(licen[cs]e|copying|notice|use_policy)([-.][\w.-]*)?", re.IGNORECASE)
_CARD = "README.md"
# Larger ones are not what their name says.
_MOST_BYTES = 2**20
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# Keys of the model hub that say under which terms a model may be used.
_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True)
class Licence:
    """Under which terms a model may be handed on.

    Attributes:
        settings: "license", "license_name", "license_link" for the front matter of a card.
        sentence: what the card says about it.
        files: name -> content of the files that hold the terms.
    """

    settings: Mapping[str, Any]
    sentence: str
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def licence_of(folder: Path | None) -> Licence:
    """Find the licence of a model folder: of the front matter of its README.md, else its licence file, else "other".

    Args:
        folder: None for random weights.
    """
    if folder is None:
        return Licence(
            settings={"license": "other", "license_name": "not-chosen"},
            sentence="It began with random weights, so no licence comes with them: who trained it chooses one.",
        )
    files = {name: (folder / name).read_bytes() for name in licence_files(folder)}
    settings = _stated(folder, files)
    # A notice is no licence.
    texts = [name for name in files if name.lower().startswith(("licen", "copying"))]
    # What the folder's own card says goes before what can be seen in its files.
    if "license" in settings:
        words = ", ".join(f"`{value}`" for value in settings.values())
        sentence = f"Its licence is that of the model it started from: {words}."
    elif texts:
        # The texts of licences differ by a clause: which one this is, is not guessed.
        settings = {"license": "other", "license_name": "see-its-file", "license_link": texts[0]}
        sentence = "Its licence is that of the model it started from."
    else:
        settings = {"license": "other", "license_name": "unknown"}
        sentence = (
            "The folder of the model it started from states no licence: find it out before you "
            "share these weights."
        )
    if files:
        sentence += f" The terms lie beside this file: {', '.join(map(shown, files))}."
    return Licence(settings=settings, sentence=sentence, files=files)


def licence_files(folder: Path) -> list[str]:
    """List the names of a folder's files that hold terms."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if _TERMS.fullmatch(path.name) and path.is_file() and path.stat().st_size <= _MOST_BYTES
    )


def _stated(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What the front matter of the folder's card says about its licence, as far as a card may repeat it."""
    card = folder / _CARD
    if not card.is_file():
        return {}
    # Whoever wrote the card may have written anything, of any length.
    with open(card, "rb") as file:
        text = file.read(_MOST_BYTES).decode("utf-8", "replace")
    found = _FRONT_MATTER.match(text)
    try:
        stated = yaml.safe_load(found.group(1)) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        # A card that nobody can read says nothing.
        stated = None
    if not isinstance(stated, dict):
        return {}
    values = {key: _as_text(stated.get(key)) for key in _KEYS}
    link = values["license_link"]
    # An address, or a file that comes along; a path would lead nowhere, or tell about this machine.
    if not (link.startswith(("https://", "http://")) or link in files):
        values["license_link"] = ""
    return {key: value for key, value in values.items() if value}


def _as_text(value: object) -> str:
    """A value of a front matter as one line; several licences are told one after the other."""
    values = value if isinstance(value, list) else [value]
    words = [" ".join(str(part).split()) for part in values if isinstance(part, str | int | float)]
    return ", ".join(words)[:200]


# ---- The model that a run started from -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model that a run started from, as a card may tell it.

    Attributes:
        name: no path.
        weights_sha256: of a folder's weights; None for what comes with this project.
    """

    name: str
    weights_sha256: str | None
    licence: Licence


def name_of(folder: Path) -> str:
    """Name a model folder without its place: owner/name in a cache of the model hub, else the folder's own name."""
    # Links are not followed: in a cache of the hub they lead to files that are named by their hashes.
    parts = folder.absolute().parts
    for part in parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    # A run's export is always called hf.
    names = [part for part in parts[1:] if part != "hf"]
    return names[-1] if names else "model"


def write(
    folder: Path, origin: Origin, task: str, data_source: str, contaminated: str = ""
) -> None:
    """Write README.md and the files of the licence into an export.

    Args:
        task: of the run, see `config.task`.
        data_source: see `config.data.source`.
        contaminated: what it trained on that an evaluation set has, as a sentence; "" where there is nothing.
    """
    weights = (
        f" (SHA-256 of its weights: `{origin.weights_sha256}`)" if origin.weights_sha256 else ""
    )
    # YAML's own writer: a name may hold whatever a card held.
    front_matter = yaml.safe_dump(
        dict(origin.licence.settings), sort_keys=False, allow_unicode=True
    )
    said = f"**{contaminated}.**\n\n" if contaminated else ""
    card = (
        f"---\n{front_matter}---\n# cxr_jax export\n\n"
        f"Qwen2.5-VL structure. Task: {task}; started from `{shown(origin.name)}`{weights}; data: {data_source}.\n\n"
        f"{origin.licence.sentence}\n\n"
        f"{said}{NOT_FOR_DIAGNOSIS} Phantom results say nothing about patients.\n"
    )
    # The terms first: a card without them would point at nothing.
    for name, content in origin.licence.files.items():
        whole_files.write_bytes(folder / name, content)
    whole_files.write_text(folder / _CARD, card)
