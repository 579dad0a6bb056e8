"""Runs commands in processes of their own, at the price of one import: each is a fork of one that has imported all.

As a program: reads lines of JSON, each what to start or which process to look after, and answers each by a line. It
stays for the calls of the next test, and ends with the process of tests. What a run makes of files alone, before its
first array (the reader of reports, the phantom's tokenizer), it makes before it forks, too.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from places import ROOT

# What `cxr_jax.main` and `cxr_jax.plan` leave to the functions that need it: imported once here, and not in every call.
WHAT_A_RUN_IMPORTS = (
    "cxr_jax.evaluation.run",
    "cxr_jax.plan",
    "cxr_jax.rl.loop",
    "cxr_jax.sft.loop",
    "cxr_jax.training.image_checks",
    "grain",
    "tensorboardX",
)
_importers: dict = {}  # by what JAX reads of the environment when it is imported
_lock = threading.Lock()  # a question and its answer


# ---- For tests ---------------------------------------------------------------------------------------


class Process:
    """A command that runs, as `subprocess.Popen` shows one."""

    def __init__(self, importer, pid, out, err):
        self.pid, self.returncode = pid, None
        self._importer, self._files = importer, (out, err)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self._importer, {"pid": self.pid})
        return self.returncode

    def communicate(self, timeout=300) -> tuple[str, str]:
        """Wait for the end: stdout and stderr. AssertionError where it takes longer."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"no end within {timeout} s: {self._texts()}")
            time.sleep(0.02)
        return self._texts()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _texts(self):
        return tuple(Path(file.name).read_text() for file in self._files)


def start(argv, module="cxr_jax.main", env=os.environ) -> Process:
    """Start `python -m MODULE ARGV...`, or a script's file, with these variables."""
    # pytest writes down which test is running, which no command may depend on.
    variables = {name: value for name, value in env.items() if name != "PYTEST_CURRENT_TEST"}
    # The small programs of a run take seconds, too.
    variables |= {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    files = [tempfile.NamedTemporaryFile() for _ in range(2)]
    importer = _importer(variables)
    request = {"argv": list(map(str, argv)), "module": module, "env": variables}
    pid = _ask(importer, request | {"files": [file.name for file in files]})
    return Process(importer, pid, *files)


def calls(argument_lists, timeout=300, **options) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of a command for each list of arguments, one after the other; see `start`."""
    answers = []
    for argv in argument_lists:
        process = start(argv, **options)
        out, err = process.communicate(timeout)
        answers.append((process.returncode, out, err))
    return answers


def _importer(variables) -> subprocess.Popen:
    key = frozenset(pair for pair in variables.items() if pair[0].startswith("JAX_"))
    if key not in _importers or _importers[key].poll() is not None:
        _importers[key] = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=variables,
            start_new_session=True,
        )
        atexit.register(_end, _importers[key])
    return _importers[key]


def _ask(importer, request):
    with _lock:
        importer.stdin.write(json.dumps(request).encode() + b"\n")
        importer.stdin.flush()
        answered, _, _ = select.select([importer.stdout], [], [], 120)
        line = importer.stdout.readline() if answered else b""
    if not line:  # too late, or it has ended by itself, with its reason on stderr
        _end(importer)
        raise AssertionError("the process that forks gave no answer")
    return json.loads(line)


def _end(importer):
    # Whatever it has forked ends with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(importer.pid, signal.SIGKILL)
    importer.communicate()


# ---- The process that forks --------------------------------------------------------------------------


def _prepare():
    # No JAX array is made here: its threads would not survive the fork. What is traced by shapes alone does.
    for module in ("cxr_jax.main", *WHAT_A_RUN_IMPORTS):
        importlib.import_module(module)
    import jax
    import numpy as np

    from cxr_jax import phantom
    from cxr_jax.labels import answers, phrase_bank
    from cxr_jax.phantom import texture
    from cxr_jax.weights import pretrained

    pretrained.load_tokenizer("random:phantom")
    phrase_bank.load_phrase_bank(None, phantom.LEXICON)
    answers._machines()
    texture.tree_bank()
    keys = jax.eval_shape(lambda: phantom.example_keys(0, "train", "A", np.zeros(1)))
    for hospital in phantom.HOSPITALS:
        scenes = jax.eval_shape(lambda keys, of=hospital: phantom.scenes_of(keys, of, None), keys)
    jax.eval_shape(phantom._batch, scenes)


def _fork(argv, module, env, files) -> int:
    """Its process id. The child never comes back."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in enumerate(files, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
        code = _run(argv, module)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(BaseException):
        # As Python ends, but for what is only memory.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


def _run(argv, module) -> int | None:
    if module.endswith(".py"):
        sys.argv = [module, *argv]
        sys.path.insert(0, str(Path(module).parent))
        runpy.run_path(module, run_name="__main__")
        return 0
    command = importlib.import_module(module)
    sys.argv = [command.__file__, *argv]  # where ml_collections looks for overrides
    return command.main()


def _look_after(pid) -> int | None:
    """The exit code of a process that has ended."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    _prepare()
    for line in questions:
        request = json.loads(line)
        answer = _look_after(request["pid"]) if "pid" in request else _fork(**request)
        print(json.dumps(answer), file=answers, flush=True)
