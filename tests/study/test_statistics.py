"""The statistics of a study: published numbers, R's numbers, and what must hold of any table."""

import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.study import behaviour
from cxr_jax.study.statistics import audit_rates, crossed, mixed_time, ordinal, orh, paired

ARMS = ("manual", "labels", "full")
# Van Dyke 1993 as analysed by MRMCaov and OR-DBM MRMC: AUC of each reader, and jackknife covariances.
VAN_DYKE = np.array(
    [
        [0.919645732689, 0.858776167472, 0.903864734299, 0.973107890499, 0.829790660225],
        [0.947826086957, 0.905314009662, 0.921739130435, 0.999355877617, 0.929951690821],
    ]
)
VAN_DYKE_COVARIANCES = orh.Covariances(
    error=0.000802288265572,
    same_reader=0.000346613709441,
    same_arm=0.000344074828861,
    neither=0.000239028370892,
)


@pytest.fixture(scope="module")
def rows():
    """4 readers, 24 cases, 3 arms: what R was given, as columns."""
    abnormal = np.arange(24) % 2 == 0
    conduct = behaviour.draw_conduct(behaviour.Effects(), ARMS, 4, abnormal, 5)
    arm, reader, case = (index.ravel() for index in np.indices(conduct.confidence.shape))
    return {
        "arm": [ARMS[place] for place in arm],
        "reader": reader,
        "case": case,
        "abnormal": abnormal[case],
        "session": (arm + reader) % 3,
        "log_seconds": conduct.log_seconds.ravel(),
        "confidence": conduct.confidence.ravel(),
        "caught": conduct.caught.ravel(),
    }


# ---- AUC -------------------------------------------------------------------------------------------


def test_published_study_comes_out_as_published():
    found = orh.compare_areas(VAN_DYKE, VAN_DYKE_COVARIANCES)
    assert found.f_value == pytest.approx(4.45631869316, abs=1e-8)
    assert found.degrees[1] == pytest.approx(15.2596745891, abs=1e-7)
    assert found.p_value == pytest.approx(0.0516656858193, abs=1e-9)
    [contrast] = found.contrasts
    assert contrast.estimate == pytest.approx(-0.0438003220612, abs=1e-11)
    assert (contrast.low, contrast.high) == pytest.approx(
        (-0.0879594985666, 0.000358854444), abs=1e-9
    )


def test_negative_share_of_the_cases_is_cut():
    # Franken 1992: Cov2 < Cov3, so the degrees of freedom are those of the residual alone.
    auc = [
        [0.853459973, 0.864993217, 0.857304387, 0.815241972],
        [0.849615559, 0.843509724, 0.840117594, 0.814337404],
    ]
    covariances = orh.Covariances(
        error=0.00152577624933,
        same_reader=0.00079168214695,
        same_arm=0.00048363767268,
        neither=0.00051250914743,
    )
    found = orh.compare_areas(auc, covariances)
    assert found.f_value == pytest.approx(4.69405772496, abs=1e-5)
    assert found.degrees == (1, 3)
    assert found.p_value == pytest.approx(0.118837857481, abs=1e-6)


def test_jackknife_and_delong_equal_their_definitions():
    generator = np.random.default_rng(0)
    truth = np.arange(22) < 10
    scores = generator.integers(1, 6, (2, 2, 22)).astype(float)

    def area(values, labels):
        pairs = values[labels][:, None] - values[~labels][None, :]
        return ((pairs > 0) + 0.5 * (pairs == 0)).mean()

    flat = scores.reshape(4, 22)
    assert np.allclose(orh.areas(scores, truth).ravel(), [area(row, truth) for row in flat])
    left_out = np.array(
        [[area(np.delete(row, k), np.delete(truth, k)) for k in range(22)] for row in flat]
    )
    centred = left_out - left_out.mean(1, keepdims=True)
    assert np.allclose(orh.covariance_matrix(scores, truth), centred @ centred.T * 21 / 22)
    # Both estimate one thing: with 22 cases they are within a fifth of each other.
    delong = orh.covariance_matrix(scores, truth, "delong")
    assert np.allclose(
        np.diagonal(delong), np.diagonal(orh.covariance_matrix(scores, truth)), rtol=0.2
    )


def test_three_arms_and_what_is_refused():
    abnormal = np.arange(40) % 2 == 0
    conduct = behaviour.draw_conduct(behaviour.Effects(), ARMS, 5, abnormal, 1)
    for design in orh.DESIGNS:
        found = orh.compare_arms(conduct.suspicion, abnormal, design=design)
        assert len(found.contrasts) == 3 and 0 <= found.p_value <= 1
    with pytest.raises(UserError, match="only 2 cases of a kind"):
        orh.compare_arms(conduct.suspicion, np.arange(40) < 2)
    with pytest.raises(UserError, match="missing"):
        orh.compare_arms(np.where(conduct.suspicion > 3, np.nan, conduct.suspicion), abnormal)


# ---- Time ------------------------------------------------------------------------------------------


def test_time_equals_lme4(rows):
    fixed, names = mixed_time.design_matrix(
        rows["arm"], "manual", abnormal=rows["abnormal"], sessions=rows["session"]
    )
    found = mixed_time.fit_mixed(
        rows["log_seconds"],
        fixed,
        names,
        readers=rows["reader"],
        cases=rows["case"],
        arms=rows["arm"],
    )
    # lme4 1.1 in R 4.2, the same rows; a boundary fit, at which statsmodels 0.15 stops elsewhere.
    assert found.effect("full") == pytest.approx((-0.24232401721, 0.05419675284), abs=1e-6)
    assert found.effect("labels") == pytest.approx((-0.02224966563, 0.05291127142), abs=1e-6)
    assert found.effect("full:abnormal") == pytest.approx((-0.16670592659, 0.10495156059), abs=1e-6)
    assert found.effect("session") == pytest.approx((-0.03463450246, 0.02709837642), abs=1e-6)
    assert found.variances["case"] == pytest.approx(0.09491517267, abs=1e-5)
    assert found.variances["reader_arm"] == pytest.approx(0, abs=1e-6)


def test_reader_by_arm_widens_the_error():
    conduct = behaviour.draw_conduct(
        behaviour.Effects(time_reader_arm=0.25), ARMS, 6, np.arange(30) % 2 == 0, 3
    )
    arm, reader, case = (index.ravel() for index in np.indices(conduct.confidence.shape))
    arms = [ARMS[place] for place in arm]
    fixed, names = mixed_time.design_matrix(arms, "manual")
    with_term, without = (
        mixed_time.fit_mixed(
            conduct.log_seconds.ravel(), fixed, names, readers=reader, cases=case, arms=term
        )
        for term in (arms, None)
    )
    assert with_term.effect("full")[1] > 1.5 * without.effect("full")[1]


def test_paired_contrast_of_a_hand_made_table():
    # Readers differ, cases do not: the variance is that of the readers' means, with their degrees.
    found = paired.contrast([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    assert found.estimate == 2.0 and found.standard_error == pytest.approx(1.0)
    assert found.degrees == pytest.approx(1.0)
    # A cell that the additive model predicts exactly changes no estimate.
    table = np.add.outer([0.0, 1.0, 5.0], [0.0, 2.0, 3.0, 7.0])
    holed = table.copy()
    holed[1, 2] = np.nan
    assert paired.contrast(holed).estimate == pytest.approx(paired.contrast(table).estimate)
    with pytest.raises(UserError, match="no pair at all"):
        paired.contrast([[1.0, np.nan], [2.0, np.nan]])


# ---- Confidence and detection ----------------------------------------------------------------------


def test_confidence_equals_clmm_and_detection_equals_glmer(rows):
    arms = np.array(rows["arm"])
    fixed = np.stack([arms == "full", arms == "labels"], 1)
    found = ordinal.fit_ordinal(rows["confidence"], fixed, [rows["reader"], rows["case"]])
    # ordinal 2022.11 in R 4.2, the same rows.
    cuts = [-3.4120802347, -2.3664741141, -1.5368677889, -0.2251059233, 1.1237234320, 2.4842489959]
    assert found.cuts == pytest.approx(cuts, abs=1e-4)
    assert found.effects == pytest.approx([0.8159712568, -0.1684831655], abs=1e-4)
    assert found.effect_errors == pytest.approx([0.2655771554, 0.2582922616], abs=1e-4)
    assert found.spreads == pytest.approx([0.2863070818, 0.6827599996], abs=1e-4)
    assert found.log_likelihood == pytest.approx(-490.0241878, abs=1e-5)
    assert found.converged

    # lme4::glmer, arms with AI alone; both spreads are nothing.
    has_ai = arms != "manual"
    detection = ordinal.fit_ordinal(
        rows["caught"][has_ai], fixed[has_ai, :1], [rows["reader"][has_ai], rows["case"][has_ai]]
    )
    assert detection.effects == pytest.approx([1.8777017404], abs=1e-4)
    assert detection.effect_errors == pytest.approx([0.3211950493], abs=1e-4)


# Two arms, five readers, twelve cases, in this order; readers differ in what the arm does to them.
POINTS = (
    "322133323131011010003110032212232132113023310230000000000000"
    "201011122132200112212020333330333233333333333333202031312131"
)


def test_reader_by_arm_equals_clmm():
    arm, reader, case = (place.ravel() for place in np.indices((2, 5, 12)))
    points = [int(point) for point in POINTS]
    random = [reader, case, 2 * reader + arm]
    found = ordinal.fit_ordinal(points, arm[:, None].astype(float), random)
    # ordinal 2022.11 in R 4.2: y ~ arm + (1 | reader) + (1 | case) + (1 | reader:arm).
    assert found.effects == pytest.approx([2.5696301688], abs=1e-4)
    assert found.effect_errors == pytest.approx([1.416970232], abs=1e-4)
    assert found.spreads == pytest.approx([1.5555732631, 0.8867781139, 1.9903511425], abs=1e-3)
    assert found.log_likelihood == pytest.approx(-129.0719692, abs=1e-5)


# ---- Rates and multiplicity ------------------------------------------------------------------------


def test_mcnemar_and_holm_by_hand():
    found = audit_rates.mcnemar([1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0])
    assert (found.first_only, found.second_only) == (5, 0)
    assert found.p_value == pytest.approx(2 / 32)
    assert audit_rates.mcnemar([1, 0], [1, 0]).p_value == 1.0
    adjusted = audit_rates.holm({"H1": 0.03, "H2": 0.01, "H3": 0.04})
    assert adjusted == pytest.approx({"H1": 0.06, "H2": 0.03, "H3": 0.06})


def test_rates_say_when_nothing_was_counted():
    assert audit_rates.rate([]).share is None
    by_kind = audit_rates.rates_by(["add", "side", "add"], [True, False, False])
    assert by_kind["add"].share == 0.5 and by_kind["side"].events == 0


def test_crossed_bootstrap_is_wider_than_one_over_cases():
    conduct = behaviour.draw_conduct(
        behaviour.Effects(time_reader_arm=0.3), ARMS, 6, np.arange(30) % 2 == 0, 2
    )
    [found] = crossed.crossed_bootstrap(
        conduct.log_seconds, [crossed.mean_difference(2, 0)], resamples=300
    )
    difference = conduct.log_seconds[2] - conduct.log_seconds[0]
    assert found.estimate == pytest.approx(difference.mean())
    of_cases = difference.mean(0).std(ddof=1) / 30**0.5 * 1.96
    assert found.high - found.low > 2 * 1.3 * of_cases
