"""The evaluation section of a model card: `cxr-jax card RUN [--model=FOLDER]` (`python -m cxr_jax.card`).

RUN is the folder of a run that has been evaluated: `--config=evaluate`, SFT or RL. Without --model the section is
printed; runs write it themselves as card.md, and into the cards of what they export. With --model it is put into that
folder's README.md, in place of an earlier one: only if the folder's weights are those that RUN has evaluated.

Exit codes: 0 done; 2 bad usage, no evaluation, or another model. Research use only. Not for diagnosis.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import UserError, exit_code, printable
from cxr_jax.report import card
from cxr_jax.report.records import read_json
from cxr_jax.weights import hf_folder, locate, model_card

_README = "README.md"


def model_name(model: str) -> str:
    """Name a model of an evaluation as a card may: never by a path of this machine."""
    return model_card.name_of(Path(model))


def _put(run_folder: Path, model: str, section_text: str) -> Path:
    """Put a section into the card of a model. Raises UserError for another model than the run has evaluated."""
    model_folder = locate.find_folder(model)
    # config.json of the run has the hash of what it has read.
    evaluated_hash = (read_json(run_folder / "config.json").get("data") or {}).get("weights_sha256")
    if not evaluated_hash or hf_folder.weights_sha256(model_folder) != evaluated_hash:
        raise UserError(
            f"--model={model}: its weights are not those that {run_folder} has evaluated: a card says nothing of others"
        )
    # Made with the weights, where it tells their licence: a card without one is nobody's to begin here.
    readme_path = model_folder / _README
    if not readme_path.is_file():
        raise UserError(f"{readme_path}: no such file: the section is a part of a card")
    card.put_into(readme_path, section_text)
    return readme_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the arguments of the process) and return the exit code."""
    parser = ArgumentParser("cxr_jax.card", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="the folder of an evaluated run")
    parser.add_argument(
        "--model", metavar="FOLDER", help="the model whose README.md gets the section"
    )

    def write_card() -> None:
        arguments = parser.parse_args(argv)
        run_folder = Path(arguments.run)
        section_text = card.section(card.read_evaluation(run_folder), model_name)
        if arguments.model is None:
            print("\n".join(map(printable, section_text.splitlines())))
            return
        print(_put(run_folder, arguments.model, section_text))

    return exit_code(write_card, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
