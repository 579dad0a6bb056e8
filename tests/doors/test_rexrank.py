"""ReXrank's command: the table comes back with predictions, is continued, and never leaves its root."""

import json
import math
import shutil

from places import ROOT

from cxr_jax import rexrank
from cxr_jax.errors import UserError

INPUT = {
    "slash": {"key_image_path": "/p/0.png", "image_path": ["/p/0.png", "/p/1.png"], "report": "r"},
    "nan": {"key_image_path": math.nan, "image_path": ["p/2.png"], "section_findings": math.nan},
    "text": {"image_path": "p/3.png"},
    "none": {"image_path": []},
    "outside": {"key_image_path": "../../etc/passwd"},
}


def flags(folder):
    return [
        f"--input_json_file={folder / 'a.json'}",
        f"--save_json_file={folder / 'b.json'}",
        f"--img_root_dir={folder}",
        "--save_every=1",
    ]


def predict(folder, read):
    return rexrank.predict_studies(rexrank.parse_args(flags(folder)), read)


def test_every_study_is_predicted_once_and_its_image_lies_below_the_root(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(INPUT))
    asked = []

    def read(path):
        asked.append(str(path.relative_to(tmp_path)))
        if path.name == "3.png" and len(asked) < 4:
            raise UserError("no image there")
        return f"Findings: {path.name} Impression: x."

    assert predict(tmp_path, read) == 2
    assert asked == ["p/0.png", "p/2.png", "p/3.png"]
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in errors] == ["text", "none", "outside"]
    saved = json.loads((tmp_path / "b.json").read_text())
    assert [*saved] == [*INPUT] and saved["slash"]["report"] == "r"
    assert saved["slash"]["model_prediction"] == "Findings: 0.png Impression: x."
    assert math.isnan(saved["nan"]["section_findings"]) and saved["none"]["model_prediction"] == ""
    # Again: only what was not predicted is read.
    assert predict(tmp_path, read) == 2
    assert asked[3:] == ["p/3.png"]
    assert json.loads((tmp_path / "b.json").read_text())["text"]["model_prediction"]


def test_a_report_has_both_sections():
    said = "<think>Heart is large.\nNo effusion.</think><answer>Cardiomegaly, Edema</answer>"
    wanted = "Findings: Heart is large. No effusion. Impression: Cardiomegaly, Edema."
    assert rexrank.as_report(said) == wanted
    assert rexrank.as_report("cut off").endswith("Impression: No finding was named.")


def test_bad_tables_are_one_line_and_nothing_is_written(tmp_path, capsys):
    for text in ("[1]", "{", '{"a": 1}'):
        (tmp_path / "a.json").write_text(text)
        assert rexrank.main(flags(tmp_path)) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "b.json").exists()
    (tmp_path / "a.json").write_text("{}")
    same = [flag.replace("b.json", "a.json") for flag in flags(tmp_path)]
    assert rexrank.main(same) == 2 and (tmp_path / "a.json").read_text() == "{}"
    table = ROOT / "../shared/data/tables/synthetic/rexrank/input.json"
    if table.exists():
        shutil.copy(table, tmp_path / "a.json")
        assert predict(tmp_path, lambda path: "Findings: x Impression: y.") == 0
