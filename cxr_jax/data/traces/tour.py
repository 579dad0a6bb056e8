"""The order in which a radiologist looks at a film, and where in it a sentence of a report belongs."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cxr_jax.labels.lexicon import SIDELESS

if TYPE_CHECKING:
    from cxr_jax.labels.sentences import Claim

# Names that other files ask for.
RIGHT_LUNG, LEFT_LUNG, LUNGS, ELSEWHERE = "Right lung", "Left lung", "Lungs", "Elsewhere"
QUALITY, DEVICES, PLEURA, SUMMARY = "Quality", "Devices", "Pleura", "Summary"
# What no side is said of comes before the lungs one by one, and what is left ("otherwise clear") behind them.
TOUR = (
    QUALITY,
    DEVICES,
    "Airways",
    LUNGS,
    RIGHT_LUNG,
    LEFT_LUNG,
    ELSEWHERE,
    PLEURA,
    "Mediastinum",
    "Hila",
    "Heart",
    "Abdomen",
    "Bones",
    SUMMARY,
)

# What a sentence is about, and where that is: "a right apical pneumothorax" is about the pleura.
_THINGS = {
    DEVICES: (
        r"tubes?|tubing|catheters?|lines?|picc|ports?|port-?a-?cath|mediport|pacemaker|pacer|pacing|leads?|aicd|icd|"
        r"defibrillator|wires?|sternotomy|clips?|stents?|(?:aortic |mitral |prosthetic )?valves?|devices?|hardware|"
        r"drains?|pigtail|swan|balloon pump|iabp|stimulator|tracheostomy|trach|dobb?hoff|ett|ngt|ogt|cvl|cvc|"
        r"electrodes?|prosthes[ie]s|generator|cannula|support|monitoring|sheath|shunt|coils?|filter|subclavian|"
        r"jugular|central (?:venous|line)"
    ),
    "Airways": r"trachea\w*|airways?|bronch(?:us|i|ial)|carina\w*",
    LUNGS: (
        r"opaci\w*|opaque|consolidat\w*|infiltrat\w*|pneumonia\w*|edema\w*|oedema|atelecta\w*|nodul\w*|mass(?:es)?|"
        r"lesions?|air-? ?space|interstiti\w*|granuloma\w*|emphysem\w*|scar\w*|hyper(?:inflat|expan|aerat|lucen)\w*|"
        r"hypo(?:inflat|ventil|expan|aerat)\w*|parenchym\w*|aspirat\w*|infect\w*|congest\w*|fibro\w*|markings|"
        r"densit\w*|copd|failure|chf|bronchovascular|peribronchial|collapse|malignan\w*|neoplas\w*|cavit\w*|"
        r"bull(?:a\w*|ous)|bleb\w*|vol(?:ume)? loss|aerat\w*|ground.?glass|contusion\w*|lymphangit\w*|metasta\w*|"
        r"bronchiect\w*|reticul\w*|haz(?:y|iness)|tubercul\w*"
    ),
    PLEURA: (
        r"pleura\w*|effusions?|(?:hydro|hemo|haemo)?pneumothora\w*|ptx|costophrenic|costophrenics|hemothora\w*|"
        r"hydrothora\w*|empyema\w*|fissur\w*|cp angles?|blunt\w*"
    ),
    "Mediastinum": (
        r"cardio-? ?mediastin\w*|mediastin\w*|aort\w*|thoracic inlet|great vessels|paratracheal|\w*adenopathy|"
        r"lymph nodes?"
    ),
    "Hila": (
        r"hil(?:a|um|ar|i)|(?:pulmonary|central|hilar) (?:vascul\w*|vessels?|arter\w*|veins?)|pulmonary venous|"
        r"vascular(?:ity)?|vasculature|vessels"
    ),
    "Heart": (
        r"hearts?|cardiac|cardiomegal\w*|cardiopericard\w*|cardiothoracic|pericardi\w*|ventric\w*|atri\w*|mitral|"
        r"coronary"
    ),
    "Abdomen": (
        r"abdom\w*|(?:hemi)?-?diaphragm\w*|free air|free intra\w*|bowel|stomach|gastric|liver|spleen|hiat\w*|"
        r"quadrants?|pneumoperiton\w*|colon\w*|gallbladder|cholecyst\w*|subdiaphragm\w*|esophag\w*"
    ),
    "Bones": (
        r"bones?|bony|osseous|ribs?|spin(?:e|al)|\w*vertebra\w*|fractur\w*|clavic\w*|shoulders?|\w*scolio\w*|"
        r"degenerat\w*|osteo\w*|skelet\w*|humer\w*|scapula\w*|sternum|sternal|kypho\w*|compression|soft tissues?|"
        r"arthrit\w*|arthro\w*|endplates?|disc|disk|spondyl\w*|spur\w*|subcutaneous|thoracolumbar|breasts?|"
        r"mastectomy|\w*costochondral|cartilages?"
    ),
}
# Where a thing is: asked only where no thing is named ("the lungs are clear").
_PLACES = {
    LUNGS: (
        r"lungs?|lobes?|lobar|pulmonary|bi-?basilar|basilar|bibasal|bases?|biapical|apic(?:al|es)|apex|lingula\w*|"
        r"perihilar|retrocardiac|hemithorax|volumes"
    )
}
# The picture itself.
_FILM = {
    QUALITY: (
        r"rotat\w*|inspirat\w*|expirat\w*|penetrat\w*|portable|supine|upright|semi-?erect|projection|views?|"
        r"examination|exam|study|motion|lordotic|under-?exposed|over-?exposed|radiographs?|technique|positioning|"
        r"films?|images?"
    )
}
# In this order they are asked.
_RANKS = tuple(
    {
        section: re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE)
        for section, alternatives in patterns_of_rank.items()
    }
    for patterns_of_rank in (_THINGS, _PLACES, _FILM)
)
# Said of what is left when something else has been said.
_REST = re.compile(r"\b(?:otherwise|elsewhere|remainder|remaining|rest of)\b", re.IGNORECASE)
# Lobes that one side alone has are of that side.
_SIDE_WORDS = {
    "right": re.compile(r"\b(?:right|rt|rul|rml|rll|rightward)\b", re.IGNORECASE),
    "left": re.compile(r"\b(?:left|lt|lul|lll|lingula|lingular|leftward)\b", re.IGNORECASE),
}
_BOTH_WORDS = re.compile(r"\b(?:bilateral\w*|both|bi-?basilar|bibasal|biapical)\b", re.IGNORECASE)


def place(sentence: str, claims: "Iterable[Claim]") -> str:
    """Say where a sentence belongs: by the thing that it names first, else by the place; else it is of the whole film.

    Args:
        sentence: of a report.
        claims: what it says.
    """
    section = next(
        filter(None, (_first(sentence, patterns_of_rank) for patterns_of_rank in _RANKS)), SUMMARY
    )
    # Only lungs are divided by sides: what is said of a side elsewhere stays with its organ.
    if section != LUNGS:
        return section
    if _REST.search(sentence):
        return ELSEWHERE
    return _lung(sentence, claims)


def _first(sentence: str, patterns: dict[str, re.Pattern[str]]) -> str | None:
    """The section whose words come first in a sentence; of two that begin there, the longer."""
    found = [
        (match.start(), -len(match.group()), section)
        for section, pattern in patterns.items()
        if (match := pattern.search(sentence))
    ]
    return min(found)[2] if found else None


def has_side(sentence: str, section: str) -> bool:
    """Whether a sentence may stand below the name of a part of the tour: below a lung's, if it speaks of that side."""
    side_name = {RIGHT_LUNG: "right", LEFT_LUNG: "left"}.get(section)
    return side_name is None or bool(
        _SIDE_WORDS[side_name].search(sentence) or _BOTH_WORDS.search(sentence)
    )


def _lung(sentence: str, claims: "Iterable[Claim]") -> str:
    """One lung, where a sentence speaks of that one alone in every word; else both."""
    sides = {claim.side for claim in claims if claim.label not in SIDELESS}
    side_words = {
        side_name for side_name, pattern in _SIDE_WORDS.items() if pattern.search(sentence)
    }
    # Two sides in one sentence, or none, belong to no lung alone.
    if _BOTH_WORDS.search(sentence) or len(side_words) != 1:
        return LUNGS
    side_name = side_words.pop()
    # A heading of a side gives that side to what has none, so nothing without one may stand below it.
    if not sides <= {side_name}:
        return LUNGS
    return RIGHT_LUNG if side_name == "right" else LEFT_LUNG
