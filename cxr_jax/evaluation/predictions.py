"""What each model of an evaluation answered to each unit of each set, beside what is so: predictions.npz of a run.

So that two runs can be compared on the same films later, whatever families their models are of, and any number can be
computed again, without a model. Ids of films stand in it as the set has them, patients as numbers: it is for the run's
own folder, as samples.jsonl is.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.evaluation.scored_sets import ScoredSet
from cxr_jax.evaluation.set_scores import SetAnswers, Unit
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics.bootstrap import unit_of_rows
from cxr_jax.metrics.label_counts import Answers, Reference, check_rows
from cxr_jax.runtime import whole_files

FILE = "predictions.npz"
FORMAT = 1  # of the file: one that is not known is not guessed at
_ABOUT = "about"  # the name of its JSON


@dataclass(frozen=True, kw_only=True)
class SetPredictions:
    """The units of a set, and what models answered to them.

    Attributes:
        ids: [N] what each unit is called: the film, or the study.
        protocol: one line that says what is scored.
        reference: what is so; `groups` are numbers of patients, or None.
        answers: model -> what it answered.
        log_odds: model -> float32 [N, 14] of naming; models without are not there.
    """

    ids: np.ndarray
    protocol: str
    reference: Reference
    answers: Mapping[str, Answers]
    log_odds: Mapping[str, np.ndarray]


def of_set(
    scored_set: ScoredSet, unit: Unit, answers: Mapping[str, SetAnswers], protocol: str
) -> SetPredictions:
    """Gather what was read of a set, in the unit that is scored."""
    ids = scored_set.ids
    # A study has the name that it has among its patient's.
    if unit.studies is not None and scored_set.studies is not None:
        ids = [scored_set.studies[film] for film in unit.studies.first]
    # In the unit, too: of a study the largest of its films.
    log_odds = {model: unit.log_odds(of_model.real) for model, of_model in answers.items()}
    return SetPredictions(
        ids=np.array(ids, str),
        protocol=protocol,
        reference=unit.reference,
        answers={
            model: unit.answers(Answers(of_model.real.answer, of_model.real.valid))
            for model, of_model in answers.items()
        },
        log_odds={model: values for model, values in log_odds.items() if values is not None},
    )


def save(workdir: Path, sets: Mapping[str, SetPredictions]) -> None:
    """Write predictions.npz into a run's folder: whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {"format": FORMAT, "labels": list(CHEXPERT_14), "sets": []}
    # Arrays are named by number: names of sets and models are anybody's text.
    for place, (set_name, of_set_) in enumerate(sets.items()):
        rows = check_rows(Answers(of_set_.reference.truth), of_set_.reference)
        columns = {"ids": of_set_.ids, "truth": rows.truth, "known": rows.known}
        # What nobody said costs a share of a false positive: without it F1 would come out differently.
        columns["blank"] = rows.blank
        if of_set_.reference.groups is not None:
            columns["patient"] = unit_of_rows(len(rows.truth), of_set_.reference.groups)
        for number, (model, given) in enumerate(of_set_.answers.items()):
            checked = check_rows(given, of_set_.reference)
            columns |= {f"answer {number}": checked.labels, f"valid {number}": checked.valid}
            if model in of_set_.log_odds:
                columns[f"log_odds {number}"] = of_set_.log_odds[model].astype(np.float32)
        arrays |= {f"{place} {name}": values for name, values in columns.items()}
        models = list(of_set_.answers)
        about["sets"].append({"name": set_name, "protocol": of_set_.protocol, "models": models})
    # In memory first: a file of this name is whole or not there.
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{_ABOUT: np.array(json.dumps(about))}, **arrays)  # type: ignore[arg-type]
    whole_files.write_bytes(workdir / FILE, buffer.getvalue())


def load(workdir: Path) -> dict[str, SetPredictions]:
    """Read the predictions of a run: set name -> what was answered.

    Raises:
        UserError: if there are none, or the file is damaged or of another format.
    """
    path = workdir / FILE
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; evaluations write it since they can be compared: evaluate again"
        )
    try:
        # Without pickles: a file of somebody else's runs no code here.
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(str(arrays[_ABOUT]))
            if about["format"] != FORMAT or about["labels"] != list(CHEXPERT_14):
                raise UserError(f"{path}: not predictions of format {FORMAT}")
            return {
                of_set_["name"]: _load_set(arrays, place, of_set_)
                for place, of_set_ in enumerate(about["sets"])
            }
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged, or no file of predictions") from error


def _load_set(arrays: Any, place: int, about: Mapping[str, Any]) -> SetPredictions:
    take = {
        name.partition(" ")[2]: arrays[name]
        for name in arrays.files
        if name.startswith(f"{place} ")
    }
    # Without patients each unit is one, as it was for the run itself.
    reference = Reference(take["truth"], take["known"], take.get("patient"), take["blank"])
    answers, log_odds = {}, {}
    for number, model in enumerate(about["models"]):
        answers[model] = Answers(take[f"answer {number}"], take[f"valid {number}"])
        # Shapes that do not agree are a damaged file, and not an error of whoever compares.
        check_rows(answers[model], reference)
        if f"log_odds {number}" in take:
            log_odds[model] = take[f"log_odds {number}"]
    if len(take["ids"]) != len(take["truth"]):
        raise ValueError("ids")
    return SetPredictions(
        ids=take["ids"],
        protocol=str(about["protocol"]),
        reference=reference,
        answers=answers,
        log_odds=log_odds,
    )
