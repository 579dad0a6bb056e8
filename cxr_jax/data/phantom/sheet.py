"""The old name of scripts/phantom_sheet.py, which is for maintainers and no part of the package any more."""

import sys

if __name__ == "__main__":
    sys.exit(
        "error: python -m cxr_jax.data.phantom.sheet is now python scripts/phantom_sheet.py, in the repository"
    )
