"""What SFT and RL open before they loop: the starting model, the splits, prompts and targets, what trains."""

from dataclasses import dataclass, field, replace

from cxr_jax.config.sections import DataConfig, RunConfig
from cxr_jax.data.prompts import most_films
from cxr_jax.data.sources.base import Source, indices_of
from cxr_jax.data.sources.patients import Sides
from cxr_jax.data.sources.several.run_sources import open_sources
from cxr_jax.data.sources.splits import HELD_OUT_PART, Splits, describe_kept, former_sides
from cxr_jax.inference.prompts import Prompts
from cxr_jax.models import registry
from cxr_jax.models.image_batches import open_images
from cxr_jax.models.network.config import Config
from cxr_jax.models.tokenizer import Tokenizer
from cxr_jax.runtime import processes
from cxr_jax.runtime.layout import Layout
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.trees import Tree
from cxr_jax.training import earlier_runs
from cxr_jax.training.checks import history_width, imitates, row_counts
from cxr_jax.training.conversations import Examples
from cxr_jax.training.targets import Completions
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import export, model_card, pretrained


def as_computed(model_config: Config, settings: RunConfig) -> Config:
    """Say in a model's config how a run computes it: attention, and the type in which gradients are summed."""
    is_wide = settings.optim.grad_dtype == "float32"
    return model_config.with_attention(settings.attention).with_wide_gradients(is_wide)


@dataclass(kw_only=True)
class Setup:
    """What the functions of a training run work with, beside its arrays.

    Attributes:
        prompts: encodes what is asked and scored, and knows how images travel.
        examples: encodes the conversations that SFT and replay imitate.
        started_from: what the export says about the starting model.
        start_params: of the starting model, on the host; None once `forget_start` has made room.
    """

    settings: RunConfig
    model_config: Config
    tokenizer: Tokenizer
    splits: Splits
    prompts: Prompts
    examples: Examples
    trainable: Trainable
    started_from: model_card.Origin = field(repr=False)
    start_params: Tree | None = field(repr=False)

    @classmethod
    def open(cls, settings: RunConfig, run_folder: RunFolder) -> "Setup":
        """Load the starting model and open the sources that the config names, split as the run has split them before.

        Raises:
            UserError: for a model or data that cannot be used.
        """
        start = pretrained.load_starting_model(settings.model, settings.seed)
        model_config = as_computed(start.config, settings)
        # What the run has decided before holds: who is held out does not change.
        sides = _sides_of(settings.data, run_folder)
        splits = open_sources(settings.data, sides, registry.processor_of(start.config))
        splits = replace(splits, contaminated=earlier_runs.contamination(settings, splits))
        # Of all sets the prompt with most films decides the shapes.
        images = open_images(
            settings.data, model_config, splits.train.size, most_films(splits.prompts())
        )
        prompts = Prompts.for_images(
            start.tokenizer, model_config, images, settings.max_completion, texts=splits.prompts()
        )
        setup = cls(
            settings=settings,
            model_config=model_config,
            tokenizer=start.tokenizer,
            splits=splits,
            prompts=prompts,
            examples=_open_examples(settings, splits.train, prompts),
            trainable=Trainable.create(
                settings.lora, settings.optim.frozen, settings.dtype, settings.param_dtype
            ),
            # Now, and not at the export: a folder may have changed by then, or be gone.
            started_from=pretrained.origin(settings.model),
            start_params=start.params,
        )
        if settings.data.kind == "files" and processes.from_main(run_folder.has_changes):
            processes.together(lambda: _read_first_films(setup, run_folder.steps_saved()))
        # Only now: what could be refused is, and the folder is as it was until here.
        run_folder.remember(**splits.sides.facts())
        if settings.data.is_data_set or settings.data.eval:
            run_folder.remember(protocol=splits.label_policy)
        if splits.contaminated:
            run_folder.remember(contaminated=splits.contaminated)
        run_folder.commit_changes()
        is_other = run_folder.about.get("changes") or splits.sides.patients_by
        if is_other and sides.held_out_up_to and processes.is_main():
            # The checks have drawn the split anew, as of a run that begins.
            print("\n".join(describe_kept(splits, sides)), flush=True)
        return setup

    def forget_start(self) -> None:
        """Let go of the host's copy of the starting model; `start_model` reads it again when it is compared."""
        self.start_params = None

    def start_model(self, frozen: Tree, layout: Layout) -> Tree:
        """Give the model that the run started from: the base under the adapters, or what `config.model` names."""
        with layout.on_host():
            base = self.trainable.base_params(frozen)
            if base is None:
                start = pretrained.load_starting_model(self.settings.model, self.settings.seed)
                base = pretrained.to_device(start.params, self.settings.dtype)
        return layout.state(base)

    def export(self, run_folder: RunFolder, train: Tree, frozen: Tree) -> None:
        """Write `hf/` and, with LoRA, `adapter/` from what trained and what stayed."""
        settings = self.settings
        export.export(
            run_folder,
            self.model_config,
            self.trainable.export_params(train, frozen),
            self.tokenizer,
            export.ExportFacts(
                task=settings.task,
                started_from=self.started_from,
                data_source=" + ".join(settings.data.train) or settings.data.source,
                pixel_limits=settings.data.pixel_limits,
                dtype=settings.dtype,
                contaminated=self.splits.contaminated,
            ),
            self.trainable.export_adapters(train),
        )


def _open_examples(settings: RunConfig, train: Source, prompts: Prompts) -> Examples:
    """The encoder of conversations. Where their last answers train, its prompts hold what was said before."""
    # Where each answer trains, a prompt is a row's first question, which is asked and scored, too.
    completions = Completions(prompts.tokenizer, settings.max_completion)
    if settings.train_turns == "last" and imitates(settings):
        width = history_width(train, prompts.tokenizer, prompts.images)
        prompts = Prompts.for_images(
            prompts.tokenizer, prompts.config, prompts.images, settings.max_completion, width
        )
    return Examples(prompts, completions, settings.train_turns)


def _sides_of(data: DataConfig, run_folder: RunFolder) -> Sides:
    """Who is on which side of the run's split, as its folder says, or else as the run must have drawn it."""
    sides = Sides.of_run(run_folder.data)
    # Of several sources none is split.
    is_split = data.source == "files" and not data.train
    if is_split and not sides.held_out_up_to and run_folder.steps_saved():
        return former_sides(data)
    return sides


def _read_first_films(setup: Setup, step: int) -> None:
    """Read what a run that goes on with others reads first: where films cannot be read, that is to be seen now."""
    settings, splits = setup.settings, setup.splits
    row_count = max((rows for rows, _ in row_counts(settings)), default=0)
    train = splits.train
    train.batch(indices_of(step, row_count, len(train), settings.data.seed))
    for source in (*splits.select.values(), *splits.test.values()):
        if part := source.readable(range(min(HELD_OUT_PART, settings.eval.n, len(source)))):
            source.batch(part)
