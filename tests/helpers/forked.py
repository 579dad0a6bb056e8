"""Runs `cxr_jax.main`, or another command, many times at the price of one import: each call is a fork with own flags.

As a program, of the command's module: reads lines of JSON, each a list of argument lists, and answers each by a line,
a list of [exit code, stdout, stderr]. It stays for the calls of the next test, and ends with the process of tests.
"""

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile

from places import ROOT

# What `cxr_jax.main` and `cxr_jax.plan` leave to the functions that need it: imported once here, and not in every call.
WHAT_A_RUN_IMPORTS = (
    "cxr_jax.evaluation.run",
    "cxr_jax.rl.loop",
    "cxr_jax.sft.loop",
    "cxr_jax.training.image_checks",
)
_importers: dict = {}  # by module and environment


def calls(
    argument_lists, timeout=300, module="cxr_jax.main", env=os.environ
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `python -m MODULE ARGS...` for each list of arguments."""
    # pytest writes down which test is running, which no command may depend on.
    variables = {name: value for name, value in env.items() if name != "PYTEST_CURRENT_TEST"}
    variables["PYTHONPATH"] = str(ROOT)
    key = (module, frozenset(variables.items()))
    if key not in _importers:
        _importers[key] = subprocess.Popen(
            [sys.executable, __file__, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=variables,
            start_new_session=True,
        )
        atexit.register(_end, _importers[key])
    importer = _importers[key]
    importer.stdin.write(json.dumps(argument_lists).encode() + b"\n")
    importer.stdin.flush()
    answered, _, _ = select.select([importer.stdout], [], [], timeout)
    line = importer.stdout.readline() if answered else b""
    if not line:  # too late, or it has ended by itself, with its reason on stderr
        _end(_importers.pop(key))
        raise AssertionError(f"{module} gave no answer within {timeout} s")
    return [tuple(answer) for answer in json.loads(line)]


def _end(importer):
    # Whatever it has forked ends with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(importer.pid, signal.SIGKILL)
    importer.communicate()


def _one(command, argv):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv = [command.__file__, *argv]  # where ml_collections looks for overrides
                code = command.main()
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return [code, *texts]


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    # No JAX array is made here: its threads would not survive the fork.
    from transformers import AutoTokenizer  # noqa: F401

    command = importlib.import_module(sys.argv[1])
    if sys.argv[1] in ("cxr_jax.main", "cxr_jax.plan"):
        for module in WHAT_A_RUN_IMPORTS:
            importlib.import_module(module)

    for line in sys.stdin:
        print(
            json.dumps([_one(command, argv) for argv in json.loads(line)]), file=answers, flush=True
        )
