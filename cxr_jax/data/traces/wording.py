"""What may be said otherwise in a sentence of a report without saying anything else.

A model that sees one film cannot see a change, another view, or what de-identification has taken out. So comparisons
are left out ("stable cardiomegaly" is cardiomegaly), and what cannot be said without one is said anew from its claims,
or not at all. None of this is trusted: the caller has each wording read, and takes it only where it says what the
sentence says.
"""

import re
from collections.abc import Iterable

from cxr_jax.labels.sentences import Claim
from cxr_jax.labels.taxonomy import CHEXPERT_14, NEGATIVE, POSITIVE, UNCERTAIN

# A de-identified blank, as MIMIC-CXR, Open-i and MIMIC-III write it.
_GAP = r"(?:_{2,}|\b[Xx]{3,}\b|\[\*\*[^\]]*\*\*\])"

# Where a report begins to take back what it has said. ("without correction for magnification" does not.)
CORRECTS = re.compile(
    r"\b(?:addend(?:um|a)\b|errat(?:um|a)\b|corrigend(?:um|a)\b|amend(?:ed|ment)\b|correction\s*[:;]|"
    r"corrected (?:report|version|to)\b|(?:dictat|transcri)\w+ error|in error\b|erroneous|should (?:read|say|state)\b)",
    re.IGNORECASE,
)

# What becomes of comparisons: they are left out, stay where a finding cannot be told without, or stay.
COMPARISONS = DROP, NEEDED, KEEP = "drop", "needed", "keep"

# ---- Comparisons -------------------------------------------------------------------------------------------------

# Behind these a verb of change stays one, and goes with them.
_ADVERB = (
    r"(?:grossly |relatively |essentially |overall |largely |slightly |mildly |markedly |significantly |somewhat |"
    r"minimally |much |moderately |possibly |probably |otherwise )*"
)
# What was done to the patient before and can still be seen: no comparison.
_SEEN_STILL = (
    r"(?! (?:[\w-]+ ){0,2}(?:surg|stern|granul|fractur|infect|cabg|mastect|thorac|lobect|trauma|cholecyst|resect|"
    r"operat|fusion|valv|healed|disease|inflam))"
)
# Another film, however it is called.
_PRIOR = rf"(?:prior|previous|last|earlier|most recent|preceding|comparison|outside){_SEEN_STILL}"
# What has become of something since then.
_CHANGED = (
    r"(?:unchanged|stable|similar|increased|decreased|improved|worsened|worse|progressed|enlarged|larger|smaller|"
    r"diminished|better|resolving|improving|worsening|increasing|decreasing|enlarging|more [\w-]+|less [\w-]+)"
)
# ".. in size and number"
_IN_WHAT = (
    r"(?: in (?:size|extent|appearance|position|severity|number|configuration|location|degree|conspicuity|"
    r"comparison|the interval|interval)(?: and \w+)?)?"
)
_HAS_CHANGED = (
    rf"(?:,?(?:\s+(?:is|are|was|were|has|have|appears?|remains?)(?: been)?)?\s*(?:and |but |which (?:is|are) )?"
    rf"\b{_ADVERB}{_CHANGED}{_IN_WHAT})"
)
# Nothing follows on a predicate that goes but the end of its clause: else what follows would lose its verb.
_ENDS = r"(?=\s*(?:[,;.]|$|and\b|with\b|without\b))"
_REST_OF_CLAUSE = r"[^,;.]*"

# A sentence that holds any of these speaks of another film, and is not told as it is. Wide on purpose: a sentence
# more that is worded anew costs a word, one that is overlooked teaches a model to see the past.
COMPARES = re.compile(
    rf"\b(?:unchanged|stabl[ey]|stability|persist\w*|new|newly|worsen\w*|improv\w*|increasing\w*|decreasing\w*|"
    rf"(?:has|have|had) (?:\w+ ){{0,2}}(?:increased|decreased|progressed|enlarged|changed|diminished|cleared|resolved|"
    rf"developed|been)|interval\w*|again|re-?demonstrat\w*|{_PRIOR}|previously|compar\w*|since|resolv\w*|resolution|"
    rf"progress(?:ed|ion)|continue[sd]?|remains?|remained|residual|developed|no longer|still|enlarging|"
    rf"(?:no|without|little|minimal) (?:\w+ ){{0,3}}change|changed|(?:more|less) (?:\w+ )?(?:than|conspicuous|"
    rf"prominent|pronounced|distinct|apparent)|(?:de|in)creased (?:from|compared)|"
    rf"(?:larger|smaller)(?! than (?:the |on the |on )?(?:left|right))|retract(?:ed|ion)|advance(?:d|ment)|"
    rf"recurren\w*|recurred|as before|known|removal|removed)\b",
    re.IGNORECASE,
)
# Pattern -> what stands in its place, in this order: first the clauses that name the other film, then predicates, then
# single words before a finding.
_RULES = tuple(
    (re.compile(pattern, re.IGNORECASE), instead)
    for pattern, instead in (
        # "Compared to the prior study, ..", "In the interval, .."
        (
            rf"^(?:as |when |in )?compar(?:ed|ison)(?: is made)? (?:to|with){_REST_OF_CLAUSE},\s*",
            "",
        ),
        # "Since the prior study, there is .."
        (rf"^(?:since|from) (?:the |that )?{_PRIOR}{_REST_OF_CLAUSE},\s*", ""),
        # "In the interval, ..", and words that only join sentences
        (
            r"^(?:in the interval|interval|again|however|specifically|additionally|in addition),\s*",
            "",
        ),
        # ".., decreased from the prior radiograph"
        (
            rf"{_HAS_CHANGED}?,?\s*\b(?:(?:as |when |in )?"
            rf"compar(?:ed|ison)(?: is made)? (?:to|with)|(?:since|from|than(?: on)?|relative to|to|with|as on|on)"
            rf"(?: the| that of the| that on the)? {_PRIOR}){_REST_OF_CLAUSE}",
            "",
        ),
        # ".. has increased in size since ___ and is now moderate"
        (rf"{_HAS_CHANGED}?\s*\b(?:since|from) {_GAP}(?:[ ,]*{_GAP})*", ""),
        (r"\s+and (is|are) now\b", r" \1"),
        (r"\b(is|are) now\b", r"\1"),
        # "There is no significant change in the .."
        (
            r"(?:there (?:is|are|has been|have been|was) )?\b(?:no|little|without|minimal|slight|mild|moderate|some|"
            r"significant|marked)?(?:(?:^| )(?:significant|definite|overall|appreciable|obvious|major|substantial|"
            r"slight|mild|further|real|great|marked)){0,2} ?\b(?:interval (?:change|increase|decrease|improvement|"
            r"worsening|progression|enlargement|development)|change) (?:in|of)(?: the| this)? "
            r"(?:(?:appearance|position|configuration|extent) of (?:the )?)?",
            " ",
        ),
        # ".. are stable and unremarkable": what else is said of them stays
        (r"\b(?:stable|unchanged) and ", ""),
        # "Stable appearance of the right apical thickening": the thing itself
        (
            r"\b(?:stable|unchanged|similar) (?:appearance|position(?:ing)?|configuration) of (?:the )?",
            "",
        ),
        # ".. is in stable position"
        (r"\s+(?:is|are|remains?) in (?:stable|unchanged) position\b", ""),
        # what has come is there
        (r"\bthere has been (?:interval )?development of\b", "there is"),
        # ".. is unchanged in size": the subject is left, as a finding without a verb
        (
            rf"\s+(?:is|are|was|were|appears?|remains?|remained)(?: again)? {_ADVERB}(?:unchanged|stable|similar|"
            rf"improved|improving|worsened|worsening|resolving|enlarging|increasing|decreasing){_IN_WHAT}{_ENDS}",
            "",
        ),
        # ".. has slightly increased", ".. persists": likewise
        (
            rf"\s+(?:has|have)(?: \w+ly)? (?:increased|decreased|improved|worsened|progressed|enlarged|diminished)"
            rf"(?: \w+ly)?{_IN_WHAT}{_ENDS}",
            "",
        ),
        (rf"\s+persists?{_ENDS}", ""),
        # ".. has developed in the right lower lobe": it is there now
        (r"\bhas developed(?= in\b)", "is"),
        (r"\bhave developed(?= in\b)", "are"),
        (rf"\s+(?:has|have) developed{_ENDS}", ""),
        # "Interval placement of a PICC with its tip in ..": the device, wherever it is
        (r"\s+(?:has|have) been (?:interval )?placed(?: in the interval)?\b", ""),
        (r"\binterval placement of (?:an? )?", ""),
        # a telegram's "nodule unchanged", ", stable", "(new)"
        (rf"\s+{_ADVERB}(?:stable|unchanged){_ENDS}", ""),
        (r"\bstable, (?=normal)", ""),
        (
            rf",\s*{_ADVERB}(?:stable|unchanged|improved|worsened|increased|decreased){_IN_WHAT}{_ENDS}",
            "",
        ),
        (rf"\s*\({_ADVERB}(?:stable|unchanged|new|improved|worsened)\)", ""),
        # what remains so is so
        (r"\b(?:remains|continues to be)\b", "is"),
        (r"\b(?:remain|continue to be)\b", "are"),
        # "Stable mild cardiomegaly"
        (
            rf"\b{_ADVERB}(?:stable|unchanged|persistent|persisting|residual|continued|newly|new|interval|improving|"
            r"improved|worsening|worsened|resolving|enlarging|increasing|decreasing|known|recurrent|"
            r"previously (?:seen|noted|described|identified|visualized|demonstrated))(?: and persistent| and stable)? ",
            "",
        ),
        # "There is again seen a nodule"
        (r"\b(?:there (is|are) (?:again|still)) (?:seen |noted |demonstrated )?", r"there \1 "),
        (r"\b(?:again|still) ", ""),
        (r"\s+again\b", ""),
        # "Redemonstration of the mass"
        (r"\bre-?demonstrat(?:ed|ion) (?:is |are |of )?(?:the |an? )?", ""),
    )
)
# Leaving "new" out would deny more than the report does.
_DENIES_CHANGE = re.compile(
    r"\b(?:no|not|without|nor|free of|negative for)\b[^.;]*?\b(?:new|newly|interval|worsen\w*|increas(?:ed|ing)|"
    r"enlarging|progressive|larger)\b",
    re.IGNORECASE,
)
# What a cut leaves that is no English: a word that wants another behind it, two ways of saying one thing.
_BROKEN = re.compile(
    r"\b(?:which|that|with|of|to|in|at|from|than|and|or|but|the|an?|by|is|are|has|have|was|were|been|representing)"
    r"\s*(?:[,.;]|$)|\b(?:mild|moderate|small|large|with|of|in|the|an?) (?:or|and|of|with)\b|"
    r"\bwith (?:in|de)creased size\b|\b(\w{4,}) or \1\b|\ban (?![aeiou])",
    re.IGNORECASE,
)
# "No change in the effusion" denies a change, and not the effusion.
_NO_CHANGE_IN = re.compile(
    r"\b(?:no|little|without|minimal) (?:\w+ ){0,3}change (?:in|of)\b", re.IGNORECASE
)
# "No change in the effusion or the edema": both are there. Without the "no" the same word would doubt which.
_NO_CHANGE_IN_EITHER = re.compile(_NO_CHANGE_IN.pattern + r"[^.;]*", re.IGNORECASE)


def without_comparison(sentence: str) -> str | None:
    """Leave what compares with another film out of a sentence.

    Returns:
        The sentence; "" where nothing is left; None where it cannot be told without.
    """
    if not COMPARES.search(sentence):
        return sentence
    # What is denied of a change says nothing of the thing, once "no change in" is set aside.
    if _DENIES_CHANGE.search(_NO_CHANGE_IN.sub(" ", sentence)):
        return None
    sentence = _NO_CHANGE_IN_EITHER.sub(
        lambda clause: re.sub(r"\b(?:n?or)\b", "and", clause[0], flags=re.IGNORECASE), sentence
    )
    # In their order: a later rule sees what an earlier one has left.
    for pattern, instead in _RULES:
        sentence = pattern.sub(instead, sentence)
    sentence = tidy(sentence)
    if COMPARES.search(sentence) or _BROKEN.search(sentence):
        return None
    return sentence


# ---- De-identified blanks ------------------------------------------------------------------------------------------

BLANK = re.compile(_GAP)
# A date, a place or a treatment at the end of a clause: nothing that the film shows.
_BLANK_WITH_ITS_WORDS = re.compile(
    rf",?\s*\b(?:dated|from|since|on|at|in the setting of) (?:the )?{_GAP}(?:[ ,]*{_GAP})*(?=\s*[.,;]|$)",
    re.IGNORECASE,
)
# An organ of several that a sentence calls alike: "the heart and pulmonary XXXX are normal".
_BLANK_ORGAN = tuple(
    (re.compile(pattern, re.IGNORECASE), instead)
    for pattern, instead in (
        (
            rf",? and (?:the )?(?:pulmonary|hilar|central|mediastinal) {_GAP}(?= (?:are|appear|is|within|normal))",
            "",
        ),
        (rf"^(?:the )?pulmonary {_GAP} and (?=mediastin|heart|hil|cardi)", ""),
        (rf", pulmonary {_GAP},? and (?=mediastin|heart|hil|cardi)", " and "),
        (rf"(?<=pulmonary ){_GAP} and (?=vascul)", ""),
        (r"^((?:the )?(?:heart|mediastinum|cardiac silhouette)) are\b", r"\1 is"),
        (r"^((?:the )?(?:heart|mediastinum|cardiac silhouette)) appear\b", r"\1 appears"),
    )
)


def without_blanks(sentence: str) -> str | None:
    """Leave the place, date or organ that a blank stands for out of a sentence.

    Returns:
        The sentence; None where a blank stays in it: it may stand for "no" or "likely", so nothing is said for certain.
    """
    if not BLANK.search(sentence):
        return sentence
    sentence = _BLANK_WITH_ITS_WORDS.sub("", sentence)
    # An organ beside others that are called the same loses nothing but its name.
    for pattern, instead in _BLANK_ORGAN:
        sentence = pattern.sub(instead, sentence)
    sentence = tidy(sentence)
    return None if BLANK.search(sentence) else sentence


# ---- What no sentence of a trace says ------------------------------------------------------------------------------

# It tells who, when, why and what next. Whether it also tells a finding, its claims say: those are never lost.
_ASIDE = re.compile(
    # how the film was taken and what it is compared with
    r"^(?:technique|comparison|indication|history|exam(?:ination)?|procedure|clinical\b[^:]*|reason\b[^:]*)\s*:|"
    r"\b(?:views?|images?|projections?|radiographs?|films?|examination|exam|study)\b.*\b(?:obtained|performed|"
    r"submitted|acquired|provided|available|reviewed|presented)\b|\bcompar(?:ed|ison)\b|"
    r"^(?:(?:one|two|three|single|\d|pa|ap|frontal|lateral|portable|upright|supine|semi-?upright|and)[ ,/&]+)+"
    r"(?:total )?(?:views?|images?|radiographs?|projections?)\b|"
    # who was told, who signs
    r"\b(?:discussed|communicated|notified|telephoned?|paged|conveyed|dictated|signed|electronically|attending|"
    r"resident|radiologist|physician|dr|nurse|provider|pager|e-?mail(?:ed)?|wet read|addendum|findings were)\b|"
    # what should be done
    r"\b(?:recommend\w*|follow-? ?up|correlat\w*|please|would be helpful|further evaluation|advised|may be obtained|"
    r"could be obtained|should be (?:obtained|considered|performed)|if clinically)\b|"
    # who the patient is
    r"\b(?:history|year[- ]old|presents? with|complain\w*|symptoms?|clinical(?:ly)?|patient (?:is|has|was))\b",
    re.IGNORECASE,
)


def is_aside(sentence: str) -> bool:
    """Whether a sentence speaks of technique, comparison, people, advice or history, and not of what is seen."""
    return _ASIDE.search(sentence) is not None


# It speaks of what the sentence before it speaks of.
_LEANS = re.compile(
    r"^(?:this|these|it|its|they|their|those|such|the (?:smaller|larger|former|latter|other)|which|also|both of|"
    r"findings? (?:is|are|may|could|suggest\w*|represent\w*)|appearance|may|could|is|are|likely|probably|"
    r"(?:[\w-]+ ){0,4}(?:surrounding|associated|accompanying))\b",
    re.IGNORECASE,
)


def leans_on_another(sentence: str) -> bool:
    """Whether a sentence means nothing without the one before it."""
    return _LEANS.search(sentence) is not None


# ---- Spelling ------------------------------------------------------------------------------------------------------

# "1. ", "(2) ", "- "
_ENUMERATOR = re.compile(r"^\s*(?:\(?\d{1,2}[.)]\s+|\[\d\]\s*|[-*\u2022\u00b7+>#]+\s+)+")
# Line breaks and emphasis of HTML: to the parser, too, they are no words.
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,60}>?")
# "PA and lateral views of the chest demonstrate ..": what follows is what counts.
_VIEWS_SHOW = re.compile(
    r"^(?:the )?(?:(?:frontal|pa|ap|portable|single|two|2|upright|supine|and|lateral|semi-?upright)[ ,/&]+)+"
    r"(?:views?|radiographs?|projections?|films?|images?)(?: of the chest| of chest| the chest)?"
    r"(?: (?:were|was) obtained(?: and)?)? (?:shows?|demonstrates?|reveals?) ",
    re.IGNORECASE,
)
# Kept as they are where a report in capitals is written small.
_ACRONYMS = frozenset(
    "AP PA CT ET NG OG PICC SVC IVC ICD AICD COPD CHF CABG IJ CVC CVL RUL RML RLL LUL LLL ETT NGT PEG IABP ARDS "
    "PTX TB AV MRI PET TIPS VP LVAD ECMO II III IV TAVR RV LV GE R L".split()
)


def tidy(sentence: str) -> str:
    """Write a sentence as one line that begins with a capital and ends with a full stop; "" for one without a word."""
    sentence = " ".join(_TAG.sub(" ", sentence).split())
    # Numbers of lists, then what cuts have left: blanks before signs, joins without a first part, doubled commas.
    sentence = _ENUMERATOR.sub("", sentence)
    sentence = re.sub(r"\s+([,.;:])", r"\1", sentence)
    sentence = re.sub(r"^(?:and|but) ", "", sentence, flags=re.IGNORECASE)
    sentence = re.sub(r"^[\s,;:.&]+|[\s,;:&.]+$", "", sentence)
    sentence = re.sub(r",(?:\s*,)+", ",", sentence)
    # A number alone is no sentence.
    if not any(map(str.isalpha, sentence)):
        return ""
    ends = "" if sentence[-1] in "?!" else "."
    return sentence[0].upper() + sentence[1:] + ends


def _without_capitals(sentence: str) -> str:
    """A sentence in capitals in small letters, but for acronyms."""
    letters = [letter for letter in sentence if letter.isalpha()]
    if len(letters) < 8 or sum(map(str.isupper, letters)) < 0.9 * len(letters):
        return sentence
    return re.sub(
        r"[A-Za-z]+",
        lambda match: match[0] if match[0].upper() in _ACRONYMS else match[0].lower(),
        sentence,
    )


def carried_over(sentence: str) -> str:
    """Write a sentence of a report as a trace has it: the same words."""
    return tidy(_without_capitals(_VIEWS_SHOW.sub("", tidy(sentence))))


# ---- A list of denials, one by one ---------------------------------------------------------------------------------

# "There is no .., .. or .. seen."
_LIST = re.compile(
    r"^(?:there (?:is|are|was|were) )?(no|without|negative for)(?: evidence (?:of|for)| (?:radiographic )?signs? of)? "
    r"(?P<list>[^.;:]+?)(?: (?:is|are) (?:seen|identified|noted|present|visualized|demonstrated|appreciated))?\.$",
    re.IGNORECASE,
)
# Commas and conjunctions between the items; a "no" that is said again belongs to them.
_BETWEEN = re.compile(
    r"\s*,?\s*\b(?:or|nor|and|and/or)\b\s*(?:no\s+)?|\s*,\s*(?:no\s+)?", re.IGNORECASE
)
# Words that say of their own noun only, and nouns: any other word could speak of the whole list.
_ITEM = re.compile(
    r"(?:(?:focal|pleural|pulmonary|air-?space|air space|lobar|parenchymal|alveolar|interstitial|lung|pericardial|"
    r"mediastinal|hilar) )*(?:consolidations?|infiltrates?|opacity|opacities|air-?space disease|disease|pneumonia|"
    r"edema|effusions?|pneumothorax|pneumothoraces|nodules?|mass|masses|atelectasis|fractures?|cardiomegaly|adenopathy|"
    r"lymphadenopathy|congestion)",
    re.IGNORECASE,
)


def one_by_one(sentence: str) -> list[str]:
    """Divide a sentence that denies several findings, and says nothing else, into one for each; else the sentence."""
    match = _LIST.match(sentence)
    if match is None:
        return [sentence]
    # Each item by itself: one that is no known noun could change the meaning of its neighbours.
    items = [item for item in _BETWEEN.split(match["list"]) if item]
    if len(items) < 2 or not all(map(_ITEM.fullmatch, items)):
        return [sentence]
    return [f"No {item[0].lower()}{item[1:]}." for item in items]


# ---- From claims ---------------------------------------------------------------------------------------------------

# Label -> the words for it, and how a sentence must name it to be said anew by them: a scar is an opacity to the
# parser, and not to a reader. Labels that are many things have none.
_NOUNS = {
    "Cardiomegaly": ("cardiomegaly", "cardiomegaly|enlarged heart|enlarged cardiac"),
    "Lung Opacity": ("opacity", r"opacit\w+"),
    "Lung Lesion": ("nodule", r"nodules?"),
    "Edema": ("pulmonary edema", r"o?edema"),
    "Consolidation": ("consolidation", r"consolidations?"),
    "Pneumonia": ("pneumonia", "pneumonia"),
    "Atelectasis": ("atelectasis", "atelectasis"),
    "Pneumothorax": ("pneumothorax", "pneumothorax|pneumothoraces"),
    "Pleural Effusion": ("pleural effusion", r"(?:pleural )?effusions?"),
    "Fracture": ("fracture", r"fractures?"),
}
# "Atelectasis or scarring": none of the two is said for itself.
_CHOICE = re.compile(r"\b(?:or|vs|versus)\b|/", re.IGNORECASE)
# By these words the parser reads the same states.
_BY_STATE = {POSITIVE: "", NEGATIVE: "No ", UNCERTAIN: "Possible "}
# A denial with one of these denies less than the bare noun would, on its side.
_QUALIFIED = re.compile(
    r"\b(?:large|small|significant|definite|obvious|acute|new|sizable|moderate|suspicious|overt|frank|gross|further|"
    r"other|additional|displaced|tension|recurrent|worsening|increas\w*|progress\w*|focal|multifocal|loculated|"
    # a lobe is not a lung
    r"upper|lower|middle|mid|lobes?|lobar|bas(?:e|es|al|ilar)|bibasilar|apic\w*|apex|biapical|zones?|lingula\w*|"
    r"perihilar|retrocardiac|segment\w*|rul|rml|rll|lul|lll|anterior|posterior|lateral|medial)\b",
    re.IGNORECASE,
)
# Other denials ("cannot be identified on the lateral view") are too easily read as more than they say.
_SAYS_PLAINLY_NO = re.compile(
    r"^(?:there (?:is|are) )?no\b|\b(?:has|have) (?:\w+ )?(?:resolved|cleared)\b", re.IGNORECASE
)


def restated(sentence: str, claims: Iterable[Claim]) -> list[str] | None:
    """Say what a sentence claims in words of our own: its findings, sides and certainty, and nothing of size or place.

    Returns:
        The sentences, or None where that would say more than the sentence does: a finding that it does not call so, a
        choice between findings, a denial that is not in so many words.
    """
    sides: dict[tuple[str, int], set[str]] = {}
    for label_name, state, side_name in claims:
        if label_name not in _NOUNS or not re.search(
            rf"\b(?:{_NOUNS[label_name][1]})\b", sentence, re.IGNORECASE
        ):
            return None
        sides.setdefault((label_name, state), set()).add(side_name)
    if any(state == NEGATIVE for _, state in sides):
        # "No large effusion" does not deny a small one.
        if _QUALIFIED.search(sentence) or not _SAYS_PLAINLY_NO.search(sentence):
            return None
    elif _CHOICE.search(sentence):
        return None
    ordered = sorted(sides, key=lambda key: (CHEXPERT_14.index(key[0]), -key[1]))
    return [
        tidy(_BY_STATE[state] + _NOUNS[label_name][0] + _on_sides(sides[label_name, state]))
        for label_name, state in ordered
    ]


def _on_sides(sides: set[str]) -> str:
    if {"right", "left"} <= sides:
        return " on both sides"
    side_name = next(filter(None, sides), "")
    return f" on the {side_name}" if side_name else ""


def wordings(sentence: str, claims: Iterable[Claim], comparisons: str = DROP) -> list[list[str]]:
    """List how a sentence may be said in a trace, best first: each a list of sentences; an empty list says nothing.

    Args:
        sentence: of a report.
        claims: what it says.
        comparisons: of `COMPARISONS`.
    """
    whole = carried_over(sentence)
    # Comparisons first: a blank date often goes with them.
    carried: str | None = whole
    if comparisons != KEEP:
        carried = without_comparison(whole)
    if carried:
        carried = without_blanks(carried)
    choices: list[list[str]] = []
    if carried:
        choices = [[carried]]
        # One by one is better, if it says the same; the caller falls back on the whole.
        if (denials := one_by_one(carried)) != [carried]:
            choices = [denials, [carried]]
    # Words of our own are the last resort where a comparison was in the way, and never over a blank.
    if COMPARES.search(sentence) and comparisons != KEEP and not BLANK.search(sentence):
        own_words = restated(sentence, claims)
        if own_words:
            choices.append(own_words)
        if comparisons == NEEDED and claims:
            choices.append([whole])
    return choices
