"""The phantom tokenizer under chat templates that open the model's turn, as published ones do."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.weights import pretrained

_START = "{{ '<|im_start|>assistant\\n' }}"
assert _START in tokenizers.CHAT_TEMPLATE


def opening(text: str) -> str:
    """The phantom's template, with `text` behind the head of the model's turn."""
    written = text.replace("\n", "\\n")
    return tokenizers.CHAT_TEMPLATE.replace(_START, _START[:-4] + written + "' }}")


# As DeepSeek-R1 distilled and Qwen3's thinking models do; as Qwen3 does without thinking; and stranger ones.
OPENED = {
    "none": "",
    "think": "<think>\n",
    "think_glued": "<think>",
    "empty_think": "<think>\n\n</think>\n\n",
    "words": "<think>\nLet me look at the film.",
    "answer": "<think>\n\n</think>\n\n<answer>",
    "preface": "Certainly. ",
}


@functools.cache
def tokenizer_with(opened: str):
    """A tokenizer of its own, whose template opens the model's turn so."""
    made = tokenizers.load(pretrained.PHANTOM)
    made.chat_template = opening(opened)
    return made


def folder_with(opened: str, path: Path) -> Path:
    """A copy of the embedded model's folder with that template."""
    shutil.copytree(pretrained.PHANTOM, path)
    (path / "chat_template.jinja").write_text(opening(opened))
    return path


@functools.cache
def splitting_tokenizer():
    """The oracle of plain text: all added tokens are special ones, which transformers can split."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer")
        shutil.copytree(
            pretrained.PHANTOM, path, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
        )
        content = json.loads((path / "tokenizer.json").read_text())
        for token in content["added_tokens"]:
            token["special"] = True
        (path / "tokenizer.json").write_text(json.dumps(content))
        return tokenizers.load(str(path))


def split(text: str) -> list[int]:
    """The ids of a text in which nothing is a special token, by transformers."""
    oracle = splitting_tokenizer()
    return oracle(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
