"""Our side of grpo_step.py: a worker that takes the shipped step of `cxr_jax.rl`; the step's FLOPs by arithmetic."""

import json
import pathlib
import statistics
import time

import _common as common
import numpy as np

TEXT, ALONE = 66, 100  # tokens of a prompt: beside the image's; without an image


def flops(model_config, prompt: int, completion: int, patches: int) -> dict:
    """FLOPs of the forward pass's matrix products: 2 for a multiply and add.

    "patches", "vision" of an image: see `sft_step.flops`. "prompt" of one: layers 2 T (D (2 H + 2 K) d + 3 D F) +
    4 H d T (T + 1) / 2 each (a token sees those before it only). "completion" of one: the same for its C tokens, which
    see the T of the prompt, too: 4 H d C T more. "head" of one completion: 2 C D V.
    """
    v, t = model_config.vision, model_config.text
    P, D, F, merged = patches, v.hidden_size, v.intermediate_size, v.hidden_size * v.merge_unit
    window = min(P, (v.window_size // v.patch_size) ** 2)
    seen = sum(P if i in v.fullatt_block_indexes else window for i in range(v.depth))
    tower = (
        v.depth * 2 * P * (4 * D**2 + 3 * D * F)
        + 4 * P * D * seen
        + 2 * P // v.merge_unit * (merged**2 + merged * v.out_hidden_size)
    )
    D, heads, kv = (
        t.hidden_size,
        t.num_attention_heads * t.head_dim,
        t.num_key_value_heads * t.head_dim,
    )
    n, token = t.num_hidden_layers, 2 * D * (2 * heads + 2 * kv + 3 * t.intermediate_size)
    seen = lambda new, before=0: 4 * heads * (new * before + new * (new + 1) // 2)
    return {
        "patches": 2 * P * v.patch_dim * v.hidden_size,
        "vision": tower,
        "prompt": n * (prompt * token + seen(prompt)),
        "completion": n * (completion * token + seen(completion, prompt)),
        "head": 2 * completion * D * t.vocab_size,
    }


def step_flops(one: dict, prompts: int, group: int, shared: bool) -> dict:
    """FLOPs of a step: a forward pass to sample, and one that costs three to learn (pixels need no gradient)."""
    of_prompt = prompts if shared else prompts * group
    turns = {
        "patches": (1, 2),
        "vision": (1, 3),
        "prompt": (1, 3),
        "completion": (1, 3),
        "head": (1, 3),
    }
    rows = {k: of_prompt if k in ("patches", "vision", "prompt") else prompts * group for k in one}
    return {
        "rollout": sum(one[k] * rows[k] * turns[k][0] for k in one),
        "learn": sum(one[k] * rows[k] * turns[k][1] for k in one),
    }


def save_inputs(folder: str, prompts: dict, images, patches, setting: dict) -> None:
    """Write what a peer is asked: prompts [B, T] with their lengths, an image each (levels) or none, our patches."""
    arrays = {f"image{row}": image for row, image in enumerate(images)}
    arrays |= {f"patches{row}": of_image for row, of_image in enumerate(patches)}
    np.savez(f"{folder}/inputs.npz", ids=prompts["ids"], lengths=prompts["lengths"], **arrays)
    pathlib.Path(folder, "setting.json").write_text(json.dumps(setting), encoding="utf-8")


class Ours:
    """Our worker: `cxr_jax.rl.loop`'s rollout and learner on random images (or none) and solutions."""

    def __init__(self, args):
        import jax
        import jax.numpy as jnp

        from cxr_jax.config.sections import RunConfig
        from cxr_jax.labels import answers
        from cxr_jax.labels.phrase_bank import load_phrase_bank
        from cxr_jax.metrics import progress
        from cxr_jax.models import network
        from cxr_jax.models import tokenizer as tokenizers
        from cxr_jax.models.image_batches import SquareImages
        from cxr_jax.rl.learner import make_learn
        from cxr_jax.rl.rollout import make_rollout, rollout_metrics
        from cxr_jax.training.optimizer import init_state, make_optimizer
        from cxr_jax.training.trainable import Trainable
        from cxr_jax.weights import pretrained
        from experiments import rl as experiment

        self.compilations = progress.Compilations()
        self.args, self.model_config = args, common.config(args.shape)
        tokenizer = tokenizers.load(pretrained.PHANTOM)
        config = experiment.get_config()
        config.update(
            dict(
                max_completion=args.completion,
                remat=args.remat,
                dtype=args.dtype,
                param_dtype=args.dtype,
            )
        )
        config.lora.rank = args.lora_rank
        config.rl.update(
            dict(
                prompts_per_step=args.prompts,
                oversample=1,
                group_size=args.group,
                temperature=1.0,
                micro_batches=args.micro_batches,
                sample_micro_batches=args.micro_batches,
                mask_truncated=False,
            )
        )
        config.optim.update(dict(lr=1e-6, warmup_steps=1, final_fraction=1.0))
        self.settings, self.tokenizer = RunConfig.from_config(config), tokenizer
        self.batch = self.inputs(tokenizer)
        # No stop token: exactly `completion` tokens on all sides. None that has a meaning, either.
        ids = tokenizers.special_ids(tokenizer, self.model_config.text.vocab_size)
        self.suppress = sorted({*ids["suppress"], *ids["stop"], *self.model_config.media_token_ids})
        special = {**ids, "stop": (-1,), "suppress": tuple(self.suppress)}
        if not args.side:  # the shipped step all the same, of no image
            grid, D = (1, 2, 2), self.model_config.text.hidden_size
            network.vision = lambda params, model_config, pixels, grid, **kw: network.Seen(
                jnp.zeros((len(pixels), 1, D), kw["dtype"])
            )
        else:
            grid = self.grid
        images = SquareImages(model_config=self.model_config, grid=grid)
        params = {"model": common.random_params(self.model_config, jnp.dtype(args.dtype))}
        self.count = network.count(params["model"])
        settings = self.settings
        self.trainable = Trainable.create(
            settings.lora, settings.optim.frozen, settings.dtype, settings.param_dtype
        )
        train, self.frozen = self.trainable.split(params, jax.random.key(0))
        self.params = params["model"]
        self.optimizer = make_optimizer(settings.optim, 1000)
        self.state = init_state(self.optimizer, train)
        self.table, self.bank = answers.TokenBytes.from_tokenizer(tokenizer), load_phrase_bank()
        self.rollout = make_rollout(
            settings.rollout,
            self.model_config,
            images,
            special,
            self.table,
            self.trainable,
            self.bank,
            seed=settings.seed,
            max_completion=settings.max_completion,
        )
        self.learn = make_learn(
            settings.learner,
            settings.loss,
            self.model_config,
            images,
            special,
            self.optimizer,
            self.trainable,
            max_completion=settings.max_completion,
            remat=settings.remat,
        )
        self.metrics_of, self.special, self.grid = rollout_metrics, special, grid
        self.done = 0

    def inputs(self, tokenizer) -> dict:
        """The batch of `rl.make_batch_fn`, all prompts of one text, each with an image of its own."""
        from cxr_jax.data import prompts as data_prompts
        from cxr_jax.inference import prompts as inference_prompts
        from cxr_jax.models import network

        n, side, rng = self.args.prompts, self.args.side, np.random.default_rng(0)
        self.grid = (
            (
                1,
                side // self.model_config.vision.patch_size,
                side // self.model_config.vision.patch_size,
            )
            if side
            else None
        )
        slots = int(np.prod(self.grid)) // self.model_config.vision.merge_unit if side else 0
        self.prompt = slots + (TEXT if side else ALONE)
        self.text = data_prompts.FIND_PROMPT
        while (
            len(ids := inference_prompts.prompt_ids(tokenizer, self.text, [slots][: bool(side)]))
            < self.prompt
        ):
            self.text += " and"
        ids = np.repeat(np.asarray(ids, np.int32)[None], n, 0)
        assert ids.shape[1] == self.prompt
        both = np.pad(ids, ((0, 0), (0, self.args.completion)))
        self.levels = rng.integers(0, 256, (n, side or 28, side or 28), np.uint8)
        yes = lambda p, *shape: rng.random((n, 14, *shape)) < p
        return {
            "image": self.levels.astype(np.float32) / 255,
            "solution": yes(0.3),
            "known": yes(1.0),
            "hedged": yes(0.0),
            "sides": yes(0.5, 2),
            "prompts": {
                "ids": ids,
                "lengths": np.full(n, self.prompt, np.int32),
                "positions": network.positions(self.model_config, both, self.grid),
            },
        }

    def facts(self) -> dict:
        return {**common.facts(), "parameters": f"{self.count:,}"}

    def save(self, folder: str) -> dict:
        """The model and the inputs, for the peers."""
        from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
        from cxr_jax.weights import hf_folder, pretrained

        hf_folder.save(folder, self.model_config, self.params, tokenizer=pretrained.PHANTOM)
        images = self.levels if self.args.side else []
        patches = PROCESSOR.patchify(self.batch["image"], np) if self.args.side else []
        setting = {
            "text": self.text,
            "group": self.args.group,
            "completion": self.args.completion,
            "lr": 1e-6,
            "suppress": self.suppress,
        }
        save_inputs(folder, self.batch["prompts"], images, patches, setting)
        return {}

    def step(self) -> dict:
        """What `rl.run` does in a step, metrics included."""
        import jax

        self.params = None  # the state, which is donated, holds them
        common.memory(reset=True)

        def sample():
            self.ro = self.rollout(self.state["params"], self.frozen, self.batch, self.done)
            # As if all completions of so many groups had earned the same.
            flat = round(self.args.flat * self.args.prompts)
            self.ro["advantages"] = self.ro["advantages"].at[:flat].set(0)
            jax.block_until_ready(self.ro["reward"])

        def update():
            row = self.metrics_of(self.ro)
            self.state, learned = self.learn(self.state, self.frozen, self.batch, self.ro)
            self.row = {k: float(v) for k, v in {**row, **learned}.items()}

        cpu, compiled = time.process_time(), self.compilations.count()
        rollout, learn = common.clock(sample), common.clock(update)
        self.done += 1
        return {
            "seconds": rollout + learn,
            "rollout": rollout,
            "learn": learn,
            "cpu": time.process_time() - cpu,
            "peak": common.memory(),
            "compiled": self.compilations.count() - compiled,
            "row": self.row,
        }

    def gemm(self) -> dict:
        return {"gflops": common.gemm_gflops(self.trainable.dtype)}

    def bandwidth(self) -> dict:
        return {"gbps": common.read_gbps()}

    def work(self) -> dict:
        """FLOPs and bytes of a step: by arithmetic, and of its programs."""
        import jax

        from cxr_jax.inference import compaction
        from cxr_jax.planning import costs

        a = self.args
        patches = int(np.prod(self.grid)) if a.side else 0
        one = flops(self.model_config, self.prompt, a.completion, patches)
        if not a.side:
            one |= {"patches": 0, "vision": 0}
        out = {"one": one} | {
            name: step_flops(one, a.prompts, a.group, name == "shared")
            for name in ("shared", "unshared")
        }
        abstract = lambda tree: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree
        )
        args = abstract((self.state["params"], self.frozen, self.batch)) + (0,)
        trips = np.diff([0, *compaction.stage_ends(a.completion)]).tolist()  # of the decode loop
        out["program"] = {
            "rollout": costs.flops(self.rollout, *args, while_trips=trips),
            "learn": costs.flops(
                self.learn, *abstract((self.state, self.frozen, self.batch, self.ro))
            ),
        }
        t, size = self.model_config.text, np.dtype(self.trainable.dtype).itemsize
        text = self.trainable.merge(self.state["params"], self.frozen)["model"]["text"]
        head = (
            text["embed"]["embedding"]
            if self.model_config.tie_word_embeddings
            else text["head"]["kernel"]
        )
        weights = sum(x.size for x in jax.tree.leaves(text["layers"])) + head.size
        keys = 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim
        keys *= a.prompts * self.prompt + a.prompts * a.group * a.completion // 2
        out["bytes"] = size * a.completion * (a.micro_batches * weights + keys)
        return out

    def parts(self, rounds: int) -> dict:
        """Seconds of pieces of the step, each a program of its own; medians."""
        import functools

        import jax
        import jax.numpy as jnp

        from cxr_jax import rewards
        from cxr_jax.inference import sampling
        from cxr_jax.labels import phrase_reading
        from cxr_jax.models import network
        from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
        from cxr_jax.training import log_probs, optimizer
        from cxr_jax.training import losses as training_losses

        a, model_config, ro, batch = self.args, self.model_config, self.ro, self.batch
        rollout = self.settings.rollout
        n = a.prompts * a.group
        params = jax.jit(lambda train, frozen: self.trainable.merge(train, frozen)["model"])(
            self.state["params"], self.frozen
        )
        see = lambda params: network.vision(
            params,
            model_config,
            PROCESSOR.patchify(batch["image"]),
            self.grid,
            remat=a.remat,
            dtype=self.trainable.dtype,
        )
        features = jax.jit(see)(params)

        def read(tokens, lengths):
            each = lambda key: jnp.repeat(batch[key], a.group, axis=0)
            truth = phrase_reading.Truth.from_arrays(
                each("solution"), each("hedged"), each("sides")
            )
            parsed = rewards.read_tokens(
                tokens,
                lengths,
                self.table,
                a.completion * rewards.BYTES_PER_TOKEN,
                self.bank,
                truth,
            )
            terms = rewards.reward_terms(
                parsed,
                each("solution"),
                lengths,
                known=each("known"),
                min_length=rollout.min_length,
                max_length=a.completion // 2,
                limit=a.completion,
            )
            return rewards.combine(terms, dict(rollout.reward_weights))

        def loss(params, features):
            logp, entropy = log_probs.completion_log_probs(
                params,
                model_config,
                features,
                batch["prompts"],
                ro["tokens"],
                ro["mask"],
                suppress=suppress,
                remat=a.remat,
            )
            return logp.mean(), entropy

        suppress = np.isin(np.arange(model_config.text.vocab_size), self.suppress)
        hidden = jax.random.normal(
            jax.random.key(0),
            (n * a.completion, model_config.text.hidden_size),
            self.trainable.dtype,
        )

        def head(params, hidden):
            logp, entropy = training_losses.token_log_probs(
                hidden,
                log_probs.output_head(params, model_config),
                ro["tokens"].reshape(-1),
                suppress=suppress,
            )
            return logp.mean(), entropy

        keys = jax.random.split(jax.random.key(0), n)
        draw = lambda params, features: sampling.sample_completions(
            params,
            model_config,
            features,
            batch["prompts"],
            self.special,
            n=a.group,
            max_new_tokens=1,
            temperature=1.0,
            keys=keys,
        )
        both = functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
        calls = {
            "vision": (see, params),
            "prefill + 1 token": (draw, params, features),
            "reward": (read, ro["tokens"].reshape(n, -1), ro["lengths"].reshape(n)),
            "head, forward": (head, params, hidden),
            "head": (both(head), params, hidden),
            "decoder + head, forward": (loss, params, features),
            "decoder + head": (both(loss), params, features),
            "vision with gradient": (
                jax.grad(lambda params: see(params).tokens.astype(jnp.float32).sum()),
                params,
            ),
            "update": (
                lambda state, grads: optimizer.guarded_update(self.optimizer, state, grads),
                self.state,
                self.state["params"],
            ),
        }
        if not a.side:
            calls = {k: v for k, v in calls.items() if not k.startswith("vision")}
        out = {}
        for name, (fn, *args) in calls.items():
            program = jax.jit(fn)
            run = lambda program=program, args=args: jax.block_until_ready(program(*args))
            run(), run()
            out[name] = statistics.median(common.clock(run) for _ in range(rounds))
        return out
