"""The script for GKE against a stand-in for kubectl (tests/shims); two real processes of JAX on every cluster."""

import os
import signal

import pytest
import yaml
from clusters import GPU, gke, gke_end, gke_state, one_line, records, tpu_ready, wait_for_log


@pytest.mark.parametrize(
    "args, env, says",
    [
        ([], {}, "say what to do"),
        (["apply"], {}, "apply is not run"),
        (["run"], {}, "--config is missing"),
        (["run", "--config=x", "--workdir=/elsewhere/x"], {}, "is not under MOUNT"),
        (["run", "--config=x", "--dry_run"], {"IMAGE": ""}, "IMAGE is not set"),
        (
            ["run", "--config=x", "--dry_run"],
            {"GPU_TYPE": ""},
            "set TPU_TYPE and TPU_TOPOLOGY, or GPU_TYPE",
        ),
        (["run", "--config=x", "--dry_run"], {"TPU_TYPE": "t"}, "both set"),
        (
            ["run", "--config=x", "--dry_run"],
            {"GPU_TYPE": "", "TPU_TYPE": "t", "TPU_TOPOLOGY": "4"},
            "is not like 4x4",
        ),
        (
            ["run", "--config=x", "--dry_run"],
            {"GPU_TYPE": "", "TPU_TYPE": "t", "TPU_TOPOLOGY": "3x3"},
            "9 chips",
        ),
        (
            ["run", "--config=x", "--dry_run"],
            {"GPU_TYPE": "", "TPU_TYPE": "t", "TPU_TOPOLOGY": "4x4"},
            "4 nodes",
        ),
        (["run", "--config=x", "--dry_run"], {"NAME": "A"}, "NAME=A"),
        (["delete", "x"], {}, "delete takes no arguments"),
    ],
)
def test_gke_bad_usage(cluster, args, env, says):
    out, error, code = gke(cluster, *args, **env)
    assert code == 2 and out == "" and says in one_line(error)
    assert not (cluster.state / "kubectl.log").exists()


def test_gke_manifest(cluster):
    odd = '--config.note=a "q" \\ $(HOSTNAME) $$ é'
    env = {
        "GPU_TYPE": "",
        "NODES": "",
        "TPU_TYPE": "tpu-v6e-slice",
        "TPU_TOPOLOGY": "4x4",
        "SPOT": "1",
        "GRACE": "15",
    }
    env = GPU | env | {"SECRET": "keys", "NAME": "r1"}
    out, error, code = cluster.launch(
        "gke.sh", "--dry-run", "run", "--config=x", "--workdir=/data/a b", odd, **env
    )
    assert code == 0, error
    jobset = yaml.safe_load(out)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    network = {"enableDNSHostnames": True, "subdomain": "r1", "publishNotReadyAddresses": True}
    assert jobset["spec"]["network"] == network
    (worker,) = jobset["spec"]["replicatedJobs"]
    job, pod = worker["template"]["spec"], worker["template"]["spec"]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"], job["backoffLimit"]) == (
        4,
        4,
        "Indexed",
        0,
    )
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 15
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (box,) = pod["containers"]
    assert box["resources"] == {"limits": {"google.com/tpu": 4}}
    assert box["command"] == ["bash", "launch/_worker.sh"]
    assert box["args"] == ["--config=x", "--workdir=/data/a b", odd.replace("$", "$$")]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in box["env"]}
    port = cluster.env["JAX_COORDINATOR_PORT"]
    assert env["CXR_COORDINATOR"] == f"r1-worker-0-0.r1:{port}" and env["CXR_NUM_PROCESSES"] == "4"
    assert box["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert not (cluster.state / "kubectl.log").exists()


def test_gke_eviction_is_not_completion(cluster):
    """One pod is told to stop: all save and exit, which must not count as done; their successors complete the run."""
    out, error, code = gke(cluster, "run", *cluster.flags, CXR_DONE_WAIT="0")
    assert code == 0 and "created" in out, error
    assert gke(cluster, "run", *cluster.flags)[2] != 0  # one of this name is there
    cluster.started()
    os.kill(int((cluster.state / "pod1.pid").read_text()), signal.SIGTERM)
    end = gke_end(cluster)
    assert (end["state"], end["restarts"], end["replaced"]) == ("Completed", 0, 2)
    assert (cluster.workdir / "done.json").exists()
    out, _, _ = gke(cluster, "logs")
    for k in range(2):
        text = (cluster.state / f"pod{k}.log").read_text()
        for once in ("saved", "complete\n", "exit code 75", "exit code 0"):
            assert text.count(once) == 1, text
        assert f"[pod/pod{k}/main] complete" in out
        for record in records(text):
            assert record["rank"] == str(k) and record["args"] == cluster.flags
            assert (
                record["place"]["CXR_COORDINATOR"]
                == f"localhost:{cluster.env['JAX_COORDINATOR_PORT']}"
            )


@pytest.mark.parametrize(
    "code, times, end", [(2, 9, ("Failed", 0)), (1, 1, ("Completed", 1)), (1, 9, ("Failed", 2))]
)
def test_gke_failures(cluster, code, times, end):
    flags = [*cluster.flags, f"--config.exit={code}", f"--config.times={times}"]
    assert gke(cluster, "run", *flags, MAX_RESTARTS="2")[2] == 0
    state = gke_end(cluster)
    assert (state["state"], state["restarts"]) == end


def test_gke_delete_saves(cluster):
    assert gke(cluster, "run", *cluster.flags)[2] == 0
    cluster.started()
    assert gke(cluster, "delete")[2] == 0
    assert (cluster.workdir / "saved").exists() and gke_state(cluster)["state"] == "Deleted"
    assert gke(cluster, "run", *cluster.flags)[2] == 0
    assert gke_end(cluster)["state"] == "Completed" and (cluster.workdir / "done.json").exists()


# ---- two real processes of JAX, met on loopback as each cluster makes them meet


def sum_tpu(cluster, flags):
    env = tpu_ready(cluster)
    assert cluster.launch("tpu_vm.sh", "run", *flags, **env)[2] == 0
    wait_for_log(cluster, "exit code", 2, env)
    return cluster.launch("tpu_vm.sh", "logs", **env)[0]


def sum_slurm(cluster, flags):
    assert cluster.sbatch(*flags).wait(120) == 0
    return (cluster.root / "cxr_jax-101.log").read_text()


def sum_gke(cluster, flags):
    assert gke(cluster, "run", *flags)[2] == 0
    assert gke_end(cluster)["state"] == "Completed"
    return gke(cluster, "logs")[0]


@pytest.mark.slow
@pytest.mark.parametrize("start", [sum_tpu, sum_slurm, sum_gke])
def test_two_processes_meet(cluster, start):
    text = start(cluster, [*cluster.flags, "--config.sum=1"])
    print(text)  # pytest -rP shows it
    assert text.count("psum 3") == 2, text
    for k in range(2):
        assert f"process {k} of 2, coordinator " in text
    assert text.count(f":{cluster.env['JAX_COORDINATOR_PORT']}\n") == 2, text
