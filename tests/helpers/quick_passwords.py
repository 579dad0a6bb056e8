"""Passwords that are hashed by the same argon2id with little memory: for tests that are about something else."""

import contextlib

from cxr_jax.store.records import users


@contextlib.contextmanager
def quick_passwords():
    before = users._HASHER
    users._HASHER = users.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    users._nobodys_hash.cache_clear()
    try:
        yield
    finally:
        users._HASHER = before
        users._nobodys_hash.cache_clear()
