"""The 14 CheXpert labels: their order, their four states, their hierarchy, and how texts name them. Imports nothing."""

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
INDEX = {name: index for index, name in enumerate(CHEXPERT_14)}
_BY_LOWER_CASE = {name.lower(): name for name in CHEXPERT_14}

# The four states of a label in a report, and what they are in CheXpert's tables (not mentioned: blank).
POSITIVE, NEGATIVE, UNCERTAIN, NOT_MENTIONED = 1, 0, -1, -2

# Of a false positive: what it costs to name a label that a table leaves blank, in scores and rewards. Tables leave
# blank what nobody mentioned and seldom say what is absent; at no price the answer that names all 14 labels beats
# honest ones (docs/rewards.md). Half, as a hedge is half a claim: to see what a table leaves out is better than to be
# wrong.
BLANK_PRICE = 0.5

# What No Finding excludes.
PATHOLOGY = tuple(name not in ("No Finding", "Support Devices") for name in CHEXPERT_14)

# CheXpert's hierarchy (Irvin et al., AAAI 2019, figure 1): a child is also its parent.
PARENTS = {
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
    "Lung Opacity": ("Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"),
}


def find_label(text: str) -> str | None:
    """Find the label that a text names, as the reference reward compares them: stripped, in lower case.

    Returns:
        The name of the 14 as CheXpert spells it, or None if the text is none of them.
    """
    return _BY_LOWER_CASE.get(text.strip().lower())


def side_name(right: bool, left: bool, *, both: str = "both") -> str:
    """Name the sides of the patient on which something is: "right", "left", `both`, or "" for neither."""
    if right and left:
        return both
    if right:
        return "right"
    return "left" if left else ""
