"""What a finished run hands on: `hf/`, and `adapter/` in PEFT's format."""

import os

from cxr_jax.runtime import processes
from cxr_jax.weights import pretrained


def export(workdir, model_config, trainable, train, frozen, tokenizer, config) -> None:
    """Writes `hf/`: weights (in the type of the computation), configs, tokenizer and a model card, in the Hugging Face
    layout; with LoRA, the adapters merged there, and alone in PEFT's format in `adapter/`."""
    from cxr_jax.weights import hf_folder, peft_folder

    size = config.data.get("size", 224)
    merged, adapters = processes.gather_to_host(
        (trainable.export_params(train, frozen), train.get("lora"))
    )
    if not processes.is_main():
        return
    hf_folder.save_hf(
        workdir.file("hf"),
        model_config,
        merged,
        tokenizer=tokenizer,
        min_pixels=size**2,
        max_pixels=size**2,
        dtype=trainable.dtype,
    )
    if trainable.adapters:
        base = config.model if pretrained.is_name(config.model) else os.path.abspath(config.model)
        peft_folder.save(workdir.file("adapter"), model_config, adapters, trainable.adapters, base)
    card = (
        "---\nlicense: apache-2.0\n---\n# cxr_jax export\n\nQwen2.5-VL structure. "
        f"Task: {config.task}; started from `{config.model}`; data: {config.data.source}.\n\n"
        "Research use only. Not for diagnosis. Phantom results say nothing about patients.\n"
    )
    with open(os.path.join(workdir.file("hf"), "README.md"), "w") as f:
        f.write(card)
