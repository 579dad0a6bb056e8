"""The peer of grpo_step.py and mixed_films.py: TRL's GRPOTrainer on torch, in an environment of its own (no jax).

    python benchmarks/_grpo_peer.py FOLDER   # a model folder that holds inputs.npz and setting.json too

TRL trains by its own loop; a callback holds it before each step until the step is asked for. float32, no gradient
checkpointing (TRL's default is on, and slower). For Pillow alone, without torchvision, the processor is put together
by hand: the library's own loads a video processor, too.
"""

import json
import os
import platform
import queue
import sys
import tempfile
import threading
import time

import numpy as np
import torch
import transformers
import trl
from _common import peak, serve, torch_gflops
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

ImageProcessor = (
    getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
)


class Processor(Qwen2_5_VLProcessor):
    """Images and text, no video."""

    attributes = ["image_processor", "tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
        super(Qwen2_5_VLProcessor, self).__init__(
            image_processor, tokenizer, chat_template=chat_template
        )


def reward(completions, **_) -> list[float]:
    """Cheap, and other for each completion, so that there are advantages."""
    return [len(set(c[0]["content"])) / 100 for c in completions]


class Peer(transformers.TrainerCallback):
    def __init__(self, folder: str):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        with open(f"{folder}/setting.json", encoding="utf-8") as f:
            s = json.load(f)
        with np.load(f"{folder}/inputs.npz") as f:
            ids, lengths = f["ids"], f["lengths"]
            # One image a prompt, of any size, or none.
            has_images = "image0" in f
            images, self.patches = (
                [f[f"{name}{row}"] for row in range(len(ids))] if has_images else []
                for name in ("image", "patches")
            )
        self.ids = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        # As TRL sets it in a tokenizer that it loads: types of tokens are padded by it.
        tokenizer.padding_side = "left"
        processor = Processor(
            ImageProcessor(min_pixels=3136, max_pixels=12845056), tokenizer, tokenizer.chat_template
        )
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id)
        rows = {"prompt": [[{"role": "user", "content": s["text"]}] for _ in self.ids]}
        if len(images):
            rows["image"] = [Image.fromarray(np.repeat(x[..., None], 3, -1)) for x in images]
        self.folder = tempfile.TemporaryDirectory()
        config = trl.GRPOConfig(
            self.folder.name,
            per_device_train_batch_size=len(self.ids) * s["group"],
            num_generations=s["group"],
            max_completion_length=s["completion"],
            temperature=1.0,
            beta=0.0,
            num_iterations=1,
            loss_type="dapo",
            learning_rate=s["lr"],
            lr_scheduler_type="constant",
            max_steps=10**6,
            shuffle_dataset=False,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            generation_kwargs={"suppress_tokens": s["suppress"]},
            **({"max_prompt_length": None} if trl.__version__.startswith("0.") else {}),
        )
        self.trainer = trl.GRPOTrainer(
            model,
            reward,
            config,
            Dataset.from_dict(rows),
            processing_class=processor,
            callbacks=[self],
        )
        self.asked, self.answers = queue.Queue(), queue.Queue()
        self.times, self.seen = {}, {}
        self.watch(model, "generate")
        self.watch(self.trainer, "_generate_and_score_completions")
        self.watch(self.trainer, "_calculate_rewards")
        self.watch(self.trainer, "compute_loss")

    def watch(self, owner, name: str) -> None:
        """Clocks each call of a method, and keeps the arguments of generate."""
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            if name == "generate":
                self.seen = kwargs
            start = time.perf_counter()
            out = method(*args, **kwargs)
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start
            if name == "generate":
                self.length = out.shape[1] - kwargs["input_ids"].shape[1]
            return out

        setattr(owner, name, timed)

    def on_step_begin(self, args, state, control, **_):
        self.asked.get()
        self.times = {}
        peak(reset=True)
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_):
        seconds, t = time.perf_counter() - self.start, self.times
        rollout, reward = t["_generate_and_score_completions"], t["_calculate_rewards"]
        self.answers.put(
            {
                "seconds": seconds,
                "rollout": rollout,
                "learn": seconds - rollout,
                "peak": peak(),
                "cpu": time.process_time() - self.cpu,
                "parts": {
                    "generate": t["generate"],
                    "reward": reward,
                    "prepare": rollout - t["generate"] - reward,
                    "loss": t["compute_loss"],
                    "backward and update": seconds - rollout - t["compute_loss"],
                },
            }
        )

    def step(self) -> dict:
        self.asked.put(None)
        return self.answers.get()

    def check(self) -> dict:
        """What the last step generated from, against our inputs, and how many tokens it drew."""
        ids, seen = self.seen["input_ids"].numpy(), self.seen["attention_mask"].numpy() > 0
        group = len(ids) // len(self.ids)
        same = all(
            np.array_equal(row[of_row], self.ids[number // group])
            for number, (row, of_row) in enumerate(zip(ids, seen, strict=True))
        )
        pixels, apart = self.seen.get("pixel_values"), 0.0
        if pixels is not None:
            ours = np.concatenate([patches for patches in self.patches for _ in range(group)])
            apart = np.abs(pixels.numpy() - ours).max()
        return {
            "rows": len(ids),
            "prompt": ids.shape[1],
            "tokens": self.length,
            "same ids": bool(same),
            "pixels apart": float(apart),
        }

    def facts(self) -> dict:
        return {
            f"trl {trl.__version__} on transformers": transformers.__version__,
            "torch": torch.__version__,
            "torch threads": torch.get_num_threads(),
            "trl python": platform.python_version(),
        }

    def gemm(self) -> dict:
        return {"gflops": torch_gflops()}


if __name__ == "__main__":
    peer = Peer(sys.argv[1])
    ask = {"facts": peer.facts, "step": peer.step, "check": peer.check, "gemm": peer.gemm}
    threading.Thread(target=lambda: (serve(ask), os._exit(0)), daemon=True).start()
    peer.trainer.train()
