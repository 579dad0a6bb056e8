"""Reward terms of a completion: of its answer, of its trace, of its length. `score` takes texts."""

from cxr_jax.rewards.terms import (
    BYTES_PER_TOKEN,
    CHECKED,
    MIN_LENGTH,
    NGRAM,
    PUBLISHED,
    TERMS,
    TRACE_TERMS,
    combine,
    modal_share,
    read_bytes,
    read_tokens,
    repeated,
    reward_terms,
    weights,
)
from cxr_jax.rewards.text_scores import score, solution_mask

__all__ = [
    "BYTES_PER_TOKEN",
    "CHECKED",
    "MIN_LENGTH",
    "NGRAM",
    "PUBLISHED",
    "TERMS",
    "TRACE_TERMS",
    "combine",
    "modal_share",
    "read_bytes",
    "read_tokens",
    "repeated",
    "reward_terms",
    "score",
    "solution_mask",
    "weights",
]
