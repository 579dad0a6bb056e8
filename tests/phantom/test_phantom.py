"""The phantom world: sampling, labels, honest drawing, regions and DICOM."""

import jax
import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_voi_lut

from cxr_jax import phantom
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.phantom import geometry, render
from cxr_jax.phantom.constants import (
    BOTH,
    FINDINGS,
    OPACITIES,
    PATHOLOGIES,
    POSITIVE_AT,
    Acquisition,
    Finding,
)
from cxr_jax.phantom.dicom_writer import write_dicom
from cxr_jax.study import cases

PATHOLOGY = [
    CHEXPERT_14.index(n)
    for n in CHEXPERT_14
    if n not in ("No Finding", "Lung Opacity", "Support Devices")
]
_render = jax.jit(render)
_sample = jax.jit(phantom.sample_scenes, static_argnums=1)


@pytest.fixture(scope="module")
def many():
    out = {}
    for h in "AB":
        scene = jax.tree.map(
            np.asarray, _sample(phantom.example_keys(3, "test", h, np.arange(4096)), h)
        )
        out[h] = scene, np.asarray(phantom.labels(scene))
    return out


def test_larger_film_shows_the_same_body():
    """Films for the eye: what differs from the model's, made as small again, is the detector's noise."""
    batch = phantom.make_batch(5, "train", "A", np.arange(8))
    films = cases._films_for_the_eye(
        [phantom.scene_row(batch["scene"], row) for row in range(5)], 448
    )
    # One more than a batch of theirs: the last one is filled up, and no film is there twice.
    assert len(films) == cases._EYE_BATCH + 1
    for film, small in zip(films, batch["image"], strict=False):
        assert film.shape == (448, 448) and 0 <= film.min() and film.max() <= 1
        shrunk = film.reshape(224, 2, 224, 2).mean((1, 3))
        assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.99
        assert abs(shrunk.mean() - small.mean()) < 0.005


def test_batches_are_deterministic_and_finite():
    a = phantom.make_batch(5, "train", "A", np.arange(8))
    b = phantom.make_batch(5, "train", "A", np.arange(8)[::-1].copy())
    assert a["image"].shape == (8, 224, 224) and a["image"].dtype == np.float32
    assert a["labels"].dtype == np.int8 and a["regions"].shape == (8, 12, 8, 8)
    # an example depends on its own index only, not on its place in the batch
    np.testing.assert_allclose(a["image"], b["image"][::-1], atol=1e-6)
    assert np.isfinite(a["image"]).all() and a["image"].min() >= 0 and a["image"].max() <= 1
    assert a["image"].std(axis=(1, 2)).min() > 0.1


def test_streams_are_disjoint():
    index = np.arange(64)
    streams = [(s, sp, h) for s in (0, 1) for sp in phantom.SPLITS for h in phantom.HOSPITALS]
    data = [
        np.asarray(jax.random.key_data(phantom.example_keys(*stream, index))) for stream in streams
    ]
    assert len({tuple(k) for keys in data for k in keys}) == 64 * len(streams)
    with pytest.raises(ValueError, match="unknown split"):
        phantom.example_keys(0, "validation", "A", index)


@pytest.mark.parametrize("hospital", ["A", "B"])
def test_labels_follow_severity(many, hospital):
    scene, state = many[hospital]
    s = scene["severity"]
    for name, column in (
        ("Pneumothorax", Finding.PNEUMOTHORAX),
        ("Fracture", Finding.FRACTURE),
        ("Enlarged Cardiomediastinum", Finding.ENLARGED_CARDIOMEDIASTINUM),
    ):
        want = np.where(s[:, column] >= POSITIVE_AT, 1, np.where(s[:, column] > 0, -1, 0))
        np.testing.assert_array_equal(state[:, CHEXPERT_14.index(name)], want)
    parts = s[:, list(OPACITIES)]
    opacity = np.where((parts >= POSITIVE_AT).any(1), 1, np.where((parts > 0).any(1), -1, 0))
    np.testing.assert_array_equal(state[:, CHEXPERT_14.index("Lung Opacity")], opacity)
    np.testing.assert_array_equal(state[:, 0] == 1, ~(s[:, :PATHOLOGIES] >= POSITIVE_AT).any(1))
    np.testing.assert_array_equal(s[:, Finding.SUPPORT_DEVICES] == 1, scene["device"].any(1))
    assert ((s == 0) | ((s >= 0.15) & (s <= 1))).all()
    assert (
        scene["side"][:, [Finding.EDEMA, Finding.CARDIOMEGALY, Finding.ENLARGED_CARDIOMEDIASTINUM]]
        == BOTH
    ).all()


@pytest.mark.parametrize(
    "hospital,band,clean,device",
    [
        ("A", (0.08, 0.19), (0.26, 0.34), (0.21, 0.29)),
        ("B", (0.07, 0.30), (0.15, 0.22), (0.50, 0.60)),
    ],
)
def test_prevalence(many, hospital, band, clean, device):
    scene, state = many[hospital]
    rate = (state == 1).mean(0)
    assert (rate > 0.05).all(), "every label is reachable"
    assert band[0] < rate[PATHOLOGY].min() and rate[PATHOLOGY].max() < band[1], rate
    assert clean[0] < rate[0] < clean[1] and device[0] < rate[-1] < device[1], rate
    present = scene["severity"][:, :PATHOLOGIES] > 0
    subtle = present & (scene["severity"][:, :PATHOLOGIES] < POSITIVE_AT)
    assert 0.10 < subtle.sum() / present.sum() < 0.17


def test_any_two_findings_can_meet(many):
    present = many["B"][0]["severity"] > 0
    together = present.astype(int).T @ present.astype(int)
    assert together.min() > 0


@pytest.mark.parametrize("i", range(12), ids=FINDINGS)
def test_a_finding_is_drawn_where_its_region_says(many, i):
    scene, _ = many["A"]
    rows = np.flatnonzero(scene["severity"][:, i] >= POSITIVE_AT)[:16]
    sick = {k: v[rows].copy() for k, v in scene.items()}
    # nothing else in the picture, so that the difference is this finding alone
    keep = np.arange(12) == i
    sick["severity"] = sick["severity"] * keep
    sick["device"] = sick["device"] & (i == Finding.SUPPORT_DEVICES)
    healthy = dict(sick, severity=sick["severity"] * 0, device=sick["device"] & False)
    change = np.abs(np.asarray(_render(sick)) - np.asarray(_render(healthy))).reshape(
        -1, 8, 28, 8, 28
    )
    change = change.mean((2, 4))
    region = np.asarray(_regions(sick))[:, i]
    for diff, cells in zip(change, region, strict=True):
        # a large heart or raised diaphragm also moves things nearby; cells away from the region stay still
        inside, outside = (diff * cells).sum() / cells.sum(), diff[cells < 0.02].mean()
        assert inside > 0.006 and inside > 5 * outside, (inside, outside)


_regions = jax.jit(phantom.regions)


def test_regions_are_empty_when_absent_and_half_when_subtle(many):
    scene = {k: v[:16].copy() for k, v in many["A"][0].items()}
    scene["severity"][:, :PATHOLOGIES] = 0.0
    assert np.asarray(_regions(scene))[:, :PATHOLOGIES].max() == 0
    scene["severity"][:, Finding.CARDIOMEGALY] = 0.2
    assert np.asarray(_regions(scene))[:, Finding.CARDIOMEGALY].max() == 0.5
    scene["severity"][:, Finding.CARDIOMEGALY] = 0.8
    assert np.asarray(_regions(scene))[:, Finding.CARDIOMEGALY].max() == 1.0


@jax.jit
def _heart_and_chest(row):
    """Where the heart and the inner chest of a body that is not turned are drawn."""
    row = dict(row, acq=row["acq"].at[Acquisition.ROTATION].set(0.0))
    grid = geometry.chest(row)
    return geometry.heart(row, grid) > 0, (grid.depth > 0) & (grid.above_diaphragm > 0)


def _measured_ctr(row):
    """Widest extent of the drawn heart over the widest inner chest, in body units along a body row."""
    heart, inner = map(np.asarray, _heart_and_chest(row))
    width = lambda mask: np.ptp(np.flatnonzero(mask.any(0))) + 1
    return width(heart) / width(inner)


def test_cardiothoracic_ratio_is_drawn_honestly(many):
    row = jax.tree.map(lambda x: np.array(x[0]), many["A"][0])
    row["acq"][[Acquisition.AP, Acquisition.SHIFT_X, Acquisition.MAGNIFICATION]] = 0.0, 0.0, 1.0
    row["severity"] = np.zeros(12, np.float32)
    for severity in (0.2, 0.4, 0.7, 1.0):
        row["severity"][Finding.CARDIOMEGALY] = severity
        assert abs(_measured_ctr(row) - (0.5 + 0.2 * severity)) < 0.015
    row["severity"][:] = 0.0
    assert 0.35 < _measured_ctr(row) < 0.5
    for scene, _ in many.values():
        ratio = np.asarray(jax.jit(jax.vmap(geometry.cardiothoracic_ratio))(scene))
        present = scene["severity"][:, Finding.CARDIOMEGALY] > 0
        assert ratio[~present].max() < 0.5 < ratio[present].min()


def test_hospital_b_is_noisier_and_flatter(many):
    pictures = {h: np.asarray(_render({k: v[:16] for k, v in many[h][0].items()})) for h in "AB"}
    noise = {h: np.abs(np.diff(p, axis=2)).mean() for h, p in pictures.items()}
    assert noise["B"] > 1.3 * noise["A"]
    assert pictures["B"].std(axis=(1, 2)).mean() < pictures["A"].std(axis=(1, 2)).mean()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_round_trip(tmp_path, photometric):
    image = np.asarray(
        _render(
            jax.tree.map(
                lambda x: x[:16], _sample(phantom.example_keys(0, "test", "B", np.arange(16)), "B")
            )
        )
    )[3]
    path = tmp_path / "phantom.dcm"
    write_dicom(path, image, hospital="B", photometric=photometric, ap=True, seed=3)
    ds = pydicom.dcmread(path)
    assert (ds.Modality, ds.ViewPosition, ds.BitsStored, ds.PhotometricInterpretation) == (
        "DX",
        "AP",
        12,
        photometric,
    )
    assert str(ds.PatientName).startswith(
        "PHANTOM^"
    ) and ds.file_meta.TransferSyntaxUID.name.startswith("Explicit")
    shown = apply_voi_lut(ds.pixel_array, ds) / 4095.0
    if photometric == "MONOCHROME1":
        shown = 1.0 - shown
    assert np.abs(shown - image).max() < 2 / 4095
    first = path.read_bytes()
    write_dicom(path, image, hospital="B", photometric=photometric, ap=True, seed=3)
    assert path.read_bytes() == first, "the same phantom gives the same file"


def test_dicom_refuses_what_it_cannot_write(tmp_path):
    image = np.zeros((8, 8), np.float32)
    with pytest.raises(UserError, match="photometric"):
        write_dicom(tmp_path / "x.dcm", image, hospital="A", photometric="RGB", ap=False, seed=0)
    with pytest.raises(UserError, match="shape"):
        write_dicom(tmp_path / "x.dcm", image[None], hospital="A", ap=False, seed=0)
