"""The peer of generate.py and sft_step.py: transformers on torch, in an environment of its own (no jax).

    python benchmarks/_peer.py FOLDER        # a model folder that holds inputs.npz too

`generate`: greedy, dynamic cache, sdpa. `step`: forward, backward, AdamW.
"""

import os
import platform
import sys
import time

import numpy as np
import torch
import transformers
from _common import peak, serve, torch_gflops
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration


class Peer:
    def __init__(self, folder: str):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        # Without a stop token: exactly max_new_tokens on both sides.
        self.model.generation_config = GenerationConfig(pad_token_id=0)
        with np.load(f"{folder}/inputs.npz") as f:
            self.inputs = {k: torch.from_numpy(f[k]) for k in f.files}
        self.optimizer = None

    def facts(self) -> dict:
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "torch threads": torch.get_num_threads(),
            "peer python": platform.python_version(),
        }

    def arguments(self, batch: int, ids) -> dict:
        """The arrays that a processor gives for the first `batch` rows; ids int [batch, T]."""
        ids = ids[:batch].long()
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": self.inputs["pixels"][:batch].flatten(0, 1),
            "image_grid_thw": self.inputs["grid"][None].expand(batch, 3),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
        }

    @torch.inference_mode()
    def generate(self, batch: int, new_tokens: int) -> dict:
        kw = self.arguments(batch, self.inputs["ids"])
        self.model.model.rope_deltas = None
        peak(reset=True)
        start = time.perf_counter()
        out = self.model.generate(**kw, max_new_tokens=new_tokens, do_sample=False)
        return {
            "seconds": time.perf_counter() - start,
            "tokens": out[:, kw["input_ids"].shape[1] :].tolist(),
            "peak": peak(),
        }

    def step(self, lr: float, b1: float, b2: float, eps: float, weight_decay: float) -> dict:
        """One update on all rows; the loss is that before it."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr, (b1, b2), eps, weight_decay, fused=True
            )
            self.model.train()
        ids = torch.cat([self.inputs["ids"], self.inputs["completions"]], 1).long()
        kw = self.arguments(len(ids), ids)
        labels = ids.clone()
        labels[:, : self.inputs["ids"].shape[1]] = -100
        self.model.model.rope_deltas = None
        peak(reset=True)
        start = time.perf_counter()
        loss = self.model(**kw, labels=labels, use_cache=False).loss
        loss.backward()
        forward_backward = time.perf_counter() - start
        self.optimizer.step()
        seconds = time.perf_counter() - start
        # In float64: torch sums a large float32 array with an error of 1e-3.
        norm = sum(
            p.grad.double().square().sum() for p in self.model.parameters() if p.grad is not None
        ).sqrt()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "seconds": seconds,
            "forward_backward": forward_backward,
            "loss": loss.item(),
            "norm": norm.item(),
            "peak": peak(),
        }

    def gemm(self) -> dict:
        return {"gflops": torch_gflops()}


if __name__ == "__main__":
    peer = Peer(sys.argv[1])
    serve({"facts": peer.facts, "generate": peer.generate, "step": peer.step, "gemm": peer.gemm})
