"""Evaluation: greedy reading of held-out images, the image-use audit, the out-of-distribution guard, final results.

`python -m cxr_jax.main --config=experiments/eval.py` runs `run` alone; SFT and RL call the pieces.
"""

import numpy as np

from cxr_jax import report
from cxr_jax.data.sources.splits import held_out, open_splits
from cxr_jax.evaluation.reader import Reader
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.metrics import scores as metrics_scores
from cxr_jax.models.qwen2_5_vl.patches import grid_of
from cxr_jax.report.text_table import text_table
from cxr_jax.runtime import processes
from cxr_jax.runtime.signals import StoppedError
from cxr_jax.training import checks
from cxr_jax.weights import pretrained


def predictions(reader, params, data) -> dict:
    """The model's answers for real, blank (mid-grey) and swapped images, and the real reading itself.

    Swapped: each case is answered from the image of the next one, which is the real reading moved by one.
    """
    real = reader.read(params, data["image"], data["texts"])
    blank = reader.read(params, np.full_like(data["image"][:1], 0.5), data["texts"][:1])
    n = len(data["image"])
    repeat = lambda k: np.repeat(blank[k], n, axis=0)
    return {
        "real": real,
        "audit": {"blank": repeat("pred"), "swapped": np.roll(real["pred"], 1, axis=0)},
        "audit_valid": {"blank": repeat("valid"), "swapped": np.roll(real["valid"], 1)},
    }


def full(workdir, config, models: dict, reader, sources, notes=()) -> dict:
    """Scores every model on every test set, compares the last two, writes the report. Returns {"table": str}."""
    e = config.eval
    tables, comparisons, cases = {m: {} for m in models}, [], []
    names = list(models)
    for set_name, source in sources.test.items():
        data = held_out(source, e.n_final, reader.poll)
        found = {}
        for m, params in models.items():
            print(f"evaluating {m} on {len(data['image'])} images of {set_name}", flush=True)
            p = predictions(reader, params, data)
            found[m] = {**p, "trace": reader.trace(p["real"], data)}
        if not processes.is_main():
            continue
        read = {m: p["real"] for m, p in found.items()}
        for m, p in found.items():
            tables[m][set_name] = metrics_scores.summary(
                p["real"]["pred"],
                data["solution"],
                known=data["known"],
                valid=p["real"]["valid"],
                audit=p["audit"],
                audit_valid=p["audit_valid"],
                n_boot=e.bootstrap,
                trace=p["trace"],
            )
        if len(names) > 1:
            comparisons += compare(set_name, names[-2], names[-1], read, data, e.bootstrap)
        cases += worst_cases(set_name, names[-1], read[names[-1]], data, reader, e.cases)
    if not processes.is_main():
        return {"table": ""}
    kind = "phantom" if config.data.source == "phantom" else "files"
    report.write_report(
        workdir.path,
        title=f"cxr_jax {config.task}: {config.model}",
        tables=tables,
        cases=cases,
        notes=list(notes),
        kind=kind,
        comparisons=comparisons,
    )
    return {"table": text_table(tables, comparisons, kind)}


def compare(set_name, a, b, read, data, n_boot) -> list[dict]:
    """Paired differences b - a of Jaccard and macro-F1, with 95 % bootstrap intervals."""
    out = []
    for metric in ("jaccard", "macro_f1"):
        diff, lo, hi = metrics_scores.paired_bootstrap(
            metric,
            read[a]["pred"],
            read[b]["pred"],
            data["solution"],
            known=data["known"],
            valid_a=read[a]["valid"],
            valid_b=read[b]["valid"],
            n_boot=n_boot,
        )
        out.append(
            {"a": a, "b": b, "set": set_name, "metric": metric, "diff": diff, "lo": lo, "hi": hi}
        )
    return out


def worst_cases(set_name, model, read, data, reader, n: int) -> list:
    """Cases for the report: the worst half, the best quarter and a quarter from between."""
    score = metrics_scores.jaccard_rows(
        read["pred"], data["solution"], data["known"], read["valid"]
    )
    order = np.argsort(np.nan_to_num(score, nan=2.0), kind="stable")
    n = min(n, len(order))
    worst, best = n // 2, n // 4
    between = order[worst : len(order) - best]
    spread = np.linspace(0, len(between) - 1, n - worst - best).astype(int)
    picked = [*order[:worst], *between[spread], *order[len(order) - best :]]
    texts = reader.texts(read, picked)
    return [
        report.Case(
            image=np.asarray(data["image"][i]),
            prompt=data["texts"][i],
            completion=text,
            answer=read["pred"][i],
            truth=data["solution"][i],
            known=data["known"][i],
            hospital=set_name,
            model=model,
            score=None if np.isnan(score[i]) else float(score[i]),
            id=str(data["ids"][i]) if "ids" in data else f"{set_name}-{i}",
        )
        for i, text in zip(picked, texts, strict=True)
    ]


def check(config) -> None:
    """Refuses settings that cannot work, before anything is written. Raises UserError."""
    checks.common(config)


def run(config, workdir, stop, layout) -> dict:
    """The `evaluate` task: one model on every test set."""
    start = pretrained.load_starting_model(config.model, config.seed)
    found = open_splits(config)
    size = next(iter(found.test.values())).size
    prompts = inference_prompts.Prompts(
        start.tokenizer,
        start.config,
        grid_of(size, start.config),
        config.max_completion,
        texts=found.prompts(),
    )
    dtype = pretrained.DTYPES[config.dtype]
    reader = Reader(
        start.config,
        start.tokenizer,
        prompts,
        config.eval.batch_size,
        dtype,
        found.train.lexicon,
        poll=stop.check,
        layout=layout,
    )
    try:
        with layout.on_host():
            params = pretrained.to_device(start.params, config.dtype)
        models = {config.model: layout.state(params)}
        return {"step": 0, "results": full(workdir, config, models, reader, found)}
    except StoppedError:
        return {"stopped": stop.requested, "step": 0}
