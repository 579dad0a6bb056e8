"""The table of docs/plan.md: what the published recipes need on 1, 8, 64 and 256 devices that need not exist.

    python -m scripts.plan_table [--only=3b,rl,8] [--jobs=1] [--rows=FILE.jsonl]

Runs `python -m cxr_jax.plan --json` for 3B and 7B, SFT and RL, full training and LoRA, and writes the table between the
markers of docs/plan.md. Rows that FILE already has are taken from there (a row takes minutes), new ones are added.
"""

import argparse
import concurrent.futures
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
MODELS = {"3b": "random:qwen2.5-vl-3b", "7b": "random:qwen2.5-vl-7b"}
TASKS = ("sft", "rl")
LORA = {"full": [], "lora": ["--config.lora.rank=16"]}
MESHES = {1: (1, 1, 1), 8: (1, 8, 1), 64: (1, 64, 1), 256: (1, 64, 4)}  # data, fsdp, tensor
# So that a device works on one of the 64 rows (or prompts) of a step at a time.
MICRO_BATCHES = {1: 64, 8: 8, 64: 1, 256: 1}
PARTS = {"sft": ("micro_batches",), "rl": ("rl.micro_batches", "rl.sample_micro_batches")}
GIB = 2**30
HEADER = """| model | task | trains | devices | data x fsdp x tensor | weights | optimizer | batch | temporary, at most | in all, at most | tokens | PFLOP | moved, GiB (most of it) |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501

Programs = list[dict[str, Any]]


class Case(NamedTuple):
    """What a row is about: a key of MODELS, of TASKS, of LORA and of MESHES."""

    model: str
    task: str
    trains: str
    devices: int


def plan_arguments(case: Case) -> list[str]:
    """Return the arguments of `python -m cxr_jax.plan`."""
    mesh = zip(("data", "fsdp", "tensor"), MESHES[case.devices], strict=True)
    return [
        f"--config=experiments/{case.task}.py:nv_reason_3b",
        f"--config.model={MODELS[case.model]}",
        f"--devices={case.devices}",
        *(f"--config.mesh.{axis}={size}" for axis, size in mesh),
        *(f"--config.{key}={MICRO_BATCHES[case.devices]}" for key in PARTS[case.task]),
        *LORA[case.trains],
    ]


def plan(case: Case) -> Programs:
    """Return what `plan --json` says of each program.

    Raises:
        RuntimeError: if it fails, with its last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", "cxr_jax.plan", *plan_arguments(case), "--json"],
        capture_output=True,
        text=True,
        cwd=PAGE.parents[1],
    )
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{tuple(case)}: {last_line}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def table_row(case: Case, programs: Programs) -> str:
    """Return a row of the table.

    Bytes are those of the program that needs most; moved and computed is what all programs of a step do.
    """
    most = max(programs, key=lambda program: sum(program["bytes"].values()))

    def gib(*kinds: str) -> str:
        return f"{sum(most['bytes'].get(kind, 0) for kind in kinds) / GIB:,.1f}"

    moved = [(size, kind) for program in programs for kind, size in program["moved"].items()]
    total_moved = sum(size for size, _ in moved)
    cells = (
        case.model.upper(),
        case.task.upper(),
        "LoRA" if case.trains == "lora" else case.trains,
        case.devices,
        " x ".join(map(str, MESHES[case.devices])),
        gib("parameters", "fixed"),
        gib("optimizer"),
        gib("batch"),
        gib("temporary"),
        f"{sum(most['bytes'].values()) / GIB:,.1f}",
        f"{sum(program['tokens'] for program in programs):,}",
        f"{sum(program['flops'] for program in programs) / 1e15:,.1f}",
        f"{total_moved / GIB:,.0f} ({max(moved)[1]})" if total_moved else "0",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def read_rows(file: Path) -> dict[Case, Programs]:
    """Read the rows that an earlier call has added to `file`; none if there is no such file."""
    if not file.exists():
        return {}
    entries = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {Case(*entry["key"]): entry["programs"] for entry in entries}


def write_table(cases: Sequence[Case], rows: dict[Case, Programs]) -> None:
    """Write the rows that there are between the markers of docs/plan.md."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table = "".join(table_row(case, rows[case]) + "\n" for case in cases if case in rows)
    PAGE.write_text(before + BEGIN + "\n" + HEADER + table + END + rest.partition(END)[2])


def main() -> int:
    """Run the command line of the process and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        default="",
        help="what a row must have: 3b or 7b, sft or rl, full or lora, devices",
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=PAGE.with_name("plan.jsonl"))
    args = parser.parse_args()

    cases = [Case(*case) for case in itertools.product(MODELS, TASKS, LORA, MESHES)]
    rows = read_rows(args.rows)
    only = set(filter(None, args.only.split(",")))
    missing = [case for case in cases if case not in rows and only <= set(map(str, case))]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for case, programs in zip(missing, pool.map(plan, missing), strict=True):
            rows[case] = programs
            with open(args.rows, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": case, "programs": programs}) + "\n")
            print(table_row(case, programs), flush=True)
    write_table(cases, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
