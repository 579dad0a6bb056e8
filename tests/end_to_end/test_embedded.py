"""The embedded model: it loads, writes the format, and really reads images."""

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pydicom

import cxr_jax
from cxr_jax import phantom, predict
from cxr_jax.data import prompts
from cxr_jax.data.sources import phantom as sources_phantom
from cxr_jax.labels import CHEXPERT_14, parse_answers
from cxr_jax.metrics import scores
from cxr_jax.metrics.scores import Answers, Reference
from cxr_jax.outputs import fhir, fhir_check, sr, trace_sentences
from cxr_jax.phantom import dicom_writer
from cxr_jax.rewards import score

N = 48


def test_reads_phantoms_far_above_chance_and_in_format():
    model = cxr_jax.load("phantom")
    source = sources_phantom.PhantomSource("A", "test", 0)
    batch = source.batch(np.arange(N))
    got = model.generate(list(batch["image"]), [prompts.FIND_PROMPT] * N, max_new_tokens=208)
    texts = [c[0].text for c in got]
    pred, truth = parse_answers(texts), batch["solution"]
    real = scores.jaccard_rows(Answers(pred), Reference(truth)).mean()
    swapped = scores.jaccard_rows(Answers(np.roll(pred, 1, axis=0)), Reference(truth)).mean()
    assert score(texts, ["No Finding"] * N)["format"].mean() > 0.95
    assert real > 0.6 and real > swapped + 0.3
    assert all(c[0].finish_reason == "stop" for c in got)


def test_predict_reads_a_phantom_dicom(tmp_path):
    batch = phantom.make_batch(0, "test", "A", np.arange(1))
    path = tmp_path / "phantom.dcm"
    dicom_writer.write_dicom(path, np.asarray(batch["image"][0]), hospital="A", ap=False, seed=1)
    out = io.StringIO()
    sr_path, fhir_path = tmp_path / "out.sr.dcm", tmp_path / "out.json"
    with redirect_stdout(out):
        code = predict.main(
            ["--json", "--samples=2", str(path), f"--sr={sr_path}", f"--fhir={fhir_path}"]
        )
    row = json.loads(out.getvalue())
    keys = "image model weights_sha256 renderer prompt seed reasoning answer probabilities valid_format warnings"
    assert code == 0 and set(row) == set(keys.split())
    assert row["valid_format"] and len(row["probabilities"]) == 14
    # Its files say what its sentences say, by the reader that rewards use.
    reading = trace_sentences.read_trace(row["reasoning"], "phantom")
    wanted = {
        label: (state, side)
        for label, state, side in zip(CHEXPERT_14, reading.states, reading.sides, strict=True)
        if state != "not_mentioned"
    }
    bundle = json.loads(fhir_path.read_text())
    fhir_check.check(bundle)
    assert fhir.read_states(bundle) == wanted and len(wanted) > 5
    assert sr.read_states(pydicom.dcmread(sr_path)) == wanted
