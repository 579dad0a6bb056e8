"""Every run: `cxr-jax train --config=NAME[:preset] --workdir=DIR [--config.a.b=v] [--dry_run]`.

NAME is rl, sft or evaluate, or an experiment file; `python -m cxr_jax.main` is the same command.
Several processes that are started with the same command and `CXR_*` variables (processes.py) are one run.
Exit codes: 0 done (or saved on SIGTERM), 1 the run failed, 2 bad usage or bad input (one line on stderr).
"""

import gc
import sys
import traceback
from collections.abc import Sequence

from absl import flags

from cxr_jax import run as runs
from cxr_jax.config import command_line
from cxr_jax.config.sections import DataConfig
from cxr_jax.errors import UserError
from cxr_jax.runtime import processes

flags.adopt_module_key_flags(command_line)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run resumes by itself from it."
)
_CHECK_IMAGES = flags.DEFINE_bool(
    "check_images", False, "Decode every film of the manifest before the run, or with --dry_run."
)
_MAY_CHANGE = flags.DEFINE_list(
    "may_change",
    [],
    "Continue the run of --workdir with others of these: steps, manifest, image_root.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Resolve the config, check it, print it and stop; writes nothing."
)
_ALLOW_UPLOAD = flags.DEFINE_bool(
    "allow_upload",
    False,
    "Let wandb and mlflow have a complete run's report and samples, which hold images and texts.",
)


def run() -> int:
    """Run what the flags say and return the exit code."""
    config = command_line.CONFIG.value
    if _ALLOW_UPLOAD.value:
        if "allow_upload" not in config:
            raise UserError(f"--allow_upload: config.task={config.get('task')!r} uploads nothing")
        config.allow_upload = True
    runs.check_task(config, _MAY_CHANGE.value)
    if not (_DRY_RUN.value or _WORKDIR.value):
        raise UserError("--workdir is missing: the folder to write the run to")

    # The processes of a run must find each other before JAX looks for devices.
    processes.start()
    runs.use_compilation_cache()
    if _DRY_RUN.value:
        print(config)
    layout = runs.check(config)
    if _CHECK_IMAGES.value:
        processes.together(lambda: runs.check_images(config.model, DataConfig.from_config(config)))
    if _DRY_RUN.value:
        print("dry run: the config is valid; nothing was written")
        return 0
    _collect_seldom()
    runs.carry_out(config, str(_WORKDIR.value), layout, _MAY_CHANGE.value)
    return 0


def _collect_seldom() -> None:
    """Spare the garbage collector what stays to the end of a run: libraries, and most of what JAX traces."""
    gc.freeze()
    # By its own 700 objects it walks all that was traced every few seconds: 7 % of a short run, and 2 % by these.
    gc.set_threshold(10_000, 10, 10)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (program name first; None: that of the process) and return the exit code."""
    try:
        return processes.leave(command_line.main(argv, __name__, run))
    except Exception:
        traceback.print_exc()
        return processes.leave(1)


if __name__ == "__main__":
    sys.exit(main())
