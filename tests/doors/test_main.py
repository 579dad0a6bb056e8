"""The command line: what is wrong with a call is one line on stderr and exit code 2, and nothing is left behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
from forked import calls
from PIL import Image
from places import ROOT

RL, SFT, EVAL = (f"--config=experiments/{x}.py" for x in ("rl", "sft", "eval"))
RANDOM = "--config.model=random:phantom"


def _row(name, **changes):
    talk = [{"from": "human", "value": "Find abnormalities and support devices."}]
    row = {"id": name, "image": name, "subject_id": name, "conversations": talk}
    return row | {"solution": "Edema"} | changes


def _manifest(folder, name, *rows):
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with images, manifests that have one thing wrong each, and a plain file."""
    folder = tmp_path_factory.mktemp("main")
    (folder / "file").write_text("mine")
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60), np.uint8)).save(
            folder / name
        )
    torn = ("torn.png", "torn_too.png", "torn_as_well.png")
    for name in torn:
        (folder / name).write_bytes((folder / "a.png").read_bytes()[:200])
    good = _row("a.png")
    _manifest(folder, "label.jsonl", good, _row("b.png", solution="Oedema"))
    _manifest(folder, "image.jsonl", good, _row("missing.png"))
    _manifest(folder, "one.jsonl", good)
    _manifest(folder, "torn.jsonl", *map(_row, torn))
    rows = [good, _row("b.png"), _row("c.png")]
    _manifest(folder, "good.jsonl", *rows)
    talk = [*good["conversations"], {"from": "tool", "value": "Edema: 0.9"}]
    _manifest(folder, "tool.jsonl", good | {"conversations": talk}, *rows[1:])
    talk = [*good["conversations"], {"from": "gpt", "value": "None."}, *good["conversations"]]
    _manifest(folder, "later.jsonl", *rows[1:], good | {"conversations": talk})
    (folder / "broken.py").write_text("def get_config(:\n")
    (folder / "empty.py").write_text("x = 1\n")
    (folder / "raises.py").write_text("def get_config():\n    raise ValueError('one\\ntwo')\n")
    (folder / "task.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'task': 'fly'})\n"
    )
    (folder / "reward.py").write_text(
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('rl_base', {str(ROOT / 'experiments' / 'rl.py')!r})\n"
        "base = u.module_from_spec(spec)\nspec.loader.exec_module(base)\n"
        "def get_config():\n    c = base.get_config()\n    c.model = 'random:phantom'\n"
        "    c.rl.reward_weights = {'beauty': 1.0}\n    return c\n"
    )
    return folder


def files(manifest, *more):
    return [
        RL + ":files",
        RANDOM,
        f"--config.data.manifest=@/{manifest}",
        "--config.data.image_root=@",
        *more,
    ]


def tiny(manifest, *more):
    return files(
        manifest,
        *more,
        "--config.eval.batch_size=2",
        "--config.eval.n_final=2",
        "--config.max_completion=8",
    )


# name: (arguments, what the line must name). "@" stands for the folder above; a --workdir is added if there is none.
CASES = {
    "no config": ([], "--config is missing"),
    "no such config": (["--config=experiments/none.py"], "experiments/none.py"),
    "config is a folder": (["--config=experiments"], "experiments"),
    "config does not parse": (["--config=@/broken.py"], "SyntaxError"),
    "config without get_config": (["--config=@/empty.py"], "get_config"),
    "config raises over two lines": (["--config=@/raises.py"], "@/raises.py"),
    "unknown task": (["--config=@/task.py"], "config.task='fly'"),
    "unknown preset": ([RL + ":nope"], "no preset 'nope'"),
    "unknown flag": ([RL, "--colour=red"], "colour"),
    "stray argument": ([RL, "stray"], "'stray'"),
    "unknown key": ([RL, "--config.stepz=3"], "did you mean 'steps'"),
    "unknown nested key": ([RL, "--config.rl.group=3"], "--config.rl.group=3"),
    "wrong type": ([RL, "--config.steps=many"], "--config.steps=many"),
    "no workdir": ([RL, RANDOM, "--workdir="], "--workdir is missing"),
    "unwritable workdir": ([RL, RANDOM, "--workdir=@/file/run"], "--workdir=@/file/run"),
    "workdir is a file": ([RL, RANDOM, "--workdir=@/file"], "--workdir=@/file"),
    "no model": ([RL, "--config.model="], "config.model"),
    "no such model": ([RL, "--config.model=@/nowhere"], "@/nowhere"),
    "no such size": ([RL, "--config.model=random:9b"], "random:9b"),
    "unknown source": ([RL, RANDOM, "--config.data.source=dreams"], "config.data.source='dreams'"),
    "unknown hospital": ([RL, RANDOM, "--config.data.hospital=C"], "config.data.hospital='C'"),
    "unknown held-out hospital": (
        [SFT, "--config.data.ood_hospital=C"],
        "config.data.ood_hospital='C'",
    ),
    "no steps": ([SFT, "--config.steps=0"], "config.steps=0"),
    "empty batch": ([SFT, "--config.batch_size=0"], "config.batch_size=0"),
    "no prompts": ([RL, RANDOM, "--config.rl.prompts_per_step=0"], "config.rl.prompts_per_step=0"),
    "group of one": ([RL, RANDOM, "--config.rl.group_size=1"], "config.rl.group_size"),
    "unknown reward": (["--config=@/reward.py"], "'beauty'"),
    "unknown loss": ([RL, RANDOM, "--config.rl.aggregation=mean"], "config.rl.aggregation='mean'"),
    "unknown scaling": (
        [RL, RANDOM, "--config.rl.scale_rewards=rank"],
        "config.rl.scale_rewards='rank'",
    ),
    "cold sampling": ([RL, RANDOM, "--config.rl.temperature=0.0"], "config.rl.temperature=0.0"),
    "never look": ([RL, RANDOM, "--config.eval.every=0"], "config.eval.every=0"),
    "choose by what": (
        [RL, RANDOM, "--config.eval.select_by=beauty"],
        "config.eval.select_by='beauty'",
    ),
    "unknown remat": ([RL, RANDOM, "--config.remat=some"], "config.remat='some'"),
    "uneven parts": ([SFT, "--config.micro_batches=3"], "does not divide into 3 micro-batches"),
    "uneven parts of RL": (
        [RL, RANDOM, "--config.rl.micro_batches=3"],
        "config.rl.prompts_per_step=16",
    ),
    "decay of one": ([RL, RANDOM, "--config.optim.b1=1.0", "--dry_run"], "config.optim.b1=1.0"),
    "endless rate": ([RL, RANDOM, "--config.optim.lr=inf"], "config.optim.lr=inf"),
    "unknown type": ([SFT, "--config.dtype=float8"], "config.dtype='float8'"),
    "unknown adapter": (
        [SFT, "--config.lora.rank=4", "--config.lora.targets=('ears',)"],
        "lora target 'ears'",
    ),
    "negative rank": ([SFT, "--config.lora.rank=-1"], "config.lora.rank=-1"),
    "frozen and adapters": (
        [SFT, "--config.lora.rank=4", "--config.optim.frozen=('vision',)"],
        "config.optim.frozen",
    ),
    "seed of 33 bits": ([RL, RANDOM, "--config.seed=4294967296"], "config.seed=4294967296"),
    "bad pattern": ([RL, RANDOM, "--config.optim.frozen=('(',)"], "config.optim.frozen"),
    "no room for the texts": ([SFT, "--config.max_completion=40"], "config.max_completion=40"),
    "empty evaluation": ([EVAL, RANDOM, "--config.eval.n_final=0"], "config.eval.n_final=0"),
    "empty evaluation of a set by name": (
        [
            "--config=evaluate:files",
            RANDOM,
            "--config.eval.n_final=0",
            "--config.data.eval=b: phantom hospital=B",
        ],
        "config.eval.n_final=0",
    ),
    "no manifest": ([RL + ":files", RANDOM], "config.data.manifest"),
    "missing manifest": (files("none.jsonl"), "@/none.jsonl"),
    "unknown label": (files("label.jsonl"), "@/label.jsonl:2: name 1 in solution"),
    "missing image": (files("image.jsonl"), "@/image.jsonl:2: image file not found: 'missing.png'"),
    "one patient": (files("one.jsonl"), "@/one.jsonl"),
    "odd size": (files("good.jsonl", "--config.data.size=100"), "config.data.size=100"),
    "torn image": (tiny("torn.jsonl"), "@/torn"),
    "torn images, checked": (
        tiny("torn.jsonl", "--check-images", "--dry-run"),
        "3 of 3 films cannot be read, the first: @/torn.png",
    ),
    "no files to check": ([RL, RANDOM, "--check_images"], "--check_images"),
    "a tool's turn": (files("tool.jsonl"), "@/tool.jsonl:1: a turn of a tool"),
    "later turns": (files("later.jsonl"), "@/later.jsonl:3: the last question has no answer"),
    "no such change": ([RL, RANDOM, "--may_change=steps,beauty"], "--may_change=beauty"),
    "repeats by what": (files("good.jsonl", "--config.data.repeats=drop"), "config.data.repeats"),
    "files by the phantom preset": (
        [RL, RANDOM, "--config.data.source=files"],
        "needs config.data.manifest",
    ),
    "phantoms by the files preset": (
        [RL + ":files", RANDOM, "--config.data.source=phantom"],
        "config.data.hospital",
    ),
    "only phantoms know regions": (
        [
            SFT + ":nv_reason_3b",
            RANDOM,
            "--config.locate_weight=0.1",
            "--config.data.manifest=@/good.jsonl",
            "--config.data.image_root=@",
        ],
        "config.locate_weight",
    ),
    "nothing to imitate": (
        [
            SFT + ":nv_reason_3b",
            RANDOM,
            "--config.data.manifest=@/good.jsonl",
            "--config.data.image_root=@",
        ],
        "has no assistant text",
    ),
}

GOOD = [
    ["--help"],
    [RL, "--debug", "--colour=red"],
    [f"--config={ROOT}/experiments/eval.py", RANDOM, "--dry_run"],
]


@pytest.fixture(scope="module")
def results(here):
    def arguments(given):
        given = [a.replace("@", str(here)) for a in given]
        return (
            given
            if any(a.startswith("--workdir") for a in given)
            else [*given, f"--workdir={here}/new/run"]
        )

    before = _tree(here)
    done = calls([*(arguments(a) for a, _ in CASES.values()), *GOOD])
    return dict(zip([*CASES, "help", "debug", "dry run"], done, strict=True)), before, _tree(here)


def _tree(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts}


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_names_it(results, here, name):
    code, out, err = results[0][name]
    assert code == 2, (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert CASES[name][1].replace("@", str(here)) in err
    assert "Traceback" not in out + err


def test_nothing_is_left_behind(results):
    _, before, after = results
    assert after == before


def test_good_calls(results):
    help_, debug, run = (results[0][name] for name in ("help", "debug", "dry run"))
    assert help_[0] == 0 and "--workdir" in help_[1] and "--dry_run" in help_[1] and help_[2] == ""
    assert "  rl.epsilon  [number > 0, <= 1]  default 0.2\n" in help_[1]  # every key of a config
    assert (
        debug[0] == 2
        and "Traceback" in debug[2]
        and debug[2].splitlines()[-1].startswith("error: ")
    )
    assert run[0] == 0 and "nothing was written" in run[1], run


def test_the_module_itself_exits_with_the_code():
    command = [sys.executable, "-m", "cxr_jax.main", "--config=experiments/none.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --config=experiments/none.py: there is no such file\n"
