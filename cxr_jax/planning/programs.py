"""The programs of a run, compiled from shapes alone, and what they need on each device."""

import contextlib
import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from cxr_jax.data.prompts import FIND_PROMPT, ask_of_roles, count_films
from cxr_jax.runtime.trees import Tree

if TYPE_CHECKING:
    import jax

    from cxr_jax.config.sections import DataConfig, RunConfig
    from cxr_jax.models.network.config import Config
    from cxr_jax.models.tokenizer import Tokenizer
    from cxr_jax.runtime.layout import Heads

GIB = 2**30
# What the parts of a program's arguments hold; of the state, what is not parameters is the optimizer's.
_HOLDS = {
    "parameters": "parameters",
    "fixed": "fixed",
    "reference": "fixed",
    "waiting": "optimizer",
}


class Program(NamedTuple):
    """One jitted function of a step, with abstract arguments.

    Attributes:
        name: for people.
        step: the jitted function.
        arguments: its arguments by what they hold, in their order.
        turns: of each stage of its decode loop; (1,) without one.
        tokens: that one call reads and writes, over all devices.
        waiting: what else of the train state lies on the device meanwhile.
    """

    name: str
    step: Any
    arguments: Tree
    turns: list[int]
    tokens: int
    waiting: Tree

    @property
    def mean_turns(self) -> float:
        """The turns of one loop: HLO does not say which stage a loop is, and the sum comes out right."""
        return sum(self.turns) / len(self.turns)


class Needs(NamedTuple):
    """What one call of a program needs; its fields are the keys of `plan --json`.

    Attributes:
        name: of the program.
        bytes: on one device, by what they hold.
        flops: multiplications and additions, over all devices.
        tokens: over all devices.
        moved: bytes that a device receives, by kind of collective.
        calls: how often each kind of collective begins.
        waste: what padding takes, in words; "" where it is not known.
        refused: why the compiler of the device refused the program; "" if it did not.
    """

    name: str
    bytes: dict[str, int]
    flops: int
    tokens: int
    moved: dict[str, int]
    calls: dict[str, int]
    waste: str = ""
    refused: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes on one device in all."""
        return sum(self.bytes.values())


def _question(data: "DataConfig") -> str:
    """The question of a run about as many films as its settings name; what rows hold beyond it no setting tells."""
    from cxr_jax.data.studies import gather

    roles = data.views if data.source == "phantom" else gather.parse_images(data.images)
    return FIND_PROMPT if len(roles) < 2 else ask_of_roles(roles, FIND_PROMPT)


class Shapes:
    """The model, tokenizer and abstract arguments of the steps that a run's settings ask for.

    Attributes:
        settings: of the run.
        model_config: of the model.
        special: token ids that a sampler must know.
        images: how images travel.
        prompt_width: tokens of the longest prompt.
        opened_width: tokens of what the chat template opens the model's turn with.
        params: of the model, abstract.
    """

    def __init__(self, settings: "RunConfig") -> None:
        """Read the model's config and tokenizer, and nothing else."""
        # Imported here: the command sets up its devices before JAX looks for them.
        import jax

        from cxr_jax.inference import prompts
        from cxr_jax.models import image_batches, network
        from cxr_jax.models.tokenizer import special_ids
        from cxr_jax.training import optimizer
        from cxr_jax.training.setup import as_computed
        from cxr_jax.training.trainable import Trainable

        self.settings = settings
        self.trainable = Trainable.create(
            settings.lora, settings.optim.frozen, settings.dtype, settings.param_dtype
        )
        model_config, self.tokenizer = read_model(settings.model)
        self.model_config = as_computed(model_config, settings)
        # Which ids a sampler must not draw does not change what it costs.
        self.special = {
            **special_ids(self.tokenizer),
            "suppress": self.model_config.media_token_ids,
        }
        question = _question(settings.data)
        self.images = image_batches.open_images(
            settings.data, self.model_config, settings.data.size, count_films(question)
        )
        # As the run renders them: the prompt decides how wide every array of tokens is.
        rendered = prompts.Prompts.for_images(
            self.tokenizer,
            self.model_config,
            self.images,
            settings.max_completion,
            texts=[question],
        )
        self.prompt_width, self.opened_width = rendered.width, rendered.opened_width
        self.optimizer = optimizer.make_optimizer(settings.optim, settings.steps)
        # Which key it is does not change what is compiled.
        self.key = jax.random.key(0)
        self.params = jax.eval_shape(partial(network.init_params, self.model_config, self.key))

    def state(self, extra_params: Tree) -> tuple[Tree, Tree]:
        """Return (train state, frozen parameters) of {"model": .., **extra}, abstract."""
        import jax

        from cxr_jax.training import optimizer

        # Split first, since what is frozen has no optimizer state.
        def make(params: Tree) -> tuple[Tree, Tree]:
            trained, frozen = self.trainable.split(params, self.key)
            return optimizer.init_state(self.optimizer, trained), frozen

        return jax.eval_shape(make, {"model": self.params, **extra_params})

    def batch(self, row_count: int) -> Tree:
        """Return images and prompts of so many rows, abstract."""
        # Prompt and completion lie in one row, so positions are made for both.
        sequence_length = self.prompt_width + self.settings.max_completion
        axes = self.model_config.text.position_axes
        prompts = {
            "ids": abstract_array((row_count, self.prompt_width), "int32"),
            "lengths": abstract_array((row_count,), "int32"),
            "positions": abstract_array((axes, row_count, sequence_length), "int32"),
        }
        if self.opened_width:
            prompts["opened"] = abstract_array((row_count, self.opened_width), "int32")
        return {**self.images.shapes(row_count), "prompts": prompts}

    def texts(self, row_count: int) -> Tree:
        """Return completions of so many rows, their lengths and the mask of what trains, abstract."""
        token_shape = (row_count, self.settings.max_completion)
        return {
            "completions": abstract_array(token_shape, "int32"),
            "lengths": abstract_array((row_count,), "int32"),
            "mask": abstract_array(token_shape, "bool"),
        }


def abstract_array(shape: tuple[int, ...], dtype: Any = "float32") -> "jax.ShapeDtypeStruct":
    """Make an array that has a shape and a type only."""
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def read_model(model: str) -> "tuple[Config, Tokenizer]":
    """Return config and tokenizer of `config.model`; the 3B shape and the embedded tokenizer if it is empty."""
    from cxr_jax.models import tokenizer as tokenizers
    from cxr_jax.weights import hf_folder, locate, pretrained

    # The published recipe names no model, since it has to be a folder; it is made for the 3B.
    model_name = model or "random:qwen2.5-vl-3b"
    if model:
        pretrained.check_model(model)
    if model_name.startswith("random:"):
        # Sizes need no weights, but prompts need a tokenizer: the embedded one stands in.
        tokenizer = tokenizers.load(pretrained.PHANTOM)
        return pretrained.random_config(model_name, tokenizer), tokenizer
    model_folder = locate.find_folder(model_name)
    # Config and tokenizer only: weights may not even be on this machine.
    return hf_folder.read_config(model_folder), tokenizers.load(str(model_folder))


def heads_of_model(settings: "RunConfig") -> "Heads":
    """Read how many heads `config.model` has, which `config.mesh.tensor` divides."""
    from cxr_jax.runtime.layout import Heads

    # Weights are not read: config.json says it.
    text = read_model(settings.model)[0].text
    return Heads(text.num_attention_heads, text.num_key_value_heads)


def with_turns(settings: "RunConfig", shards: int, device_memory: int | None) -> "RunConfig":
    """Choose the turns of a rollout as the run itself would (`rollout.with_turns`), by the type that it computes in."""
    from cxr_jax.rl import rollout
    from cxr_jax.training.checks import group_shares

    if settings.task != "rl":
        return settings
    shapes = Shapes(settings)
    sampled = rollout.with_turns(
        settings.rollout,
        shapes.model_config,
        prompt_width=shapes.prompt_width,
        max_completion=settings.max_completion,
        dtype=settings.dtype,
        shards=shards,
        shares=group_shares(settings, shards),
        device_memory=device_memory,
    )
    return dataclasses.replace(settings, rollout=sampled)


# ---- The programs of each task ---------------------------------------------------------------------


def programs(settings: "RunConfig", shards: int = 1) -> list[Program]:
    """Return the programs of one step on so many devices (data x fsdp), in the order in which they run."""
    from cxr_jax.training.checks import group_shares

    shapes = Shapes(settings)
    if settings.task == "sft":
        return [_sft_step(settings, shapes)]
    return _rl_programs(settings, shapes, group_shares(settings, shards))


def _sft_step(settings: "RunConfig", shapes: Shapes) -> Program:
    import jax

    from cxr_jax.sft import step as sft_step

    row_count = settings.batch_size
    # The head that SFT locates findings with trains, too.
    hidden_size = shapes.model_config.text.hidden_size
    locate_head = jax.eval_shape(
        partial(sft_step.init_locate_head, shapes.key, hidden_size, sft_step.LOCATED_FINDINGS)
    )
    # The head that finds findings in region maps trains beside the model (`locate_weight`).
    state, frozen = shapes.state({"locate": locate_head})
    batch = {**shapes.batch(row_count), **shapes.texts(row_count)}
    if settings.locate_weight:
        # Region maps have a cell for each image token, a merged square of patches.
        grid_side = math.isqrt(shapes.images.tokens_at_most(1))
        batch["regions"] = abstract_array(
            (row_count, sft_step.LOCATED_FINDINGS, grid_side, grid_side)
        )
        batch["severity"] = abstract_array((row_count, sft_step.LOCATED_FINDINGS))
    # The joint step; the warm-up before it is the first of the two.
    step = sft_step.make_steps(
        shapes.model_config,
        shapes.optimizer,
        shapes.images,
        shapes.trainable,
        micro_batches=settings.micro_batches,
        locate_weight=settings.locate_weight,
        remat=settings.remat,
    )[1]
    arguments = {"state": state, "fixed": frozen, "batch": batch}
    token_count = row_count * (shapes.prompt_width + settings.max_completion)
    return Program("SFT step", step, arguments, [1], token_count, {})


def _rl_programs(settings: "RunConfig", shapes: Shapes, shares: int) -> list[Program]:
    drawn_prompts = settings.rollout.prompts_per_step * settings.rollout.oversample
    state, frozen = shapes.state({})
    batch = _rl_batch(settings, shapes, drawn_prompts * shares)
    rollout = _rollout(settings, shapes, state, frozen, batch)
    return [rollout, _update(settings, shapes, state, rollout)]


def _rollout(
    settings: "RunConfig", shapes: Shapes, state: Tree, frozen: Tree, batch: Tree
) -> Program:
    """Return what samples and scores completions of all prompts that are drawn."""
    from cxr_jax import phantom
    from cxr_jax.inference import compaction
    from cxr_jax.labels import answers
    from cxr_jax.labels.phrase_bank import load_phrase_bank
    from cxr_jax.rewards import own
    from cxr_jax.rl import rollout

    lexicon = phantom.LEXICON if settings.data.source == "phantom" else None
    step = rollout.make_rollout(
        settings.rollout,
        shapes.model_config,
        shapes.images,
        shapes.special,
        answers.TokenBytes.from_tokenizer(shapes.tokenizer),
        shapes.trainable,
        load_phrase_bank(None, lexicon),
        seed=settings.seed,
        max_completion=settings.max_completion,
        own=own.load(settings.rollout.rewards),
    )
    arguments = {
        "parameters": state["params"],
        "fixed": frozen,
        "batch": batch,
        "step": abstract_array((), "int32"),
    }
    # Each stage of the decode loop runs until the next one, with fewer rows, begins.
    stage_ends = compaction.stage_ends(settings.max_completion)
    turns = [end - start for start, end in zip([0, *stage_ends], stage_ends, strict=False)]
    drawn = settings.rollout.prompts_per_step * settings.rollout.oversample
    # The optimizer's arrays stay on the device meanwhile.
    waiting = {name: tree for name, tree in state.items() if name in ("opt_state", "master")}
    return Program(
        "RL rollout", step, arguments, turns, _rl_tokens(settings, shapes, drawn), waiting
    )


def _update(settings: "RunConfig", shapes: Shapes, state: Tree, rollout: Program) -> Program:
    """Return what learns from the groups of a rollout that are kept."""
    import jax

    from cxr_jax.rl import learner, own_rewards

    step = learner.make_learn(
        settings.learner,
        settings.loss,
        shapes.model_config,
        shapes.images,
        shapes.special,
        shapes.optimizer,
        shapes.trainable,
        max_completion=settings.max_completion,
        remat=settings.remat,
    )
    frozen = rollout.arguments["fixed"]
    arguments = {
        "state": state,
        "fixed": frozen,
        "batch": rollout.arguments["batch"],
        "rollout": own_rewards.complete_shapes(
            settings, jax.eval_shape(rollout.step, *rollout.arguments.values())
        ),
    }
    # A KL term holds the run to where it started, which takes memory of its own unless adapters train.
    if settings.loss.beta:
        arguments["reference"] = _reference_params(shapes, state["params"], frozen)
    kept = settings.learner.prompts_per_step
    return Program("RL update", step, arguments, [1], _rl_tokens(settings, shapes, kept), {})


def _rl_tokens(settings: "RunConfig", shapes: Shapes, prompt_count: int) -> int:
    # The prompt is computed once for all completions of its group.
    completion_tokens = settings.rollout.group_size * settings.max_completion
    return prompt_count * (shapes.prompt_width + completion_tokens)


def _rl_batch(settings: "RunConfig", shapes: Shapes, row_count: int) -> Tree:
    """Return prompts with their truth, and the SFT rows that are replayed beside them."""
    from cxr_jax.rl import own_rewards, reward_columns

    columns = reward_columns.RewardColumns(settings.data.columns, settings.data.manifest)
    truth = own_rewards.abstract_batch(row_count, columns)
    batch = {**shapes.batch(row_count), **truth}
    if settings.learner.replay_weight:
        replayed = settings.learner.replay_batch
        batch["replay"] = {**shapes.batch(replayed), **shapes.texts(replayed)}
    return batch


def _reference_params(shapes: Shapes, params: Tree, frozen: Tree) -> Tree:
    """Return what the KL term is held against: the frozen base of adapters, else a copy of all parameters."""
    import jax

    def merged(trained: Tree, frozen: Tree) -> Tree:
        return shapes.trainable.merge(trained, frozen)["model"]

    # Adapters have their base on the device anyway; else a copy is made, as large as the model.
    return shapes.trainable.base_params(frozen) or jax.eval_shape(merged, params, frozen)


# ---- What a program needs --------------------------------------------------------------------------


def place(arguments: Tree, mesh: "jax.sharding.Mesh | None") -> Tree:
    """Return the abstract arguments with the sharding of each array on a mesh; as they are without one."""
    import jax

    from cxr_jax.runtime import sharding

    if mesh is None:
        return arguments

    def placed(argument_name: str, argument_tree: Tree) -> Tree:
        # Rows lie over the devices; the rest lies as the rules of the model say.
        if argument_name in ("batch", "rollout", "step"):
            shardings = sharding.batch_shardings(argument_tree, mesh)
        else:
            shardings = sharding.shardings(argument_tree, mesh)
        return jax.tree.map(_with_sharding, argument_tree, shardings)

    return {
        argument_name: placed(argument_name, argument_tree)
        for argument_name, argument_tree in arguments.items()
    }


def _with_sharding(
    array: "jax.ShapeDtypeStruct", sharding: "jax.sharding.Sharding"
) -> "jax.ShapeDtypeStruct":
    """Abstract still: only the sharding is added to shape and type."""
    import jax

    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def parts(arguments: Tree, mesh: "jax.sharding.Mesh | None") -> dict[str, int]:
    """Count bytes on a device of what trains, its optimizer state (with masters), what is fixed, and the batch.

    Args:
        arguments: as `place` returns them for `mesh`.
        mesh: of the devices; None for one.
    """
    import jax

    from cxr_jax.runtime.trees import path_string

    bytes_by_kind = dict.fromkeys(("parameters", "optimizer", "fixed", "batch"), 0)
    for tree_path, array in jax.tree_util.tree_leaves_with_path(arguments):
        # What one device holds of an array; along axes that do not divide it, all of it.
        device_shape = array.shape
        if mesh is not None:
            device_shape = array.sharding.shard_shape(array.shape)
        # The first part of a path is the argument, the second the part of the train state.
        argument, argument_part = (path_string(tree_path) + "/").split("/")[:2]
        # The optimizer's arrays lie in the state beside the parameters that they are of.
        if argument == "state":
            memory_kind = "parameters" if argument_part == "params" else "optimizer"
        else:
            memory_kind = _HOLDS.get(argument, "batch")
        bytes_by_kind[memory_kind] += math.prod(device_shape) * array.dtype.itemsize
    return bytes_by_kind


def needs_of(
    program: Program,
    in_float32: Program,
    mesh: "jax.sharding.Mesh | None" = None,
    compiler_options: dict[str, Any] | None = None,
) -> Needs:
    """Compile one program and count what a call of it needs.

    Args:
        program: as the run computes it.
        in_float32: the same program, computed in float32; temporary memory and traffic are its.
        mesh: of the devices; None for one.
        compiler_options: of XLA, for this program alone.
    """
    import jax

    from cxr_jax.planning import costs

    # What the arguments hold is exact, in the types of the run.
    bytes_held = parts(place({**program.arguments, "waiting": program.waiting}, mesh), mesh)
    bytes_by_kind = {kind: byte_count for kind, byte_count in bytes_held.items() if byte_count}
    flops = costs.flops(program.step, *program.arguments.values(), while_trips=program.turns)
    # The rest is the compiler's word on the float32 program.
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        arguments = place(in_float32.arguments, mesh)
        compiled = in_float32.step.lower(*arguments.values()).compile(compiler_options)
    # Of the results, what takes over an argument's memory (donated state) is no extra.
    memory = compiled.memory_analysis()
    bytes_by_kind["temporary"] = (
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
    traffic = costs.Traffic({}, {})
    if mesh is not None:
        traffic = costs.collectives(compiled.as_text(), mesh.size, program.mean_turns)
    return Needs(program.name, bytes_by_kind, flops, program.tokens, *traffic.used())
