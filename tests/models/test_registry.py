"""registry.py: every family is complete, and a folder's model_type finds it."""

import json
import pathlib
import re

import jax
import pytest
from places import ROOT

from cxr_jax import asset
from cxr_jax.errors import UserError
from cxr_jax.models import registry, tokenizer
from cxr_jax.models.markers import CHATML
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.runtime import sharding
from cxr_jax.weights import hf_folder

FOLDERS = sorted(path.parent.name for path in ROOT.glob("cxr_jax/models/*/family.py"))
FAMILIES = pytest.mark.parametrize("family", registry.FAMILIES, ids=lambda f: f.model_type)


def test_every_folder_is_registered():
    modules = pathlib.Path(registry.__file__).read_text()
    assert FOLDERS == re.findall(r"from cxr_jax\.models\.(\w+)\.family import FAMILY", modules)
    assert len(registry.FAMILIES) == len(FOLDERS)


@FAMILIES
def test_a_config_goes_to_json_and_back(family):
    for config in family.sizes.values():
        assert registry.family_of(config) is family
        assert registry.read_config(json.loads(json.dumps(family.write_config(config)))) == config


@FAMILIES
def test_the_tables_cover_every_parameter(family):
    for config in family.sizes.values():
        shapes = family.parameter_shapes(config)
        rules = family.tensor_rules(config)
        assert {rule.path for rule in rules} == set(shapes)
        assert all(family.canonical_key(rule.key) == rule.key for rule in rules)
        for path, shape in shapes.items():
            name = "/".join(path)
            axes = next(axes for pattern, axes in family.sharding_rules if re.search(pattern, name))
            spec = sharding.partition_spec(name, shape, {"data": 1, "fsdp": 1, "tensor": 1})
            mesh_axes = [sharding.LOGICAL_TO_MESH.get(axis) for axis in axes]
            assert list(spec)[len(shape) - len(axes) :] == mesh_axes


@FAMILIES
def test_markers_are_tokens_of_the_embedded_tokenizer(family):
    vocab = tokenizer.load(str(asset("phantom"))).get_vocab()
    markers = family.markers
    if markers is not CHATML:
        pytest.skip("another tokenizer: tests/models/test_gemma_tokenizer.py")
    assert vocab[markers.image] == PHANTOM.image_token_id
    assert vocab[markers.video] == PHANTOM.video_token_id
    assert vocab[markers.before_media] == PHANTOM.vision_start_token_id
    assert vocab[markers.after_media] == PHANTOM.vision_end_token_id
    assert (vocab[markers.end_of_turn], vocab[markers.end_of_text]) == PHANTOM.eos_token_id


@pytest.mark.parametrize("model_type", [None, "llama", ["qwen2_5_vl"]])
def test_an_unknown_family_is_refused(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    known = " or ".join(repr(family.model_type) for family in registry.FAMILIES)
    message = f"{tmp_path}: config.json: model_type {model_type!r} is not {known}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        hf_folder.read_config(tmp_path)


def test_a_registered_table_is_applied():
    path, sizes = "another_family/kernel", {"data": 1, "fsdp": 2, "tensor": 1}
    with pytest.raises(UserError, match="no rule covers the parameter another_family/kernel"):
        sharding.partition_spec(path, (4, 4), sizes)
    try:
        sharding.register_rules("another", ((r"another_family/kernel$", (None, "width")),))
        spec = sharding.partition_spec(path, (4, 4), sizes)
        assert spec == jax.sharding.PartitionSpec(None, "fsdp")
    finally:
        sharding._FAMILY_RULES.pop("another", None)
