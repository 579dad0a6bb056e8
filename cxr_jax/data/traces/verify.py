"""Whether a trace says what its report says, and nothing else: the test that every trace passes before it is kept.

Two readings have to agree. The whole: the states and sides of all 14 labels that the report parser reads in the trace
are those of the report. And each sentence: it stands on one sentence of the report, of which it has words and claims,
in number no more, so that what the parser does not know (a clear trachea, 3 cm) cannot be made up either.
"""

import re
from collections.abc import Sequence

from cxr_jax.data.traces import tour, wording
from cxr_jax.data.traces.grammar import Material
from cxr_jax.labels.sentences import Reading, Statement
from cxr_jax.labels.taxonomy import CHEXPERT_14, NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN

MAX_TRACE = 12_000  # characters
_STATE_WORDS = {
    POSITIVE: "affirmed",
    NEGATIVE: "denied",
    UNCERTAIN: "hedged",
    NOT_MENTIONED: "not mentioned",
}

# ---- Form ----------------------------------------------------------------------------------------------------------

# Tags of any model, and the marks by which tokenizers spell special tokens; "< 3 cm" is none.
_TAG = re.compile(r"</?\s*[A-Za-z!?|]|<\||\|>")


def check_form(trace: str) -> list[str]:
    """Say why a text cannot stand between <think> and </think> of a row; [] where it can."""
    if not trace.strip():
        return ["the trace is empty"]
    if len(trace) > MAX_TRACE:
        return [f"the trace has over {MAX_TRACE:,} characters"]
    if _TAG.search(trace):
        return ["the trace holds a tag"]
    if not all(letter.isprintable() or letter == "\n" for letter in trace):
        return ["the trace holds a control character"]
    if wording.BLANK.search(trace):
        return ["the trace holds a de-identified blank"]
    return []


# ---- The whole -----------------------------------------------------------------------------------------------------


def compare(report: Reading, trace: Reading) -> list[str]:
    """Say which labels, of state or side, a trace reads otherwise than its report; [] for none.

    No reason holds a word of either.
    """
    reasons = []
    # The parser reads English alone.
    if report.is_foreign:
        return ["the report is in another language"]
    if trace.is_foreign:
        return ["the trace is in another language"]
    for index, label in enumerate(CHEXPERT_14):
        report_state, trace_state = report.states[index], trace.states[index]
        if report_state != trace_state:
            reasons.append(
                f"{label}: {_STATE_WORDS[report_state]} in the report, {_STATE_WORDS[trace_state]} in the trace"
            )
        elif report.sides[index] != trace.sides[index]:
            sides = (side or "no" for side in (report.sides[index], trace.sides[index]))
            reasons.append("{}: {} side in the report, {} side in the trace".format(label, *sides))
    return reasons


# ---- Sentence by sentence ------------------------------------------------------------------------------------------

# Words that say nothing of a film by themselves. Prepositions of place are not among them.
_GLUE = frozenset(
    "a an the this that these those there it its is are was were be been being has have had as of in on at to for by "
    "and also which appear appears appearing seen noted identified visualized visualised demonstrated observed "
    "present demonstrate demonstrates show shows shown see note evidence sided".split()
)
# Only whether there are any is compared: "no" and "without" are one.
_NEGATIONS = frozenset(
    "no not without nor neither none never absent absence negative denies free nothing excluded excludes unlikely "
    "resolved cleared cannot isn aren wasn weren doesn don didn hasn haven t".split()
)
# Likewise; the parser knows better which of them reach a finding, but not for what it does not know.
_HEDGES = frozenset(
    "may might could can possible possibly possibility probable probably likely suspected suspect suspicious question "
    "questionable questionably perhaps maybe equivocal concerning concern suggest suggests suggesting suggestive "
    "potential potentially presumably consider considered favor favors versus vs or either if borderline "
    "indeterminate uncertain unclear consistent compatible cannot".split()
)
_SIDES = {"right": "right", "left": "left", "rt": "right", "lt": "left"}
# What the tour calls its parts may stand before a sentence, and is none of its words.
_NAMES = re.compile(rf"^(?P<name>{'|'.join(tour.TOUR)})\s*[:.]\s+", re.IGNORECASE)
_WORD = re.compile(r"\d+(?:\.\d+)?|[a-z]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _stem(word: str) -> str:
    """A noun without its plural, so that "effusions" and "effusion" are one word."""
    # No more than plurals: "normal" and "abnormal" must stay two words.
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _side_pairs(said_words: Sequence[str]) -> set[tuple[str, str]]:
    """Each word that says something with the side that stands before it, and with the one behind it."""
    pairs = set()
    for word_order in (said_words, said_words[::-1]):
        side = ""
        for word in word_order:
            if word in _SIDES:
                side = _SIDES[word]
            elif side and word not in _GLUE:
                pairs.add((side, _stem(word)))
    return pairs


def stands_on(sentence: Statement, source: Material) -> bool:
    """Whether a sentence of a trace says only what a sentence of the report says.

    Its claims are among the source's; each of its words that says something is one of the source's; it denies and
    hedges if and only if that does; and a side stands by words by which the source has that side.
    """
    # By the parser: findings, states and sides.
    if not sentence.claims <= source.claims:
        return False
    # By words: what the parser has no notion of, sizes and organs above all.
    said_words, known = _words(_NAMES.sub("", sentence.text)), _words(source.text)
    stems = set(map(_stem, known))
    if not {_stem(word) for word in said_words if word not in _GLUE} <= stems:
        return False
    # By polarity: words that are left out may be the ones that deny.
    for signs in (_NEGATIONS, _HEDGES):
        if bool(signs.intersection(said_words)) != bool(signs.intersection(known)):
            return False
    # By sides, for findings that the parser gives none.
    return _nearest_sides(said_words) <= _side_pairs(known)


def _nearest_sides(said_words: Sequence[str]) -> set[tuple[str, str]]:
    """The word that says something right behind each side."""
    pairs = set()
    side = ""
    for word in said_words:
        if word in _SIDES:
            side = _SIDES[word]
        elif side and word not in _GLUE:
            pairs.add((side, _stem(word)))
            side = ""
    return pairs


def unsupported(trace: Reading, material: Sequence[Material]) -> list[str]:
    """Say which sentences of a trace stand on no sentence of the report, or say again what has been said.

    Args:
        trace: a reading of the trace.
        material: what it may be written from.

    Returns:
        Reasons, with numbers of sentences from 1 and no word of them.
    """
    reasons = []
    times: dict[str, int] = {}
    section = ""
    for number, sentence in enumerate(trace.statements, 1):
        said_words = sentence.text
        # A name holds for the sentences that follow it, too.
        if name := _NAMES.match(f"{sentence.text} "):
            section = name["name"].capitalize()
            said_words = sentence.text[name.end() :]
        if not any(map(str.isalnum, said_words)) and not sentence.claims:
            continue
        if not any(_may_stand(sentence, source, section) for source in material):
            reasons.append(f"sentence {number} stands on none of the report's")
        # Once in the tour and once in the summary is enough.
        times[said_words.casefold()] = times.get(said_words.casefold(), 0) + 1
        if times[said_words.casefold()] == 3:
            reasons.append(f"sentence {number} has been said twice before")
    return reasons


def _may_stand(sentence: Statement, source: Material, section: str) -> bool:
    """`stands_on`, and not below the name of a side of which the source does not speak."""
    is_there = tour.has_side(source.text, section) or wording.leans_on_another(source.text)
    return is_there and stands_on(sentence, source)
