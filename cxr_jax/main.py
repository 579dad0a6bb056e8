"""Every run: `python -m cxr_jax.main --config=experiments/X.py[:preset] --workdir=DIR [--config.a.b=v] [--dry_run]`.

Exit codes: 0 done (or saved on SIGTERM), 1 the run failed, 2 bad usage or bad input (one line on stderr).
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

from cxr_jax import commandline
from cxr_jax.errors import UserError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would announce that torch is absent
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, with an optional :preset.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run resumes by itself from it.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Resolve the config, check it, print it and stop; writes nothing."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a bad input, too.")


def run() -> int:
    """Runs what the flags say and returns the exit code."""
    config = _CONFIG.value
    tasks = {"sft", "rl", "evaluate"}
    if config.get("task") not in tasks:
        raise UserError(f"config.task={config.get('task')!r} is not one of {', '.join(sorted(tasks))}")
    import jax

    _use_compilation_cache(jax)
    if _DRY_RUN.value:
        print(config)
        _check(config)
        print("dry run: the config is valid; nothing was written")
        return 0
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: the folder to write the run to")

    from cxr_jax import checks
    from cxr_jax import workdir as wd

    _check(config)
    folder = wd.Workdir(_WORKDIR.value, config.to_dict(), data=checks.fingerprint(config))
    try:
        if folder.status:
            print(f"this run is complete ({folder.status['time']}); report: {folder.file('report.html')}")
            if "table" in folder.status:
                print(folder.status["table"])
            return 0
        stop = wd.Stop()
        devices = jax.devices()
        where = f"{len(devices)} {devices[0].platform} device(s), {os.cpu_count()} cores"
        print(f"{config.task} on {where}; workdir {folder.path}", flush=True)
        result = _task(config.task).run(config, folder, stop)
        if "stopped" in result:
            print(f"saved at step {result['step']}; the same command continues from there")
            return 0
        table = result.pop("results", {}).get("table", "")
        folder.finish(table=table, **result)
        print(table)
        print(f"done; report: {folder.file('report.html')}\nResearch use only. Not for diagnosis.")
        return 0
    except UserError:
        folder.abandon()
        raise
    finally:
        folder.close()


def _task(name):
    from cxr_jax import evaluate, rl, sft

    return {"sft": sft, "rl": rl, "evaluate": evaluate}[name]


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
    return commandline.main(argv, __name__, run)


if __name__ == "__main__":
    sys.exit(main())
