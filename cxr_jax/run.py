"""One run, from its config to its folder: what the command line (`main`) and `cxr_jax.train` do alike."""

import contextlib
import copy
import difflib
import errno
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from cxr_jax.config import preset_files, schema, source_specs
from cxr_jax.config.sections import DataConfig, RunConfig, in_todays_words
from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.runtime import processes
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.runtime.processes import use_compilation_cache
from cxr_jax.runtime.run_folder import CONTINUABLE

if TYPE_CHECKING:
    from cxr_jax.runtime.layout import Layout
    from cxr_jax.runtime.run_folder import RunFolder
    from cxr_jax.runtime.signals import Stop

# transformers would announce that torch is absent
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

TASKS = ("evaluate", "rl", "sft")
SOURCES = ("data.train", "data.eval")  # keys whose values are sources by name
Reward = Callable | tuple[Callable, float]
# What a full or write-protected disk raises: a reason that one line says.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        workdir: its folder.
        task: "sft", "rl" or "evaluate".
        step: that it has reached; None of a run that only evaluates.
        best_step: of RL, the step that is exported and evaluated, the best out of distribution.
        stopped: name of the signal that it was saved on; None: it is complete.
        metrics: the last line of its training in metrics.jsonl, {} without one.
        table: the scores of the final evaluation, as text.
    """

    workdir: Path
    task: str
    step: int | None = None
    best_step: int | None = None
    stopped: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    table: str = ""

    @property
    def report(self) -> Path:
        """The page of a complete run."""
        return self.workdir / "report.html"

    @property
    def model(self) -> Path:
        """The exported model of a complete training run: a Hugging Face folder, which `cxr_jax.load` opens."""
        return self.workdir / "hf"


# ---- From Python -----------------------------------------------------------------------------------


def train(
    wanted: ConfigDict | Mapping[str, Any] | str,
    workdir: str | os.PathLike,
    overrides: Mapping[str, Any] | None = None,
    rewards: Sequence[Reward] = (),
    may_change: Sequence[str] = (),
) -> RunResult:
    """Run what a config says, as the command line does; see `cxr_jax.train`."""
    # As flags do it: the config first, then what it holds.
    resolved = resolve(wanted, overrides or {})
    add_rewards(resolved, rewards)
    check_task(resolved, may_change)
    # The processes of a run must find each other before JAX looks for devices.
    processes.start()
    use_compilation_cache()
    return carry_out(resolved, str(workdir), check(resolved), may_change)


def resolve(
    wanted: ConfigDict | Mapping[str, Any] | str, overrides: Mapping[str, Any]
) -> ConfigDict:
    """Build the config of a run: a copy of its own.

    Args:
        wanted: a config; what `--config` takes, as "rl:files" or "experiments/rl.py"; or a dict of keys that are not at
            their defaults, with "task" among them.
        overrides: further keys, nested or dotted.

    Raises:
        UserError: for a name or a key that there is not, and for a value of another type.
    """
    if isinstance(wanted, ConfigDict):
        resolved = copy.deepcopy(wanted)
    elif isinstance(wanted, str):
        resolved = _preset(wanted)
    else:
        # The preset knows what depends on the source: which keys there are, and how large a first run is.
        # Nested keys may say the source as well as dotted ones.
        keys = dict(wanted)
        task, source = keys.pop("task", "rl"), _flat(keys).get("data.source", "phantom")
        resolved = _defaults(task, source)
        overrides = {**_flat(keys), **_flat(overrides)}
    # One by one, so that a mistake is told by its key.
    for name, value in _flat(overrides).items():
        _set(resolved, name, value)
    return resolved


def _defaults(task: str, source: str) -> ConfigDict:
    if task not in TASKS:
        raise UserError(f"config.task={task!r} is not one of {', '.join(TASKS)}")
    if source not in (sources := schema.choices("data.source")):
        raise UserError(f"config.data.source={source!r} is not one of {', '.join(sources)}")
    if task != "sft" or source == "phantom":
        return _preset(f"{task}:{source}")
    # SFT has no preset of films, but for the published one.
    resolved = schema.defaults(task, source)
    # Only phantoms know regions.
    resolved.update(locate_steps=0, locate_weight=0.0)
    return resolved


def _preset(name: str) -> ConfigDict:
    path, _, preset = name.partition(":")
    # A preset wins over a file of that name, as on the command line.
    if path in preset_files.preset_names():
        path = str(preset_files.PRESET_FOLDER / f"{path}.py")
    spec = importlib.util.spec_from_file_location("cxr_jax_config", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        known = ", ".join(preset_files.preset_names())
        raise UserError(f"config={name}: there is no such file, and the presets are {known}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return ConfigDict(module.get_config(*filter(None, [preset])))
    except UserError:
        raise
    except Exception as error:  # whatever a file of the user's raises
        raise UserError(f"config={name}: {type(error).__name__}: {error}") from error


def _flat(keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys of a config by dotted name."""
    # A list is a value, and no section.
    flat: dict[str, Any] = {}
    for name, value in keys.items():
        # Sources by name are one value: their names are the user's.
        if isinstance(value, Mapping | ConfigDict) and f"{prefix}{name}" not in SOURCES:
            flat |= _flat(dict(value), f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _set(resolved: ConfigDict, name: str, value: Any) -> None:
    section_name, _, last = name.rpartition(".")
    section: Any = resolved
    # Down to the section that holds the key, as far as there is one.
    for part in filter(None, section_name.split(".")):
        section = section.get(part) if isinstance(section, ConfigDict) else None
    # Weights may be of rewards that only the user knows: those are checked with the rewards.
    is_weight = section_name == "rl.reward_weights"
    if not isinstance(section, ConfigDict) or last not in section and not is_weight:
        near = difflib.get_close_matches(name, _flat(resolved), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"the config has no key {name!r}{hint}")
    if name in SOURCES:
        value = ConfigDict(source_specs.parse(value, last))
    # Locked or not, its keys are known by now.
    try:
        with section.unlocked():
            section[last] = tuple(value) if isinstance(value, list) else value
    except (TypeError, ValueError) as error:
        raise UserError(f"config.{name}={value!r}: {error}") from error


def add_rewards(resolved: ConfigDict, rewards: Sequence[Reward]) -> None:
    """Name functions in `config.rl.rewards`, so that the run finds them in this process.

    Raises:
        UserError: for a run that has no rewards, and for what is no function with a name.
    """
    # Most runs: nothing of RL is imported for them.
    if not rewards:
        return
    if resolved.get("task") != "rl":
        raise UserError(f"rewards: config.task={resolved.get('task')!r} has none, only 'rl' has")
    from cxr_jax.rewards import own

    # Beside those that the config names already.
    names = []
    for reward in rewards:
        function, weight = reward if isinstance(reward, tuple) else (reward, None)
        names.append(own.hand_over(function) + ("" if weight is None else f"*{weight!r}"))
    resolved.rl.rewards = (*resolved.rl.rewards, *names)


# ---- Checks ----------------------------------------------------------------------------------------


def check_task(resolved: ConfigDict, may_change: Sequence[str] = ()) -> None:
    """Refuse a task that there is not, and names that `--may_change` does not know."""
    if resolved.get("task") not in TASKS:
        raise UserError(f"config.task={resolved.get('task')!r} is not one of {', '.join(TASKS)}")
    for name in may_change:
        if name not in CONTINUABLE:
            raise UserError(f"--may_change={name}: is not one of {', '.join(CONTINUABLE)}")


def check(resolved: ConfigDict) -> "Layout":
    """Check the config for its task and return the devices it runs on; an error of one process ends all."""
    from cxr_jax.runtime import layout as layouts
    from cxr_jax.training import checks

    # On all processes at once: a bad input that only one of them sees must end the others, too.
    processes.together(lambda: _task(resolved.task).check(resolved))
    settings = RunConfig.from_config(resolved)
    heads = processes.together(lambda: checks.heads_to_divide(settings))
    layout = processes.together(lambda: layouts.Layout.from_config(resolved.mesh, heads=heads))
    processes.together(lambda: checks.check_rows_divide(settings, layout.shards))
    processes.together(lambda: checks.check_attention(settings))
    return layout


def check_images(model: str, data: DataConfig) -> None:
    """Decode every film of the manifest, in the first process, and print how many can be read."""
    from cxr_jax.data.sources import splits, unreadable
    from cxr_jax.training import checks, image_checks
    from cxr_jax.weights import pretrained

    if data.kind != "files":
        raise UserError(f"--check_images: config.data.source={data.source!r} has no files")
    if processes.is_main():
        rows = splits.load_films(data)
        paths = [path for row in rows for path in row.image_paths]
        sizes: dict = {}
        found = unreadable.check_files(
            paths, limit=data.max_bad, threads=data.threads, gate=data.image_gate, sizes=sizes
        )
        model_config = checks.read_model_config(model, pretrained.load_tokenizer(model))
        image_checks.check_room_for_films(model_config, data, rows, sizes)
        print(found, flush=True)


# ---- The run ---------------------------------------------------------------------------------------


def carry_out(
    resolved: ConfigDict, workdir: str, layout: "Layout", may_change: Sequence[str] = ()
) -> RunResult:
    """Run a config that has been checked, from where its folder stands.

    Raises:
        UserError: for bad input; a new run leaves nothing behind.
        RunFailedError: for a run that failed; what was saved before stays.
    """
    from cxr_jax.runtime import signals

    folder = _open_folder(resolved, workdir, may_change)
    stop = signals.Stop(resolved.grace_seconds, resolved.step_timeout)
    try:
        # The first process has the say: disks of others may lag behind.
        if processes.from_main(bool(folder.status)):
            _print_complete(folder)
            if folder.has_changes and may_change:
                print("it stays as it is: of --may_change only more steps continue a complete run")
            return _result(resolved, folder, folder.status)
        with _precision(resolved):
            return _run_task(resolved, folder, stop, layout)
    except UserError:
        # Bad input leaves nothing half-written.
        folder.abandon()
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunFailedError(
            f"--workdir={workdir}: {error.strerror}; what was saved before stays, and the same command "
            "continues from there"
        ) from error
    finally:
        stop.close()
        folder.close()


def _precision(resolved: ConfigDict) -> contextlib.AbstractContextManager:
    """Set how float32 numbers are multiplied; CPUs, which have one way, compile the programs of before."""
    import jax

    from cxr_jax.runtime import layout as layouts

    # A name of the precision would be another program to a compilation cache.
    if jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    return layouts.product_precision(resolved.matmul_precision, resolved.dtype)


def _result(resolved: ConfigDict, folder: "RunFolder", facts: Mapping[str, Any]) -> RunResult:
    """What there is to say of a run from what its task returned, or done.json says."""
    from cxr_jax.metrics import run_log

    # Read back, so that a caller sees what the folder says.
    lines = [row for row in run_log.read(folder.path) if row["kind"] == "train"]
    return RunResult(
        workdir=Path(folder.path),
        task=resolved.task,
        step=facts.get("step"),
        best_step=facts.get("best_step"),
        stopped=facts.get("stopped"),
        metrics=lines[-1] if lines else {},
        table=facts.get("table", ""),
    )


def _run_task(
    resolved: ConfigDict, folder: "RunFolder", stop: "Stop", layout: "Layout"
) -> RunResult:
    """Run the task from where its folder stands, and say where it ended: complete, or saved on a signal."""
    import jax

    from cxr_jax.data import image_gate
    from cxr_jax.runtime import checkpoints

    checkpoints.quieten_orbax()  # before a model is loaded, which Orbax may have written
    devices = jax.devices()
    device_summary = f"{len(devices)} {devices[0].platform} device(s), {os.cpu_count()} cores"
    if layout.mesh:
        device_summary += f" ({layout})"
    print(f"{resolved.task} on {device_summary}; workdir {folder.path}", flush=True)

    task_result = _task(resolved.task).run(resolved, folder, stop, layout)
    for line in image_gate.take_count_lines():
        print(f"warning: {line}", file=sys.stderr, flush=True)
    # On a signal the run is saved, not failed.
    if "stopped" in task_result:
        print(f"saved at step {task_result['step']}; the same command continues from there")
        return _result(resolved, folder, task_result)
    result_table = task_result.pop("results", {}).get("table", "")
    folder.finish(table=result_table, **task_result)
    # Every process stays until the run is marked complete.
    processes.barrier("done")
    print(result_table)
    print(f"done; report: {folder.file('report.html')}\n{NOT_FOR_DIAGNOSIS}")
    return _result(resolved, folder, {**task_result, "table": result_table})


def _print_complete(folder: "RunFolder") -> None:
    status = folder.status
    print(f"this run is complete ({status['time']}); report: {folder.file('report.html')}")
    if "table" in status:
        print(status["table"])


def _open_folder(resolved: ConfigDict, workdir: str, may_change: Sequence[str]) -> "RunFolder":
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
            workdir,
            settings,
            data_fingerprint,
            processes.is_main(),
            defaults,
            may_change,
            in_todays_words,
        )
    )

    # A disk that one process does not share would show only at the first save, after hours.
    def check_seen() -> None:
        if not os.path.exists(folder.file("config.json")):
            raise UserError(
                f"--workdir={workdir}: process {processes.index()} does not see the folder that "
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
