"""Reads chest radiographs: `cxr-jax predict IMAGE... [--model=NAME_OR_DIR] [--json]`.

For each PNG, JPEG or DICOM file: the reasoning, the answer list, and a probability for each of the 14 labels.
The model reasons `--samples` times (temperature 1) beside the greedy reading that is shown; after each of these
traces, its own probability that the answer names the label is computed over all valid answers, and the mean over the
traces is given (with `--samples=0`: after the greedy trace). It says how sure the model is, and is no calibrated
risk. For a tokenizer that cannot express valid answers it is the share of the samples whose answer names the label
(without samples: 1 for the labels of the answer), and a warning says so.

`--constrained` forces the reading that is shown to end with a valid answer list. `--grids=bucket` pads images to few
shapes, see `cxr_jax.inference.model.Model`. `--max_pixels=N` resizes larger films to at most N pixels, where that is
less than the model's own limit: less memory, less time. `python -m cxr_jax.predict` is the same command.

`--study` reads all files together, as one study: which is the current frontal film, which the lateral, which a prior
one follows from headers and names, or is said by `--roles=frontal,lateral,prior` in the order of the files, and stands
in the prompt. Without it every file is read by itself.

`--sr=F.dcm` and `--fhir=F.json` write the reading of one film, or of one study, as DICOM SR and as a FHIR bundle: what
the reading room exports. SR needs the film's DICOM, whose patient and study it belongs to.

A file that cannot be read, or that is visibly no frontal chest radiograph (lateral, other body part, blank,
colour; by its pixels noise, text, a photograph, a limb, a CT slice), gets one line on stderr and no report;
`--read_anyway` reads the latter kind, and `--image_gate=warn` or `off` what the pixels alone speak against. Research
use only. Not for diagnosis.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data import image_gate, images, radiograph
from cxr_jax.data.prompts import FIND_PROMPT, IMAGE_MARK, ROLES, check_prompt, split_roles
from cxr_jax.errors import UserError, as_utf8, exit_code, printable
from cxr_jax.inference.reading import (
    Film,
    FilmReading,
    ReadingOptions,
    as_text,
    check_usable,
    read_films,
    study_of,
    why_no_probabilities,
)
from cxr_jax.outputs import codes
from cxr_jax.runtime import whole_files
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

if TYPE_CHECKING:
    from cxr_jax.inference.model import Model


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser(
        "cxr_jax.predict", description=f"Reads chest radiographs. {NOT_FOR_DIAGNOSIS}"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG, JPEG or DICOM file")
    parser.add_argument(
        "--model", default="phantom", help="embedded model, Hugging Face folder or workdir of a run"
    )
    parser.add_argument("--prompt", default=FIND_PROMPT)
    parser.add_argument(
        "--samples",
        type=_whole_number_from(0),
        default=8,
        help="sampled traces behind the probabilities (default 8)",
    )
    parser.add_argument("--max_new_tokens", type=_whole_number_from(1), default=512)
    parser.add_argument("--seed", type=_whole_number_from(0), default=0)
    parser.add_argument("--renderer", default="voi", choices=radiograph.RENDERERS)
    parser.add_argument(
        "--constrained", action="store_true", help="the reading shown ends with a valid answer list"
    )
    parser.add_argument(
        "--grids",
        default="exact",
        choices=("exact", "bucket"),
        help="shapes of images: the processor's, or few",
    )
    parser.add_argument(
        "--max_pixels",
        type=_whole_number_from(28 * 28),  # one token of the smallest kind of any family
        metavar="N",
        help="most pixels of an image (height x width); default: the model's own limit",
    )
    parser.add_argument(
        "--image_gate",
        default="refuse",
        choices=image_gate.POLICIES,
        help="what becomes of a picture whose pixels are no chest film's (docs/inputs.md, section 5)",
    )
    parser.add_argument(
        "--study", action="store_true", help="all files are films of one study, and read together"
    )
    parser.add_argument(
        "--roles",
        metavar="ROLE,..",
        help=f"what the films of --study are, in the order of the files: {', '.join(ROLES)}",
    )
    parser.add_argument(
        "--number_images", action="store_true", help='write "Picture n: " before each image'
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    _add_output_flags(parser)
    parser.add_argument(
        "--read_anyway", action="store_true", help="also read what is no frontal chest radiograph"
    )
    arguments = parser.parse_args(argv)
    _check_study(arguments)
    _check_outputs(arguments)
    return arguments


def _add_output_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--sr", metavar="F.dcm", help="write the reading as DICOM SR (TID 1500)")
    parser.add_argument("--fhir", metavar="F.json", help="write the reading as a FHIR R4B bundle")
    parser.add_argument(
        "--codes",
        default="standard",
        choices=codes.CHOICES,
        help="of --sr and --fhir: SNOMED CT and DICOM's, or our own alone",
    )
    parser.add_argument(
        "--subject", metavar="ID", help="of --fhir: an opaque identifier of the patient"
    )


def _check_study(arguments: argparse.Namespace) -> None:
    """Read --roles, and refuse what does not fit the files. Raises UserError."""
    if arguments.roles is None:
        return
    if not arguments.study:
        raise UserError("--roles: says what the films of one study are: give --study, too")
    try:
        arguments.roles = split_roles(arguments.roles)
    except UserError as error:
        raise UserError(f"--roles: {error}") from None
    if "frontal" not in arguments.roles:
        raise UserError("--roles: frontal must be among them: it is the film that is asked about")
    if len(arguments.roles) != len(arguments.images):
        raise UserError(f"--roles: {len(arguments.roles)} roles, {len(arguments.images)} files")


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse places for --sr and --fhir before anything is read for them. Raises UserError."""
    places = [place for place in (arguments.sr, arguments.fhir) if place is not None]
    if places and len(arguments.images) > 1 and not arguments.study:
        raise UserError("--sr, --fhir: of one film, or of one study (--study)")
    for place in places:
        whole_files.check_output(place, arguments.images)
    # One would replace the other.
    if len(places) == 2 and os.path.realpath(places[0]) == os.path.realpath(places[1]):
        raise UserError("--sr, --fhir: two files of one name")


def _whole_number_from(least: int) -> Callable[[str], int]:
    def parse(argument: str) -> int:
        number = int(argument)
        if not least <= number < 2**31:
            raise ValueError
        return number

    parse.__name__ = f"whole number from {least} to 2^31 - 1"  # argparse puts it in its message
    return parse


def read_all(arguments: argparse.Namespace) -> int:
    """Read and print every image in the order given; return 2 if one could not be read, else 0."""
    together = [arguments.images] if arguments.study else [[path] for path in arguments.images]
    options = ReadingOptions(
        model=arguments.model,
        prompt=check_prompt(arguments.prompt, len(together[0])),
        samples=arguments.samples,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        constrained=arguments.constrained,
    )
    model, why_shares, any_failed = None, None, False
    for paths in together:
        try:
            films = _read_films(paths, arguments)
        except UserError as error:
            # The other images are still answered.
            if arguments.debug:
                traceback.print_exc()
            print(f"error: {printable(error)}", file=sys.stderr, flush=True)
            any_failed = True
            continue
        if model is None:  # only now: a call without one usable image answers at once
            model = _load(arguments.model, arguments.grids, arguments.max_pixels)
            model.number_images = arguments.number_images
            why_shares = why_no_probabilities(model)
            if not arguments.json:
                print(NOT_FOR_DIAGNOSIS)
        reading = read_films(model, films, options, why_shares)
        record = reading.record
        # Before it is shown: who sees the reading has its files.
        if arguments.sr or arguments.fhir:
            _write_outputs(arguments, model, films, reading)
        # At once, so that a reader need not wait for the last image.
        if arguments.json:
            print(json.dumps(record), flush=True)
        else:
            print("\n" + as_text(record, arguments.samples, why_shares), flush=True)
    if model is not None and not arguments.json:
        # Each new shape of an image compiles programs: `--grids=bucket` makes them fewer.
        counts = [f"{program} {count}" for program, count in model.programs().items()]
        print(f"compiled programs: {', '.join(counts)}", file=sys.stderr)
    return 2 if any_failed else 0


def _read_films(paths: list[str], arguments: argparse.Namespace) -> list[Film]:
    """Read the files that are looked at together; a study is not read without one of its films. Raises UserError."""
    if len(set(map(_identify_file, paths))) < len(paths):
        raise UserError("--study: a file is named twice")
    # Before any is judged: what a film is to the others says what it is held to be.
    loaded = [images.read_image(path, arguments.renderer) for path in paths]
    films = [Film(paths[0], loaded[0])]
    if arguments.study:
        # Words of the question's own name the films as the files come.
        in_order = IMAGE_MARK in arguments.prompt
        films = study_of(paths, loaded, arguments.roles, in_order)
    if arguments.sr:
        from cxr_jax.outputs import export
        from cxr_jax.outputs.dicom_source import read_source

        # Now, and not after a minute of reading.
        for file in export.read_films(paths):
            read_source(file.name, file.data)
    for film in films:
        check_usable(film.path, film.image, arguments.read_anyway, arguments.image_gate)
    return films


def _write_outputs(
    arguments: argparse.Namespace, model: "Model", films: list[Film], reading: FilmReading
) -> None:
    """Write --sr and --fhir, each whole or not at all. Raises UserError."""
    # Here: they bring pydicom, which a picture without outputs does not need.
    from cxr_jax.outputs import document, export
    from cxr_jax.outputs.trace_sentences import find_words

    files = export.read_films([film.path for film in films])
    facts = [
        document.image_facts(hashlib.sha256(file.data).hexdigest(), film.image, film.role)
        for file, film in zip(files, films, strict=True)
    ]
    record = reading.record
    # A study is of its frontal film, wherever it stands among the others.
    first = next((at for at, film in enumerate(films) if film.role in (None, "frontal")), 0)
    order = [first, *(at for at in range(len(films)) if at != first)]
    built = document.build(
        facts[first],
        document.ModelFacts(
            # Its name, and no path of this machine.
            name=as_utf8(Path(arguments.model).name) or "model",
            weights_sha256=record["weights_sha256"],
            words=find_words(model.folder),
        ),
        document.CompletionFacts(
            text=reading.completion.text,
            finish_reason=reading.completion.finish_reason,
            prompt=record["prompt"],
            seed=record["seed"],
            probabilities=record["probabilities"],
            warnings=record["warnings"],
        ),
        [facts[at] for at in order[1:]],
    )
    settings = export.ExportSettings(at=_now(), codes=arguments.codes, subject=arguments.subject)
    in_order = [files[at] for at in order]
    # Both are made before either is written: a refusal leaves nothing.
    made = [
        (place, export.export(kind, built, in_order, settings))
        for place, kind in ((arguments.sr, "sr.dcm"), (arguments.fhir, "fhir.json"))
        if place is not None
    ]
    for place, data in made:
        try:
            whole_files.write_bytes(place, data)
        except OSError as error:
            raise UserError(f"{place}: cannot be written ({error.strerror})") from None


def _now() -> str:
    """The time of the reading, in UTC; SOURCE_DATE_EPOCH, where it is set, for files that can be made again."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = int(epoch) if epoch.isdigit() and len(epoch) < 12 else int(time.time())
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _identify_file(path: str) -> tuple[int, int] | str:
    """What all names of a file have in common; of none its name, which is refused when it is read."""
    # Links and other ways to write a path lead to one place on the disk.
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return path
    return status.st_dev, status.st_ino


def _load(name_or_dir: str, grids: str, max_pixels: int | None) -> "Model":
    import cxr_jax

    # Keep stderr for our own lines: transformers would say there that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    limit: dict[str, Any] = {} if max_pixels is None else {"max_pixels": max_pixels}
    return cxr_jax.load(name_or_dir, grids=grids, **limit)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. No traceback unless --debug.

    Returns:
        The exit code: 0 all read, 2 bad usage or bad input, 1 the reading failed.
    """
    return exit_code(lambda: read_all(parse_args(argv)), debug=wants_debug(argv), failure=_failure)


def _failure(error: BaseException) -> str:
    """Return one line for an error that is nobody's input."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped before the end"
    # Libraries raise over many lines: the first one says most.
    first_line = (str(error).splitlines() or [""])[0]
    return f"the reading failed ({type(error).__name__}): {first_line}"


if __name__ == "__main__":
    sys.exit(main())
