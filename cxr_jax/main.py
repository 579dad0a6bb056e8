"""Every run: `python -m cxr_jax.main --config=experiments/X.py[:preset] --workdir=DIR [--config.a.b=v] [--dry_run]`.

Several processes that are started with the same command and `CXR_*` variables (processes.py) are one run.
Exit codes: 0 done (or saved on SIGTERM), 1 the run failed, 2 bad usage or bad input (one line on stderr).
"""

import errno
import json
import os
import sys
import traceback

from absl import flags
from ml_collections import config_flags

from cxr_jax.config import command_line
from cxr_jax.config.sections import DataConfig, RunConfig
from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.runtime import processes
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # it would announce that torch is absent
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, with an optional :preset.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run resumes by itself from it."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Resolve the config, check it, print it and stop; writes nothing."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a bad input, too.")


def run() -> int:
    """Runs what the flags say and returns the exit code."""
    config = _CONFIG.value
    tasks = {"sft", "rl", "evaluate"}
    if config.get("task") not in tasks:
        raise UserError(
            f"config.task={config.get('task')!r} is not one of {', '.join(sorted(tasks))}"
        )
    if not (_DRY_RUN.value or _WORKDIR.value):
        raise UserError("--workdir is missing: the folder to write the run to")
    processes.start()
    import jax

    _use_compilation_cache(jax)
    if _DRY_RUN.value:
        print(config)
    from cxr_jax.runtime import layout as runtime_layout
    from cxr_jax.runtime import signals
    from cxr_jax.training import checks

    processes.together(lambda: _check(config))
    layout = processes.together(lambda: runtime_layout.Layout.of(config.mesh))
    processes.together(
        lambda: checks.check_rows_divide(RunConfig.from_config(config), layout.shards)
    )
    if _DRY_RUN.value:
        print("dry run: the config is valid; nothing was written")
        return 0
    folder = _open(config)
    stop = signals.Stop(config.grace_seconds, config.step_timeout)
    try:
        if processes.of_main(bool(folder.status)):
            print(
                f"this run is complete ({folder.status['time']}); report: {folder.file('report.html')}"
            )
            if "table" in folder.status:
                print(folder.status["table"])
            return 0
        devices = jax.devices()
        where = f"{len(devices)} {devices[0].platform} device(s), {os.cpu_count()} cores"
        where += f" ({layout})" if layout.mesh else ""
        print(f"{config.task} on {where}; workdir {folder.path}", flush=True)
        result = _task(config.task).run(config, folder, stop, layout)
        if "stopped" in result:
            print(f"saved at step {result['step']}; the same command continues from there")
            return 0
        table = result.pop("results", {}).get("table", "")
        folder.finish(table=table, **result)
        processes.barrier("done")
        print(table)
        print(f"done; report: {folder.file('report.html')}\n{NOT_FOR_DIAGNOSIS}")
        return 0
    except UserError:
        folder.abandon()
        raise
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise RunFailedError(
            f"--workdir={_WORKDIR.value}: {e.strerror}; what was saved before stays, and the same command "
            "continues from there"
        ) from e
    finally:
        stop.close()
        folder.close()


def _open(config):
    """The run's folder, once every process has started the same run and sees it."""
    from cxr_jax.runtime import run_folder
    from cxr_jax.training import checks

    settings, data = (
        config.to_dict(),
        processes.together(
            lambda: checks.fingerprint(config.model, DataConfig.from_config(config))
        ),
    )
    if not processes.same(
        json.dumps([settings, data, run_folder.git_sha()], sort_keys=True, default=str)
    ):
        raise UserError(
            "the processes differ in their flags, code, data or weights: start the same command on all"
        )
    folder = processes.together(
        lambda: run_folder.RunFolder(_WORKDIR.value, settings, data, writes=processes.is_main())
    )

    def seen():
        if not os.path.exists(folder.file("config.json")):
            raise UserError(
                f"--workdir={_WORKDIR.value}: process {processes.index()} does not see the folder that "
                "process 0 has opened; it must be on a disk that all share"
            )

    processes.together(seen)
    return folder


def _task(name):
    from cxr_jax.evaluation import run as evaluation_run
    from cxr_jax.rl import loop as rl_loop
    from cxr_jax.sft import loop

    return {"sft": loop, "rl": rl_loop, "evaluate": evaluation_run}[name]


def _check(config):
    _task(config.task).check(config)


def _use_compilation_cache(jax):
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "cxr_jax", "xla"
    )
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def main(argv=None) -> int:
    try:
        return processes.leave(command_line.main(argv, __name__, run))
    except Exception:
        traceback.print_exc()
        return processes.leave(1)


if __name__ == "__main__":
    sys.exit(main())
