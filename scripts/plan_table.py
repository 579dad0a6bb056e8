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
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
MODELS = {"3b": "random:qwen2.5-vl-3b", "7b": "random:qwen2.5-vl-7b"}
LORA = {"full": [], "lora": ["--config.lora.rank=16"]}
MESHES = {1: (1, 1, 1), 8: (1, 8, 1), 64: (1, 64, 1), 256: (1, 64, 4)}  # data, fsdp, tensor
TURNS = {
    1: 64,
    8: 8,
    64: 1,
    256: 1,
}  # so that a device works on one of the 64 rows (or prompts) of a step at a time
GIB = 2**30


def command(model: str, task: str, trains: str, devices: int) -> list[str]:
    """The arguments of `python -m cxr_jax.plan`."""
    turns = "rl.micro_batches" if task == "rl" else "micro_batches"
    mesh = [
        f"--config.mesh.{k}={v}"
        for k, v in zip(("data", "fsdp", "tensor"), MESHES[devices], strict=True)
    ]
    return [
        f"--config=experiments/{task}.py:nv_reason_3b",
        f"--config.model={MODELS[model]}",
        f"--devices={devices}",
        *mesh,
        f"--config.{turns}={TURNS[devices]}",
        *LORA[trains],
    ]


def run(key: tuple) -> dict:
    """One row: {"key", "programs": what `plan --json` says}. Raises RuntimeError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "cxr_jax.plan", *command(*key), "--json"],
        capture_output=True,
        text=True,
        cwd=PAGE.parents[1],
    )
    if done.returncode:
        raise RuntimeError(f"{key}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return {"key": key, "programs": [json.loads(line) for line in done.stdout.splitlines()]}


def line(key, programs) -> str:
    """A row of the table. Bytes: of the program that needs most; moved and computed: of all programs of a step."""
    model, task, trains, devices = key
    most = max(programs, key=lambda p: sum(p["bytes"].values()))
    gib = lambda *kinds: f"{sum(most['bytes'].get(k, 0) for k in kinds) / GIB:,.1f}"
    moved = sum(v for p in programs for v in p["moved"].values())
    largest = max(((v, k) for p in programs for k, v in p["moved"].items()), default=(0, ""))
    cells = (
        model.upper(),
        task.upper(),
        "LoRA" if trains == "lora" else trains,
        devices,
        " x ".join(map(str, MESHES[devices])),
        gib("parameters", "fixed"),
        gib("optimizer"),
        gib("batch"),
        gib("temporary"),
        f"{sum(most['bytes'].values()) / GIB:,.1f}",
        f"{sum(p['tokens'] for p in programs):,}",
        f"{sum(p['flops'] for p in programs) / 1e15:,.1f}",
        f"{moved / GIB:,.0f} ({largest[1]})" if moved else "0",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


HEADER = """| model | task | trains | devices | data x fsdp x tensor | weights | optimizer | batch | temporary, at most | in all, at most | tokens | PFLOP | moved, GiB (most of it) |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        default="",
        help="what a row must have: 3b or 7b, sft or rl, full or lora, devices",
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=PAGE.with_name("plan.jsonl"))
    args = parser.parse_args()
    keys = list(itertools.product(MODELS, ("sft", "rl"), LORA, MESHES))
    rows = {}
    if args.rows.exists():
        rows = {
            tuple(r["key"]): r["programs"]
            for r in map(json.loads, args.rows.read_text().splitlines())
        }
    only = set(filter(None, args.only.split(",")))
    wanted = [k for k in keys if k not in rows and only <= {str(x) for x in k}]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(run, wanted):
            rows[row["key"]] = row["programs"]
            with open(args.rows, "a") as f:
                f.write(json.dumps(row) + "\n")
            print(line(row["key"], row["programs"]), flush=True)
    head, _, rest = PAGE.read_text().partition(BEGIN)
    table = HEADER + "".join(line(k, rows[k]) + "\n" for k in keys if k in rows)
    PAGE.write_text(head + BEGIN + "\n" + table + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
