"""Load model folders with transformers on torch, and run them.

    .venv-oracle/bin/python tests/oracle/load_export.py FOLDER IN.npz OUT.npz [FOLDER IN.npz OUT.npz ..]

IN.npz: input_ids, attention_mask, pixels (patches, or Gemma's images), grids (no images: an empty grids). OUT.npz:
logits (float32). Prints a line of JSON for each: what loading left over, and the settings that were read.
tests/weights/test_convert.py asserts that stderr, where transformers warns, stays empty.
"""

import json
import pathlib
import sys
import warnings

import numpy as np
import torch
import transformers
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)


def main(folder: str, given: str, result: str) -> None:
    warnings.simplefilter("always")
    transformers.utils.logging.disable_progress_bar()
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    said = {key: sorted(map(str, value)) for key, value in info.items()}
    said["image_processor"] = AutoImageProcessor.from_pretrained(folder).size.__class__.__name__
    said["eos_token_id"] = GenerationConfig.from_pretrained(folder).eos_token_id
    if (pathlib.Path(folder) / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        said["chat"] = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Find."}], tokenize=False
        )
    with np.load(given) as f:
        x = {key: torch.tensor(f[key]) for key in f.files}
    images = {}
    if len(x["grids"]):
        images = {
            "pixel_values": x["pixels"].float(),
            "image_grid_thw": x["grids"],
            "mm_token_type_ids": (x["input_ids"] == model.config.image_token_id).int(),
        }
    if model.config.model_type == "gemma3":
        images = {"pixel_values": images["pixel_values"]} if images else {}
        images["token_type_ids"] = (x["input_ids"] == model.config.image_token_id).long()
    with torch.no_grad():
        out = model.eval()(
            input_ids=x["input_ids"], attention_mask=x["attention_mask"], use_cache=False, **images
        )
    np.savez(result, logits=out.logits.float().numpy())
    print(json.dumps(said))


if __name__ == "__main__":
    for place in range(1, len(sys.argv), 3):
        main(*sys.argv[place : place + 3])
