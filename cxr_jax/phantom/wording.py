"""The words of phantom reports: which sentences hospital A and hospital B use for the same fact. Data only.

Two rules shape the tables, both for a very small language model. The word that carries the fact comes early
and the slots come in a fixed order, so the next token has to be read from the image. And all words come from
one short list, so a 1,024-entry tokenizer has a single token for nearly each of them.
"""

from cxr_jax.phantom.constants import DEVICES, FINDINGS

LABEL_OF = {name: name.replace("_", " ").title() for name in FINDINGS}
# Parenchymal findings, in label order: together they are what "Lung Opacity" stands for.
LUNG_FINDINGS = ("lung_lesion", "edema", "consolidation", "pneumonia", "atelectasis")

SIDES = ("right", "left", "bilateral")
ON_SIDE = ("on the right", "on the left", "on both sides")
ZONES = ("upper", "mid", "lower")
# Pleural air is described by where the lung edge comes away, not by a lung zone.
PLEURAL_PLACES = ("at the apex", "along the wall", "at the base")

# A fact's severity is always one of SEVERITIES; things without a size are graded with words of degree.
SEVERITIES = ("small", "moderate", "large")
_DEGREES = ("mild", "moderate", "marked")
SEVERITY_WORDS = {
    "enlarged_cardiomediastinum": _DEGREES,
    "cardiomegaly": _DEGREES,
    "lung_lesion": SEVERITIES,
    "edema": _DEGREES,
    "consolidation": SEVERITIES,
    "pneumonia": _DEGREES,
    "atelectasis": _DEGREES,
    "pneumothorax": SEVERITIES,
    "pleural_effusion": SEVERITIES,
    "pleural_other": _DEGREES,
}

DEVICE_WORDS = {name: name.replace("_", " ") for name in DEVICES}

# What a hedge is put in front of: "possible subtle" + this.
NOUNS = {
    "enlarged_cardiomediastinum": "mediastinal widening",
    "cardiomegaly": "cardiomegaly",
    "lung_lesion": "lesion in the {zone} zone",
    "edema": "edema",
    "consolidation": "consolidation in the {zone} zone",
    "pneumonia": "pneumonia in the {zone} zone",
    "atelectasis": "atelectasis in the {zone} zone",
    "pneumothorax": "{side} pneumothorax {place}",
    "pleural_effusion": "{side} pleural effusion",
    "pleural_other": "{side} pleural thickening in the {zone} zone",
    "fracture": "{side} rib fracture in the {zone} zone",
}

# The name of a finding without its place, for the summary.
SHORT_NAMES = {
    "enlarged_cardiomediastinum": "mediastinal widening",
    "cardiomegaly": "cardiomegaly",
    "lung_lesion": "lesion",
    "edema": "edema",
    "consolidation": "consolidation",
    "pneumonia": "pneumonia",
    "atelectasis": "atelectasis",
    "pneumothorax": "pneumothorax",
    "pleural_effusion": "effusion",
    "pleural_other": "pleural thickening",
    "fracture": "fracture",
}

# Causes, most likely first. None is itself one of the 14 labels, so a cause cannot be taken for a finding.
CAUSES = {
    "pneumothorax": ("ruptured bleb", "trauma", "line placement"),
    "edema": ("heart failure", "fluid overload", "kidney failure"),
    "pneumonia": ("bacterial infection", "aspiration", "viral infection"),
    "consolidation": ("infection", "aspiration", "hemorrhage"),
    "lung_lesion": ("tumor", "granuloma", "metastasis"),
    "pleural_effusion": ("heart failure", "infection", "tumor"),
    "enlarged_cardiomediastinum": ("aortic disease", "enlarged nodes", "tumor"),
    "cardiomegaly": ("heart failure", "valve disease", "pericardial fluid"),
    "atelectasis": ("mucus plug", "shallow breathing", "compression"),
    "fracture": ("trauma", "weak bone", "tumor"),
    "pleural_other": ("old infection", "asbestos exposure", "old trauma"),
}
URGENCY = tuple(CAUSES)  # what changes most what is done next comes first

# What else in the picture makes a cause the likeliest: (sign, cause), the last one that applies wins. A sign
# counts only on the same side.
EVIDENCE = {
    "pneumothorax": (("central_line", "line placement"), ("fracture", "trauma")),
    "pneumonia": (("nasogastric_tube", "aspiration"),),
    "consolidation": (("nasogastric_tube", "aspiration"), ("fracture", "hemorrhage")),
    "pleural_effusion": (
        ("pneumonia", "infection"),
        ("consolidation", "infection"),
        ("cardiomegaly", "heart failure"),
        ("edema", "heart failure"),
    ),
    "enlarged_cardiomediastinum": (("sternal_wires", "prior surgery"),),
    "cardiomegaly": (("sternal_wires", "valve disease"), ("edema", "heart failure")),
    "atelectasis": (
        ("quality:low_inspiration", "shallow breathing"),
        ("endotracheal_tube", "mucus plug"),
        ("pleural_effusion", "compression"),
        ("pneumothorax", "compression"),
    ),
    "fracture": (("lung_lesion", "tumor"),),
    "pleural_other": (("fracture", "old trauma"),),
}

# ---- Each hospital's own phrases, two for every slot -----------------------------------------------

_HOSPITAL_A: dict[str, tuple[str, ...]] = {
    "quality": (
        "{view} view, {rotation}, {inspiration}",
        "{view} projection, {rotation}, {inspiration}",
    ),
    "rotation": ("no rotation", "rotated"),
    "inspiration": ("good inspiration", "low inspiration"),
    "no_devices": ("no support devices", "no devices"),
    "devices": ("{list}", "{list} present"),
    "airways": ("trachea midline", "trachea in the midline"),
    "airways_rotated": (
        "trachea midline despite rotation",
        "trachea midline, allowing for rotation",
    ),
    "clear": ("clear", "clear, no opacity"),
    "clear_above": ("clear above the effusion", "clear above the effusion, no opacity"),
    "rest": ("otherwise clear", "rest clear"),
    "hila": ("normal", "normal size"),
    "hila_edema": ("blurred by edema", "hazy with edema"),
    "abdomen": ("no free air", "no free air under the diaphragm"),
    "hedge": ("possible subtle {noun}", "cannot exclude subtle {noun}"),
    "lung_lesion": (
        "round lesion in the {zone} zone, {severity}",
        "lung lesion in the {zone} zone, {severity}",
    ),
    "edema": ("perihilar edema, {severity}", "edema, {severity}"),
    "consolidation": (
        "dense consolidation in the {zone} zone, {severity}",
        "consolidation in the {zone} zone, {severity}",
    ),
    "pneumonia": (
        "patchy pneumonia in the {zone} zone, {severity}",
        "pneumonia in the {zone} zone, {severity}",
    ),
    "atelectasis": (
        "linear atelectasis in the {zone} zone, {severity}",
        "atelectasis in the {zone} zone, {severity}",
    ),
    "pleural_effusion": ("{side} effusion, {severity}", "{side} pleural effusion, {severity}"),
    "no_pleural_effusion": ("no effusion", "no pleural effusion"),
    "pneumothorax": (
        "{side} pneumothorax {place}, {severity}",
        "{side} pneumothorax, {severity}, {place}",
    ),
    "no_pneumothorax": ("no pneumothorax", "no visible pneumothorax"),
    "pleural_other": (
        "{side} pleural thickening in the {zone} zone, {severity}",
        "{side} pleural thickening, {severity}, in the {zone} zone",
    ),
    "no_pleural_other": ("no pleural thickening", "no thickening"),
    "enlarged_cardiomediastinum": (
        "widened mediastinum, {severity}",
        "mediastinal widening, {severity}",
    ),
    "no_enlarged_cardiomediastinum": ("no widening", "normal width"),
    "cardiomegaly": ("cardiomegaly, {severity}", "enlarged, {severity} cardiomegaly"),
    "no_cardiomegaly": ("normal size", "no cardiomegaly"),
    "ap_heart": ("AP view magnifies the heart", "magnified by AP view"),
    "fracture": ("{side} rib fracture in the {zone} zone", "{side} rib fracture, {zone} zone"),
    "no_fracture": ("no fracture", "no rib fracture"),
    "causes": ("{name} from {causes}", "{name} likely from {causes}"),
    "recheck": ("recheck possible {names}", "follow up possible {names}"),
}

_HOSPITAL_B: dict[str, tuple[str, ...]] = {
    "quality": (
        "{view} film, {rotation}, {inspiration}",
        "{view} radiograph, {rotation}, {inspiration}",
    ),
    "rotation": ("not rotated", "patient rotated"),
    "inspiration": ("full inspiration", "shallow inspiration"),
    "no_devices": ("no support devices seen", "no lines, tubes or devices"),
    "devices": ("{list} in place", "{list} seen"),
    "airways": ("midline trachea", "trachea central"),
    "airways_rotated": (
        "midline trachea despite rotation",
        "trachea central, allowing for rotation",
    ),
    "clear": ("no opacity", "no focal opacity"),
    "clear_above": ("no opacity above the effusion", "no opacity over the effusion"),
    "rest": ("elsewhere clear", "no other opacity"),
    "hila": ("not enlarged", "no enlargement"),
    "hila_edema": ("indistinct with edema", "edema blurs the vessels"),
    "abdomen": ("no air under the diaphragm", "no free abdominal air"),
    "hedge": ("questionable faint {noun}", "cannot rule out {noun}"),
    "lung_lesion": (
        "{severity} {zone} zone lesion",
        "{severity} nodular lesion in the {zone} zone",
    ),
    "edema": ("{severity} pulmonary edema", "{severity} edema"),
    "consolidation": (
        "{severity} {zone} zone consolidation",
        "{severity} consolidation in the {zone} zone",
    ),
    "pneumonia": ("{severity} {zone} zone pneumonia", "{severity} pneumonia in the {zone} zone"),
    "atelectasis": (
        "{severity} {zone} zone atelectasis",
        "{severity} atelectasis in the {zone} zone",
    ),
    "pleural_effusion": ("{severity} {side} effusion", "{severity} pleural effusion {on_side}"),
    "no_pleural_effusion": ("no effusion seen", "no pleural fluid"),
    "pneumothorax": (
        "{severity} {side} pneumothorax {place}",
        "{severity} pneumothorax {on_side} {place}",
    ),
    "no_pneumothorax": ("no pneumothorax seen", "without pneumothorax"),
    "pleural_other": (
        "{severity} {side} pleural thickening in the {zone} zone",
        "{severity} {zone} zone pleural thickening {on_side}",
    ),
    "no_pleural_other": ("no pleural thickening seen", "without pleural thickening"),
    "enlarged_cardiomediastinum": (
        "{severity} mediastinal widening",
        "{severity} widening of the mediastinum",
    ),
    "no_enlarged_cardiomediastinum": ("no mediastinal widening", "not widened"),
    "cardiomegaly": ("{severity} cardiomegaly", "{severity} enlargement of the heart"),
    "no_cardiomegaly": ("not enlarged", "normal heart size"),
    "ap_heart": ("AP film magnifies the heart", "magnified on AP film"),
    "fracture": ("{zone} zone rib fracture {on_side}", "{side} {zone} zone rib fracture"),
    "no_fracture": ("no fracture seen", "no rib fracture seen"),
    "causes": ("consider {causes} for {name}", "{name} due to {causes}"),
    "recheck": ("questionable {names}, repeat film", "review questionable {names}"),
}

PHRASES = {"A": _HOSPITAL_A, "B": _HOSPITAL_B}
