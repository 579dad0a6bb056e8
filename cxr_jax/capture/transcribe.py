"""From samples to words with times and confidence: by faster-whisper, by a script in tests, or not at all (typing).

A speech model invents words in silence and drops short ones ("no", above all): silence is not given to it, and what it
says is a proposal, which `correct.py` marks and a person looks at.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cxr_jax.capture import audio
from cxr_jax.errors import UserError

# Nine terms that a general model seldom writes unasked: with them tiny.en makes about half the errors (docs/room.md).
PROMPT = (
    "Chest radiograph. Pneumothorax, pleural effusion, costophrenic angle, cardiomegaly, atelectasis, "
    "consolidation, pulmonary edema, endotracheal tube above the carina, mediastinum."
)
SILENCE_DB = (
    -60.0
)  # root mean square below which nothing was said: a muted microphone, not a quiet voice
NONE, SCRIPTED, WHISPER = ENGINES = ("none", "scripted", "whisper")


class Word(NamedTuple):
    """A word as it was heard.

    Attributes:
        text: without white space around it.
        start, end: seconds from the beginning of the recording.
        probability: of the model, 0..1; not calibrated.
    """

    text: str
    start: float
    end: float
    probability: float


class Engine(Protocol):
    """What turns samples into words.

    Attributes:
        name: of ENGINES.
        model_sha256: of the model's file; None of an engine without one.
    """

    name: str
    model_sha256: str | None

    def transcribe(self, samples: np.ndarray, prompt: str) -> list[Word]:
        """Write down float32 [N] of `audio.SAMPLE_RATE`, in the order in which it was said."""
        ...


class ScriptedEngine:
    """Gives the words of a file, whatever was said: for tests of all that comes behind it.

    Args:
        heard_words: what is "heard" in a recording that is not silent.
    """

    name = SCRIPTED

    def __init__(self, heard_words: Sequence[Word]) -> None:
        # Its hash stands where a model's does, so that rows of tests have a provenance, too.
        self.words = list(heard_words)
        script = json.dumps([list(heard_word) for heard_word in self.words])
        self.model_sha256: str | None = hashlib.sha256(script.encode()).hexdigest()

    def transcribe(self, samples: np.ndarray, prompt: str) -> list[Word]:
        """Return the script."""
        return list(self.words)


class WhisperEngine:
    """faster-whisper (extra `dictate`) with a model folder of the user's own; loads it when it is first asked.

    Args:
        folder: of a CTranslate2 model: model.bin, config.json, tokenizer and vocabulary.
        threads: of the processor that it may use.

    Raises:
        UserError: for a folder without a model, or where the package is not installed.
    """

    name = WHISPER

    def __init__(self, folder: Path, threads: int = 1) -> None:
        # Both are asked at the start of a server, and not when the first reader has spoken.
        weights = folder / "model.bin"
        if not weights.is_file():
            raise UserError(f"{folder}: holds no model.bin of a CTranslate2 (faster-whisper) model")
        with contextlib.suppress(ImportError):
            import faster_whisper

            self._package = faster_whisper
        if not hasattr(self, "_package"):
            raise UserError("faster-whisper is not installed (pip install 'cxr_jax[dictate]')")
        # Loaded when somebody speaks: a server whose readers type needs no gigabyte for it.
        self._folder, self._threads = folder, threads
        self._model: Any = None
        # One recording at a time: two would each take the memory and the threads of one.
        self._lock = threading.Lock()
        # By which model a row was heard is part of where it is from.
        with weights.open("rb") as weights_file:
            self.model_sha256: str | None = hashlib.file_digest(weights_file, "sha256").hexdigest()

    def transcribe(self, samples: np.ndarray, prompt: str) -> list[Word]:
        """Run the model over the parts in which somebody speaks."""
        with self._lock:
            if self._model is None:
                # From the folder alone: a name would be looked up on a hub.
                self._model = self._package.WhisperModel(
                    str(self._folder),
                    device="cpu",
                    compute_type="int8",
                    cpu_threads=self._threads,
                    local_files_only=True,
                )
            # Its voice detector cuts silence away, in which it would hear "You" or "Thank you"; and each window stands
            # by itself, since one that went wrong drags the next along.
            segments, _ = self._model.transcribe(
                samples,
                language="en",
                initial_prompt=prompt or None,
                vad_filter=True,
                word_timestamps=True,
                condition_on_previous_text=False,
            )
            return [
                Word(
                    heard_word.word.strip(),
                    float(heard_word.start),
                    float(heard_word.end),
                    float(heard_word.probability),
                )
                for segment in segments
                for heard_word in segment.words or ()
                if heard_word.word.strip()
            ]


def make_engine(engine_spec: str) -> Engine | None:
    """Make the engine that a flag names.

    Args:
        engine_spec: "none" (None is returned: thoughts are typed), "whisper:FOLDER", or "scripted:FILE", a JSON list of
            [text, start, end, probability].

    Raises:
        UserError: for any other, or what cannot be read.
    """
    # A kind, and where it lies: none has a name that would be looked up on a hub.
    engine_kind, _, engine_place = engine_spec.partition(":")
    if engine_kind == NONE and not engine_place:
        return None
    if engine_kind == WHISPER and engine_place:
        return WhisperEngine(Path(engine_place))
    if engine_kind == SCRIPTED and engine_place:
        # A file of a test, or of somebody who tries the page without a model.
        try:
            script = json.loads(Path(engine_place).read_text(encoding="utf-8"))
            return ScriptedEngine(
                [Word(str(text), float(a), float(b), float(p)) for text, a, b, p in script]
            )
        except OSError as error:
            raise UserError(f"{engine_place}: {error.strerror}") from None
        except (ValueError, TypeError):
            raise UserError(
                f"{engine_place}: is no JSON list of [text, start, end, probability]"
            ) from None
    raise UserError("--dictate is none, whisper:FOLDER or scripted:FILE")


def transcribe(engine: Engine, samples: np.ndarray, prompt: str = PROMPT) -> list[Word]:
    """Write down a recording; of silence nothing, whatever the engine would hear in it."""
    # Before any engine: the voice detector of one may be missing in another.
    if not samples.size or audio.loudness(samples) < SILENCE_DB:
        return []
    return [heard_word for heard_word in engine.transcribe(samples, prompt) if heard_word.text]


def join_words(heard_words: Sequence[Word]) -> str:
    """Write words as one text."""
    return " ".join(heard_word.text for heard_word in heard_words)
