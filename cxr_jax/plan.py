"""What a run needs, before there is a machine: `cxr-jax plan --config=sft:nv_reason_3b --devices=8 --hbm_gib=95`.

Compiles the steps of the config for N devices that need not exist, from shapes alone, and prints for each program:
bytes on each device by what they hold, floating-point operations of a step, and what each device receives from others.
The devices form the mesh of config.mesh, as in a run. `python -m cxr_jax.plan` is the same command.
With --hbm_gib it says whether that fits, and exits 1 if it does not. Nothing is read but the config and, if
config.model names a folder, its config.json and tokenizer; an empty config.model stands for the 3B shape.

What the arrays of a step's arguments take is exact. Temporary memory and what devices receive are those of the same
program computed in float32 and compiled for CPUs, with plain attention: estimates, for bfloat16 from above. (Compiled
in bfloat16, XLA for CPUs keeps float32 copies of all weights, which no accelerator needs.) What the runtime, its
libraries, evaluations and the export take is not counted: leave a share of the memory free.

`--topology=v5p:2x2x2` in place of `--devices` compiles the steps for that slice of TPUs by libtpu, the compiler that
a TPU runs, on this machine (Linux, `pip install 'jax[tpu]'`; no TPU is needed): v5e:2x2 to v5e:16x16, v6e the same,
v5p:2x2x1, v5p:4x4x4 and so on, and v5e:1x1, v6e:1x1 for one chip; with
--config.mesh.slices=2 two of it. Bytes are then those of the program that will run,
computed as the run computes, padding and code included; a program that does not fit is refused. The verdict counts
the code of all programs, which stays loaded, and leaves 1/16 of the memory free (--hbm_gib: another memory, all of
it). It takes minutes a program and gigabytes of memory here. Time on a TPU is not said: only a TPU knows.

GPUs: JAX takes 75 % of a GPU's memory at its start, or XLA_CLIENT_MEM_FRACTION of it, and arrays get no more. --gpu
holds the plan against that share of --hbm_gib.

`--film=2544x3056` (height x width) plans the reading of one film of that size on one device in place of the run's
steps: into how many patches it is cut, and what the vision tower, the prompt and the decoding need. Its size is
bounded as by `cxr-jax predict`: by the model's own limits (those of the published folders, where there is no folder)
and by --max_pixels.

Exit codes: 0 printed, and it fits if asked; 1 it does not fit; 2 bad usage.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from absl import flags

from cxr_jax.config import command_line
from cxr_jax.config.sections import RunConfig
from cxr_jax.errors import UserError
from cxr_jax.planning.films import Film, FilmReading, film_of_run, parse_size
from cxr_jax.planning.programs import (
    GIB,
    Needs,
    Shapes,
    heads_of_model,
    needs_of,
    programs,
    with_turns,
)
from cxr_jax.planning.slice_needs import needs_on_slice
from cxr_jax.planning.slices import Slice, open_slice

if TYPE_CHECKING:
    from cxr_jax.runtime.layout import Layout

# transformers would announce that torch is absent
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

flags.adopt_module_key_flags(command_line)
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices to plan for.", lower_bound=1)
_HBM_GIB = flags.DEFINE_float(
    "hbm_gib", None, "Memory of a device in GiB: makes it a verdict.", lower_bound=0.0
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Compile for a slice of TPUs by libtpu, as in v5e:4x4, v5p:2x2x2, v6e:2x4."
)
_GPU = flags.DEFINE_bool(
    "gpu", False, "The memory is a GPU's: of --hbm_gib arrays get XLA_CLIENT_MEM_FRACTION, or 0.75."
)
_JSON = flags.DEFINE_bool(
    "json",
    False,
    "Print one JSON object a program: name, bytes, flops, tokens, moved, calls, waste, refused, peak; film, resized, "
    "patches, image_tokens.",
)
_FILM = flags.DEFINE_string(
    "film", None, "Plan the reading of one film of HEIGHTxWIDTH pixels, as in 2544x3056."
)
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", None, "With --film: most pixels that are read of it.", lower_bound=28 * 28
)

# What JAX takes of a GPU's memory at its start (docs.jax.dev, "GPU memory allocation").
GPU_SHARE = 0.75

WITHOUT_HIDDEN_MEMORY = {"xla_cpu_experimental_ynn_fusion_type": ""}

# What to change if most of the memory holds this.
ADVICE = {
    "parameters": "train adapters (--config.lora.rank=16), or take more devices",
    "optimizer": "train adapters (--config.lora.rank=16), or take more devices",
    "fixed": "take more devices, or --config.dtype=bfloat16",
    "batch": "a smaller batch",
    "padding": "another size of what is padded, or more devices",
    "output": "a smaller batch",
    "code": "fewer sizes: config.max_completion, config.rl.group_size",
    "temporary": "more micro-batches (config.micro_batches; RL: config.rl.micro_batches, and turns of the rollout by "
    "config.rl.sample_micro_batches), --config.remat=full, or "
    "smaller config.batch_size, config.rl.group_size or config.max_completion",
}


def run() -> int:
    """Print the plan that the flags ask for and return the exit code."""
    config, devices = command_line.CONFIG.value, _DEVICES.value
    check_flags()

    # JAX takes the number of devices only before it has looked for them.
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    from cxr_jax.config import schema
    from cxr_jax.runtime import layout as layouts

    if _FILM.value is not None:
        schema.check_values(config)
        return plan_reading(RunConfig.from_config(config), _FILM.value)
    if config.get("task") not in ("sft", "rl"):
        raise UserError(f"config.task={config.get('task')!r}: only sft and rl have steps to plan")
    schema.check_values(config)
    if _TOPOLOGY.value is not None:
        settings = RunConfig.from_config(config)
        with layouts.product_precision(settings.matmul_precision, settings.dtype):
            return plan_slice(settings, open_slice(_TOPOLOGY.value, settings.mesh.slices))
    return plan_devices(RunConfig.from_config(config), devices)


def check_flags() -> None:
    """Raise UserError for flags that do not go together."""
    if _MAX_PIXELS.value is not None and _FILM.value is None:
        raise UserError("--max_pixels is for --film; of a run it is --config.data.max_pixels")
    if _GPU.value and _HBM_GIB.value is None:
        raise UserError("--gpu is about the verdict: say the memory of the GPU, --hbm_gib=80")
    if _TOPOLOGY.value is None:
        return
    for name, is_given in (
        ("devices", flags.FLAGS["devices"].present),
        ("film", _FILM.value is not None),
        ("gpu", _GPU.value),
    ):
        if is_given:
            raise UserError(
                f"--topology says for which devices the plan is: --{name} does not go with it"
            )


def plan_devices(settings: RunConfig, devices: int) -> int:
    """Print what a run needs on devices of any kind, by XLA for CPUs, and return the exit code."""
    from cxr_jax.runtime import layout as layouts
    from cxr_jax.training import checks

    heads = heads_of_model(settings)
    layout = layouts.Layout.from_config(dataclasses.asdict(settings.mesh), heads=heads)
    checks.check_rows_divide(settings, layout.shards)
    checks.check_attention(settings)
    memory_gib = memory_of_device()
    memory = None if memory_gib is None else int(memory_gib * GIB)
    settings = with_turns(settings, layout.shards, memory)

    # The same programs twice: as the run computes, and in float32, which XLA for CPUs compiles as an accelerator would.
    settings_in_float32 = dataclasses.replace(settings, dtype="float32")
    program_pairs = list(
        zip(
            programs(settings, layout.shards),
            programs(settings_in_float32, layout.shards),
            strict=True,
        )
    )
    print_head(settings, f"{devices} device(s)", layout)
    film = film_of_run(Shapes(settings).images)
    all_needs = (needs_of(*pair, layout.mesh) for pair in program_pairs)
    return print_plan(film, all_needs, memory_gib)


def plan_slice(settings: RunConfig, tpu_slice: Slice) -> int:
    """Print what a run needs on a slice of TPUs, by libtpu, and return the exit code."""
    from cxr_jax.runtime import layout as layouts
    from cxr_jax.training import checks

    layout = layouts.Layout.from_config(
        dataclasses.asdict(settings.mesh), tpu_slice.devices, heads_of_model(settings)
    )
    checks.check_rows_divide(settings, layout.shards)
    memory_gib = tpu_slice.program_gib if _HBM_GIB.value is None else _HBM_GIB.value
    settings = with_turns(settings, layout.shards, int(memory_gib * GIB))
    name = (
        f"{settings.mesh.slices} x {tpu_slice.name}" if settings.mesh.slices > 1 else tpu_slice.name
    )
    print_head(settings, f"{name}, {len(tpu_slice.devices)} chip(s)", layout)
    device = tpu_slice.devices[0]
    film = film_of_run(Shapes(settings).images)
    all_needs = (
        needs_on_slice(program, device, layout.mesh)
        for program in programs(settings, layout.shards)
    )
    return print_plan(film, all_needs, memory_gib)


def print_head(settings: RunConfig, devices: str, layout: "Layout") -> None:
    """Print what is planned, and for what."""
    if not _JSON.value:
        mesh_shape = f": {layout}" if layout.mesh else ""
        print(
            f"{settings.model or 'the 3B shape'}, {settings.task}, computed in {settings.dtype}, "
            f"on {devices}{mesh_shape}"
        )
        if settings.task == "rl":
            print(f"a rollout in {settings.rollout.sample_micro_batches} turn(s)")


def plan_reading(settings: RunConfig, size: str) -> int:
    """Print what it takes to read one film of a size (HEIGHTxWIDTH) and return the exit code."""
    # The same programs twice, as for a run.
    reading, in_float32 = (
        FilmReading(typed_settings, parse_size(size), _MAX_PIXELS.value)
        for typed_settings in (settings, dataclasses.replace(settings, dtype="float32"))
    )
    if not _JSON.value:
        print(f"{settings.model or 'the 3B shape'}, read in {settings.dtype} on one device")
    pairs = zip(reading.programs(), in_float32.programs(), strict=True)
    # Without XLA's CPU kernels for whole attentions: their scores lie in memory that it does not count.
    needs = (needs_of(*pair, compiler_options=WITHOUT_HIDDEN_MEMORY) for pair in pairs)
    return print_plan(reading.film, needs, memory_of_device())


def memory_of_device() -> float | None:
    """Return what --hbm_gib leaves to the arrays of a run, in GiB; None if it is not given."""
    if not _GPU.value or _HBM_GIB.value is None:
        return _HBM_GIB.value
    return _HBM_GIB.value * gpu_share()


def gpu_share() -> float:
    """Return the share of a GPU's memory that JAX will take in this environment.

    Raises:
        UserError: for an environment variable that is no share.
    """
    # jaxlib reads both; the second is the older name.
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        if text := os.environ.get(name):
            try:
                share = float(text)
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise UserError(
                    f"{name}={text}: must be a share of the memory, above 0 and up to 1"
                )
            return share
    return GPU_SHARE


def print_plan(film: Film, all_needs: Iterable[Needs], memory_gib: float | None) -> int:
    """Print what programs need as each is compiled, and the verdict, if there is a memory; return the exit code."""
    if not _JSON.value:
        print(film, flush=True)
    printed = []
    for needs in all_needs:
        printed.append(needs)
        if _JSON.value:
            row = {**needs._asdict(), "peak": needs.total_bytes, **film._asdict()}
            print(json.dumps(row), flush=True)
        else:
            print_needs(needs)
    refused = [needs for needs in printed if needs.refused]
    if refused:
        stream = sys.stderr if _JSON.value else sys.stdout  # stdout holds JSON objects alone
        print(f"\ndoes not fit: {refused[0].name}: {refused[0].refused}", file=stream)
        return 1
    if memory_gib is None:
        return 0
    return print_verdict(printed, memory_gib)


def print_needs(needs: Needs) -> None:
    """Print what one program needs."""
    print(f"\n{needs.name}: {needs.tokens:,} tokens, {needs.flops / 1e12:,.1f} TFLOP a step")
    # Temporary memory is an estimate from above where another compiler than the device's gave it.
    is_exact = "code" in needs.bytes
    for memory_kind, byte_count in needs.bytes.items():
        bound = "<=" if memory_kind == "temporary" and not is_exact else "  "
        print(f"  {bound} {byte_count / GIB:9.2f} GiB  {memory_kind}")
    if needs.refused:
        print(f"  refused by the compiler: {needs.refused}", flush=True)
        return
    print(f"  {'  ' if is_exact else '<='} {needs.total_bytes / GIB:9.2f} GiB  in all, a device")
    if needs.waste:
        print(f"  padding: {needs.waste}")
    if needs.moved:
        moved = [
            f"{kind} {byte_count / GIB:.2f} GiB in {needs.calls[kind]:,}"
            for kind, byte_count in needs.moved.items()
        ]
        print(f"  moved a step: {', '.join(moved)}", flush=True)


def print_verdict(needs: Sequence[Needs], memory_gib: float) -> int:
    """Print whether the program that needs most fits into the memory of a device; return 0 if it does, else 1."""
    largest = max(needs, key=lambda program: program.total_bytes)
    # The code of the others stays loaded beside it, where it is known.
    other_code = sum(program.bytes.get("code", 0) for program in needs if program is not largest)
    total_gib = (largest.total_bytes + other_code) / GIB
    stream = sys.stderr if _JSON.value else sys.stdout  # stdout holds JSON objects alone
    memory = f"{memory_gib:g} GiB{_about_memory(total_gib, memory_gib)}"
    if total_gib <= memory_gib:
        print(f"\nfits: {total_gib:.1f} of {memory} ({largest.name})", file=stream)
        return 0
    # The advice is about what takes most of the memory.
    kind, byte_count = max(largest.bytes.items(), key=itemgetter(1))
    print(
        f"\ndoes not fit: {largest.name} needs {total_gib:.1f} GiB, a device has {memory}. Most of it: {kind}, "
        f"{byte_count / GIB:.1f} GiB. To change: {ADVICE[kind]}",
        file=stream,
    )
    return 1


def _about_memory(total_gib: float, memory_gib: float) -> str:
    """What must be said of the memory of a verdict, in brackets behind it; "" if nothing."""
    hbm_gib = _HBM_GIB.value
    if _TOPOLOGY.value is not None and hbm_gib is None:
        return " (1/16 of the memory is left free)"
    if _GPU.value:
        return f" (JAX's share of {hbm_gib:g} on a GPU)"
    if hbm_gib is not None and GPU_SHARE * memory_gib < total_gib <= memory_gib:
        share = min(1.0, math.ceil(100 * total_gib / memory_gib) / 100)
        pool = f"{GPU_SHARE * memory_gib:g} of them"
        return f" (on a GPU, arrays get {pool} unless XLA_CLIENT_MEM_FRACTION={share:g} is set)"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (program name first; None: that of the process) and return the exit code."""
    return command_line.main(argv, __name__, run)


if __name__ == "__main__":
    sys.exit(main())
