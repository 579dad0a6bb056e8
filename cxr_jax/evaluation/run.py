"""The task `evaluate`, and the final evaluation of every run: scores, audit, comparison, cases, report.

`python -m cxr_jax.main --config=experiments/eval.py` runs `run` alone; SFT and RL end with `evaluate_models`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cxr_jax import report
from cxr_jax.config.sections import EvaluationConfig, RunConfig
from cxr_jax.data.sources.base import Batch
from cxr_jax.data.sources.splits import Splits, held_out, open_splits
from cxr_jax.evaluation.reader import Reader, Readings
from cxr_jax.inference.prompts import Prompts
from cxr_jax.metrics import scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from cxr_jax.models.qwen2_5_vl.patches import grid_of
from cxr_jax.report.text_table import text_table
from cxr_jax.runtime import processes
from cxr_jax.runtime.layout import Layout
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.signals import Stop, StoppedError
from cxr_jax.runtime.trees import Tree
from cxr_jax.training import checks
from cxr_jax.weights import pretrained

BLANK_LEVEL = 0.5  # mid-grey: an image without a finding, without a chest


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
    start = pretrained.load_starting_model(settings.model, settings.seed)
    splits = open_splits(settings.data)
    # All test sets have images of one size: the first one tells it.
    size = next(iter(splits.test.values())).size
    # Prompts of all sets, so that the longest decides the width of the one program.
    prompts = Prompts(
        start.tokenizer,
        start.config,
        grid_of(size, start.config),
        settings.max_completion,
        texts=splits.prompts(),
    )
    reader = Reader(
        start.config,
        start.tokenizer,
        prompts,
        settings.eval.batch_size,
        pretrained.DTYPES[settings.dtype],
        splits.train.lexicon,
        poll=stop.check,
        layout=layout,
    )
    try:
        # On the host first: a model that is divided over devices may fit on none of them.
        with layout.on_host():
            params = pretrained.to_device(start.params, settings.dtype)
        models = {settings.model: layout.state(params)}
        table = evaluate_models(models, reader, splits, run_folder, settings)
        return {"step": 0, "results": {"table": table}}
    # A stop in the middle gives no result: half an evaluation would look like a whole one.
    except StoppedError:
        return {"stopped": stop.requested, "step": 0}


# ---- Models on test sets -----------------------------------------------------------------------------


@dataclass(frozen=True)
class SetAnswers:
    """What a model answers to the images of a set, and to other images in their place.

    Attributes:
        real: the readings of the images.
        other_images: "blank", "swapped" -> what is answered when the image is mid-grey, or the next one's.
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
    tables: dict[str, dict] = {name: {} for name in models}
    comparisons: list[dict] = []
    cases: list[report.Case] = []
    # The last model is the one that a run has made; the one before is what it is held against.
    names = list(models)
    for set_name, source in splits.test.items():
        data = held_out(source, settings.eval.n_final, reader.poll)

        # Every process reads its share of the images; what follows is for the first alone.
        answers, traces = {}, {}
        for name, params in models.items():
            print(f"evaluating {name} on {len(data['image'])} images of {set_name}", flush=True)
            answers[name] = answer_all(reader, params, data)
            traces[name] = reader.score_traces(answers[name].real, data)
        if not processes.is_main():
            continue

        for name in names:
            tables[name][set_name] = _summary(answers[name], traces[name], data, settings.eval)
        readings = {name: answers[name].real for name in names}
        if len(names) > 1:
            pair = names[-2], names[-1]
            comparisons += compare(set_name, pair, readings, data, settings.eval.bootstrap)
        # Cases are those of the last model alone, for a person to look at.
        last = names[-1]
        cases += cases_to_show(set_name, last, readings[last], data, reader, settings.eval.cases)
    if not processes.is_main():
        return ""

    # The report says of its numbers where the images came from: phantoms are no patients.
    kind = settings.data.source
    report.write_report(
        run_folder.path,
        title=f"cxr_jax {settings.task}: {settings.model}",
        tables=tables,
        cases=cases,
        notes=list(notes),
        kind=kind,
        comparisons=comparisons,
    )
    return text_table(tables, comparisons, kind)


def answer_all(reader: Reader, params: Tree, data: Batch) -> SetAnswers:
    """Read the real, blank and swapped images of a set.

    Swapped: each case is answered from the image of the next one, which is the real reading moved by one. Blank: one
    reading of a mid-grey image stands for all, as the prompts of a set are one.
    """
    real = reader.read(params, data["image"], data["texts"])
    # One grey image and one prompt: the answer without looking.
    grey = np.full_like(data["image"][:1], BLANK_LEVEL)
    blank = reader.read(params, grey, data["texts"][:1])
    count = len(data["image"])
    blank_everywhere = Answers(
        np.repeat(blank.answer, count, axis=0), np.repeat(blank.valid, count, axis=0)
    )
    # Reading the moved images once more would give the same readings, moved.
    swapped = Answers(np.roll(real.answer, 1, axis=0), np.roll(real.valid, 1))
    return SetAnswers(real, {"blank": blank_everywhere, "swapped": swapped})


def _summary(
    answers: SetAnswers, traces: dict[str, np.ndarray], data: Batch, settings: EvaluationConfig
) -> dict[str, Any]:
    return scores.summary(
        Answers(answers.real.answer, answers.real.valid),
        Reference(data["solution"], data["known"]),
        other_images=answers.other_images,
        trace=traces,
        bootstrap=Bootstrap(settings.bootstrap),
    )


def compare(
    set_name: str, pair: tuple[str, str], readings: dict[str, Readings], data: Batch, resamples: int
) -> list[dict[str, Any]]:
    """Bootstrap the paired differences, second minus first, of Jaccard and macro-F1, with 95 % intervals."""
    first, second = pair
    rows = []
    # The two scores by which a run is judged, on the same resamples for both models.
    for metric in ("jaccard", "macro_f1"):
        difference, low, high = scores.paired_bootstrap(
            metric,
            Answers(readings[first].answer, readings[first].valid),
            Answers(readings[second].answer, readings[second].valid),
            Reference(data["solution"], data["known"]),
            bootstrap=Bootstrap(resamples),
        )
        row = {"a": first, "b": second, "set": set_name, "metric": metric}
        rows.append(row | {"diff": difference, "lo": low, "hi": high})
    return rows


def cases_to_show(
    set_name: str, model: str, readings: Readings, data: Batch, reader: Reader, count: int
) -> list[report.Case]:
    """Choose cases for the report: the worst half, the best quarter and a quarter from between."""
    jaccard = scores.jaccard_rows(
        Answers(readings.answer, readings.valid), Reference(data["solution"], data["known"])
    )
    # A score that is undefined, with no label known, sorts after the best.
    order = np.argsort(np.nan_to_num(jaccard, nan=2.0), kind="stable")
    count = min(count, len(order))
    worst, best = count // 2, count // 4
    # From the sorted rest, at even distances: neither the worst nor the best.
    between = order[worst : len(order) - best]
    spread = np.linspace(0, len(between) - 1, count - worst - best).astype(int)
    rows = [*order[:worst], *between[spread], *order[len(order) - best :]]

    cases = []
    for row, text in zip(rows, reader.texts(readings, rows), strict=True):
        # Files have names of their own; phantoms are numbered.
        name = str(data["ids"][row]) if "ids" in data else f"{set_name}-{row}"
        case = report.Case(
            image=np.asarray(data["image"][row]),
            prompt=data["texts"][row],
            completion=text,
            answer=readings.answer[row],
            truth=data["solution"][row],
            known=data["known"][row],
            hospital=set_name,
            model=model,
            score=None if np.isnan(jaccard[row]) else float(jaccard[row]),
            id=name,
        )
        cases.append(case)
    return cases
