"""A tokenizer of Gemma 3's kind, made up: no published one may be had here, and none is needed.

Pieces of words with a mark for the space before them, bytes for all else, a normaliser instead of a pre-tokenizer, line
ends and runs of them as added tokens, and special tokens of Gemma's names. The tags of the answer are several tokens.
"""

import functools
import getpass
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from cxr_jax.labels import CHEXPERT_14
from cxr_jax.phantom import report_writer

SPACE = "\u2581"
TAG = re.compile("</?[a-z]+>")
HEAD = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TURN = ["<start_of_turn>", "<end_of_turn>"]
MEDIA = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
# Not special: text like other, that is looked for first.
PLAIN_ADDED = ["\n", "\n\n", "\n\n\n", "<unused0>", "<table>"]
WORDS = 1200
SENTENCES = (
    "Find abnormalities and support devices. The heart is enlarged. There is a small left pleural effusion. "
    "<think>The lungs are clear, and no pneumothorax is seen.</think><answer>No Finding</answer> "
    "a.</think>\n<answer>Edema, Fracture</answer> What is new? Is there anything larger than before?\n"
)
# The behaviour of the published template, in other words.
TEMPLATE = """
{{- bos_token -}}
{%- set ns = namespace(before='', turns=messages) -%}
{%- if messages[0].role == 'system' -%}
{%- set said = messages[0].content -%}
{%- set ns.before = (said if said is string else said[0].text) + '\\n\\n' -%}
{%- set ns.turns = messages[1:] -%}
{%- endif -%}
{%- for turn in ns.turns -%}
{%- if (turn.role == 'user') != (loop.index % 2 == 1) -%}
{{- raise_exception('users and the model must take turns') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\\n' -}}
{{- ns.before if loop.first else '' -}}
{%- if turn.content is string -%}{{- turn.content | trim -}}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == 'image' -%}{{- '<start_of_image>' -}}
{%- elif part.type == 'text' -%}{{- part.text | trim -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""


def _reports() -> list[str]:
    """What readers of phantoms write, so that their words are few tokens."""
    rng, texts = np.random.default_rng(0), []
    for number in range(200):
        scene = {
            "severity": (rng.random(12) < 0.4) * rng.random(12),
            "side": rng.integers(0, 3, 12),
            "zone": rng.integers(0, 3, 12),
            "device": rng.random(5) < 0.3,
            "quality": rng.integers(0, 2, 3),
        }
        report = report_writer.write(scene, "AB"[number % 2], rng)
        # Without tags: they are several tokens, none of which reaches into a word.
        texts.append(TAG.sub(" ", report_writer.target(report)))
    return texts


@functools.cache
def _trained() -> tuple[list[str], list]:
    """(words, merges) of a small BPE over words with their spaces."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPACE, "merged_with_next"), pre_tokenizers.Punctuation("contiguous")]
    )
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=WORDS, show_progress=False)
    learner.train_from_iterator([SENTENCES, ", ".join(CHEXPERT_14), *_reports()], trainer)
    model = json.loads(learner.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def vocabulary() -> list[str]:
    """All tokens by their ids: the media come last, as the published ones do."""
    words, _ = _trained()
    first = [*HEAD, *TURN, *PLAIN_ADDED, *BYTES, SPACE, *map(chr, range(0x21, 0x7F))]
    return [*first, *(word for word in words if word not in first), *MEDIA]


def build() -> tokenizers.Tokenizer:
    """The tokenizer of the library."""
    tokens = vocabulary()
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    _, merges = _trained()
    model = models.BPE(
        vocab=vocab,
        merges=[tuple(pair) for pair in merges],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    for names, special in ((HEAD + TURN + MEDIA, True), (PLAIN_ADDED, False)):
        tokenizer.add_tokens(
            [tokenizers.AddedToken(name, special=special, normalized=False) for name in names]
        )
    return tokenizer


def write(folder: Path, image_tokens: int = 64, side: int = 224) -> Path:
    """A folder of tokenizer and processor, as published ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    named = {"boi_token": MEDIA[0], "eoi_token": MEDIA[1], "image_token": MEDIA[2]}
    settings = {
        "tokenizer_class": "GemmaTokenizerFast",
        "processor_class": "Gemma3Processor",
        **dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), HEAD, strict=False)),
        "mask_token": "<mask>",
        "add_bos_token": True,
        "add_eos_token": False,
        **named,
        "extra_special_tokens": named,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "padding_side": "left",
    }
    images = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "size": {"height": side, "width": side},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_seq_length": image_tokens,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": None,
        "do_pan_and_scan": None,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
    }
    processor = {"image_seq_length": image_tokens, "processor_class": "Gemma3Processor"}
    for name, content in (
        ("tokenizer_config.json", settings),
        ("preprocessor_config.json", images),
        ("processor_config.json", processor),
    ):
        (folder / name).write_text(json.dumps(content, indent=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@functools.cache
def folder() -> Path:
    """A folder of films of 224 pixels in 64 tokens; never change it."""
    made_from = Path(__file__).read_bytes() + build().to_str().encode()
    name = f"cxr_jax_test_gemma_{getpass.getuser()}_{hashlib.sha256(made_from).hexdigest()[:16]}"
    path = Path(tempfile.gettempdir(), name)
    if not path.is_dir():
        temporary = write(Path(tempfile.mkdtemp()))
        try:
            temporary.rename(path)  # whole, since other processes of the suite look for it, too
        except OSError:
            shutil.rmtree(temporary)
        else:
            os.chmod(path, 0o755)
    return path
