"""What `verify` names: a lost key, files of the analysis that were edited, films and inputs that are gone or broken."""

import gzip
import hashlib
from dataclasses import replace

import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.study.__main__ import main
from cxr_jax.study.commands import manage
from cxr_jax.study.sitting import Sitting

from .conftest import hand_made_case, make_study
from .test_sitting import ANNA, do_task


def film_of(study, case_no=0):
    return study.path / "films" / f"{study.films[case_no]['sha256']}.u16.gz"


def test_lost_key_is_named(study, store):
    do_task(Sitting(study, store), ANNA)
    assert manage.verify(study.path) == []
    (study.path / "secret").write_bytes(b"x" * 32)
    problems = manage.verify(study.path)
    assert any(problem.startswith("secret: is not the one") for problem in problems)
    # Nor is a study unblinded in which no reading would be found again.
    manage.close(study.path)
    with pytest.raises(UserError, match="secret"):
        manage.unblind(study.path)


@pytest.mark.parametrize("name", ["analysis.json", "report.html", "rows.csv", "analysis.R"])
def test_edited_file_of_the_analysis_is_named(study, name):
    texts = {"analysis.json": "{}", "report.html": "<p>", "rows.csv": "a", "analysis.R": "1"}
    for file_name, text in texts.items():
        (study.path / file_name).write_text(text)
    digests = {each: hashlib.sha256(text.encode()).hexdigest() for each, text in texts.items()}
    with manage.open_study(study.path) as opened:
        opened.append("study.analysed", digests)
    assert manage.verify(study.path) == []
    (study.path / name).write_text("p < 0.001")
    assert manage.verify(study.path) == [f"{name}: is not the one that `analyse` wrote"]
    (study.path / name).unlink()
    [problem] = manage.verify(study.path)
    assert problem.startswith(f"{name}: cannot be read")


def test_film_that_is_gone_is_one_line(study, store, capsys):
    film_of(study).unlink()
    [problem] = manage.verify(study.path)
    assert "films" in problem and "no film can be read" in problem
    with pytest.raises(UserError, match="no film can be read"):
        Sitting(study, store).check_record()
    assert main(["close", str(study.path)]) == 0
    for command, code in (("verify", 1), ("open", 2), ("unblind", 2)):
        capsys.readouterr()
        assert main([command, str(study.path)]) == code
        captured = capsys.readouterr()
        told = (captured.out + captured.err).strip()
        assert "no film can be read" in told and "\n" not in told


def test_input_of_the_model_is_kept_and_sealed(tmp_path):
    def make_case(number):
        small = np.full((4, 4), number / 20, np.float32)
        return replace(hand_made_case(number), model_input=small)

    study = make_study(tmp_path / "t", make_case)
    given = study.path / "inputs" / f"{study.films[2]['input_sha256']}.u16.gz"
    assert gzip.decompress(given.read_bytes()) == np.full(16, round(0.1 * 65535), "<u2").tobytes()
    assert manage.verify(study.path) == []
    given.write_bytes(gzip.compress(bytes(32)))
    assert manage.verify(study.path) == ["films: is not the one that was sealed"]


@pytest.mark.parametrize("broken", [b"", b"no gzip", None])
def test_film_that_is_broken_is_named(study, broken):
    path = film_of(study)
    path.write_bytes(path.read_bytes()[:-9] if broken is None else broken)
    assert manage.verify(study.path) == ["films: is not the one that was sealed"]
