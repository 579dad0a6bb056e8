"""Tables of data sets, made by tests, and what `python -m cxr_jax.data.sources` says of them."""

import csv
import gzip
import io
import json
import random

from cxr_jax.data.sources.__main__ import main
from cxr_jax.labels.taxonomy import CHEXPERT_14

STATES: dict[str, int | None] = {
    "1.0": 1,
    "1": 1,
    "0.0": 0,
    "0": 0,
    "-1.0": -1,
    "-1": -1,
    "": None,
    "U": -1,
    "nan": None,
}
# How a table may be written and still say the same.
SPELLINGS = ("plain", "gzip", "mark", "crlf", "shuffled", "quoted", "blanks", "case")


def write_table(path, header, rows, spelling="plain", seed=0):
    """A table, its columns and cells written one way or another."""
    # Texts for short: names between commas, cells between bars.
    header = header.split(",") if isinstance(header, str) else header
    rows = [row.split("|") if isinstance(row, str) else row for row in rows]
    order = list(range(len(header)))
    if spelling == "shuffled":
        random.Random(seed).shuffle(order)
    # Names are found whatever their case.
    if spelling == "case":
        header = [name.upper() for name in header]
    if spelling == "blanks":
        rows = [[f" {cell} " for cell in row] for row in rows]
    text = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if spelling == "quoted" else csv.QUOTE_MINIMAL
    end = "\r\n" if spelling == "crlf" else "\n"
    writer = csv.writer(text, lineterminator=end, quoting=quoting)
    for row in (header, *rows):
        writer.writerow([row[place] for place in order])
    content = text.getvalue().encode()
    if spelling == "mark":
        content = b"\xef\xbb\xbf" + content
    path.parent.mkdir(parents=True, exist_ok=True)
    if spelling == "gzip":
        path, content = path.with_name(path.name + ".gz"), gzip.compress(content)
    path.write_bytes(content)


def run(capsys, tmp_path, name, root, *flags):
    """The exit code, the rows that were written, stdout, stderr."""
    out = tmp_path / "out.jsonl"
    # What a run before has left would look like this one's.
    out.unlink(missing_ok=True)
    code = main([name, str(root), f"--out={out}", *flags])
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else None
    return code, rows, printed.out, printed.err


def cells_of(row):
    states = [row["labels"][label] for label in CHEXPERT_14]
    return (row["image"], row["patient_id"], row["study_id"], row["view"], row["split"], states)
