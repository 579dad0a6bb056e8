"""Groups of completions of one prompt, as records for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import jax
import numpy as np

from cxr_jax.labels import sentences
from cxr_jax.labels.sentences import Sentence
from cxr_jax.labels.taxonomy import CHEXPERT_14, side_name

SAME = 1e-6  # rewards of a group that spread less are the same


@dataclass
class Completion:
    """One sampled completion. length: tokens. answer: labels named. terms: every reward term's value, unweighted.
    trained: False if the update left it out (truncated and masked, or its group was not taken)."""

    text: str
    length: int
    finished: bool
    answer: list[str]
    valid_format: bool
    terms: dict[str, float]
    reward: float
    advantage: float
    trained: bool
    sentences: list[Sentence]


@dataclass
class Group:
    """The completions of one prompt at one step. truth, hedged: labels that are there, and that may be (subtle, or not
    known). known: the labels that the reference decides (None: all). sides: label -> right, left or both sides.
    weights: reward term -> weight. kept: the update took it. image: float [H, W] in 0..1, or the PNG."""

    step: int
    id: str
    set: str
    prompt: str
    truth: list[str]
    hedged: list[str]
    known: list[str] | None
    sides: dict[str, str]
    completions: list[Completion]
    weights: dict[str, float]
    kept: bool
    image: np.ndarray | None = None
    png: bytes | None = None

    def row(self) -> dict:
        """The line of samples.jsonl, without its image."""
        plain = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("image", "png", "completions")
        }
        completions = [
            vars(c) | {"sentences": [s._asdict() for s in c.sentences]} for c in self.completions
        ]
        return {"kind": "group"} | plain | {"completions": completions}

    @classmethod
    def of_row(cls, row: Mapping, png: bytes) -> "Group":
        """From a line of samples.jsonl. Raises KeyError, TypeError, ValueError or AttributeError for what is none."""
        numbers = lambda d: {str(k): _number(v) for k, v in d.items()}
        known = None if row["known"] is None else _texts(row["known"])
        completions = [
            Completion(
                str(c["text"]),
                int(c["length"]),
                bool(c["finished"]),
                _texts(c["answer"]),
                bool(c["valid_format"]),
                numbers(c["terms"]),
                _number(c["reward"]),
                _number(c["advantage"]),
                bool(c["trained"]),
                [
                    Sentence(str(s["text"]), str(s["verdict"]), _texts(s.get("why", [])))
                    for s in c["sentences"]
                ],
            )
            for c in row["completions"]
        ]
        if not completions:
            raise ValueError("no completion")
        return cls(
            int(row["step"]),
            str(row["id"]),
            str(row["set"]),
            str(row["prompt"]),
            _texts(row["truth"]),
            _texts(row["hedged"]),
            known,
            {str(k): str(v) for k, v in row.get("sides", {}).items()},
            completions,
            numbers(row["weights"]),
            bool(row["kept"]),
            png=png,
        )


def _number(x) -> float:
    return float("nan") if x is None else float(x)


def _texts(x) -> list[str]:
    if not isinstance(x, list):
        raise TypeError("not a list")
    return [str(t) for t in x]


# From a rollout --------------------------------------------------------------------------------------


def choose(reward, n: int) -> list[int]:
    """The n most telling groups of reward [P, G]: those that spread most, and one, if any, that does not."""
    spread = np.asarray(reward).std(axis=1)
    order = np.argsort(-spread, kind="stable")
    varied, flat = [[int(p) for p in order if (spread[p] >= SAME) == v] for v in (True, False)]
    taken = varied[: max(1, n - bool(flat))]
    return (taken + flat)[:n] if len(taken) < n else taken


def groups_of(
    ro: Mapping,
    batch: Mapping,
    tokenizer,
    *,
    step: int,
    weights: Mapping[str, float],
    n: int = 4,
    set_name: str = "train",
    lexicon: str | None = None,
    prompts: Sequence[str] | str = "",
    ids: Sequence | None = None,
) -> list[Group]:
    """n groups of a rollout, for `report.save_groups`.

    ro: as rl.make_rollout gives it (tokens int [P, G, C], lengths, finished, reward, advantages [P, G], terms
    {name: [P, G]}, answer bool [P, G, 14], train_mask bool [P, G, C], kept int [n]); batch: image [P, S, S], solution,
    known, hedged bool [P, 14], sides bool [P, 14, 2]. tokenizer: decodes ids. weights: of the reward terms. lexicon:
    as in `load_phrase_bank(None, lexicon)`. prompts: a text a prompt, or one for all. ids: of the images.
    """
    wanted = (
        "tokens",
        "lengths",
        "finished",
        "reward",
        "advantages",
        "terms",
        "answer",
        "train_mask",
        "kept",
    )
    ro = jax.device_get({k: ro[k] for k in wanted})
    truth = {k: np.asarray(batch[k]) for k in ("solution", "known", "hedged", "sides")}
    chosen, kept = choose(ro["reward"], n), set(np.asarray(ro["kept"]).tolist())
    g = ro["reward"].shape[1]
    texts = [
        tokenizer.decode(ro["tokens"][p, i, : ro["lengths"][p, i]], skip_special_tokens=True)
        for p in chosen
        for i in range(g)
    ]
    rows = np.repeat(np.array(chosen, int), g)
    certain = truth["solution"] & ~truth["hedged"]
    read = sentences.sentence_verdicts(
        texts, certain[rows], truth["hedged"][rows], truth["sides"][rows], lexicon
    )
    names = lambda bits: [name for name, on in zip(CHEXPERT_14, bits, strict=True) if on]
    out = []
    for at, p in enumerate(chosen):
        completions = [
            Completion(
                texts[at * g + i],
                int(ro["lengths"][p, i]),
                bool(ro["finished"][p, i]),
                names(ro["answer"][p, i]),
                bool(ro["terms"]["format"][p, i] == 1),
                {k: float(v[p, i]) for k, v in ro["terms"].items()},
                float(ro["reward"][p, i]),
                float(ro["advantages"][p, i]),
                p in kept and bool(ro["train_mask"][p, i].any()),
                read[at * g + i],
            )
            for i in range(g)
        ]
        some = truth["solution"][p] | truth["hedged"][p]
        sides = {
            CHEXPERT_14[i]: side_name(*truth["sides"][p, i], both="both sides")
            for i in np.flatnonzero(some)
        }
        out.append(
            Group(
                step,
                f"prompt {p}" if ids is None else str(ids[p]),
                set_name,
                prompts if isinstance(prompts, str) else str(prompts[p]),
                names(truth["solution"][p]),
                names(truth["hedged"][p]),
                None if truth["known"][p].all() else names(truth["known"][p]),
                {k: v for k, v in sides.items() if v},
                completions,
                {k: float(v) for k, v in weights.items()},
                p in kept,
                image=np.asarray(batch["image"][p]),
            )
        )
    return out
