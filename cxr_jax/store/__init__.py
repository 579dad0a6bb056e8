"""The durable truth of the reading room: an append-only, hash-chained table of events, and what folds from it."""

from cxr_jax.store.chain import Event, Head, canonical_json, parse_head, sha256_of, utc_now
from cxr_jax.store.core import Transaction
from cxr_jax.store.store import Store, folder_of, open_store
from cxr_jax.store.verifying import Problem

__all__ = [
    "Event",
    "Head",
    "Problem",
    "Store",
    "Transaction",
    "canonical_json",
    "folder_of",
    "open_store",
    "parse_head",
    "sha256_of",
    "utc_now",
]
