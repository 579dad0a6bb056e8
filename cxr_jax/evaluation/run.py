"""The task `evaluate`, and the final evaluation of every run: scores, audit, comparison, cases, report.

`python -m cxr_jax.main --config=experiments/eval.py` runs `run` alone; SFT and RL end with `evaluate_models`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cxr_jax import report
from cxr_jax.config.sections import EvaluationConfig, RunConfig
from cxr_jax.data.prompts import as_text, most_films
from cxr_jax.data.sources.base import Batch, Source
from cxr_jax.data.sources.several.run_sources import open_sources
from cxr_jax.data.sources.splits import Splits, with_train_rows
from cxr_jax.evaluation import predictions, scored_sets, set_scores
from cxr_jax.evaluation.film_use import OtherImages
from cxr_jax.evaluation.occlusion import BoxAudit, CoverAudit
from cxr_jax.evaluation.predictions import SetPredictions
from cxr_jax.evaluation.reader import Reader, Readings, Samples
from cxr_jax.evaluation.scored_sets import ScoredSet
from cxr_jax.evaluation.set_scores import SetAnswers, Unit
from cxr_jax.inference.prompts import Prompts
from cxr_jax.metrics import alarms, scores
from cxr_jax.metrics.scores import Answers, Reference
from cxr_jax.models import registry
from cxr_jax.models.image_batches import images_of, open_images
from cxr_jax.report import card
from cxr_jax.report.text_table import text_table
from cxr_jax.runtime import processes
from cxr_jax.runtime.layout import Layout
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.signals import Stop, StoppedError
from cxr_jax.runtime.trees import Tree
from cxr_jax.training import checks, earlier_runs
from cxr_jax.weights import model_card, pretrained

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
    splits = open_sources(settings.data, processor=processor, only_scores=True)
    if settings.eval.include_train:
        splits = with_train_rows(splits)
    splits = replace(splits, contaminated=earlier_runs.contamination(settings, splits))
    if settings.data.is_data_set or settings.data.eval:
        run_folder.remember(protocol=splits.label_policy)
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
        splits.lexicon,
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
    why_not = reader.why_no_probabilities() if settings.eval.probabilities else None
    if why_not is not None:
        notes = [*notes, f"No probabilities, and nothing that needs them: {why_not}"]
        print(notes[-1], flush=True)
    # A model whose tokenizer cannot spell an answer is scored by its answers alone.
    weighs = settings.eval.probabilities and why_not is None

    results = _Results({model_name: {} for model_name in models})
    for set_name, source in splits.test.items():
        scored_set = scored_sets.open_scored_set(
            set_name, source, settings.eval.n_final, settings.data.seed
        )
        names = ", ".join(models)
        print(f"evaluating {names} on {len(scored_set)} images of {set_name}", flush=True)
        # Every process reads its share of the images; what follows is for the first alone.
        answers, facts = read_set(reader, models, scored_set, settings.eval, weighs=weighs)
        # The selection split that goes with the set, if it has one.
        if weighs and settings.eval.n_select and set_name in splits.select:
            answers = _recalibrated(answers, reader, models, splits.select[set_name], settings)
        if processes.is_main():
            results.add(scored_set, answers, facts, reader, settings, splits.label_policy)
    if not processes.is_main():
        return ""

    run_folder.commit_changes()
    remarks = report.Remarks(
        label_policy=splits.label_policy,
        contaminated=splits.contaminated,
        protocol=tuple(results.protocol),
    )
    # For comparisons with other runs, and for numbers that nobody has thought of yet.
    predictions.save(Path(run_folder.path), results.predictions)
    tables, comparisons = results.tables, results.comparisons
    _write_report(run_folder, settings, tables, comparisons, results.cases, notes, remarks)
    return text_table(tables, comparisons, settings.data.shown_kind, remarks)


def read_set(
    reader: Reader,
    models: dict[str, Tree],
    scored_set: ScoredSet,
    settings: EvaluationConfig,
    *,
    weighs: bool,
) -> tuple[dict[str, SetAnswers], Batch]:
    """Read a set part by part with every model: the real images, blank ones and those of others.

    Args:
        weighs: whether the probability of each finding is computed (`Reader.read`).

    Returns:
        The answers of each model, and what is so (`scored_sets.facts_of`).
    """
    # What is shown in place of the images is made beside them, while they are there.
    others = {
        model_name: OtherImages(
            reader, params, scored_set.texts, scored_set.images, scored_set.views
        )
        for model_name, params in models.items()
    }
    covers = {
        model_name: _cover_audits(reader, params, scored_set, settings)
        for model_name, params in models.items()
    }

    samples: dict[str, list[Samples]] = {model_name: [] for model_name in models}

    def look_elsewhere(model_name: str, places: np.ndarray, batch: Batch) -> None:
        # Where probabilities are: the same rules weigh what follows each trace.
        if weighs and settings.traces:
            texts = [scored_set.texts[place] for place in places]
            drawn = reader.sample(
                models[model_name], images_of(batch), texts, places, settings.traces
            )
            samples[model_name].append(drawn)
        others[model_name].add(places, images_of(batch))
        for audit in covers[model_name]:
            audit.add(places, batch)

    readings, facts = _read_parts(
        reader, models, scored_set, weighs=weighs, look_elsewhere=look_elsewhere
    )
    answers = {}
    for model_name, real in readings.items():
        terms = reader.score_traces(real, facts)
        answers[model_name] = SetAnswers(
            real,
            others[model_name].joined(real),
            terms,
            samples=Samples(*map(np.concatenate, zip(*samples[model_name], strict=True)))
            if samples[model_name]
            else None,
            covered=covers[model_name][0].joined(),
            boxed=covers[model_name][1].joined(),
        )
    return answers, facts


def _cover_audits(
    reader: Reader, params: Tree, scored_set: ScoredSet, settings: EvaluationConfig
) -> tuple[CoverAudit, BoxAudit]:
    """What is covered of a set: whole images and what phantoms show, and the boxes of films."""
    texts = scored_set.texts
    return (
        CoverAudit(reader, params, texts, settings),
        BoxAudit(reader, params, texts, settings, scored_set.box_mask),
    )


def _read_parts(
    reader: Reader,
    models: dict[str, Tree],
    scored_set: ScoredSet,
    *,
    weighs: bool,
    look_elsewhere: Callable[[str, np.ndarray, Batch], None] | None = None,
) -> tuple[dict[str, Readings], Batch]:
    parts: dict[str, list[Readings]] = {model_name: [] for model_name in models}
    facts: list[Batch] = []
    for places, batch in scored_set.parts(reader.batch_size, reader.poll):
        images = images_of(batch)
        texts, ids = (
            [column[place] for place in places] for column in (scored_set.texts, scored_set.ids)
        )
        # Images are made once for all models, and are gone before the next part is made.
        for model_name, params in models.items():
            parts[model_name].append(reader.read(params, images, texts, ids, weighs=weighs))
            if look_elsewhere is not None:
                look_elsewhere(model_name, places, batch)
        # The truth stays for the scores, the images go.
        facts.append(scored_sets.without_images(batch))
    readings = {model_name: Readings.joined(of_model) for model_name, of_model in parts.items()}
    return readings, scored_sets.facts_of(facts)


def _recalibrated(
    answers: dict[str, SetAnswers],
    reader: Reader,
    models: dict[str, Tree],
    select: Source,
    settings: RunConfig,
) -> dict[str, SetAnswers]:
    """The answers with what the selection split says of their probabilities."""
    # Other patients than those of the test set, and never more of them than are asked for.
    selection_set = scored_sets.open_scored_set(
        "select", select, settings.eval.n_select, settings.data.seed
    )
    readings, facts = _read_parts(reader, models, selection_set, weighs=True)
    # In the unit that is scored: the largest of several films is another distribution than one film's.
    unit = Unit.of_set(selection_set, facts, settings.eval.unit)
    return {
        model_name: replace(
            of_model,
            recalibration=set_scores.fit_recalibration(unit, readings[model_name], settings.eval),
        )
        for model_name, of_model in answers.items()
    }


@dataclass
class _Results:
    """What is collected of all sets: summaries by model and set, paired differences, cases, lines of protocol."""

    tables: dict[str, dict]
    comparisons: list[dict] = field(default_factory=list)
    cases: list[report.Case] = field(default_factory=list)
    protocol: list[str] = field(default_factory=list)
    predictions: dict[str, SetPredictions] = field(default_factory=dict)

    def add(
        self,
        scored_set: ScoredSet,
        answers: dict[str, SetAnswers],
        facts: Batch,
        reader: Reader,
        settings: RunConfig,
        label_policy: str,
    ) -> None:
        """Score a set."""
        unit, set_name = Unit.of_set(scored_set, facts, settings.eval.unit), scored_set.name
        protocol_line = scored_sets.protocol(scored_set, settings.eval.unit, label_policy)
        self.protocol.append(protocol_line)
        self.predictions[set_name] = predictions.of_set(scored_set, unit, answers, protocol_line)
        for model_name, of_model in answers.items():
            summary = set_scores.summarise(unit, of_model, settings.eval)
            self.tables[model_name][set_name] = {"protocol": protocol_line, **summary}
            _warn_of_format(f"{model_name} on {set_name}", of_model.real, facts["solution"])
        # The last model is the one that a run has made; the one before is what it is held against.
        model_names, readings = (
            list(answers),
            {model_name: of_model.real for model_name, of_model in answers.items()},
        )
        if len(model_names) > 1:
            last_two = model_names[-2], model_names[-1]
            self.comparisons += set_scores.compare(
                set_name, last_two, readings, unit, settings.eval.bootstrap
            )
        # Cases are those of the last model alone, for a person to look at.
        last_model = model_names[-1]
        self.cases += cases_to_show(
            scored_set, last_model, readings[last_model], facts, reader, settings.eval.cases
        )


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
        kind=settings.data.shown_kind,
        comparisons=comparisons,
        remarks=remarks,
    )
    # From the records that were just written, so that a card never says another number than the page.
    card.write(Path(run_folder.path), lambda model: model_card.name_of(Path(model)))


def cases_to_show(
    scored_set: ScoredSet,
    model: str,
    readings: Readings,
    facts: Batch,
    reader: Reader,
    case_count: int,
) -> list[report.Case]:
    """Choose cases for the report: the worst half, the best quarter and a quarter from between."""
    jaccard = scores.jaccard_rows(
        Answers(readings.answer, readings.valid), Reference.from_batch(facts)
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
        # The images of a set are gone by now: these few are made again.
        shown = scored_set.images(np.array([image_index]))
        case = report.Case(
            image=reader.prompts.images.shown(shown, 0),
            prompt=as_text(scored_set.texts[image_index]),
            completion=completion_text,
            answer=readings.answer[image_index],
            truth=facts["solution"][image_index],
            known=facts["known"][image_index],
            hospital=scored_set.name,
            model=model,
            score=None if np.isnan(jaccard[image_index]) else float(jaccard[image_index]),
            id=scored_set.ids[image_index],
        )
        cases.append(case)
    return cases
