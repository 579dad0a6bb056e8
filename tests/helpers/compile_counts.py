"""Which programs are compiled meanwhile, as JAX itself reports it."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """The names of the jitted functions of whom a program is compiled, one for each program, as they come.

    A program that is read from the cache on disk counts; one that this process has already does not. What a jitted
    function tells of itself (`_cache_size`) is another matter: how many calls it knows the short way.
    """
    names: list[str] = []

    def hear(event: str, _seconds: float, *, fun_name: str = "", **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
