"""Rewards that the user brings along: functions by name, or handed over from Python. docs/own_rewards.md tells how.

There are two kinds, told apart by the names of their arguments:

    def reward(tokens, lengths, batch): ...   jitted, inside the rollout's program: int32 [P, G, C], int32 [P, G], a
                                              dict of arrays [P, ..] -> numbers [P, G]
    def reward(texts, rows): ...              Python, called once a rollout on the host: N texts, N dicts -> N numbers
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.config.reward_names import RewardName, parse
from cxr_jax.errors import UserError
from cxr_jax.rewards.terms import TERMS

# Of the time limit of a step: what takes longer ends the process as it stands, and saves nothing.
SHARE_OF_STEP = 0.8
_ON_TOKENS, _ON_TEXTS = ("tokens", "lengths", "batch"), ("texts", "rows")
# Functions that Python code has handed over, by name: what a script defines cannot be imported again.
_handed_over: dict[str, Callable] = {}


class RewardError(UserError):
    """A reward of the user's that did not do what it should; the message names it and says what."""


@dataclass(frozen=True)
class OwnReward:
    """A reward of the user's.

    Attributes:
        name: in metrics, weights and the report.
        function: see the head of this module.
        on_texts: whether it is a Python function of texts, and not one of token ids.
        place: how messages call it.
    """

    name: str
    function: Callable
    on_texts: bool
    place: str

    def of_tokens(
        self, tokens: jax.Array, lengths: jax.Array, batch: Mapping[str, Any]
    ) -> jax.Array:
        """Compute the reward inside a program.

        Args:
            tokens: int32 [P, G, C]; what stands past the lengths is padding.
            lengths: int32 [P, G].
            batch: arrays [P, ..], see docs/own_rewards.md.

        Returns:
            float32 [P, G].

        Raises:
            RewardError: at trace time, if the function raises, or does not give that.
        """
        try:
            given = self.function(tokens, lengths, batch)
        except Exception as error:
            raise RewardError(f"{self.place} {_raised(error)}") from error
        # Python's own numbers and NumPy arrays are arrays to a program.
        try:
            values = jnp.asarray(given)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"{self.place} returned {_kind_of(given)}, not an array [P, G]"
            ) from error
        is_real = values.dtype == bool or jnp.issubdtype(values.dtype, jnp.integer)
        is_real |= jnp.issubdtype(values.dtype, jnp.floating)
        if values.shape != lengths.shape or not is_real:
            raise RewardError(
                f"{self.place} returned {values.dtype}{list(values.shape)}, not float32{list(lengths.shape)}: "
                "one number for each completion"
            )
        return values.astype(jnp.float32)

    def of_texts(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Compute the reward on the host.

        Args:
            texts: N completions.
            rows: what is known of the prompt of each.

        Returns:
            float32 [N], all finite.

        Raises:
            RewardError: if the function raises, or does not give that.
        """
        try:
            # Copies: a function that changes what it is given should change nothing here.
            given = self.function(list(texts), [dict(row) for row in rows])
        except Exception as error:
            raise RewardError(f"{self.place} {_raised(error)}") from error
        try:
            values = np.asarray(given)
        except ValueError:  # lists of unequal lengths
            values = np.array(None)
        if values.shape != (len(texts),) or values.dtype.kind not in "biuf":
            raise RewardError(
                f"{self.place} returned {_kind_of(given)}, not {len(texts)} numbers: one for each text"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            values = values.astype(np.float32)
        check_finite(self.place, values)
        return values


def check_finite(place: str, values: np.ndarray) -> None:
    """Refuse rewards that are no finite numbers.

    Raises:
        RewardError: saying how many.
    """
    if bad := int((~np.isfinite(values)).sum()):
        raise RewardError(
            f"{place} gave no finite number (NaN or infinity) for {bad} of {values.size} completions"
        )


def _raised(error: Exception) -> str:
    """What a message says of an error of the user's code: never its text, which may quote a report."""
    frames = traceback.extract_tb(error.__traceback__)
    # The innermost frame is often inside a library; the user looks for the line of their own.
    own = [frame for frame in frames[1:] if "site-packages" not in frame.filename] or frames
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    return f"raised {type(error).__name__} at {where} (--debug shows all of it)"


def _kind_of(given: Any) -> str:
    # The usual slip: a function that forgets to return.
    if given is None:
        return "None"
    try:
        return f"{type(given).__name__} of length {len(given)}"
    except TypeError:
        return type(given).__name__


# ---- Functions by name -------------------------------------------------------------------------------


def load(names: Sequence[str]) -> tuple[OwnReward, ...]:
    """Import the rewards of `config.rl.rewards`.

    Raises:
        UserError: for a name that leads to no function of one of the two kinds, or to that of a term.
    """
    return tuple(_load(name) for name in parse(names))


def _load(name: RewardName) -> OwnReward:
    place = f"config.rl.rewards: {name}"
    # Both would be one name in the metrics.
    if name.function in TERMS:
        raise UserError(f"{place}: a term of the reward is called {name.function!r}; rename yours")
    # What this process was given goes first: it may be newer than the file.
    function = _handed_over.get(str(name))
    if function is None:
        if name.module == "__main__" and not hasattr(sys.modules["__main__"], name.function):
            raise UserError(
                f"{place}: was handed over by a script: go on from that script, or name its file"
            )
        function = getattr(_import(name.module, place), name.function, None)
    if function is None:
        raise UserError(f"{place}: the module has no {name.function!r}")
    if not callable(function):
        raise UserError(f"{place}: is not callable, but {_kind_of(function)}")
    return OwnReward(name.function, function, _takes_texts(function, place), str(name))


def _import(module: str, place: str) -> ModuleType:
    try:
        if module.endswith(".py"):
            return _import_file(module)
        # The console script does not look where the user stands; `python -m` does.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        return importlib.import_module(module)
    # The message of an import says what is missing; of any other error only its kind.
    # A module may run anything as it is imported.
    except (Exception, SystemExit) as error:
        reason = (
            f"{type(error).__name__}: {error}" if isinstance(error, ImportError | OSError) else ""
        )
        raise UserError(
            f"{place}: cannot be imported ({reason or type(error).__name__})"
        ) from error


def _import_file(path: str) -> ModuleType:
    # Under a name of its own: two files may be called alike.
    name = f"_own_rewards_{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Once: a second reward of the same file is of the same module.
    # Before it runs, as Python does it: dataclasses and pickles look their module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _takes_texts(function: Callable, place: str) -> bool:
    """Whether a reward is one of texts; UserError for one of neither kind."""
    try:
        # Of an object with `__call__`, that of the call.
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = ()
    for kind, is_on_texts in ((_ON_TOKENS, False), (_ON_TEXTS, True)):
        if names[: len(kind)] == kind:
            return is_on_texts
    raise UserError(
        f"{place}: takes ({', '.join(names)}), but must take (tokens, lengths, batch), to be compiled, or "
        "(texts, rows), to be called from Python"
    )


def hand_over(function: Callable) -> str:
    """Make a function known by a name that `config.rl.rewards` may hold, in this process.

    Raises:
        UserError: for what has no name of its own.
    """
    # A lambda has a name that is none.
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise UserError(
            f"rewards: {name or _kind_of(function)} has no name: give a function by `def`"
        )
    full_name = f"{function.__module__}:{name}"
    _handed_over[full_name] = function
    return full_name


def fingerprints(rewards: Sequence[OwnReward]) -> dict[str, str]:
    """Give the SHA-256 of the code of each reward's file, "" where there is none: a run may go on with other code."""
    found = {}
    # The whole file, since a function calls others beside it.
    for reward in rewards:
        path = inspect.getsourcefile(inspect.unwrap(reward.function)) or ""
        code = Path(path).read_bytes() if os.path.isfile(path) else b""
        found[reward.name] = hashlib.sha256(code).hexdigest() if code else ""
    return found


# ---- A call that may hang ----------------------------------------------------------------------------


def call_within(
    seconds: float, reward: OwnReward, texts: Sequence[str], rows: Sequence[Any]
) -> np.ndarray:
    """Call `reward.of_texts` on a thread of its own, so that one which never returns can be left behind.

    Args:
        seconds: how long it may take; 0: as long as it likes.

    Raises:
        RewardError: as `of_texts`, and after that time.
    """
    results: list[np.ndarray | BaseException] = []

    def call() -> None:
        try:
            results.append(reward.of_texts(texts, rows))
        except BaseException as error:  # an exit, too, which would end the thread alone
            results.append(error)

    # A daemon, and not one of a pool: Python waits for those as it ends.
    thread = threading.Thread(target=call, name=f"reward {reward.name}", daemon=True)
    thread.start()
    thread.join(seconds or None)
    if not results:
        raise RewardError(
            f"{reward.place} has not returned within {seconds:g} s, {SHARE_OF_STEP:.0%} of config.step_timeout"
        )
    # Raised here, on the thread that can end the run.
    (result,) = results
    if isinstance(result, RewardError):
        raise result
    if isinstance(result, BaseException):
        raise RewardError(f"{reward.place} raised {type(result).__name__}") from result
    return result
