"""Engines by their flags, and silence, of which nothing is heard whatever the engine would say."""

import json

import numpy as np
import pytest

from cxr_jax.capture import transcribe
from cxr_jax.capture.transcribe import ScriptedEngine, Word
from cxr_jax.errors import UserError


def test_none_is_typing():
    assert transcribe.make_engine("none") is None


def test_a_script_is_heard_in_any_sound(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps([["No", 0, 0.5, 0.9], ["effusion.", 0.5, 1, 0.4]]))
    engine = transcribe.make_engine(f"scripted:{tmp_path / 's.json'}")
    sound = np.sin(np.arange(16_000)).astype(np.float32) * 0.1
    words = transcribe.transcribe(engine, sound)
    assert transcribe.join_words(words) == "No effusion." and len(engine.model_sha256) == 64


def test_silence_gives_nothing():
    engine = ScriptedEngine([Word("You", 0, 1, 0.9)])
    for samples in (
        np.zeros(80_000, np.float32),
        np.zeros(0, np.float32),
        np.full(99, 1e-4, np.float32),
    ):
        assert transcribe.transcribe(engine, samples) == []


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("whisper", "--dictate is"),
        ("whisper:{}", "holds no model.bin"),
        ("scripted:{}/none.json", "No such file"),
        ("scripted:{}/bad.json", "is no JSON list"),
        ("openai", "--dictate is"),
        ("none:x", "--dictate is"),
        ("", "--dictate is"),
    ],
)
def test_other_engines_are_refused_in_one_line(tmp_path, spec, reason):
    (tmp_path / "bad.json").write_text('[["No", 0]]')
    with pytest.raises(UserError, match=reason) as raised:
        transcribe.make_engine(spec.format(tmp_path))
    assert "\n" not in str(raised.value)
