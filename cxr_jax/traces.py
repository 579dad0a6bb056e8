"""Reports -> reasoning-style SFT rows, each verified: `cxr-jax traces IN... -o OUT.jsonl` (`python -m cxr_jax.traces`).

IN is what `cxr-jax label` reads: a table (.csv, .tsv, .jsonl, .json, also .gz), a .txt, an Open-i .xml, or a folder of
either. Of a table also the film (image, path, .. or --image_column), the patient and study, and the labels: columns by
the names of the 14 (1, 0, -1 or U, blank), perhaps "<Label> side", or an object `labels`.

A row is in the published form of sft.jsonl: id, image, subject_id, study_id, solution, messages (and labels, policy).
Its text is <think>trace</think><answer>labels</answer>. The trace is the report's own sentences in the radiologist's
order (quality, devices, airways, lungs, pleura, mediastinum, hila, heart, abdomen, bones, summary): nothing is added,
no normal statement either. Comparisons with other films are left out ("stable cardiomegaly" is cardiomegaly), since a
model that sees one film cannot see them; see --comparisons. The answer is by the labels, where there are
any, else by the report; what is uncertain is in it with --uncertain=positive only.

Each trace is read back by the report parser and kept only if states and sides of all 14 labels are those of the report,
if every sentence stands on one of the report's, and if the labels agree with it. Which reports gave no row, and why, is
in OUT.rejected.jsonl (ids, rows and reasons, no text).

--endpoint=URL --model=NAME has the traces written by a model behind an OpenAI-compatible server on this machine, and
reads them back in the same way; another machine only with --allow_remote.

Exit codes: 0 done; 1 the run failed; 2 bad usage, bad input (the first bad row is named, and nothing is written), or no
row at all. docs/traces.md has the details. Research use only. Not for diagnosis.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data import report_files
from cxr_jax.data.prompts import FIND_PROMPT, check_prompt
from cxr_jax.data.report_sections import SECTIONS
from cxr_jax.data.sources.policy import BLANK_CHOICES, UNCERTAIN_CHOICES, LabelPolicy
from cxr_jax.errors import UserError, exit_code, failure_without_text, printable
from cxr_jax.runtime import interrupts

if TYPE_CHECKING:
    from cxr_jax.data.traces import rows

COMPARISONS = ("drop", "needed", "keep")

# ---- Flags -----------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.traces", description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="IN", help="table, .txt, .xml or folder")
    parser.add_argument("-o", "--out", required=True, metavar="OUT.jsonl")
    parser.add_argument("--rejected", metavar="FILE", help="default: OUT.rejected.jsonl")
    parser.add_argument("--text_column", metavar="NAME", help="column of the report")
    parser.add_argument("--id_column", metavar="NAME", help="column of the id")
    parser.add_argument("--image_column", metavar="NAME", help="column of the film's path")
    parser.add_argument("--one_report", action="store_true", help="IN.txt is one report")
    parser.add_argument("--lexicon", metavar="FILE", help="other phrases than the built-in ones")
    parser.add_argument("--prompt", default=FIND_PROMPT, help="what is asked of every film")
    parser.add_argument(
        "--blank",
        choices=BLANK_CHOICES,
        default=BLANK_CHOICES[0],
        help="what a blank label counts as (default: unknown)",
    )
    parser.add_argument(
        "--uncertain",
        choices=UNCERTAIN_CHOICES,
        default=UNCERTAIN_CHOICES[0],
        help="what an uncertain label counts as (default: unknown, and not in the answer)",
    )
    parser.add_argument(
        "--comparisons",
        choices=COMPARISONS,
        default=COMPARISONS[0],
        help="comparisons with other films: drop (default): left out; needed: kept where a finding cannot be told "
        "without; keep",
    )
    _add_endpoint(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT and the file of rejected")
    args = parser.parse_args(argv)
    for name in ("text_column", "id_column", "image_column", "lexicon", "rejected", "model"):
        if getattr(args, name) == "":
            raise UserError(f"--{name} is empty")
    _check_endpoint_flags(args)
    return args


def _add_endpoint(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("traces by a model")
    group.add_argument("--endpoint", metavar="URL", help="http://127.0.0.1:8000/v1, for example")
    group.add_argument("--model", metavar="NAME", help="the model's name there")
    group.add_argument(
        "--allow_remote", action="store_true", help="send report text to another machine"
    )
    group.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="for one answer"
    )
    group.add_argument(
        "--tries", type=int, default=2, metavar="N", help="traces looked at for a report"
    )
    group.add_argument("--parallel", type=int, default=1, metavar="N", help="requests at a time")
    group.add_argument(
        "--key_variable", metavar="NAME", help="the environment variable with the server's key"
    )


def _check_endpoint_flags(args: argparse.Namespace) -> None:
    if (args.endpoint is None) != (args.model is None):
        raise UserError("--endpoint and --model go together")
    if args.endpoint is None and (args.allow_remote or args.key_variable):
        raise UserError("--allow_remote and --key_variable are of an --endpoint")
    for name, low, high in (("timeout", 0.1, 3600), ("tries", 1, 10), ("parallel", 1, 64)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} is not between {low:g} and {high}")


def check_out(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return the paths of OUT and of the file of rejected reports, links resolved.

    Raises:
        UserError: for a pair that must not be written.
    """
    if not args.out.lower().endswith(".jsonl"):
        raise UserError(f"{args.out}: OUT must be named .jsonl")
    out = Path(os.path.realpath(args.out))
    # Links are resolved first, so that both files are held against the inputs as they are.
    rejected = out.with_suffix(".rejected.jsonl")
    if args.rejected is not None:
        rejected = Path(os.path.realpath(args.rejected))
    if rejected == out:
        raise UserError("--rejected is OUT")
    inputs = {os.path.realpath(name) for name in (*args.inputs, args.lexicon or "") if name}
    for path in (out, rejected):
        if str(path) in inputs:
            raise UserError(f"{path}: is an input, and would be overwritten")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no such folder")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: exists and is not a file")
        if path.exists() and not args.force:
            raise UserError(f"{path}: exists; --force replaces it")
    return out, rejected


# ---- The command -----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Write the rows; print the summary.

    Returns:
        The exit code: 0, or 2 where no report gave a row.

    Raises:
        UserError: for bad usage or bad input; nothing is written then.
    """
    out, rejected = check_out(args)
    # A row with a question that cannot be asked would be refused when it trains.
    prompt = check_prompt(args.prompt)
    options = report_files.Options(
        text_column=args.text_column,
        id_column=args.id_column,
        sections=SECTIONS,
        one_report=args.one_report,
        with_cells=True,
    )
    inputs = report_files.open_inputs(args.inputs, options)
    # JAX is imported here at the latest: after all that could be wrong with the flags.
    from cxr_jax.data.traces import files, rows

    making = rows.TraceOptions(
        prompt=prompt,
        policy=LabelPolicy(args.blank, args.uncertain),
        comparisons=args.comparisons,
        image_column=args.image_column,
        lexicon=args.lexicon,
        tries=args.tries,
    )
    # An endpoint is looked at before a report is read.
    writer = _open_writer(args)

    counts = rows.TraceCounts()
    with files.RowFiles(out, rejected, replace=args.force).open() as both:
        for made in rows.make_rows(report_files.read(inputs), making, counts, writer):
            both.write(made)
        if not counts.reports:
            raise UserError(f"{args.inputs[0]}: no reports")
    print(rows.summarise(args.out, counts, making))
    # Both files stand there: the second says what to mend.
    if not counts.kept:
        print(f"error: no report gave a row; {printable(rejected)} says why", file=sys.stderr)
        return 2
    if not counts.with_image:
        print(
            f"warning: {printable(args.out)}: no row names a film, so none can be trained on yet",
            file=sys.stderr,
        )
    return 0


def _open_writer(args: argparse.Namespace) -> "rows.Writer | None":
    """Return who writes the traces; None for the grammar. Raises UserError for a bad or forbidden address."""
    if args.endpoint is None:
        return None
    from cxr_jax.data.traces import endpoint

    server = endpoint.Endpoint(
        url=args.endpoint,
        model=args.model,
        timeout=args.timeout,
        parallel=args.parallel,
        key_variable=args.key_variable,
        allow_remote=args.allow_remote,
    )
    if warning := endpoint.check(server):
        print(warning, file=sys.stderr)
    return endpoint.writer(server)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. No traceback unless --debug.

    Returns:
        The exit code: 0 done, 2 bad usage, input or no row, 1 the run failed.
    """
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv), failure=_failure)


def _failure(error: BaseException) -> str:
    """One line for an error that is nobody's input."""
    return failure_without_text(error, "nothing was written")


def command() -> int:
    """Run as a program, which answers signals."""
    interrupts.on_interrupt(interrupts.raise_keyboard_interrupt, even_if_ignored=False)
    return main()


if __name__ == "__main__":
    sys.exit(command())
