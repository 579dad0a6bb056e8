"""The evaluation section of a model card: every number with its interval, from the records alone."""

import json
import re

import numpy as np
import pytest

from cxr_jax import card as door
from cxr_jax import report
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics import scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from cxr_jax.report import card
from cxr_jax.report.records import Remarks
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

NUMBER = re.compile(r"(?<![\w.,/])[+-]?\d\.\d{3}\b")
INTERVAL = re.compile(r"[+-]?\d\.\d{3} \[[+-]?\d\.\d{3}, [+-]?\d\.\d{3}\]")
PROTOCOL = "nih test: 60 images of 20 patients; views: PA 60; blank=unknown; unit image"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The folder of a run that has exported and evaluated."""
    folder = tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    truth = generator.random((60, 14)) < 0.3
    truth[:, 12] = False  # Fracture has no positive
    reference = Reference(truth, groups=np.arange(60) // 3)
    read = lambda share: Answers(
        np.where(generator.random((60, 14)) < share, truth, generator.random((60, 14)) < 0.3),
        generator.random(60) < 0.9,
    )
    tables = {}
    for model, share in (("/home/me/models/base-3b/hf", 0.2), ("SFT", 0.8)):
        summary = scores.summary(
            read(share),
            reference,
            other_images={"blank": read(0), "swapped": read(0)},
            probabilities=generator.random((60, 14)),
            bootstrap=Bootstrap(40),
        )
        tables[model] = {"a|b": {"protocol": PROTOCOL, "scored": "image", **summary}}
    difference = {"a": "/home/me/models/base-3b/hf", "b": "SFT", "set": "a|b", "metric": "jaccard"}
    report.write_report(
        folder,
        title="t",
        tables=tables,
        kind="files",
        comparisons=[{**difference, "diff": 0.2, "lo": 0.1, "hi": 0.3}],
        remarks=Remarks(contaminated="CONTAMINATED: 1 <of> 9", protocol=(PROTOCOL,)),
    )
    (folder / "config.json").write_text("{}")
    (folder / "hf").mkdir()
    (folder / "hf" / "README.md").write_text("---\nlicense: mit\n---\n# cxr_jax export\n")
    return folder


def test_the_section_has_every_number_with_its_interval(evaluated):
    text = card.write(evaluated, door.model_name).read_text()
    summary = json.loads((evaluated / "evaluation.json").read_text())["models"]["SFT"]["a|b"]
    # Nothing with decimals stands outside an interval.
    assert not NUMBER.search(INTERVAL.sub("", text)), NUMBER.search(INTERVAL.sub("", text))
    for wanted in (NOT_FOR_DIAGNOSIS, PROTOCOL.replace("_", r"\_"), r"### a\|b", "Model: SFT"):
        assert wanted in text
    assert (
        r"**CONTAMINATED: 1 \<of\> 9**" in text and "intervals draw 20 patients, 40 times" in text
    )
    written = lambda found: f"{found['value']:.3f} [{found['lo']:.3f}, {found['hi']:.3f}]"
    for found in (
        summary["jaccard"],
        summary["macro_f1"]["findings_only"],
        summary["micro_f1"]["all"],
        summary["parse_failures"],
        *summary["calibration"]["estimates"].values(),
    ):
        assert written(found) in text
    for label in CHEXPERT_14:
        row = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
        assert f"| {summary['per_label'][label]['n_pos']} |" in row
        if label != "Fracture":
            assert written(summary["per_label"][label]["f1"]) in row
            assert written(summary["calibration"]["per_label"][label]["auroc"]) in row
    # What is not defined is a dash, and an audit is in words, too.
    assert "| Fracture | 60 | 0 | – | – | – |" in text
    assert "| swapped |" in text and "The answers use the image." in text
    assert r"SFT - base-3b: jaccard | +0.200 [+0.100, +0.300]" in text
    # No path of this machine, and none of its tables torn.
    assert "/home" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({re.sub(r"\\\|", "", line).count("|") for line in block.splitlines()}) == 1, (
            block
        )


def test_the_card_of_an_export_gets_it_once(evaluated):
    for _ in range(2):
        text = card.write(evaluated, door.model_name).read_text()
    readme = (evaluated / "hf" / "README.md").read_text()
    assert readme == f"---\nlicense: mit\n---\n# cxr_jax export\n\n{text}"
    # What a person wrote behind it stays.
    (evaluated / "hf" / "README.md").write_text(readme + "\nMine.\n")
    card.write(evaluated, door.model_name)
    assert (evaluated / "hf" / "README.md").read_text() == readme + "\nMine.\n"


def test_an_evaluation_of_before_says_less_and_invents_nothing(evaluated):
    evaluation = card.read_evaluation(evaluated)
    summary = evaluation["models"]["SFT"]["a|b"]
    old = {
        key: value
        for key, value in summary.items()
        if key not in ("parse_failures", "protocol", "calibration", "audit")
    }
    text = card.section({**evaluation, "protocol": [], "models": {"SFT": {"a|b": old}}})
    assert (
        "parsed" not in text and "AUROC" not in text and not NUMBER.search(INTERVAL.sub("", text))
    )
    assert "It was not asked whether the answers depend on the image." in text


def test_the_command_prints_it_and_refuses_another_model(evaluated, tmp_path, capsys):
    assert door.main([str(evaluated)]) == 0
    assert capsys.readouterr().out == card.section(card.read_evaluation(evaluated), door.model_name)
    # The run has no hash of a model, or that of another one.
    for weights in ({}, {"data": {"weights_sha256": "ab"}}):
        (evaluated / "config.json").write_text(json.dumps(weights))
        assert door.main([str(evaluated), "--model=phantom"]) == 2
        error = capsys.readouterr().err
        assert "has evaluated" in error and error.count("\n") == 1
    assert door.main([str(tmp_path)]) == 2
    assert "evaluation.json" in capsys.readouterr().err
    (tmp_path / "evaluation.json").write_text('{"format": 1, "kind": "files", "models": {}}')
    with pytest.raises(UserError, match="not an evaluation"):
        card.read_evaluation(tmp_path)


def test_the_command_puts_it_into_the_card_of_the_model_that_was_evaluated(evaluated, tmp_path):
    import shutil

    from cxr_jax import asset
    from cxr_jax.weights import hf_folder

    model = shutil.copytree(asset("phantom"), tmp_path / "model")
    facts = {"data": {"weights_sha256": hf_folder.weights_sha256(model)}}
    (evaluated / "config.json").write_text(json.dumps(facts))
    before = (model / "README.md").read_text()
    assert door.main([str(evaluated), f"--model={model}"]) == 0
    assert (model / "README.md").read_text().startswith(before.rstrip())
    assert "## Evaluation" in (model / "README.md").read_text()
