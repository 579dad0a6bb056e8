"""ReXrank's command, round 2: `python -m cxr_jax.rexrank --input_json_file=A --save_json_file=B --img_root_dir=C`.

A is an object of studies, name -> {key_image_path, image_path, context, ..}. B is A with `model_prediction` in each
study: "Findings: .. Impression: ..", the reasoning and the answer of `--model` (any that `cxr_jax.load` opens) to the
frontal image, `key_image_path`, else the first of `image_path`. Paths lie below C whether or not they begin with a
slash. A study that B has already predicted is not read again; B is written whole after every `--save_every` studies.

What cannot be read gets an empty prediction and one line on stderr, since the whole table is scored; exit code 2 then,
after everything else is done. Exit codes: 0 all studies predicted; 2 bad usage, bad input, or a study without.
Research use only. Not for diagnosis.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data.images import read_image
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.errors import UserError, exit_code, printable, shown
from cxr_jax.labels.answers import reasoning_of, split_answer
from cxr_jax.runtime import whole_files

_PREDICTION = "model_prediction"
_NOTHING_NAMED = "No finding was named."


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.rexrank", description=__doc__)
    parser.add_argument("--input_json_file", required=True, metavar="A")
    parser.add_argument("--save_json_file", required=True, metavar="B")
    parser.add_argument("--img_root_dir", required=True, metavar="C")
    parser.add_argument("--model", default="phantom", help="as for cxr-jax predict")
    parser.add_argument("--prompt", default=FIND_PROMPT)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--save_every", type=int, default=50, help="studies between two files B")
    return parser.parse_args(argv)


def read_studies(path: Path) -> dict[str, dict[str, Any]]:
    """Read studies by name; NaN, as pandas writes what is missing, is read.

    Raises:
        UserError: for what is no object of objects.
    """
    try:
        studies = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: cannot be read as JSON") from None
    if not isinstance(studies, dict) or not all(isinstance(one, dict) for one in studies.values()):
        raise UserError(f"{path}: not an object of studies")
    return studies


def image_of(study: dict[str, Any], image_root: Path) -> Path:
    """Find the frontal image of a study.

    Raises:
        UserError: if it names none, or one outside the root.
    """
    # The image that ReXrank calls the key one goes first, then those of the list.
    listed = study.get("image_path")
    candidates = [study.get("key_image_path"), *(listed if isinstance(listed, list) else [listed])]
    # What is missing is NaN, which is no text.
    named = [name for name in candidates if isinstance(name, str) and name.strip("/")]
    if not named:
        raise UserError("names no image")
    # A leading slash would throw the root away; a step upwards would leave it.
    relative = PurePosixPath(named[0].lstrip("/"))
    if ".." in relative.parts:
        raise UserError("names an image outside --img_root_dir")
    return image_root / relative


def as_report(completion: str) -> str:
    """Write a completion as the two sections that are scored."""
    answer = split_answer(completion)
    labels = answer.labels if answer else []
    impression = f"{', '.join(labels)}." if labels else _NOTHING_NAMED
    # In one line: scorers split texts at line ends.
    findings = " ".join(reasoning_of(completion).split())
    return f"Findings: {findings} Impression: {impression}"


def _reader(arguments: argparse.Namespace) -> Callable[[Path], str]:
    """What reads an image; the model is loaded with the first one."""
    loaded: list[Any] = []

    def read(path: Path) -> str:
        # First the image: a table of paths that are not there needs no model.
        film = read_image(path)
        if not loaded:
            import cxr_jax

            os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
            loaded.append(cxr_jax.load(arguments.model))
        reading = loaded[0].read(
            film.pixels, arguments.prompt, 0, arguments.max_new_tokens, probabilities=False
        )
        return as_report(reading.shown.text)

    return read


def predict_studies(
    arguments: argparse.Namespace, read: Callable[[Path], str] | None = None
) -> int:
    """Predict every study that has no prediction yet; returns the exit code.

    Args:
        arguments: of `parse_args`.
        read: image -> report; None: by the model.

    Raises:
        UserError: for bad input.
    """
    source, target = Path(arguments.input_json_file), Path(arguments.save_json_file)
    studies = read_studies(source)
    if target.exists() and target.samefile(source):
        raise UserError(f"--save_json_file={target}: is the input, which is never written over")
    # What an earlier call has predicted is kept: a night's work is not thrown away by a stop.
    before = read_studies(target) if target.exists() else {}
    read = read or _reader(arguments)
    # In the order of the input, so that two files can be compared line by line.
    failed, unsaved = 0, 0
    for name, study in studies.items():
        earlier = before.get(name, {}).get(_PREDICTION)
        # An empty one is of a study that could not be read: it may be there by now.
        if isinstance(earlier, str) and earlier:
            study[_PREDICTION] = earlier
            continue
        try:
            study[_PREDICTION] = read(image_of(study, Path(arguments.img_root_dir)))
        except UserError as error:
            study[_PREDICTION] = ""
            failed += 1
            print(f"error: {shown(name)}: {printable(error)}", file=sys.stderr, flush=True)
        # Whole files now and then, so that a kill costs few studies.
        unsaved += 1
        if unsaved >= arguments.save_every:
            _write(target, studies)
            unsaved = 0
    _write(target, studies)
    print(f"{len(studies) - failed:,} of {len(studies):,} studies predicted: {target}")
    return 2 if failed else 0


def _write(target: Path, studies: dict[str, dict[str, Any]]) -> None:
    # NaN as it came: the table is given back with one key more.
    whole_files.write_text(target, json.dumps(studies, indent=1, ensure_ascii=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return exit_code(lambda: predict_studies(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
