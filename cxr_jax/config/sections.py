"""The config of a run as typed, frozen sections: what a function below the doors may read stands in its signature.

`RunConfig.from_config` builds them once, from the `ConfigDict` that the command line has resolved. What each field
means and may be is said once, in keys.toml; a test holds fields and keys together.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import ml_collections

from cxr_jax.config import reward_names, schema, source_specs


class _Section:
    """A group of keys; `PREFIX` is where they stand in a config, "" at the top."""

    PREFIX = ""

    @classmethod
    def from_config(cls, resolved: ml_collections.ConfigDict) -> Self:
        """Read the section from a run's config; a key that the config lacks has the default of keys.toml."""
        # Keys at the top of a config have no section around them.
        section: Any = resolved.get(cls.PREFIX, {}) if cls.PREFIX else resolved
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        return cls.with_defaults(**{name: section[name] for name in names if name in section})

    @classmethod
    def with_defaults(cls, **values: Any) -> Self:
        """Build the section from some of its values; the others have the defaults of keys.toml."""
        # A test or a tool may give only what it is about.
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            name = f"{cls.PREFIX}.{field.name}" if cls.PREFIX else field.name
            # The first of the tasks' defaults: a run has the keys that it reads, and this is for
            # the rest.
            default = next(iter(schema.keys()[name].default.values()))
            values.setdefault(field.name, default)
        # Frozen by the dataclass; its values have to be, too.
        return cls(**{name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    """A value that nobody changes by accident: lists as tuples, sections as plain dicts of their own."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, ml_collections.ConfigDict):
        return value.to_dict()
    return value


@dataclass(frozen=True, kw_only=True)
class MeshConfig(_Section):
    """How many devices divide what: `config.mesh`."""

    PREFIX = "mesh"
    data: int
    fsdp: int
    tensor: int
    slices: int


@dataclass(frozen=True, kw_only=True)
class LoraConfig(_Section):
    """Adapters on a frozen model: `config.lora`."""

    PREFIX = "lora"
    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Where images and truth come from: `config.data`."""

    PREFIX = "data"
    source: str
    train: dict[str, dict[str, Any]]
    eval: dict[str, dict[str, Any]]
    ood: str
    hospital: str
    ood_hospital: str
    seed: int
    sites: int
    views: tuple[str, ...]
    reader_miss: float
    reader_confused: float
    follow_ups: float
    manifest: str
    image_root: str
    root: str
    labels: str
    split: str
    select_split: str
    uncertain: str
    blank: str
    parents: str
    no_finding: str
    scored: str
    images: str
    size: int
    min_pixels: int
    max_pixels: int
    image_tokens: int
    columns: tuple[str, ...]
    repeats: str
    max_bad: int
    image_gate: str
    guard: str
    allow_contaminated: bool
    cache_mib: int
    threads: int

    def __post_init__(self) -> None:
        """Read the sources by name. Raises UserError."""
        for key in ("train", "eval"):
            object.__setattr__(self, key, source_specs.parse(getattr(self, key), key))

    @property
    def kind(self) -> str:
        """What the images that train are: "phantom", or "files", the rows of manifests or the films of data sets."""
        # Everything but phantoms is read from disk, by one path of code.
        return "phantom" if self._trains == {"phantom"} else "files"

    @property
    def shown_kind(self) -> str:
        """What a page says that its numbers are of: "phantom" where no film is looked at, whatever trains."""
        return "phantom" if self.scored_sources == {"phantom"} else "files"

    @property
    def scored_sources(self) -> set[str]:
        """The kinds of sources that are scored at the end of a run."""
        # Sources that train together hold nobody out.
        looked_at = {spec["source"] for spec in self.eval.values()}
        return looked_at | (set() if self.train else {self.source})

    @property
    def _trains(self) -> set[str]:
        return {spec["source"] for spec in self.train.values()} or {self.source}

    @property
    def is_data_set(self) -> bool:
        """Whether the films are those of a data set in its own layout."""
        return not self.train and self.source not in ("phantom", "files")

    @property
    def scores_all(self) -> bool:
        """Whether an evaluation scores all films, and not those of held-out patients alone."""
        return self.scored == "all" or (self.scored == "auto" and self.is_data_set)

    @property
    def is_native(self) -> bool:
        """Whether films keep their own aspect ratio, and are not fitted into squares of `size`."""
        return self.kind == "files" and self.max_pixels > 0

    @property
    def pixel_limits(self) -> tuple[int, int]:
        """(min_pixels, max_pixels) of the images that a run reads: the same twice for squares of one size."""
        if self.is_native:
            return self.min_pixels, self.max_pixels
        return self.size**2, self.size**2


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Section):
    """AdamW with warm-up and cosine: `config.optim`."""

    PREFIX = "optim"
    lr: float
    lr_tower: float
    lr_merger: float
    lr_decoder: float
    warmup_steps: int
    warmup_ratio: float
    final_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    mu_dtype: str
    grad_dtype: str
    ema: float
    frozen: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(_Section):
    """When and how much is read to score a model: `config.eval`."""

    PREFIX = "eval"
    every: int
    n: int
    n_final: int
    batch_size: int
    select_by: str
    bootstrap: int
    cases: int
    unit: str
    probabilities: bool
    traces: int
    n_select: int
    calibration: str
    n_audit: int
    include_train: bool


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(_Section):
    """How completions are sampled, scored and compared: keys of `config.rl`.

    `reward_weights` holds the weights of the rewards in `rewards`, too.
    """

    PREFIX = "rl"
    prompts_per_step: int
    oversample: int
    group_size: int
    sample_micro_batches: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    min_length: int
    overlong_from: float
    reward_weights: Mapping[str, float]
    rewards: tuple[str, ...]
    own_rewards_alone: bool
    advantage: str
    scale_rewards: str
    mask_truncated: bool

    @classmethod
    def with_defaults(cls, **values: Any) -> Self:
        """Build the section as any other, and weigh the rewards of the user beside the terms.

        Raises:
            UserError: for names that are none of a reward.
        """
        section = super().with_defaults(**values)
        weights = reward_names.weights_with(
            section.rewards, dict(section.reward_weights), alone=section.own_rewards_alone
        )
        return dataclasses.replace(section, reward_weights=weights)


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig(_Section):
    """The objective: keys of `config.rl`. docs/rl.md has each formula."""

    PREFIX = "rl"
    aggregation: str
    denominator: str
    ratio_level: str
    clip: str
    epsilon: float
    epsilon_high: float
    delta: float
    beta: float
    kl: str
    sampler_correction: str
    sampler_cap: float


@dataclass(frozen=True, kw_only=True)
class LearnerConfig(_Section):
    """How a rollout is learned from: keys of `config.rl`."""

    PREFIX = "rl"
    prompts_per_step: int
    micro_batches: int
    minibatches: int
    num_iterations: int
    temperature: float
    replay_weight: float
    replay_batch: int
    patience: int

    @property
    def updates(self) -> int:
        """Optimizer steps of one step of the run."""
        return self.num_iterations * self.minibatches


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Section):
    """A whole run: the keys at the top of a config, and its sections."""

    task: str
    model: str
    seed: int
    steps: int
    epochs: float
    batch_size: int
    micro_batches: int
    locate_steps: int
    locate_weight: float
    max_completion: int
    train_turns: str
    remat: str
    attention: str
    dtype: str
    matmul_precision: str
    param_dtype: str
    log_every: int
    save_every: int
    trackers: tuple[str, ...]
    allow_upload: bool
    profile: str
    grace_seconds: float
    step_timeout: float
    max_skipped: int
    mesh: MeshConfig
    lora: LoraConfig
    data: DataConfig
    optim: OptimizerConfig
    eval: EvaluationConfig
    rollout: RolloutConfig
    loss: PolicyLossConfig
    learner: LearnerConfig

    @classmethod
    def from_config(cls, resolved: ml_collections.ConfigDict) -> Self:
        """Read a resolved config; sections and keys that its task has no use for have their defaults."""
        values: dict[str, Any] = {}
        # Sections know where they stand in the config, so three of them can share `rl`.
        for field in dataclasses.fields(cls):
            if isinstance(field.type, type) and issubclass(field.type, _Section):
                values[field.name] = field.type.from_config(resolved)
            # Then the keys at the top, and the defaults of those that this task lacks.
            elif field.name in resolved:
                values[field.name] = resolved[field.name]
            else:
                values[field.name] = next(iter(schema.keys()[field.name].default.values()))
        return cls(**values)


def in_todays_words(stored: dict[str, Any]) -> dict[str, Any]:
    """Write the resolved config of a run of any version as this version would: the same run in keys of today's meaning.

    Before films could keep their aspect ratio, `data.max_pixels` made their squares smaller.
    """
    data = stored.get("data")
    if not isinstance(data, dict) or not data.get("max_pixels") or "min_pixels" in data:
        return stored
    # The side that such runs took, of whole tokens.
    side = math.isqrt(int(data["max_pixels"])) // 28 * 28
    squares = {**data, "max_pixels": 0, "size": min(int(data["size"]), side)}
    return {**stored, "data": squares}
