"""The task `evaluate`, and the final evaluation of every run: scores, audit, comparison, cases, report.

`python -m cxr_jax.main --config=experiments/eval.py` runs `run` alone; SFT and RL end with `evaluate_models`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cxr_jax import report
from cxr_jax.config.sections import EvaluationConfig, RunConfig
from cxr_jax.data.prompts import as_text, most_films
from cxr_jax.data.sources.base import Batch
from cxr_jax.data.sources.splits import Splits, held_out, open_splits
from cxr_jax.evaluation.film_use import answer_from_other_images, answer_with_films_swapped
from cxr_jax.evaluation.reader import Reader, Readings
from cxr_jax.inference.prompts import Prompts
from cxr_jax.metrics import alarms, scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from cxr_jax.models import registry
from cxr_jax.models.image_batches import images_of, open_images
from cxr_jax.report.text_table import text_table
from cxr_jax.runtime import processes
from cxr_jax.runtime.layout import Layout
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.signals import Stop, StoppedError
from cxr_jax.runtime.trees import Tree
from cxr_jax.training import checks, earlier_runs
from cxr_jax.weights import pretrained

# ---- The task --------------------------------------------------------------------------------------


def check(config: ConfigDict) -> None:
    """Refuse settings that cannot work, before anything is written.

    Raises:
        UserError: naming the key or the file that is wrong.
    """
    checks.check_common(config)


def run(config: ConfigDict, run_folder: RunFolder, stop: Stop, layout: Layout) -> dict[str, Any]:
    """Evaluate one model on every test set.

    Returns:
        "step" and "results", or "stopped".
    """
    # What the config names is loaded, opened and checked before the first image is read.
    settings = RunConfig.from_config(config)
    starting_model = pretrained.load_starting_model(settings.model, settings.seed)
    model_config = starting_model.config.with_attention(settings.attention)
    processor = registry.processor_of(model_config)
    splits = open_splits(settings.data, processor=processor)
    splits = replace(splits, contaminated=earlier_runs.contamination(settings, splits))
    # Where images are squares, those of all test sets are of one size: the first one tells it.
    image_size = next(iter(splits.test.values())).size
    count = most_films(splits.prompts())
    images = open_images(settings.data, model_config, image_size, count)
    # Prompts of all sets, so that the longest decides the width of the one program.
    prompts = Prompts.for_images(
        starting_model.tokenizer,
        model_config,
        images,
        settings.max_completion,
        texts=splits.prompts(),
    )
    reader = Reader(
        model_config,
        starting_model.tokenizer,
        prompts,
        settings.eval.batch_size,
        pretrained.DTYPES[settings.dtype],
        splits.train.lexicon,
        poll=stop.check,
        unwatched=stop.unwatched,
        layout=layout,
    )
    try:
        # On the host first: a model that is divided over devices may fit on none of them.
        with layout.on_host():
            params = pretrained.to_device(starting_model.params, settings.dtype)
        models = {settings.model: layout.state(params)}
        result_table = evaluate_models(models, reader, splits, run_folder, settings)
        return {"step": 0, "results": {"table": result_table}}
    # A stop in the middle gives no result: half an evaluation would look like a whole one.
    except StoppedError:
        return {"stopped": stop.requested, "step": 0}


# ---- Models on test sets -----------------------------------------------------------------------------


@dataclass(frozen=True)
class SetAnswers:
    """What a model answers to the images of a set, and to other images in their place.

    Attributes:
        real: the readings of the images.
        other_images: "blank", "swapped" -> what is answered when the image is mid-grey, or the next one's; of phantom
            studies "swapped lateral", "swapped prior", too: that film alone is the next one's.
    """

    real: Readings
    other_images: dict[str, Answers]


def evaluate_models(
    models: dict[str, Tree],
    reader: Reader,
    splits: Splits,
    run_folder: RunFolder,
    settings: RunConfig,
    notes: Sequence[str] = (),
) -> str:
    """Score every model on every test set, compare the last two, write the report.

    Args:
        models: name -> parameters, in the order of the table.
        notes: sentences for the head of the report.

    Returns:
        The results as a table for the terminal; empty on all processes but the first.
    """
    tables: dict[str, dict] = {model_name: {} for model_name in models}
    comparisons: list[dict] = []
    cases: list[report.Case] = []
    # The last model is the one that a run has made; the one before is what it is held against.
    model_names = list(models)
    for set_name, source in splits.test.items():
        held_out_batch = held_out(source, settings.eval.n_final, reader.poll)
        image_count = len(held_out_batch["texts"])

        # Every process reads its share of the images; what follows is for the first alone.
        answers, trace_terms = {}, {}
        for model_name, params in models.items():
            print(f"evaluating {model_name} on {image_count} images of {set_name}", flush=True)
            answers[model_name] = answer_all(reader, params, held_out_batch)
            trace_terms[model_name] = reader.score_traces(answers[model_name].real, held_out_batch)
        if not processes.is_main():
            continue

        for model_name in model_names:
            tables[model_name][set_name] = _summary(
                answers[model_name], trace_terms[model_name], held_out_batch, settings.eval
            )
            real = answers[model_name].real
            _warn_of_format(f"{model_name} on {set_name}", real, held_out_batch["solution"])
        readings = {model_name: answers[model_name].real for model_name in model_names}
        if len(model_names) > 1:
            last_two = model_names[-2], model_names[-1]
            resamples = settings.eval.bootstrap
            comparisons += compare(set_name, last_two, readings, held_out_batch, resamples)
        # Cases are those of the last model alone, for a person to look at.
        last_model = model_names[-1]
        cases += cases_to_show(
            set_name, last_model, readings[last_model], held_out_batch, reader, settings.eval.cases
        )
    if not processes.is_main():
        return ""

    run_folder.commit_changes()
    remarks = report.Remarks(label_policy=splits.label_policy, contaminated=splits.contaminated)
    _write_report(run_folder, settings, tables, comparisons, cases, notes, remarks)
    return text_table(tables, comparisons, settings.data.source, remarks)


def _warn_of_format(name: str, readings: Readings, solution: np.ndarray) -> None:
    if readings.has_answers_without_format(solution):
        print(f"alarm: format never held by {name}: {alarms.FORMAT_NEVER_HELD}", flush=True)


def _write_report(
    run_folder: RunFolder,
    settings: RunConfig,
    tables: dict[str, dict],
    comparisons: list[dict],
    cases: list[report.Case],
    notes: Sequence[str],
    remarks: report.Remarks,
) -> None:
    report.write_report(
        run_folder.path,
        title=f"cxr_jax {settings.task}: {settings.model}",
        tables=tables,
        cases=cases,
        notes=list(notes),
        # The page says of its numbers where the images came from: phantoms are no patients.
        kind=settings.data.source,
        comparisons=comparisons,
        remarks=remarks,
    )


def answer_all(reader: Reader, params: Tree, held_out_batch: Batch) -> SetAnswers:
    """Read the real, blank and swapped images of a set (`film_use`).

    Of phantom studies every film but the first is swapped alone, too.
    """
    images, texts = images_of(held_out_batch), held_out_batch["texts"]
    real_readings = reader.read(params, images, texts, held_out_batch.get("ids", ()))
    other_images = answer_from_other_images(reader, params, images, texts, real_readings)
    film_by_film = answer_with_films_swapped(reader, params, held_out_batch)
    return SetAnswers(real_readings, {**other_images, **film_by_film})


def _summary(
    answers: SetAnswers,
    trace_terms: dict[str, np.ndarray],
    held_out_batch: Batch,
    settings: EvaluationConfig,
) -> dict[str, Any]:
    return scores.summary(
        Answers(answers.real.answer, answers.real.valid),
        Reference.from_batch(held_out_batch),
        other_images=answers.other_images,
        trace=trace_terms,
        bootstrap=Bootstrap(settings.bootstrap),
    )


def compare(
    set_name: str,
    model_pair: tuple[str, str],
    readings: dict[str, Readings],
    held_out_batch: Batch,
    resamples: int,
) -> list[dict[str, Any]]:
    """Bootstrap the paired differences, second minus first, of Jaccard and macro-F1, with 95 % intervals."""
    first, second = model_pair
    comparison_rows = []
    # The two scores by which a run is judged, on the same resamples for both models.
    for metric in ("jaccard", "macro_f1"):
        difference, lower_bound, upper_bound = scores.paired_bootstrap(
            metric,
            Answers(readings[first].answer, readings[first].valid),
            Answers(readings[second].answer, readings[second].valid),
            Reference.from_batch(held_out_batch),
            bootstrap=Bootstrap(resamples),
        )
        comparison = {"a": first, "b": second, "set": set_name, "metric": metric}
        comparison_rows.append(
            comparison | {"diff": difference, "lo": lower_bound, "hi": upper_bound}
        )
    return comparison_rows


def cases_to_show(
    set_name: str,
    model: str,
    readings: Readings,
    held_out_batch: Batch,
    reader: Reader,
    case_count: int,
) -> list[report.Case]:
    """Choose cases for the report: the worst half, the best quarter and a quarter from between."""
    jaccard = scores.jaccard_rows(
        Answers(readings.answer, readings.valid), Reference.from_batch(held_out_batch)
    )
    # A score that is undefined, with no label known, sorts after the best.
    worst_first = np.argsort(np.nan_to_num(jaccard, nan=2.0), kind="stable")
    case_count = min(case_count, len(worst_first))
    worst_count, best_count = case_count // 2, case_count // 4
    # From the sorted rest, at even distances: neither the worst nor the best.
    between = worst_first[worst_count : len(worst_first) - best_count]
    spread_places = np.linspace(0, len(between) - 1, case_count - worst_count - best_count).astype(
        int
    )
    shown_rows = [
        *worst_first[:worst_count],
        *between[spread_places],
        *worst_first[len(worst_first) - best_count :],
    ]

    cases = []
    for image_index, completion_text in zip(
        shown_rows, reader.texts(readings, shown_rows), strict=True
    ):
        # Files have names of their own; phantoms are numbered.
        image_id = (
            str(held_out_batch["ids"][image_index])
            if "ids" in held_out_batch
            else f"{set_name}-{image_index}"
        )
        case = report.Case(
            image=reader.prompts.images.shown(images_of(held_out_batch), image_index),
            prompt=as_text(held_out_batch["texts"][image_index]),
            completion=completion_text,
            answer=readings.answer[image_index],
            truth=held_out_batch["solution"][image_index],
            known=held_out_batch["known"][image_index],
            hospital=set_name,
            model=model,
            score=None if np.isnan(jaccard[image_index]) else float(jaccard[image_index]),
            id=image_id,
        )
        cases.append(case)
    return cases
