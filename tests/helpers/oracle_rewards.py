"""The reference reward in plain Python strings: the oracle that the device parser must equal."""

import re

NAMES = [
    *(
        "no finding",
        "enlarged cardiomediastinum",
        "cardiomegaly",
        "lung opacity",
        "lung lesion",
        "edema",
    ),
    *(
        "consolidation",
        "pneumonia",
        "atelectasis",
        "pneumothorax",
        "pleural effusion",
        "pleural other",
    ),
    *("fracture", "support devices"),
]
ALL = frozenset(NAMES)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FORMAT = re.compile(r"^<think>.*?</think>\s*<answer>.*?</answer>$", re.DOTALL)


def items(text: str) -> list[str]:
    return [part.strip().lower() for part in text.split(",")]


def labels(text: str) -> set[str]:
    return set(items(text)) & set(NAMES)


def answer_items(text: str) -> list[str] | None:
    found = ANSWER.search(text)
    return None if found is None else items(found.group(1))


def answer(text: str) -> set[str]:
    return set(answer_items(text) or ()) & set(NAMES)


def n_unknown(text: str) -> int:
    return sum(1 for item in answer_items(text) or () if item and item not in NAMES)


def accuracy(text: str, solution: str, known: set = ALL, hedged: set = frozenset()) -> float:
    """Labels that are not known leave both sides; one that is named though it is blank adds a half to the union."""
    if answer_items(text) is None:
        return 0.0
    gold, said = labels(solution) & known, answer(text) & known
    blank = answer(text) - known - hedged
    union = len(gold | said) + len(blank) / 2
    return len(gold & said) / union if union else 1.0


def format_ok(text: str) -> float:
    return 1.0 if FORMAT.match(text) else 0.0


def tag_count(text: str) -> float:
    return sum(0.25 for tag in TAGS if text.count(tag) == 1)


def accuracy_hard(text: str, solution: str) -> float:
    return accuracy(text, solution) * format_ok(text) * (tag_count(text) == 1)


def overshort(length: int, min_length: int = 400) -> float:
    return 0.0 if length >= min_length else max(-1.0, (length - min_length) / min_length)


def score(text: str, solution: str, length: int) -> dict[str, float]:
    return {
        "accuracy": accuracy(text, solution),
        "format": format_ok(text),
        "tag_count": tag_count(text),
        "accuracy_hard": accuracy_hard(text, solution),
        "overshort": overshort(length),
        "invented": float(n_unknown(text)),
    }
