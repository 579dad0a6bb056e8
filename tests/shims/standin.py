"""Stands in for cxr_jax.main: a run that waits for SIGTERM, saves, and is complete when started again."""

import json
import os
import pathlib
import signal
import sys
import time

flags = dict(a[2:].partition("=")[::2] for a in sys.argv[1:])
rank = next(
    os.environ[n]
    for n in ("CXR_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    if n in os.environ
)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
place = {k: v for k, v in os.environ.items() if k.startswith(("CXR_", "JAX_", "TOKEN"))}
print(json.dumps({"rank": rank, "args": sys.argv[1:], "place": place}), flush=True)
folder = pathlib.Path(flags["workdir"])
folder.mkdir(parents=True, exist_ok=True)
if "config.sum" in flags:
    from cxr_jax.runtime import processes

    processes.start()
    import jax
    import numpy as np

    mine = np.full((jax.local_device_count(),), processes.index() + 1.0)
    total = jax.pmap(lambda x: jax.lax.psum(x, "all"), axis_name="all")(mine)
    print(f"psum {float(total.addressable_data(0)[0]):.0f}", file=sys.stderr, flush=True)
    if rank == "0":
        (folder / "done.json").write_text("{}")
    sys.exit(processes.leave(0))
counts = ("CXR_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
count = int(next((os.environ[n] for n in counts if n in os.environ), 1))


def all_there(name):
    (folder / f"{name}{rank}").touch()
    while not told and sum((folder / f"{name}{k}").exists() for k in range(count)) < count:
        time.sleep(0.02)


if "config.exit" in flags:  # all fail so many times, none before each has begun
    try_number = 1
    while (folder / f"try{try_number}.{rank}").exists():
        try_number += 1
    all_there(f"try{try_number}.")
    if try_number <= int(flags.get("config.times", "99")):
        sys.exit(int(flags["config.exit"]))
    (folder / "saved").touch()
was_saved = (folder / "saved").exists()
all_there("again" if was_saved else "started")
while not (
    was_saved or told or (folder / "saved").exists()
):  # the processes agree to stop by way of the folder
    time.sleep(0.02)
if was_saved:
    (folder / "done.json").write_text("{}")
    print("complete", flush=True)
else:
    (folder / "saved").touch()
    print("saved", flush=True)
