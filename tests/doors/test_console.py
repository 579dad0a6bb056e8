"""The console script, and what all commands have in common: flag spelling, --debug, exit codes, presets by name."""

import importlib
import os
import subprocess
import sys

import pytest
from forked import calls
from places import ROOT

import cxr_jax
from cxr_jax import __main__ as console
from cxr_jax.config import arguments, command_line
from cxr_jax.errors import RunFailedError, UserError, exit_code


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    """The console script sets the arguments of the process; each test gets them back."""
    monkeypatch.setattr(sys, "argv", ["cxr-jax"])


@pytest.mark.parametrize("given", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(given, capsys):
    assert console.main(given) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(f"  {name} " in out for name in console.COMMANDS)


def test_version(capsys):
    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cxr_jax {cxr_jax.__version__}\n"


@pytest.mark.parametrize("name, hint", [("trian", "'train'"), ("x", "train, predict, label")])
def test_unknown_command_is_one_line(name, hint, capsys):
    assert console.main([name, "--flag"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: unknown command {name!r}") and hint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_is_there(name):
    command = console.COMMANDS[name]
    assert callable(getattr(importlib.import_module(command.module), command.function))


def test_a_command_gets_the_arguments_and_gives_the_exit_code(tmp_path, capsys):
    assert console.main(["report", str(tmp_path / "no-run")]) == 2
    assert "no-run" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # argparse's --help
        console.main(["report", "--help"])
    assert capsys.readouterr().out.startswith("usage: cxr-jax report")


def test_the_script_starts_light():
    """Help and version import neither JAX nor numpy."""
    code = (
        "import sys; from cxr_jax.__main__ import main; main([]); main(['--version'])\n"
        "sys.exit(bool({'jax', 'numpy', 'absl'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0
    )


# ---- Flags -----------------------------------------------------------------------------------------


def parser():
    made = arguments.ArgumentParser("cxr_jax.x")
    made.add_argument("words", nargs="*")
    made.add_argument("--max_new_tokens", type=int)
    return made


@pytest.mark.parametrize(
    "given", [["--max_new_tokens=3"], ["--max-new-tokens=3"], ["--max-new_tokens", "3"]]
)
def test_flags_read_with_either_stroke(given):
    assert parser().parse_args(given).max_new_tokens == 3


def test_only_flags_are_respelt():
    words = ["a-b", "--", "--max-new-tokens", "--x-y"]
    assert parser().parse_args(words).words == ["a-b", "--max-new-tokens", "--x-y"]
    with pytest.raises(UserError, match="--no-such"):
        parser().parse_args(["--no-such=1"])
    with pytest.raises(UserError, match="--max-new"):  # no abbreviations
        parser().parse_args(["--max-new=1"])


def test_program_name(monkeypatch):
    assert arguments.program_name("cxr_jax.predict") == "python -m cxr_jax.predict"
    monkeypatch.setattr(sys, "argv", ["cxr-jax predict", "film.png"])
    assert arguments.program_name("cxr_jax.predict") == "cxr-jax predict"


# ---- Exit codes ------------------------------------------------------------------------------------


def raising(error):
    def action():
        raise error

    return action


def test_exit_codes(capsys):
    assert exit_code(lambda: None) == 0 and exit_code(lambda: 5) == 5
    assert exit_code(raising(UserError("two\nlines"))) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert exit_code(raising(RunFailedError("disk full"))) == 1
    assert capsys.readouterr().err == "error: disk full\n"
    assert exit_code(raising(KeyboardInterrupt())) == 1
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyError):
        exit_code(raising(KeyError("x")))
    assert exit_code(raising(KeyError("x")), failure=lambda error: type(error).__name__) == 1
    assert capsys.readouterr().err == "error: KeyError\n"


def test_debug_shows_the_traceback_above_the_line(capsys):
    assert exit_code(raising(UserError("bad")), debug=True) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: bad\n")


# ---- Presets ---------------------------------------------------------------------------------------


def test_preset_names():
    assert command_line.preset_names() == ["evaluate", "rl", "sft"]


def test_configs_by_name_are_those_of_experiments():
    """`--config=rl` is `--config=experiments/rl.py`, from any folder; what is no name says which names there are."""
    by_name = ["rl", "sft", "evaluate", "rl:nv_reason_3b,gspo"]
    by_file = [f"experiments/{file}" for file in ("rl.py", "sft.py", "eval.py")]
    by_file.append("experiments/rl.py:nv_reason_3b,gspo")
    random = ["--dry_run", "--config.model=random:phantom", "--config.seed=3"]
    # A published recipe needs data; its line names the key, which is enough to know that the preset was found.
    done = calls(
        [[f"--config={config}", *random] for config in [*by_name, *by_file]]
        + [["--config", "sft", *random], ["--config=rll", *random], ["--config=rl:nope"]]
    )
    for named, file in zip(done[:4], done[4:8], strict=True):
        assert named == file
    assert [code for code, *_ in done[:4]] == [0, 0, 0, 2]
    assert "config.data.manifest" in done[3][2]
    assert done[8] == done[1]
    assert done[9][2] == (
        "error: --config=rll: there is no such file, and the presets are evaluate, rl, sft\n"
    )
    assert done[10][0] == 2 and "no preset 'nope'" in done[10][2]


def test_train_and_plan_in_one_process():
    """Both have the flags of a config; the second to be imported does not define them again."""
    code = "import cxr_jax.main, cxr_jax.plan, sys; sys.exit(cxr_jax.plan.main(['plan', '--help']))"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert all(flag in done.stdout for flag in ("--config", "--devices", "--[no]debug"))
    assert "--workdir" not in done.stdout
