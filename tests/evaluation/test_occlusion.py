"""Covers of findings: a reader that looks at them loses with the dose, and nothing where another place is covered."""

import types

import numpy as np
import pytest

from cxr_jax.config.sections import EvaluationConfig
from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.evaluation.occlusion import DOSES, CoverAudit, cover, noise_for, region_masks

COUNT = 24


@pytest.fixture(scope="module")
def batch():
    return PhantomSource("A", "test").batch(np.arange(COUNT))


class LookingReader:
    """Names label 1 if the place that it knows is as it was, and label 2 if any pixel of the image is."""

    def __init__(self, batch):
        self.masks, self.films = region_masks(batch), np.asarray(batch["image"])

    def read(self, params, images, texts):
        answer = np.zeros((len(images), 14), bool)
        for row, (image, text) in enumerate(zip(images, texts, strict=True)):
            place = int(text)
            mask = np.kron(self.masks[place], np.ones((28, 28), bool))
            same = np.abs(image - self.films[place]) < 0.004
            answer[row, 1], answer[row, 2] = same[mask].mean() > 0.5, same.mean() > 0.2
        return types.SimpleNamespace(answer=answer, valid=np.ones(len(images), bool))


def test_what_is_drawn_is_covered_and_nothing_else(batch):
    audit = CoverAudit(
        LookingReader(batch),
        {},
        [str(place) for place in range(COUNT)],
        EvaluationConfig.with_defaults(n_audit=20),
    )
    for start in range(0, COUNT, 7):
        places = np.arange(start, min(start + 7, COUNT))
        audit.add(places, {name: batch[name][places] for name in ("image", "regions")})
    places, answers = audit.joined()
    has_finding = region_masks(batch).any((1, 2))
    assert places.tolist() == np.flatnonzero(has_finding[:20]).tolist() and len(places) > 5
    assert [*answers] == ["noise", *(f"covered {dose:g}" for dose in DOSES), "mirrored"]
    assert all(len(found.labels) == len(places) for found in answers.values())
    assert not answers["noise"].labels.any() and not answers["covered 1"].labels[:, 1].any()
    # Beside the finding: it can be seen in nearly all films, as far as the feathered edges leave it alone.
    assert answers["mirrored"].labels[:, 1].mean() > 0.8
    assert answers["covered 1"].labels[:, 2].mean() > 0.8


def test_a_cover_is_of_the_film_s_own_grey_and_fades_with_the_dose(batch):
    films = np.asarray(batch["image"])[:3]
    masks = np.zeros((3, 8, 8), bool)
    masks[:, 2:5, 2:5] = True
    none, half, whole = (cover(films, masks, masks, dose, [0, 1, 2]) for dose in (0, 0.5, 1))
    np.testing.assert_array_equal(none, films)
    np.testing.assert_allclose(half, (films + whole) / 2, atol=1e-6)
    inner = np.zeros((224, 224), bool)
    inner[28 * 2 + 13 : 28 * 5 - 13, 28 * 2 + 13 : 28 * 5 - 13] = True
    far = np.ones((224, 224), bool)
    far[28 * 2 - 13 : 28 * 5 + 13, 28 * 2 - 13 : 28 * 5 + 13] = False
    for film, covered in zip(films, whole, strict=True):
        np.testing.assert_array_equal(covered[far], film[far])
        assert abs(np.corrcoef(covered[inner], film[inner])[0, 1]) < 0.5
    levels = [(np.full((40, 60), 100, np.uint8), np.arange(800, dtype=np.uint8).reshape(20, 40))]
    made = noise_for(levels, [3])[0]
    assert [film.shape for film in made] == [(40, 60), (20, 40)]
    assert made[0].dtype == np.uint8 and (made[0] == 100).all()
    assert abs(float(np.median(made[1])) - 128) < 30 and made[1].std() > 30
