"""The cases of a study: films, what is so, what the AI says, and which of them are shown with a planted error.

`phantom:N` draws phantom scenes; anything else is a manifest, one JSON object a line: `image`, `labels` (14 names: 1,
0, -1 or null), `reasoning` and `answer` as `cxr-jax predict --json` prints them, and, for cases of a reviewed list,
`plant`: `kind`, `label`, `reasoning`, `answer`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cxr_jax import phantom
from cxr_jax.data.images import read_image
from cxr_jax.data.radiograph import Image
from cxr_jax.errors import UserError, shown
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.study import grammar
from cxr_jax.study import plant as planting
from cxr_jax.study.plant import Plant
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.shown import (
    ABSENT,
    PRESENT,
    SILENT,
    STATE_WORDS,
    UNSURE,
    Frozen,
    freeze_text,
    read_texts,
)

_PLANTS = 5  # stream of the protocol's seed
# Drawn for each case that is needed: some scenes are passed over.
_SPARE = 3
# Of the cases have one of the labels that suspicion is asked for, at most: AUC needs both kinds.
_SUSPECT = 0.6
_BATCH = 64
# Films for the eye have sixteen times the pixels, and each of their maps is there at once.
_EYE_BATCH = 4
_TRUTH_WORDS = {1: PRESENT, -1: UNSURE, 0: ABSENT}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case. What readers may learn of it is the film and, by arm, `shown`.

    Attributes:
        pixels: float32 [H, W] in 0..1, for the eye.
        model_input: float32 [h, w] in 0..1, the same film as the model is given it, or None where that is `pixels`.
        truth: state of each of the 14 labels, words of `shown.py`; a label that is not known is left out.
        natural: what the AI said.
        shown: what readers see of it: `natural`, or the planted reading.
        plant: the error, or None.
    """

    pixels: np.ndarray
    model_input: np.ndarray | None = None
    truth: Mapping[str, str]
    truth_sides: Mapping[str, str]
    natural: Frozen
    shown: Frozen
    plant: Plant | None = None

    @property
    def is_abnormal(self) -> bool:
        """Whether any finding but a device is there."""
        return any(
            state == PRESENT and label_name not in ("No Finding", "Support Devices")
            for label_name, state in self.truth.items()
        )


@dataclass(frozen=True)
class CaseSet:
    """Cases of the study and, behind them, practice cases."""

    cases: tuple[Case, ...]
    practice: tuple[Case, ...]
    is_phantom: bool


def gather(protocol: Protocol, practice_count: int) -> CaseSet:
    """Draw or read a study's cases and plant its errors.

    Raises:
        UserError: for cases that cannot be read, or fewer than are asked for.
    """
    # A manifest may have any name but this one.
    source, _, number = protocol.cases.partition(":")
    if source == "phantom":
        if not number.isdigit() or not 2 <= int(number) <= 2000:
            raise UserError("--cases=phantom:N: N is a number from 2 to 2000")
        return _phantom_cases(protocol, int(number), practice_count)
    return _manifest_cases(protocol, Path(protocol.cases), practice_count)


# ---- Phantoms --------------------------------------------------------------------------------------


def _phantom_cases(protocol: Protocol, case_count: int, practice_count: int) -> CaseSet:
    """Draw scenes until there are enough that the labeler reads as they were meant."""
    wanted = case_count + practice_count
    scenes = _draw_scenes(protocol.seed, wanted * _SPARE)
    readings = [
        grammar.frozen_of_scene(scene_row, "A", [protocol.seed, number])
        for number, (scene_row, _) in enumerate(scenes)
    ]
    read = read_texts([reading.text for reading in readings], is_phantom=True)
    # Scenes whose own report is misread would be plants that nobody planted.
    sound = [
        number
        for number, (reading, trace_text) in enumerate(zip(readings, read, strict=True))
        if not planting.problems(reading, trace_text)
    ]
    chosen = _mixed(protocol, sound, readings, case_count)
    # Practice behind them, in the order drawn: films of both kinds, as they come.
    chosen += [number for number in sound if number not in set(chosen)][:practice_count]
    if len(chosen) < wanted:
        raise UserError(f"--cases=phantom:{case_count}: only {len(chosen)} sound scenes were drawn")
    films = _films_for_the_eye([scenes[number][0] for number in chosen], protocol.film_side)
    # What the grammar says of a scene is what is so, and what the AI says.
    cases = [
        Case(
            pixels=film,
            model_input=scenes[number][1],
            truth=readings[number].states,
            truth_sides=readings[number].sides,
            natural=readings[number],
            shown=readings[number],
        )
        for number, film in zip(chosen, films, strict=True)
    ]
    scene_rows_ = [scenes[number][0] for number in chosen[:case_count]]
    planted = _plant(protocol, cases[:case_count], scene_rows_, chosen[:case_count])
    return CaseSet(tuple(planted), tuple(cases[case_count:]), True)


def _draw_scenes(seed: int, count: int) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Scenes and their films. Whole batches of one size: one program, whatever is asked for."""
    scenes = []
    for first in range(0, count, _BATCH):
        batch = phantom.make_batch(seed, "test", "A", np.arange(first, first + _BATCH))
        # Only the rows that are asked for are kept; the batch is what was compiled.
        scenes += [
            (phantom.scene_row(batch["scene"], row), batch["image"][row]) for row in range(_BATCH)
        ]
    return scenes[:count]


def _films_for_the_eye(scene_rows: Sequence[dict[str, Any]], side: int) -> list[np.ndarray]:
    """Render scenes once more, side x side pixels each."""
    films: list[np.ndarray] = []
    for first in range(0, len(scene_rows), _EYE_BATCH):
        batch = list(scene_rows[first : first + _EYE_BATCH])
        # The last batch is filled up, so that there is one program.
        filled = batch + batch[:1] * (_EYE_BATCH - len(batch))
        scene = jax.tree.map(lambda *values: np.stack(values), *filled)
        films += list(np.asarray(_render(scene, side))[: len(batch)])
    return films


@functools.partial(jax.jit, static_argnames="side")
def _render(scene: dict[str, Any], side: int) -> jax.Array:
    return phantom.render(scene, side)


def _mixed(
    protocol: Protocol, sound: Sequence[int], readings: Sequence[Frozen], case_count: int
) -> list[int]:
    """Choose scenes so that each label of the protocol is there in its share of them, and some have none."""
    labels_of = {
        number: {
            label_name
            for label_name in protocol.suspicion_labels
            if readings[number].states[label_name] == PRESENT
        }
        for number in sound
    }
    suspect = [number for number in sound if labels_of[number]]
    others = [number for number in sound if not labels_of[number]]
    most = min(len(suspect), max(round(case_count * _SUSPECT), case_count - len(others)))
    missing = dict.fromkeys(protocol.suspicion_labels, round(protocol.label_share * case_count))
    chosen: list[int] = []
    while len(chosen) < most:
        # Whatever brings the most of what is still missing; of equals the one that was drawn first.
        best = max(
            suspect, key=lambda n: sum(missing[label_name] > 0 for label_name in labels_of[n])
        )
        suspect.remove(best)
        chosen.append(best)
        for label_name in labels_of[best]:
            missing[label_name] -= 1
    # In the order drawn: what was chosen last has no place of its own.
    return sorted(chosen + others[: case_count - len(chosen)])


def _plant(
    protocol: Protocol, cases: Sequence[Case], scene_rows: Sequence[dict], numbers: Sequence[int]
) -> list[Case]:
    """Plant the protocol's share of errors, kinds in turn, in abnormal cases."""
    generator = np.random.default_rng([protocol.seed, _PLANTS])
    # Kinds in turn, so that their shares are equal.
    wanted = round(protocol.plant_share * len(cases))
    planted = list(cases)
    open_places = [int(place) for place in generator.permutation(len(cases))]
    for plant_turn in range(wanted):
        error_kind = protocol.plant_kinds[plant_turn % len(protocol.plant_kinds)]
        for place in open_places:
            planted_case = _plant_one(
                protocol, cases[place], scene_rows[place], numbers[place], error_kind
            )
            if planted_case is not None:
                planted[place] = planted_case
                open_places.remove(place)
                break
        else:
            raise UserError(
                f"plants: only {plant_turn} of {wanted} could be made; more cases or a smaller share"
            )
    return planted


def _plant_one(
    protocol: Protocol, study_case: Case, scene_row: dict, number: int, error_kind: str
) -> Case | None:
    """One case with an error of a kind, if the labeler reads any as it was meant."""
    # A stream of each case's own: what is planted in one does not hang on the others.
    generator = np.random.default_rng([protocol.seed, _PLANTS, number])
    for label_name, changed in grammar.candidates(scene_row, error_kind, generator):
        shown_reading = grammar.frozen_of_scene(changed, "A", [protocol.seed, number])
        plant = planting.plant_of(error_kind, label_name, study_case.natural, shown_reading)
        if plant is None:
            continue
        [reading] = read_texts([shown_reading.text], is_phantom=True)
        if not planting.problems(shown_reading, reading):
            return replace(study_case, shown=shown_reading, plant=plant)
    return None


# ---- Manifests -------------------------------------------------------------------------------------


def _manifest_cases(protocol: Protocol, manifest_path: Path, practice_count: int) -> CaseSet:
    """Read real cases; their errors come from a list that people have reviewed."""
    try:
        lines = manifest_path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--cases={protocol.cases}: phantom:N or a manifest; cannot be read"
        ) from None
    scene_rows_ = [
        _manifest_row(manifest_path, number, line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if len(scene_rows_) < practice_count + len(protocol.arms):
        raise UserError(
            f"{manifest_path}: {len(scene_rows_)} cases are too few, {practice_count} are for practice"
        )
    # All at once: one program.
    natural = read_texts([values["reasoning"] for values in scene_rows_], is_phantom=False)
    cases = []
    for number, (values, reading) in enumerate(zip(scene_rows_, natural, strict=True), 1):
        frozen = freeze_text(values["reasoning"], reading, values.get("answer") or ())
        image = _film(manifest_path, number, values)
        study_case = Case(
            pixels=image.pixels,
            truth={
                label_name: _TRUTH_WORDS[state]
                for label_name, state in values["labels"].items()
                if state is not None
            },
            truth_sides=values.get("sides") or {},
            natural=frozen,
            shown=frozen,
        )
        cases.append(_with_listed_plant(manifest_path, number, study_case, values.get("plant")))
    # The last ones: planted cases are never practice.
    practice = cases[len(cases) - practice_count :]
    if any(study_case.plant for study_case in practice):
        raise UserError(
            f"{manifest_path}: the last {practice_count} cases are practice, and one has a plant"
        )
    return CaseSet(tuple(cases[: len(cases) - practice_count]), tuple(practice), False)


def _manifest_row(manifest_path: Path, number: int, line: str) -> dict[str, Any]:
    """One line, checked field by field; no message repeats what stands in it."""
    try:
        values = json.loads(line)
        # Whatever is missing or of another type ends in one line.
        labels, reasoning = values["labels"], values["reasoning"]
        known = set(labels) <= set(CHEXPERT_14) and set(labels.values()) <= {1, 0, -1, None}
        is_sound = known and isinstance(reasoning, str) and isinstance(values["image"], str)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise UserError(
            f"{manifest_path}:{number}: an object with image, labels (14 names) and reasoning"
        )
    return values


def _film(manifest_path: Path, number: int, values: Mapping[str, Any]) -> Image:
    """The film of a row, a path beside the manifest."""
    # Through the same guarded reader as everywhere.
    image = read_image(manifest_path.parent / values["image"])
    if image.meta["unusable"]:
        raise UserError(f"{manifest_path}:{number}: {shown(image.meta['unusable'][0])}")
    return image


def _with_listed_plant(
    manifest_path: Path, number: int, study_case: Case, listed: Mapping[str, Any] | None
) -> Case:
    """A case with the error that the list has for it."""
    if listed is None:
        return study_case
    error_kind, label_name = listed.get("kind"), listed.get("label")
    trace_text = listed.get("reasoning")
    if (
        error_kind not in ("add", "drop", "side", "hedge")
        or label_name not in CHEXPERT_14
        or not trace_text
    ):
        raise UserError(f"{manifest_path}:{number}: plant: kind, label and reasoning")
    reading, natural = read_texts([trace_text, study_case.natural.text], is_phantom=False)
    frozen = freeze_text(trace_text, reading, listed.get("answer") or ())
    plant = planting.plant_of(error_kind, label_name, study_case.natural, frozen)
    # Read by the labeler, as readers' reports will be: what it does not see cannot be counted.
    if plant is None:
        raise UserError(
            f"{manifest_path}:{number}: plant: the labeler does not read that one change, of that kind, alone"
        )
    # What the AI contradicts by itself is the AI's own; what only the plant does would give it away.
    made = set(planting.contradictions(reading)) - set(planting.contradictions(natural))
    # Chips and sentences are shown beside each other, and both have to have the error.
    read_state = STATE_WORDS.get(reading.states[CHEXPERT_14.index(label_name)], SILENT)
    if read_state != plant.state_shown:
        made.add(f"{label_name}: the reasoning is read as {read_state}, not {plant.state_shown}")
    if made:
        raise UserError(f"{manifest_path}:{number}: plant: {min(made)}")
    return replace(study_case, shown=frozen, plant=plant)
