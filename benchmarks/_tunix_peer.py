"""The peer of grpo_step.py for text alone: tunix's GRPOLearner with its vanilla rollout, in an environment of its own.

    python benchmarks/_tunix_peer.py FOLDER  # a model folder that holds inputs.npz and setting.json too

Its Qwen2 with the decoder's weights of the folder. tunix trains by its own loop, which is held before each step until
the step is asked for. A prompt goes in as its ids, written as text.
"""

import json
import os
import pathlib
import platform
import queue
import sys
import threading
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import gemm_gflops, peak, serve
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as loader
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig


class Ids:
    """A tokenizer that reads ids written as text; it decodes as the folder's own."""

    def __init__(self, folder: str):
        self.own = AutoTokenizer.from_pretrained(folder)
        self.decode = self.own.decode

    def encode(self, text: str, **_) -> list[int]:
        return [int(x) for x in text.split()]

    def bos_id(self):
        return None

    def eos_id(self):
        return self.own.eos_token_id

    def pad_id(self):
        return self.own.pad_token_id


def reward(prompts, completions, **_) -> list[float]:
    """Cheap, and other for each completion, so that there are advantages."""
    return [len(set(c)) / 100 for c in completions]


class Peer:
    def __init__(self, folder: str):
        s = json.loads(pathlib.Path(folder, "setting.json").read_text(encoding="utf-8"))
        t = json.loads(pathlib.Path(folder, "config.json").read_text(encoding="utf-8"))
        t = {**t, **t.get("text_config", {})}
        with np.load(f"{folder}/inputs.npz") as f:
            self.ids = f["ids"]
        self.setting = s
        mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        model_config = qwen2.ModelConfig(
            num_layers=t["num_hidden_layers"],
            vocab_size=t["vocab_size"],
            embed_dim=t["hidden_size"],
            hidden_dim=t["intermediate_size"],
            num_heads=t["num_attention_heads"],
            head_dim=t["hidden_size"] // t["num_attention_heads"],
            num_kv_heads=t["num_key_value_heads"],
            rope_theta=int(t["rope_theta"]),
            norm_eps=t["rms_norm_eps"],
            use_tied_embedding=t["tie_word_embeddings"],
        )
        model = loader.create_model_from_safe_tensors(
            folder, model_config, mesh, jnp.float32, mode="original"
        )
        self.count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        width, new, roles = self.ids.shape[1], s["completion"], rl_cluster.Role
        cluster = rl_cluster.RLCluster(
            actor=model,
            tokenizer=Ids(folder),
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh=dict.fromkeys((roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh),
                training_config=rl_cluster.RLTrainingConfig(
                    actor_optimizer=optax.adamw(s["lr"]), eval_every_n_steps=10**9, max_steps=10**9
                ),
                # No id is the stop id: exactly `completion` tokens.
                rollout_config=RolloutConfig(
                    max_tokens_to_generate=new,
                    max_prompt_length=width,
                    temperature=1.0,
                    kv_cache_size=width + new,
                    eos_tokens=[t["vocab_size"]],
                ),
            ),
        )
        self.learner = GRPOLearner(
            cluster, GRPOConfig(num_generations=s["group"], beta=0.0), reward
        )
        self.cluster, self.asked, self.answers, self.times = (
            cluster,
            queue.Queue(),
            queue.Queue(),
            {},
        )
        self.watch(cluster, "generate")
        self.watch(cluster, "update_actor")
        self.watch(self.learner, "_compute_rewards")
        step = self.learner._run_global_step

        def held(*args):
            self.asked.get()
            self.times = {}
            peak(reset=True)
            start, cpu = time.perf_counter(), time.process_time()
            step(*args)
            jax.block_until_ready(nnx.state(model))
            seconds, t = time.perf_counter() - start, self.times
            self.answers.put(
                {
                    "seconds": seconds,
                    "rollout": seconds - t["update_actor"],
                    "learn": t["update_actor"],
                    "peak": peak(),
                    "cpu": time.process_time() - cpu,
                    "parts": {"generate": t["generate"], "reward": t["_compute_rewards"]},
                }
            )

        self.learner._run_global_step = held
        self.model = model

    def watch(self, owner, name: str) -> None:
        """Clocks each call of a method, and keeps what generate gives."""
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            out = method(*args, **kwargs)
            if name == "generate":
                self.drawn = out
            if name == "update_actor":
                jax.block_until_ready(nnx.state(self.model))
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start
            return out

        setattr(owner, name, timed)

    def train(self) -> None:
        def batches():
            while True:
                yield {"prompts": np.array([" ".join(map(str, row)) for row in self.ids])}

        self.learner.train(batches())

    def step(self) -> dict:
        self.asked.put(None)
        return self.answers.get()

    def check(self) -> dict:
        """What the last step generated from, against our inputs, and how many tokens it drew."""
        ids = np.asarray(self.drawn.left_padded_prompt_tokens)
        lengths = {len(x) for x in self.drawn.tokens}
        same = np.array_equal(ids, np.repeat(self.ids, len(ids) // len(self.ids), 0))
        return {
            "rows": len(ids),
            "prompt": ids.shape[1],
            "tokens": lengths.pop() if len(lengths) == 1 else -1,
            "same ids": bool(same),
            "pixels apart": 0.0,
        }

    def facts(self) -> dict:
        return {
            "tunix": version("google-tunix"),
            "tunix's jax": jax.__version__,
            "flax": version("flax"),
            "tunix parameters": f"{self.count:,}",
            "tunix python": platform.python_version(),
        }

    def gemm(self) -> dict:
        return {"gflops": gemm_gflops(jnp.float32)}


if __name__ == "__main__":
    peer = Peer(sys.argv[1])
    ask = {"facts": peer.facts, "step": peer.step, "check": peer.check, "gemm": peer.gemm}
    threading.Thread(target=lambda: (serve(ask), os._exit(0)), daemon=True).start()
    peer.train()
