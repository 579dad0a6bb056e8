"""Starts `cxr_jax.main` as several processes on this machine, each with some fake devices."""

import os
import socket
import sys

import forked


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(argv, processes: int, devices: int, **environment) -> list[forked.Process]:
    """The processes, `devices` fake ones each. One process is started as any user would, without CXR_* variables."""
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "CXR_START_TIMEOUT": "60",
        "CXR_HEARTBEAT_TIMEOUT": "10",
        **environment,
    }
    if processes > 1:
        env |= {"CXR_COORDINATOR": f"127.0.0.1:{free_port()}", "CXR_NUM_PROCESSES": str(processes)}
    return [
        forked.start(argv, env=env | ({"CXR_PROCESS_ID": str(k)} if processes > 1 else {}))
        for k in range(processes)
    ]


def end(started, timeout=600) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process."""
    try:
        out = [p.communicate(timeout=timeout) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, out, strict=True)]


if __name__ == "__main__":  # PROCESSES DEVICES FLAGS..., to try things by hand
    for k, (code, out, err) in enumerate(end(start(sys.argv[3:], *map(int, sys.argv[1:3])))):
        print(f"--- process {k}: exit code {code}\n{out}{err}")
