"""What a run needs, before there is a machine: `python -m cxr_jax.plan --config=experiments/sft.py:nv_reason_3b`.

Compiles the steps of the config for N devices that need not exist, from shapes alone, and prints for each program:
bytes on each device by what they hold, floating-point operations of a step, and what each device receives from others.
The devices form the mesh of config.mesh, as in a run.
With --hbm_gib it says whether that fits, and exits 1 if it does not. Nothing is read but the config and, if
config.model names a folder, its config.json and tokenizer; an empty config.model stands for the 3B shape.

What the arrays of a step's arguments take is exact. Temporary memory and what devices receive are those of the same
program computed in float32 and compiled for CPUs, with plain attention: estimates, for bfloat16 from above. (Compiled
in bfloat16, XLA for CPUs keeps float32 copies of all weights, which no accelerator needs.) What the runtime, its
libraries, evaluations and the export take is not counted: leave a share of the memory free.

Exit codes: 0 printed, and it fits if asked; 1 it does not fit; 2 bad usage.
"""

import json
import os
import sys

from absl import flags
from ml_collections import config_flags

from cxr_jax.config import command_line
from cxr_jax.config.sections import RunConfig
from cxr_jax.errors import UserError
from cxr_jax.planning.programs import GIB, needs_of, programs

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, with an optional :preset.", lock_config=True
)
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices to plan for.", lower_bound=1)
_HBM = flags.DEFINE_float(
    "hbm_gib", None, "Memory of a device in GiB: makes it a verdict.", lower_bound=0.0
)
_JSON = flags.DEFINE_bool(
    "json", False, "Print one JSON object a program: name, bytes, flops, tokens, moved."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a bad input, too.")


def show(needs: dict) -> None:
    """Prints what one program needs."""
    print(
        f"\n{needs['name']}: {needs['tokens']:,} tokens, {needs['flops'] / 1e12:,.1f} TFLOP a step"
    )
    for kind, size in needs["bytes"].items():
        print(f"  {'<=' if kind == 'temporary' else '  '} {size / GIB:9.2f} GiB  {kind}")
    print(f"  <= {sum(needs['bytes'].values()) / GIB:9.2f} GiB  in all, a device")
    if needs["moved"]:
        print(
            "  moved a step: "
            + ", ".join(f"{k} {v / GIB:.2f} GiB" for k, v in needs["moved"].items())
        )


ADVICE = {
    "parameters": "train adapters (--config.lora.rank=16), or take more devices",
    "optimizer": "train adapters (--config.lora.rank=16), or take more devices",
    "fixed": "take more devices, or --config.dtype=bfloat16",
    "batch": "a smaller batch",
    "temporary": "more micro-batches (config.micro_batches; RL: config.rl.micro_batches), --config.remat=full, or "
    "smaller config.batch_size, config.rl.group_size or config.max_completion",
}


def run() -> int:
    """Prints the plan that the flags ask for and returns the exit code."""
    config, devices, hbm_gib = _CONFIG.value, _DEVICES.value, _HBM.value
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    from cxr_jax.config import schema
    from cxr_jax.runtime import layout as runtime_layout
    from cxr_jax.training import checks

    if config.get("task") not in ("sft", "rl"):
        raise UserError(f"config.task={config.get('task')!r}: only sft and rl have steps to plan")
    schema.check_values(config)
    layout = runtime_layout.Layout.of(config.mesh)
    mesh = layout.mesh
    checks.check_rows_divide(RunConfig.from_config(config), layout.shards)
    wide = config.copy_and_resolve_references()
    wide.dtype = "float32"
    pairs = list(zip(programs(config), programs(wide), strict=True))
    if not _JSON.value:
        print(
            f"{config.model or 'the 3B shape'}, {config.task}, computed in {config.dtype}, on {devices} device(s)"
            + (f": {layout}" if mesh else "")
        )
    needs = {}
    for program, in_float32 in pairs:
        found = needs_of(program, in_float32, mesh)
        needs[found["name"]] = found["bytes"]
        print(json.dumps(found), flush=True) if _JSON.value else show(found)
    if hbm_gib is None:
        return 0
    verdict = sys.stderr if _JSON.value else sys.stdout
    name = max(needs, key=lambda n: sum(needs[n].values()))
    total, largest = sum(needs[name].values()) / GIB, max(needs[name], key=needs[name].get)
    if total <= hbm_gib:
        print(f"\nfits: {total:.1f} of {hbm_gib:g} GiB ({name})", file=verdict)
        return 0
    print(
        f"\ndoes not fit: {name} needs {total:.1f} GiB, a device has {hbm_gib:g}. Most of it: {largest}, "
        f"{needs[name][largest] / GIB:.1f} GiB. To change: {ADVICE[largest]}",
        file=verdict,
    )
    return 1


def main(argv=None) -> int:
    return command_line.main(argv, __name__, run)


if __name__ == "__main__":
    sys.exit(main())
