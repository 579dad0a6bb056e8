"""Fixtures of the tests of `python -m cxr_jax.label`."""

import csv

import numpy as np
import pytest
from label_inputs import SECRET

from cxr_jax import label, labels
from cxr_jax.labels.taxonomy import INDEX


@pytest.fixture
def stub(monkeypatch):
    """A reader that knows one finding. Returns the list of its calls: (texts, lexicon, parents)."""
    calls = []

    def read_reports(texts, lexicon=None, parents=False):
        calls.append((list(texts), lexicon, parents))
        state = np.full((len(texts), 14), -2, np.int8)
        for i, text in enumerate(texts):
            text = text.lower()
            text.encode()  # what the parser takes is valid Unicode
            if "edema" in text:
                state[i, INDEX["Edema"]] = (
                    -1 if "possible" in text else 0 if "no edema" in text else 1
                )
        side = lambda word: (state > -2) & np.array([word in text for text in texts])[:, None]
        foreign, unread = np.zeros(len(texts), bool), np.zeros(len(texts), np.int32)
        sides = {"right": side("right"), "left": side("left")}
        return {"state": state, **sides, "foreign": foreign, "unread": unread}

    monkeypatch.setattr(labels, "read_reports", read_reports, raising=False)
    return calls


@pytest.fixture
def run(tmp_path, capsys):
    """run(*argv) -> (exit code, rows of OUT or None, rows of the errors file or None, stdout, stderr)."""

    def call(*argv, out="out.csv"):
        out = tmp_path / out
        code = label.main([*map(str, argv), "-o", str(out)])
        shown = capsys.readouterr()
        errors = out.with_suffix(".errors.csv")
        assert SECRET not in shown.out + shown.err
        assert not errors.exists() or SECRET not in errors.read_text()
        assert not list(tmp_path.glob(".*.partial"))
        read = lambda path: (
            list(csv.DictReader(open(path, newline="", encoding="utf-8")))
            if path.exists()
            else None
        )
        return code, read(out), read(errors), shown.out, shown.err

    return call
