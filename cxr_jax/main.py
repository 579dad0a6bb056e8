"""Every run: `cxr-jax train --config=NAME[:preset] --workdir=DIR [--config.a.b=v] [--dry_run]`.

NAME is rl, sft or evaluate, or an experiment file; `python -m cxr_jax.main` is the same command.
Several processes that are started with the same command and `CXR_*` variables (processes.py) are one run.
Exit codes: 0 done (or saved on SIGTERM), 1 the run failed, 2 bad usage or bad input (one line on stderr).
"""

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from absl import flags

from cxr_jax.config import command_line, schema
from cxr_jax.config.sections import DataConfig, RunConfig, in_todays_words
from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.runtime import processes
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.runtime.run_folder import CONTINUABLE

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from cxr_jax.runtime.layout import Layout
    from cxr_jax.runtime.run_folder import RunFolder
    from cxr_jax.runtime.signals import Stop

# transformers would announce that torch is absent
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

TASKS = ("evaluate", "rl", "sft")
# What a full or write-protected disk raises: a reason that one line says.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

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


def run() -> int:
    """Run what the flags say and return the exit code."""
    config = command_line.CONFIG.value
    if config.get("task") not in TASKS:
        raise UserError(f"config.task={config.get('task')!r} is not one of {', '.join(TASKS)}")
    for name in _MAY_CHANGE.value:
        if name not in CONTINUABLE:
            raise UserError(f"--may_change={name}: is not one of {', '.join(CONTINUABLE)}")
    if not (_DRY_RUN.value or _WORKDIR.value):
        raise UserError("--workdir is missing: the folder to write the run to")

    # The processes of a run must find each other before JAX looks for devices.
    processes.start()
    _use_compilation_cache()
    if _DRY_RUN.value:
        print(config)
    layout = _checked_layout(config)
    if _CHECK_IMAGES.value:
        processes.together(lambda: _check_images(config.model, DataConfig.from_config(config)))
    if _DRY_RUN.value:
        print("dry run: the config is valid; nothing was written")
        return 0

    from cxr_jax.runtime import signals

    folder = _open_folder(config)
    stop = signals.Stop(config.grace_seconds, config.step_timeout)
    try:
        # The first process has the say: disks of others may lag behind.
        if processes.from_main(bool(folder.status)):
            _print_complete(folder)
            if folder.has_changes and _MAY_CHANGE.value:
                print("it stays as it is: of --may_change only more steps continue a complete run")
        else:
            _run_task(config, folder, stop, layout)
        return 0
    except UserError:
        # Bad input leaves nothing half-written.
        folder.abandon()
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunFailedError(
            f"--workdir={_WORKDIR.value}: {error.strerror}; what was saved before stays, and the same command "
            "continues from there"
        ) from error
    finally:
        stop.close()
        folder.close()


def _checked_layout(resolved: "ConfigDict") -> "Layout":
    """Check the config for its task and return the devices it runs on; an error of one process ends all."""
    from cxr_jax.runtime import layout as layouts
    from cxr_jax.training import checks

    # On all processes at once: a bad input that only one of them sees must end the others, too.
    processes.together(lambda: _task(resolved.task).check(resolved))
    layout = processes.together(lambda: layouts.Layout.from_config(resolved.mesh))
    settings = RunConfig.from_config(resolved)
    processes.together(lambda: checks.check_rows_divide(settings, layout.shards))
    return layout


def _check_images(model: str, data: DataConfig) -> None:
    """Decode every film of the manifest, in the first process, and print how many can be read."""
    from cxr_jax.data.sources import manifest, unreadable
    from cxr_jax.training import checks, image_checks
    from cxr_jax.weights import pretrained

    if data.source != "files":
        raise UserError(f"--check_images: config.data.source={data.source!r} has no files")
    if processes.is_main():
        rows = manifest.load_rows(data.manifest, data.image_root, data.repeats, data.images)
        paths = [path for row in rows for path in row.image_paths]
        sizes: dict = {}
        found = unreadable.check_files(
            paths, limit=data.max_bad, threads=data.threads, gate=data.image_gate, sizes=sizes
        )
        model_config = checks.read_model_config(model, pretrained.load_tokenizer(model))
        image_checks.check_room_for_films(model_config, data, rows, sizes)
        print(found, flush=True)


def _run_task(config: "ConfigDict", folder: "RunFolder", stop: "Stop", layout: "Layout") -> None:
    """Run the task from where its folder stands, and say where it ended: complete, or saved on a signal."""
    import jax

    from cxr_jax.data import image_gate
    from cxr_jax.runtime import checkpoints

    checkpoints.quieten_orbax()  # before a model is loaded, which Orbax may have written
    devices = jax.devices()
    device_summary = f"{len(devices)} {devices[0].platform} device(s), {os.cpu_count()} cores"
    if layout.mesh:
        device_summary += f" ({layout})"
    print(f"{config.task} on {device_summary}; workdir {folder.path}", flush=True)

    task_result = _task(config.task).run(config, folder, stop, layout)
    for line in image_gate.take_count_lines():
        print(f"warning: {line}", file=sys.stderr, flush=True)
    # On a signal the run is saved, not failed.
    if "stopped" in task_result:
        print(f"saved at step {task_result['step']}; the same command continues from there")
        return
    result_table = task_result.pop("results", {}).get("table", "")
    folder.finish(table=result_table, **task_result)
    # Every process stays until the run is marked complete.
    processes.barrier("done")
    print(result_table)
    print(f"done; report: {folder.file('report.html')}\n{NOT_FOR_DIAGNOSIS}")


def _print_complete(folder: "RunFolder") -> None:
    status = folder.status
    print(f"this run is complete ({status['time']}); report: {folder.file('report.html')}")
    if "table" in status:
        print(status["table"])


def _open_folder(resolved: "ConfigDict") -> "RunFolder":
    """Open the run's folder, once every process has started the same run, and check that all of them see it."""
    from cxr_jax.runtime import run_folder
    from cxr_jax.training import checks

    settings = resolved.to_dict()
    data_fingerprint = processes.together(
        lambda: checks.fingerprint(resolved.model, DataConfig.from_config(resolved))
    )
    # Processes with different flags or code would wait for each other in different collectives.
    # With other settings, data or code, one process would train another model than the rest.
    identity = [settings, data_fingerprint, run_folder.git_sha()]
    if not processes.have_same(json.dumps(identity, sort_keys=True, default=str)):
        raise UserError(
            "the processes differ in their flags, code, data or weights: start the same command on all"
        )
    defaults = schema.defaults(resolved.task, resolved.data.source).to_dict()
    folder = processes.together(
        lambda: run_folder.RunFolder(
            str(_WORKDIR.value),
            settings,
            data_fingerprint,
            processes.is_main(),
            defaults,
            _MAY_CHANGE.value,
            in_todays_words,
        )
    )

    # A disk that one process does not share would show only at the first save, after hours.
    def check_seen() -> None:
        if not os.path.exists(folder.file("config.json")):
            raise UserError(
                f"--workdir={_WORKDIR.value}: process {processes.index()} does not see the folder that "
                "process 0 has opened; it must be on a disk that all share"
            )

    processes.together(check_seen)
    return folder


def _task(name: str) -> ModuleType:
    """Return the module that has `check(config)` and `run(config, folder, stop, layout)` for a task."""
    from cxr_jax.evaluation import run as evaluation
    from cxr_jax.rl import loop as rl
    from cxr_jax.sft import loop as sft

    return {"sft": sft, "rl": rl, "evaluate": evaluation}[name]


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs, where the user's variables do not say otherwise."""
    import jax

    cache_folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "cxr_jax", "xla"
    )
    jax.config.update("jax_compilation_cache_dir", cache_folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (program name first; None: that of the process) and return the exit code."""
    try:
        return processes.leave(command_line.main(argv, __name__, run))
    except Exception:
        traceback.print_exc()
        return processes.leave(1)


if __name__ == "__main__":
    sys.exit(main())
