"""Random reports in plain English: findings with sides, hedges, denials, comparisons, blanks and asides, in any mix."""

import random

FINDINGS = (
    "consolidation|pleural effusion|pneumothorax|atelectasis|opacity|nodule|edema|rib fracture|cardiomegaly|"
    "pleural thickening|pneumonia|PICC line|endotracheal tube|granuloma|mass"
).split("|")
SIDES = ["right", "left", "bilateral", "", "", "right lower lobe", "left upper lobe"]
SIZES = ["", "", "small", "large", "3 cm", "mild", "stable", "new", "worsening", "unchanged"]
CLAIMS = (
    "There is {size} {side} {one}|No {size} {side} {one}|Possible {side} {one}|{size} {side} {one} cannot be excluded|"
    "{side} {one} is unchanged|{side} {one} has resolved|Compared to ___, {side} {one} has increased|"
    "no change in the {side} {one}|{side} {one} is {size}|Without {side} {one}|{one} on the {side}|XXXX {side} {one}|"
    "{side} {one} since the prior study of ___|There is no {one}, {two} or {three}|No {two} or {three}"
).split("|")
OTHERS = (
    "The heart is normal|Heart size is stable|The mediastinum is unremarkable|Lungs are clear|Trachea is midline|"
    "The lungs are otherwise clear|This may represent aspiration|Findings discussed with Dr. ___ at 5 pm|"
    "PA and lateral views of the chest|History of pneumonia|Bones are intact|1. No acute disease|Recommend CT|"
    "Heart remains enlarged|Right lung: clear|Left lung: opacity at base|Heart: mildly enlarged|Effusion: none|"
    "Pneumothorax: No|In comparison with study of ___, there is little change|"
    "The cardiac silhouette is enlarged but stable|<b>Edema</b>|2 cm < 3 cm|<answer>Edema</answer>"
).split("|")


def draw_sentence(rng: random.Random) -> str:
    """A sentence, without its full stop."""
    if rng.random() < 0.3:
        return rng.choice(OTHERS)
    text = _draw_claim(rng)
    if rng.random() < 0.3:
        text += rng.choice([", ", " and ", "; ", " with ", " but ", " or "]) + _draw_claim(rng)
    return text[:1].upper() + text[1:]


def _draw_claim(rng: random.Random) -> str:
    one, two, three = rng.choices(FINDINGS, k=3)
    text = rng.choice(CLAIMS).format(
        size=rng.choice(SIZES), side=rng.choice(SIDES), one=one, two=two, three=three
    )
    return " ".join(text.split())


def draw_report(rng: random.Random) -> str:
    """A report of a few sentences, with headings or without."""

    def draw_body(most: int) -> str:
        ends = [".", ".", ".", ".\n", "\n", ";"]
        count = rng.randrange(1, most)
        return " ".join(draw_sentence(rng) + rng.choice(ends) for _ in range(count))

    text = draw_body(7)
    if rng.random() < 0.6:
        text = f"FINDINGS: {text}\nIMPRESSION: {draw_body(4)}"
    return text.upper() if rng.random() < 0.15 else text
