"""The 14 labels, and the parsers that read them on the device: from a completion's answer, and from free text."""

from cxr_jax.labels.answers import TokenBytes, parse_answers, parse_bytes, parse_texts, parse_tokens
from cxr_jax.labels.report_text import parse_reports, read_reports
from cxr_jax.labels.taxonomy import CHEXPERT_14

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
