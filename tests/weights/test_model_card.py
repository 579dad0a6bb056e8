"""Cards of exports: the licence of the model that was trained, its files, and no path of this machine."""

import json
import pathlib
import shutil
import types

import golden_cases
import jax
import numpy as np
import pytest
import yaml
from convert_cases import make

import cxr_jax
from cxr_jax import convert
from cxr_jax.models import lora
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.weights import export, hf_folder, model_card, pretrained

OURS = "apache-2.0"
QWEN = """---
license: other
license_name: qwen-research
license_link: https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE
language:
- en
pipeline_tag: image-text-to-text
---
# A card
---
license: apache-2.0
---
"""
UNKNOWN = {"license": "other", "license_name": "unknown"}
FILE = {"license": "other", "license_name": "see-its-file"}
# Files of the folder that was trained -> what the export's front matter says.
SOURCES = {
    "stated": ({"README.md": "---\nlicense: cc-by-nc-4.0\n---\n"}, {"license": "cc-by-nc-4.0"}),
    "stated, line ends of Windows": (
        {"README.md": "\ufeff---\r\nlicense: mit\r\ntags: [x]\r\n---\r\ntext\r\n"},
        {"license": "mit"},
    ),
    "a name and a link": (
        {"README.md": QWEN, "LICENSE": "Qwen RESEARCH"},
        {
            "license": "other",
            "license_name": "qwen-research",
            "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
        },
    ),
    "a link to a file": (
        {
            "README.md": "---\nlicense: other\nlicense_name: nv\nlicense_link: LICENSE.txt\n---\n",
            "LICENSE.txt": "NV",
        },
        {"license": "other", "license_name": "nv", "license_link": "LICENSE.txt"},
    ),
    "a link to this machine": (
        {
            "README.md": "---\nlicense: other\nlicense_name: nv\nlicense_link: /home/me/LICENSE\n---\n"
        },
        {"license": "other", "license_name": "nv"},
    ),
    "a file alone": ({"LICENSE": "Apache License, but .."}, {**FILE, "license_link": "LICENSE"}),
    "a file of another spelling": ({"licence.md": "x"}, {**FILE, "license_link": "licence.md"}),
    "a notice is no licence": ({"NOTICE": "x"}, UNKNOWN),
    "no front matter": ({"README.md": "# Model\n\nlicense: mit\n"}, UNKNOWN),
    "a front matter without": (
        {"README.md": "---\ntags: [x]\n---\n", "COPYING": "x"},
        {**FILE, "license_link": "COPYING"},
    ),
    "a damaged front matter": ({"README.md": "---\nlicense: [mit\n---\n"}, UNKNOWN),
    "a front matter that is no mapping": ({"README.md": "---\n- license\n---\n"}, UNKNOWN),
    "a front matter without an end": ({"README.md": "---\nlicense: mit\n"}, UNKNOWN),
    "null": ({"README.md": "---\nlicense:\n---\n"}, UNKNOWN),
    "no text": ({"README.md": "---\nlicense: {a: b}\n---\n"}, UNKNOWN),
    "nothing": ({}, UNKNOWN),
}


def front_matter(card):
    _, matter, body = card.split("---\n", 2)
    return yaml.safe_load(matter), body


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_licence_is_that_of_the_source(tmp_path, name):
    files, want = SOURCES[name]
    source = write(tmp_path / "source", files)
    out = write(tmp_path / "out", {})
    origin = model_card.Origin(
        name="source", weights_sha256="ab", licence=model_card.licence_of(source)
    )
    model_card.write(out, origin, "sft", "files")
    settings, body = front_matter((out / "README.md").read_text())
    assert settings == want
    assert OURS not in (out / "README.md").read_text()
    assert "started from `source` (SHA-256 of its weights: `ab`)" in body
    for kept in files.keys() - {"README.md"}:
        assert (out / kept).read_bytes() == (source / kept).read_bytes() and kept in body
    assert ("find it out before you share" in body) == (want == UNKNOWN)
    # An export that is trained again says the same.
    again = model_card.licence_of(out).settings
    assert again == want


def test_a_card_says_what_is_contaminated(tmp_path):
    origin = model_card.Origin(name="m", weights_sha256=None, licence=model_card.licence_of(None))
    model_card.write(
        tmp_path, origin, "sft", "files", "CONTAMINATED: 3 of 9 training films are of X"
    )
    assert (
        "**CONTAMINATED: 3 of 9 training films are of X.**" in (tmp_path / "README.md").read_text()
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """What a run hands on that starts from a folder, from random weights and from the embedded model: root, folders."""
    root = tmp_path_factory.mktemp("somebodys_home")
    source = golden_cases.write_folder(root / "models" / "base-3b", "even", hf_table.canonical_key)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(pretrained.PHANTOM + "/" + name, source)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "_name_or_path": str(source)}))
    write(source, {"README.md": "---\nlicense: cc-by-nc-4.0\n---\n", "LICENSE": "terms"})
    model_config, params = hf_folder.load(source)
    spec = lora.Lora(rank=2, alpha=4.0)
    shapes = jax.eval_shape(lambda: lora.init(params, spec, jax.random.key(0)))
    adapters = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    folders = {}
    for name, model in (
        ("a folder", str(source)),
        ("random", "random:phantom"),
        ("ours", "phantom"),
    ):
        folders[name] = root / "runs" / name
        run = types.SimpleNamespace(file=lambda part, folder=folders[name]: str(folder / part))
        facts = export.ExportFacts(
            task="sft",
            started_from=pretrained.origin(model),
            data_source="files",
            pixel_limits=(56**2, 56**2),
            dtype="float32",
        )
        tokenizer = tokenizers.load(str(source))
        export.export(run, model_config, params, tokenizer, facts, export.Adapters(adapters, spec))
    return root, folders


def test_export_carries_the_licence_and_names_the_model_it_started_from(exports):
    folders = exports[1]
    for part in ("hf", "adapter"):
        settings, body = front_matter((folders["a folder"] / part / "README.md").read_text())
        assert settings == {"license": "cc-by-nc-4.0"} and "started from `base-3b` (SHA-256" in body
        assert (folders["a folder"] / part / "LICENSE").read_text() == "terms"
        settings, body = front_matter((folders["random"] / part / "README.md").read_text())
        assert settings == {"license": "other", "license_name": "not-chosen"}
        assert "chooses one" in body and "`random:phantom`" in body
        # The embedded model states its own.
        settings, body = front_matter((folders["ours"] / part / "README.md").read_text())
        assert settings == front_matter((cxr_jax.asset("phantom") / "README.md").read_text())[0]
        assert "started from `phantom`;" in body and "Not for diagnosis" in body
    base = json.loads((folders["a folder"] / "adapter" / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == "base-3b"


def test_export_tells_no_path_of_this_machine(exports):
    root, folders = exports
    checked = 0
    for folder in folders.values():
        for path in folder.rglob("*"):
            if path.is_file():
                checked += 1
                assert str(root).encode() not in path.read_bytes(), path
                assert b"somebodys_home" not in path.read_bytes(), path
    assert checked > 30


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/models/base-3b", "base-3b"),
        ("/home/me/runs/a/hf", "a"),
        (
            "/c/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/0123abc",
            "Qwen/Qwen2.5-VL-3B-Instruct",
        ),
        ("/hf", "model"),
        ("relative/folder", "folder"),
    ],
)
def test_name_of_a_folder_has_no_place(path, name):
    assert model_card.name_of(pathlib.Path(path)) == name


def test_conversion_keeps_licence_files_and_named_templates(tmp_path, capsys):
    source = make(tmp_path / "src")
    kept = {"README.md": QWEN, "LICENSE.txt": "a", "Licence": "b", "NOTICE.md": "c"}
    write(source, kept)
    write(source / "additional_chat_templates", {"tool_use.jinja": "x"})
    kept["additional_chat_templates/tool_use.jinja"] = "x"
    for direction, start, end in (("from-hf", "src", "ours"), ("to-hf", "ours", "back")):
        assert convert.main([direction, str(tmp_path / start), str(tmp_path / end)]) == 0
        for name, text in kept.items():
            assert (tmp_path / end / name).read_text() == text
