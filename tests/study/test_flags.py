"""Values that no study can run with are one line and exit code 2, before anything is written."""

import json
import re

import pytest

from cxr_jax.study.__main__ import main
from cxr_jax.study.behaviour import Effects, as_json, read_effects
from cxr_jax.study.commands import manage


@pytest.mark.parametrize(
    ("command", "flags", "told"),
    [
        ("washout", ["--days=nan", "--reason=holidays"], "--days"),
        ("washout", ["--days=inf", "--reason=holidays"], "--days"),
        # Its date would be beyond all calendars, at each reader's next request.
        ("washout", ["--days=1e9", "--reason=holidays"], "--days"),
        ("washout", ["--days=-1", "--reason=holidays"], "--days"),
        ("simulate", ["--threads=0"], "--threads"),
        ("simulate", ["--kills=-1"], "--kills"),
        ("power", ["--studies=0"], "--studies"),
        ("power", ["--cases=phantom:1"], "phantom:N"),
        ("power", ["--cases=phantom:999999999"], "phantom:N"),
        ("power", ["--plant_share=nan"], "plant_share"),
        ("power", ["--washout_days=nan"], "washout_days"),
    ],
)
def test_flag_that_is_no_number_of_its_kind(study, capsys, command, flags, told):
    head = manage.head_of(study.path)
    assert main([command, str(study.path), *flags]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert told in line and manage.head_of(study.path) == head


@pytest.mark.parametrize("name", ["washout_days", "idle_after_s", "clock_speed", "plant_share"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_protocol_with_a_number_that_is_none(tmp_path, capsys, name, number):
    path = tmp_path / "p.json"
    path.write_text(f'{{"name": "t", "simulated": true, "{name}": {number}}}')
    assert main(["new", str(tmp_path / "t"), f"--protocol={path}"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert name in line and not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"time": 3},
        {"time": {"full": float("nan")}},
        {"catch": {"full": 1.5}},
        {"skip": "often"},
        {"session": True},
        {"structure": 1},
        {"structure": "none"},
    ],
)
def test_effects_that_are_none(tmp_path, capsys, values):
    path = tmp_path / "E.json"
    path.write_text(json.dumps(values))
    assert main(["power", str(tmp_path / "t"), f"--effects={path}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_effects_as_they_are_written_are_read(tmp_path):
    path = tmp_path / "E.json"
    path.write_text(json.dumps(as_json(Effects())))
    assert as_json(read_effects(path)) == as_json(Effects())


def seen_by_power(tmp_path, capsys, effects, *flags):
    """What `power` prints, by what it is about: shares in percent."""
    path = tmp_path / "effects.json"
    path.write_text(json.dumps(effects))
    given = ["--cases=phantom:60", "--studies=40", f"--effects={path}", *flags]
    assert main(["power", str(tmp_path / "t"), *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {
        line.partition(":")[0].partition(" supported")[0]: int(re.search(r"in (\d+)%", line)[1])
        for line in lines
        if "%" in line
    }


def test_power_counts_over_reliance_and_holm(tmp_path, capsys):
    # Caught twice as often as with labels, and still carried twice as often as readers err by themselves.
    misled = seen_by_power(tmp_path, capsys, {})
    assert misled["detection"] > 90 and misled["no over-reliance"] < 10 and misled["H3"] < 10
    careful = {"catch": {"labels": 0.5, "full": 0.95}, "own_error": 0.2}
    assert seen_by_power(tmp_path, capsys, careful)["H3"] > 80
    nothing = seen_by_power(tmp_path, capsys, {"time": {}, "confidence": {}})
    assert nothing["H1"] <= 10 and nothing["H2"] <= 10
    # A study without plants asks for two.
    assert set(seen_by_power(tmp_path, capsys, {}, "--plant_share=0")) == {
        *("time", "confidence", "H1", "H2")
    }
