"""Names and index constants of a phantom scene. Imports nothing heavy, so report code can use it freely."""

from enum import IntEnum


class Finding(IntEnum):
    """The findings of a scene, as places in its arrays of 12."""

    ENLARGED_CARDIOMEDIASTINUM = 0
    CARDIOMEGALY = 1
    LUNG_LESION = 2
    EDEMA = 3
    CONSOLIDATION = 4
    PNEUMONIA = 5
    ATELECTASIS = 6
    PNEUMOTHORAX = 7
    PLEURAL_EFFUSION = 8
    PLEURAL_OTHER = 9
    FRACTURE = 10
    SUPPORT_DEVICES = 11


FINDINGS = tuple(finding.name.lower() for finding in Finding)
FINDING_INDEX = {name: index for index, name in enumerate(FINDINGS)}
PATHOLOGIES = 11  # how many findings there are before devices, which are no pathology


class Device(IntEnum):
    """The devices of a scene, as places in its array of 5."""

    ENDOTRACHEAL_TUBE = 0
    CENTRAL_LINE = 1
    PACEMAKER = 2
    NASOGASTRIC_TUBE = 3
    STERNAL_WIRES = 4


DEVICES = tuple(device.name.lower() for device in Device)

POSITIVE_AT = 0.35  # severity from which a finding is called; below it (but above 0) it is "subtle"
# What CheXpert's "Lung Opacity" is the parent of here; plain integers, because they index arrays.
OPACITIES = (
    int(Finding.LUNG_LESION),
    int(Finding.EDEMA),
    int(Finding.CONSOLIDATION),
    int(Finding.PNEUMONIA),
    int(Finding.ATELECTASIS),
)

RIGHT, LEFT, BOTH = 0, 1, 2  # patient's side; the patient's right is on the image's left
UPPER, MID, LOWER = 0, 1, 2


class Anatomy(IntEnum):
    """Places in a scene's `anatomy`: nuisance numbers in (-1, 1), the normal spread between people."""

    WIDTH = 0
    APEX = 1
    DIAPHRAGM_RIGHT = 2
    DIAPHRAGM_LEFT = 3
    HEART = 4
    HEART_TILT = 5
    MEDIASTINUM = 6
    AORTA = 7
    RIB_SPACING = 8
    RIB_SLOPE = 9
    RIB_PHASE = 10
    HABITUS = 11
    CLAVICLE = 12
    STOMACH = 13
    VESSELS = 14
    BREAST = 15


class Acquisition(IntEnum):
    """Places in a scene's `acq`: how the picture was taken, in the units of the comments."""

    CONTRAST = 0  # display slope, 1 = nominal
    GAMMA = 1  # tone curve: above 0 brightens mid-grey, below darkens
    NOISE = 2  # standard deviation of the detector noise in display units
    SCATTER = 3  # scattered / primary radiation
    MAGNIFICATION = 4  # 1 = nominal
    ROTATION = 5  # degrees, in-plane tilt; it also shifts the mediastinum as a turned patient does
    SHIFT_X = 6  # image half-widths
    SHIFT_Y = 7
    AP = 8  # 0 posterior-anterior, 1 anterior-posterior
    LOW_INSPIRATION = 9  # 0..1: how far the diaphragms are raised
    WINDOW = 10  # offset of the display window
    TREE_RIGHT = 11  # uniform(0,1): which vessel tree the right lung has
    TREE_LEFT = 12
    VIGNETTE = 13  # heel effect, -1..1
    VEIL = 14  # constant fog, 0..0.1
    SPARE = 15  # drawn and not used: without it every number after it would change


# Degrees of in-plane tilt from which a film is called rotated; none is drawn near it.
ROTATED_FROM = 2.5
SIZE = 224  # image side in pixels
CELLS = 8  # region maps are CELLS x CELLS
