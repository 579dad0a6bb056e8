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
    file_facts: dict[str, Any] = {"format": FORMAT, "labels": list(CHEXPERT_14), "sets": []}
    # Arrays are named by number: names of sets and models are anybody's text.
    for set_place, (set_name, of_set_) in enumerate(sets.items()):
        checked_rows = check_rows(Answers(of_set_.reference.truth), of_set_.reference)
        set_columns = {"ids": of_set_.ids, "truth": checked_rows.truth, "known": checked_rows.known}
        # What nobody said costs a share of a false positive: without it F1 would come out differently.
        set_columns["blank"] = checked_rows.blank
        if of_set_.reference.groups is not None:
            set_columns["patient"] = unit_of_rows(len(checked_rows.truth), of_set_.reference.groups)
        for model_number, (model, model_answers) in enumerate(of_set_.answers.items()):
            checked_answers = check_rows(model_answers, of_set_.reference)
            set_columns |= {
                f"answer {model_number}": checked_answers.labels,
                f"valid {model_number}": checked_answers.valid,
            }
            if model in of_set_.log_odds:
                set_columns[f"log_odds {model_number}"] = of_set_.log_odds[model].astype(np.float32)
        arrays |= {f"{set_place} {name}": values for name, values in set_columns.items()}
        models = list(of_set_.answers)
        file_facts["sets"].append(
            {"name": set_name, "protocol": of_set_.protocol, "models": models}
        )
    # In memory first: a file of this name is whole or not there.
    file_buffer = io.BytesIO()
    np.savez_compressed(file_buffer, **{_ABOUT: np.array(json.dumps(file_facts))}, **arrays)  # type: ignore[arg-type]
    whole_files.write_bytes(workdir / FILE, file_buffer.getvalue())


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
            file_facts = json.loads(str(arrays[_ABOUT]))
            if file_facts["format"] != FORMAT or file_facts["labels"] != list(CHEXPERT_14):
                raise UserError(f"{path}: not predictions of format {FORMAT}")
            return {
                of_set_["name"]: _load_set(arrays, set_place, of_set_)
                for set_place, of_set_ in enumerate(file_facts["sets"])
            }
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged, or no file of predictions") from error


def _load_set(arrays: Any, set_place: int, file_facts: Mapping[str, Any]) -> SetPredictions:
    set_arrays = {
        name.partition(" ")[2]: arrays[name]
        for name in arrays.files
        if name.startswith(f"{set_place} ")
    }
    # Without patients each unit is one, as it was for the run itself.
    reference = Reference(
        set_arrays["truth"], set_arrays["known"], set_arrays.get("patient"), set_arrays["blank"]
    )
    answers, log_odds = {}, {}
    for model_number, model in enumerate(file_facts["models"]):
        answers[model] = Answers(
            set_arrays[f"answer {model_number}"], set_arrays[f"valid {model_number}"]
        )
        # Shapes that do not agree are a damaged file, and not an error of whoever compares.
        check_rows(answers[model], reference)
        if f"log_odds {model_number}" in set_arrays:
            log_odds[model] = set_arrays[f"log_odds {model_number}"]
    if len(set_arrays["ids"]) != len(set_arrays["truth"]):
        raise ValueError("ids")
    return SetPredictions(
        ids=set_arrays["ids"],
        protocol=str(file_facts["protocol"]),
        reference=reference,
        answers=answers,
        log_odds=log_odds,
    )
