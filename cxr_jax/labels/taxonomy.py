"""The 14 CheXpert labels, their order and their four states. Imports nothing."""

CHEXPERT_14 = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
INDEX = {name: i for i, name in enumerate(CHEXPERT_14)}

POSITIVE, NEGATIVE, UNCERTAIN, NOT_MENTIONED = 1, 0, -1, -2

PATHOLOGY = tuple(
    name not in ("No Finding", "Support Devices") for name in CHEXPERT_14
)  # what No Finding excludes

# CheXpert's hierarchy (Irvin et al., AAAI 2019, figure 1): a child is also its parent.
PARENTS = {
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
    "Lung Opacity": ("Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"),
}
