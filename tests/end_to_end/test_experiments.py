"""Every config file and every preset of it builds, says what it is, and passes a dry run."""

import importlib.util
import json

import numpy as np
import pytest
from forked import calls
from PIL import Image
from places import ROOT

from cxr_jax.errors import UserError
from cxr_jax.weights import pretrained

# Analyses are no configs, though they may read one.
FILES = [
    p
    for p in sorted((ROOT / "experiments").rglob("*.py"))
    if "get_config" in p.read_text() and p.parent.name != "analysis"
]

TASKS = [
    p for p in FILES if p.parent.name == "experiments"
]  # the presets of ablations/ are what is ablated


def _module(path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _presets(path) -> list[str]:
    """The presets that a config file names when it is asked for one that it has not."""
    with pytest.raises(UserError, match="has no preset '\\?'; it has: ") as e:
        _module(path).get_config("?")
    return str(e.value).split("it has: ")[1].split(", ")


PRESETS = [(path, preset) for path in FILES for preset in _presets(path)]
NAMES = [f"{path.relative_to(ROOT)}:{preset}" for path, preset in PRESETS]


def test_the_three_tasks_are_there():
    assert {p.name for p in FILES} >= {"sft.py", "rl.py", "eval.py"}
    assert all("phantom" in _presets(path) for path in TASKS)


@pytest.mark.parametrize("path, preset", PRESETS, ids=NAMES)
def test_builds(path, preset):
    config = _module(path).get_config(preset)
    assert config.task in ("sft", "rl", "evaluate") and _module(path).__doc__
    plain = json.loads(json.dumps(config.to_dict()))  # as the workdir keeps it
    assert plain == json.loads(json.dumps(_module(path).get_config(preset).to_dict()))
    assert config.data.source in ("phantom", "files") and isinstance(config.seed, int)


def test_the_default_preset_is_phantom():
    for path in TASKS:
        module = _module(path)
        assert module.get_config().to_dict() == module.get_config("phantom").to_dict()


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    rows = []
    for name in ("a.png", "b.png", "c.png"):  # a patient each: to train, to choose by, to test
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60), np.uint8)).save(
            folder / name
        )
        user = [{"type": "image", "image": name}, {"type": "text", "text": "What is wrong?"}]
        turns = [("user", user), ("assistant", "<think>Wet.</think><answer>Edema</answer>")]
        messages = [{"role": role, "content": content} for role, content in turns]
        row = {"id": name, "image": name, "patient_id": name, "solution": "Edema"}
        rows.append({**row, "messages": messages})
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    before = sorted(folder.iterdir())
    done = calls([_arguments(path, preset, folder) for path, preset in PRESETS])
    return dict(zip(NAMES, done, strict=True)), before == sorted(folder.iterdir())


def _arguments(path, preset, folder):
    config = _module(path).get_config(preset)
    arguments = [f"--config={path}:{preset}", "--dry_run", f"--workdir={folder}/run"]
    if not config.model or not _is_there(config.model):
        family = "qwen3-vl-" if "qwen3" in preset else ""
        arguments.append(f"--config.model=random:{family}phantom")
    if config.data.source == "files":
        arguments += [
            f"--config.data.manifest={folder}/rows.jsonl",
            f"--config.data.image_root={folder}",
        ]
    return arguments


def _is_there(model):
    try:
        pretrained.check_model(model)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(dry, name):
    code, out, err = dry[0][name]
    assert (code, err) == (0, ""), (out, err)
    assert out.splitlines()[-1] == "dry run: the config is valid; nothing was written"


def test_a_dry_run_writes_nothing(dry):
    assert dry[1]
