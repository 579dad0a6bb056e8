"""The neural peer of labels.py: the forward pass of BERT-base in torch, in an environment of its own (no jax).

    python benchmarks/_bert.py

12 layers, 768 wide, 110 million parameters, random weights, float32, sdpa: what a BERT labeler such as CheXbert
computes for a report, without its tokenizer and its 14 small heads.
"""

import os
import time

import torch
import transformers
from _common import serve


class Bert:
    def __init__(self):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        self.model = transformers.BertModel(
            transformers.BertConfig(), add_pooling_layer=False
        ).eval()

    def facts(self) -> dict:
        count = sum(p.numel() for p in self.model.parameters())
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "torch threads": torch.get_num_threads(),
            "BERT parameters": f"{count:,}",
        }

    @torch.inference_mode()
    def forward(self, batch: int, tokens: int) -> dict:
        """One forward pass of random ids [batch, tokens], all of which count."""
        ids = torch.randint(1000, 30000, (batch, tokens))
        start, cpu = time.perf_counter(), time.process_time()
        self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[
            :, 0
        ].sum().item()
        seconds = time.perf_counter() - start
        return {"rate": batch / seconds, "cores": (time.process_time() - cpu) / seconds}


if __name__ == "__main__":
    bert = Bert()
    serve({"facts": bert.facts, "forward": bert.forward})
