"""Tokenizers of folders, and the embedded one: byte-level BPE with Qwen2.5-VL's special tokens and chat format.

Real checkpoints bring their own tokenizer, of any family (`markers`); `train` makes the small one of the phantom
model. There the tags of the answer format are added (not special) tokens: one id each, and still part of the
decoded text, as the rewards need; elsewhere they may be several.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_jax.errors import UserError, shown
from cxr_jax.models import chat_template
from cxr_jax.models.markers import CHATML, markers_of

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

# Qwen's, in Qwen's order, so that prompts are written as for the published models.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# What the format reward counts.
FORMAT_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SYSTEM_PROMPT = "You are a helpful assistant."

# Splits text into words with their leading space, numbers digit by digit, punctuation and white space: the behaviour
# of the Qwen2 pre-tokenizer for the text this model writes.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# "\n" inside expressions: "{%-" strips literal white space before it, line ends of the frame included.
CHAT_TEMPLATE = (
    "{%- set images = namespace(count=0) -%}"
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\n"
    + SYSTEM_PROMPT
    + "<|im_end|>\\n' }}{%- endif -%}"
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}"
    "{%- set images.count = images.count + 1 -%}"
    "{%- if add_vision_id -%}{{ 'Picture ' ~ images.count ~ ': ' }}{%- endif -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


# ---- Training ----------------------------------------------------------------------------------------------


def train(corpus: Iterable[str], folder: str, vocab_size: int = 1024) -> int:
    """Train a byte-level BPE on `corpus` and write a tokenizer folder that `transformers` loads.

    The same corpus gives the same files.

    Returns:
        The number of ids in use (<= vocab_size).
    """
    import tokenizers

    # Added tokens come on top of what is trained, and the sum must stay within vocab_size.
    added_count = len(SPECIAL_TOKENS) + len(FORMAT_TAGS)
    tokenizer = _byte_level_bpe()
    # All 256 bytes are tokens, so that every text has ids.
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - added_count,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The tags become tokens of their own afterwards; words beside them must not be learned glued to them.
    tags = re.compile("|".join(map(re.escape, FORMAT_TAGS)))
    parts = (part for text in corpus for part in tags.split(text) if part)
    tokenizer.train_from_iterator(parts, trainer)
    # After training, so that their ids follow those of the learned words.
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens(
        [tokenizers.AddedToken(tag, special=False, normalized=False) for tag in FORMAT_TAGS]
    )
    _write_folder(tokenizer, folder)
    return tokenizer.get_vocab_size()


def _byte_level_bpe() -> Any:
    """An untrained tokenizer of the `tokenizers` library that splits text as Qwen2's does."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = tokenizers.Tokenizer(models.BPE())
    # NFC as in Qwen2: an accented letter is one character however it was typed.
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Offsets keep the leading space that is part of a word's token.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _write_folder(tokenizer: Any, folder: str) -> None:
    """The three files that `transformers` needs."""
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    # A class that transformers 4 and 5 both know.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": CHATML.end_of_turn,
        "pad_token": CHATML.padding,
        "unk_token": None,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2)
    with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as file:
        file.write(CHAT_TEMPLATE)


# ---- Loading -----------------------------------------------------------------------------------------------


# What a tokenizer was kept in before tokenizer.json.
_PAIR = ("vocab.json", "merges.txt")
_TAG = re.compile(r"[<\[].*[>\]]")


def load(folder: str) -> Tokenizer:
    """Load the folder's `transformers` fast tokenizer: of tokenizer.json, or of vocab.json and merges.txt.

    Raises:
        UserError: when it does not load, or lacks the special tokens or a chat template that works.
    """
    from transformers import AutoTokenizer

    if missing := missing_files(Path(folder)):
        raise UserError(f"{folder}: {missing}")
    files = "tokenizer.json"
    if not os.path.isfile(os.path.join(folder, files)):
        _check_merges(Path(folder))
        files = " and ".join(_PAIR) + _as_class(Path(folder))
    try:
        # Whatever is wrong with the folder, its name and the kind of the error say enough.
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(
            f"{folder}: the tokenizer does not load from {files} ({type(error).__name__})"
        ) from error
    vocab = tokenizer.get_vocab()
    absent = [token for token in markers_of(tokenizer).needed if token not in vocab]
    if absent:
        raise UserError(
            f"{folder}: the tokenizer lacks the special tokens {', '.join(absent)}; they stand in tokenizer.json, "
            "in added_tokens.json or in added_tokens_decoder of tokenizer_config.json"
        )
    # Tried now, and not in the middle of a run.
    try:
        chat_template.choose(Path(folder), tokenizer)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return tokenizer


def missing_files(folder: Path) -> str:
    """Say which files a folder lacks for a tokenizer, in words for a message; empty if it has them."""
    has_vocab, has_merges = ((folder / name).is_file() for name in _PAIR)
    if (folder / "tokenizer.json").is_file() or (has_vocab and has_merges):
        return ""
    if has_vocab or has_merges:
        names = _PAIR if has_vocab else _PAIR[::-1]
        return f"no tokenizer.json in this folder, and {' without '.join(names)}"
    return f"no tokenizer.json in this folder, nor {' with '.join(_PAIR)}"


def _check_merges(folder: Path) -> None:
    """Refuse merges that do not make the words of the vocabulary: a text would become other, shorter tokens."""
    try:
        vocab = json.loads((folder / "vocab.json").read_bytes())
        lines = (folder / "merges.txt").read_bytes().decode().split("\n")
    except ValueError as error:
        raise UserError(f"{folder}: vocab.json or merges.txt is damaged") from error
    # A merge is two words with a space between them, and makes what they are together.
    merged = {line.rstrip("\r").replace(" ", "", 1) for line in lines}
    # One character is a byte, and what looks like a tag is an added token.
    words = [word for word in vocab if len(word) > 1 and not _TAG.fullmatch(word)]
    # Published vocabularies have none such, so a single one shows that the files are not of one tokenizer.
    unmade = sum(word not in merged for word in words)
    if unmade:
        raise UserError(
            f"{folder}: merges.txt does not belong to vocab.json, or is cut short: it makes {len(words) - unmade:,} "
            f"of its {len(words):,} words"
        )


def _as_class(folder: Path) -> str:
    """The class that tokenizer_config.json asks for, as words for a message."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
        return f" as a {shown(settings['tokenizer_class'])}"
    except (OSError, LookupError, TypeError, ValueError):
        return ""


# ---- Ids ---------------------------------------------------------------------------------------------------


def special_ids(tokenizer: Tokenizer, vocab_size: int = 0) -> dict[str, Any]:
    """Find the ids that sampling needs: `stop` (end of turn, end of text), `pad`, and `suppress` (never sampled).

    Args:
        vocab_size: rows of the model's embedding. Those beyond the tokenizer have no text, so a policy could pad its
            answers with them unseen; they are suppressed, too.
    """
    vocab, markers = tokenizer.get_vocab(), markers_of(tokenizer)
    # Whichever the tokenizer has; models were trained with either.
    stop = tuple(vocab[token] for token in markers.stops if token in vocab)
    never = {vocab[token] for token in vocab if token.startswith(markers.never)}
    if markers.spells_bytes:
        # No text is written so, as the character is a token, too; and beside bytes that are none, decoding would lose
        # it, while rewards read a tag.
        never |= {
            vocab[f"<0x{byte:02X}>"]
            for byte in range(128)
            if f"<0x{byte:02X}>" in vocab and chr(byte) in vocab
        }
    unused = set(range(vocab_size)) - set(vocab.values())
    return {"stop": stop, "pad": vocab[markers.padding], "suppress": tuple(sorted(never | unused))}


def config_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Find the token ids that a model config holds, as its fields."""
    vocab, markers = tokenizer.get_vocab(), markers_of(tokenizer)
    # By the texts of the tokens: ids differ between tokenizers.
    return {
        "image_token_id": vocab[markers.image],
        "video_token_id": None if markers.video is None else vocab[markers.video],
        "vision_start_token_id": vocab[markers.before_media],
        "vision_end_token_id": vocab[markers.after_media],
        "pad_token_id": vocab[markers.padding],
        "bos_token_id": vocab[markers.start_of_text],
        "eos_token_id": tuple(vocab[token] for token in markers.stops),
    }


# ---- Texts -------------------------------------------------------------------------------------------------


def completion_text(
    tokenizer: Tokenizer, tokens: np.ndarray, length: int, opened: np.ndarray | None = None
) -> str:
    """Decode a completion for people: what the rewards read.

    Args:
        tokens: int [C].
        length: the first tokens, which count; behind them is padding.
        opened: int [K], what the prompt has opened the completion with; -1 is no token. Or None.
    """
    token_ids = np.asarray(tokens)[:length].tolist()
    if opened is not None:
        token_ids = [
            token_id for token_id in np.asarray(opened).tolist() if token_id >= 0
        ] + token_ids
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))
