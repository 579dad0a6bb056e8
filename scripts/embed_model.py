"""Ships the model of a finished SFT run, or of a folder, inside the package: `python -m scripts.embed_model RUN`.

Weights are stored in float16 (half the size; its 11 bits keep more of a trained weight than bfloat16's 8) and read
back as float32 on a CPU. The folder is the Hugging Face layout that `cxr_jax.load("phantom")` and vLLM read.
"""

import sys
from pathlib import Path

import numpy as np

from cxr_jax.errors import UserError, exit_code
from cxr_jax.runtime import trees
from cxr_jax.weights import hf_folder
from cxr_jax.weights.pretrained import PHANTOM


def embed(run_dir: str, folder: str = PHANTOM) -> None:
    """Replace the embedded model by that of a run or of a model folder.

    Raises:
        UserError: if there is none, or a weight overflows float16.
    """
    source = Path(run_dir)
    # A run keeps its model in hf/.
    if (source / "hf").is_dir():
        source /= "hf"
    if not (source / "config.json").is_file():
        raise UserError(f"{run_dir}: neither a finished run nor a model folder")
    model_config, params = hf_folder.load(source, np.float32)
    largest = max(float(np.abs(np.asarray(leaf)).max()) for _, leaf in trees.flatten(params))
    if largest > np.finfo(np.float16).max:
        raise UserError(f"{run_dir}: a weight of {largest:g} does not fit float16")
    card = Path(folder) / "README.md"
    # The embedded model keeps its own card; saving would leave that of the run.
    card_text = card.read_text() if card.is_file() else ""
    hf_folder.save(
        folder,
        model_config,
        params,
        dtype=np.float16,
        pixel_limits=(224**2, 224**2),
        tokenizer=source,
    )
    card.write_text(card_text)


def main() -> int:
    """Run the command line of the process and return the exit code."""

    def run() -> None:
        if len(sys.argv) != 2:
            raise UserError("name the folder of a run or of a model")
        embed(sys.argv[1])

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
