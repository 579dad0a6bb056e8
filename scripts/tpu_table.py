"""The second table of docs/plan.md: what the published recipes need on slices of TPUs, by the TPUs' own compiler.

    python -m scripts.tpu_table [--only=3b,sft,full,v5p:2x2x2] [--rows=FILE.jsonl] [--write]

Runs `python -m cxr_jax.plan --topology=.. --json` for the rows that --only names (a row takes minutes to hours and
gigabytes of memory; without --only none is run), adds them to FILE, and with --write puts the table between its marks.
Rows that FILE has not are written as not run.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from scripts.plan_table import GIB, LORA, PAGE, TASKS, Programs

BEGIN, END = "<!-- table of slices -->", "<!-- end of the table of slices -->"
# Model: (preset, shape).
MODELS = {
    "3b": ("nv_reason_3b", "random:qwen2.5-vl-3b"),
    "7b": ("nv_reason_3b", "random:qwen2.5-vl-7b"),
    "qwen3-vl-4b": ("nv_reason_qwen3_4b", "random:qwen3-vl-4b"),
}
# Chips of each slice; all lie along `fsdp`, as the preset says.
SLICES = {"v5e:4x4": 16, "v5p:2x2x2": 8, "v5p:4x4x4": 64, "v6e:4x4": 16}
ROWS_A_STEP = 64
HEADER = """| model | task | trains | slice | program | arguments | padding | temporary | code, MiB | in all | moved a step (most of it) | fits |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


class Case(NamedTuple):
    """What a row is about: a key of MODELS, of TASKS, of LORA and of SLICES."""

    model: str
    task: str
    trains: str
    slice: str


def command(case: Case) -> list[str]:
    """Return the arguments of `python -m cxr_jax.plan`."""
    preset, shape = MODELS[case.model]
    section = "rl.micro_batches" if case.task == "rl" else "micro_batches"
    return [
        f"--config={case.task}:{preset}",
        f"--config.model={shape}",
        f"--config.{section}={ROWS_A_STEP // SLICES[case.slice]}",
        f"--topology={case.slice}",
        *LORA[case.trains],
    ]


def plan(case: Case) -> Programs:
    """Return what `plan --json` says of each program.

    Raises:
        RuntimeError: if it is no plan, with its last line.
    """
    line = [sys.executable, "-m", "cxr_jax.plan", *command(case), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=PAGE.parents[1])
    programs = [json.loads(row) for row in done.stdout.splitlines()]
    # 1: it does not fit, which is a plan, too.
    if done.returncode not in (0, 1) or not programs:
        raise RuntimeError(f"{tuple(case)}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return programs


def table_rows(case: Case, programs: Programs | None) -> str:
    """Return the rows of a case, one a program."""
    named = (case.model.upper(), case.task.upper(), case.trains, case.slice)
    if programs is None:
        return _row(*named, "not run", *[""] * 7)
    return "".join(_row(*named, *_cells(case, program)) for program in programs)


def _cells(case: Case, program: dict) -> list[str]:
    """What is said of one program."""
    from cxr_jax.planning.slices import KINDS, RESERVE

    sizes, moved = program["bytes"], program["moved"]
    memory = KINDS[case.slice.split(":")[0]].hbm_gib * (1 - RESERVE)
    held = sum(sizes.get(kind, 0) for kind in ("parameters", "optimizer", "fixed", "batch"))
    if program["refused"]:
        return [program["name"], f"{held / GIB:.1f}", "", "refused", "", "", "", "no"]
    most = max(moved, key=moved.__getitem__) if moved else ""
    return [
        program["name"],
        f"{held / GIB:.1f}",
        f"{sizes['padding'] / GIB:.2f}",
        f"{sizes['temporary'] / GIB:.1f}",
        f"{sizes['code'] / 2**20:,.0f}",
        f"{program['peak'] / GIB:.1f}",
        f"{sum(moved.values()) / GIB:,.0f} ({most})",
        "yes" if program["peak"] <= memory * GIB else "no",
    ]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def read_rows(file: Path) -> dict[Case, Programs]:
    """Read the rows that earlier calls have added to `file`; none if there is no such file."""
    if not file.exists():
        return {}
    entries = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {Case(*entry["key"]): entry["programs"] for entry in entries}


def main() -> int:
    """Run the command line of the process and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="what a row must have, by commas")
    parser.add_argument("--rows", type=Path, default=PAGE.with_name("tpu_plan.jsonl"))
    parser.add_argument("--write", action="store_true", help="write the table into docs/plan.md")
    args = parser.parse_args()

    cases = [Case(*case) for case in itertools.product(MODELS, TASKS, LORA, SLICES)]
    rows = read_rows(args.rows)
    only = set(filter(None, args.only.split(",")))
    for case in cases:
        # One at a time: each takes all cores and gigabytes of memory.
        if only and only <= set(case) and case not in rows:
            rows[case] = plan(case)
            with open(args.rows, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": case, "programs": rows[case]}) + "\n")
            print(table_rows(case, rows[case]), end="", flush=True)
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        table = HEADER + "".join(table_rows(case, rows.get(case)) for case in cases)
        PAGE.write_text(before + BEGIN + "\n\n" + table + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
