"""Reads chest radiographs: `python -m cxr_jax.predict IMAGE... [--model=NAME_OR_DIR] [--json]`.

For each PNG, JPEG or DICOM file: the reasoning, the answer list, and a probability for each of the 14 labels.
The model reasons `--samples` times (temperature 1) beside the greedy reading that is shown; after each of these
traces, its own probability that the answer names the label is computed over all valid answers, and the mean over the
traces is given (with `--samples=0`: after the greedy trace). It says how sure the model is, and is no calibrated
risk. For a tokenizer that cannot express valid answers it is the share of the samples whose answer names the label
(without samples: 1 for the labels of the answer), and a warning says so.

`--constrained` forces the reading that is shown to end with a valid answer list. `--grids=bucket` pads images to few
shapes, see `cxr_jax.models.loaded.Model`.

A file that cannot be read, or that is visibly no frontal chest radiograph (lateral, other body part, blank,
colour), gets one line on stderr and no report; `--read_anyway` reads the latter kind. Research use only. Not
for diagnosis.
"""

import argparse
import json
import os
import re
import sys
import traceback

from cxr_jax.data import images, radiograph
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.errors import UserError, bad_usage
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.weights import hf_folder

NOTICE = "Research use only. Not for diagnosis."
_FORMAT = re.compile(
    r"^<think>.*?</think>\s*<answer>.*?</answer>$", re.DOTALL
)  # the reward's own pattern
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BY_LOWER = {name.lower(): name for name in CHEXPERT_14}


# One completion -> its parts


def split_answer(text):
    """-> (labels of the first <answer>, in the order written; other names in it), or None without an answer.

    The semantics of the accuracy reward: split at commas, strip, compare in lower case.
    """
    found = _ANSWER.search(text)
    if not found:
        return None
    items = [item.strip() for item in found.group(1).split(",")]
    labels = [_BY_LOWER[item.lower()] for item in items if item.lower() in _BY_LOWER]
    return list(dict.fromkeys(labels)), [
        item for item in items if item and item.lower() not in _BY_LOWER
    ]


def reasoning_of(text):
    """The text of the first <think> element, as far as it goes; without the tag, what precedes <answer>."""
    start = text.partition("<think>")
    body = start[2] if start[1] else start[0]
    return re.split(r"</think>|<answer>", body, maxsplit=1)[0].strip()


def answer_warnings(text, finish_reason):
    """What is wrong with a completion, in plain words."""
    notes = []
    if finish_reason == "length":
        notes.append("the answer was cut at the length limit")
    split = split_answer(text)
    if split is None:
        return [*notes, "the model gave no answer list"]
    labels, others = split
    if others:
        notes.append(
            f"{len(others)} names in the answer are none of the 14 labels and were dropped"
        )
    if "No Finding" in labels and set(labels) - {"No Finding", "Support Devices"}:
        notes.append("the answer contradicts itself: No Finding beside a finding")
    return notes


def shares(texts):
    """For each of the 14 labels, the share of the texts whose answer names it; no answer names none."""
    named = [set((split_answer(text) or ([], []))[0]) for text in texts]
    return {label: sum(label in names for names in named) / len(named) for label in CHEXPERT_14}


# One image -> its report


def usable(path, renderer, read_anyway=False):
    """Read one file. Raises UserError also for a picture that is visibly no frontal chest radiograph."""
    image = images.read_image(path, renderer)
    if image.meta["unusable"] and not read_anyway:
        reasons = "; ".join(image.meta["unusable"])
        raise UserError(f"{path}: not read: {reasons} (--read_anyway reads it all the same)")
    return image


def why_no_probabilities(model):
    """Why the model's tokenizer cannot express valid answers; None if it can. Takes seconds, once."""
    try:
        model.answers  # noqa: B018  compiled on first use
    except UserError as error:
        return str(error)
    return None


def report(model, path, image, args, unable=None):
    """The record of one image: exactly the keys of `--json`. unable: see `why_no_probabilities`."""
    read = model.read(
        image.pixels,
        args.prompt,
        args.samples,
        args.max_new_tokens,
        args.seed,
        constraint="answers" if args.constrained else None,
        probabilities=unable is None,
    )
    reading, notes = read.shown, []
    if unable is not None:
        notes = [f"the probabilities are shares of sampled answers: {unable}"]
    labels, _ = split_answer(reading.text) or ([], [])
    return {
        "image": str(path),
        "model": args.model,
        "weights_sha256": hf_folder.weights_sha256(model.folder),
        "renderer": image.meta["renderer"],
        "prompt": args.prompt,
        "seed": args.seed,
        "reasoning": reasoning_of(reading.text),
        "answer": labels,
        "probabilities": read.probabilities or shares([c.text for c in read.samples or [reading]]),
        "valid_format": _FORMAT.match(reading.text) is not None,
        "warnings": [
            *image.meta["warnings"],
            *answer_warnings(reading.text, reading.finish_reason),
            *notes,
        ],
    }


def as_text(record, samples, unable=None):
    """The record for a reader; unable as for `report`.

    Control characters of model text are dropped: they can rewrite a screen.
    """
    clean = lambda text: re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    likely = sorted(record["probabilities"].items(), key=lambda item: -item[1])
    traces = f"mean over {samples} sampled traces" if samples else "after the trace above"
    if unable is not None:
        traces = (
            f"share of {samples} sampled answers" if samples else "1 for the labels of the answer"
        )
    lines = [
        record["image"],
        f"  model {record['model']}, renderer {record['renderer']}, seed {record['seed']}",
        f"  Reasoning: {clean(record['reasoning']) or '(none)'}",
        f"  Answer: {', '.join(record['answer']) or '(none)'}",
        f"  Probability that the answer names it ({traces}; no calibrated risk):",
        *(f"    {p:5.0%}  {label}" for label, p in likely if p >= 0.005),
    ]
    if not record["valid_format"]:
        lines.append("  Warning: the model did not keep to its answer format")
    lines += [f"  Warning: {note}" for note in record["warnings"]]
    return "\n".join(lines)


# Command line


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m cxr_jax.predict",
        description=f"Reads chest radiographs. {NOTICE}",
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG, JPEG or DICOM file")
    parser.add_argument(
        "--model", default="phantom", help="embedded model, Hugging Face folder or workdir of a run"
    )
    parser.add_argument("--prompt", default=FIND_PROMPT)
    parser.add_argument(
        "--samples",
        type=_count(0),
        default=8,
        help="sampled traces behind the probabilities (default 8)",
    )
    parser.add_argument("--max_new_tokens", type=_count(1), default=512)
    parser.add_argument("--seed", type=_count(0), default=0)
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
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--read_anyway", action="store_true", help="also read what is no frontal chest radiograph"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")

    parser.error = bad_usage
    return parser.parse_args(argv)


def _count(least):
    def parse(text):
        value = int(text)
        if not least <= value < 2**31:
            raise ValueError
        return value

    parse.__name__ = f"whole number from {least} to 2^31 - 1"  # argparse puts it in its message
    return parse


def read_all(args) -> int:
    """Read and print every image in the order given; 2 if one could not be read, else 0."""
    model, unable, failed = None, None, False
    for path in args.images:
        try:
            image = usable(path, args.renderer, args.read_anyway)
        except UserError as error:
            if args.debug:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        if model is None:  # only now: a call without one usable image answers at once
            import cxr_jax

            # Keep stderr for our own lines: transformers would say there that torch is missing.
            os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
            model = cxr_jax.load(args.model, grids=args.grids)
            unable = why_no_probabilities(model)
            if not args.json:
                print(NOTICE)
        record = report(model, path, image, args, unable)
        print(
            json.dumps(record) if args.json else "\n" + as_text(record, args.samples, unable),
            flush=True,
        )
    if model is not None and not args.json:
        counts = ", ".join(f"{kind} {count}" for kind, count in model.programs().items())
        print(f"compiled programs: {counts}", file=sys.stderr)
    return 2 if failed else 0


def main(argv=None) -> int:
    """Exit code: 0 all read, 2 bad usage or bad input, 1 the reading failed. No traceback unless --debug."""
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        return read_all(parse_args(argv))
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = (str(error).splitlines() or [""])[0]
        if isinstance(error, UserError):
            print(f"error: {reason}", file=sys.stderr)
            return 2
        print(f"error: the reading failed ({type(error).__name__}): {reason}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
