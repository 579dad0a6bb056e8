"""`python -m cxr_jax.convert` in tests: called, refused, and the files that it leaves."""

import os
import re

import numpy as np

from cxr_jax import convert
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.weights import native_folder
from cxr_jax.weights.safetensors_file import Tensors


def stored(folder):
    """Canonical key -> (type, bytes) of every tensor of a Hugging Face folder."""
    tensors = Tensors(folder, hf_table.canonical_key)
    return {k: (tensors.dtype(k), np.array(tensors[k]).tobytes()) for k in tensors.stored}


def call(*argv):
    return convert.main([str(a) for a in argv])


def listing(folder):
    """Every path below a folder; links are not followed."""
    return sorted(
        os.path.join(d, name) for d, dirs, files in os.walk(folder) for name in dirs + files
    )


def refuses(tmp_path, capsys, argv, message, code=2):
    before = listing(tmp_path)
    assert call(*argv) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1, said
    assert re.search(message, said.err), said.err
    assert "Traceback" not in said.err and len(said.err) < 600
    assert listing(tmp_path) == before


def largest(folder):
    return max(
        (p for p in (folder / native_folder.ARRAYS).rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)
