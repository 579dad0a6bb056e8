"""What a finished run hands on: `hf/`, and `adapter/` in PEFT's format."""

import os
from dataclasses import dataclass
from typing import Any

from cxr_jax.errors import as_utf8
from cxr_jax.models.lora import Lora
from cxr_jax.models.tokenizer import Tokenizer
from cxr_jax.runtime import processes
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.trees import Tree
from cxr_jax.weights import hf_folder, peft_folder, pretrained

# The front matter is what the model hub reads; the text below is for people.
_MODEL_CARD = """\
---
license: apache-2.0
---
# cxr_jax export

Qwen2.5-VL structure. Task: {task}; started from `{started_from}`; data: {data_source}.

{notice} Phantom results say nothing about patients.
"""


@dataclass(frozen=True, kw_only=True)
class ExportFacts:
    """What the files of an export say about the run.

    Attributes:
        started_from: `config.model`.
        image_size: pixels; the side of the squares that the run has read.
        dtype: name of the type in which weights are stored, that of the computation.
    """

    task: str
    started_from: str
    data_source: str
    image_size: int
    dtype: str


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters and their shape."""

    params: Tree
    lora: Lora


def export(
    run_folder: RunFolder,
    model_config: Any,
    params: Tree,
    tokenizer: Tokenizer,
    facts: ExportFacts,
    adapters: Adapters | None = None,
) -> None:
    """Write `hf/`: weights, configs, tokenizer and a model card, in the Hugging Face layout; and `adapter/`.

    Of several processes all call this, and the first one writes.

    Args:
        params: of the whole model, adapters merged; on the host or on devices.
        adapters: the adapters alone, written in PEFT's format.
    """
    # Every process takes part: each holds a part of the arrays only.
    params = processes.gather_to_host(params)
    if adapters:
        adapters = Adapters(processes.gather_to_host(adapters.params), adapters.lora)
    if not processes.is_main():
        return
    folder = run_folder.file("hf")
    hf_folder.save(
        folder,
        model_config,
        params,
        # Squares of one size in training, so both limits of the area are that size.
        tokenizer=tokenizer,
        min_pixels=facts.image_size**2,
        max_pixels=facts.image_size**2,
        dtype=pretrained.DTYPES[facts.dtype],
    )
    # The adapters alone, for servers that hold one base model and many adapters (vLLM, PEFT).
    if adapters:
        # PEFT finds the base by what stands here, from whatever folder it is called.
        base_model = facts.started_from
        if not pretrained.is_built_in(base_model):
            base_model = os.path.abspath(base_model)
        peft_folder.save(
            run_folder.file("adapter"), model_config, adapters.params, adapters.lora, base_model
        )
    # Written last: its folder has just been replaced as a whole.
    card = _MODEL_CARD.format(
        task=facts.task,
        started_from=facts.started_from,
        data_source=facts.data_source,
        notice=NOT_FOR_DIAGNOSIS,
    )
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(as_utf8(card))
