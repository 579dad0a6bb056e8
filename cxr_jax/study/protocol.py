"""The protocol of a reader study: everything that is decided before the first sitting, in one versioned file."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.runtime.whole_files import write_text
from cxr_jax.store import sha256_of

ARMS = ("manual", "labels", "report", "full")
PlantKind = Literal["add", "drop", "side", "hedge"]
PLANT_KINDS: tuple[PlantKind, ...] = ("add", "drop", "side", "hedge")
# What each arm shows of the AI; the form to fill in is the same in all.
SHOWN = {
    "manual": (),
    "labels": ("labels",),
    "report": ("labels", "draft"),
    "full": ("labels", "sentences", "draft"),
}
LONGEST_WASHOUT = 3650  # days

# ---- Questions, with the words of every point ------------------------------------------------------

CONFIDENCE_SCALE = (
    "not at all",
    "slightly",
    "somewhat",
    "moderately",
    "fairly",
    "very",
    "completely",
)
CONFIDENCE_QUESTION = "How confident are you that this report is correct?"


class Item(BaseModel):
    """A question on a scale whose every point has words; no point means "not applicable"."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    question: str
    points: tuple[str, ...]
    arms: tuple[str, ...]


def _with_ai() -> tuple[str, ...]:
    return ("labels", "report", "full")


# After the signature and untimed: asked before, they would change how the film is read.
RATINGS = (
    Item(
        name="accurate",
        question="How well did what the AI said fit the film?",
        points=(
            "wrong in what matters",
            "wrong in part",
            "right with gaps",
            "right, small slips",
            "right throughout",
        ),
        arms=_with_ai(),
    ),
    Item(
        name="hedged",
        question="How sure of itself was the AI?",
        points=(
            "far too sure",
            "a little too sure",
            "as sure as the film allows",
            "a little too unsure",
            "far too unsure",
        ),
        arms=_with_ai(),
    ),
    Item(
        name="useful",
        question="How much did it help you with this film?",
        points=("it got in the way", "not at all", "a little", "much", "I relied on it"),
        arms=_with_ai(),
    ),
    Item(
        name="checkable",
        question="Did the reasoning let you check its conclusion?",
        points=(
            "it hid how it got there",
            "hardly a step could be checked",
            "some steps could be checked",
            "most steps could be checked",
            "every step could be checked",
        ),
        arms=("full",),
    ),
    Item(
        name="safe_draft",
        question="Would this be safe as a draft for somebody else to finish?",
        points=(
            "no, it would mislead",
            "only with close supervision",
            "with the usual checks",
            "with a glance",
            "as it is",
        ),
        arms=_with_ai(),
    ),
)
# NASA-TLX, raw, four of its six scales (Hart and Staveland 1988); 0..100, no start value.
TLX = ("mental demand", "time pressure", "effort", "frustration")
# System Usability Scale (Brooke 1996), 1 strongly disagree .. 5 strongly agree.
SUS = (
    "I think that I would like to use this system frequently.",
    "I found the system unnecessarily complex.",
    "I thought the system was easy to use.",
    "I think that I would need the support of a technical person to be able to use this system.",
    "I found the various functions in this system were well integrated.",
    "I thought there was too much inconsistency in this system.",
    "I would imagine that most people would learn to use this system very quickly.",
    "I found the system very cumbersome to use.",
    "I felt very confident using the system.",
    "I needed to learn a lot of things before I could get going with this system.",
)


# ---- The protocol ----------------------------------------------------------------------------------


class Protocol(BaseModel):
    """What a study is. It is sealed with the planted errors: after that no field can change unnoticed.

    Attributes:
        design: "crossed": every reader reads each case once in each arm, with washouts; "split": once in all.
        seed: of blocks, orders, plants and the bootstrap.
        washout_days: between the last signature of a session and the next session.
        plant_share: of the cases.
        over_reliance_margin: how much larger the share of planted cases with the error in the signed report may be in
            `full` than in `manual`, for H3.
        clock_speed: seconds that a reader reports for each second of the server; 1 but for simulated readers.
    """

    # What is no number passes every comparison, and would be found by a server in the middle of a sitting.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    format: Literal["cxr_study_protocol"] = "cxr_study_protocol"
    version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    design: Literal["crossed", "split"] = "crossed"
    arms: tuple[str, ...] = ("manual", "labels", "full")
    seed: int = Field(default=0, ge=0, lt=2**31)  # the only source of chance
    cases: str = "phantom:60"  # or the path of a manifest
    # Of phantom films, in pixels: for the eye; what the model is given of them has 224.
    film_side: int = Field(default=896, ge=224, le=2048, multiple_of=16)
    readers: int = Field(default=6, ge=1, le=500)  # places, taken by who comes first
    washout_days: float = Field(
        default=28, ge=0, le=LONGEST_WASHOUT
    )  # what regulators ask for: four weeks
    practice_per_block: int = Field(default=1, ge=0, le=5)  # films that count nowhere
    plant_share: float = Field(
        default=0.3, ge=0, le=0.8
    )  # readers are told that there are errors, not how many
    plant_kinds: tuple[PlantKind, ...] = PLANT_KINDS
    # Of phantom cases have each of the labels below: of 60 cases twelve, and an AUC asks for ten.
    label_share: float = Field(default=0.2, ge=0, le=0.5)
    suspicion_labels: tuple[str, ...] = (
        "Cardiomegaly",
        "Edema",
        "Consolidation",
        "Atelectasis",
        "Pleural Effusion",
    )
    over_reliance_margin: float = Field(default=0.10, ge=0, le=0.5)
    alpha: float = Field(default=0.05, gt=0, lt=0.5)  # of the three hypotheses together
    resamples: int = Field(default=4000, ge=100, le=100_000)  # of the crossed bootstrap
    idle_after_s: float = Field(default=30, gt=0)  # without input
    ratings: tuple[Item, ...] = RATINGS
    tlx: tuple[str, ...] = TLX
    sus: tuple[str, ...] = SUS
    simulated: bool = False  # said on every page and export
    clock_speed: float = Field(default=1.0, ge=1, le=100_000)

    @model_validator(mode="after")
    def _is_sound(self) -> "Protocol":
        """Refuse what no study can be run or analysed with."""
        if len(self.arms) < 2 or len(set(self.arms)) < len(self.arms) or set(self.arms) - set(ARMS):
            raise ValueError(f"arms: two or more of {', '.join(ARMS)}, each once")
        # AUC needs a number that was asked for, label by label.
        unknown = set(self.suspicion_labels) - set(CHEXPERT_14)
        if unknown or len(set(self.suspicion_labels)) < len(self.suspicion_labels):
            raise ValueError("suspicion_labels: names of the 14 labels, each once")
        # The clocks of real readers are those of the wall.
        if not self.simulated and self.clock_speed != 1:
            raise ValueError("clock_speed: other than 1 in a simulated study only")
        if not set(self.plant_kinds) and self.plant_share:
            raise ValueError("plant_kinds: none, with a share of cases to plant in")
        return self

    @property
    def sessions(self) -> int:
        """How many sittings a reader has."""
        # A split study shows no film twice, so there is nothing to wash out.
        return len(self.arms) if self.design == "crossed" else 1

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON."""
        return sha256_of(self.model_dump(mode="json"))


def make_protocol(**values: object) -> Protocol:
    """Make a protocol from values.

    Raises:
        UserError: naming the first field that is wrong, without the value.
    """
    try:
        return Protocol.model_validate(values)
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None


def read_protocol(protocol_path: Path) -> Protocol:
    """Read a protocol's file.

    Raises:
        UserError: if there is none, or it is none of this version.
    """
    try:
        return Protocol.model_validate_json(protocol_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{protocol_path}: no protocol can be read ({error.strerror})") from None
    except ValidationError as error:
        raise UserError(f"{protocol_path}: {_first_problem(error)}") from None


def write_protocol(protocol_path: Path, protocol: Protocol) -> None:
    """Write a protocol so that people can read it, whole or not at all."""
    write_text(protocol_path, protocol.model_dump_json(indent=2) + "\n")


def _first_problem(error: ValidationError) -> str:
    """One line of pydantic's many: the field, what is wrong with it, and not its value."""
    # The value is left out: a protocol may name a hospital.
    first_problem = error.errors(include_url=False, include_input=False)[0]
    field_place = ".".join(str(part) for part in first_problem["loc"]) or "protocol"
    return f"{field_place}: {first_problem['msg'].removeprefix('Value error, ')}"
