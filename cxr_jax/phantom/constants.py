"""Names and index constants of a phantom scene. Imports nothing heavy, so report code can use it freely."""

FINDINGS = (
    "enlarged_cardiomediastinum",
    "cardiomegaly",
    "lung_lesion",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pneumothorax",
    "pleural_effusion",
    "pleural_other",
    "fracture",
    "support_devices",
)
F = {name: i for i, name in enumerate(FINDINGS)}
MED, CARD, LESION, EDEMA, CONS, PNEU, ATEL, PTX, EFF, PLEU, FRAC, DEV = range(12)

DEVICES = ("endotracheal_tube", "central_line", "pacemaker", "nasogastric_tube", "sternal_wires")
ETT, CVC, PACER, NGT, WIRES = range(5)

POSITIVE_AT = 0.35  # severity from which a finding is called; below it (but above 0) it is "subtle"
OPACITIES = (
    LESION,
    EDEMA,
    CONS,
    PNEU,
    ATEL,
)  # what CheXpert's "Lung Opacity" is the parent of here

RIGHT, LEFT, BOTH = 0, 1, 2  # patient's side; the patient's right is on the image's left
UPPER, MID, LOWER = 0, 1, 2

# anatomy: nuisance numbers in (-1, 1), the normal spread between people
(
    ANAT_WIDTH,
    ANAT_APEX,
    ANAT_DIAPHRAGM_R,
    ANAT_DIAPHRAGM_L,
    ANAT_HEART,
    ANAT_HEART_TILT,
    ANAT_MEDIASTINUM,
    ANAT_AORTA,
    ANAT_RIB_SPACING,
    ANAT_RIB_SLOPE,
    ANAT_RIB_PHASE,
    ANAT_HABITUS,
    ANAT_CLAVICLE,
    ANAT_STOMACH,
    ANAT_VESSELS,
    ANAT_BREAST,
) = range(16)

# acquisition: physical units as commented
(
    ACQ_CONTRAST,  # display slope, 1 = nominal
    ACQ_GAMMA,  # tone curve: above 0 brightens mid-grey, below darkens
    ACQ_NOISE,  # standard deviation of the detector noise in display units
    ACQ_SCATTER,  # scattered / primary radiation
    ACQ_MAGNIFICATION,  # 1 = nominal
    ACQ_ROTATION,  # degrees, in-plane tilt; it also shifts the mediastinum as a turned patient does
    ACQ_SHIFT_X,  # image half-widths
    ACQ_SHIFT_Y,
    ACQ_AP,  # 0 posterior-anterior, 1 anterior-posterior
    ACQ_LOW_INSPIRATION,  # 0..1: how far the diaphragms are raised
    ACQ_WINDOW,  # offset of the display window
    ACQ_TREE_R,  # uniform(0,1): which vessel tree the right lung has
    ACQ_TREE_L,
    ACQ_VIGNETTE,  # heel effect, -1..1
    ACQ_VEIL,  # constant fog, 0..0.1
    ACQ_SPARE,
) = range(16)

ROTATED_FROM = (
    2.5  # degrees of in-plane tilt from which a film is called rotated; none is drawn near it
)
SIZE = 224  # image side in pixels
CELLS = 8  # region maps are CELLS x CELLS
