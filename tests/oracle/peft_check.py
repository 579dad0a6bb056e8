"""What PEFT makes of our adapters, and adapters of its own: `peft_check.py SEED OURS OUT` (tests/models/test_lora.py).

    .venv-oracle/bin/python tests/oracle/peft_check.py SEED OURS OUT [FAMILY]

The model is cases.draw(SEED, FAMILY)'s. Loads the PEFT folder OURS into it and writes OUT/ours.npz: logits. Fills a
fresh LoRA on q_proj and v_proj with random numbers, which PEFT saves in OUT/theirs, and writes OUT/theirs.npz: the
weights that it merges them into, under their published keys. Prints one JSON object: what PEFT warned of as it
loaded OURS, the tensors of OURS that it did not take as they are, and those that it lacked.
"""

import json
import pathlib
import sys
import warnings

import cases
import numpy as np
import peft
import reference
import torch
from safetensors.torch import load_file


def logits(model: peft.PeftModel, case: cases.Case) -> np.ndarray:
    mask = np.ones_like(case.input_ids) if case.attention_mask is None else case.attention_mask
    return reference.runner(model.get_base_model(), case).logits(case.input_ids, mask)


def taken(model: peft.PeftModel, folder: pathlib.Path) -> dict[str, list[str]]:
    stored, held = (
        load_file(folder / "adapter_model.safetensors"),
        peft.get_peft_model_state_dict(model),
    )
    return {
        "lacked": sorted(held.keys() - stored.keys()),
        "not_taken": sorted(
            k for k in stored if k not in held or not torch.equal(stored[k], held[k])
        ),
    }


def own_adapters(case: cases.Case, out: pathlib.Path) -> dict[str, np.ndarray]:
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(reference.build(case), config)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out, save_embedding_layers=False)
    merged = model.merge_and_unload().state_dict()
    return {key: merged[case.module_key(key)].numpy() for key in cases.shapes(case)}


@torch.no_grad()
def main(seed: str, ours: str, out: str, family: str = "qwen2_5_vl") -> None:
    torch.manual_seed(int(seed))
    case, ours, out = cases.draw(int(seed), family), pathlib.Path(ours), pathlib.Path(out)
    out.mkdir()
    base = reference.build(case)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, ours)
    # transformers deprecates names of its own that PEFT uses
    said = {"warned": [str(w.message) for w in seen if not issubclass(w.category, FutureWarning)]}
    np.savez(out / "ours.npz", logits=logits(model, case))
    np.savez(out / "theirs.npz", **own_adapters(case, out / "theirs"))
    print(json.dumps(said | taken(model, ours)))


if __name__ == "__main__":
    main(*sys.argv[1:])
