"""The predict command: JSON, plain text, refusals and exit codes, with a model that answers by rote."""

import hashlib
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from dicom_files import build
from films import draw_film
from PIL import Image as PilImage
from places import ROOT

import cxr_jax
from cxr_jax import predict
from cxr_jax.data.prompts import NO_PROMPT
from cxr_jax.data.sources import label_table
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

KEYS = ["image", "model", "weights_sha256", "renderer", "prompt", "seed"]
KEYS += ["reasoning", "answer", "probabilities", "valid_format", "warnings"]
GOOD = "<think>Large heart. No effusion.</think><answer>Cardiomegaly, Support Devices</answer>"


class RoteModel:
    """Shown: `text`. Samples: `text` and "No Finding" in turn. Probabilities: 0.25 for Edema, 0.001 for the rest."""

    def __init__(self, folder, text=GOOD, finish="stop"):
        self.folder, self.text, self.finish, self.calls = folder, text, finish, []
        self.answers = "rules"

    def read(
        self,
        image,
        prompt,
        samples=8,
        max_new_tokens=512,
        seed=0,
        *,
        constraint=None,
        probabilities=True,
    ):
        self.calls.append(
            {
                "image": image,
                "prompt": prompt,
                "samples": samples,
                "max_new_tokens": max_new_tokens,
                "seed": seed,
                "constraint": constraint,
            }
        )
        other = "<think>x</think><answer>No Finding</answer>"
        made = lambda text: types.SimpleNamespace(text=text, finish_reason=self.finish)
        found = (
            {name: 0.25 if name == "Edema" else 0.001 for name in CHEXPERT_14}
            if probabilities
            else None
        )
        drawn = [made(self.text if i % 2 else other) for i in range(samples)]
        return types.SimpleNamespace(shown=made(self.text), samples=drawn, probabilities=found)

    def programs(self):
        return {"vision": 1, "decode": 2}


class Wordless(RoteModel):
    """A model whose tokenizer cannot express answers."""

    answers = property(lambda self: raises("no byte-level decoder"), lambda self, value: None)


def raises(message):
    raise UserError(message)


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.png"
    PilImage.fromarray(draw_film(90, 60)).save(path)
    return path


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    rote = RoteModel(tmp_path)
    monkeypatch.setattr(cxr_jax, "load", lambda name, grids: rote)
    return rote


def test_json_has_exactly_the_promised_keys(film, model, capsys):
    assert (
        predict.main([str(film), "--json", "--samples=4", "--seed=3", "--prompt=Read this."]) == 0
    )
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert out.count("\n") == 1 and err == "" and list(record) == KEYS
    assert (
        record["image"] == str(film)
        and record["model"] == "phantom"
        and record["renderer"] == "voi"
    )
    assert record["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert record["prompt"] == "Read this." and record["seed"] == 3
    assert record["reasoning"] == "Large heart. No effusion."
    assert (
        record["answer"] == ["Cardiomegaly", "Support Devices"] and record["valid_format"] is True
    )
    assert (
        set(record["probabilities"]) == set(CHEXPERT_14)
        and record["probabilities"]["Edema"] == 0.25
    )
    assert record["warnings"] == []
    [call] = model.calls
    assert call.pop("image").shape == (90, 60)
    assert call == {
        "prompt": "Read this.",
        "samples": 4,
        "max_new_tokens": 512,
        "seed": 3,
        "constraint": None,
    }
    assert (
        predict.main([str(film), "--json", "--constrained", "--max_new_tokens=99", "--samples=0"])
        == 0
    )
    call = model.calls[1]
    assert (call["constraint"], call["max_new_tokens"], call["samples"]) == ("answers", 99, 0)


def test_shares_of_samples_where_the_tokenizer_knows_no_answers(
    film, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cxr_jax, "load", lambda name, grids: Wordless(tmp_path))
    half = ("Cardiomegaly", "Support Devices", "No Finding")
    for samples, named, value in (4, half, 0.5), (0, half[:2], 1):
        assert predict.main([str(film), "--json", f"--samples={samples}"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["probabilities"] == {
            name: value if name in named else 0 for name in CHEXPERT_14
        }
        assert record["warnings"] == [
            "the probabilities are shares of sampled answers: no byte-level decoder"
        ]
    assert predict.main([str(film), "--samples=4"]) == 0
    assert "share of 4 sampled answers" in capsys.readouterr().out


def test_a_bad_image_costs_one_line_and_nothing_else(film, model, tmp_path, capsys):
    bad, blank = tmp_path / "bad.dcm", tmp_path / "blank.png"
    bad.write_text("PatientName: SECRET")
    PilImage.fromarray(np.full((64, 64), 50, np.uint8)).save(blank)
    names = [str(bad), str(film), str(tmp_path / "missing.png"), str(blank), str(film)]
    assert predict.main([*names, "--json", "--samples=1"]) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == [str(film), str(film)]
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "bad.dcm" in lines[0] and "missing.png" in lines[1] and "blank" in lines[2]
    assert "SECRET" not in err and "Traceback" not in err


def test_read_anyway(model, tmp_path, capsys):
    blank = tmp_path / "blank.png"
    PilImage.fromarray(np.full((64, 64), 50, np.uint8)).save(blank)
    assert predict.main([str(blank), "--json", "--read_anyway"]) == 0
    assert any("blank" in note for note in json.loads(capsys.readouterr().out)["warnings"])


def test_without_a_usable_image_the_model_is_not_even_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cxr_jax, "load", lambda name, grids: pytest.fail("loaded"))
    assert predict.main([str(tmp_path / "no.png")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "prompt, reason",
    [
        (" \n", NO_PROMPT),
        ("<image>", NO_PROMPT),
        ("[IMG] What?", "<image>"),
        ("a<image>b<image>c", "2 places"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_before_the_model_is_loaded(
    prompt, reason, film, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cxr_jax, "load", lambda name, grids: pytest.fail("loaded"))
    assert predict.main([str(film), "--prompt", prompt]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: --prompt: ") and reason in err
    assert err.count("\n") == 1 and not out
    # A manifest with such a question would be refused later, when it trains.
    table = tmp_path / "labels.csv"
    table.write_text("Path," + ",".join(CHEXPERT_14) + "\na.png" + ",1" * 14 + "\n")
    assert label_table.main([str(table), str(tmp_path / "rows.jsonl"), "--prompt", prompt]) == 2
    assert capsys.readouterr().err == err and not (tmp_path / "rows.jsonl").exists()


def test_plain_text(film, model, capsys):
    model.text = "<think>\x1b[2Jclear</think><answer>Cardiomegaly, Bananas</answer>"
    assert predict.main([str(film)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Research use only. Not for diagnosis.") and "Answer: Cardiomegaly" in out
    assert "mean over 8 sampled traces" in out and "25%  Edema" in out and out.count("%  ") == 1
    assert err == "compiled programs: vision 1, decode 2\n" and "\x1b" not in out
    assert "1 names in the answer are none" in out


BOTH = ["No Finding", "Edema"]


@pytest.mark.parametrize(
    "text, finish, reasoning, answer, valid, warning",
    [
        ("<think>a</think>\n<answer></answer>", "stop", "a", [], True, None),
        ("no tags at all", "stop", "no tags at all", [], False, "no answer list"),
        ("<think>never closed", "length", "never closed", [], False, "cut at the length limit"),
        (
            "<think>a</think><answer>no finding, EDEMA</answer>",
            "stop",
            "a",
            BOTH,
            True,
            "contradicts",
        ),
        ("<think>a</think><answer>Edema, edema</answer> tail", "stop", "a", ["Edema"], False, None),
        ("x <think>a</think><answer>Fracture</answer>", "stop", "a", ["Fracture"], False, None),
    ],
)
def test_odd_completions(film, model, capsys, text, finish, reasoning, answer, valid, warning):
    model.text, model.finish = text, finish
    assert predict.main([str(film), "--json", "--samples=0"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["reasoning"], record["answer"], record["valid_format"]) == (
        reasoning,
        answer,
        valid,
    )
    assert (
        any(warning in note for note in record["warnings"]) if warning else record["warnings"] == []
    )


def test_failures_are_one_line(film, monkeypatch, capsys):
    def broken(error):
        def load(name, grids):
            raise error

        return load

    for error, code in [
        (UserError("no-such-model: not a model folder"), 2),
        (RuntimeError("boom\nmore"), 1),
    ]:
        monkeypatch.setattr(cxr_jax, "load", broken(error))
        assert predict.main([str(film)]) == code
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        assert predict.main([str(film), "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", ["", "x.png --samples=-1", "x.png --renderer=bright", "--grids=a x.png", "--nope x"]
)
def test_bad_usage(flags, capsys):
    assert predict.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_as_a_command(tmp_path):
    """A bad file from the shell: exit code 2, nothing on stdout, and fast, because no model is loaded."""
    (tmp_path / "x.dcm").write_text("not an image")
    done = subprocess.run(
        [sys.executable, "-m", "cxr_jax.predict", "x.dcm"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: x.dcm: not a PNG, JPEG or DICOM file (told by its content, not its name)\n"
    )


@pytest.mark.parametrize("flag", ["--max_pixels", "--max-pixels"])
def test_max_pixels_reaches_the_model(film, model, monkeypatch, flag):
    asked = []
    monkeypatch.setattr(
        cxr_jax, "load", lambda name, **settings: asked.append((name, settings)) or model
    )
    assert predict.main([str(film), "--json", "--samples=0", f"{flag}=100352"]) == 0
    assert asked == [("phantom", {"grids": "exact", "max_pixels": 100352})]


@pytest.mark.parametrize("value", ["783", "0", "-1", "1e5", "many", "2147483648", ""])
def test_a_bad_max_pixels_is_one_line(film, model, capsys, value):
    assert predict.main([str(film), "--json", f"--max_pixels={value}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--max_pixels" in err and "784" in err


# ---- Several films of one study ------------------------------------------------------------------------------


def dicom(path, view, number):
    pixels = draw_film(90 + number, 60).astype(np.uint16) * 16
    path.write_bytes(build(pixels, ViewPosition=view, WindowCenter=2048, WindowWidth=4096))
    return str(path)


@pytest.fixture
def study(tmp_path):
    """Files of a frontal, a lateral and a prior film, known by header and name, each of another height."""
    files = [dicom(tmp_path / "a.dcm", "PA", 0), dicom(tmp_path / "b.dcm", "LL", 1)]
    prior = tmp_path / "prior.png"
    PilImage.fromarray(draw_film(92, 60)).save(prior)
    return [*files, str(prior)]


NAMED = "Current frontal: <image> Current lateral: <image> Prior frontal: <image>\n"


def test_a_study_is_read_at_once_and_the_record_names_its_films(study, model, capsys):
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        model.calls.clear()
        assert predict.main([*(study[i] for i in order), "--study", "--json", "--prompt=Q?"]) == 0
        out, err = capsys.readouterr()
        record = json.loads(out)
        assert err == "" and list(record) == [*KEYS, "images"]
        assert record["image"] == study[0] and record["prompt"] == NAMED + "Q?"
        assert record["images"] == [
            {"image": path, "role": role}
            for path, role in zip(study, ("frontal", "lateral", "prior"), strict=True)
        ]
        [call] = model.calls
        assert [len(pixels) for pixels in call["image"]] == [90, 91, 92]
        assert call["prompt"] == NAMED + "Q?" and record["warnings"] == []
    assert predict.main([*study, "--study"]) == 0
    shown = capsys.readouterr().out
    assert all(
        f"{path} ({role})" in shown
        for path, role in zip(study, ("frontal", "lateral", "prior"), strict=True)
    )


def test_roles_may_be_said_and_places_marked(study, model, capsys):
    roles = "--roles=prior,lateral,frontal"
    assert predict.main([*study, "--study", roles, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [shown["image"] for shown in record["images"]] == study[::-1]
    asked = "--prompt=Old <image>, side <image>, new <image>?"
    assert predict.main([*study, "--study", roles, "--json", asked]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [shown["image"] for shown in record["images"]] == study
    assert record["prompt"] == asked.partition("=")[2]
    assert predict.main([study[0], "--study", "--json", "--prompt=Q?"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert list(alone) == KEYS and alone["prompt"] == "Q?"


def test_a_lateral_film_is_read_where_its_role_says_so_and_nowhere_else(
    study, model, tmp_path, capsys
):
    assert predict.main([*study, "--json"]) == 2  # one by one
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == [study[0], study[2]]
    assert err.count("\n") == 1 and "b.dcm" in err and "not a frontal view" in err
    bad = {
        "b.dcm: not read: not a frontal view": [*study[:2], "--roles=lateral,frontal"],
        "a.dcm: not read: not a lateral view, and its role is lateral": [
            study[0],
            study[2],
            "--roles=lateral,frontal",
        ],
        "not a lateral view": [
            study[0],
            dicom(tmp_path / "c.dcm", "LAO", 3),
            "--roles=frontal,lateral",
        ],
        "2 films are frontal by headers and names; give --roles=": [
            study[0],
            dicom(tmp_path / "d.dcm", "AP", 4),
        ],
        "the view of a film is not known by": [study[0], dicom(tmp_path / "e.dcm", "RAO", 4)],
        "no such file": [study[0], str(tmp_path / "no.png")],
        "a file is named twice": [study[0], study[0]],
    }
    model.calls.clear()
    for reason, argv in bad.items():
        assert predict.main([*argv, "--study", "--json"]) == 2
        out, err = capsys.readouterr()
        assert reason in err and err.count("\n") == 1 and not out
    for bad_pair in (["--roles=lateral"], ["--roles=lateral", "--read_anyway"]):
        assert predict.main([study[1], "--study", *bad_pair]) == 2
        assert "frontal must be among them" in capsys.readouterr().err
    assert not model.calls  # a study is not read without one of its films
    assert predict.main([*study[:2], "--study", "--roles=lateral,frontal", "--read_anyway"]) == 0


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--roles=frontal"], "--roles: says what the films of one study are"),
        (["--study", "--roles=frontal,lateral"], "--roles: 2 roles, 3 files"),
        (["--study", "--roles=frontal,side,prior"], "--roles: 'side' is none of frontal, lateral"),
        (["--study", "--roles=lateral,prior,prior_lateral"], "--roles: frontal must be among them"),
        (["--study", "--roles=prior,prior,frontal"], "--roles: prior is there 2 times"),
        (["--study", "--prompt=<image>?"], "--prompt: a prompt has 1 places for an image"),
        (["--prompt=<image> and <image>"], "--prompt: a prompt has 2 places for an image"),
    ],
)
def test_flags_of_a_study_that_do_not_fit_are_refused_before_a_file_is_read(
    study, model, argv, reason, capsys
):
    assert predict.main([*study, *argv]) == 2
    out, err = capsys.readouterr()
    assert reason in err and err.count("\n") == 1 and not out and not model.calls


def png(path):
    PilImage.fromarray(draw_film(95, 60)).save(path)
    return str(path)


def test_names_make_a_prior_by_plain_words_only(model, tmp_path, capsys):
    def read(*files):
        code = predict.main([*files, "--study", "--json"])
        out, err = capsys.readouterr()
        assert code == (2 if err else 0) and err.count("\n") <= 1
        return err or [shown["role"] for shown in json.loads(out)["images"]]

    names = ("a.png", "old_town_0012.png", "before_op.png", "lat_before.png", "previous-1.png")
    current, town, before, lateral, previous = (png(tmp_path / name) for name in names)
    assert read(before, lateral) == read(town, lateral) == ["frontal", "lateral"]
    assert "the view of a film is not known" in read(current, town)
    assert read(previous, current) == ["frontal", "prior"]
    side = png(tmp_path / "prior_lat.png")
    assert "no film is the current frontal by headers and names; give --roles=" in read(
        previous, side
    )


def test_one_file_under_two_names_is_one(model, tmp_path, monkeypatch, capsys):
    film = tmp_path / "a.png"
    png(film)
    (tmp_path / "b.png").symlink_to(film)
    os.link(film, tmp_path / "c.png")
    monkeypatch.chdir(tmp_path)
    for other in ("./a.png", str(film), "b.png", "c.png", f"../{tmp_path.name}/a.png"):
        assert predict.main(["a.png", other, "--study", "--roles=frontal,lateral"]) == 2
        assert capsys.readouterr().err == "error: --study: a file is named twice\n"
    assert not model.calls


ONE = {"PatientID": "0077", "StudyDate": "20010203", "StudyTime": "083000"}
OTHERS = {  # reason -> headers of the second film, its role
    "of another patient": [
        (ONE | {"PatientID": "78"}, "lateral"),
        (ONE | {"PatientID": "78"}, "prior"),
        (ONE | {"PatientBirthDate": "19500102"}, "lateral"),
        ({"PatientSex": "F"}, "lateral"),
    ],
    "of another day than the frontal": [(ONE | {"StudyDate": "20010204"}, "lateral")],
    "not of an earlier study than the frontal": [
        (ONE | {"StudyDate": "20010204"}, "prior"),
        (ONE | {"StudyDate": "2001.02.04"}, "prior_lateral"),
        (ONE | {"StudyTime": "0831"}, "prior"),
        (ONE | {"StudyTime": "", "StudyInstanceUID": "1.2.3"}, "prior"),
        ({"AcquisitionDate": "20020101"}, "prior"),
    ],
    "": [
        (ONE | {"PatientID": " 77 "}, "lateral"),
        (ONE | {"PatientID": "", "PatientBirthDate": "unknown"}, "lateral"),
        (ONE | {"StudyDate": "20000102"}, "prior"),
        (ONE | {"StudyTime": "0829"}, "prior"),
        (ONE | {"StudyTime": "0830"}, "prior"),
        ({"StudyInstanceUID": "1.2.3"}, "lateral"),
        ({"StudyDate": "noon"}, "prior"),
    ],
}


@pytest.mark.parametrize("reason", OTHERS)
def test_films_whose_headers_speak_against_one_report_are_refused(reason, model, tmp_path, capsys):
    def write(name, **elements):
        pixels = draw_film(90, 60).astype(np.uint16) * 16
        elements = {"PatientID": "", "WindowCenter": 2048, "WindowWidth": 4096, **elements}
        (tmp_path / name).write_bytes(build(pixels, **elements))
        return str(tmp_path / name)

    same = {"PatientBirthDate": "19500101", "PatientSex": "M", "StudyInstanceUID": "1.2.3"}
    first = write("a.dcm", **ONE, **same)
    for elements, role in OTHERS[reason]:
        view = "LL" if "lateral" in role else "PA"
        second = write("b.dcm", ViewPosition=view, **elements)
        for order in (1, -1):
            files, roles = [first, second][::order], ["frontal", role][::order]
            argv = [*files, "--study", "--json", f"--roles={','.join(roles)}", "--read_anyway"]
            assert predict.main(argv) == (2 if reason else 0), (elements, role)
            out, err = capsys.readouterr()
            assert bool(out) != bool(reason) and err.count("\n") == bool(reason) and reason in err
            shown = (out + err).replace(str(tmp_path), "")
            assert not any(value and value in shown for value in (ONE | same | elements).values())
    # A picture has no header that could speak.
    assert predict.main([png(tmp_path / "p.png"), first, "--study", "--roles=prior,frontal"]) == 0


def test_the_prompt_of_a_record_has_the_numbers_that_the_model_read(study, model, capsys):
    for files, asked, shown in (
        (study[:1], "Q?", "Picture 1: <image>Q?"),
        (study[:2], "Q?", NAMED_TWO.replace("<", "Picture {}: <").format(1, 2) + "Q?"),
        (study[:2], "New <image> <image>", "New Picture 1: <image> Picture 2: <image>"),
    ):
        argv = [*files, "--json", f"--prompt={asked}", *["--study"][: len(files) - 1]]
        prompts = []
        for flags in (["--number_images"], []):
            assert predict.main([*argv, *flags]) == 0
            prompts.append(json.loads(capsys.readouterr().out)["prompt"])
        assert (
            prompts == [shown, model.calls[-1]["prompt"]]
            and model.calls[-2]["prompt"] == prompts[1]
        )


NAMED_TWO = "Current frontal: <image> Current lateral: <image>\n"
