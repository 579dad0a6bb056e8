"""analysis.R, run by R itself over the rows of a small study, gives the numbers of analysis.json."""

import shutil
import subprocess

import pytest

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.study.analysis import endpoints, forms
from cxr_jax.study.analysis.auditing import auditing
from cxr_jax.study.analysis.rows import to_csv
from cxr_jax.study.protocol import make_protocol

from .drawn import READERS, drawn_rows

RSCRIPT = shutil.which("Rscript")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(RSCRIPT is None, reason="Rscript is not installed (apt-get install r-base)"),
]


# Films that a reader passed over: pairs without them are filled in, and cost a degree of freedom each.
SKIPPED = {("full", 1, 5), ("labels", 2, 5), ("manual", 4, 11)}
NO_SIDE = {("labels", 1, 1), ("full", 2, 4), ("full", 3, 7)}


def check_contrast(r, place, found, rel=1e-8):
    for name in ("estimate", "standard_error", "degrees", "low", "high", "p_value"):
        assert found[name] == pytest.approx(r[f"{place}.{name}"], rel=rel, abs=1e-12)


def test_r_gives_the_same_numbers(tmp_path):
    protocol = make_protocol(name="t", readers=READERS, seed=5)
    assert set(protocol.suspicion_labels) <= set(CHEXPERT_14)
    # A report that gives no side of a swapped finding has no answer, and its pair none either.
    rows = [
        row | {"detected_label": None, "carried": None, "corrected": None, "no_side": 1}
        if row["planted"] and (row["arm"], row["reader"], row["case"]) in NO_SIDE
        else row
        for row in drawn_rows(protocol)
        if (row["arm"], row["reader"], row["case"]) not in SKIPPED
    ]
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
    check_contrast(r, "time.contrast.full/manual", time["contrasts"]["full/manual"], rel=1e-3)
    points = endpoints.confidence(protocol, rows)["contrasts"]["full-labels"]["mean_points"]
    check_contrast(r, "confidence.mean_points.full-labels", points)
    confidence = endpoints.confidence(protocol, rows)["contrasts"]["full-manual"]
    assert confidence["estimate"] == pytest.approx(r["confidence.full.estimate"], abs=1e-3)
    assert confidence["standard_error"] == pytest.approx(
        r["confidence.full.standard_error"], abs=1e-3
    )
    found = auditing(protocol, rows)["contrasts"]["detected_label: full-labels"]
    assert found["gap"]["estimate"] == pytest.approx(r["detection.gap"], abs=1e-9)
    assert found["model"]["estimate"] == pytest.approx(r["detection.estimate"], abs=1e-3)
    check_contrast(r, "detection.of_readers.full-labels", found["of_readers"])
    over_reliance = auditing(protocol, rows)["over_reliance"]
    check_contrast(r, "over_reliance.contrast", over_reliance["contrast"])
    assert over_reliance["p_one_sided"] == pytest.approx(r["over_reliance.p_one_sided"], rel=1e-7)
    areas = endpoints.areas(protocol, rows)
    for label in (*protocol.suspicion_labels, "any"):
        assert areas[label]["f_value"] == pytest.approx(r[f"auc.{label}.f_value"], rel=1e-9)
        assert areas[label]["degrees"][1] == pytest.approx(r[f"auc.{label}.degrees"], rel=1e-9)
        assert areas[label]["p_value"] == pytest.approx(r[f"auc.{label}.p_value"], rel=1e-8)
    for arm, value in endpoints.label_f1(protocol, rows)["arms"].items():
        assert value == pytest.approx(r[f"label_f1.{arm}"], abs=1e-9)
