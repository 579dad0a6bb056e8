"""Runs `cxr_jax.main`, or another command, many times at the price of one import: each call is a fork with own flags.

As a program, of the command's module: reads a JSON list of argument lists, writes a JSON list of
[exit code, stdout, stderr].
"""

import importlib
import json
import os
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


def calls(
    argument_lists, timeout=300, module="cxr_jax.main", env=os.environ
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `python -m MODULE ARGS...` for each list of arguments."""
    done = subprocess.run(
        [sys.executable, __file__, module],
        input=json.dumps(argument_lists),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return [tuple(x) for x in json.loads(done.stdout.splitlines()[-1])]


def _one(command, argv):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 1
            try:
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
    # No JAX array is made here: its threads would not survive the fork.
    from transformers import AutoTokenizer  # noqa: F401

    command = importlib.import_module(sys.argv[1])
    if sys.argv[1] in ("cxr_jax.main", "cxr_jax.plan"):
        for module in WHAT_A_RUN_IMPORTS:
            importlib.import_module(module)

    print("\n" + json.dumps([_one(command, argv) for argv in json.load(sys.stdin)]))
