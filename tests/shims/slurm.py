"""Stands in for sbatch, srun, scancel and scontrol: one job, number 101, whose nodes are all this machine.

What matters for a batch script is as in Slurm: it runs as a copy from a spool folder; `--signal=B:` reaches it alone;
`scancel --signal` reaches the step's processes and not the script; srun answers SIGTERM by killing its processes;
a requeued script starts from its beginning with SLURM_RESTART_COUNT. `sbatch` waits for the end, as with --wait.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

STATE = pathlib.Path(os.environ["SHIM_STATE"])
JOB = "101"


def read(name, default=""):
    file = STATE / name
    return file.read_text() if file.exists() else default


def alive_tasks():
    return [int(f.read_text()) for f in STATE.glob("task*.pid")]


def send(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def sbatch(argv):
    cut = next(i for i, a in enumerate(argv) if not a.startswith("-"))
    script, args = argv[cut], argv[cut + 1 :]
    lines = [line.split(maxsplit=1)[1] for line in open(script) if line.startswith("#SBATCH ")]
    options = dict(a.strip()[2:].partition("=")[::2] for a in lines + argv[:cut])
    (STATE / "options.json").write_text(json.dumps(options))
    spool = STATE / "spool"
    spool.mkdir(exist_ok=True)
    copy = shutil.copy(script, spool / "slurm_script")
    per_node = int(options["ntasks-per-node"])
    env = os.environ | {
        "SLURM_JOB_ID": JOB,
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": str(int(options["nodes"]) * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
    }
    (STATE / "Requeue").write_text(str(int("requeue" in options)))
    for start in range(5):
        for name in ("requeued", "JobState"):
            (STATE / name).unlink(missing_ok=True)
        if start:
            env["SLURM_RESTART_COUNT"] = str(start)
        mode = "a" if options.get("open-mode") == "append" else "w"
        with open(options["output"].replace("%j", JOB), mode) as log:
            batch = subprocess.Popen(
                ["bash", copy, *args], env=env, stdout=log, stderr=log, start_new_session=True
            )
            (STATE / "batch.pid").write_text(str(batch.pid))
            code = batch.wait()
        if not (STATE / "requeued").exists():
            return code
    return 99


def srun(argv):
    cut = next(i for i, a in enumerate(argv) if not a.startswith("-"))
    options, command = argv[:cut], argv[cut:]
    n = int(os.environ["SLURM_NTASKS"])
    tasks, readers = [], []

    def forward(k, pipe):
        for line in pipe:
            sys.stdout.write(f"{k}: {line}" if "--label" in options else line)
            sys.stdout.flush()

    for k in range(n):
        env = os.environ | {
            "SLURM_PROCID": str(k),
            "SLURM_LOCALID": str(k % int(os.environ["SLURM_NTASKS_PER_NODE"])),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_TASKS_PER_NODE": os.environ["SLURM_NTASKS_PER_NODE"],
        }
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        tasks.append(subprocess.Popen(command, env=env, **out))
        (STATE / f"task{k}.pid").write_text(str(tasks[k].pid))
        readers.append(threading.Thread(target=forward, args=(k, tasks[k].stdout)))
        readers[k].start()

    def terminate(*_):
        print("srun: forcing job termination", flush=True)
        send([t.pid for t in tasks if t.returncode is None], signal.SIGKILL)

    signal.signal(signal.SIGTERM, terminate)
    codes = {}
    while len(codes) < n:
        for k, task in enumerate(tasks):
            if k not in codes and task.poll() is not None:
                codes[k] = task.returncode
                (STATE / f"task{k}.pid").unlink()
                if codes[k] and "--kill-on-bad-exit=1" in options:
                    send([t.pid for t in tasks if t.poll() is None], signal.SIGTERM)
        time.sleep(0.02)
    for reader in readers:
        reader.join()
    return max(c if c >= 0 else 128 - c for c in codes.values())


def scancel(argv):
    options = dict(a[2:].partition("=")[::2] for a in argv if a.startswith("--"))
    batch = int(read("batch.pid", "0"))
    number = getattr(signal, "SIG" + options.get("signal", "TERM"))
    if "batch" in options:
        send([batch], number)
    else:
        if "signal" not in options:
            (STATE / "JobState").write_text("CANCELLED")
            send([batch], number)
        send(alive_tasks(), number)
    return 0


def scontrol(argv):
    words = [a for a in argv if not a.startswith("-")]
    if words[0] == "requeue":
        if read("Requeue") == "0":
            sys.exit("Requested operation is presently disabled")
        (STATE / "requeued").touch()
    elif words[0] == "update":
        (STATE / "Requeue").write_text(re.search(r"Requeue=(\d)", " ".join(words))[1])
    else:
        print(
            f"JobId={JOB} JobName=a b JobState={read('JobState', 'RUNNING')} Reason=None Requeue={read('Requeue')}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(
        {"sbatch": sbatch, "srun": srun, "scancel": scancel, "scontrol": scontrol}[sys.argv[1]](
            sys.argv[2:]
        )
    )
