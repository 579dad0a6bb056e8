"""Qwen's own tokenizer as a folder, from the ranks of its byte-level BPE that the PyPI package dashscope ships.

Qwen1.5 to Qwen3-VL have one vocabulary; only added tokens and templates differ (`KINDS`). The package is never
imported: one file of it is read, from this environment or from the oracle's (tests/oracle/requirements.txt), and tests
are skipped where neither has it. The folder is made once a machine, below the temporary folder.
"""

import base64
import functools
import getpass
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from places import ROOT

BASE, ROWS = 151_643, 151_936  # words of the BPE; rows of the 3B's embedding
SPECIAL = tuple(
    f"<|{name}|>"
    for name in "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad".split()
)
"""The special tokens, in the order of their ids from 151643 on."""
ADDED = ("<tool_call>", "</tool_call>") + tuple(
    f"<|{name}|>" for name in "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()
)
"""Added tokens that are part of a text, behind the special ones."""
ADDED_QWEN3 = (*ADDED, "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Qwen3's: the thought's tags are one token each, the answer's are not."""
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the other bytes for 256, 257, ..
_PLAIN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
ALPHABET = {byte: chr(byte) for byte in _PLAIN}
ALPHABET |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in _PLAIN)}

# What Qwen2.5-VL's published template writes, several images with and without their numbers included.
TEMPLATE = """\
{%- set images = namespace(n=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{%- set images.n = images.n + 1 -%}
{%- if add_vision_id -%}{{ 'Picture ' ~ images.n ~ ': ' }}{%- endif -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
# What Qwen3-VL's writes: no system turn of its own.
TEMPLATE_QWEN3 = TEMPLATE.replace(
    """\
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
""",
    "",
)
assert len(TEMPLATE_QWEN3) < len(TEMPLATE)
KINDS = {
    "qwen2.5": (ADDED, TEMPLATE),
    "qwen3": (ADDED_QWEN3, TEMPLATE_QWEN3),
    # Its thinking models begin the model's turn themselves.
    "qwen3-thinking": (
        ADDED_QWEN3,
        TEMPLATE_QWEN3.replace("assistant\\n'", "assistant\\n<think>\\n'"),
    ),
}


def spelt(piece: bytes) -> str:
    """Bytes as a vocabulary has them."""
    return "".join(ALPHABET[byte] for byte in piece)


def _ranks_file() -> Path | None:
    spec = importlib.util.find_spec("dashscope")  # found, not imported
    packages = [Path(spec.origin).parent] if spec and spec.origin else []
    packages += sorted((ROOT / ".venv-oracle").glob("lib/python3*/site-packages/dashscope"))
    files = [package / "resources" / "qwen.tiktoken" for package in packages]
    return next((file for file in files if file.is_file()), None)


@functools.cache
def ranks() -> dict[bytes, int]:
    """The words of the BPE -> their ids, which are also the order in which they are merged."""
    file = _ranks_file()
    if file is None:
        pytest.skip("dashscope with Qwen's ranks is not installed (tests/oracle/requirements.txt)")
    lines = file.read_bytes().splitlines()
    return {base64.b64decode(word): int(rank) for word, rank in map(bytes.split, lines)}


def merged(piece: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Merge a piece from its bytes on, the lowest rank first, by ranks under `below`: what tiktoken does."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, below) for a, b in zip(parts, parts[1:], strict=False)]
        least = min(joined)
        if least >= below:
            break
        at = joined.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def merges(ranks: dict[bytes, int]) -> list[list[bytes]]:
    """The merge that makes each word of more than one byte, in order: the last one of its own merging."""
    return [merged(word, ranks, rank) for word, rank in ranks.items() if len(word) > 1]


@functools.cache
def folder(kind: str = "qwen2.5") -> Path:
    """A folder with tokenizer.json, its settings and a chat template, as published ones have; never change it."""
    words, (added, template) = ranks(), KINDS[kind]
    made_from = json.dumps([template, PATTERN, SPECIAL, added, 1]).encode() + repr(words).encode()
    name = f"cxr_jax_test_qwen_{getpass.getuser()}_{hashlib.sha256(made_from).hexdigest()[:16]}"
    path = Path(tempfile.gettempdir(), name)
    if not path.is_dir():
        temporary = Path(tempfile.mkdtemp())
        _write(temporary, words, added, template)
        try:
            temporary.rename(path)  # whole, since other processes of the suite look for it, too
        except OSError:
            shutil.rmtree(temporary)
    return path


def _write(path: Path, words: dict[bytes, int], names: tuple[str, ...], template: str) -> None:
    vocab = {spelt(word): rank for word, rank in words.items()}
    pairs = [" ".join(map(spelt, pair)) for pair in merges(words)]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [
        {"id": BASE + i, "content": token, **flags, "special": token in SPECIAL}
        for i, token in enumerate(SPECIAL + names)
    ]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    split = dict(type="Split", pattern={"Regex": PATTERN}, behavior="Isolated", invert=False)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="")
    model |= dict(end_of_word_suffix="", fuse_unk=False, byte_fallback=False)
    parts = dict(version="1.0", truncation=None, padding=None, added_tokens=added)
    parts |= dict(normalizer={"type": "NFC"}, post_processor=byte_level, decoder=byte_level)
    parts["pre_tokenizer"] = dict(type="Sequence", pretokenizers=[split, byte_level])
    parts["model"] = {**model, "vocab": vocab, "merges": pairs}
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
    settings = dict(tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=decoder, bos_token=None)
    settings |= dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None)
    settings |= dict(model_max_length=131072, errors="replace", split_special_tokens=False)
    settings |= dict(add_prefix_space=False, clean_up_tokenization_spaces=False)
    (path / "tokenizer.json").write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (path / "chat_template.jinja").write_text(template)
    os.chmod(path, 0o755)
