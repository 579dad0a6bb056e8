"""What a finished run hands on: `hf/`, and `adapter/` in PEFT's format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_jax.models.lora import Lora
from cxr_jax.models.tokenizer import Tokenizer
from cxr_jax.runtime import processes
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.trees import Tree
from cxr_jax.weights import hf_folder, model_card, peft_folder, pretrained


@dataclass(frozen=True, kw_only=True)
class ExportFacts:
    """What the files of an export say about the run.

    Attributes:
        started_from: the model of `config.model`.
        pixel_limits: (min_pixels, max_pixels) of the images that the run has read; the same twice: squares of that.
        dtype: name of the type in which weights are stored, that of the computation.
        contaminated: what a card must say of the films that it trained on; "" where there is nothing.
    """

    task: str
    started_from: model_card.Origin
    data_source: str
    pixel_limits: tuple[int, int]
    dtype: str
    contaminated: str = ""


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
        tokenizer=tokenizer,
        # So that whoever serves the folder makes the pixels that were trained on.
        pixel_limits=facts.pixel_limits,
        dtype=pretrained.DTYPES[facts.dtype],
    )
    _write_card(Path(folder), facts)
    # The adapters alone, for servers that hold one base model and many adapters (vLLM, PEFT).
    if adapters:
        # By its name: a path of this machine leads nowhere on others, and tells about it.
        peft_folder.save(
            run_folder.file("adapter"),
            model_config,
            adapters.params,
            adapters.lora,
            facts.started_from.name,
        )
        _write_card(Path(run_folder.file("adapter")), facts)


def _write_card(folder: Path, facts: ExportFacts) -> None:
    model_card.write(folder, facts.started_from, facts.task, facts.data_source, facts.contaminated)
