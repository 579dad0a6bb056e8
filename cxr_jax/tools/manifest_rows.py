"""The old name of `python -m cxr_jax.data.sources.label_table`, kept for one release."""

import sys

from cxr_jax.data.sources.label_table import main

if __name__ == "__main__":
    print(
        "note: python -m cxr_jax.tools.manifest_rows is now python -m cxr_jax.data.sources.label_table",
        file=sys.stderr,
    )
    sys.exit(main())
