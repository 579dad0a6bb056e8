"""Rows of single films -> questions about studies -> an evaluation, whose answers are those that serving gives."""

import json

import numpy as np
import pytest
from forked import calls
from PIL import Image as PilImage

import cxr_jax
from cxr_jax.data.sources import manifest, phantom

IMAGES = "frontal,lateral,prior"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 patients with three studies each of a frontal and, in two of three, a lateral film; of several sizes."""
    made = tmp_path_factory.mktemp("studies")
    films = phantom.PhantomSource("A", "train", 0).batch(np.arange(6))["image"]
    lines = []
    for number in range(144):
        study, is_lateral = number // 2 % 3, number % 2
        if is_lateral and study == 1:
            continue
        name = f"{number:03}.png"
        levels = (np.asarray(films[number % 6]) * 255).astype(np.uint8)
        PilImage.fromarray(levels).resize((224, 168 + 28 * (number % 5))).save(made / name)
        row = {
            "image": name,
            "patient_id": f"p{number // 6}",
            "study_id": study,
            "solution": "Edema",
        }
        row |= {"StudyDate": f"200{study}0101", "view": ("PA", "LL")[is_lateral]}
        lines.append(json.dumps(row | {"prompt": "Find abnormalities and support devices."}))
    (made / "rows.jsonl").write_text("\n".join(lines))
    return made


@pytest.mark.slow
def test_an_evaluation_of_studies_gives_the_answers_of_serving(folder, tmp_path):
    data = {
        "manifest": folder / "rows.jsonl",
        "image_root": folder,
        "images": IMAGES,
        "image_gate": "off",
        "min_pixels": 28**2,
        "max_pixels": 112**2,
    }
    argv = ["--config=evaluate:files", f"--workdir={tmp_path / 'run'}"]
    argv += [f"--config.data.{key}={value}" for key, value in data.items()]
    argv += ["--config.max_completion=24", "--config.eval.n_final=12", "--config.eval.batch_size=6"]
    argv += ["--config.eval.bootstrap=10", "--config.eval.cases=12"]
    [(code, _, errors)] = calls([argv])
    assert code == 0, errors

    rows = manifest.load_rows(folder / "rows.jsonl", folder, images=IMAGES)
    by_id = {row.id: row for row in rows}
    model = cxr_jax.load("phantom", image_gate="off")
    model.__dict__["pixel_limits"] = (28**2, 112**2)  # as an export of such a run says them
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    asked = [by_id[case["id"]] for case in cases]
    assert {len(row.image_paths) for row in asked} == {2, 3}  # and both in one batch
    said = model.generate(
        [[str(path) for path in row.image_paths] for row in asked],
        [row.prompt for row in asked],
        24,
    )
    assert [case["completion"] for case in cases] == [answer.text for [answer] in said]
    assert all("Current frontal: <image>" in case["prompt"] for case in cases)
