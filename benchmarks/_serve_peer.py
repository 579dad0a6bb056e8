"""The peer of serve.py: transformers on torch behind a plain queue, one request at a time, no jax.

python benchmarks/_serve_peer.py FOLDER        # a model folder that holds inputs.npz too
"""

import os
import sys

import _loads as loads
import numpy as np
import torch
import transformers
from _common import serve
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.generation.streamers import BaseStreamer


class _Ear(BaseStreamer):
    """Notes the first token; what comes before it is the prompt."""

    def __init__(self, request: loads.Request):
        self.request, self.calls = request, 0

    def put(self, value) -> None:
        self.calls += 1
        if self.calls > 1:
            self.request.text()

    def end(self) -> None:
        pass


class Peer:
    def __init__(self, folder: str):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        with np.load(f"{folder}/inputs.npz") as file:
            self.inputs = {name: torch.from_numpy(file[name]) for name in file.files}
        self.queue = loads.PlainQueue(self.answer, most=1)

    def facts(self) -> dict:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    @torch.inference_mode()
    def answer(self, batch: list) -> None:
        [(number, request)] = batch
        ids = self.inputs["ids"].long()
        self.model.model.rope_deltas = None
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=self.inputs["pixels"][number % len(self.inputs["pixels"])],
            image_grid_thw=self.inputs["grid"][None],
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            max_new_tokens=int(self.inputs["new"]),
            do_sample=False,
            suppress_tokens=self.inputs["suppress"].tolist(),
            eos_token_id=self.inputs["stop"].tolist(),
            streamer=_Ear(request),
        )
        request.end(out[0, ids.shape[1] :].tolist())

    def load(self, kind: str, seconds: float, rate: float) -> dict:
        return loads.play(self.queue.submit, loads.arrivals(kind, seconds, rate))


if __name__ == "__main__":
    peer = Peer(sys.argv[1])
    serve({"facts": peer.facts, "load": peer.load})
