"""Reports for the tests of `python -m cxr_jax.label`, and files of them."""

import gzip

from cxr_jax.data import report_files

SECRET = "Xyzzy"  # stands in every report; must never be in a message
EDEMA = f"{SECRET}. Edema."
NO_EDEMA = f"{SECRET}. No edema."


def write(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts_of(path, **options):
    return [
        report.text
        for report in report_files.read(
            report_files.open_inputs([path], report_files.Options(**options))
        )
    ]
