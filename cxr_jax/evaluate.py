"""Evaluation: greedy reading of held-out images, the image-use audit, the out-of-distribution guard, final results.

`python -m cxr_jax.main --config=experiments/eval.py` runs `run` alone; SFT and RL call the pieces.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax import report, rewards
from cxr_jax.data.sources.splits import all_prompts, held_out, open_splits
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.inference import sampling
from cxr_jax.labels import answers, report_text
from cxr_jax.metrics import scores as metrics_scores
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.models import tokenizer
from cxr_jax.models.qwen2_5_vl.patches import grid_of, patchify
from cxr_jax.report.text_table import text_table
from cxr_jax.rewards.terms import BYTES_PER_TOKEN, TRACE_TERMS
from cxr_jax.runtime import processes, sharding
from cxr_jax.runtime.layout import ONE_DEVICE
from cxr_jax.runtime.signals import StoppedError
from cxr_jax.training import checks
from cxr_jax.weights import pretrained
from cxr_jax.weights import pretrained as weights_pretrained

LOST_RECALL = 0.25  # a label whose recall fell by more than this is said to be lost


class Reader:
    """Greedy reading in fixed shapes: one compiled program for any number of images.

    `lexicon`: words of the traces beyond labels/lexicon.toml. `poll` is called before each batch; what it raises ends
    the reading. `layout`: over which devices the rows of a batch are divided, evenly: batch_size is rounded up.
    """

    def __init__(
        self,
        cfg,
        tok,
        prompts: inference_prompts.Prompts,
        batch_size: int,
        dtype=jnp.float32,
        lexicon=None,
        poll=lambda: None,
        layout=ONE_DEVICE,
    ):
        self.tok, self.prompts, self.poll, self.layout = tok, prompts, poll, layout
        self.batch_size = -(-batch_size // layout.shards) * layout.shards
        special = tokenizer.special_ids(tok, cfg.text.vocab_size)
        table = answers.TokenBytes.from_tokenizer(tok)
        c = prompts.max_completion

        @jax.jit
        def read(params, batch):
            params = sharding.gathered(params, dtype)
            features = qwen.vision(params, cfg, patchify(batch["image"]), prompts.grid, dtype=dtype)
            out = sampling.sample_completions(
                params,
                cfg,
                features,
                batch["prompts"],
                special,
                n=1,
                max_new_tokens=c,
                temperature=0.0,
            )
            parsed = answers.parse_tokens(out["tokens"], out["lengths"], table, c * BYTES_PER_TOKEN)
            return out["tokens"], out["lengths"], parsed["answer"], parsed["format"]

        bank = report_text.bank(None, lexicon)

        @jax.jit
        def trace(tokens, lengths, data):
            truth = report_text.Truth.of(
                data["solution"] & ~data["hedged"], data["hedged"], data["sides"]
            )
            parsed = rewards.read_tokens(tokens, lengths, table, c * BYTES_PER_TOKEN, bank, truth)
            terms = rewards.reward_terms(parsed, data["solution"])
            return {name: terms[name] for name in TRACE_TERMS}

        self._read, self._trace = layout.on(read), trace

    def read(self, params, images, texts) -> dict:
        """images [N, S, S], prompt texts [N] -> tokens [N, C], lengths [N], pred bool [N, 14], valid bool [N]."""
        n, b, parts = len(images), self.batch_size, []
        for start in range(0, n, b):
            self.poll()
            rows = np.minimum(
                start + self.layout.rows_of(b), n - 1
            )  # the last batch is filled with repeats
            batch = {
                "image": np.asarray(images)[rows],
                "prompts": self.prompts.encode([texts[i] for i in rows]),
            }
            got = processes.gather_to_host(self._read(params, self.layout.batch(batch)))
            parts.append([x[: n - start] for x in got])
        tokens, lengths, pred, valid = (np.concatenate(x) for x in zip(*parts, strict=True))
        return {
            "tokens": tokens,
            "lengths": lengths,
            "pred": pred.astype(bool),
            "valid": valid.astype(bool),
        }

    def trace(self, read: dict, data: dict) -> dict:
        """How the traces of `read` agree with the answers and with what is so: TRACE_TERMS -> float32 [N]."""
        n, b, parts = len(read["tokens"]), self.batch_size, []
        for start in range(0, n, b):
            self.poll()
            rows = np.minimum(np.arange(start, start + b), n - 1)
            truth = {k: data[k][rows] for k in ("solution", "hedged", "sides")}
            got = self._trace(read["tokens"][rows], read["lengths"][rows], truth)
            parts.append({k: np.asarray(v)[: n - start] for k, v in got.items()})
        return {k: np.concatenate([p[k] for p in parts]) for k in TRACE_TERMS}

    def texts(self, read: dict, rows) -> list[str]:
        """Decoded completions of the given rows."""
        return [
            self.tok.decode(read["tokens"][i][: read["lengths"][i]], skip_special_tokens=True)
            for i in rows
        ]


class Guard:
    """Looks at the selection splits every K steps, logs per-label scores, keeps the best-by-OOD parameters.

    model_of: from what trains to the parameters of the whole model; best, first: what these attributes were in a run
    that is resumed.
    """

    def __init__(
        self, config, reader, sources, metrics, checkpoints, model_of, best=None, first=None
    ):
        self.config, self.reader, self.metrics, self.checkpoints = (
            config,
            reader,
            metrics,
            checkpoints,
        )
        self.model_of, self.best, self.first = model_of, best, first
        self.data = {
            name: held_out(s, config.eval.n, reader.poll) for name, s in sources.select.items()
        }
        self.ood = sources.ood

    def look(self, step: int, train) -> dict:
        """Scores what trains at `step` on the selection splits; saves it if the best so far out of distribution."""
        row, params = {}, self.model_of(train)
        for name, data in self.data.items():
            got = self.reader.read(params, data["image"], data["texts"])
            s = metrics_scores.summary(
                got["pred"], data["solution"], known=data["known"], valid=got["valid"], n_boot=20
            )
            row[f"eval/{name}/jaccard"] = s["jaccard"]["value"]
            row |= {f"eval/{name}/{m}": s[m]["all"]["value"] for m in ("macro_f1", "micro_f1")}
            row[f"eval/{name}/valid_format"] = float(got["valid"].mean())
            row[f"eval/{name}/mean_length"] = float(got["lengths"].mean())
            row |= {
                f"eval/{name}/{k}": float(v.mean()) for k, v in self.reader.trace(got, data).items()
            }
            for label, v in s["per_label"].items():
                row |= {
                    f"eval/{name}/{label}/{m}": v[m]
                    for m in ("precision", "recall", "f1")
                    if v[m] is not None
                }
        row["alarms/lost_recall"] = self._lost(row)
        self.metrics.write(step, row, kind="eval")
        score = (
            row[f"eval/{self.ood}/{self.config.eval.select_by}"] or 0.0
        )  # None: undefined on so few examples
        value = lambda name: "-" if row[name] is None else f"{row[name]:.3f}"
        shown = ", ".join(
            f"{n} Jaccard {value(f'eval/{n}/jaccard')} macro-F1 {value(f'eval/{n}/macro_f1')}"
            for n in self.data
        )
        print(f"  step {step} on the selection splits: {shown}", flush=True)
        if processes.of_main(self.best is None or score > self.best["score"]):
            self.best = {"score": score, "step": step}
            self.checkpoints.save_best(step, train, self.best)
        return row

    def _lost(self, row: dict) -> int:
        """How many labels lost recall out of distribution since the first look, named aloud: a mean can hide it."""
        recall = {
            k: v
            for k, v in row.items()
            if k.startswith(f"eval/{self.ood}/") and k.endswith("/recall")
        }
        self.first = self.first or recall
        lost = sorted(k for k, v in recall.items() if v < self.first.get(k, 0.0) - LOST_RECALL)
        for name in lost:
            label = name.split("/")[2]
            print(
                f"  alarm: recall of {label} on {self.ood} fell from {self.first[name]:.2f} to {recall[name]:.2f}: "
                f"see eval/{self.ood}/{label}/* and the samples whose answer leaves it out",
                flush=True,
            )
        return len(lost)

    def stale(self, step: int) -> bool:
        """Whether the last `config.rl.patience` looks until `step` were no better out of distribution; says so."""
        patience = self.config.rl.patience
        if not (
            patience and self.best and step - self.best["step"] >= patience * self.config.eval.every
        ):
            return False
        print(
            f"  stopped early: the last {patience} looks were no better on {self.ood} than step {self.best['step']}",
            flush=True,
        )
        return True


def constant_baselines(sources, n: int = 2000) -> dict:
    """Jaccard of the constant policies on the training stream: what a reward must beat to mean anything."""
    truth = sources.train.solutions(np.arange(min(n, len(sources.train))))
    p = metrics_scores.constant_policies(truth, n_boot=20)["policies"]
    best = max(p, key=lambda k: p[k]["jaccard"])
    return {
        "no_finding": p["No Finding"]["jaccard"],
        "all_labels": p["all labels"]["jaccard"],
        "best": p[best]["jaccard"],
        "modal_share": float(rewards.modal_share(truth)),
    }


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
    start = pretrained.start(config)
    found = open_splits(config)
    size = next(iter(found.test.values())).size
    prompts = inference_prompts.Prompts(
        start.tokenizer,
        start.cfg,
        grid_of(size, start.cfg),
        config.max_completion,
        texts=all_prompts(found),
    )
    dtype = weights_pretrained.DTYPES[config.dtype]
    reader = Reader(
        start.cfg,
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
            params = pretrained.on_device(config, start.params)
        models = {config.model: layout.state(params)}
        return {"step": 0, "results": full(workdir, config, models, reader, found)}
    except StoppedError:
        return {"stopped": stop.requested, "step": 0}
