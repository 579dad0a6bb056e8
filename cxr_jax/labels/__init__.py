"""The 14 labels, and the parser that reads them from a completion, on the device."""

from cxr_jax.labels.parser import TokenBytes, parse_answers, parse_bytes, parse_texts, parse_tokens
from cxr_jax.labels.taxonomy import CHEXPERT_14

__all__ = ["CHEXPERT_14", "TokenBytes", "parse_answers", "parse_bytes", "parse_texts", "parse_tokens"]
