"""The old name of `python -m cxr_jax.evaluation.label_agreement`, kept for one release."""

import sys

from cxr_jax.evaluation.label_agreement import main

if __name__ == "__main__":
    print(
        "note: python -m cxr_jax.tools.agreement is now python -m cxr_jax.evaluation.label_agreement",
        file=sys.stderr,
    )
    sys.exit(main())
