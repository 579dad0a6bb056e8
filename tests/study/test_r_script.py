"""analysis.R, run by R itself over the rows of a small study, gives the numbers of analysis.json."""

import shutil
import subprocess

import pytest

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.study import behaviour
from cxr_jax.study.analysis import endpoints, forms
from cxr_jax.study.analysis.rows import to_csv
from cxr_jax.study.protocol import make_protocol

RSCRIPT = shutil.which("Rscript")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(RSCRIPT is None, reason="Rscript is not installed (apt-get install r-base)"),
]
READERS, CASES = 4, 24


def drawn_rows(protocol):
    """Readings as `make_rows` gives them, from drawn conduct instead of sittings."""
    abnormal = [number % 2 == 0 for number in range(CASES)]
    conduct = behaviour.draw_conduct(
        behaviour.Effects(), protocol.arms, READERS, abnormal, [protocol.seed, 1]
    )
    rows = []
    for arm_index, arm in enumerate(protocol.arms):
        for reader in range(READERS):
            for case in range(CASES):
                place = arm_index, reader, case
                caught = int(conduct.caught[place])
                is_audited = case % 3 == 0 and arm != "manual"
                row = {
                    "reader": reader + 1,
                    "arm": arm,
                    "session": (arm_index + reader) % 3 + 1,
                    "position": (case * 7 + reader) % CASES + 1,
                    "case": case + 1,
                    "truth": int(abnormal[case]),
                    "planted": int(case % 3 == 0),
                    "kind": ("add", "drop", "side", "hedge")[case // 3 % 4]
                    if case % 3 == 0
                    else None,
                    "active_s": round(float(2.718281828 ** conduct.log_seconds[place]), 3),
                    "wall_s": None,
                    "confidence": int(conduct.confidence[place]),
                    "detected_label": caught if is_audited else None,
                    "detected_flag": caught if is_audited else None,
                    "false_flags": 0 if arm != "manual" else None,
                    "carried": 1 - caught if case % 3 == 0 else None,
                    "state": "signed",
                    "practice": 0,
                    "block": case % 3 + 1,
                    "idle_s": 0.0,
                    "paused_s": 0.0,
                    "clock_ok": 1,
                    "reopened": 0,
                    "true_positive": 2 + (case + reader) % 2,
                    "false_positive": (case + arm_index) % 2,
                    "false_negative": reader % 2,
                    "skip_reason": None,
                }
                for number, label in enumerate(protocol.suspicion_labels):
                    # Shifted by label, so that each has areas of its own.
                    score = float(conduct.suspicion[place]) + 0.3 * ((case + number) % 3)
                    row |= {f"rating_{label}": round(score, 4), f"truth_{label}": row["truth"]}
                rows.append(row)
    return rows


def test_r_gives_the_same_numbers(tmp_path):
    protocol = make_protocol(name="t", readers=READERS, seed=5)
    assert set(protocol.suspicion_labels) <= set(CHEXPERT_14)
    rows = drawn_rows(protocol)
    (tmp_path / "rows.csv").write_text(to_csv(rows))
    (tmp_path / "analysis.R").write_text(forms.r_script(protocol))
    command = [RSCRIPT, "--vanilla", "analysis.R", "rows.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "there is no package called" in done.stderr:
        pytest.skip("R's lme4 and ordinal are not installed (r-cran-lme4, r-cran-ordinal)")
    assert done.returncode == 0, done.stderr
    r = {
        name: float(value)
        for name, value in (line.split("\t") for line in done.stdout.splitlines() if "\t" in line)
    }
    time = endpoints.time_to_sign(protocol, rows)
    for kind in ("model", "without_reader_by_arm"):
        for arm in ("labels", "full"):
            effect = time["model"][kind]["effects"][arm]
            for name, value in effect.items():
                if f"time.{kind}.{arm}.{name}" in r:
                    assert value == pytest.approx(r[f"time.{kind}.{arm}.{name}"], abs=1e-4)
    contrast = time["contrasts"]["full/manual"]
    for name in ("estimate", "standard_error", "degrees", "low", "high", "p_value"):
        assert contrast[name] == pytest.approx(r[f"time.contrast.full/manual.{name}"], rel=1e-3)
    confidence = endpoints.confidence(protocol, rows)["contrasts"]["full-manual"]
    assert confidence["estimate"] == pytest.approx(r["confidence.full.estimate"], abs=1e-3)
    assert confidence["standard_error"] == pytest.approx(
        r["confidence.full.standard_error"], abs=1e-3
    )
    found = endpoints.auditing(protocol, rows)["contrasts"]["detected_label: full-labels"]
    assert found["gap"]["estimate"] == pytest.approx(r["detection.gap"], abs=1e-9)
    assert found["model"]["estimate"] == pytest.approx(r["detection.estimate"], abs=1e-3)
    areas = endpoints.areas(protocol, rows)
    for label in (*protocol.suspicion_labels, "any"):
        assert areas[label]["f_value"] == pytest.approx(r[f"auc.{label}.f_value"], rel=1e-9)
        assert areas[label]["degrees"][1] == pytest.approx(r[f"auc.{label}.degrees"], rel=1e-9)
        assert areas[label]["p_value"] == pytest.approx(r[f"auc.{label}.p_value"], rel=1e-8)
    for arm, value in endpoints.label_f1(protocol, rows)["arms"].items():
        assert value == pytest.approx(r[f"label_f1.{arm}"], abs=1e-9)
