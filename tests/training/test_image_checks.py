"""A run that reads films in other sizes than its model's folder asks for says so, once."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from cxr_jax.config.sections import DataConfig, RunConfig
from cxr_jax.models.qwen2_5_vl.config import PHANTOM, write_config
from cxr_jax.training import image_checks

PUBLISHED = (3136, 12_845_056)
NATIVE = (128**2, 476**2)


@pytest.mark.parametrize(
    "own, wanted, task, is_told",
    [
        (NATIVE, NATIVE, "evaluate", False),
        (NATIVE, (224**2, 224**2), "evaluate", True),
        (NATIVE, (224**2, 224**2), "rl", True),
        ((224**2, 224**2), NATIVE, "rl", True),
        (PUBLISHED, NATIVE, "sft", False),
        (PUBLISHED, NATIVE, "evaluate", True),
    ],
)
def test_other_sizes_than_the_folder_s_are_told(tmp_path, capsys, own, wanted, task, is_told):
    (tmp_path / "config.json").write_text(json.dumps(write_config(PHANTOM)))
    (tmp_path / "model.safetensors").touch()  # weights are not read
    limits = dict(zip(("min_pixels", "max_pixels"), own, strict=True))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(limits))
    native = wanted == NATIVE
    data = DataConfig.with_defaults(
        source="files", size=224, min_pixels=NATIVE[0], max_pixels=NATIVE[1] if native else 0
    )
    run = RunConfig.from_config(ConfigDict({"task": task, "model": str(tmp_path)}))
    image_checks.warn_of_other_sizes(dataclasses.replace(run, data=data))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == is_told
    if is_told:
        assert said[0].startswith("warning: config.model=") and f"{own[1]:,} pixels" in said[0]
