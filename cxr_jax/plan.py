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

`--film=2544x3056` (height x width) plans the reading of one film of that size on one device in place of the run's
steps: into how many patches it is cut, and what the vision tower, the prompt and the decoding need. Its size is
bounded as by `cxr-jax predict`: by the model's own limits (those of the published folders, where there is no folder)
and by --max_pixels.

Exit codes: 0 printed, and it fits if asked; 1 it does not fit; 2 bad usage.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from operator import itemgetter

from absl import flags

from cxr_jax.config import command_line
from cxr_jax.config.sections import RunConfig
from cxr_jax.errors import UserError
from cxr_jax.planning.films import Film, FilmReading, film_of_run, parse_size
from cxr_jax.planning.programs import GIB, Needs, Shapes, needs_of, programs, with_turns

# transformers would announce that torch is absent
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

flags.adopt_module_key_flags(command_line)
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices to plan for.", lower_bound=1)
_HBM_GIB = flags.DEFINE_float(
    "hbm_gib", None, "Memory of a device in GiB: makes it a verdict.", lower_bound=0.0
)
_JSON = flags.DEFINE_bool(
    "json",
    False,
    "Print one JSON object a program: name, bytes, flops, tokens, moved, peak; film, resized, patches, image_tokens.",
)
_FILM = flags.DEFINE_string(
    "film", None, "Plan the reading of one film of HEIGHTxWIDTH pixels, as in 2544x3056."
)
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", None, "With --film: most pixels that are read of it.", lower_bound=28 * 28
)

WITHOUT_HIDDEN_MEMORY = {"xla_cpu_experimental_ynn_fusion_type": ""}

# What to change if most of the memory holds this.
ADVICE = {
    "parameters": "train adapters (--config.lora.rank=16), or take more devices",
    "optimizer": "train adapters (--config.lora.rank=16), or take more devices",
    "fixed": "take more devices, or --config.dtype=bfloat16",
    "batch": "a smaller batch",
    "temporary": "more micro-batches (config.micro_batches; RL: config.rl.micro_batches, and turns of the rollout by "
    "config.rl.sample_micro_batches), --config.remat=full, or "
    "smaller config.batch_size, config.rl.group_size or config.max_completion",
}


def run() -> int:
    """Print the plan that the flags ask for and return the exit code."""
    config, devices = command_line.CONFIG.value, _DEVICES.value

    # JAX takes the number of devices only before it has looked for them.
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    from cxr_jax.config import schema
    from cxr_jax.runtime import layout as layouts
    from cxr_jax.training import checks

    if _FILM.value is not None:
        schema.check_values(config)
        return plan_reading(RunConfig.from_config(config), _FILM.value)
    if _MAX_PIXELS.value is not None:
        raise UserError("--max_pixels is for --film; of a run it is --config.data.max_pixels")
    if config.get("task") not in ("sft", "rl"):
        raise UserError(f"config.task={config.get('task')!r}: only sft and rl have steps to plan")
    schema.check_values(config)
    settings = RunConfig.from_config(config)
    layout = layouts.Layout.from_config(config.mesh)
    checks.check_rows_divide(settings, layout.shards)
    memory = None if _HBM_GIB.value is None else int(_HBM_GIB.value * GIB)
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
    if not _JSON.value:
        mesh_shape = f": {layout}" if layout.mesh else ""
        print(
            f"{settings.model or 'the 3B shape'}, {settings.task}, computed in {settings.dtype}, "
            f"on {devices} device(s){mesh_shape}"
        )
        if settings.task == "rl":
            print(f"a rollout in {settings.rollout.sample_micro_batches} turn(s)")
    shapes = Shapes(settings)
    film = film_of_run(shapes.images)
    return print_plan(film, (needs_of(*pair, layout.mesh) for pair in program_pairs))


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
    return print_plan(reading.film, needs)


def print_plan(film: Film, all_needs: Iterable[Needs]) -> int:
    """Print what programs need as each is compiled, and the verdict, if one is asked for; return the exit code."""
    if not _JSON.value:
        print(film)
    printed = []
    for needs in all_needs:
        printed.append(needs)
        if _JSON.value:
            row = {**needs._asdict(), "peak": needs.total_bytes, **film._asdict()}
            print(json.dumps(row), flush=True)
        else:
            print_needs(needs)
    if _HBM_GIB.value is None:
        return 0
    return print_verdict(printed, _HBM_GIB.value)


def print_needs(needs: Needs) -> None:
    """Print what one program needs."""
    print(f"\n{needs.name}: {needs.tokens:,} tokens, {needs.flops / 1e12:,.1f} TFLOP a step")
    for memory_kind, byte_count in needs.bytes.items():
        # Temporary memory is that of another compiler: an estimate from above.
        bound = "<=" if memory_kind == "temporary" else "  "
        print(f"  {bound} {byte_count / GIB:9.2f} GiB  {memory_kind}")
    print(f"  <= {needs.total_bytes / GIB:9.2f} GiB  in all, a device")
    if needs.moved:
        moved = [f"{kind} {byte_count / GIB:.2f} GiB" for kind, byte_count in needs.moved.items()]
        print(f"  moved a step: {', '.join(moved)}")


def print_verdict(needs: Sequence[Needs], hbm_gib: float) -> int:
    """Print whether the program that needs most fits into the memory of a device; return 0 if it does, else 1."""
    largest = max(needs, key=lambda program: program.total_bytes)
    total_gib = largest.total_bytes / GIB
    stream = sys.stderr if _JSON.value else sys.stdout  # stdout holds JSON objects alone
    if total_gib <= hbm_gib:
        print(f"\nfits: {total_gib:.1f} of {hbm_gib:g} GiB ({largest.name})", file=stream)
        return 0
    # The advice is about what takes most of the memory.
    kind, byte_count = max(largest.bytes.items(), key=itemgetter(1))
    print(
        f"\ndoes not fit: {largest.name} needs {total_gib:.1f} GiB, a device has {hbm_gib:g}. Most of it: {kind}, "
        f"{byte_count / GIB:.1f} GiB. To change: {ADVICE[kind]}",
        file=stream,
    )
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (program name first; None: that of the process) and return the exit code."""
    return command_line.main(argv, __name__, run)


if __name__ == "__main__":
    sys.exit(main())
