"""What the words of a header mean: modality, body part, view.

Writers fill these elements with DICOM's terms, with their own, or with any language's. A word is understood as right,
understood as something else, or not understood: only the second is a reason not to read a film, the third a warning.
"""

import re
import unicodedata
from enum import Enum

# ---- Modality --------------------------------------------------------------------------------------

RADIOGRAPHY = ("CR", "DX", "RG", "DR")
# What DICOM (PS3.3 C.7.3.1.1.1) and some writers call things that are no projection radiograph of a chest. RF, SC, OT
# and PX are not among them: they may hold one.
OTHER_MODALITIES = frozenset(
    """ANGIO ANN AR ASMT AU BDUS BI BMD CAT CBCT CD CFM CT CTPROTOCOL DD DEXA DG DM DMS DOC DS DXA EC ECG EEG EMG EOG
    EPS ES FA FID FS GM HD IO IOL IVOCT IVUS KER KO LEN LP LS M3D MA MAMMO MAMMOGRAPHY MG MPR MR MRI MRS MS NM OAM
    OCT OP OPM OPR OPT OPTBSV OPTENF OPV OSS PET PLAN POS PR PT REG RESP RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD
    RTSEGANN RTSTRUCT RWV SCINTI SEG SM SMR SPECT SR SRF ST STAIN TEXTUREMAP TG ULTRASOUND US VA VF VL XA XAPROTOCOL
    XC""".split()
)
# Words in the standard's names of SOP classes, for a modality that is not understood.
OTHER_CLASSES = re.compile(
    r"\b(CT|MR|Ultrasound|Nuclear|Positron|Mammography|Breast|Intra-Oral|VL|Ophthalmic|Angiographic|RT|Waveform|SR"
    r"|Segmentation|Presentation State|Parametric|Surface|PDF|CDA)\b"
)

# ---- Body part -------------------------------------------------------------------------------------

# Beginnings of words, accents left out: English, German, French, Spanish, Portuguese, Italian, Dutch, Nordic, Polish,
# Turkish.
CHEST_STEMS = tuple(
    """
    CHEST CXR THORA TORA LUNG PULM POUMON POLMON RIB RIPPE HEART STERN BRUST PECHO PEITO POITRIN PETTO BORSTKAS
    BRYST KLATKA AKCIGER GOGUS HARTLONG
    """.split()
)
# These may stand anywhere in a word: PACHEST.
CHEST_PARTS = ("CHEST", "THORAX", "TORAX", "LUNG")
CHEST_SIGNS = ("胸", "肺", "흉부", "가슴", "ГРУД", "ЛЕГК", "ΘΩΡΑ", "صدر", "חזה")
# Words that turn a chest word into another part: thoracic spine.
SPINE_STEMS = (
    "SPINE WIRBEL BWS COLUMNA COLUNA COLONNA RACHIS VERTEB KYPHO SCOLIO THORACOL TORACOL".split()
)
OTHER_STEMS = tuple(
    """
    ABDOM BAUCH BUIK PELVI BECKEN BEKKEN BACIA BACINO SKULL CRANI CRANE SCHAEDEL SCHADEL SCHEDEL HEAD KOPF BRAIN
    NECK CERVI LUMBA LUMBO LENDEN SACRU SACRAL COCCY LSPINE CSPINE SSPINE SHOULDER SCHULTER SCHOUDER EPAULE
    HOMBRO OMBRO SPALLA SCAPUL CLAVIC CLAVIK HUMER ELBOW ELLENBOG ELLEBOOG COUDE GOMITO COTOVELO FOREARM
    UNTERARM OBERARM UPPERARM ANTEBRA AVAMBRAC WRIST POIGNET MUNECA POLSO PUNHO FINGER THUMB DAUMEN HAND CARPA
    METACARP FEMUR FEMOR THIGH OBERSCHENKEL UNTERSCHENKEL KNEE KNIE GENOU RODILLA JOELHO GINOCCHIO PATELL TIBIA
    FIBUL ANKLE SPRUNGG CHEVILLE TOBILLO TORNOZELO CAVIGLIA FOOT FEET FUSS VOET CALCAN TARS METATARS HUEFT HUFTE
    CADERA HANCHE QUADRIL EXTREMIT LOWERLEG MAMMO BREAST SENO MANDIB MAXIL TEETH TOOTH DENTAL DENTI ZAHN ZAEHNE
    DIENTE SINUS ORBIT FACIAL NASAL ZYGOM LIVER KIDNEY BLADDER STOMACH COLON BOWEL UTERUS UROGRA HYSTERO
    """.split()
)
OTHER_WORDS = frozenset(
    """
    ABD ARM CWK EAR EARS EYE EYES FACE HEEL HIP HIPS HNO HWS IAC IVP JAW KUB LEG LEGS LWK LWS MAIN MANO MAO NOSE
    PIE PIED RADIUS TMJ TOE TOES ULNA
    """.split()
)

# ---- View ------------------------------------------------------------------------------------------

# The one table of views: columns of tables are read by it, too (`data/sources/views.py`).
FRONTAL = ("PA", "AP")
# Frontal, and no word of which way.
FRONTAL_WORDS = frozenset("FRONTAL FRONT FRENTE POSTERO ANTERO".split())
LATERAL_WORDS = frozenset("LL RL LAT LLAT RLAT LTLAT RTLAT PERFIL PROFIL PROFILE SEIT".split())
LATERAL_STEMS = ("LATER", "SEITL")
# PadChest's word for a lateral film; beside other words it is the left side.
LATERAL_ALONE = "L"
# Obliques, decubitus, lordotic, the views of other parts and of slices, and films that a table leaves out.
OTHER_VIEWS = frozenset(
    """LAO RAO LPO RPO LLO RLO LLD RLD DECUB LORDOTIC LORDOT OBL AXIAL MLO LMO CC XCC XCCL XCCM ML LM SIO ISO CV FB LOMO
    TANGENTIAL TAN SUNRISE SKYLINE FROG MORTISE WATERS TOWNE TOWNES CALDWELL SWIMMERS SCHRAEG SCHRAG CORONAL SAGITTAL
    TRANSVERSE COSTAL CT ABDOMEN EXCLUDE""".split()
)
OTHER_VIEW_STEMS = ("DECUB", "LORDO", "OBLI", "AXIAL", "TANGEN")
SAYS_NOTHING = frozenset("UNKNOWN UNK NONE".split())


class Meaning(Enum):
    """How a word of the header is understood."""

    RIGHT = "right"
    OTHER = "something else"
    NOT_UNDERSTOOD = "not understood"


def _fold(text: str) -> str:
    """Upper case, accents left out."""
    # NFKD parts a letter from its accent, which is then a character of its own.
    letters = unicodedata.normalize("NFKD", text.upper())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Z0-9]+", _fold(text))


def meaning_of_modality(text: str, class_name: str) -> Meaning:
    """Understand a Modality.

    Args:
        text: the element's.
        class_name: the standard's name of the SOP class, asked where the modality is not understood.
    """
    words = _words(text)
    # First what it is not: of a file that says CT and CR one is wrong, and nobody knows which.
    if any(word in OTHER_MODALITIES for word in words):
        return Meaning.OTHER
    if any(word in RADIOGRAPHY for word in words):
        return Meaning.RIGHT
    return Meaning.OTHER if OTHER_CLASSES.search(class_name) else Meaning.NOT_UNDERSTOOD


def meaning_of_body_part(text: str) -> Meaning:
    """Understand a body part, or a description that may name one."""
    folded, words = _fold(text), _words(text)
    # Before the chest words, which such a part has as well.
    if any(stem in folded for stem in SPINE_STEMS):
        return Meaning.OTHER
    # A side may be written on to the part: LHAND.
    words += [word[1:] for word in words if word[0] in "LR"]
    # Before other parts: a film of chest and abdomen shows the chest.
    if any(word.startswith(CHEST_STEMS) for word in words):
        return Meaning.RIGHT
    if any(part in folded for part in (*CHEST_PARTS, *map(_fold, CHEST_SIGNS))):
        return Meaning.RIGHT
    if any(word in OTHER_WORDS or word.startswith(OTHER_STEMS) for word in words):
        return Meaning.OTHER
    return Meaning.NOT_UNDERSTOOD


def views_in(text: str) -> set[str]:
    """Find all views that a text names (`view_of_position`), and "unknown" where it says that there is none."""
    # viewLateral; A.P., A-P, A/P; antero-posterior, and the beams named by the patient's sides.
    text = _fold(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)).replace("_", " ")
    text = re.sub(r"\b([AP])\W{0,2}([AP])\b", r"\1\2", text)
    text = re.sub(r"\bPOSTERI?O?R?\W*ANTERI\w*", " PA ", text)
    text = re.sub(r"\bANTERI?O?R?\W*POSTERI\w*", " AP ", text)
    text = re.sub(r"\b(DORSO\W*VENTRAL\w*|D\W?V)\b", " PA ", text)
    text = re.sub(r"\b(VENTRO\W*DORSAL\w*|V\W?D)\b", " AP ", text)
    # Word by word: what stands beside a view (SUPINE, PORTABLE, ERECT) says how it was taken, not what it is.
    words = re.findall(r"[A-Z]+", text)
    if words == [LATERAL_ALONE]:
        return {"LATERAL"}
    return {view for view in map(_view_of_word, words) if view}


def _view_of_word(word: str) -> str | None:
    if word in FRONTAL:
        return word
    if word in OTHER_VIEWS or word.startswith(OTHER_VIEW_STEMS):
        return "OTHER"
    if word in LATERAL_WORDS or word.startswith(LATERAL_STEMS):
        return "LATERAL"
    if word in FRONTAL_WORDS:
        return "FRONTAL"
    return "unknown" if word in SAYS_NOTHING else None


def view_of_position(text: str) -> str:
    """Understand a view, of a header or of a column.

    Returns:
        PA, AP, FRONTAL (one of the two, not known which), LATERAL, OTHER, "unknown" where the text says so, "" where it
        is not understood.
    """
    views = views_in(text)
    frontal = views & {*FRONTAL, "FRONTAL"}
    # A decubitus film is called lateral, too, an apical one AP. Of a frontal and a lateral view nobody knows which of
    # the two the film is.
    if "OTHER" in views or ("LATERAL" in views and frontal):
        return "OTHER"
    if "LATERAL" in views:
        return "LATERAL"
    if frontal:
        directions = frontal & {*FRONTAL}
        return directions.pop() if len(directions) == 1 else "FRONTAL"
    # One that says that it is unknown, perhaps beside words that say nothing.
    return "unknown" if views else ""
