"""The 14 labels, and the parsers that read them on the device: from a completion's answer, and from free text.

The names alone need no JAX, so that programs which compute nothing start in a moment; parsers load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cxr_jax.labels.taxonomy import CHEXPERT_14

if TYPE_CHECKING:
    from cxr_jax.labels.answers import (
        TokenBytes,
        parse_answers,
        parse_bytes,
        parse_texts,
        parse_tokens,
    )
    from cxr_jax.labels.report_text import parse_reports, read_reports

# Name -> the module that it is loaded from.
_PARSERS = dict.fromkeys(
    ("TokenBytes", "parse_answers", "parse_bytes", "parse_texts", "parse_tokens"), "answers"
) | dict.fromkeys(("parse_reports", "read_reports"), "report_text")
_SUBMODULES = ("answers", "report_text")

__all__ = [
    "CHEXPERT_14",
    "TokenBytes",
    "parse_answers",
    "parse_bytes",
    "parse_reports",
    "parse_texts",
    "parse_tokens",
    "read_reports",
]


def __getattr__(name: str) -> Any:
    # Submodules that were there after `import cxr_jax.labels` still are.
    if name in _SUBMODULES:
        return importlib.import_module(f"cxr_jax.labels.{name}")
    if name in _PARSERS:
        return getattr(importlib.import_module(f"cxr_jax.labels.{_PARSERS[name]}"), name)
    raise AttributeError(f"module 'cxr_jax.labels' has no attribute {name!r}")
