"""The programs of a run, compiled from shapes alone, and what they need on each device."""

import contextlib

GIB = 2**30


class Shapes:
    """The config, model and abstract arguments of the steps that a config runs."""

    def __init__(self, config):
        import jax

        from cxr_jax.inference import prompts as inference_prompts
        from cxr_jax.models import qwen2_5_vl as qwen
        from cxr_jax.models.qwen2_5_vl import patches
        from cxr_jax.models.tokenizer import special_ids
        from cxr_jax.training import optimizer
        from cxr_jax.training.trainable import Trainable

        self.config, self.what = config, Trainable.from_config(config)
        self.config, tokenizer = _model(config)
        # The ids that a sampler must not draw do not change what it costs.
        self.special = {**special_ids(tokenizer), "suppress": self.config.media_token_ids}
        self.tokenizer, self.grid = (
            tokenizer,
            patches.grid_of(config.data.get("size", 224), self.config),
        )
        self.prompt_width = inference_prompts.Prompts(
            tokenizer, self.config, self.grid, config.max_completion
        ).width
        self.tx = optimizer.make(config.optim, config.steps)
        self.key = jax.random.key(0)
        self.params = jax.eval_shape(lambda: qwen.init_params(self.config, self.key))

    def state(self, extra: dict):
        """(train state, fixed) of {"model": ..., **extra}, abstract."""
        import jax

        from cxr_jax.training import optimizer

        def make(params):
            train, frozen = self.what.split(params, self.key)
            return optimizer.init_state(self.tx, train), frozen

        return jax.eval_shape(make, {"model": self.params, **extra})

    def batch(self, rows: int) -> dict:
        """Images and prompts."""
        size = self.config.data.get("size", 224)
        width, room = self.prompt_width, self.prompt_width + self.config.max_completion
        return {
            "image": _array((rows, size, size)),
            "prompts": {
                "ids": _array((rows, width), "int32"),
                "lengths": _array((rows,), "int32"),
                "positions": _array((3, rows, room), "int32"),
            },
        }


def _array(shape, dtype="float32"):
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def _model(config):
    """(Config, tokenizer) of config.model; the 3B shape and the embedded tokenizer if it is empty."""
    from cxr_jax.models import tokenizer as tokenizers
    from cxr_jax.weights import hf_folder, locate, pretrained

    name = config.model or "random:qwen2.5-vl-3b"
    if config.model:
        pretrained.check_model(config.model)
    if name.startswith("random:"):
        tokenizer = tokenizers.load(pretrained.PHANTOM)
        return pretrained.random_config(name, tokenizer), tokenizer
    folder = locate.find_folder(name)
    return hf_folder.read_config(folder), tokenizers.load(str(folder))


def programs(config):
    """[(name, jitted step, abstract arguments by what they hold, turns of each stage of its decode loop, tokens of a
    step, what else of the train state lies on the device meanwhile)]."""
    s = Shapes(config)
    return {"sft": _sft, "rl": _rl}[config.task](config, s)


def _sft(config, s):
    import jax

    from cxr_jax.sft import step as sft_step

    b, c = config.batch_size, config.max_completion
    head = jax.eval_shape(lambda: sft_step.init_locate_head(s.key, s.config.text.hidden_size, 12))
    state, frozen = s.state({"locate": head})
    batch = {**s.batch(b), "completions": _array((b, c), "int32"), "mask": _array((b, c), "bool")}
    if config.locate_weight:
        side = s.grid[1] // s.config.vision.spatial_merge_size
        batch |= {"regions": _array((b, 12, side, side)), "severity": _array((b, 12))}
    step = sft_step.make_steps(config, s.config, s.tx, s.grid, s.what)[1]
    return [
        (
            "SFT step",
            step,
            {"state": state, "fixed": frozen, "batch": batch},
            [1],
            b * (s.prompt_width + c),
            {},
        )
    ]


def _rl(config, s):
    import jax

    from cxr_jax import phantom
    from cxr_jax.inference import compaction
    from cxr_jax.labels import answers
    from cxr_jax.labels.phrase_bank import load_phrase_bank
    from cxr_jax.rl import learner, rollout

    r, c = config.rl, config.max_completion
    state, frozen = s.state({})
    table = answers.TokenBytes.from_tokenizer(s.tokenizer)
    bank = load_phrase_bank(None, phantom.LEXICON if config.data.source == "phantom" else None)
    drawn = r.prompts_per_step * r.oversample
    labels = {k: _array((drawn, 14), "bool") for k in ("solution", "known", "hedged")}
    labels["sides"] = _array((drawn, 14, 2), "bool")
    batch = {**s.batch(drawn), **labels}
    if r.replay_weight:
        texts = {
            "completions": _array((r.replay_batch, c), "int32"),
            "mask": _array((r.replay_batch, c), "bool"),
        }
        batch["replay"] = {**s.batch(r.replay_batch), **texts}
    roll = rollout.make_rollout(config, s.config, s.grid, s.special, table, s.what, bank)
    learn = learner.make_learn(config, s.config, s.grid, s.special, s.tx, s.what)
    sampled = {
        "parameters": state["params"],
        "fixed": frozen,
        "batch": batch,
        "step": _array((), "int32"),
    }
    ro = jax.eval_shape(roll, *sampled.values())
    waiting = {
        k: v for k, v in state.items() if k in ("opt_state", "master")
    }  # they lie there during the rollout
    learned = {"state": state, "fixed": frozen, "batch": batch, "rollout": ro}
    if r.beta:
        whole = lambda train, frozen: s.what.merge(train, frozen)["model"]
        learned["reference"] = s.what.base_params(frozen) or jax.eval_shape(
            whole, state["params"], frozen
        )
    ends = compaction.stage_ends(c)
    turns = [end - before for before, end in zip([0, *ends], ends, strict=False)]
    count = lambda prompts: prompts * (s.prompt_width + r.group_size * c)
    return [
        ("RL rollout", roll, sampled, turns, count(drawn), waiting),
        ("RL update", learn, learned, [1], count(r.prompts_per_step), {}),
    ]


def place(arguments: dict, mesh) -> dict:
    """The abstract arguments with the sharding of each array on a mesh; as they are without one."""
    import jax

    from cxr_jax.runtime import sharding

    if mesh is None:
        return arguments

    def placed(name, tree):
        rows = name in ("batch", "rollout", "step")
        where = sharding.batch_shardings(tree, mesh) if rows else sharding.shardings(tree, mesh)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
        )

    return {name: placed(name, tree) for name, tree in arguments.items()}


def parts(arguments: dict, mesh) -> dict[str, int]:
    """Bytes on a device of what trains, its optimizer state (with masters), what is fixed, and the batch."""
    import math

    import jax

    from cxr_jax.runtime.trees import path_string

    out = dict.fromkeys(("parameters", "optimizer", "fixed", "batch"), 0)
    for path, x in jax.tree_util.tree_leaves_with_path(arguments):
        shape = x.shape if mesh is None else x.sharding.shard_shape(x.shape)
        first, second = (path_string(path) + "/").split("/")[:2]
        kind = {
            "state": "parameters" if second == "params" else "optimizer",
            "parameters": "parameters",
            "fixed": "fixed",
            "reference": "fixed",
            "waiting": "optimizer",
        }.get(first, "batch")
        out[kind] += math.prod(shape) * x.dtype.itemsize
    return out


def needs_of(program, in_float32, mesh) -> dict:
    """Compiles one program: {"name", "bytes" on a device by what they hold, "flops", "tokens", "moved": bytes that a
    device receives by kind of collective}, the latter three of a step.

    in_float32: the same program, computed in float32.
    """
    import jax

    from cxr_jax.planning import costs

    name, step, arguments, trips, tokens, waiting = program
    held = {
        k: v for k, v in parts(place({**arguments, "waiting": waiting}, mesh), mesh).items() if v
    }
    count = costs.flops(step, *arguments.values(), while_trips=trips)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        compiled = in_float32[1].lower(*place(in_float32[2], mesh).values()).compile()
    memory = compiled.memory_analysis()
    held["temporary"] = (
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
    moved = (
        {}
        if mesh is None
        else costs.collectives(compiled.as_text(), mesh.size, sum(trips) / len(trips))
    )
    moved = {k: v for k, v in moved.items() if v}
    return {"name": name, "bytes": held, "flops": count, "tokens": tokens, "moved": moved}
