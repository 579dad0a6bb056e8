"""Corrected thoughts as rows to train on, in the published form: id, image, solution, messages, and where each is from.

The newest version of a thought is its row: the text between <think> tags, the reader's labels as its answer. A row is
refused, and its reason told, if its film is one of a reader study or of an evaluation set, by its bytes or by its
pixels (`data/sources/guard`); if text and labels contradict each other; or if it is no row that
`experiments/sft.py:files` reads.
"""

import collections
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cxr_jax
from cxr_jax.capture import correct
from cxr_jax.capture.chips import NUMBERS, find_contradictions, parse_chips, read_text
from cxr_jax.capture.records import Capture, Captures, Version
from cxr_jax.data.json_rows import BadRowError
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.data.sources.dialogue import parse_dialogue
from cxr_jax.data.sources.guard import findings as guard_findings
from cxr_jax.data.sources.guard import hash_files
from cxr_jax.data.sources.policy import LabelPolicy
from cxr_jax.data.traces import answers, verify
from cxr_jax.errors import UserError
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

if TYPE_CHECKING:
    from cxr_jax.store import Store

# A text in another language may be put into English before it is a row; no model for it comes along.
Translate = Callable[[str], str]


class Refused(NamedTuple):
    """A thought that gives no row, and why; no word of it."""

    capture: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How rows are made.

    Attributes:
        prompt: what every film is asked.
        policy: what uncertain labels, and those that nobody mentioned, count as.
        tests: folders or manifests of films that must not train.
        contradictions: whether rows whose text and labels contradict each other are kept.
        translate: puts a text into English; None: English alone is exported.
    """

    prompt: str = FIND_PROMPT
    policy: LabelPolicy = field(default_factory=LabelPolicy)
    tests: tuple[Path, ...] = ()
    contradictions: bool = False
    translate: Translate | None = None


class Export(NamedTuple):
    """What an export gives: rows, refused thoughts, and how many films of studies and of test sets were looked at."""

    rows: list[dict[str, Any]]
    refused: list[Refused]
    study_films: int
    test_films: int


# ---- One thought -----------------------------------------------------------------------------------


def make_row(
    capture: Capture, image: str, pseudonym: str, options: ExportOptions
) -> dict[str, Any]:
    """Make the row of a thought's newest version.

    Args:
        image: the name of its film below the folder of films.
        pseudonym: of its reader, that tells nothing.

    Raises:
        UserError: with the reason why it gives none.
    """
    # The newest: earlier versions are in its provenance by their hashes.
    version = capture.versions[-1]
    if version.text is None or version.labels is None:
        raise UserError("it is erased")
    text = options.translate(version.text) if options.translate else version.text
    # One paragraph, as published traces are; tags or blanks in it would end it early, or teach them.
    trace = " ".join(text.split())
    if reasons := verify.check_form(trace):
        raise UserError(reasons[0])

    # The answer is the reader's; what the text says is read anew, for the labeler may have changed since.
    gold = parse_chips(version.labels.get("gold"))
    said = read_text(trace)
    if said.is_foreign:
        raise UserError("the text is in another language")
    differences = find_contradictions(gold, said.chips)
    if differences and not options.contradictions:
        labels = ", ".join(difference["label"] for difference in differences)
        raise UserError(f"text and labels contradict each other ({labels})")
    # As a table of labels has it: what nobody spoke of is blank, and a policy says what that counts as.
    states = {
        label: None if chip.state == "not_mentioned" else NUMBERS[chip.state]
        for label, chip in gold.items()
    }
    answer_names = answers.positive(states, options.policy)
    # The reader of manifests takes no empty answer.
    if not answer_names:
        raise UserError("no label is positive, so there is nothing to answer")

    made_row = _published(f"capture-{capture.id}", image, trace, answer_names, options)
    made_row["labels"] = {label: state for label, state in states.items() if state is not None}
    made_row["policy"] = {"blank": options.policy.blank, "uncertain": options.policy.uncertain}
    made_row["cxr_jax"] = {"provenance": provenance_of(capture, pseudonym, len(differences))}
    # By the reader that training uses, so that nothing is refused later.
    try:
        parse_dialogue(made_row)
    except BadRowError as reason:
        raise UserError(f"no row to train on: {reason}") from None
    return made_row


def _published(
    row_id: str, image: str, trace: str, answer_names: Sequence[str], options: ExportOptions
) -> dict[str, Any]:
    """A row in the published form of sft.jsonl: the film stands before the question, the answer behind the trace."""
    solution = ", ".join(answer_names)
    question = [{"type": "image", "image": image}, {"type": "text", "text": options.prompt}]
    target = f"<think>{trace}</think><answer>{solution}</answer>"
    return {
        "id": row_id,
        "image": image,
        "solution": solution,
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": target}]},
        ],
    }


def provenance_of(capture: Capture, pseudonym: str, contradictions: int) -> dict[str, Any]:
    """Say where a row is from: which thought and versions, what heard it, what was corrected, who agreed to what."""
    # Over all versions: what a reader changes and changes back was corrected twice. What was typed first corrects
    # nothing.
    heard = capture.words
    corrected = capture.versions if heard else capture.versions[1:]
    operations = [operation for version in corrected for operation in version.operations or ()]
    counts = collections.Counter(operation["op"] for operation in operations)
    return {
        "kind": "thought capture",
        "capture": capture.id,
        "versions": [_version_line(version) for version in capture.versions],
        "spoken": bool(heard),
        "audio_sha256": capture.audio_sha256,
        "seconds": capture.seconds,
        "engine": (capture.asr or {}).get("engine"),
        "asr_model_sha256": capture.asr_model_sha256,
        "heard_words": len(heard),
        "doubted_words": sum(word.probability < correct.LEAST_CONFIDENCE for word in heard),
        "corrected_words": correct.changed_words(operations),
        "operations": {name: counts.get(name, 0) for name in ("insert", "delete", "replace")},
        "contradictions": contradictions,
        "reader": pseudonym,
        "consent_sha256": capture.consent_sha256,
        "app_version": cxr_jax.__version__,
        "notice": NOT_FOR_DIAGNOSIS,
    }


def _version_line(version: Version) -> dict[str, Any]:
    return {
        "version": version.version,
        "text_sha256": version.text_sha256,
        "created": version.created,
    }


# ---- All of a store --------------------------------------------------------------------------------


def export(store: "Store", options: ExportOptions) -> Export:
    """Make the rows of a store's thoughts, the oldest first.

    Raises:
        UserError: for a test set that holds no film.
    """
    # First which thoughts count, then which films may not train, then each by itself.
    captures = Captures(store)
    thoughts = captures.saved()
    kept_thoughts, refused = _newest(thoughts)
    forbidden, study_films, test_films = _find_forbidden(
        store, captures, kept_thoughts, options.tests
    )
    rows = []
    for thought in kept_thoughts:
        try:
            if thought.image in forbidden:
                raise UserError(forbidden[thought.image])
            film_file = captures.film_file(thought.image) if thought.image else None
            if film_file is None:
                raise UserError("it is over no film, or its film is erased")
            # As the manifest names films: below the folder of the store.
            image = film_file.relative_to(store.folder).as_posix()
            rows.append(make_row(thought, image, store.opaque("reader", thought.user), options))
        except UserError as error:
            refused.append(Refused(thought.id, str(error)))
    rows, disagreeing = _agreeing(rows)
    return Export(rows, [*refused, *disagreeing], study_films, test_films)


def _newest(thoughts: Sequence[Capture]) -> tuple[list[Capture], list[Refused]]:
    """Of a reader's thoughts over one film the last; the others are his earlier mind."""
    last = {(thought.user, thought.image): thought for thought in thoughts if thought.image}
    kept_thoughts, refused = [], []
    for thought in thoughts:
        if thought.image is None or last[thought.user, thought.image] is thought:
            kept_thoughts.append(thought)
        else:
            refused.append(Refused(thought.id, "the reader has a later one over this film"))
    return kept_thoughts, refused


def _agreeing(rows: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Refused]]:
    """Leave out the rows of films that readers answer differently: one question has one truth when it trains."""
    # In the order of the thoughts; a film's rows stand together.
    of_film: dict[str, list[dict[str, Any]]] = {}
    for made_row in rows:
        of_film.setdefault(made_row["image"], []).append(dict(made_row))
    kept_thoughts, refused = [], []
    for film_rows in of_film.values():
        if len({made_row["solution"] for made_row in film_rows}) == 1:
            kept_thoughts += film_rows
            continue
        for made_row in film_rows:
            capture_id = made_row["cxr_jax"]["provenance"]["capture"]
            refused.append(Refused(capture_id, "readers answer this film differently"))
    return kept_thoughts, refused


# ---- What must not train ---------------------------------------------------------------------------


def _find_forbidden(
    store: "Store", captures: Captures, thoughts: Sequence[Capture], tests: Sequence[Path]
) -> tuple[dict[str, str], int, int]:
    """Find the films that may not train.

    Returns:
        sha256 -> reason; how many films of studies and of test sets were looked at.
    """
    study_images = captures.study_images()
    films = {
        thought.image: captures.film_file(thought.image) for thought in thoughts if thought.image
    }
    # By their bytes: the film itself.
    forbidden = {
        image: f"its film is a case of the study {study_images[image][0]}"
        for image in films
        if image in study_images
    }
    others = {
        film_path: f"its film is a case of the study {slugs[0]}"
        for image, slugs in study_images.items()
        if (film_path := captures.film_file(image)) is not None
    }
    # And films that the user names: of the sets on which the model will be judged.
    test_films = 0
    for place in tests:
        paths = _films_of(place)
        test_films += len(paths)
        others |= dict.fromkeys(paths, f"its film is one of {place}")
    # By their pixels: the same film stored anew, under whatever name, size and grey scale.
    asked = {
        film_path: image
        for image, film_path in films.items()
        if film_path is not None and image not in forbidden
    }
    if asked and others:
        hashes = hash_files.hash_files([*asked, *others], store.folder)
        for film_path, other in guard_findings.same_films(
            list(asked), list(others), hashes
        ).items():
            forbidden[asked[film_path]] = others[other]
    return forbidden, len(study_images), test_films


def _films_of(place: Path) -> list[Path]:
    """The films of a folder, or of a manifest beside them. Raises UserError where there is none."""
    # Imported here: the door of the guard knows both, and brings the reader of manifests along.
    from cxr_jax.data.sources.guard import __main__ as guard_door

    if not place.exists():
        raise UserError(f"{place}: there is no such folder or manifest")
    return guard_door.find_films(place)[1]


def write_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSON Lines."""
    return "".join(json.dumps(made_row, ensure_ascii=False) + "\n" for made_row in rows)


def summarise(made: Export, out: str) -> list[str]:
    """Say for a terminal what became of a store's thoughts."""
    total = len(made.rows) + len(made.refused)
    # By reasons, not by thoughts: nobody reads a thousand lines, and ids say nothing.
    counts = collections.Counter(refusal.reason for refusal in made.refused)
    lines = [
        f"{out}: {len(made.rows):,} of {total:,} thoughts gave a row",
        *(f"refused, {reason}: {count:,}" for reason, count in counts.most_common()),
        f"films were held against {made.study_films:,} of reader studies and {made.test_films:,} of evaluation sets",
    ]
    # What was not looked at is said: none of it may be taken for clean.
    if not made.test_films:
        lines.append(
            "no evaluation set was named: --test=FOLDER holds films against one by their pixels"
        )
    return [*lines, NOT_FOR_DIAGNOSIS]
