"""Films of any source -> shards of ArrayRecord, which are a folder of tensorflow-datasets and a manifest as well.

    cxr-jax shards SOURCE OUT [--image_root=DIR] [--shard_mib=256]

`python -m cxr_jax.data.shards` is the same command. SOURCE: a manifest (rows.jsonl), whose films are below --image_root
(its own folder, if that is not given); or a data set in its own layout, NAME ROOT or NAME:ROOT as `cxr-jax sources`
takes it. Files are copied byte for byte, DICOM too; nothing is decoded. A command that was stopped goes on where it
was. A run reads OUT with --config.data.manifest=OUT/rows.jsonl --config.data.image_root=OUT; tensorflow-datasets with
builder_from_directory(OUT), or by name if OUT is DIR/NAME/1.0.0.

Exit codes: 0 done, 2 bad usage or bad input.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data.shards import shipment
from cxr_jax.data.shards.write import write
from cxr_jax.data.sources import sets
from cxr_jax.errors import UserError, exit_code, printable


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.data.shards", description=__doc__)
    parser.add_argument("source", metavar="SOURCE", nargs="+")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument(
        "--image_root", default="", help="where films lie (default: beside the manifest)"
    )
    parser.add_argument(
        "--shard_mib", type=int, default=256, help="MiB of films a shard (default: 256)"
    )
    args = parser.parse_args(argv)
    if args.shard_mib < 1:
        raise UserError(f"--shard_mib={args.shard_mib} must be a number of MiB from 1 on")
    return args


def _open(args: argparse.Namespace) -> shipment.Shipment:
    source, *others = args.source
    # A manifest, unless it begins with the name of a set.
    name, colon, root = source.partition(":")
    # nih:/data/nih is one word, and `nih /data/nih` says the same.
    if not others and colon and name in sets.SETS:
        others, source = [root], name
    if not others:
        return shipment.from_manifest(source, args.image_root or Path(source).parent)
    if len(others) > 1:
        raise UserError("SOURCE is a manifest, or NAME ROOT of a data set; then OUT")
    return shipment.from_data_set(source, others[0])


def run(args: argparse.Namespace) -> None:
    """Write the folder and print what it has."""
    shipped = _open(args)
    print(printable(write(shipped, Path(args.out), args.shard_mib)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the arguments of the process) and return the exit code."""
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
